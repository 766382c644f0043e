"""What each image of a set can be trusted for, found out without being told: every kind of damage, in its order.

Groups are found, not thresholds set: an image is called damaged only if it belongs to a group that stands apart
(``mixture.py``). The questions are asked each of the images that the earlier ones left; what damaged images lack is
measured against those that are left at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robustdiff.audit.detector import registered_detectors
from robustdiff.audit.finding import Action, Unasked
from robustdiff.audit.parts import REGULARISER, check_parts
from robustdiff.audit.result import AuditResult
from robustdiff.audit.spectral_model import Load, held
from robustdiff.audit.survey import Survey
from robustdiff.data.dataset import load_images
from robustdiff.data.sources.base import numbers
from robustdiff.utils.images import from_uint8

EDGE = 0.75
"""Edge of the regulariser's gate over the noise of the images."""
LARGEST = 16.0
"""Pixels beyond this, in units of [-1, 1], are those of another scale: the strongest noise of `corrupt` seldom is."""


Array = Tensor | np.ndarray[Any, Any]


class ImageSet(Protocol):
    """Images of one size, as :class:`robustdiff.data.dataset.ImageDataset` holds them."""

    @property
    def names(self) -> Sequence[str]:
        """One per image."""

    def __len__(self) -> int:
        """N, how many."""

    def x0(self, index: Sequence[int], /) -> Tensor:
        """Images with these places, (B, C, H, W), in [-1, 1]."""


def audit(
    images: ImageSet | Array | str | Path,
    *,
    without: Sequence[str] = (),
    features: Array | tuple[str, Array] | None = None,
    memory: int = 0,
    **options: Any,  # noqa: ANN401 - those of load_images
) -> AuditResult:
    """Find out, told nothing, what is wrong with each image, and from which noise level on it can be trusted.

    Nothing is random: the same images are always judged alike.

    Args:
        images: A set of one size: an :class:`~robustdiff.data.dataset.ImageDataset`; a tensor or NumPy array, shape
            (N, C, H, W), uint8 or floating point in [-1, 1] (noise may exceed it); or what
            :func:`robustdiff.load_images` takes, a folder say.
        without: Parts not to look for, or not to act on: names of detectors, or ``regulariser``.
        features: Of every image, shape (N, d), in which foreign pictures are far away; or their name and them. The
            distance is ``signs["distance"]`` of the result, and not acted on.
        memory: Bytes that images may take between the passes over them; those that do not fit are loaded anew.
        options: Those of :func:`robustdiff.load_images`, if ``images`` is a source.

    Raises:
        ValueError: If a part is unknown, the images are no images, or the features not finite.
    """
    if isinstance(images, str | Path):
        images = load_images(images, **options)
    elif options:
        raise ValueError(f"{', '.join(options)}: only for a source that load_images reads; leave it out")
    if isinstance(images, Tensor | np.ndarray):
        images = _TensorImages.of(_tensor("images", images))
    if not hasattr(images, "x0"):
        raise ValueError(f"images must be a tensor, a NumPy array, a set or a source, got {type(images).__name__}")
    count, x0 = len(images), images.x0
    known = None
    if features is not None:
        name, values = features if isinstance(features, tuple) else ("features", features)
        values = _tensor("features", values)
        if values.ndim != 2 or len(values) != count:
            raise ValueError(f"features must have shape ({count}, d), got {tuple(values.shape)}")
        if not bool(values.isfinite().all()):
            raise ValueError("features must be finite: leave the images out whose features are not")
        known = name, values

    def load(places: range) -> Tensor:
        some = x0(list(places))
        if not bool(some.isfinite().all()):
            raise ValueError(f"images must be finite: one of {images.names[places[0]]} ... is not")
        return some

    return detect(load, count, without, memory, images.names, known)


def _tensor(what: str, given: Array) -> Tensor:
    """A user's array without its history, of a precision that can be computed in."""
    if isinstance(given, np.ndarray):
        as_it_is = given.flags.writeable and min(given.strides, default=0) >= 0
        try:
            given = torch.from_numpy(given if as_it_is else given.copy())
        except (TypeError, ValueError):  # words, or bytes in another order
            raise ValueError(f"{what} must be an array of numbers, got {given.dtype}") from None
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} must be a tensor or a NumPy array, got {type(given).__name__}")
    return given.detach().float() if given.dtype in (torch.bfloat16, torch.float16) else given.detach()


