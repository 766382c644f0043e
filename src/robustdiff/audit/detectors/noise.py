"""Which images of a set carry white noise, and how much: groups of estimates, and what must hold of one to be noisy.

The estimates are those of ``spectral_model.py``. A group is noisy if it stands apart by more than chance, its excess
over the common spectrum is white, and it is no long tail; if none stands apart, all may be, of one level or of many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustdiff.audit import mixture
from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.simulate import corrupted
from robustdiff.audit.spectral_model import Load, SpectralFit, batches, energies_of, separate
from robustdiff.audit.survey import FEWEST, Survey
from robustdiff.utils.images import to_uint8

WHITE, WHITER = 0.5, 0.7
"""Least whiteness of the excess of a noisy group; the second where none stands apart and none is large."""
LEAST_LEVEL = 0.03
"""Lower noise, 4 grey levels of 255, is that of cameras."""
ALL_NOISY, TIGHT, LONG, LONGER = 0.05, 0.5, 0.15, 0.2
"""One group alone is called noisy if its level is at least the first and the 5 % quantile of its estimates at least the
second times their median, or all estimates are one by chance; or, image by image, if its 95 % quantile is at least the
fourth, or the third and the excess is whiter: clean photographs, small and grey, reached 0.152."""
BY_CHANCE = 1.3
"""Distance of a group from the one below, relative to that of two parts of one, below which they are one."""
SPREAD = 0.3
"""Relative spread of estimates above which a noisy group has no common level."""
FOREIGN = 4.0
"""Robust deviations of the others' misfit, above them, at which the lowest group is of another kind: checkerboards lay
at 6 and more, clean images below noisy ones at 2 and less."""
BURIED = 0.25
"""Signal to noise, in variance, below which there is no picture left."""
SMALL = 8
"""Edge of blocks below which one group alone says nothing: too few directions to tell its texture from noise."""
FLATTEST = 0.4
"""Deviation in the flattest squares of noisy images, of their noise, at least; clipping takes some of it."""
FEWEST_VALUES = 8
"""Least number of grey levels that hold nine tenths of a noisy image: drawings and dithered prints have fewer."""
AGAIN = 2
"""Blocks per value that the images without noise must have for directions of their own."""


@dataclass(frozen=True, eq=False)
class NoisyGroup:
    """Images that carry noise.

    Attributes:
        members: bool, shape (N,).
        level: sigma that they share, or the largest of many.
        what: What was found, for people.
        action: What training does about it.
        apart: Ashman's D to the images below; None if none are.
    """

    members: Tensor
    level: float
    what: str
    action: Action
    apart: float | None = None

    @property
    def finding(self) -> Finding:
        """The same without the images."""
        sure = "" if self.apart is None else f", apart by {self.apart:.1f} deviations"
        return Finding("noise", int(self.members.sum()), self.what + sure, self.action, self.level, self.apart)


@register_detector
class Noise(Detector):
    """White noise; its strength is the standard deviation, pixels being in [-1, 1]."""

    name = "noise"
    title = "with white noise"
    become = "with white noise of level {:.3g}"
    strengths = (0.03, 0.5)
    order = 30

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`; not clipped."""
        return corrupted(image, generator, "gaussian", sigma=strength)

    def detect(self, survey: Survey) -> None:
        """Noisy images are usable above their noise; those without a picture left are not.

        It claims none for itself: beside their noise, which is known, their pictures are those of clean ones.
        """
        if survey.compared is not None:
            _compared(self, survey)
            return
        places = survey.left.nonzero().flatten()
        if len(places) < FEWEST:
            return

        def some(here: range) -> Tensor:
            return torch.cat([survey.load(range(place, place + 1)) for place in places[list(here)].tolist()])

        def everywhere(known: Tensor, part: Tensor) -> Tensor:
            whole = known.clone()
            whole[places] = part
            return whole

        seen, noise, found, other = noisy_images(some, len(places))
        weight, before = torch.ones_like(noise), survey.result
        for group in found:
            if group.action is Action.LEFT_OUT_AS_NOISE:
                weight[group.members] = 0.0
        survey.foreign = everywhere(survey.foreign, other)
        noise_std = everywhere(before.noise_std, noise)
        survey.add(
            noise_std=noise_std,
            min_sigma=torch.maximum(before.min_sigma, noise_std),
            weight=everywhere(before.weight, weight),
            sigma=everywhere(before.sigma, seen.sigma),
            sigma_error=everywhere(before.sigma_error, seen.error),
        )
        nowhere = torch.zeros_like(survey.foreign)
        for group in found:
            survey.add(group.finding, everywhere(nowhere, group.members))


