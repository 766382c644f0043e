"""What a result of an attack says in numbers and words."""

import pytest
import torch

from robustdiff.attacks.benchmark.summary import _value


def test_no_interval_of_a_distance_is_below_zero() -> None:
    """Few images, of which one moves: the mean less two standard errors is below 0."""
    moved = torch.tensor([0.0, 0.0, 0.0, 8.0])
    entry = _value(moved, 2.0)
    error = 4 / 4**0.5 / 2
    assert entry["value"] == 1
    assert entry["interval"] == [0.0, pytest.approx(1 + 1.959964 * error)]
