"""Data sources in their native formats, small, and what the tests of all of them ask: what they hold, how they fail."""

import io
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import lmdb
import numpy as np
import pytest
from PIL import Image

from robustdiff.data.sources.open import DataError, open_source


def pixels(height=6, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def encoded(array, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, form, lossless=True)
    return buffer.getvalue()


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels() if array is None else array))


def decoded(item):
    """(H, W, C) of any item."""
    if isinstance(item, np.ndarray):
        return item
    array = np.asarray(Image.open(item if isinstance(item, Path) else io.BytesIO(item)))
    return array if array.ndim == 3 else array[..., None]


def holds(source, arrays):
    assert len(source.names) == len(arrays)
    for index, array in enumerate(arrays):
        np.testing.assert_array_equal(decoded(source.read(index)), array)


def fails(*words, source, **options):
    """Opening must fail with one line that holds all the words."""
    with pytest.raises(DataError) as caught:
        open_source(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def refused(read, index):
    with pytest.raises(OSError) as caught:
        read(index)
    return str(caught.value)


def read_elsewhere(read, index):
    return decoded(read(index))


def works_in_workers_and_threads(source, arrays):
    """After pickling, in a forked and a spawned process, in a fork of one that is reading, and from threads."""
    holds(type(source)(source.what, source.names, pickle.loads(pickle.dumps(source)).read), arrays)
    tasks = [(source.read, index) for index in range(len(arrays))]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for array, result in zip(arrays, pool.starmap(read_elsewhere, tasks), strict=True):
                np.testing.assert_array_equal(result, array)
    with ThreadPoolExecutor(4) as pool:
        for index, result in enumerate(pool.map(source.read, list(range(len(arrays))) * 50)):
            np.testing.assert_array_equal(decoded(result), arrays[index % len(arrays)])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# -- tables ----------------------------------------------------------------------------------------


IMAGES = [pixels(seed=seed, channels=1 if seed == 2 else 3) for seed in range(5)]

ROWS = [{"bytes": encoded(image), "path": None} for image in IMAGES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees or leaves anything in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def columns(**features):
    """A table of the five images with further columns: name=(feature, values)."""
    data = {"image": ROWS, **{name: values for name, (_, values) in features.items()}}
    kinds = {"image": datasets.Image(), **{name: feature for name, (feature, _) in features.items()}}
    return datasets.Dataset.from_dict(data, datasets.Features(kinds))


def labelled(values=(0, 1, 1, 0, 1)):
    return columns(label=(datasets.ClassLabel(names=["cat", "ant"]), list(values)))


# -- CIFAR, CelebA, LSUN ---------------------------------------------------------------------------


PLANES = np.random.default_rng(5).integers(0, 256, (3, 3072)).astype(np.uint8)


def write_cifar(folder, protocol=2, changes=()):
    """Batch n (1 .. 5, 6 = test) has n-th pixels; keys are bytes, as Python 3 finds them in the published files."""
    folder.mkdir(exist_ok=True)
    meta = {b"label_names": [b"airplane", b"automobile", b"bird"], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    for number in range(1, 7):
        names = [f"{number}_{row}.png".encode() for row in range(3)]
        batch = {b"batch_label": b"x", b"labels": [2, 0, 1], b"data": PLANES + np.uint8(number), b"filenames": names}
        name = "test_batch" if number == 6 else f"data_batch_{number}"
        (folder / name).write_bytes(pickle.dumps({**batch, **dict(changes)}, protocol=protocol))


def write_celeba(folder, partition=None, images="img_align_celeba"):
    for number in range(1, 6):
        save(folder / images / f"{number:06d}.jpg", pixels(seed=number))
    lines = [f"{number:06d}.jpg {part}" for number, part in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 0), (6, 0))]
    path = folder / (partition or "list_eval_partition.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_lsun(folder, count, seed=0, keys=None):
    folder.mkdir(parents=True)
    keys = keys or [f"{number:04x}".encode() for number in range(count)]
    environment = lmdb.open(str(folder), map_size=2**24)
    with environment.begin(write=True) as transaction:
        for number, key in enumerate(keys):
            transaction.put(key, encoded(pixels(seed=seed + number), "WEBP"))
    environment.close()
