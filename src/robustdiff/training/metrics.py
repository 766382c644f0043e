"""What a run leaves behind: the pipeline, metrics, the model card, and what is shown while it goes."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import LossOutput
from robustdiff.training.loader import Batches
from robustdiff.training.plan import Plan
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError


class NonFinite(Exception):
    """A step whose loss or gradient is not finite.

    Args:
        step: Which, from 0.
        t: Timestep of every image of the step, over all processes, in the order of the counters; shape (B,).
        noise_to_signal: Their sigma/alpha.
        losses: Their losses.
        gradient_norm: Norm of the step's gradient.
    """

    def __init__(self, step: int, t: Tensor, noise_to_signal: Tensor, losses: Tensor, gradient_norm: float) -> None:
        """Keep them."""
        self.step, self.t, self.noise_to_signal, self.losses = step, t, noise_to_signal, losses
        self.gradient_norm = gradient_norm
        bad = ~losses.isfinite()
        self.what = "loss" if bad.any() else "gradient"
        levels = noise_to_signal[bad] if bad.any() else noise_to_signal
        low, high = f"{levels.min():.3g}", f"{levels.max():.3g}"
        span = low if low == high else f"{low} to {high}"
        super().__init__(
            f"the {self.what} is not finite at step {step}, after {step * len(t)} images, at noise level sigma/alpha = "
            f"{span}"
        )

    def record(self, batches: Batches) -> dict[str, Any]:
        """JSON-ready: the step, and every image of it with what it met."""
        first = self.step * len(self.t)
        indices = [batches.index(counter) for counter in range(first, first + len(self.t))]

        def numbers(values: Tensor) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values.tolist()]

        return {
            "step": self.step,
            "images": first,
            "what": self.what,
            "gradient_norm": self.gradient_norm if math.isfinite(self.gradient_norm) else None,
            "indices": indices,
            "names": [batches.images.names[index] for index in indices],
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

    def __init__(self, accelerator: Accelerator, skip: bool, saved: Mapping[str, Any] | None = None) -> None:
        """Go on from ``saved``, what :meth:`state` gave."""
        saved = {} if saved is None else saved
        rows = saved.get("rows", []) if isinstance(saved, Mapping) else None
        good = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 6 for row in rows)
        good = good and all(isinstance(value, int | float | None) for row in rows for value in row)
        if not good or not all(isinstance(saved.get(name, 0), int) for name in ("skipped", "streak")):
            raise UsageError("`resume`: damaged metrics in the checkpoint: name another with `resume_from_checkpoint`")
        self._accelerator, self._skip = accelerator, skip
        self._waiting: list[tuple[int, Tensor, list[tuple[Tensor, Tensor]]]] = []
        rows = saved.get("rows", [])
        self._rows = [[math.nan if value is None else value for value in row] for row in rows]
        self.skipped: int = saved.get("skipped", 0)
        self.streak: int = saved.get("streak", 0)

    def add(self, step: int, parts: list[LossOutput], gradient_norm: Tensor) -> Tensor:
        """Add an optimiser step, its passes and the norm of its gradient; no device sync.

        Returns:
            1.0 if the loss here or the gradient everywhere is not finite, else 0.0; shape (), on the device.
        """
        rows = []
        for terms in parts:
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
        self._waiting.append((step, row, [(terms.t, terms.total.detach()) for terms in parts]))
        return bad

    def settle(self, schedule: NoiseSchedule) -> tuple[list[NonFinite], NonFinite | None]:
        """Fetch what waits, over all processes.

        Returns:
            The steps that are not finite, and the one that training must stop for: the first, or the tenth in a row
            if such steps are skipped.
        """
        if not self._waiting:
            return [], None
        waiting, self._waiting = self._waiting, []
        rows = self._accelerator.reduce(torch.stack([row for _, row, _ in waiting]), "mean").tolist()
        found = []
        for (step, _, parts), (*row, bad) in zip(waiting, rows, strict=True):
            if bad == 0:  # bad: the share of processes that met it
                self._rows.append(row)
                self.streak = 0
                continue
            self.streak += 1
            self.skipped += 1
            found.append(self._non_finite(step, parts, row[-1], schedule))
            if not self._skip or self.streak >= self.PATIENCE:
                return found, found[-1]
        return found, None

    def _non_finite(
        self, step: int, parts: list[tuple[Tensor, Tensor]], norm: float, schedule: NoiseSchedule
    ) -> NonFinite:
        """Which images and noise levels the step had; every process asks at the same step."""
        t, losses = (
            torch.cat([self._accelerator.gather(values).cpu() for values in column])
            for column in zip(*parts, strict=True)
        )
        return NonFinite(step, t, schedule.noise_to_signal(t), losses, norm)

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
        """What a checkpoint keeps, JSON-ready; call :meth:`settle` first."""
        rows = [[value if math.isfinite(value) else None for value in row] for row in self._rows]
        return {"rows": rows, "skipped": self.skipped, "streak": self.streak}


class Tracker:
    """Accelerate's trackers; one that fails is given up with one warning, and training goes on."""

    def __init__(self, accelerator: Accelerator, name: str | None, settings: Mapping[str, Any]) -> None:
        """Start the tracker called ``name``, if any."""
        self._accelerator, self._name = accelerator, name
        self._try(lambda: accelerator.init_trackers("robustdiff", config={"settings": json.dumps(dict(settings))}))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send a line."""
        numbers = {name: value for name, value in record.items() if value is not None}
        self._try(lambda: self._accelerator.log(numbers, step=step))

    def close(self) -> None:
        """Let the tracker finish."""
        self._try(lambda: [tracker.finish() for tracker in self._accelerator.trackers])
        self._accelerator.trackers = []

    def _try(self, action: Callable[[], object]) -> None:
        if self._name is None:
            return
        try:
            action()
        except Exception as error:  # trackers are other people's services: anything may come
            reason = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(
                f"`logger` {self._name} failed ({reason}): training goes on without it, metrics.jsonl has everything",
                RobustdiffWarning,
                stacklevel=3,
            )
            self._name = None


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, step: int, plan: Plan, enabled: bool) -> None:
        """Start at ``step``."""
        self.total, self.first, self.started = plan.steps, step, time.perf_counter()
        self.printed, self.enabled = 0.0, enabled
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=plan.steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show loss terms, speed and time left."""
        shown = {name: math.nan if record[name] is None else record[name] for name in ("denoising", "equivariance")}
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        text += f"  {record['images_per_second']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        now = time.perf_counter()
        step = int(record["step"])
        if self.enabled and (now - self.printed > 10 or step == self.total):
            self.printed = now
            left = (now - self.started) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
