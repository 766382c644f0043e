"""What each image of a set can be trusted for, found out without being told: every question, in its order.

Groups are found, not thresholds set: an image is called damaged only if it belongs to a group that stands apart
(``groups.py``). The questions are asked each of the images that the earlier ones left: one colour, lost pixels, blur,
JPEG, noise, odd pictures; copies are looked for among all. What damaged images lack is measured against those left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robustdiff.audit import mixture
from robustdiff.audit.detectors import blur_jpeg, duplicates, missing_pixels
from robustdiff.audit.detectors.noise import LEFT_OUT, noisy_images
from robustdiff.audit.parts import AUTO_PARTS
from robustdiff.audit.result import AuditResult, Finding
from robustdiff.audit.spectral_model import (
    SIDES,
    Energies,
    Load,
    SpectralFit,
    batches,
    energies_of,
    held,
    same_above,
    separate,
)

BLURRED, GRIDDED = -1.6, -0.6
"""Highest mean of a group that is called blurred, or compressed: photographs as they are lie above."""
ODD = 6.0
"""Robust deviations of the misfit beyond which an image weighs less."""
MATTER = mixture.LEAST_SHARE
"""Least share of odd images that is acted on: every large set has some in its tail, and training is plain without."""
ALIKE, MANY = 0.01, 5
"""Near copies count once from this share of all images on; fewer, of every large set, only where a picture is there so
often."""
NEAR_CONSTANT = 2 * 2 / 255
"""Largest standard deviation of an image of one colour: two grey levels."""
FEWEST = 64
"""Fewer images say nothing about one another."""
EDGE = 0.75
"""Edge of the regulariser's gate over the noise of the images."""
PAIRED = 512
"""Clean images on which a repair is tried, to measure it."""


def detect(load: Load, count: int, without: Sequence[str] = (), memory: int = 0) -> AuditResult:
    """Look at every image of a set, all of one size.

    Args:
        load: Images by place, as they will be trained on.
        count: N >= 1.
        without: Parts of :data:`AUTO_PARTS` that are not looked for, or not acted on.
        memory: Bytes that images may take between the passes over them; those that do not fit are loaded anew.

    Raises:
        ValueError: If a part is unknown.
    """
    if unknown := set(without) - set(AUTO_PARTS):
        raise ValueError(f"{', '.join(sorted(unknown))}: not one of {', '.join(AUTO_PARTS)}")
    load = held(load, count, memory)
    if min(load(range(1)).shape[2:]) < SIDES[-1]:  # too small to have detail
        without = [part for part in AUTO_PARTS if part != "duplicates" or part in without]
    nothing, zero = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64)
    trust = AuditResult(zero, zero, zero + 1, (), nothing, None, (), zero, zero + math.nan)
    blank = torch.cat(
        [load(places).flatten(2).std(2, correction=0).amax(1) <= NEAR_CONSTANT for places in batches(count)]
    )
    if "holes" not in without:
        lost, holed = missing_pixels.find(load, count)
        trust = replace(trust, lost=lost, has_missing=holed & ~blank)

    def repaired(places: range) -> Tensor:
        return trust.repaired(load(places), places)[0]

    whole, low, signs = (
        ~trust.has_missing & ~blank,
        {"blur": nothing, "jpeg": nothing},
        {"lost": _lost_share(trust, load)},
    )
    for part, measure, most in (("blur", blur_jpeg.sharpness, BLURRED), ("jpeg", blur_jpeg.jpeg_grid, GRIDDED)):
        if part not in without:
            signs[measure.__name__] = _all(measure, repaired, count)
            low[part] = _lowest(signs[measure.__name__], whole & ~low["blur"], most)
    trust = replace(trust, signs=signs)
    asked, foreign = whole & ~low["blur"] & ~low["jpeg"], nothing
    if "noise" not in without and int(asked.sum()) >= FEWEST:
        trust, foreign = _noise(trust, load, asked)
    good = asked & ~foreign & (trust.weight > 0)
    clean = good & (trust.noise_std == 0)
    good = next((images for images in (clean, good, ~blank) if bool(images.any())), blank)
    if bool(good.any()):
        energies = energies_of(repaired, count, good)
        for part in ("blur", "jpeg"):
            trust = _soft(trust, energies, low[part], good, part)
        trust = _holes(trust, energies, load, repaired, good)
        if "outliers" not in without and int(clean.sum()) >= FEWEST:
            trust = _odd(trust, separate(energies, ~foreign), clean, foreign)
    if "outliers" not in without:
        trust = _blank(trust, blank)
    if "duplicates" not in without:
        trust = _copies(trust, load)
    return trust if "regulariser" in without else _fall_back(trust)


