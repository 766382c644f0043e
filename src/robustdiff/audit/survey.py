"""One audit while it is under way: the images, what is known of them so far, and what detectors ask again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robustdiff.audit import comparison, mixture
from robustdiff.audit.comparison import Comparison
from robustdiff.audit.finding import Action, Finding, Unasked
from robustdiff.audit.result import IN_FILE, AuditResult
from robustdiff.audit.spectral_model import Energies, Load, batches, energies_of, same_above

if TYPE_CHECKING:  # which takes a survey
    from robustdiff.audit.detector import Detector

STEPS, MEASURED_ON = 4, 64
"""Strengths, and images, on which it is measured where damage is hidden."""
FEWEST = 64
"""Fewer images say nothing about one another."""
TAKEN = {
    "name",
    "groups",
    "distance",
    "oddness",
    "looks_like",
    "damaged",
    "strength",
    "<lambda>",
    *IN_FILE,
    *IN_FILE.values(),
}
"""What no other sign may be called: columns of the result and of its file, and the signs that others have."""
NEAR_CONSTANT = 2 * 2 / 255
"""Largest standard deviation of an image of one colour: two grey levels."""


class Survey:
    """What detectors look at, and write what they find into.

    Attributes:
        load: The images as they are, by place.
        count: N, how many.
        result: What is known so far.
        blank: Images of one colour, bool, shape (N,).
        foreign: Pictures of another kind than most, which noise cannot be told of, bool, shape (N,).
        features: A name, and features of every image, shape (N, d), if they were given.
        compared: What comparing the images with damaged copies of them said; None if there was no comparison.
        uncompared: Why there was none.
        asking: Name of the detector that is asked now, for errors.
    """

    def __init__(
        self, load: Load, count: int, names: Sequence[str] = (), features: tuple[str, Tensor] | None = None
    ) -> None:
        """Begin with nothing found."""
        self.load, self.count, self.features = load, count, features
        self.asking = ""
        self.result = AuditResult.of_clean(count, names)
        self.compared: Comparison | None = None
        self.uncompared: Unasked | None = None
        self.blank = self.each(lambda images: images.flatten(2).std(2, correction=0).amax(1) <= NEAR_CONSTANT)
        self.foreign = torch.zeros(count, dtype=torch.bool)
        self._claimed = self.blank

    # -- which images are asked ----------------------------------------------------------------------------

    @property
    def left(self) -> Tensor:
        """Images that hold a picture and that no kind has claimed so far, bool, shape (N,)."""
        return ~self._claimed

    def claim(self, shows: Tensor) -> None:
        """Later kinds are not asked of these images, bool, shape (N,), nor is damage measured against them."""
        self._claimed = self._claimed | shows

    @property
    def clean(self) -> Tensor:
        """Images that nothing was found of, bool, shape (N,)."""
        return self._unclaimed & (self.result.noise_std == 0)

    @property
    def _unclaimed(self) -> Tensor:
        return self.left & ~self.foreign & (self.result.weight > 0)

    @cached_property
    def yardstick(self) -> Tensor:
        """Images that damage is measured against, bool, shape (N,), at least one: the clean ones, or the least bad."""
        return next((some for some in (self.clean, self._unclaimed, ~self.blank) if bool(some.any())), self.blank)

    # -- comparing with copies -----------------------------------------------------------------------------

    def compare(self, kinds: Sequence[Detector]) -> None:
        """Hold all images that hold a picture against copies damaged by these kinds, those that can be simulated."""
        kinds = [kind for kind in kinds if kind.strengths]
        places = (~self.blank).nonzero().flatten().tolist()
        shape = self.load(range(1)).shape[1:]
        if not comparison.comparable(shape, len(places), kinds):
            few, small = len(places) < FEWEST, min(shape[1:]) < comparison.SMALLEST
            self.uncompared = Unasked.TOO_FEW if few else Unasked.TOO_SMALL if small else Unasked.CHANNELS
            return

        def some(at: Sequence[int]) -> Tensor:
            return torch.cat([self.load(range(place, place + 1)) for place in at])

        self.compared = comparison.compare(some, places, kinds).among(places, self.count)
        read = self.compared.strength.gather(1, self.compared.kind[:, None])[:, 0]
        like = tuple(self.compared.names[kind] for kind in self.compared.kind.tolist())
        self.add(signs={**self.result.signs, "damaged": self.compared.damaged, "strength": read}, looks_like=like)

    def shows(self, kind: Detector) -> Tensor | None:
        """Images left that look like copies damaged by this kind, bool, shape (N,); None if there was no comparison."""
        return None if self.compared is None else self.left & self.compared.shows(kind.name)

    def looks_like(self, *names: str) -> Tensor:
        """Images that look like any of these kinds, bool, shape (N,)."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for name in names:
            if self.compared is not None and name in self.compared.names:
                found |= self.compared.shows(name)
        return found

    def add_simulated(self, kind: Detector, shows: Tensor) -> None:
        """Take images that look like a kind into the result, each trained where damage of its strength is hidden.

        Images in doubt are trained from a level that is lower by how doubtful it is.
        """
        found = self.compared
        assert found is not None, "there was a comparison"
        strength = found.strength[:, found.names.index(kind.name)]
        doubted = found.doubted(kind.name) & self.left
        level = self.hidden_by_strength(kind, strength, shows)
        middle = float(strength[shows].median())
        finding = Finding(
            kind.name,
            int(shows.sum()),
            f"what the others become {kind.become.format(middle)}",
            Action.TRAINED_WHERE_HIDDEN,
            float(level[shows].median()),
            told_apart=found.told_apart.get(kind.name),
        )
        least = torch.where(shows, level, torch.where(doubted, level * found.damaged, 0.0))
        self.add(finding, shows, min_sigma=torch.maximum(self.result.min_sigma, least))

    def hidden_by_strength(self, kind: Detector, strength: Tensor, shows: Tensor) -> Tensor:
        """The noise level above which damage of a strength can hardly be told, shape (N,).

        Measured on copies of clean images at a few of the strengths that images show, and in between by interpolation.
        """
        among = strength[shows].log()
        steps = torch.unique(torch.quantile(among, torch.linspace(0, 1, STEPS, dtype=among.dtype)))
        every = self.yardstick.nonzero().flatten()
        clean = every[:: -(-len(every) // MEASURED_ON)].tolist()
        generator = torch.Generator().manual_seed(0)
        originals = torch.cat([self.repaired(range(place, place + 1)) for place in clean])
        before, levels = self.energies.of(originals).mean(0), []
        for step in steps.exp().tolist():
            copies = torch.stack([kind.simulate(image, step, generator) for image in originals])
            after = self.energies.of(copies).mean(0)
            level = max(
                same_above(before, after, self.energies.values), same_above(after, before, self.energies.values)
            )
            changed = float((copies - originals).double().square().mean().sqrt())
            levels.append(max(level, 2 * changed))
        at = strength.nan_to_num(1.0).clamp(min=1e-9).log().numpy()
        return torch.from_numpy(np.interp(at, steps.numpy(), np.array(levels)))

    # -- what is asked of them -----------------------------------------------------------------------------

    def repaired(self, places: range) -> Tensor:
        """Images with missing pixels filled in, (B, C, H, W)."""
        return self.result.repaired(self.load(places), places)[0]

    def each(self, measure: Callable[[Tensor], Tensor], load: Load | None = None) -> Tensor:
        """A measure of every image, shape (N,).

        Args:
            measure: Of images (B, C, H, W), shape (B,).
            load: Default: the images as they are.
        """
        return torch.cat([measure((load or self.load)(places)) for places in batches(self.count)])

    def low_group(self, sign: Callable[[Tensor], Tensor], most: float) -> Tensor:
        """Images of groups that stand below the highest one in a sign, and whose mean is at most ``most``.

        Args:
            sign: One number for each of the images (B, C, H, W), shape (B,); not a number where it says nothing. Kept
                in ``result.signs`` under its name.
            most: Highest mean of a group.

        Returns:
            bool, shape (N,), some of :attr:`left`.

        Raises:
            ValueError: If the sign has no name of its own.
        """
        name = getattr(sign, "__name__", "<lambda>")
        if name in TAKEN or name in self.result.signs:
            raise ValueError(f"detector {self.asking}: a sign cannot be called {name}; give the function another name")
        values = self.each(sign, self.repaired).double()
        self.add(signs={**self.result.signs, name: values})
        asked = self.left & values.isfinite()
        low = torch.zeros_like(asked)
        if int(asked.sum()) >= FEWEST:
            found, places = mixture.split(values[asked]), asked.nonzero().flatten()
            for group in range(len(found) - 1):
                if found.mean[group] <= most:
                    low[places[found.members(group)]] = True
        return low

    @cached_property
    def energies(self) -> Energies:
        """Of all images, repaired, along the directions of the :attr:`yardstick`."""
        return energies_of(self.repaired, self.count, self.yardstick)

    def hidden_above(self, shows: Tensor) -> float:
        """The noise level above which images, bool, shape (N,), can hardly be told from the :attr:`yardstick`."""
        noise = self.result.noise_std.square()[:, None]
        picture = (self.energies.q - noise)[self.yardstick].mean(0).clamp(min=0)
        return same_above(picture, self.energies.q[shows].mean(0), self.energies.values)

    def used_above(self, level: float, shows: Tensor) -> Tensor:
        """``min_sigma`` with at least this level for these images, shape (N,)."""
        return torch.where(shows, self.result.min_sigma.clamp(min=level), self.result.min_sigma)

    # -- what is found -------------------------------------------------------------------------------------

    def add(self, finding: Finding | None = None, shows: Tensor | None = None, **changes: Any) -> None:  # noqa: ANN401 - fields of AuditResult
        """Take what was found into the result.

        Args:
            finding: For people, and what is done.
            shows: The images it is of, bool, shape (N,): they join the group of its kind. Default: no image's.
            changes: Fields of :class:`AuditResult` that it changes.
        """
        if finding is not None:
            if shows is not None:
                already = self.result.groups.get(finding.kind, torch.zeros_like(shows))
                changes["groups"] = {**self.result.groups, finding.kind: already | shows}
            changes["findings"] = (*self.result.findings, finding)
        self.result = replace(self.result, **changes)
