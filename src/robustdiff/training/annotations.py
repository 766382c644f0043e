"""What a run is told of its images: how noisy each is (``noise_levels``), which are clean (``clean_subset``)."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.image_folder import MANIFEST_FORMAT
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.config import FROM_CORRUPT
from robustdiff.training.curriculum import LevelBalancedSampler
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError

LARGEST_SEEN = 1.0
"""No image in [-1, 1] has a larger standard deviation."""
Entry = tuple[str, float, str]
"""Name of an image, its noise level, and where that is written, for messages."""


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """How much Gaussian noise each image carries.

    Attributes:
        source: A file, or ``corrupt``.
        sigma: Standard deviation, in the [-1, 1] range; float64, shape (N,), 0 where nothing is said.
        trained: Places of the images that are trained on, int64.
        schedule: The noise schedule they are trained in.
    """

    source: str
    sigma: Tensor
    trained: Tensor
    schedule: NoiseSchedule

    def sampler(self) -> LevelBalancedSampler:
        """When each image is used: every noise level equally often."""
        weight = torch.zeros(len(self.sigma), dtype=torch.float64)
        weight[self.trained] = 1.0
        inside = torch.where(weight > 0, self.sigma, torch.zeros_like(self.sigma))
        return LevelBalancedSampler(self.schedule.first_timesteps(inside), weight, self.schedule.num_timesteps)

    @property
    def sha256(self) -> str:
        """Digest of the levels, for runs that go on."""
        return hashlib.sha256(self.sigma.numpy().data).hexdigest()

    def describe(self) -> dict[str, Any]:
        """JSON-ready account for ``data.json``; levels and timesteps are those of the noisy images trained on."""
        sigma = self.sigma[self.trained]
        first = self.schedule.first_timesteps(sigma)
        noisy = sigma[sigma > 0]
        lowest = int(first.min())
        return {
            "source": self.source,
            "count": len(noisy),
            "lowest": noisy.min().item(),
            "median": noisy.median().item(),
            "highest": noisy.max().item(),
            "timesteps": 1 - first[sigma > 0].double().mean().item() / self.schedule.num_timesteps,
            "untrained_below": self.schedule.noise_to_signal(torch.tensor(lowest)).item() if lowest else 0.0,
            "sha256": self.sha256,
        }

    def rows(self) -> dict[str, str]:
        """What the plan and the model card say."""
        about = self.describe()
        span = f"{about['lowest']:.3g}"
        if about["highest"] > about["lowest"]:
            span += f" to {about['highest']:.3g}, median {about['median']:.3g}"
        rows = {
            "noise told": f"{about['count']} of {len(self.trained)} images, sigma {span} (from {self.source}); trained "
            f"at {100 * about['timesteps']:.0f} % of the noise levels, those above their own"
        }
        if floor := about["untrained_below"]:
            rows["not trained"] = (
                f"noise levels below sigma/alpha {floor:.3g}: every image has more noise; sample with `sigma_floor` "
                f"{floor:.3g}"
            )
        return rows


def told_levels(
    source: str,
    data: ImageDataset,
    trained: Tensor,
    corruptions: Sequence[Corruption],
    seed: int,
    schedule: NoiseSchedule,
) -> NoiseLevels:
    """The noise level of every image.

    Args:
        source: ``corrupt``: from the dirt that this run adds; else a file, see :func:`read_levels`.
        data: The images.
        trained: Places of those that are trained on.
        corruptions: The dirt; for ``corrupt``, gaussian only.
        seed: Of the dirt.
        schedule: The noise schedule, whose largest level is the limit.

    Raises:
        UsageError: If the file cannot be used, a name is unknown, a level has no meaning, or all are 0.
    """
    flag = f"`noise_levels` {source}"
    sigma = torch.zeros(len(data), dtype=torch.float64)
    if source == FROM_CORRUPT:
        for index in range(len(data)):
            hits = [c for place, c in enumerate(corruptions) if c.hits(seed, index, place)]
            sigma[index] = math.hypot(*(float(c.parameters["sigma"]) for c in hits))
        _check(sigma.max().item(), flag, schedule)
    else:
        places = {name: place for place, name in enumerate(data.names)}
        skipped = {name for name, _ in data.skipped}
        for name, value, where in read_levels(Path(source), data):
            _check(value, f"{flag}{where}", schedule)
            if name in places:
                sigma[places[name]] = value
            elif name not in skipped:
                raise UsageError(
                    f"{flag}{where}: `data` {data.source} has no image {name!r}; its names are like {data.names[0]!r}"
                )
        if not corruptions and (most := sigma.max().item()) > LARGEST_SEEN:
            warnings.warn(
                RobustdiffWarning(
                    f"{flag}: sigma up to {most:.4g}, more than images in [-1, 1] can show: if these are 8-bit steps, "
                    "divide them by 127.5"
                ),
                stacklevel=2,
            )
    if not bool((sigma[trained] > 0).any()):
        raise UsageError(f"{flag}: no image that is trained on has a level above 0: leave the flag out")
    return NoiseLevels(source, sigma, trained, schedule)


def _check(sigma: float, where: str, schedule: NoiseSchedule) -> None:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise UsageError(f"{where}: a noise level must be a finite number, 0 or more, not {sigma:g}")
    largest = schedule.noise_to_signal(torch.tensor(schedule.num_timesteps - 1)).item()
    if sigma >= largest:
        raise UsageError(
            f"{where}: {sigma:g} is not below {largest:.4g}, the largest noise level of the schedule: give sigma in "
            "the [-1, 1] range, or remove that image"
        )


def trained_images(data: ImageDataset, corruptions: Sequence[Corruption], seed: int, clean_subset: bool) -> Tensor:
    """Places of the images that are trained on, int64: all, or those that no corruption hits.

    Args:
        data: The images.
        corruptions: The dirt.
        seed: Of the dirt.
        clean_subset: Leave out those that are hit.

    Raises:
        UsageError: If none is left.
    """
    if not clean_subset:
        return torch.arange(len(data))
    dirt = tuple(enumerate(corruptions))
    clean = [index for index in range(len(data)) if not any(c.hits(seed, index, place) for place, c in dirt)]
    if not clean:
        raise UsageError("`clean_subset`: `corrupt` hits every image: lower its fraction")
    return torch.tensor(clean)


# -- files -------------------------------------------------------------------------------------------


def read_levels(path: Path, data: ImageDataset) -> Iterator[Entry]:
    """Noise levels by name of image.

    Args:
        path: CSV, two columns, with or without the header ``name,sigma``; or JSON: an object of names and numbers, or
            the ``manifest.json`` of a dirty copy, if its dirt is gaussian.
        data: The images, whose size and channels a manifest must fit: resizing changes noise.

    Yields:
        Name, level (any number: not checked here) and place in the file.

    Raises:
        UsageError: In one line, naming the file and the line or entry.
    """
    flag = f"`noise_levels` {path}"
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise UsageError(f"{flag}: no such file; name a CSV or JSON file, or say {FROM_CORRUPT}") from None
    except OSError as error:
        raise UsageError(f"{flag}: {atomic_io.one_line(error)}") from None
    if path.suffix.lower() != ".json" and not text.lstrip().startswith("{"):
        yield from _from_csv(text, flag)
        return
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if not isinstance(value, dict):
            raise ValueError("not an object of names and numbers")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag}: {atomic_io.one_line(error)}") from None
    if value.get("format") == MANIFEST_FORMAT:
        yield from _from_manifest(value, flag, data)
        return
    for name, sigma in value.items():
        if not isinstance(sigma, int | float) or isinstance(sigma, bool):
            raise UsageError(f"{flag}: {name!r:.80} is {sigma!r:.40}, not a number: write {{name: sigma, ...}}")
        yield name, _number(sigma), f", {name!r:.80}"


def _number(value: str | float) -> float:
    """Its float, or not a number; a whole number may be too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"{name!r:.80} is given twice")
        names[name] = value
    return names