def _fall_back(trust: AuditResult) -> AuditResult:
    """If no image is right at every level, some must be trained there all the same, or nothing would be.

    The noisy ones, and regularised below their noise; if there are none, those with lost pixels, by the others that
    they have; if there are none, the least damaged.
    """
    used = trust.weight > 0
    noisy = trust.noise_std[used & (trust.noise_std > 0)]
    if not bool(used.any()) or not bool((trust.lowest[used] > 0).all()):
        return trust
    if not len(noisy) and bool((used & trust.has_missing).any()):
        action = "no image is whole, so that below they are trained by their other pixels"
        findings = tuple(
            replace(one, action=f"{one.action}; {action}") if one.part == "holes" else one for one in trust.findings
        )
        return replace(trust, masked=True, findings=findings)
    if not len(noisy):
        least = used & (trust.min_sigma == trust.min_sigma[used].min())
        action = "no image is whole, so that they are trained at every noise level"
        findings = tuple(
            replace(one, action=f"{one.action}; {action}") if one.level == float(trust.min_sigma[least][0]) else one
            for one in trust.findings
        )
        usable = torch.where(least, torch.zeros_like(trust.min_sigma), trust.min_sigma)
        return replace(trust, min_sigma=usable, findings=findings)
    edge = EDGE * float(noisy.median())
    action = f"no image is clean, so that noise levels below {edge:.3g} are regularised instead"
    findings = tuple(
        replace(one, action=action) if one.part == "noise" and one.action != LEFT_OUT else one for one in trust.findings
    )
    nothing = torch.zeros_like(trust.noise_std)
    usable = torch.where(trust.min_sigma > trust.noise_std, trust.min_sigma, nothing)
    return replace(trust, noise_std=nothing, min_sigma=usable, regularise=(0.0, edge), findings=findings)


def _all(measure: Callable[[Tensor], Tensor], load: Load, count: int) -> Tensor:
    return torch.cat([measure(load(places)) for places in batches(count)])


def _lost_share(trust: AuditResult, load: Load) -> Tensor:
    """Share of lost pixels of every image, float64, shape (N,)."""
    if not trust.lost:
        return torch.zeros(len(trust.has_missing), dtype=torch.float64)
    parts = [
        missing_pixels.holes(load(places), trust.lost).flatten(1).double().mean(1)
        for places in batches(len(trust.has_missing))
    ]
    return torch.where(trust.has_missing, torch.cat(parts), 0.0)


def _lowest(values: Tensor, asked: Tensor, most: float) -> Tensor:
    """Images of groups that stand below the highest one, and whose mean is at most ``most``; bool, shape (N,)."""
    asked = asked & values.isfinite()
    low = torch.zeros_like(asked)
    if int(asked.sum()) >= FEWEST:
        found, places = mixture.split(values[asked]), asked.nonzero().flatten()
        for group in range(len(found) - 1):
            if found.mean[group] <= most:
                low[places[found.members(group)]] = True
    return low


def _noise(trust: AuditResult, load: Load, asked: Tensor) -> tuple[AuditResult, Tensor]:
    """Noisy images are usable above their noise; those without a picture left are not.

    Beside it, images of another kind than most, bool, shape (N,).
    """
    places = asked.nonzero().flatten()

    def some(here: range) -> Tensor:
        return torch.cat([load(range(place, place + 1)) for place in places[list(here)].tolist()])

    seen, noise, found, other = noisy_images(some, len(places))
    foreign = torch.zeros_like(asked)
    foreign[places] = other
    weight = torch.ones_like(noise)
    for group in found:
        if group.buried:
            weight[group.members] = 0.0
    everywhere = trust.noise_std.clone(), trust.weight.clone(), trust.sigma.clone(), trust.sigma_error.clone()
    for whole, part in zip(everywhere, (noise, weight, seen.sigma, seen.error), strict=True):
        whole[places] = part
    noise, weight, sigma, error = everywhere
    findings = tuple(Finding("noise", int(one.members.sum()), one.what, one.action, one.level) for one in found)
    trust = replace(
        trust,
        noise_std=noise,
        min_sigma=noise,
        weight=weight,
        sigma=sigma,
        sigma_error=error,
        findings=(*trust.findings, *findings),
    )
    return trust, foreign


