"""What is measured of every step: means of the loss terms, and a watch over what is not finite; lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from robustdiff.losses.denoising import LossOutput
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import TrainingError, UsageError
from robustdiff.utils.tensors import to_device

_Part = tuple[Tensor, Tensor, Tensor | None]
"""Timesteps, losses and places of the images of one pass, (B,) each."""


class NonFinite(TrainingError):
    """A step whose loss or gradient is not finite.

    Args:
        step: Which, from 0.
        images: Images seen before it.
        t: Timestep of every image of the step, over all processes, in the order of the counters; shape (B,).
        noise_to_signal: Their sigma/alpha; None if no schedule is known.
        losses: Their losses.
        index: Their places in the data set; None if they have none.
        gradient_norm: Norm of the step's gradient.
        in_a_row: How many steps in a row, with this one, were like it.
    """

    def __init__(
        self,
        step: int,
        images: int,
        t: Tensor,
        noise_to_signal: Tensor | None,
        losses: Tensor,
        index: Tensor | None,
        gradient_norm: float,
        in_a_row: int = 1,
    ) -> None:
        """Keep them."""
        self.step, self.images, self.t, self.noise_to_signal = step, images, t, noise_to_signal
        self.losses, self.index, self.gradient_norm, self.in_a_row = losses, index, gradient_norm, in_a_row
        bad = ~losses.isfinite()
        self.what = "loss" if bad.any() else "gradient"
        where, levels = "noise level sigma/alpha =", noise_to_signal
        if levels is None:
            where, levels = "timestep", t
        levels = levels[bad] if bad.any() else levels
        low, high = f"{levels.min():.3g}", f"{levels.max():.3g}"
        span = low if low == high else f"{low} to {high}"
        super().__init__(f"the {self.what} is not finite at step {step}, after {images} images, at {where} {span}")

    def record(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """JSON-ready: the step, and every image of it with what it met.

        Args:
            names: Of all images of the data set, if they have any.
        """

        def numbers(values: Tensor | None) -> list[float | None] | None:
            return None if values is None else [v if math.isfinite(v) else None for v in values.tolist()]

        indices = None if self.index is None else self.index.tolist()
        return {
            "step": self.step,
            "images": self.images,
            "what": self.what,
            "gradient_norm": self.gradient_norm if math.isfinite(self.gradient_norm) else None,
            "indices": indices,
            "names": None if names is None or indices is None else [names[index] for index in indices],
            "timesteps": self.t.tolist(),
            "noise_to_signal": numbers(self.noise_to_signal),
            "losses": numbers(self.losses),
        }


class JsonlLog:
    """A file of one JSON object per line, cut back to where a resumed run goes on.

    Attributes:
        kept: Lines of an earlier part of the run that stay.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Keep the lines of an earlier part of the run that end at or before ``step``; later ones come again."""
        self.path = path
        kept = []
        lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True) if path.is_file() else []
        for line in lines:
            try:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a crash: later than the checkpoint
                break
            kept.append(line)
        self.kept = tuple(kept)
        self._cut = len(kept) < len(lines)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        if self._cut:  # only now: until it has something to say, a run leaves the file alone
            atomic_io.write_text(self.path, "".join(self.kept))
            self._cut = False
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Make sure that what was written survives a power cut."""
        if self.path.is_file():
            atomic_io.fsync_file(self.path)


