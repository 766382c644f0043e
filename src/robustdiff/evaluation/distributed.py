"""Features by all processes of a launcher: each computes its share, the first one gathers, caches and judges."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor

from robustdiff.data.dataset import ImageDataset
from robustdiff.evaluation.extractors import Extractor
from robustdiff.evaluation.features import (
    Features,
    Images,
    compute,
    extract,
    feature_cache,
    rows_of,
)
from robustdiff.utils.errors import UsageError

SENT = 64 * 2**20
"""Bytes of images that go from process to process at a time."""


def share(images: Tensor | None) -> Tensor:
    """Give the first process's images to all.

    Args:
        images: uint8 (n, C, H, W) on the first process; None on the others.
    """
    state = PartialState()
    if images is not None and state.num_processes == 1:
        return images
    (shape,) = broadcast_object_list([None if images is None else list(images.shape)])
    everything = torch.empty(shape, dtype=torch.uint8) if images is None else images.contiguous()
    step = max(1, SENT // max(1, everything[:1].nbytes))
    for start in range(0, len(everything), step):
        part = everything[start : start + step]
        there = broadcast(part.to(state.device))  # the network may only carry what lies on the accelerator
        if images is None:
            part.copy_(there)
    return everything


def extract_together(
    extractor: Extractor,
    images: Images | ImageDataset,
    what: str,
    *,
    batch_size: int,
    cache: Path | None,
    progress: Callable[[int], object] | None = None,
) -> Features | None:
    """Features of every image, as :func:`robustdiff.evaluation.features.extract` gives them on one process.

    To be called by all processes, with the same images. The batches are those of one process, dealt out whole, so that
    each image is computed in the same company and the features are the same bit for bit. Only the first process looks
    into the cache and writes it. Pixels are not worth sending: the first process takes them alone.

    Args:
        extractor: On this process's device.
        images: All of them, on every process.
        what: What errors call the images, such as ``reference``.
        batch_size: Images at a time, on each process.
        cache: Folder of the cache, or None.
        progress: Told of finished images, those of the other processes guessed from this one's.

    Returns:
        The features on the first process, None on the others.

    Raises:
        UsageError: As ``extract``; and if processes have other images or another extractor than the first.
    """
    state = PartialState()
    if state.num_processes == 1:
        return extract(extractor, images, batch_size=batch_size, cache=cache, progress=progress)
    place = feature_cache(extractor, images, batch_size=batch_size, cache=cache)
    if len(set(gather_object([place.key]))) > 1:
        raise UsageError(
            f"{what} or `extractor` {extractor.name}: not all processes read the same images and weights: make them "
            "the same on all machines"
        )
    values = place.get() if state.is_main_process else None
    (cached,) = broadcast_object_list([values is not None])
    rows = rows_of(images)
    if cached:
        if progress is not None:
            progress(place.count)
    elif extractor.kind == "pixels":
        values = compute(extractor, rows, batch_size, progress) if state.is_main_process else None
    else:
        with state.split_between_processes(list(range(0, place.count, batch_size))) as starts:
            part = compute(extractor, rows, batch_size, _of_all(progress, place.count, state.num_processes), starts)
        parts = gather_object([part])
        if state.is_main_process:
            values = _joined(extractor, parts)
            place.put(values)
    return None if values is None else Features(values, extractor, place.images_sha256, cached)


def release() -> None:
    """Let the others go, once all have come here: the first process has long to judge, and needs no one for it."""
    state = PartialState()
    state.wait_for_everyone()
    if state.num_processes > 1 and state.backend == "gloo":
        # Its threads must end before the interpreter does, which aborts otherwise. NCCL's must be left alone: there
        # processes wait for one another in it.
        atexit.register(state.destroy_process_group)


def _of_all(progress: Callable[[int], object] | None, total: int, processes: int) -> Callable[[int], object]:
    """Tells of the images of all processes, each being as far as this one."""
    told = 0

    def tell(count: int) -> None:
        nonlocal told
        now = min(count * processes, total - told)
        told += now
        if progress is not None:
            progress(now)

    return tell


def _joined(extractor: Extractor, parts: Sequence[Tensor]) -> Tensor:
    parts = [part for part in parts if len(part)]  # with fewer batches than processes some have none
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise UsageError(f"`extractor` {extractor.name} gives different numbers of features: {sorted(widths)}")
    return torch.cat(parts)
