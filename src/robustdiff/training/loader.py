"""Which image a run sees when: pure functions of (seed, image counter), on any number of processes and workers."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import ImageDataset
from robustdiff.training.curriculum import LevelBalancedSampler
from robustdiff.training.workers import LoadedBatch, load_ahead
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one forward pass, with everything that is known of them. B images.

    Attributes:
        x0: In [-1, 1], shape (B, ...).
        first: Counter of the first image: how many the run saw before it. Rules the network's own draws (dropout). In
            what a loader of your own gives, ``fit`` sets it.
        generators: Each image's own, for every draw that is made on it; None: made from the seed and the counter.
        index: Place of each in its data set, int64, shape (B,), if it has one.
        t: Timestep of each, int64, shape (B,); None: the loss draws them.
        noise_level: sigma_n, the noise that each carries already, in the units of ``x0``, shape (B,); None: none.
        mask: Where ``x0`` counts in the loss, bool, shape (B, ...) with as many axes as ``x0``, of its sizes or (but
            for the first) 1; None: everywhere.
        labels: Class of each, int64, shape (B,), for networks that take ``class_labels``.
    """

    x0: Tensor
    first: int = 0
    generators: Sequence[torch.Generator] | None = None
    index: Tensor | None = None
    t: Tensor | None = None
    noise_level: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None

    @property
    def counters(self) -> range:
        """Counters of the images."""
        return range(self.first, self.first + len(self.x0))


def draw_generators(seed: int, counters: range) -> list[torch.Generator]:
    """The generators of the images with these counters: pure functions of (seed, counter)."""
    return [torch.Generator().manual_seed(derive_seed(seed, "draws", counter)) for counter in counters]


@dataclass
class Batches:
    """Training images by counter: the run's ``counter``-th image is the same on any number of processes.

    Args:
        images: The data.
        corruptions: Frozen dirt, a function of (seed, index of the image).
        seed: The run's seed. None: ``fit`` fills in that of its options.
        random_flip: Mirror left-right with probability 1/2, a function of (seed, counter).
        only: Indices of the images that are used, int64; their dirt is the same. Default: all.
        noise_level: Standard deviation of the noise that each image carries, by index, shape (N,), if it is known.
        sampler: How often each image is seen, and at which timesteps; in place of ``only``. Default: all alike.
        repair: What is done to images after their dirt, ``repair(images, indices)``, and which pixels it made up.
            Default: nothing.
        masked_below: The timestep below which such pixels do not count, by index, int64, shape (N,). Default: they
            always do.
    """

    images: ImageDataset
    corruptions: tuple[Corruption, ...] = ()
    seed: int | None = None
    random_flip: bool = False
    only: Tensor | None = None
    noise_level: Tensor | None = None
    sampler: LevelBalancedSampler | None = None
    repair: Callable[[Tensor, Sequence[int]], LoadedBatch] | None = None
    masked_below: Tensor | None = None
    _epoch: int = -1
    _order: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @property
    def _seed(self) -> int:
        if self.seed is None:
            raise ValueError("Batches has no seed yet: give `seed`, or hand it to fit, which has one")
        return self.seed

    def index(self, counter: int) -> int:
        """Which image the run sees as its ``counter``-th: a fresh permutation per pass over the data."""
        only = self.only if self.sampler is None else self.sampler.used
        count = len(self.images) if only is None else len(only)
        epoch, place = divmod(counter, count)
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", epoch))
            if self.sampler is not None:
                order = self.sampler.order(generator)
            else:
                order = torch.randperm(count, generator=generator)
                order = order if only is None else only[order]
            self._epoch, self._order = epoch, order
        return int(self._order[place])

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
            images = torch.stack([corrupt(x0, self.corruptions, self._seed, index)[0] for x0, index in pairs])
        return images

    def draw(self, counters: range, loaded: LoadedBatch) -> Batch:
        """Everything random about these visits (generators, mirroring, timesteps), and what is known of the images."""
        images, filled = loaded
        index = torch.tensor([self.index(counter) for counter in counters])
        generators = draw_generators(self._seed, counters)
        if self.random_flip:
            mirrored = torch.tensor([bool(torch.rand((), generator=generator) < 0.5) for generator in generators])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            filled = None if filled is None else torch.where(mirrored[:, None, None], filled.flip(-1), filled)
        t = mask = None
        if self.sampler is not None:
            u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
            t = self.sampler.timesteps(index, u)
        if filled is not None and t is not None and self.masked_below is not None:
            below = t < self.masked_below[index]
            mask = ~(filled & below[:, None, None])[:, None]
        return Batch(
            images,
            counters[0],
            generators,
            index,
            t,
            None if self.noise_level is None else self.noise_level[index],
            mask,
            None if self.images.labels is None else self.images.labels[index],
        )


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
) -> Generator[Batch, None, None]:
    """One batch after the other; close it to end the workers.

    Args:
        batches: The rule.
        shares: Counters of each batch.
        workers: Processes that load images ahead, started once; 0 loads here. The batches are the same.
        pin: Put images into pinned memory, for faster copies to a GPU.
    """
    if not workers:
        for counters in shares:
            yield batches(counters)
        return
    with contextlib.closing(load_ahead(batches.load, shares, workers, pin)) as loading:
        for counters, loaded in loading:
            yield batches.draw(counters, loaded)


def repeat_batches(
    data: Iterable[Any], seed: int, first: int = 0, process: int = 0, processes: int = 1, labels: bool = True
) -> Generator[Batch, None, None]:
    """Batches of somebody else's loader, over and over.

    Args:
        data: Gives images, shape (B, ...), or pairs of images and labels, or :class:`Batch`; can be iterated anew. Each
            process gives its own share.
        seed: Rules the draws on each image, with its counter.
        first: Images seen before, by all processes.
        process: This process, from 0.
        processes: Of how many.
        labels: Whether the network takes those of pairs; if not, one warning says that they are not used.

    Raises:
        ValueError: If it gives something else, an empty batch, or is used up.
    """
    count = 0
    while True:
        before = count
        for item in data:
            batch = _as_batch(item)
            if not labels and batch.labels is not None and batch is not item:
                message = "the labels that data gives are not used: the network takes no `class_labels`"
                warnings.warn(message, RobustdiffWarning, stacklevel=2)
                labels = True
            batch = dataclasses.replace(batch, first=first + process * len(batch.x0))
            if batch.generators is None:
                batch = dataclasses.replace(batch, generators=draw_generators(seed, batch.counters))
            yield batch
            first += processes * len(batch.x0)
            count += 1
        if count == before:
            raise ValueError(
                f"data ended after {count} batches: give something that can be iterated anew, such as a DataLoader"
            )


def _as_batch(item: object) -> Batch:
    if isinstance(item, Batch):
        if not len(item.x0):
            raise ValueError("data gave a Batch without images: leave it out")
        return item
    parts = tuple(item) if isinstance(item, tuple | list) else (item,)
    tensors = all(isinstance(part, Tensor) for part in parts)
    if not tensors or len(parts) not in (1, 2) or not parts[0].is_floating_point():
        dtype = f" of {str(parts[0].dtype).removeprefix('torch.')}" if parts and isinstance(parts[0], Tensor) else ""
        raise ValueError(
            f"data gave {type(item).__name__}{dtype}: give float tensors of images in [-1, 1], pairs of images and "
            "labels, or Batch"
        )
    if parts[0].ndim == 0 or not len(parts[0]):
        raise ValueError(f"data gave images of shape {tuple(parts[0].shape)}: give at least one, shape (B, ...)")
    return Batch(parts[0], labels=parts[1] if len(parts) == 2 else None)
