"""What each image of a set can be trusted for: the plan behind ``auto``, and its file.

Every image gets three numbers: the white noise it carries, the noise level from which on it is as good as a clean one,
and a weight. Nothing is thrown away that is right somewhere: a noisy image trains above its noise, a blurred or
repaired one where the damage drowns. An image with missing pixels is filled in, and used like any other where the
repair drowns; if no image is whole, below that too, where what it lost does not count in the loss.

How it is found out: ``run.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.audit import summary
from robustdiff.audit.detectors import missing_pixels
from robustdiff.audit.detectors.missing_pixels import Gap
from robustdiff.audit.finding import Action, Finding, Unasked
from robustdiff.data.sources.base import numbers
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import DataError

FORMAT = "robustdiff auto 1"
IN_FILE = {
    "noise_std": "noise",
    "min_sigma": "usable",
    "weight": "weight",
    "sigma": "sigma",
    "has_missing": "holed",
    "sigma_error": "sigma_error",
}
"""Numbers of every image, by what the file calls them."""


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What was found about every image.

    Attributes:
        names: Of all images, N.
        noise_std: Standard deviation of the white noise it carries, float64, shape (N,); 0 where none was found.
        min_sigma: Least noise level sigma/alpha at which it is as good as a clean one, >= ``noise_std``, shape (N,).
        weight: How often it is used there, relative to others, 0 to 1, shape (N,).
        has_missing: Images with missing pixels, bool, shape (N,).
        sigma: The estimate behind ``noise_std``, for every image, shape (N,).
        sigma_error: By how much it would be larger if the estimated variance were one standard error larger; nan where
            nothing was estimated.
        findings: What was found in the set, and what is done about it.
        groups: Images of every kind that was found, by its name, bool, shape (N,).
        copies: Places of equal and nearly equal images, the largest group first.
        signs: What was measured of every image, by name, shape (N,); nan where nothing was.
        lost: What missing pixels look like.
        masked: Whether images with missing pixels are trained below ``min_sigma`` too, there by their other pixels.
        regularise: Noise levels, (low, high), where no image can be trusted, so that the regulariser is needed.
        features: What ``signs["distance"]``, if it is there, was measured in.
        looks_like: Of each image, the kind whose copies it is most like, however little; empty if none were made.
        unasked: Kinds that were not looked for, by name, and why.
    """

    names: Sequence[str] = field(repr=False)
    noise_std: Tensor = field(repr=False)
    min_sigma: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    has_missing: Tensor = field(repr=False)
    sigma: Tensor = field(repr=False)
    sigma_error: Tensor = field(repr=False)
    findings: tuple[Finding, ...] = ()
    groups: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    copies: tuple[tuple[int, ...], ...] = ()
    signs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    lost: tuple[Gap, ...] = ()
    masked: bool = False
    regularise: tuple[float, float] | None = None
    features: str = "features"
    looks_like: Sequence[str] = field(default=(), repr=False)
    unasked: Mapping[str, Unasked] = field(default_factory=dict)

    @classmethod
    def of_clean(cls, count: int, names: Sequence[str] = ()) -> AuditResult:
        """Nothing found of so many images."""
        zero = torch.zeros(count, dtype=torch.float64)
        numbered = tuple(names) or numbers(count)
        return cls(numbered, zero, zero, zero + 1, zero > 0, zero, zero + math.nan, signs={"lost": zero})

    def __len__(self) -> int:
        """N, how many images."""
        return len(self.noise_std)

    # -- what training asks --------------------------------------------------------------------------------

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
        masked = ["masked"] if self.masked and bool(self.has_missing.any()) else []
        text = repr((lost, self.regularise, *masked)).encode()
        return hashlib.sha256(text + b"".join(bytes(part.double().numpy().data) for part in parts)).hexdigest()

    def repaired(self, images: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images with missing pixels filled in, (B, C, H, W), and these, bool, (B, H, W), or None if there are none.

        Args:
            images: As they are.
            places: Which they are.
        """
        if not self.lost or not bool(self.has_missing[list(places)].any()):
            return images, None
        lost = missing_pixels.holes(images, self.lost) & self.has_missing[list(places)][:, None, None]
        return missing_pixels.fill(images, lost), lost

    # -- what people ask -----------------------------------------------------------------------------------

    def summary(self) -> str:
        """What was found, and what ``auto`` would do about it, in a few lines."""
        return summary.text(self)

    def rows(self) -> dict[str, str]:
        """The same as the plan of a run and its model card say it, by name."""
        return summary.plan_rows(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each image: its name, the names of its groups, every number, and every sign; nan for none.

        After a comparison with damaged copies, ``looks_like`` too: what the image most looks like, damaged or not.
        """
        values = {name: getattr(self, name) for name in IN_FILE} | dict(self.signs)
        columns = zip(*(column.tolist() for column in values.values()), strict=True)
        groups = self._groups_of_each()
        like = [{"looks_like": kind} for kind in self.looks_like] or [{}] * len(self)
        return [
            {"name": name, "groups": groups[place], **like[place], **dict(zip(values, row, strict=True))}
            for place, (name, row) in enumerate(zip(self.names, columns, strict=True))
        ]

    def to_dataframe(self) -> Any:  # noqa: ANN401 - pandas, which need not be there
        """:meth:`to_rows` as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_dataframe needs pandas: pip install pandas, or use to_rows()") from None
        return pandas.DataFrame(self.to_rows())

    def _groups_of_each(self) -> list[tuple[str, ...]]:
        of = {name: members.tolist() for name, members in self.groups.items()}
        return [tuple(name for name, members in of.items() if members[place]) for place in range(len(self))]

    # -- the file ------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """JSON-ready account of the set."""
        return {
            "count": len(self),
            "clean": int(self.clean.sum()),
            "lost_values": [gap.value for gap in self.lost],
            "lost_blocks": [gap.block for gap in self.lost],
            "masked": self.masked,
            "regularise": None if self.regularise is None else list(self.regularise),
            "findings": [self._finding(one) for one in self.findings],
            "unasked": {kind: why.value for kind, why in self.unasked.items()},
            "sha256": self.sha256,
        }

    def _finding(self, one: Finding) -> dict[str, Any]:
        return {
            "part": one.kind,
            "count": one.count,
            "what": one.what,
            "action": summary.action_words(one, self.regularise),
            "level": one.level,
            "decision": one.action.value,
            "otherwise": None if one.otherwise is None else one.otherwise.value,
            "confidence": one.confidence,
            "measured_on": one.measured_on,
            "told_apart": one.told_apart,
        }

    def save(self, path: str | Path) -> None:
        """Write everything that was found, of the set and image by image, as JSON: whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        images = []
        for row in self.to_rows():
            known = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}
            images.append({IN_FILE.get(key, key): value for key, value in known.items()})
        alike = [[self.names[place] for place in group] for group in self.copies]
        told = {"features": self.features} if "distance" in self.signs else {}
        atomic_io.write_json(
            Path(path), {"format": FORMAT, **self.describe(), **told, "copies": alike, "images": images}
        )

    @classmethod
    def load(cls, path: str | Path, count: int | None = None) -> AuditResult:
        """What :meth:`save` wrote.

        Args:
            path: The file: ``found.json`` of an audit, ``auto.json`` of a run; or the folder of an audit.
            count: How many images there must be. Default: any number.

        Raises:
            DataError: If it cannot be read, or is of another number of images.
        """
        path = Path(path) / "found.json" if Path(path).is_dir() else Path(path)
        try:
            found = atomic_io.read_json(path)
            if found["format"] != FORMAT:
                raise ValueError(f"not {FORMAT}, which an audit calls found.json and a run auto.json")
            if count not in (None, len(found["images"])):
                raise ValueError(f"of {len(found['images'])} images, not {count}")
            result = cls(**_columns(found["images"]), **_of_the_set(found))
            if result.sha256 != found["sha256"]:
                raise ValueError("its digest does not fit its contents")
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError, AttributeError) as error:
            raise DataError(f"{path} cannot be used ({atomic_io.one_line(error)})") from None
        return result