@dataclass(frozen=True, eq=False)
class _TensorImages:
    """A tensor as an :class:`ImageSet`, named by number."""

    pixels: Tensor
    names: Sequence[str]

    @classmethod
    def of(cls, pixels: Tensor) -> _TensorImages:
        if pixels.ndim != 4 or 0 in pixels.shape:
            raise ValueError(f"images must have shape (N, C, H, W), none of them 0, got {tuple(pixels.shape)}")
        if not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
            raise ValueError(f"images must be uint8, or floating point in [-1, 1], got {pixels.dtype}")
        if pixels.is_floating_point() and not bool((pixels.abs() <= LARGEST).all()):
            raise ValueError("images must be finite and in [-1, 1]: divide by 127.5 and subtract 1, or give uint8")
        return cls(pixels, numbers(len(pixels)))

    def __len__(self) -> int:
        return len(self.pixels)

    def x0(self, index: Sequence[int], /) -> Tensor:
        some = self.pixels[index].cpu()
        return some if some.is_floating_point() else from_uint8(some)


def detect(
    load: Load,
    count: int,
    without: Sequence[str] = (),
    memory: int = 0,
    names: Sequence[str] = (),
    features: tuple[str, Tensor] | None = None,
) -> AuditResult:
    """Look at every image of a set, all of one size: :func:`audit` with the images behind a function.

    Args:
        load: Images by place, as they will be trained on.
        count: N >= 1.
        without: Parts (:func:`robustdiff.audit.parts.parts`) that are not looked for, or not acted on; or one.
        memory: As for :func:`audit`.
        names: Of all images. Default: their numbers.
        features: A name, and features of every image, shape (N, d).

    Raises:
        ValueError: If a part is unknown, there is no image, or a detector does not answer as it should.
    """
    without = (without,) if isinstance(without, str) else without
    if count == 0:
        raise ValueError("images: there is none; give one at least")
    check_parts(without)
    load = held(load, count, memory)
    side = min(load(range(1)).shape[2:])
    survey = Survey(load, count, names or numbers(count), features)
    every = [kind for kind in registered_detectors() if kind.name not in without]
    kinds = [kind for kind in every if side >= kind.least_side]
    survey.compare([kind for kind in registered_detectors() if side >= kind.least_side])
    found = {}
    for kind in sorted(kinds, key=lambda kind: not kind.repairs):
        survey.asking = kind.name
        shows = found[kind.name] = kind.detect(survey)
        if shows is not None:
            if not (isinstance(shows, Tensor) and shows.dtype == torch.bool and shows.shape == (count,)):
                raise ValueError(f"detector {kind.name}: `detect` must return bool of shape ({count},), or None")
            survey.claim(shows)
    for kind in kinds:
        kind.measure(survey, found[kind.name])
    why = {kind.name: kind.unasked(survey) if kind in kinds else Unasked.TOO_SMALL for kind in every}
    survey.add(unasked={name: one for name, one in why.items() if one is not None and name not in survey.result.groups})
    return survey.result if REGULARISER in without else _fall_back(survey.result)


def _fall_back(result: AuditResult) -> AuditResult:
    """If no image is right at every level, some must be trained there all the same, or nothing would be.

    The noisy ones, and regularised below their noise; if there are none, those with missing pixels, by the others that
    they have; if there are none, the least damaged.
    """
    used = result.weight > 0
    if not bool(used.any()) or not bool((result.lowest[used] > 0).all()):
        return result
    noisy = result.noise_std[used & (result.noise_std > 0)]
    if not len(noisy) and bool((used & result.has_missing).any()):
        findings = tuple(
            replace(one, otherwise=Action.TRAINED_BY_OTHER_PIXELS) if one.action is Action.FILLED_IN else one
            for one in result.findings
        )
        return replace(result, masked=True, findings=findings)
    if not len(noisy):
        least = used & (result.min_sigma == result.min_sigma[used].min())
        level = float(result.min_sigma[least][0])
        findings = tuple(
            replace(one, otherwise=Action.TRAINED_EVERYWHERE) if one.level == level else one for one in result.findings
        )
        return replace(result, min_sigma=torch.where(least, 0.0, result.min_sigma), findings=findings)
    above = (Action.TRAINED_ABOVE, Action.TRAINED_ABOVE_OWN)
    findings = tuple(replace(one, action=Action.REGULARISED) if one.action in above else one for one in result.findings)
    return replace(
        result,
        noise_std=torch.zeros_like(result.noise_std),
        min_sigma=torch.where(result.min_sigma > result.noise_std, result.min_sigma, 0.0),
        regularise=(0.0, EDGE * float(noisy.median())),
        findings=findings,
    )
