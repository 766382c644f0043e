"""Kinds of damage: what one is, and the registry in which command, report and experiments find them all.

A kind is one file in ``detectors/``, found by being there (docs/guide/detector.md). A kind from elsewhere is registered
by importing the file that defines it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from robustdiff.audit.finding import Action, Finding, Unasked
from robustdiff.audit.parts import REGULARISER

if TYPE_CHECKING:  # it holds a result, which is made with detectors
    from torch import Tensor

    from robustdiff.audit.survey import Survey


class Detector:
    """A kind of damage: how it comes about, and which images show it.

    Attributes:
        name: As ``auto_without`` and findings name it: one word.
        title: What images of this kind are, for people, after "12 images,".
        become: What others become at a strength, which is put into the braces: "at JPEG quality {:.0f}".
        strengths: The weakest and the strongest that :meth:`simulate` is tried with; empty if it cannot be simulated.
        order: Kinds are asked for by increasing order, each of the images that the earlier ones left. Noise has 30:
            what is to be found before it takes less.
        repairs: Whether what it finds is mended before anything else is asked; such kinds come first.
        acts: Whether training does anything about it; if not, it need not be left out.
        usual: Whether pictures may have it of themselves, as drawings have words: not looked for where much of a set
            has.
        faint: Whether most pictures have a little of it, as cameras' noise: never tried on a large group at once.
        least_side: Edge in pixels of the smallest images that it can be asked of.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    become: ClassVar[str] = "with it"
    strengths: ClassVar[tuple[float, ...]] = ()
    order: ClassVar[int] = 25
    repairs: ClassVar[bool] = False
    acts: ClassVar[bool] = True
    usual: ClassVar[bool] = False
    faint: ClassVar[bool] = False
    least_side: ClassVar[int] = 4

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The image with this damage.

        Args:
            image: Shape (C, H, W), in [-1, 1]; not changed.
            strength: Between the two of :attr:`strengths`.
            generator: Source of all chance.

        Raises:
            NotImplementedError: If the kind has no simulator.
        """
        raise NotImplementedError(f"{self.name} cannot be simulated")

    def possible(self, images: Tensor) -> Tensor:
        """Which images, (B, C, H, W) of 8 bit in [-1, 1], may have it at all, bool, (B,): the others never show it.

        Here: all.
        """
        return torch.ones(len(images), dtype=torch.bool)

    def detect(self, survey: Survey) -> Tensor | None:
        """Which images show it, bool, shape (N,), of ``survey.left``; None: it claims none for itself.

        Here: of a kind that can be simulated, those that look like it (``comparison.py``).
        """
        return survey.shows(self) if self.strengths else None

    def unasked(self, survey: Survey) -> Unasked | None:
        """Why :meth:`detect` could not tell; None if it could.

        Here: a kind that can be simulated needs a comparison, or, with a rule of its own, as many pictures; what
        repairs is measured in each image.
        """
        if not self.strengths or self.repairs or survey.compared is not None:
            return None
        own = type(self).detect is not Detector.detect
        return None if own and survey.uncompared is not Unasked.TOO_FEW else survey.uncompared

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """What is done about the images that :meth:`detect` found: here, used at noise levels that hide the damage.

        Args:
            survey: What is known; :meth:`Survey.add` takes what was found.
            shows: What :meth:`detect` said.
        """
        if shows is None or not bool(shows.any()):
            return
        if survey.compared is not None and self.strengths:
            survey.add_simulated(self, shows)
            return
        level = survey.hidden_above(shows)
        finding = Finding(self.name, int(shows.sum()), self.title, Action.TRAINED_WHERE_HIDDEN, level)
        survey.add(finding, shows, min_sigma=survey.used_above(level, shows))


_registered: dict[str, Detector] = {}
Kind = TypeVar("Kind", bound=type[Detector])


def register_detector(kind: Kind) -> Kind:
    """Class decorator: from now on every audit looks for this kind.

    Raises:
        ValueError: If it is no :class:`Detector`, has no name or title, or something else has the name.
    """
    if not (isinstance(kind, type) and issubclass(kind, Detector)):
        raise ValueError(f"detector {getattr(kind, '__name__', kind)} must be a subclass of Detector")
    name = getattr(kind, "name", "")
    if not (name.isidentifier() and getattr(kind, "title", "")):
        raise ValueError(f"detector {kind.__name__} needs a name, one word, and a title")
    if name == REGULARISER:
        raise ValueError(f"detector {kind.__name__}: {name!r} is the name of another part; choose another")
    other = type(_registered.get(name))
    # A file that is read again, as notebooks do, replaces its own.
    if name in _registered and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"detector {kind.__name__}: {name!r} is the name of {other.__qualname__}; choose another")
    _registered[name] = kind()
    return kind


def registered_detectors() -> tuple[Detector, ...]:
    """Every kind of damage that is looked for, by increasing order."""
    package = importlib.import_module("robustdiff.audit.detectors")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return tuple(sorted(_registered.values(), key=lambda kind: (kind.order, kind.name)))
