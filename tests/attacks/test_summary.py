"""What a result of an attack says in numbers and words."""

from types import SimpleNamespace

import pytest
import torch

from robustdiff.attacks.benchmark.sanity_checks import Flag
from robustdiff.attacks.benchmark.summary import _value
from robustdiff.report.attacks import _verdict


def test_no_interval_of_a_distance_is_below_zero() -> None:
    """Few images, of which one moves: the mean less two standard errors is below 0."""
    moved = torch.tensor([0.0, 0.0, 0.0, 8.0])
    entry = _value(moved, 2.0)
    error = 4 / 4**0.5 / 2
    assert entry["value"] == 1
    assert entry["interval"] == [0.0, pytest.approx(1 + 1.959964 * error)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([("constraint-violated", 1.0), ("no-spread", 1.0)], ("none of 2 flags says that it is invalid", True)),
        (
            [("no-spread", 1.0), ("radius-unbroken", None)],
            ("not known to be valid (radius-unbroken not measured)", False),
        ),
        ([("no-spread", 0.0), ("radius-unbroken", None)], ("not valid (no-spread)", False)),
    ],
)
def test_what_was_not_measured_is_not_called_raised(
    flags: list[tuple[str, float | None]], says: tuple[str, bool]
) -> None:
    details = {"flags": [Flag(name, value).to_json() for name, value in flags]}
    assert _verdict(SimpleNamespace(evaluation=SimpleNamespace(details=details))) == says
