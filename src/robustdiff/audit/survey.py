"""One audit while it is under way: the images, what is known of them so far, and what detectors ask again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustdiff.audit import mixture
from robustdiff.audit.finding import Finding
from robustdiff.audit.result import IN_FILE, AuditResult
from robustdiff.audit.spectral_model import Energies, Load, batches, energies_of, same_above

FEWEST = 64
"""Fewer images say nothing about one another."""
TAKEN = {"name", "groups", "distance", "oddness", "<lambda>", *IN_FILE, *IN_FILE.values()}
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
        asking: Name of the detector that is asked now, for errors.
    """

    def __init__(
        self, load: Load, count: int, names: Sequence[str] = (), features: tuple[str, Tensor] | None = None
    ) -> None:
        """Begin with nothing found."""
        self.load, self.count, self.features = load, count, features
        self.asking = ""
        self.result = AuditResult.of_clean(count, names)
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
