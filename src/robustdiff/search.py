"""What ``robustdiff audit`` says of a set as a whole: groups of damaged images, in words, lists and contact sheets."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustdiff import durable
from robustdiff.audit import WORST, thumbnail
from robustdiff.images import ImageSet, image_grid, save_png
from robustdiff.trust import FEWEST, Trust, examine, save


@dataclass(frozen=True, eq=False)
class Search:
    """What was found in a set of images of one size.

    Attributes:
        images: The set.
        trust: What each image can be trusted for.
    """

    images: ImageSet
    trust: Trust

    @property
    def shown(self) -> Mapping[str, Tensor]:
        """Places of the images of each contact sheet, the noisiest first, the lightest first, or in order."""
        trust = self.trust
        soft = (trust.usable > trust.noise) & ~trust.holed
        places = {
            "noisy": trust.sigma.argsort(descending=True)[: int((trust.noise > 0).sum())],
            "holed": trust.holed.nonzero().flatten(),
            "soft": soft.nonzero().flatten(),
            "odd": trust.weight.argsort(stable=True)[: int((trust.weight < 1).sum())],
        }
        if trust.copies:  # whole groups, as many as fit, the largest first
            places["copies"] = torch.tensor([place for group in trust.copies for place in group])
        return {sheet: where[:WORST] for sheet, where in places.items() if len(where)}

    def text(self) -> str:
        """The findings for a terminal, and what ``train --auto`` would do about them."""
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
        save(trust, folder / "found.json", names)
        durable.write_text(folder / "clean.txt", "".join(f"{names[i]}\n" for i in trust.clean.nonzero().flatten()))
        with (folder / "noise.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "sigma"])
            noisy = trust.noise.nonzero().flatten().tolist()
            writer.writerows([names[place], f"{trust.noise[place].item():.6g}"] for place in noisy)
        for sheet, places in self.shown.items():
            side = min(128, max(64, *self.images.size))
            pictures = [torch.from_numpy(thumbnail(self.images.images[int(p)].numpy(), side)) for p in places]
            save_png(image_grid(torch.stack(pictures), columns=5), folder / f"found-{sheet}.png")


def search(images: ImageSet) -> Search | None:
    """Look for damage that only the whole set shows; None for fewer images than say anything about one another.

    Args:
        images: Of one size.
    """
    if len(images) < FEWEST:
        return None
    return Search(images, examine(lambda places: images.x0(list(places)), len(images)))