def _from_csv(text: str, flag: str) -> Iterator[Entry]:
    reader, seen = csv.reader(text.splitlines(keepends=True), strict=True), set[str]()
    try:
        for number, row in enumerate(reader):
            where = f", line {reader.line_num}"
            if not row or (number == 0 and [field.strip().lower() for field in row] == ["name", "sigma"]):
                continue
            try:
                name, sigma = row[0], float(row[1]) if len(row) == 2 else None
            except ValueError:
                sigma = None
            if sigma is None:
                raise UsageError(f"{flag}{where}: {','.join(row)!r:.80} is not NAME,SIGMA")
            if name in seen:
                raise UsageError(f"{flag}{where}: {name!r:.80} is given twice")
            seen.add(name)
            yield name, sigma, where
    except csv.Error as error:
        raise UsageError(f"{flag}, line {reader.line_num}: {atomic_io.one_line(error)}") from None


def _from_manifest(manifest: dict[str, Any], flag: str, data: ImageDataset) -> Iterator[Entry]:
    """Levels of a dirty copy's files; those cut off at the ends of the range hold a little less noise."""
    try:
        corruptions = [Corruption.parse(spec) for spec in manifest["corruptions"]]
        images = [(str(entry["file"]), [corruptions[p] for p in entry["corruptions"]]) for entry in manifest["images"]]
        clean = manifest["clean"]
        (height, width), channels, digest = clean["size"], clean["channels"], clean["sha256"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UsageError(f"{flag}: not a whole manifest of a dirty copy ({atomic_io.one_line(error)})") from None
    if other := next((c.kind for c in corruptions if c.kind != "gaussian"), None):
        raise UsageError(f"{flag}: an image hit by {other} has no noise level: use a copy with gaussian dirt only")
    if manifest.get("poison"):
        raise UsageError(f"{flag}: an image hit by poison has no noise level: use a copy with gaussian dirt only")
    if (height, width, channels) != (*data.size, data.channels):
        raise UsageError(
            f"{flag}: made for {width} x {height} images of {channels} channels, and resizing changes noise: leave out "
            "`resolution` and `channels`"
        )
    if digest == data.sha256:
        raise UsageError(f"{flag}: `data` {data.source} is what that copy was made from: train on the copy")
    for file, hits in images:
        yield file, math.hypot(*(float(c.parameters["sigma"]) for c in hits)), f", {file!r:.80}"