class Metrics:
    """Means of the loss terms over the steps since the last line, and a watch over what is not finite.

    Steps wait on the device and are fetched together: no step waits for the host.
    """

    PATIENCE = 10
    """Steps in a row that may be skipped."""

    def __init__(self, accelerator: Accelerator, skip: bool) -> None:
        """Begin with nothing; ``skip``: steps that are not finite are skipped and counted."""
        self._accelerator, self._skip = accelerator, skip
        self._waiting: list[tuple[int, int, Tensor, list[_Part]]] = []
        self._rows: list[list[float]] = []
        self.skipped = 0
        self.streak = 0

    def add(
        self,
        step: int,
        outputs: Sequence[LossOutput],
        gradient_norm: Tensor,
        images: int = 0,
        indices: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Add an optimiser step; no device sync.

        Args:
            step: Which, from 0.
            outputs: Of its passes.
            gradient_norm: Of its gradient.
            images: Seen before it.
            indices: Places of the images of each pass in their data set, if they have any.

        Returns:
            1.0 if the loss here or the gradient everywhere is not finite, else 0.0; shape (), on the device.
        """
        rows = []
        for terms in outputs:
            active = (terms.strength > 0).to(terms.total.dtype)
            values = [terms.total, terms.denoising, terms.equivariance, terms.radius, active]
            rows.append(torch.stack([value.detach().float().mean() for value in values]))
        mean = torch.stack(rows).mean(0)
        finite = mean[0].isfinite()
        if self._accelerator.scaler is None:  # a scaler meets large gradients on purpose, and skips them itself
            finite = finite & gradient_norm.isfinite().to(finite.device)
        bad = 1 - finite.float()
        row = torch.cat([mean, gradient_norm.detach().float().reshape(1).to(mean), bad.reshape(1)])
        # No more than this: the terms themselves would keep every pass's graph alive until the next line.
        places = indices or [None] * len(outputs)
        parts: list[_Part] = [
            (terms.t, terms.total.detach(), index) for terms, index in zip(outputs, places, strict=True)
        ]
        self._waiting.append((step, images, row, parts))
        return bad

    def flush(self, noise_to_signal: Callable[[Tensor], Tensor] | None) -> tuple[list[NonFinite], NonFinite | None]:
        """Fetch what waits, over all processes.

        Args:
            noise_to_signal: Of timesteps, shape (B,), if a schedule is known.

        Returns:
            The steps that are not finite, and the one that training must stop for: the first, or the tenth in a row
            if such steps are skipped.
        """
        if not self._waiting:
            return [], None
        rows = self._accelerator.reduce(torch.stack([row for _, _, row, _ in self._waiting]), "mean").tolist()
        waiting, self._waiting = self._waiting, []
        found: list[NonFinite] = []
        for (step, images, _, parts), (*row, bad) in zip(waiting, rows, strict=True):
            if bad == 0:  # bad: the share of processes that met it
                self._rows.append(row)
                self.streak = 0
                continue
            self.streak += 1
            self.skipped += 1
            # Which images and noise levels the step had; every process asks at the same step.
            t, losses, index = (self._gather(column) for column in zip(*parts, strict=True))
            assert t is not None
            assert losses is not None
            level = None if noise_to_signal is None else noise_to_signal(t)
            found.append(NonFinite(step, images, t, level, losses, index, row[-1], self.streak))
            if not self._skip or self.streak >= self.PATIENCE:
                return found, found[-1]
        return found, None

    def _gather(self, column: Sequence[Tensor | None]) -> Tensor | None:
        """The passes' values, (B,) each, over all processes, in the order of the counters; on the CPU."""
        values = [value for value in column if value is not None]
        if len(values) < len(column):  # those of some passes only would be paired with the images of others
            return None
        device = self._accelerator.device
        return torch.cat([self._accelerator.gather(to_device(value, device)).cpu() for value in values])

    def means(self) -> dict[str, float | None]:
        """Means over the steps since the last call, None without any; the gradient norm is that of the last step."""
        names = ("loss", "denoising", "equivariance", "radius", "regularised")
        if not self._rows:  # every step was skipped
            return dict.fromkeys((*names, "gradient_norm"))
        columns = list(zip(*self._rows, strict=True))
        record = {name: math.fsum(column) / len(column) for name, column in zip(names, columns[:5], strict=True)}
        record["radius"] /= record["regularised"] or 1.0  # averaged over the regularised images only
        record["gradient_norm"] = self._rows[-1][5]
        self._rows = []
        return {name: value if math.isfinite(value) else None for name, value in record.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready; call :meth:`flush` first."""
        rows = [[value if math.isfinite(value) else None for value in row] for row in self._rows]
        return {"rows": rows, "skipped": self.skipped, "streak": self.streak}

    def restore(self, saved: Any) -> None:  # noqa: ANN401 - anything that was found in a file
        """Go on from what :meth:`state` gave.

        Raises:
            UsageError: If it is something else.
        """
        saved = {} if saved is None else saved
        rows = saved.get("rows", []) if isinstance(saved, Mapping) else None
        good = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 6 for row in rows)
        good = good and all(isinstance(value, int | float | None) for row in rows or () for value in row)
        if not good or not all(isinstance(saved.get(name, 0), int) for name in ("skipped", "streak")):
            raise UsageError("`resume`: damaged metrics in the checkpoint: name another with `resume_from_checkpoint`")
        self._rows = [[math.nan if value is None else float(value) for value in row] for row in rows or ()]
        self.skipped, self.streak = saved.get("skipped", 0), saved.get("streak", 0)
