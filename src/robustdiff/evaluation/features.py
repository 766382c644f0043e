"""Features of a whole set of images, and the cache that keeps them.

Cached features are found by content: the pixels, the weights and the settings, not the names of any files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustdiff.data.dataset import ImageDataset, StreamedImages
from robustdiff.evaluation.extractors import Extractor, open_extractor, reason_of
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError
from robustdiff.utils.resources import free_memory, is_out_of_memory

__all__ = ["Extractor", "Features", "Images", "default_cache", "extract", "images_sha256", "open_extractor"]

FORMAT = "robustdiff features 1"
"""Part of every key of the cache: to be changed with anything in the code that changes values."""
STALE = 86_400
"""Seconds after which a half-written file in the cache is taken for a killed process's."""
STEADY = 1e-2
"""Largest relative change of features from batch to batch that passes for rounding."""


class Images(Protocol):
    """What is asked of images: uint8 (N, C, H, W), C = 1 or 3, cut along the first axis."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, C, H, W)."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of them, uint8 (B, C, H, W)."""


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of a set of images.

    Attributes:
        values: float32, shape (n, d), on the CPU; in the order of the images.
        extractor: What made them.
        images_sha256: Digest of the images' shape and pixels (:func:`images_sha256`).
        cached: Whether they come from the cache.
    """

    values: Tensor
    extractor: Extractor
    images_sha256: str
    cached: bool


def extract(
    extractor: Extractor,
    images: Images | ImageDataset,
    *,
    batch_size: int = 256,
    cache: Path | None,
    progress: Callable[[int], object] | None = None,
) -> Features:
    """Features of every image, in float32 and without TF32 or autocast.

    The first images are shown twice, alone and in their batch: features that depend on chance or on the other images
    in the batch are refused. A cache that cannot be used is told and done without.

    Args:
        extractor: What :func:`open_extractor` gave.
        images: uint8, shape (N, C, H, W), N >= 1, C = 1 or 3; a tensor, an image set, or anything cut alike. Streamed
            images are held one batch at a time.
        batch_size: Images at a time.
        cache: Folder of the cache, made if it is missing (:func:`default_cache`); None for none. Pixels are never
            cached: they are cheap.
        progress: Called with the number of images of each finished batch.

    Raises:
        UsageError: In one line, if the extractor cannot do it, gives something else than (B, d) finite numbers, or
            memory runs out.
        ValueError: If the images are not as said above.
    """
    place = feature_cache(extractor, images, batch_size=batch_size, cache=cache)
    values = place.get()
    cached = values is not None
    if values is None:
        values = compute(extractor, rows_of(images), batch_size, progress)
        place.put(values)
    elif progress is not None:
        progress(len(values))
    return Features(values, extractor, place.images_sha256, cached)


def rows_of(images: Images | ImageDataset) -> Images:
    """The images of a set, which can be cut."""
    return images.images if isinstance(images, ImageDataset) else images


def images_sha256(images: Images | ImageDataset, batch_size: int = 256) -> str:
    """Digest of a set of images: SHA-256 of ``"uint8 N C H W "`` and the SHA-256 of the pixels in that order.

    Image sets know the second part already: streamed ones are not decoded again for it.

    Args:
        images: As for :func:`extract`.
        batch_size: Images held at a time.

    Raises:
        ValueError: If they are not uint8.
    """
    if isinstance(images, ImageDataset | StreamedImages):
        shape: Sequence[int] = (images.images if isinstance(images, ImageDataset) else images).shape
        pixels = images.sha256
    else:
        shape, running = images.shape, hashlib.sha256()
        for start in range(0, len(images), batch_size):
            running.update(_uint8(images[start : start + batch_size]).cpu().contiguous().numpy().data)
        pixels = running.hexdigest()
    return hashlib.sha256(f"uint8 {' '.join(map(str, shape))} {pixels}".encode()).hexdigest()


def _uint8(batch: Tensor) -> Tensor:
    if batch.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {batch.dtype}")
    return batch


# -- computing ---------------------------------------------------------------------------------------


def compute(
    extractor: Extractor,
    images: Images,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """Features without the cache; :func:`extract` says what is checked.

    Args:
        extractor: As for :func:`extract`.
        images: uint8, shape (N, C, H, W).
        batch_size: Images at a time.
        progress: As for :func:`extract`.
        starts: First images of the batches to compute, multiples of ``batch_size``; default: of all.

    Returns:
        float32, one row per image of those batches, in their order; shape (0,) if there are none.
    """
    starts = range(0, len(images), batch_size) if starts is None else starts
    count = sum(min(batch_size, len(images) - start) for start in starts)
    values, done = torch.empty(0), 0
    for start in starts:
        batch = _uint8(images[start : start + batch_size])
        features = _run(extractor, batch, start)
        if start == 0:
            _check_steady(extractor, batch, features)
        if done == 0:
            values = _room(extractor, count, features.shape[1])
        elif features.shape[1] != values.shape[1]:
            raise UsageError(
                f"`extractor` {extractor.name} gives {features.shape[1]} features after {values.shape[1]} before"
            )
        values[done : done + len(batch)] = features
        done += len(batch)
        if progress is not None:
            progress(len(batch))
    return values


def _run(extractor: Extractor, batch: Tensor, start: int = 0) -> Tensor:
    """Checked features of one batch, float32 on the CPU."""
    asked = f"`extractor` {extractor.name}"
    device = extractor.device
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _full_precision(device):
            given: Any = extractor.model(batch.to(device))
            good = isinstance(given, Tensor) and given.is_floating_point()
            features = given.float().cpu() if good else torch.empty(0)
    except Exception as error:  # whatever the file of a stranger raises
        if is_out_of_memory(error):
            raise UsageError(f"{asked}: out of memory with {len(batch)} images; use a smaller `batch_size`") from None
        raise UsageError(f"{asked} fails on images of shape {tuple(batch.shape)}: {reason_of(error)}") from None
    if not good or features.ndim != 2 or len(features) != len(batch) or not features.shape[1]:
        what = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise UsageError(f"{asked} must give floating point ({len(batch)}, d) for {len(batch)} images, not {what}")
    if not (finite := features.isfinite().all(1)).all():
        place = start + int(finite.int().argmin())
        raise UsageError(f"{asked} gives features that are not finite, first for image {place} (from 0)")
    return features


def _check_steady(extractor: Extractor, batch: Tensor, features: Tensor) -> None:
    few = features[: -(-len(features) // 2)][:4]
    again = _run(extractor, batch[: len(few)])
    if again.shape != few.shape or not (again - few).norm() <= STEADY * few.norm():
        raise UsageError(
            f"`extractor` {extractor.name} gives other features for the same images in another batch: it must be saved "
            "in evaluation mode and draw nothing at random"
        )


def _room(extractor: Extractor, count: int, size: int) -> Tensor:
    needed, free = count * size * 4, free_memory()
    if needed > free:
        raise UsageError(
            f"`extractor` {extractor.name}: {count} x {size} features take {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; use an extractor with fewer features, or fewer images"
        )
    return torch.empty(count, size)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, which torch allows in convolutions by default: cached features must not depend on the device."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # torch 2.9; asking for the old flag is an error once anyone has used the new one
        flags: list[tuple[Any, str, Any]] = [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    else:
        flags = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    before = [getattr(owner, name) for owner, name, _ in flags]
    try:
        for owner, name, value in flags:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


# -- the cache ---------------------------------------------------------------------------------------


def default_cache() -> Path:
    """Where features are kept: ``features`` in ``$ROBUSTDIFF_CACHE``, or in the user's cache folder.

    The latter is ``$XDG_CACHE_HOME/robustdiff`` or ``~/.cache/robustdiff``.
    """
    if own := os.environ.get("ROBUSTDIFF_CACHE"):
        return Path(own).expanduser() / "features"
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "robustdiff" / "features"


@dataclass(frozen=True)
class FeatureCache:
    """Where the features of one set of images by one extractor have their place in the cache.

    Attributes:
        key: All that decides their values, as JSON; equal for equal features.
        images_sha256: Digest of the images (:func:`images_sha256`).
        count: How many images.
        path: The file; None if nothing is cached.
    """

    key: str
    images_sha256: str
    count: int
    path: Path | None

    def get(self) -> Tensor | None:
        """What is there; None if there is nothing, or nothing that is whole, which is told."""
        return None if self.path is None else _read(self.path, self.key, self.count)

    def put(self, values: Tensor) -> None:
        """Put features there; that it cannot be done is told."""
        if self.path is not None:
            _write(self.path, self.key, values)


def feature_cache(
    extractor: Extractor, images: Images | ImageDataset, *, batch_size: int, cache: Path | None
) -> FeatureCache:
    """The place in the cache; arguments as for :func:`extract`.

    Raises:
        UsageError: If ``batch_size`` is below 1.
        ValueError: If these are no images.
    """
    rows = rows_of(images)
    if batch_size < 1:
        raise UsageError(f"`batch_size` must be at least 1, got {batch_size}")
    if len(rows.shape) != 4 or rows.shape[1] not in (1, 3) or not len(rows):
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1 and C = 1 or 3, got {tuple(rows.shape)}")
    digest = images_sha256(images, batch_size)
    about = {
        "format": FORMAT,
        "images": digest,
        "kind": extractor.kind,
        "weights": extractor.sha256,
        "settings": dict(extractor.settings),
    }
    key = json.dumps(about, sort_keys=True)
    name = f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    return FeatureCache(key, digest, len(rows), cache / name if cache and extractor.kind != "pixels" else None)


def _read(path: Path, key: str, count: int) -> Tensor | None:
    """What the cache has under this key; None if it has nothing, or nothing that is whole."""
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            values: Tensor = file.get_tensor("features").clone()  # the file may be replaced under a mapped tensor
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = f"unreadable ({atomic_io.one_line(error)})"
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = f"damaged ({atomic_io.one_line(error)})"
    else:
        told = {name: header.get(name) for name in ("about", "shape", "sha256")}
        right = values.dtype == torch.float32 and values.ndim == 2 and len(values) == count
        if right and told == {"about": key, "shape": _shape(values), "sha256": _digest(values)}:
            return values
        reason = "damaged (not what the header says)"
    _warn(f"cached features {path} are {reason}: computing them again")
    return None


def _write(path: Path, key: str, values: Tensor) -> None:
    """Put features into the cache: whole or not at all, also when several processes do."""
    aside = path.with_name(f".{path.stem[:16]}.{uuid.uuid4().hex}.tmp")  # not NAME.tmp: others may be writing the same
    header = {"format": FORMAT, "about": key, "shape": _shape(values), "sha256": _digest(values)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
        save_file({"features": values}, aside, header)
        atomic_io.fsync_file(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        _warn(
            f"features are not cached in {path.parent} ({atomic_io.one_line(error)}); "
            "`cache` FOLDER puts them elsewhere"
        )


def _shape(values: Tensor) -> str:
    return " ".join(map(str, values.shape))


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def _warn(message: str) -> None:
    warnings.warn(message, RobustdiffWarning, stacklevel=4)