def _compared(kind: Noise, survey: Survey) -> None:
    """Images that look like noised copies have the noise that they read as; the others may all be noisy."""
    found = survey.compared
    assert found is not None, "there was a comparison"
    shows = survey.left & found.shows(kind.name)
    strength, before = found.strength[:, found.names.index(kind.name)], survey.result
    noise = torch.where(shows, strength, 0.0)
    rest = survey.left & ~survey.looks_like(*found.names) & (survey.each(values_used) >= FEWEST_VALUES)
    if bool(shows.any()):
        own = noise[shows].std(correction=0) > SPREAD * noise[shows].mean()
        level = float(noise[shows].median())
        if not bool(own):
            noise = torch.where(shows, level, 0.0)
        what = f"white noise, {'levels about' if own else 'level'} {level:.3g}"
        told = found.told_apart.get(kind.name)
        survey.add(Finding(kind.name, int(shows.sum()), what, Action.TRAINED_ABOVE, level, told_apart=told), shows)
    places = rest.nonzero().flatten()
    if len(places) >= FEWEST:

        def some(here: range) -> Tensor:
            return torch.cat([survey.load(range(place, place + 1)) for place in places[list(here)].tolist()])

        seen = separate(energies_of(some, len(places)))
        flattest = torch.cat([_flattest(some(here)) for here in batches(len(places))])
        more = _everywhere(seen, torch.ones(len(places), dtype=torch.bool))
        if more is not None and float((flattest / more[1].max()).median()) >= FLATTEST:
            members = torch.zeros(survey.count, dtype=torch.bool)
            members[places[more[0]]] = True
            noise[places[more[0]]] = more[1]
            level = float(more[1].max())
            what = f"white noise of level {level:.3g}, in all or too many to find those without"
            survey.add(Finding(kind.name, int(members.sum()), what, Action.TRAINED_ABOVE_OWN, level), members)
        sigma, error = torch.zeros_like(before.sigma), torch.full_like(before.sigma_error, math.nan)
        sigma[places], error[places] = seen.sigma, seen.error
        survey.add(sigma=torch.where(shows, noise, sigma), sigma_error=error)
    survey.add(noise_std=noise, min_sigma=torch.maximum(survey.result.min_sigma, noise))


def values_used(images: Tensor) -> Tensor:
    """How many grey levels of 256 hold nine tenths of the pixels, (B, C, H, W) -> (B,): noise spreads over many."""
    grey = to_uint8(images).float().mean(1).round().long().flatten(1)
    counts = torch.zeros(len(grey), 256).scatter_add_(1, grey, torch.ones(grey.shape))
    held = counts.sort(1, descending=True).values.cumsum(1)
    return (held < 0.9 * grey.shape[1]).sum(1) + 1.0


def _flattest(images: Tensor) -> Tensor:
    """Deviation in the flattest tenth of squares of 6 x 6 pixels, (B, C, H, W) -> (B,): noise is there too."""
    squares = images.double().mean(1).unfold(1, 6, 6).unfold(2, 6, 6).flatten(3).flatten(1, 2)
    return squares.std(2).quantile(0.1, dim=1) * math.sqrt(images.shape[1])


