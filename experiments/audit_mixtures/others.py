"""What stands beside the audit: an estimate of noise that many use, and another tool, on the same images."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.audit_mixtures.damages import HALF, Bytes
from experiments.audit_mixtures.sets import Truth
from robustdiff.utils.images import save_png

CALLED_CLEAN = 0.995
"""Share of the clean images below the threshold of the wavelet's estimate."""
ISSUES = ("blurry", "dark", "light", "low_information")
"""What cleanvision looks for in single images, beside odd sizes, of which there are none."""


def wavelet_noise(images: Bytes) -> np.ndarray:
    """Standard deviation of white noise, pixels being in [-1, 1], of each of (N, C, H, W), shape (N,).

    The median of the finest diagonal coefficients of Haar's wavelet, over 0.6745; the mean over channels.

    Source: Donoho and Johnstone (1994).
    """
    x = images[:, :, : images.shape[2] // 2 * 2, : images.shape[3] // 2 * 2].astype(np.float64)
    diagonal = (x[..., ::2, ::2] - x[..., ::2, 1::2] - x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 2
    return np.median(np.abs(diagonal), axis=(2, 3)).mean(1) / 0.6745 / HALF


def wavelet(images: Bytes, truth: Truth) -> dict[str, Any] | None:
    """How often noise, so estimated, is above a threshold that was told which images are clean; None if none are."""
    if not truth.clean.any():
        return None
    sigma = wavelet_noise(images)
    threshold = float(np.quantile(sigma[truth.clean], CALLED_CLEAN))
    return {"threshold": round(threshold, 4), **_counts(sigma > threshold, truth)}


def cleanvision(images: Bytes, truth: Truth) -> dict[str, Any] | None:
    """How often cleanvision, as it comes, finds any fault of an image; None if it is not installed."""
    if importlib.util.find_spec("cleanvision") is None:
        return None
    from cleanvision import Imagelab  # optional

    with tempfile.TemporaryDirectory() as folder:
        for place, image in enumerate(images):
            save_png(torch.from_numpy(image), Path(folder) / f"{place:05d}.png")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it says what it does, and how far it is
            lab = Imagelab(data_path=folder)
            lab.find_issues({issue: {} for issue in ISSUES}, n_jobs=1, verbose=False)
    table = lab.issues
    places = [int(Path(path).stem) for path in table.index]
    told = np.zeros(len(images), bool)
    told[places] = table[[f"is_{issue}_issue" for issue in ISSUES]].any(axis=1).to_numpy()
    return _counts(told, truth)


def _counts(told: np.ndarray, truth: Truth) -> dict[str, Any]:
    kinds: dict[str, dict[str, dict[str, int]]] = {}
    for kind, part, found in zip(truth.kind, truth.part, told.tolist(), strict=True):
        if kind:
            tally = kinds.setdefault(kind, {}).setdefault(part, {"images": 0, "found": 0})
            tally["images"] += 1
            tally["found"] += int(found)
    return {"false": int((told & truth.clean).sum()), "kinds": kinds}
