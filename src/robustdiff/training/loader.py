"""Which image a run sees when: pure functions of (seed, image counter), on any number of processes and workers."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import ImageDataset
from robustdiff.training.curriculum import LevelBalancedSampler
from robustdiff.utils.errors import UsageError
from robustdiff.utils.seeds import derive_seed

LoadedBatch = tuple[Tensor, Tensor | None]
"""Images in [-1, 1], (B, C, H, W); which of their pixels were filled in, bool, (B, H, W), or None if none were."""
Batch = tuple[Tensor, list[torch.Generator], Tensor | None, Tensor | None]
"""Images; each one's generator for every draw made on it; labels, (B,), or None; pixels filled in, or None."""


@dataclass
class Batches:
    """Training images by counter: the run's ``counter``-th image is the same on any number of processes.

    Args:
        images: The data.
        corruptions: Frozen dirt, a function of (seed, index of the image).
        seed: The run's seed.
        random_flip: Mirror left-right with probability 1/2, a function of (seed, counter).
        only: Indices of the images that are used, int64; their dirt is the same. Default: all.
        sigma: Standard deviation of the noise that each image carries, by index, shape (N,), if it is known.
        visits: How often each image is seen, and at which timesteps; in place of ``only``. Default: all alike.
        repair: What is done to images after their dirt, ``repair(images, indices)``, and which pixels it made up.
            Default: nothing.
        whole_from: The timestep from which such pixels count, by index, int64, shape (N,). Default: they always do.
    """

    images: ImageDataset
    corruptions: tuple[Corruption, ...]
    seed: int
    random_flip: bool
    only: Tensor | None = None
    sigma: Tensor | None = None
    visits: LevelBalancedSampler | None = None
    repair: Callable[[Tensor, Sequence[int]], LoadedBatch] | None = None
    whole_from: Tensor | None = None
    _epoch: int = -1
    _order: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def index(self, counter: int) -> int:
        """Which image the run sees as its ``counter``-th: a fresh permutation per pass over the data."""
        only = self.only if self.visits is None else self.visits.used
        count = len(self.images) if only is None else len(only)
        epoch, place = divmod(counter, count)
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            if self.visits is not None:
                order = self.visits.order(generator)
            else:
                order = torch.randperm(count, generator=generator)
                order = order if only is None else only[order]
            self._epoch, self._order = epoch, order
        return int(self._order[place])

    def noise_levels(self, counters: range) -> Tensor | None:
        """What ``noise_level`` of the objectives is for the images with these counters, shape (B,), if it is known."""
        return None if self.sigma is None else self.sigma[[self.index(counter) for counter in counters]]

    def timesteps(self, counters: range, generators: Sequence[torch.Generator]) -> Tensor | None:
        """Timesteps for the images with these counters, shape (B,), one number of each generator; None: not ruled."""
        if self.visits is None:
            return None
        u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        return self.visits.timesteps(torch.tensor([self.index(counter) for counter in counters]), u)

    def masks(self, counters: range, t: Tensor | None, lost: Tensor | None) -> Tensor | None:
        """``loss_mask`` of the objectives for the images with these counters at these timesteps, bool, (B, 1, H, W)."""
        if lost is None or t is None or self.whole_from is None:
            return None
        early = t < self.whole_from[[self.index(counter) for counter in counters]]
        return ~(lost & early[:, None, None])[:, None]

    def __call__(self, counters: range) -> Batch:
        """The images with these counters."""
        return self.draw(counters, self.load(counters))

    def load(self, counters: range) -> LoadedBatch:
        """The images as the data set holds them, with their dirt and repaired. The part that workers do."""
        indices = [self.index(counter) for counter in counters]
        images = self.images_at(indices)
        return (images, None) if self.repair is None else self.repair(images, indices)

    def images_at(self, indices: Sequence[int]) -> Tensor:
        """The images with these indices, with their dirt, (B, C, H, W)."""
        images = self.images.x0(list(indices))
        if self.corruptions:
            pairs = zip(images, indices, strict=True)
            images = torch.stack([corrupt(x0, self.corruptions, self.seed, index)[0] for x0, index in pairs])
        return images

    def draw(self, counters: range, loaded: LoadedBatch) -> Batch:
        """Everything random about these visits: generators and mirroring; and the labels."""
        images, lost = loaded
        generators = [torch.Generator().manual_seed(derive_seed(self.seed, "draws", counter)) for counter in counters]
        if self.random_flip:
            mirrored = torch.tensor([bool(torch.rand((), generator=generator) < 0.5) for generator in generators])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            lost = None if lost is None else torch.where(mirrored[:, None, None], lost.flip(-1), lost)
        every = self.images.labels
        labels = None if every is None else every[[self.index(counter) for counter in counters]]
        return images, generators, labels, lost


class _Loading(Dataset["Loaded | UsageError"]):
    """``Batches.load`` as a data set whose indices are ranges of counters."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, counters: range) -> LoadedBatch | UsageError:
        try:
            return self.batches.load(counters)
        except UsageError as error:  # handed over as a value: the loader would wrap a stack trace around it
            return error


@dataclass(frozen=True)
class RankSampler:
    """Counters of each forward pass of one process, in order.

    Args:
        first_step: Optimiser step to begin with.
        steps: Optimiser steps of the whole run.
        batch: Images per optimiser step, over all processes and accumulated passes.
        size: Images per pass of one process; divides ``batch`` a whole number of times ``processes``.
        process: This process, from 0.
        processes: Of how many.
    """

    first_step: int
    steps: int
    batch: int
    size: int
    process: int
    processes: int

    def __iter__(self) -> Iterator[range]:
        """One range per pass."""
        for step in range(self.first_step, self.steps):
            for first in range(step * self.batch, (step + 1) * self.batch, self.size * self.processes):
                yield range(first + self.process * self.size, first + (self.process + 1) * self.size)

    def __len__(self) -> int:
        """How many passes."""
        return (self.steps - self.first_step) * self.batch // (self.size * self.processes)


def iterate_batches(
    batches: Batches, shares: RankSampler, workers: int, pin: bool = False
) -> Generator[tuple[range, Batch], None, None]:
    """Counters and batch, one after the other; close it to end the workers.

    Args:
        batches: The rule.
        shares: Counters of each batch.
        workers: Processes that load images ahead, started once; 0 loads here. The batches are the same.
        pin: Put images into pinned memory, for faster copies to a GPU.
    """
    if not workers:
        for counters in shares:
            yield counters, batches(counters)
        return
    loader = DataLoader(
        _Loading(batches),
        sampler=shares,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global stream
        worker_init_fn=_leave_signals_to_the_parent,
    )
    loading: Any = iter(loader)
    try:
        for counters, loaded in zip(shares, loading, strict=True):
            if isinstance(loaded, UsageError):
                raise loaded
            yield counters, batches.draw(counters, loaded)
    finally:  # not left to the collector: a stack trace may hold them, and the interpreter's end would wait for ever
        loading._shutdown_workers()
        for worker in loading._workers:
            worker.kill()  # one that hangs in a read


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A Ctrl-C or a SIGTERM for the whole group must not lose what the parent is about to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