def noisy_images(load: Load, count: int) -> tuple[SpectralFit, Tensor, list[NoisyGroup], Tensor]:
    """Estimate, and group, twice: what was found the first time no longer blurs the directions.

    Args:
        load: The images.
        count: N, how many.

    Returns:
        The estimates; the noise of each image that is to be trained above it, float64, shape (N,), else 0; the groups;
        images of another kind, which the others were not held against, bool, shape (N,).
    """
    energies = energies_of(load, count)
    seen = separate(energies)
    found = mixture.split(seen.sigma)
    alike = ~_foreign(seen, found)
    if not bool(alike.all()):
        seen = separate(energies_of(load, count, alike), alike)
        found = _split(seen, alike)
    rest = alike & ~_any(_standing_apart(seen, found, coloured=True), count)
    enough = int(rest.sum()) * energies.blocks >= AGAIN * len(energies.mean)
    if enough and not torch.equal(rest, alike):
        seen = separate(energies_of(load, count, rest), alike)
        found = _split(seen, alike)
    apart = _standing_apart(seen, found)
    noise, noisy = torch.zeros(count).double(), []
    for members, distance in apart:
        level = seen.level(members)
        signal = (seen.scale * seen.spectrum.mean() / seen.variance.clamp(min=1e-12))[members].median()
        if signal < BURIED:
            what = f"noise of level {level:.3g}"
            noisy.append(NoisyGroup(members, level, what, Action.LEFT_OUT_AS_NOISE, distance))
            continue
        own = seen.sigma[members].std() > SPREAD * seen.sigma[members].mean()
        noise[members] = seen.sigma[members] if own else level
        what = f"white noise, {'levels about' if own else 'level'} {level:.3g}"
        noisy.append(NoisyGroup(members, level, what, Action.TRAINED_ABOVE, distance))
    rest = alike & ~_any(apart, count)
    if more := _everywhere(seen, rest):
        members, of = more
        noise[members] = of
        level = float(of.max())
        one = f"white noise of level {level:.3g}, in all or too many to find those without"
        many = f"white noise of many levels up to {level:.3g}, none standing apart"
        what = one if torch.equal(members, rest) else many
        noisy.append(NoisyGroup(members, level, what, Action.TRAINED_ABOVE_OWN))
    return seen, noise, noisy, ~alike


def _any(apart: list[tuple[Tensor, float]], count: int) -> Tensor:
    """Images of any of the groups, bool, shape (N,)."""
    return torch.stack([torch.zeros(count, dtype=torch.bool), *(members for members, _ in apart)]).any(0)


def _split(seen: SpectralFit, alike: Tensor) -> mixture.Groups:
    """Groups of the estimates of those alike; the others belong to group -1."""
    found = mixture.split(seen.sigma[alike])
    label = torch.full_like(alike, -1, dtype=torch.long)
    label[alike] = found.label
    return replace(found, label=label)


def _foreign(seen: SpectralFit, found: mixture.Groups) -> Tensor:
    """Images, bool, shape (N,), with less noise than most, but of another kind: what lies above is not noisy by them.

    Drawings or checkerboards among photographs have no fine texture at all; beside them, any photograph seems noisy.
    """
    lowest = found.members(0)
    few = len(found) > 1 and 2 * int(lowest.sum()) < len(lowest)
    strange = few and float(seen.oddness(~lowest)[lowest].median()) > FOREIGN
    return lowest if strange else torch.zeros_like(lowest)


def _standing_apart(seen: SpectralFit, found: mixture.Groups, *, coloured: bool = False) -> list[tuple[Tensor, float]]:
    """Noisy groups: images of each, bool, shape (N,), and its distance from the group below.

    With ``coloured``, groups of less than half of the images need not be white: a few noisy ones bend the weak
    directions to themselves, and look less so.
    """
    noisy, below = [], found.members(0)
    for group in range(1, len(found)):
        members = found.members(group)
        if seen.beyond_chance(below, members) < BY_CHANCE:
            below = below | members
            continue
        below = members
        low, middle = (float(seen.sigma[members].quantile(share)) for share in (0.05, 0.5))
        tight, few = low >= TIGHT * middle, 2 * int(members.sum()) < len(members)
        white = (coloured and few) or seen.whiteness(members) >= WHITE
        if tight and seen.level(members) >= LEAST_LEVEL and white:
            noisy.append((members, float(found.apart[group - 1])))
    return noisy


def _everywhere(seen: SpectralFit, rest: Tensor) -> tuple[Tensor, Tensor] | None:
    """Noise among images of which no group stands apart: which carry it, (N,), and theirs; None if there is none.

    Of one level, which all carry, or of many.
    """
    if seen.energies.side < SMALL:
        return None
    sigma = seen.sigma[rest]
    low, middle, most, high = (float(sigma.quantile(share)) for share in (0.05, 0.5, 0.75, 0.95))
    level, chance = seen.level(rest), seen.spread_by_chance(rest)
    if level >= ALL_NOISY and (chance or low >= TIGHT * middle) and seen.whiteness(rest) >= WHITE:
        return rest, torch.full_like(sigma, level)
    white = WHITE if high >= LONGER else WHITER
    if not chance and high >= LONG and seen.whiteness(rest & (seen.sigma >= most)) >= white:
        own = rest & (seen.sigma >= ALL_NOISY)
        return own, seen.sigma[own]
    return None
