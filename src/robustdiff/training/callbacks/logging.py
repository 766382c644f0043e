"""Records of a run: lines of JSON in its folder, and a bar or a line for people."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from robustdiff.training.callbacks.base import Callback
from robustdiff.training.metrics import JsonlLog, NonFinite

if TYPE_CHECKING:
    from robustdiff.training.run import TrainingRun


class LogCallback(Callback):
    """Shows how far a run is; with a folder, also writes ``metrics.jsonl`` and ``nonfinite.jsonl``.

    Args:
        folder: Of the run. Lines of an earlier part of it stay, up to where it goes on.
        names: Of all images, for those of a step that is not finite.
    """

    def __init__(self, folder: str | Path | None = None, names: Sequence[str] | None = None) -> None:
        """See the class."""
        self.folder, self.names = None if folder is None else Path(folder), names

    def on_start(self, run: TrainingRun) -> None:
        """Open the files."""
        self.progress = Progress(run.step, run.options.steps, enabled=run.is_main)
        self.lines: JsonlLog | None = None
        self.bad_lines: JsonlLog | None = None
        if self.folder is not None:
            if run.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.lines = JsonlLog(self.folder / "metrics.jsonl", run.step)
            self.bad_lines = JsonlLog(self.folder / "nonfinite.jsonl", run.step - 1)

    def on_log(self, run: TrainingRun, record: Mapping[str, Any]) -> None:
        """Write a line, and show it."""
        if run.is_main and self.lines is not None:
            self.lines.write(record)
        self.progress.show(record)

    def on_nonfinite(self, run: TrainingRun, found: NonFinite) -> None:
        """Write down which images it had."""
        if run.is_main and self.bad_lines is not None:
            self.bad_lines.write(found.record(self.names))

    def on_step(self, run: TrainingRun) -> None:
        """Move the bar."""
        self.progress.advance(run.step)

    def on_sync(self, run: TrainingRun) -> None:
        """Bring the lines onto the disk."""
        for lines in (self.lines, self.bad_lines):
            if run.is_main and lines is not None:
                lines.sync()

    def on_end(self, run: TrainingRun) -> None:
        """Leave the terminal tidy."""
        self.progress.close()


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, step: int, steps: int, enabled: bool) -> None:
        """Start at ``step`` of ``steps``."""
        self.total, self.first, self.started = steps, step, time.perf_counter()
        self.printed, self.enabled = 0.0, enabled
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

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
