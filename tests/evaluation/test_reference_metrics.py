"""Equality with the reference implementations of the metrics on the same features: torch-fidelity and prdc.

Neither is a dependency. To run these: ``pip install torch-fidelity prdc`` (torch-fidelity wants torchvision).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import normal
from robustdiff.evaluation import distances, neighbours


def fidelity(module: str) -> Any:
    return pytest.importorskip(f"torch_fidelity.{module}", reason="torch-fidelity, or its torchvision, is missing")


def features(n: int, d: int, seed: int, kind: str) -> Tensor:
    """Float32 features: Gaussian with a decaying spectrum, or non-negative with many zeros as after a ReLU."""
    x = normal(n, d, seed=seed) * torch.arange(1, d + 1) ** -0.4
    if kind == "rectified":
        x = (x + 0.02 * seed).clamp(min=0) @ normal(d, d, seed=99).abs() / d
    return x.float()


CASES = [
    pytest.param(1000, 800, 64, "gaussian", id="gaussian"),
    pytest.param(1000, 800, 64, "rectified", id="rectified"),
    pytest.param(150, 120, 200, "gaussian", id="fewer-rows-than-columns"),
]


@pytest.mark.parametrize(("n", "m", "d", "kind"), CASES)
def test_frechet_equals_torch_fidelity(n: int, m: int, d: int, kind: str) -> None:
    theirs = fidelity("metric_fid")
    a, b = features(n, d, 0, kind), features(m, d, 1, kind)
    # in float64, which is what torch-fidelity makes of Inception's features before it takes the moments
    statistics = [theirs.fid_features_to_statistics(x.double()) for x in (a, b)]
    wanted = theirs.fid_statistics_to_metric(*statistics, verbose=False)[theirs.KEY_METRIC_FID]
    assert distances.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d", "kind"), CASES)
def test_kid_equals_torch_fidelity_on_the_same_subsets(
    n: int, m: int, d: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = fidelity("metric_kid")
    a, b = features(n, d, 0, kind), features(m, d, 1, kind)
    drawn: list[np.ndarray[Any, Any]] = []
    draw = torch.randperm

    def remember(rows: int, **settings: Any) -> Tensor:
        order = draw(rows, **settings)
        drawn.append(order.numpy())
        return order

    class Repeat:
        """In place of numpy's generator: the subsets that were drawn, in their order."""

        def __init__(self, seed: int) -> None:
            self.left = iter(drawn)

        def choice(self, rows: int, size: int, replace: bool) -> np.ndarray[Any, Any]:
            order = next(self.left)
            assert len(order) == rows
            return order[:size]

    monkeypatch.setattr(torch, "randperm", remember)
    mean, error, size = distances.kernel_distance(a, b, subsets=20)
    monkeypatch.setattr(theirs.np.random, "RandomState", Repeat)
    settings = {"kid_subsets": 20, "kid_subset_size": size, "verbose": False}
    wanted = theirs.kid_features_to_metric(a, b, **settings)
    assert mean == pytest.approx(wanted[theirs.KEY_METRIC_KID_MEAN], abs=1e-5)
    between = wanted[theirs.KEY_METRIC_KID_STD] * (20 / 19) ** 0.5
    assert error == pytest.approx(between * (size / (min(n, m) - size) + 1 / 20) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("n", "m", "d", "kind"), CASES)
def test_balls_equal_prdc(n: int, m: int, d: int, kind: str, k: int) -> None:
    prdc = pytest.importorskip("prdc", reason="prdc is missing")
    real, fake = features(n, d, 0, kind), features(m, d, 1, kind)
    # in float64: its distances of float32 rows are rounded to float32, and ties there change a count
    wanted = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    found = neighbours.prdc(real, fake, k)
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-12, abs=0)
    assert 0 < found["coverage"] < 1
