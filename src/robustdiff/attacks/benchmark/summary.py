"""What the attacks of a run say together: flags, displacements, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustdiff.attacks.benchmark.grid import (
    STARTS,
    SWEPT,
    Cell,
    eot_draws,
    lengths,
    radius,
    twin,
)
from robustdiff.attacks.benchmark.runner import Outcome
from robustdiff.attacks.benchmark.sanity_checks import (
    Flag,
    check_gain,
    check_huge,
    check_random,
    check_rising,
)
from robustdiff.attacks.config import AttackConfig
from robustdiff.evaluation.distances import NORMAL_95


@dataclass(frozen=True, eq=False)
class Summary:
    """The cells of a run, and what they are measured by.

    Args:
        config: The command's flags.
        shape: Of an image, (C, H, W).
        cells: Every attack of the plan.
        found: Their outcomes, by name.
        per_pixel: Generated spread per pixel: root of the mean variance over undisturbed images.
        unit: Generated spread of whole images, the unit of displacements; None if there is none.
        undisturbed: Distance of the undisturbed batch from the reference, where batches are attacked.
    """

    config: AttackConfig
    shape: Sequence[int]
    cells: Sequence[Cell]
    found: Mapping[str, Outcome]
    per_pixel: float
    unit: float | None
    undisturbed: float | None = None

    @property
    def sweep(self) -> int:
        """Images that every flag and curve compares."""
        return min(self.config.sweep_n, self.config.n)

    @cached_property
    def means(self) -> Mapping[str, float | None]:
        """Mean displacement of those images by every cell, in spreads."""
        unit = self.unit
        return {n: float(o.moved[: self.sweep].mean()) / unit if unit else None for n, o in self.found.items()}

    # -- which cells make a curve ----------------------------------------------------------------------

    def _radii(self) -> list[tuple[str, float]]:
        """Cells of the radius curve and their radii, rising."""
        rows = [(cell.name, cell.factor) for cell in self.cells if cell.factor not in (None, 1.0)]
        rows.append((self._short, 1.0))
        unit = radius(self.config, self.shape)
        return sorted(((name, factor * unit) for name, factor in rows if factor is not None), key=lambda row: row[1])

    def _steps(self) -> list[tuple[str, int]]:
        """Cells of PGD by length, and their steps, rising."""
        return [(twin(self.cells, f"pgd-{steps}"), steps) for steps in lengths(self.config)]

    def _eot(self) -> list[tuple[str, int]]:
        """Cells of short PGD by draws of the noise, and those, rising; none if the attacker draws nothing."""
        asked = eot_draws(self.config)[:1]
        rows = [(cell.name, cell.eot) for cell in self.cells if cell.eot is not None]
        return sorted([*((self._short, draws) for draws in asked), *rows], key=lambda row: row[1])

    @property
    def _short(self) -> str:
        return twin(self.cells, f"pgd-{lengths(self.config)[0]}")

    # -- what goes into the file -----------------------------------------------------------------------

    def flags(self) -> list[Flag]:
        """Those that compare attacks."""
        found = self.found
        scores = {name: float(outcome.score[: self.sweep].mean()) for name, outcome in found.items()}
        by_steps = [scores[name] for name, _ in self._steps()]
        few = any(cell.name == SWEPT for cell in self.cells)  # then batches of all images are of another size
        rivals = [cell.name for cell in self.cells if cell.factor == 1 and not (few and cell.everywhere)]
        huge = next(cell.name for cell in self.cells if cell.factor is None)
        asked, random = found["attack"].score, found[twin(self.cells, "random")].score
        if self.config.optimiser == "random":  # what was asked for is the baseline: the others must beat it
            asked, random = found[f"pgd-{lengths(self.config)[1]}"].score, random[: self.sweep]
            random = found[SWEPT].score if few else random
        mismatch = float(found["attack"].mismatch)
        replayed = Flag("sampler-mismatch", mismatch)
        if mismatch != mismatch:
            replayed = Flag("sampler-mismatch", 0.0, "not replayed: the result is judged on noise of its own")
        return [
            check_random(asked, random),
            check_rising("radius-not-monotone", [scores[name] for name, _ in self._radii()]),
            check_huge(self.means[huge]),
            check_rising("steps-not-monotone", by_steps),
            check_gain("not-converged", by_steps[1], by_steps[2]),
            check_gain(
                "other-attack-stronger", scores[SWEPT if few else "attack"], max(scores[name] for name in rivals)
            ),
            self._more_draws(scores),
            Flag("constraint-violated", max(float(outcome.excess) for outcome in found.values())),
            replayed,
            Flag("no-spread", self.per_pixel),
        ]

    def _more_draws(self, scores: Mapping[str, float]) -> Flag:
        rows = self._eot()
        if not rows:
            return Flag("eot-too-few", 0.0, "nothing to draw: there is no noise, or the attacker knows it")
        asked = eot_draws(self.config)[0]
        more = [scores[name] for name, draws in rows if draws > asked]
        return check_gain("eot-too-few", scores[self._short], max(more))

    def values(self) -> dict[str, Any]:
        """Displacements at the radius asked for, in units of the generated spread."""
        moved = {cell.name: self.found[cell.name].moved for cell in self.cells if cell.factor == 1}
        worst = moved["attack"].clone()
        for one in moved.values():  # those on fewer images count for these
            worst[: len(one)] = torch.maximum(worst[: len(one)], one)
        rows = {"displacement": moved.pop("attack"), "displacement, strongest of all": worst}
        for name, one in moved.items():
            few = f" (first {len(one)})" if len(one) < self.config.n else ""
            rows[f"displacement, {name}{few}"] = one
        values = {name: _value(distances, self.unit) for name, distances in rows.items()}
        pixels = torch.Size(self.shape).numel() ** 0.5
        if self.undisturbed is not None:
            gain = float(self.found["attack"].score[0])
            for which, distance in (("undisturbed", self.undisturbed), ("attacked", self.undisturbed + gain)):
                entry = {**_value(None, None), "value": distance, "better": "lower", "about": {"n": self.config.n}}
                values[f"distance of the batch from the reference, {which}"] = entry
        values["moved per pixel"] = {**_value(rows["displacement"], pixels), "better": "lower"}
        values["generated spread per pixel"] = {**_value(None, None), "value": self.per_pixel}
        return values

    def curves(self) -> dict[str, Any]:
        """What is drawn, and the displacement of every image."""
        means, unit = self.means, self.unit
        short = lengths(self.config)[0]
        sizes = {cell.name: cell.optimiser for cell in self.cells if " step " in cell.name}
        attacked = self.found["attack"]
        best_of = self.found[twin(self.cells, f"pgd-{short} starts {STARTS}")].restarts
        follow = self.config.objective == "end-to-end" and unit is not None
        starts = _mean_root(best_of[:, : self.sweep], unit)

        def curve(over: str, rows: Sequence[tuple[str, float]]) -> dict[str, Any]:
            return {over: [x for _, x in rows], "displacement": [means[name] for name, _ in rows]}

        return {
            "spread": unit,
            "by_radius": curve("radius", self._radii()),
            "by_steps": curve("steps", self._steps()),
            "by_step_size": {
                "step_size": [*(getattr(o, "step_size", None) for o in sizes.values()), 2.5 / short],
                "displacement": [*(means[name] for name in sizes), means[self._short]],
            },
            "by_starts": {"starts": [*range(1, len(starts) + 1)], "displacement": starts} if follow else None,
            "by_eot": curve("draws", rows) if (rows := self._eot()) else None,
            "by_evaluation": _mean_root(attacked.trace, unit) if follow else None,
            "by_restart": _mean_root(attacked.restarts, unit) if follow else None,
            "per_image": [round(float(x), 6) for x in attacked.moved / unit] if unit else None,
        }


# -- numbers and words -----------------------------------------------------------------------------------


def _value(moved: Tensor | None, unit: float | None) -> dict[str, Any]:
    """An entry of ``values``: the mean over the images and its 95 % interval."""
    if moved is None or unit is None:
        return {"value": None, "floor": None, "better": "neither", "interval": None, "about": {}}
    mean, error = float(moved.mean()) / unit, float(moved.std()) / len(moved) ** 0.5 / unit
    interval = [max(0.0, mean - NORMAL_95 * error), mean + NORMAL_95 * error]  # a distance is never negative
    about = {"n": len(moved), "largest": float(moved.max()) / unit, "smallest": float(moved.min()) / unit}
    return {"value": mean, "floor": None, "better": "lower", "interval": interval, "about": about}


def _mean_root(values: Tensor, unit: float | None) -> list[float]:
    """Squared distances (rows, B) to mean distances in spreads."""
    return [float(x) for x in values.clamp(min=0).sqrt().mean(1) / (unit or 1.0)]


def sentence(flag: Flag) -> str:
    """A raised flag as a warning."""
    told = flag.to_json()
    if flag.value is None:
        why = f" ({flag.text})" if flag.text else ""
        return f"flag {flag.name} was not measured{why}: the result counts as not valid"
    value = "no number" if told["value"] is None else f"{told['value']:.3g}, limit {told['limit']:g}"
    weight = "the result is not valid" if told["invalid"] else "a stronger attack may exist"
    return f"flag {flag.name} ({value}): {weight}; raised when {told['raised_when']}"
