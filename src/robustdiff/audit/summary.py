"""What is said of a set as a whole: groups of damaged images, in words, lists and contact sheets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustdiff.audit.detectors.feature_outliers import robust_distance
from robustdiff.audit.files import SHEETS
from robustdiff.audit.result import AuditResult, save
from robustdiff.audit.run import FEWEST, detect
from robustdiff.audit.statistics import WORST
from robustdiff.data.dataset import ImageDataset
from robustdiff.utils import atomic_io
from robustdiff.utils.images import image_grid, save_png, thumbnail


@dataclass(frozen=True, eq=False)
class Search:
    """What was found in a set of images of one size.

    Attributes:
        images: The set.
        trust: What each image can be trusted for.
        features: Name of the features that the distances are of; None if none were given.
        distance: From the others in features,
            :func:`~robustdiff.audit.detectors.feature_outliers.robust_distance`, shape (N,).
    """

    images: ImageDataset
    trust: AuditResult
    features: str | None = None
    distance: Tensor | None = None

    def text(self) -> str:
        """The findings for a terminal, and what ``train --auto`` would do about them."""
        return "\n".join([self._damage(), *self._far()])

    def _far(self) -> list[str]:
        """The farthest images in words."""
        if self.distance is None:
            return []
        farthest = self.distance.argsort(descending=True)[:5].tolist()
        first = [f"{self.images.names[place]} ({self.distance[place]:.2f})" for place in farthest]
        return [f"farthest from the others in {self.features}, typical 1, not acted on: {', '.join(first)}"]

    def _damage(self) -> str:
        rows = self.trust.rows()
        if self.trust.trivial and self.trust.regularise is None:
            known = "".join(f"\n  {name}: {row}" for name, row in rows.items() if name != "found clean")
            return f"damage: none stands apart; train --auto would train plainly{known}"
        return "\n".join(["damage, and what train --auto would do about it", *(f"  {k}: {v}" for k, v in rows.items())])

    def write(self, folder: Path) -> None:
        """Write everything into an existing folder.

        ``found.json`` (every image), ``clean.txt`` (names of those usable at every noise level), ``noise.csv``
        (``NAME,SIGMA`` of the noisy ones, as ``train --noise-levels`` takes it) and the contact sheets.
        """
        names, trust = self.images.names, self.trust
        save(trust, folder / "found.json", names, {} if self.distance is None else {"distance": self.distance})
        atomic_io.write_text(folder / "clean.txt", "".join(f"{names[i]}\n" for i in trust.clean.nonzero().flatten()))
        with (folder / "noise.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "sigma"])
            noisy = trust.noise_std.nonzero().flatten().tolist()
            writer.writerows([names[place], f"{trust.noise_std[place].item():.6g}"] for place in noisy)
        write_sheets(trust, lambda places: torch.stack([self.images.images[p] for p in places]), folder, self.distance)


def write_sheets(
    trust: AuditResult, pixels: Callable[[Sequence[int]], Tensor], folder: Path, distance: Tensor | None = None
) -> None:
    """Write a contact sheet of each kind that was found, ``found-KIND.png``, into an existing folder.

    Args:
        trust: What was found.
        pixels: Images by place, uint8, (B, C, H, W).
        folder: Where to.
        distance: From the others in features, if it was asked for, shape (N,).
    """
    shown = _shown(trust, distance)
    for sheet in SHEETS:
        path = folder / f"found-{sheet}.png"
        if sheet not in shown:
            continue
        images = pixels(shown[sheet].tolist())
        side = min(128, max(64, *images.shape[2:]))
        small = [torch.from_numpy(thumbnail(image.numpy(), side)) for image in images]
        save_png(image_grid(torch.stack(small), columns=5), path)


def _shown(trust: AuditResult, distance: Tensor | None) -> Mapping[str, Tensor]:
    """Places of the images of each contact sheet, the noisiest first, the lightest first, or in order."""
    soft = (trust.min_sigma > trust.noise_std) & ~trust.has_missing
    places = {
        "noisy": trust.sigma.argsort(descending=True)[: int((trust.noise_std > 0).sum())],
        "holed": trust.has_missing.nonzero().flatten(),
        "soft": soft.nonzero().flatten(),
        "odd": trust.weight.argsort(stable=True)[: int((trust.weight < 1).sum())],
    }
    if distance is not None:
        places["far"] = distance.argsort(descending=True)
    if trust.copies:  # whole groups, as many as fit, the largest first
        places["copies"] = torch.tensor([place for group in trust.copies for place in group])
    return {sheet: where[:WORST] for sheet, where in places.items() if len(where)}


def search(images: ImageDataset, features: tuple[str, Tensor] | None = None) -> Search | None:
    """Look for damage that only the whole set shows; None for fewer images than say anything about one another.

    Args:
        images: Of one size.
        features: A name, and features of every image, shape (N, d), in which foreign pictures are far away.
    """
    if len(images) < FEWEST:
        return None
    trust = detect(lambda places: images.x0(list(places)), len(images))
    if features is None:
        return Search(images, trust)
    return Search(images, trust, features[0], robust_distance(features[1]))
