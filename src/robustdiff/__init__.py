"""Train diffusion models that stay clean when their training images are not.

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robustdiff.version import __version__ as __version__

if TYPE_CHECKING:
    from robustdiff.attack import APGD as APGD
    from robustdiff.attack import PGD as PGD
    from robustdiff.attack import RandomSearch as RandomSearch
    from robustdiff.baselines import InputPerturbationObjective as InputPerturbationObjective
    from robustdiff.baselines import InvarianceObjective as InvarianceObjective
    from robustdiff.baselines import PseudoHuberObjective as PseudoHuberObjective
    from robustdiff.config import CorruptConfig as CorruptConfig
    from robustdiff.config import SampleConfig as SampleConfig
    from robustdiff.config import TrainConfig as TrainConfig
    from robustdiff.config import UsageError as UsageError
    from robustdiff.corruption import Corruption as Corruption
    from robustdiff.dirty_copy import write_dirty_copy as write_dirty_copy
    from robustdiff.images import ImageSet as ImageSet
    from robustdiff.images import load_images as load_images
    from robustdiff.joint import BatchDistance as BatchDistance
    from robustdiff.joint import FeatureDistance as FeatureDistance
    from robustdiff.networks import PointDenoiser as PointDenoiser
    from robustdiff.networks import build_unet as build_unet
    from robustdiff.objective import Gate as Gate
    from robustdiff.objective import LossTerms as LossTerms
    from robustdiff.objective import PlainObjective as PlainObjective
    from robustdiff.objective import RobustObjective as RobustObjective
    from robustdiff.perturbation import AdversarialPerturbation as AdversarialPerturbation
    from robustdiff.perturbation import Perturbation as Perturbation
    from robustdiff.perturbation import Radius as Radius
    from robustdiff.perturbation import RandomPerturbation as RandomPerturbation
    from robustdiff.process import NoiseProcess as NoiseProcess
    from robustdiff.purification import PurifiedLoss as PurifiedLoss
    from robustdiff.purification import purify as purify
    from robustdiff.sampling import RelabelledModel as RelabelledModel
    from robustdiff.sampling import load_pipeline as load_pipeline
    from robustdiff.sampling import sample as sample
    from robustdiff.sampling import trajectory_of as trajectory_of
    from robustdiff.threat import Ball as Ball
    from robustdiff.threat import Displacement as Displacement
    from robustdiff.threat import Function as Function
    from robustdiff.threat import OneStep as OneStep
    from robustdiff.training import train as train
    from robustdiff.trajectory import Trajectory as Trajectory
    from robustdiff.worlds import LinearGaussian as LinearGaussian
    from robustdiff.worlds import Mixture as Mixture
    from robustdiff.worlds import Plane as Plane
    from robustdiff.worlds import Subspace as Subspace
    from robustdiff.worlds import make_dirty as make_dirty


_HOMES = {
    "config": ("CorruptConfig", "SampleConfig", "TrainConfig", "UsageError"),
    "corruption": ("Corruption",),
    "images": ("ImageSet", "load_images"),
    "dirty_copy": ("write_dirty_copy",),
    "networks": ("PointDenoiser", "build_unet"),
    "objective": ("Gate", "LossTerms", "PlainObjective", "RobustObjective"),
    "baselines": ("InputPerturbationObjective", "InvarianceObjective", "PseudoHuberObjective"),
    "perturbation": ("AdversarialPerturbation", "Perturbation", "Radius", "RandomPerturbation"),
    "process": ("NoiseProcess",),
    "trajectory": ("Trajectory",),
    "threat": ("Ball", "Displacement", "Function", "OneStep"),
    "joint": ("BatchDistance", "FeatureDistance"),
    "attack": ("APGD", "PGD", "RandomSearch"),
    "sampling": ("RelabelledModel", "load_pipeline", "sample", "trajectory_of"),
    "purification": ("PurifiedLoss", "purify"),
    "training": ("train",),
    "worlds": ("LinearGaussian", "Mixture", "Plane", "Subspace", "make_dirty"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
