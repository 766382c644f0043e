"""Metrics: what one is, and the registry through which command, result files and training find them all.

A metric compares two sets of features. Everything else is done for it: the floor (real images against real images), the
interval, the entry in result files, in tables and in the report. One from elsewhere is registered by importing the file
that defines it::

    @register_metric
    class MeanShift(Metric):
        better = {"mean shift": "lower"}

        def compute(self, fake, real, *, seed=0, progress=silent):
            return {"mean shift": float((fake.mean(0) - real.mean(0)).norm())}
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch import Tensor

from robustdiff.evaluation.distances import Interval
from robustdiff.evaluation.features import Extractor
from robustdiff.evaluation.neighbours import Progress
from robustdiff.utils.errors import check_choice

Better = Literal["lower", "higher", "neither"]
"""Which way a number is better."""


def silent(rows: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Estimate:
    """A number, and what the metric itself knows of it.

    Attributes:
        value: The number.
        interval: 95 %; None: by halves of the sets, where that is cheap enough.
        about: Settings and counts behind the number; whatever JSON can hold.
    """

    value: float
    interval: Interval | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


class Metric(ABC):
    """One or several numbers that compare generated with real images, by their features.

    Attributes:
        better: Which way each number is better, by name, in the order of tables.
    """

    better: ClassVar[Mapping[str, Better]]

    @abstractmethod
    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> Mapping[str, float]:
        """The numbers.

        Args:
            fake: Features of generated images, shape (n, d); for the floor, of real ones.
            real: Of real images, shape (m, d).
            seed: Of whatever is drawn.
            progress: Told of finished rows, :meth:`rows` in all.
        """

    def estimate(
        self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent
    ) -> Mapping[str, Estimate]:
        """The numbers of the generated images, with what else is known of them; arguments as of :meth:`compute`."""
        found = self.compute(fake, real, seed=seed, progress=progress)
        return {name: Estimate(value) for name, value in found.items()}

    def label(self, name: str, extractor: Extractor) -> str:
        """What result files and tables call a number."""
        return name

    def rows(self, n: int, m: int) -> int:
        """What ``progress`` is told in all, of n images against m; 0: nothing."""
        return 0

    def cost(self, n: int, m: int, d: int) -> float:
        """Multiply-adds of n images against m with d features; inf: no interval by halves.

        Intervals by halves are for numbers that are never below 0; one that is has none.
        """
        return math.inf

    def shares(self, n: int, m: int) -> Mapping[str, int]:
        """Those numbers that are shares of rows, with the number of rows."""
        return {}


_registered: dict[str, Metric] = {}
Kind = TypeVar("Kind", bound=type[Metric])


def register_metric(kind: Kind) -> Kind:
    """Class decorator: from now on every evaluation computes this metric.

    Raises:
        ValueError: If it is no :class:`Metric`, names no number or an unknown direction, or another metric has a number
            of the same name.
    """
    if not (isinstance(kind, type) and issubclass(kind, Metric)):
        raise ValueError(f"metric {getattr(kind, '__name__', kind)} must be a subclass of Metric")
    names = list(getattr(kind, "better", {}))
    if not names:
        raise ValueError(f"metric {kind.__name__} needs `better`: its numbers, and which way each is better")
    for name in names:
        check_choice(f"metric {kind.__name__}: `better` of {name!r}", kind.better[name], get_args(Better))
    place = f"{kind.__module__}.{kind.__qualname__}"
    for other, metric in _registered.items():
        if other != place and (twice := sorted({*names} & {*metric.better})):
            raise ValueError(f"metric {kind.__name__}: {other} has a number called {twice[0]!r}; choose another name")
    _registered[place] = kind()  # a file that is read again, as notebooks do, replaces its own
    return kind


def registered_metrics() -> tuple[Metric, ...]:
    """Every metric, in the order in which they were registered; the package's own first."""
    import robustdiff.evaluation.metrics  # noqa: F401 - registers them

    return tuple(_registered.values())
