"""What each image of a set can be trusted for, found out without being told: the plan behind ``train --auto``.

Every image gets three numbers: the white noise it carries, the noise level from which on it is as good as a clean one,
and a weight. Nothing is thrown away that is right somewhere: a noisy image trains above its noise (``levels.py``), a
blurred or repaired one where the damage drowns. Groups are found, not thresholds set: an image is called damaged only
if it belongs to a group that stands apart (``groups.py``). An image with lost pixels is filled in, and used like any
other where the repair drowns; if no image is whole, below that too, where what it lost does not count in the loss.

The questions are asked in this order, each of the images that the earlier ones left: one colour, lost pixels, blur,
JPEG, noise, odd pictures; copies are looked for among all. What damaged images lack is measured against those left.

A little over 400 lines: every question, in the order in which it is asked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff import copies, damage, durable, gaps, groups
from robustdiff.config import AUTO_PARTS, UsageError
from robustdiff.gaps import Gap
from robustdiff.levels import Visits, first_timesteps
from robustdiff.noisy import LEFT_OUT, noisy_images
from robustdiff.process import NoiseProcess
from robustdiff.spectrum import SIDES, Energies, Load, SpectralFit, batches, energies_of, held, same_above, separate

BLURRED, GRIDDED = -1.6, -0.6
"""Highest mean of a group that is called blurred, or compressed: photographs as they are lie above."""
ODD = 6.0
"""Robust deviations of the misfit beyond which an image weighs less."""
MATTER = groups.LEAST_SHARE
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


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        part: One of :data:`AUTO_PARTS`.
        count: Images it concerns.
        what: What was found and how sure it is; action: what training does about it.
        level: Noise level or level of use, in the [-1, 1] range, if it has one.
    """

    part: str
    count: int
    what: str
    action: str
    level: float | None = None


