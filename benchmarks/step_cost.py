"""What one training step costs, by objective, beside the theory (forward passes; plain = 3).

    python -m benchmarks.step_cost --network small --size 16 --batch-size 32 --threads 1

The objectives take turns, so that a machine that slows down slows all of them; every ratio is within one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from robustdiff.diffusion.networks import NETWORKS, build_unet
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.strength import SigmaRange
from robustdiff.utils.errors import UsageError

SEED = 0


@dataclass(frozen=True)
class Row:
    """What was measured of one objective.

    Args:
        name: Of the objective.
        median_ms: Median time of a step in milliseconds, over the repetitions.
        least_ms: Fastest step.
        most_ms: Slowest step.
        ratio: Median over repetitions of this step's time by that of the plain step of the same repetition.
        theory: The ratio expected from counting passes.
        forward_passes: Mean number of calls of the network per step.
        images_forward: Mean number of images passed forward per step, in batches.
        memory_ratio: Mean over steps of the memory by that of plain: on a GPU the peak beyond what was allocated before
            the step, on a CPU what the forward passes keep for the backward pass (weights left out).
    """

    name: str
    median_ms: float
    least_ms: float
    most_ms: float
    ratio: float
    theory: float
    forward_passes: float
    images_forward: float
    memory_ratio: float


class Counter:
    """Counts a network's forward passes and the images in them."""

    def __init__(self, network: nn.Module) -> None:
        """Hook into ``network``."""
        self.calls = self.images = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.calls += 1
        self.images += inputs[0].shape[0]


def objectives(schedule: NoiseSchedule) -> dict[str, tuple[DenoisingLoss, float]]:
    """Objectives by name, each with the cost that theory expects relative to plain."""
    levels = schedule.noise_to_signal(torch.arange(schedule.num_timesteps))

    def share(loss: EquivarianceLoss) -> float:
        assert isinstance(loss.strength, SigmaRange)
        return (loss.strength(levels, levels) > 0).double().mean().item()

    gated, fast = (EquivarianceLoss.preset(name, schedule) for name in ("gated", "fast"))
    return {
        "plain": (DenoisingLoss(schedule), 1.0),
        "random": (EquivarianceLoss.preset("paper-random", schedule), 2.0),
        "adversarial": (EquivarianceLoss.preset("paper", schedule), 8 / 3),
        "fast": (fast, 1 + 5 / 3 * share(fast)),
        "gated": (gated, 1 + share(gated)),
    }


class Kept:
    """Bytes that the forward passes keep for the backward pass."""

    def __init__(self, network: nn.Module) -> None:
        """Leave the weights of ``network`` out."""
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self.held: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda saved: saved)

    def _keep(self, saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.held[storage.data_ptr()] = storage.nbytes()
        return saved

    @property
    def bytes(self) -> int:
        """All that was kept."""
        return sum(self.held.values())


class Step:
    """One training step: forward, backward, AdamW."""

    def __init__(self, objective: DenoisingLoss, arguments: argparse.Namespace) -> None:
        """Build a network and its optimiser; every objective gets the same initial weights."""
        torch.manual_seed(SEED)
        side, device = arguments.size, arguments.device
        self.objective = objective
        self.network = build_unet(arguments.network, arguments.channels, (side, side)).to(device).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        self.x0 = torch.rand(arguments.batch_size, arguments.channels, side, side, device=device) * 2 - 1
        self.counter = Counter(self.network)
        self.device = device

    def __call__(self, seed: int) -> tuple[float, int]:
        """Seconds, and on a GPU the peak memory in bytes beyond what was allocated before."""
        before = 0
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        generator = torch.Generator().manual_seed(seed)
        started = time.perf_counter()
        self.objective(self.network, self.x0, generator=generator).total.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return seconds, torch.cuda.max_memory_allocated() - before if self.device == "cuda" else 0

    def kept(self, seed: int) -> int:
        """What :class:`Kept` counts in a step; nothing is trained, nothing timed."""
        kept = Kept(self.network)
        with kept.hooks:
            terms = self.objective(self.network, self.x0, generator=torch.Generator().manual_seed(seed))
            del terms
        return kept.bytes


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Time every objective in turn, ``repetitions`` times of ``steps`` steps each."""
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    named = objectives(schedule)
    steps = {name: Step(objective, arguments) for name, (objective, _) in named.items()}
    for step in steps.values():  # warm-up: allocations, kernels, the optimiser's state
        for seed in range(2):
            step(SEED + seed)
        step.counter.calls = step.counter.images = 0
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, list[int]] = {name: [] for name in steps}
    for repetition in range(arguments.repetitions):
        for name, step in steps.items():
            times = []
            for seed in range(arguments.steps):
                spent, peak = step(SEED + 1000 * (repetition + 1) + seed)  # the same draws for every objective
                times.append(spent)
                memory[name].append(peak)
            seconds[name].append(statistics.fmean(times))
    count = arguments.repetitions * arguments.steps
    passes = {name: (step.counter.calls / count, step.counter.images / count) for name, step in steps.items()}
    if arguments.device == "cpu":
        memory = {name: [step.kept(SEED + seed) for seed in range(arguments.steps)] for name, step in steps.items()}
    rows = []
    for name, (calls, images) in passes.items():
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["plain"], strict=True)]
        rows.append(
            Row(
                name=name,
                median_ms=1e3 * statistics.median(seconds[name]),
                least_ms=1e3 * min(seconds[name]),
                most_ms=1e3 * max(seconds[name]),
                ratio=statistics.median(ratios),
                theory=named[name][1],
                forward_passes=calls,
                images_forward=images / arguments.batch_size,
                memory_ratio=statistics.fmean(memory[name]) / statistics.fmean(memory["plain"]),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| objective | ms per step: median (min-max) | x plain | theory | forward passes | in batches | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.median_ms:.1f} ({row.least_ms:.1f}-{row.most_ms:.1f}) | {row.ratio:.2f} "
            f"| {row.theory:.2f} | {row.forward_passes:.2f} | {row.images_forward:.2f} | {row.memory_ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure as the flags say and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", type=int, default=16, help="side of the square images, in pixels")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3), help="1 = grey, 3 = RGB")
    parser.add_argument("--network", default="small", choices=NETWORKS, help="preset network")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each objective")
    parser.add_argument("--steps", type=int, default=8, help="steps per turn, whose mean time is one measurement")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads; left alone if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    if min(arguments.size, arguments.batch_size, arguments.repetitions, arguments.steps, arguments.threads or 1) < 1:
        parser.error("--size, --batch-size, --repetitions, --steps and --threads must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        rows = measure(arguments)
    except UsageError as error:
        parser.error(str(error))
    side, channels, images = arguments.size, arguments.channels, arguments.batch_size
    print(
        f"network {arguments.network}, {images} images of {side} x {side} x {channels}, {arguments.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.repetitions} turns of "
        f"{arguments.steps} steps\n\n{table(rows)}"
    )
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        record = {"settings": settings, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