def _soft(trust: AuditResult, energies: Energies, low: Tensor, clean: Tensor, part: str) -> AuditResult:
    """Blurred or compressed images are usable where what they lack drowns in noise."""
    if not bool(low.any()):
        return trust
    picture = (energies.q - trust.noise_std.square()[:, None])[clean].mean(0).clamp(min=0)
    level = same_above(picture, energies.q[low].mean(0), energies.values)
    words = {"blur": "without the fine detail of the others", "jpeg": "with the 8 x 8 grid of strong JPEG"}
    action = f"trained at noise levels above {level:.3g}, where that no longer shows"
    usable = torch.where(low, trust.min_sigma.clamp(min=level), trust.min_sigma)
    finding = Finding(part, int(low.sum()), words[part], action, level)
    return replace(trust, min_sigma=usable, findings=(*trust.findings, finding))


def _holes(trust: AuditResult, energies: Energies, load: Load, repaired: Load, clean: Tensor) -> AuditResult:
    """Images with lost pixels are filled in, and used where the same repair of clean images no longer shows.

    If none is whole, the repair is tried on repaired ones, each with the lost pixels of the next.
    """
    count = int(trust.has_missing.sum())
    if not count:
        return trust
    holed, whole = (mask.nonzero().flatten()[:PAIRED].tolist() for mask in (trust.has_missing, clean))
    pairs = list(zip(holed[1:] + holed[:1], whole, strict=False))
    original = torch.cat([repaired(range(place, place + 1)) for _, place in pairs])
    lost = torch.cat([missing_pixels.holes(load(range(place, place + 1)), trust.lost) for place, _ in pairs])
    mended = missing_pixels.fill(original, lost)
    level = same_above(energies.of(original).mean(0), energies.of(mended).mean(0), energies.values)
    level = max(level, 2 * float((mended - original).double().square().mean().sqrt()))
    kinds = [f"pixels of the value {one.value:.3g}" for one in trust.lost if one.block == 1]
    large = [(one.block, one.value) for one in trust.lost if one.block > 1]
    kinds += [f"blocks of {block} x {block} of the value {value:.3g}" for block, value in large]
    action = f"filled in, and trained at noise levels above {level:.3g}, measured on {len(pairs)} images"
    finding = Finding("holes", count, f"scattered {' and '.join(kinds)}", action, level)
    usable = torch.where(trust.has_missing, trust.min_sigma.clamp(min=level), trust.min_sigma)
    return replace(trust, min_sigma=usable, findings=(*trust.findings, finding))


def _odd(trust: AuditResult, seen: SpectralFit, clean: Tensor, foreign: Tensor) -> AuditResult:
    """Pictures that the common spectrum does not describe weigh less, the less the further off they are."""
    z = seen.oddness(clean)
    odd = (clean | foreign) & (z > ODD)
    trust = replace(trust, signs={**trust.signs, "oddness": z})
    if float(odd.double().mean()) < MATTER:
        return trust
    weight = torch.where(odd, trust.weight * (ODD / z.clamp(min=ODD)).square(), trust.weight)
    what = f"unlike the others, by more than {ODD:g} robust deviations"
    finding = Finding("outliers", int(odd.sum()), what, "used less often, the less the odder")
    return replace(trust, weight=weight, findings=(*trust.findings, finding))


def _blank(trust: AuditResult, blank: Tensor) -> AuditResult:
    """Images of one colour hold no picture."""
    if not bool(blank.any()):
        return trust
    weight = torch.where(blank, torch.zeros_like(trust.weight), trust.weight)
    finding = Finding("outliers", int(blank.sum()), "of one colour", "left out")
    return replace(trust, weight=weight, findings=(*trust.findings, finding))


def _copies(trust: AuditResult, load: Load) -> AuditResult:
    """Images of equal pixels count as one; near copies do where they are many."""
    count, weight = len(trust.noise_std), trust.weight.clone()
    same = duplicates.equal(load, count)
    asked = trust.weight > 0
    for group in same:
        asked[group[1:]] = False
    equals = {group[0]: group for group in same}
    near = [sorted(i for one in group for i in equals.get(one, [one])) for group in duplicates.near(load, count, asked)]
    matter = sum(map(len, near)) >= ALIKE * count
    some = [group for group in near if matter or len(group) >= MANY]
    within = {place for group in some for place in group}
    once = [group for group in same if group[0] not in within]
    for group in (*some, *once):
        weight[group] /= len(group)
    said = (
        (same, "pictures more than once", "each picture counts once"),
        (some, "pictures more than once, nearly alike", "each picture counts once"),
        ([g for g in near if g not in some], "pictures more than once, nearly alike", "too few to matter, left alone"),
    )
    findings = [
        Finding("duplicates", sum(map(len, groups)), f"{len(groups)} {what}", action)
        for groups, what, action in said
        if groups
    ]
    every = sorted((*near, *(group for group in same if group[0] not in {i for g in near for i in g})), key=len)[::-1]
    return replace(trust, weight=weight, copies=tuple(map(tuple, every)), findings=(*trust.findings, *findings))