@dataclass(frozen=True, eq=False)
class Trust:
    """What was found about every image.

    Attributes:
        noise: Standard deviation of the white noise it carries, float64, shape (N,); 0 where none was found.
        usable: Least noise level sigma/alpha at which it is as good as a clean one, >= ``noise``, shape (N,).
        weight: How often it is used there, relative to others, 0 to 1, shape (N,).
        lost: What lost pixels look like; holed: images that have such pixels, bool, shape (N,).
        copies: Places of equal and nearly equal images, the largest group first; :func:`load` leaves them out.
        signs: What was measured of every image, by name, shape (N,); nan where nothing was; :func:`load` leaves it out.
        masked: Whether images with lost pixels are trained below ``usable`` too, there by their other pixels alone.
        regularise: Noise levels, (low, high), where no image can be trusted, so that the regulariser is needed.
        findings: In words.
        sigma: The estimate behind ``noise``, for every image.
        sigma_error: By how much it would be larger if the estimated variance were one standard error larger; nan where
            nothing was estimated.
    """

    noise: Tensor
    usable: Tensor
    weight: Tensor
    lost: tuple[Gap, ...]
    holed: Tensor
    regularise: tuple[float, float] | None
    findings: tuple[Finding, ...]
    sigma: Tensor = field(repr=False)
    sigma_error: Tensor = field(repr=False)
    copies: tuple[tuple[int, ...], ...] = ()
    signs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    masked: bool = False

    @property
    def trivial(self) -> bool:
        """Whether every image is to be used as in plain training."""
        return bool((self.usable == 0).all() and (self.weight == 1).all())

    @property
    def lowest(self) -> Tensor:
        """Least noise level sigma/alpha at which each image is trained, whole or in part, float64, shape (N,)."""
        return torch.where(self.holed & self.masked, self.noise, self.usable)

    def visits(self, process: NoiseProcess) -> Visits | None:
        """When each image is used; None if there is nothing to rule.

        A level at or above the largest of the process leaves that image out.

        Raises:
            UsageError: If that leaves none.
        """
        if self.trivial:
            return None
        largest = float(process.noise_to_signal(torch.tensor(process.num_timesteps - 1)))
        lowest = self.lowest
        inside = lowest < largest
        if not bool((inside & (self.weight > 0)).any()):
            raise UsageError("--auto found no image that can be trained on: look at them with robustdiff audit")
        first = first_timesteps(process, torch.where(inside, lowest, torch.zeros_like(lowest)))
        return Visits(first, torch.where(inside, self.weight, torch.zeros_like(self.weight)), process.num_timesteps)

    def whole_from(self, process: NoiseProcess) -> Tensor | None:
        """The timestep from which lost pixels, filled in, count in the loss, int64, shape (N,); None: all do."""
        if not (self.masked and bool((self.holed & (self.usable > self.noise)).any())):
            return None
        never = torch.full_like(self.usable, process.num_timesteps, dtype=torch.long)
        largest = float(process.noise_to_signal(torch.tensor(process.num_timesteps - 1)))
        inside = self.usable < largest
        first = first_timesteps(process, torch.where(inside & self.holed, self.usable, torch.zeros_like(self.usable)))
        return torch.where(inside, first, never)

    @property
    def clean(self) -> Tensor:
        """Images that are used like clean ones at every noise level, bool, shape (N,): none if ``regularise``."""
        return (self.usable == 0) & (self.weight > 0) & (self.regularise is None)

    @property
    def sha256(self) -> str:
        """Digest of everything that training depends on."""
        parts = [self.noise, self.usable, self.weight, self.holed.double()]
        single = all(gap.block == 1 for gap in self.lost)
        lost = tuple(gap.value for gap in self.lost) if single else tuple(map(tuple, self.lost))
        text = repr((lost, self.regularise, *(["masked"] if self.masked and bool(self.holed.any()) else []))).encode()
        return hashlib.sha256(text + b"".join(bytes(part.double().numpy().data) for part in parts)).hexdigest()

    def repaired(self, images: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images with lost pixels filled in, (B, C, H, W), and these, bool, (B, H, W), or None if there are none.

        Args:
            images: As they are.
            places: Which they are.
        """
        if not self.lost or not bool(self.holed[list(places)].any()):
            return images, None
        lost = gaps.holes(images, self.lost) & self.holed[list(places)][:, None, None]
        return gaps.fill(images, lost), lost

    def rows(self) -> dict[str, str]:
        """What the plan and the model card say."""
        said: dict[str, list[str]] = {}
        for one in self.findings:
            said.setdefault(f"found {one.part}", []).append(f"{one.count} images, {one.what}: {one.action}")
        rows = {name: "; ".join(texts) for name, texts in said.items()}
        rows["found clean"] = f"{int(self.clean.sum())} of {len(self.noise)} images, trained at every noise level"
        used = self.lowest[self.weight > 0]
        if len(used) and (floor := float(used.min())) > 0:
            rows["not trained"] = f"noise levels below {floor:.3g}: sample with --label-floor {floor:.3g}"
        return rows

    def describe(self) -> dict[str, Any]:
        """JSON-ready account."""
        return {
            "count": len(self.noise),
            "clean": int(self.clean.sum()),
            "lost_values": [gap.value for gap in self.lost],
            "lost_blocks": [gap.block for gap in self.lost],
            "masked": self.masked,
            "regularise": None if self.regularise is None else list(self.regularise),
            "findings": [asdict(finding) for finding in self.findings],
            "sha256": self.sha256,
        }


FORMAT = "robustdiff auto 1"


def save(trust: Trust, path: Path, names: Sequence[str], more: Mapping[str, Tensor] | None = None) -> None:
    """Write everything that was found, in words and image by image, as JSON: whole or not at all.

    Args:
        trust: What was found.
        path: The file.
        names: Of all images.
        more: Further numbers of every image, shape (N,), by name.
    """
    found = {name: getattr(trust, name) for name in ("noise", "usable", "weight", "sigma", "holed")}
    found |= {"sigma_error": trust.sigma_error, **trust.signs, **(more or {})}
    columns, fields = zip(*(values.tolist() for values in found.values()), strict=True), tuple(found)
    images = [{"name": name, **dict(zip(fields, row, strict=True))} for name, row in zip(names, columns, strict=True)]
    for image in images:
        image.update({name: None for name, value in image.items() if isinstance(value, float) and math.isnan(value)})
    alike = [[names[place] for place in group] for group in trust.copies]
    durable.write_json(path, {"format": FORMAT, **trust.describe(), "copies": alike, "images": images})


def load(path: Path, count: int) -> Trust:
    """What :func:`save` wrote: a run goes on with what it began with.

    Args:
        path: The file.
        count: N, how many images there must be.

    Raises:
        UsageError: If it cannot be read, or is of other images.
    """
    try:
        found = durable.read_json(path)
        if found["format"] != FORMAT or len(found["images"]) != count:
            raise ValueError(f"not {FORMAT} of {count} images")
        noise, usable, weight, sigma = (
            torch.tensor([float(image[key]) for image in found["images"]], dtype=torch.float64)
            for key in ("noise", "usable", "weight", "sigma")
        )
        holed = torch.tensor([bool(image["holed"]) for image in found["images"]])
        errors = [image.get("sigma_error") for image in found["images"]]  # earlier versions had none
        error = torch.tensor([math.nan if one is None else float(one) for one in errors], dtype=torch.float64)
        gate, values = found["regularise"], found["lost_values"]
        blocks = found.get("lost_blocks", [1] * len(values))
        trust = Trust(
            noise,
            usable,
            weight,
            tuple(Gap(float(value), int(block)) for value, block in zip(values, blocks, strict=True)),
            holed,
            None if gate is None else (float(gate[0]), float(gate[1])),
            tuple(Finding(**one) for one in found["findings"]),
            sigma,
            error,
            masked=bool(found.get("masked", False)),
        )
        if trust.sha256 != found["sha256"]:
            raise ValueError("its digest does not fit its contents")
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"--resume: {path} cannot be used ({durable.one_line(error)}): put it back, start anew, or leave out "
            "--auto if the run began without it"
        ) from None
    return trust


def examine(load: Load, count: int, without: Sequence[str] = (), memory: int = 0) -> Trust:
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
    trust = Trust(zero, zero, zero + 1, (), nothing, None, (), zero, zero + math.nan)
    blank = torch.cat(
        [load(places).flatten(2).std(2, correction=0).amax(1) <= NEAR_CONSTANT for places in batches(count)]
    )
    if "holes" not in without:
        lost, holed = gaps.find(load, count)
        trust = replace(trust, lost=lost, holed=holed & ~blank)

    def repaired(places: range) -> Tensor:
        return trust.repaired(load(places), places)[0]

    whole, low, signs = ~trust.holed & ~blank, {"blur": nothing, "jpeg": nothing}, {"lost": _lost_share(trust, load)}
    for part, measure, most in (("blur", damage.sharpness, BLURRED), ("jpeg", damage.jpeg_grid, GRIDDED)):
        if part not in without:
            signs[measure.__name__] = _all(measure, repaired, count)
            low[part] = _lowest(signs[measure.__name__], whole & ~low["blur"], most)
    trust = replace(trust, signs=signs)
    asked = whole & ~low["blur"] & ~low["jpeg"]
    if "noise" not in without and int(asked.sum()) >= FEWEST:
        trust = _noise(trust, load, asked)
    good = asked & (trust.weight > 0)
    clean = good & (trust.noise == 0)
    good = next((images for images in (clean, good, ~blank) if bool(images.any())), blank)
    if bool(good.any()):
        energies = energies_of(repaired, count, good)
        for part in ("blur", "jpeg"):
            trust = _soft(trust, energies, low[part], good, part)
        trust = _holes(trust, energies, load, repaired, good)
        if "outliers" not in without and int(clean.sum()) >= FEWEST:
            trust = _odd(trust, separate(energies), clean)
    if "outliers" not in without:
        trust = _blank(trust, blank)
    if "duplicates" not in without:
        trust = _copies(trust, load)
    return trust if "regulariser" in without else _fall_back(trust)


def _fall_back(trust: Trust) -> Trust:
    """If no image is right at every level, some must be trained there all the same, or nothing would be.

    The noisy ones, and regularised below their noise; if there are none, those with lost pixels, by the others that
    they have; if there are none, the least damaged.
    """
    used = trust.weight > 0
    noisy = trust.noise[used & (trust.noise > 0)]
    if not bool(used.any()) or not bool((trust.lowest[used] > 0).all()):
        return trust
    if not len(noisy) and bool((used & trust.holed).any()):
        action = "no image is whole, so that below they are trained by their other pixels"
        findings = tuple(
            replace(one, action=f"{one.action}; {action}") if one.part == "holes" else one for one in trust.findings
        )
        return replace(trust, masked=True, findings=findings)
    if not len(noisy):
        least = used & (trust.usable == trust.usable[used].min())
        action = "no image is whole, so that they are trained at every noise level"
        findings = tuple(
            replace(one, action=f"{one.action}; {action}") if one.level == float(trust.usable[least][0]) else one
            for one in trust.findings
        )
        usable = torch.where(least, torch.zeros_like(trust.usable), trust.usable)
        return replace(trust, usable=usable, findings=findings)
    edge = EDGE * float(noisy.median())
    action = f"no image is clean, so that noise levels below {edge:.3g} are regularised instead"
    findings = tuple(
        replace(one, action=action) if one.part == "noise" and one.action != LEFT_OUT else one for one in trust.findings
    )
    nothing = torch.zeros_like(trust.noise)
    usable = torch.where(trust.usable > trust.noise, trust.usable, nothing)
    return replace(trust, noise=nothing, usable=usable, regularise=(0.0, edge), findings=findings)


def _all(measure: Callable[[Tensor], Tensor], load: Load, count: int) -> Tensor:
    return torch.cat([measure(load(places)) for places in batches(count)])


def _lost_share(trust: Trust, load: Load) -> Tensor:
    """Share of lost pixels of every image, float64, shape (N,)."""
    if not trust.lost:
        return torch.zeros(len(trust.holed), dtype=torch.float64)
    parts = [gaps.holes(load(places), trust.lost).flatten(1).double().mean(1) for places in batches(len(trust.holed))]
    return torch.where(trust.holed, torch.cat(parts), 0.0)


def _lowest(values: Tensor, asked: Tensor, most: float) -> Tensor:
    """Images of groups that stand below the highest one, and whose mean is at most ``most``; bool, shape (N,)."""
    asked = asked & values.isfinite()
    low = torch.zeros_like(asked)
    if int(asked.sum()) >= FEWEST:
        found, places = groups.split(values[asked]), asked.nonzero().flatten()
        for group in range(len(found) - 1):
            if found.mean[group] <= most:
                low[places[found.members(group)]] = True
    return low


def _noise(trust: Trust, load: Load, asked: Tensor) -> Trust:
    """Noisy images are usable above their noise; those without a picture left are not."""
    places = asked.nonzero().flatten()

    def some(here: range) -> Tensor:
        return torch.cat([load(range(place, place + 1)) for place in places[list(here)].tolist()])

    seen, noise, found = noisy_images(some, len(places))
    weight = torch.ones_like(noise)
    for group in found:
        if group.buried:
            weight[group.members] = 0.0
    everywhere = trust.noise.clone(), trust.weight.clone(), trust.sigma.clone(), trust.sigma_error.clone()
    for whole, part in zip(everywhere, (noise, weight, seen.sigma, seen.error), strict=True):
        whole[places] = part
    noise, weight, sigma, error = everywhere
    findings = tuple(Finding("noise", int(one.members.sum()), one.what, one.action, one.level) for one in found)
    return replace(
        trust,
        noise=noise,
        usable=noise,
        weight=weight,
        sigma=sigma,
        sigma_error=error,
        findings=(*trust.findings, *findings),
    )


def _soft(trust: Trust, energies: Energies, low: Tensor, clean: Tensor, part: str) -> Trust:
    """Blurred or compressed images are usable where what they lack drowns in noise."""
    if not bool(low.any()):
        return trust
    picture = (energies.q - trust.noise.square()[:, None])[clean].mean(0).clamp(min=0)
    level = same_above(picture, energies.q[low].mean(0), energies.values)
    words = {"blur": "without the fine detail of the others", "jpeg": "with the 8 x 8 grid of strong JPEG"}
    action = f"trained at noise levels above {level:.3g}, where that no longer shows"
    usable = torch.where(low, trust.usable.clamp(min=level), trust.usable)
    finding = Finding(part, int(low.sum()), words[part], action, level)
    return replace(trust, usable=usable, findings=(*trust.findings, finding))


def _holes(trust: Trust, energies: Energies, load: Load, repaired: Load, clean: Tensor) -> Trust:
    """Images with lost pixels are filled in, and used where the same repair of clean images no longer shows.

    If none is whole, the repair is tried on repaired ones, each with the lost pixels of the next.
    """
    count = int(trust.holed.sum())
    if not count:
        return trust
    holed, whole = (mask.nonzero().flatten()[:PAIRED].tolist() for mask in (trust.holed, clean))
    pairs = list(zip(holed[1:] + holed[:1], whole, strict=False))
    original = torch.cat([repaired(range(place, place + 1)) for _, place in pairs])
    lost = torch.cat([gaps.holes(load(range(place, place + 1)), trust.lost) for place, _ in pairs])
    mended = gaps.fill(original, lost)
    level = same_above(energies.of(original).mean(0), energies.of(mended).mean(0), energies.values)
    level = max(level, 2 * float((mended - original).double().square().mean().sqrt()))
    kinds = [f"pixels of the value {one.value:.3g}" for one in trust.lost if one.block == 1]
    large = [(one.block, one.value) for one in trust.lost if one.block > 1]
    kinds += [f"blocks of {block} x {block} of the value {value:.3g}" for block, value in large]
    action = f"filled in, and trained at noise levels above {level:.3g}, measured on {len(pairs)} images"
    finding = Finding("holes", count, f"scattered {' and '.join(kinds)}", action, level)
    usable = torch.where(trust.holed, trust.usable.clamp(min=level), trust.usable)
    return replace(trust, usable=usable, findings=(*trust.findings, finding))


def _odd(trust: Trust, seen: SpectralFit, clean: Tensor) -> Trust:
    """Pictures that the common spectrum does not describe weigh less, the less the further off they are."""
    freedom = seen.energies.values
    mean = seen.scale[:, None] * seen.spectrum + seen.variance[:, None]
    ratio = (seen.energies.q / mean).clamp(min=1e-12)
    misfit = ((freedom * (ratio - 1 - ratio.log())).sum(1) / freedom.sum()).clamp(min=1e-12).log()
    middle = misfit[clean].median()
    deviation = (misfit[clean] - middle).abs().median().clamp(min=1e-6) / 0.6745
    z = (misfit - middle) / deviation
    odd = clean & (z > ODD)
    trust = replace(trust, signs={**trust.signs, "oddness": z})
    if float(odd.double().mean()) < MATTER:
        return trust
    weight = torch.where(odd, trust.weight * (ODD / z.clamp(min=ODD)).square(), trust.weight)
    what = f"unlike the others, by more than {ODD:g} robust deviations"
    finding = Finding("outliers", int(odd.sum()), what, "used less often, the less the odder")
    return replace(trust, weight=weight, findings=(*trust.findings, finding))


def _blank(trust: Trust, blank: Tensor) -> Trust:
    """Images of one colour hold no picture."""
    if not bool(blank.any()):
        return trust
    weight = torch.where(blank, torch.zeros_like(trust.weight), trust.weight)
    finding = Finding("outliers", int(blank.sum()), "of one colour", "left out")
    return replace(trust, weight=weight, findings=(*trust.findings, finding))


def _copies(trust: Trust, load: Load) -> Trust:
    """Images of equal pixels count as one; near copies do where they are many."""
    count, weight = len(trust.noise), trust.weight.clone()
    same = copies.equal(load, count)
    asked = trust.weight > 0
    for group in same:
        asked[group[1:]] = False
    equals = {group[0]: group for group in same}
    near = [sorted(i for one in group for i in equals.get(one, [one])) for group in copies.near(load, count, asked)]
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