def _columns(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of :class:`AuditResult` that are of every image, as :meth:`AuditResult.save` wrote them."""

    def column(key: str) -> Tensor:
        values = [image.get(key) for image in images]
        return torch.tensor([math.nan if one is None else float(one) for one in values], dtype=torch.float64)

    fields: dict[str, Any] = {
        name: torch.tensor([float(image[IN_FILE[name]]) for image in images], dtype=torch.float64)
        for name in ("noise_std", "min_sigma", "weight", "sigma")
    }
    fields["has_missing"] = torch.tensor([bool(image["holed"]) for image in images])
    fields["sigma_error"] = column("sigma_error")  # earlier versions had none
    known = {"name", "groups", "looks_like", *IN_FILE.values()}
    fields["signs"] = {
        key: column(key) for key in dict.fromkeys(k for image in images for k in image) if key not in known
    }
    groups = [tuple(image.get("groups", ())) for image in images]  # nor these
    names = dict.fromkeys(name for of in groups for name in of)
    if images and all("looks_like" in image for image in images):
        fields["looks_like"] = tuple(str(image["looks_like"]) for image in images)
    fields["groups"] = {str(name): torch.tensor([name in of for of in groups]) for name in names}
    return fields | {"names": tuple(str(image["name"]) for image in images)}


def _of_the_set(found: Mapping[str, Any]) -> dict[str, Any]:
    """The other fields."""
    gate, values = found["regularise"], found["lost_values"]
    blocks = found.get("lost_blocks", [1] * len(values))
    place = {image["name"]: number for number, image in enumerate(found["images"])}
    return {
        "findings": tuple(map(_read_finding, found["findings"])),
        "copies": tuple(tuple(place[name] for name in group) for group in found.get("copies", ())),
        "lost": tuple(Gap(float(value), int(block)) for value, block in zip(values, blocks, strict=True)),
        "features": str(found.get("features", "features")),
        "masked": bool(found.get("masked", False)),
        "unasked": {str(kind): Unasked(why) for kind, why in found.get("unasked", {}).items()},
        "regularise": None if gate is None else (float(gate[0]), float(gate[1])),
    }


def _read_finding(one: Mapping[str, Any]) -> Finding:
    if "decision" not in one:  # of an earlier version
        what = f"{one['what']}: {one['action']}"
        return Finding(str(one["part"]), int(one["count"]), what, Action.AS_SAID, one["level"])
    otherwise = one["otherwise"]
    return Finding(
        str(one["part"]),
        int(one["count"]),
        str(one["what"]),
        Action(one["decision"]),
        one["level"],
        one["confidence"],
        one["measured_on"],
        None if otherwise is None else Action(otherwise),
        one.get("told_apart"),  # earlier versions had none
    )
