"""Whether what a checkpoint holds fits the run that is to take it: form of the record, names and shapes of tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from robustdiff.training.checkpoint import TrainingState

OPTIMIZER = "optimizer.safetensors"
"""File of the optimiser's tensors."""


def check_record(record: dict[str, Any], state: TrainingState) -> None:
    """Refuse a ``state.json`` that ``state`` could not take.

    Raises:
        ValueError: With what is wrong.
    """
    require(_count(record.get("step")), "state.json: no step")
    average = record.get("ema")
    good = average is None or (isinstance(average, dict) and _count(average.get("optimization_step")))
    require("ema" in record and good, "state.json: ema")
    require(_alike({"numbers": {}}, record.get("optimizer")), "state.json: optimizer")
    optimizer = record["optimizer"]
    numbers, groups = optimizer["numbers"], optimizer.get("param_groups")
    for key, value in numbers.items():
        require(isinstance(value, int | float), f"state.json: {key!r:.80} is no number")
    here = state.optimizer.state_dict()["param_groups"]
    require(_alike(here, groups), "state.json: param_groups")
    same = [group["params"] for group in here] == [group["params"] for group in groups]
    require(same, "state.json: other parameters in the optimizer")
    parts = {name: part.state_dict() for name, part in state.extra.items()}
    require(_alike(parts, record.get("extra")), f"state.json: {' or '.join(parts) or 'extra'}")


def _alike(here: object, there: object) -> bool:
    """Whether ``there`` has the form of ``here``: the same kinds of value at the same places.

    Names that start with an underscore, and options (None or a flag), come and go with torch's version.
    """
    if isinstance(here, dict):
        optional = {key for key, value in here.items() if str(key).startswith("_") or isinstance(value, bool | None)}
        return (
            isinstance(there, dict)
            and here.keys() - optional <= there.keys()
            and all(_alike(here[key], there[key]) for key in here.keys() & there.keys())
        )
    if isinstance(here, list | tuple):
        if not isinstance(there, list | tuple) or len(here) != len(there):
            return False
        return all(_alike(a, b) for a, b in zip(here, there, strict=True))
    if isinstance(here, bool | None):
        return isinstance(there, bool | None)
    if isinstance(here, int | float):
        return isinstance(there, int | float) and not isinstance(there, bool)
    return isinstance(there, type(here))


def misfit(here: dict[str, Tensor], there: dict[str, Tensor]) -> str:
    """How ``there`` differs from ``here`` in names, shapes, or types; "" if it does not."""
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            return f"it lacks {name}"
        if name not in here:
            return f"it has {name!r:.80}, which is unknown here"
        a, b = here[name], there[name]
        if a.shape != b.shape:
            return f"{name} has shape {list(b.shape)} there, {list(a.shape)} here"
        if a.dtype != b.dtype:
            return f"{name} is {b.dtype} there, {a.dtype} here"
    return ""


def moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The optimiser's state by parameter, checked.

    Raises:
        ValueError: With what is wrong.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values: dict[int, dict[str, Any]] = {}
    for key, value in saved.items():
        place, _, name = key.partition(".")
        index = int(place) if re.fullmatch(r"\d{1,9}", place, re.ASCII) else len(parameters)
        known = index < len(parameters) and name
        require(bool(known), f"{OPTIMIZER}: {key!r:.80} is unknown here")
        shape = value.shape if isinstance(value, Tensor) else torch.Size()
        wanted = torch.Size() if name == "step" else parameters[index].shape
        require(shape == wanted, f"{OPTIMIZER}: {key} has shape {list(shape)} there, {list(wanted)} here")
        good = not isinstance(value, Tensor) or value.is_floating_point()
        require(good, f"{OPTIMIZER}: {key} holds no floating-point numbers")
        values.setdefault(index, {})[name] = value
    adam = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else set()
    for index, part in values.items():
        lacking = (adam | next(iter(values.values())).keys()) - part.keys()
        require(not lacking, f"{OPTIMIZER}: it lacks {', '.join(sorted(lacking))} of parameter {index}")
    return values


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)
