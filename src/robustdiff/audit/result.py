"""What each image of a set can be trusted for: the plan behind ``train --auto``, its words and its file.

Every image gets three numbers: the white noise it carries, the noise level from which on it is as good as a clean one,
and a weight. Nothing is thrown away that is right somewhere: a noisy image trains above its noise (``levels.py``), a
blurred or repaired one where the damage drowns. An image with lost pixels is filled in, and used like any other where
the repair drowns; if no image is whole, below that too, where what it lost does not count in the loss.

How it is found out: ``examining.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.audit.detectors import missing_pixels
from robustdiff.audit.detectors.missing_pixels import Gap
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        part: One of :data:`robustdiff.audit.parts.AUTO_PARTS`.
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
class AuditResult:
    """What was found about every image.

    Attributes:
        noise_std: Standard deviation of the white noise it carries, float64, shape (N,); 0 where none was found.
        min_sigma: Least noise level sigma/alpha at which it is as good as a clean one, >= ``noise_std``, shape (N,).
        weight: How often it is used there, relative to others, 0 to 1, shape (N,).
        lost: What lost pixels look like.
        has_missing: Images that have such pixels, bool, shape (N,).
        copies: Places of equal and nearly equal images, the largest group first; :func:`load` leaves them out.
        signs: What was measured of every image, by name, shape (N,); nan where nothing was; :func:`load` leaves it out.
        masked: Whether images with lost pixels are trained below ``min_sigma`` too, there by their other pixels alone.
        regularise: Noise levels, (low, high), where no image can be trusted, so that the regulariser is needed.
        findings: In words.
        sigma: The estimate behind ``noise_std``, for every image.
        sigma_error: By how much it would be larger if the estimated variance were one standard error larger; nan where
            nothing was estimated.
    """

    noise_std: Tensor
    min_sigma: Tensor
    weight: Tensor
    lost: tuple[Gap, ...]
    has_missing: Tensor
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
        return bool((self.min_sigma == 0).all() and (self.weight == 1).all())

    @property
    def lowest(self) -> Tensor:
        """Least noise level sigma/alpha at which each image is trained, whole or in part, float64, shape (N,)."""
        return torch.where(self.has_missing & self.masked, self.noise_std, self.min_sigma)

    @property
    def clean(self) -> Tensor:
        """Images that are used like clean ones at every noise level, bool, shape (N,): none if ``regularise``."""
        return (self.min_sigma == 0) & (self.weight > 0) & (self.regularise is None)

    @property
    def sha256(self) -> str:
        """Digest of everything that training depends on."""
        parts = [self.noise_std, self.min_sigma, self.weight, self.has_missing.double()]
        single = all(gap.block == 1 for gap in self.lost)
        lost = tuple(gap.value for gap in self.lost) if single else tuple(map(tuple, self.lost))
        text = repr(
            (lost, self.regularise, *(["masked"] if self.masked and bool(self.has_missing.any()) else []))
        ).encode()
        return hashlib.sha256(text + b"".join(bytes(part.double().numpy().data) for part in parts)).hexdigest()

    def repaired(self, images: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images with lost pixels filled in, (B, C, H, W), and these, bool, (B, H, W), or None if there are none.

        Args:
            images: As they are.
            places: Which they are.
        """
        if not self.lost or not bool(self.has_missing[list(places)].any()):
            return images, None
        lost = missing_pixels.holes(images, self.lost) & self.has_missing[list(places)][:, None, None]
        return missing_pixels.fill(images, lost), lost

    def rows(self) -> dict[str, str]:
        """What the plan and the model card say."""
        said: dict[str, list[str]] = {}
        for one in self.findings:
            said.setdefault(f"found {one.part}", []).append(f"{one.count} images, {one.what}: {one.action}")
        rows = {name: "; ".join(texts) for name, texts in said.items()}
        rows["found clean"] = f"{int(self.clean.sum())} of {len(self.noise_std)} images, trained at every noise level"
        used = self.lowest[self.weight > 0]
        if len(used) and (floor := float(used.min())) > 0:
            rows["not trained"] = f"noise levels below {floor:.3g}: sample with --label-floor {floor:.3g}"
        return rows

    def describe(self) -> dict[str, Any]:
        """JSON-ready account."""
        return {
            "count": len(self.noise_std),
            "clean": int(self.clean.sum()),
            "lost_values": [gap.value for gap in self.lost],
            "lost_blocks": [gap.block for gap in self.lost],
            "masked": self.masked,
            "regularise": None if self.regularise is None else list(self.regularise),
            "findings": [asdict(finding) for finding in self.findings],
            "sha256": self.sha256,
        }


FORMAT = "robustdiff auto 1"


def save(trust: AuditResult, path: Path, names: Sequence[str], more: Mapping[str, Tensor] | None = None) -> None:
    """Write everything that was found, in words and image by image, as JSON: whole or not at all.

    Args:
        trust: What was found.
        path: The file.
        names: Of all images.
        more: Further numbers of every image, shape (N,), by name.
    """
    found = {"noise": trust.noise_std, "usable": trust.min_sigma, "weight": trust.weight, "sigma": trust.sigma}
    found |= {"holed": trust.has_missing, "sigma_error": trust.sigma_error, **trust.signs, **(more or {})}
    columns, fields = zip(*(values.tolist() for values in found.values()), strict=True), tuple(found)
    images = [{"name": name, **dict(zip(fields, row, strict=True))} for name, row in zip(names, columns, strict=True)]
    for image in images:
        image.update({name: None for name, value in image.items() if isinstance(value, float) and math.isnan(value)})
    alike = [[names[place] for place in group] for group in trust.copies]
    atomic_io.write_json(path, {"format": FORMAT, **trust.describe(), "copies": alike, "images": images})


def load(path: Path, count: int) -> AuditResult:
    """What :func:`save` wrote: a run goes on with what it began with.

    Args:
        path: The file.
        count: N, how many images there must be.

    Raises:
        UsageError: If it cannot be read, or is of other images.
    """
    try:
        found = atomic_io.read_json(path)
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
        trust = AuditResult(
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
            f"--resume: {path} cannot be used ({atomic_io.one_line(error)}): put it back, start anew, or leave out "
            "--auto if the run began without it"
        ) from None
    return trust
