"""Checkpoints that do not fit the run are refused in one line, before anything changes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import advance, everything, fresh, plain, same, save
from robustdiff.training.checkpoint import TrainingState, load_checkpoint, verify
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

# -- what does not fit -----------------------------------------------------------------------------


def refused(path: Path, state: TrainingState) -> str:
    with pytest.raises(UsageError) as caught:
        load_checkpoint(path, state)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ema", [True, False])
def test_another_ema_flag_is_refused_in_one_line(tmp_path: Path, ema: bool) -> None:
    assert "`use_ema`" in refused(save(tmp_path, 1, fresh(ema=ema)), fresh(ema=not ema))


def test_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, 1, fresh())
    assert "another network" in refused(path, fresh(width=7))
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    assert "another network" in refused(path, TrainingState(linear, optimizer, EMAModel(linear.parameters()), {
        "schedule": get_scheduler("constant", optimizer)}))  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, name: str, damage: str) -> None:
    state = fresh()
    advance(state, range(2))
    path = save(tmp_path, 2, state)
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:20])
    assert "`resume_from_checkpoint`" in refused(path, fresh())


# -- content that fits its manifest, but not the run -----------------------------------------------


def sealed(path: Path) -> Path:
    """Write a manifest for what is there now."""
    (path / "manifest.json").unlink()
    atomic_io.write_manifest(path, format=1, step=int(path.name[5:]))
    assert verify(path) == ""
    return path


def untouched(path: Path, message: str) -> None:
    """Loading is refused in one line and changes nothing."""
    other = fresh(seed=1)
    advance(other, range(3))
    before = everything(other)
    assert re.search(message, refused(sealed(path), other))
    assert same(everything(other), before)


def put(*keys: object) -> Callable[[dict[str, Any]], None]:
    """Set the place that all but the last of ``keys`` lead to; delete it if that is ``...``."""

    def change(value: Any) -> None:
        *way, last, new = keys
        for key in way:
            value = value[key]
        if new is ...:
            del value[last]
        else:
            value[last] = new

    return change


RECORDS = [
    *(put(key, ...) for key in ("step", "optimizer", "extra", "ema")),
    *(put("step", bad) for bad in (None, "3", -1, 2.5, True)),
    *(put("ema", bad) for bad in ([], 3, {}, {"optimization_step": None}, {"optimization_step": 1.5})),
    *(put("optimizer", bad) for bad in (None, [], {})),
    *(put("optimizer", "numbers", bad) for bad in (None, [], {"0.x": "y"}, {"0.x": None}, {"0.exp_avg": 3}, {"0": 3})),
    *(put("optimizer", "param_groups", bad) for bad in (None, {}, [], [None], [{}], [{"params": []}])),
    *(put("optimizer", "param_groups", 0, key, ...) for key in ("lr", "betas", "params", "eps", "initial_lr")),
    *(put("optimizer", "param_groups", 0, "lr", bad) for bad in ("0.1", None, [1.0], True)),
    *(put("optimizer", "param_groups", 0, "betas", bad) for bad in (3, [0.9], ["a", "b"], {})),
    *(put("optimizer", "param_groups", 0, "params", bad) for bad in ([], [0, 0], [1, 0, 2], None)),
    put("optimizer", "param_groups", 0, "fused", "no"),
    lambda record: record["optimizer"]["param_groups"][0]["params"].reverse(),
    *(put("extra", bad) for bad in (None, [], {}, {"schedule": None}, {"schedule": {}})),
    *(put("extra", "schedule", key, ...) for key in ("last_epoch", "base_lrs", "lr_lambdas")),
    *(put("extra", "schedule", "last_epoch", bad) for bad in ("1", None, [])),
    *(put("extra", "schedule", "base_lrs", bad) for bad in ([], [None], 3)),
    *(put("extra", "schedule", "lr_lambdas", bad) for bad in ([], [3], None)),
]


@pytest.mark.parametrize("case", range(len(RECORDS)))
def test_a_state_of_another_form_is_refused_before_anything_changes(tmp_path: Path, case: int) -> None:
    state = fresh()
    advance(state, range(2))
    path = save(tmp_path, 2, state)
    record = json.loads((path / "state.json").read_text())
    RECORDS[case](record)
    (path / "state.json").write_text(json.dumps(record))
    untouched(path, "state.json|optimizer.safetensors|`use_ema`")


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", '{"step": NaN}', "[" * 100_000, "\ud800"])
def test_a_state_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 2, fresh())
    (path / "state.json").write_bytes(text.encode(errors="surrogatepass"))
    untouched(path, "is damaged")


@pytest.mark.parametrize("change", ["gone", "more", "shape", "type", "renamed", "scalar"])
@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_tensors_of_another_form_are_refused_before_anything_changes(tmp_path: Path, name: str, change: str) -> None:
    state = fresh()
    advance(state, range(2))
    path = save(tmp_path, 2, state)
    file = path / f"{name}.safetensors"
    tensors = load_file(file)
    key = next(key for key in sorted(tensors, reverse=True) if tensors[key].dim() == 4)  # a convolution's
    value = tensors.pop(key)
    if change == "scalar":
        tensors[key] = torch.tensor(1.0)
    elif change == "shape":
        tensors[key] = value.transpose(0, 1).reshape(-1, 1).contiguous()
    elif change == "type":
        tensors[key] = value.to(torch.int32)
    elif change in ("more", "renamed"):
        tensors |= {"99.exp_avg" if name == "optimizer" else "other": value.clone()}
    if change == "more":
        tensors[key] = value
    save_file(tensors, file)
    untouched(path, "another network" if name == "model" else f"is damaged \\({name}.safetensors: ")


def test_names_that_only_another_version_of_the_library_knows_are_ignored(tmp_path: Path) -> None:
    """A schedule would take them for attributes of its own, its methods included."""
    state = fresh()
    advance(state, range(2))
    path = save(tmp_path, 2, state)
    record = json.loads((path / "state.json").read_text())
    record["extra"]["schedule"] |= {"step": 3, "verbose": False}
    del record["extra"]["schedule"]["_step_count"], record["optimizer"]["param_groups"][0]["maximize"]
    (path / "state.json").write_text(json.dumps(record))
    other = fresh(seed=1)
    load_checkpoint(sealed(path), other)
    for one in (state, other):
        advance(one, range(2, 4))
    assert same(plain({k: v for k, v in everything(other).items() if k != "schedule"}),
                plain({k: v for k, v in everything(state).items() if k != "schedule"}))  # fmt: skip
