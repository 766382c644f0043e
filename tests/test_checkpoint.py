"""Checkpoints: exact, whole or not there at all, pruned, and free of pickle."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from helpers import SmallNet, normal
from torch import nn

from robustdiff import checkpoint
from robustdiff.checkpoint import TrainingState, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from robustdiff.config import UsageError


def fresh(seed: int = 0, ema: bool = True, width: int = 6) -> TrainingState:
    """A network with batch norm (so with buffers), fused AdamW, moving average and a warm-up schedule."""
    model = SmallNet(width=width, seed=seed, dtype=torch.float32, norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=20)
    return TrainingState(model, optimizer, EMAModel(model.parameters()) if ema else None, {"schedule": schedule})


def advance(state: TrainingState, steps: range) -> None:
    """Optimiser steps, each on its own seeded batch."""
    for step in steps:
        x = normal(4, 2, 5, 5, seed=step, dtype=torch.float32)
        state.model(x, torch.arange(4)).square().mean().backward()
        state.optimizer.step()
        state.extra["schedule"].step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.step(state.model.parameters())


def everything(state: TrainingState) -> dict[str, object]:
    """All that training changes."""
    optimizer = state.optimizer.state_dict()
    tensors = {f"model.{name}": value.clone() for name, value in state.model.state_dict().items()}
    for index, values in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    result: dict[str, object] = {**tensors, "groups": optimizer["param_groups"]}
    if state.ema is not None:
        result |= {f"ema.{i}": value.clone() for i, value in enumerate(state.ema.shadow_params)}
        result["ema step"] = state.ema.optimization_step
    result["schedule"] = state.extra["schedule"].state_dict()
    return result


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    """Bit for bit, types included."""

    def equal(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        return x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def plain(value: dict[str, object]) -> dict[str, object]:
    """As JSON gives it back: AdamW's betas as a list, for instance."""
    return {k: v if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in value.items()}


def save(folder: Path, step: int, state: TrainingState, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, state, {"images": 4 * step}, keep)


# -- exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
def test_what_is_loaded_is_what_was_saved_bit_for_bit_and_goes_on_alike(tmp_path: Path, ema: bool) -> None:
    state = fresh(ema=ema)
    advance(state, range(5))
    saved = everything(state)
    path = save(tmp_path, 5, state)
    assert same(everything(state), saved)  # saving changes nothing
    other = fresh(seed=1, ema=ema)
    advance(other, range(50, 53))
    assert not same(plain(everything(other)), plain(saved))
    record = load_checkpoint(path, other)
    assert (record["step"], record["images"]) == (5, 20)
    assert same(plain(everything(other)), plain(saved))
    advance(state, range(5, 12))
    advance(other, range(5, 12))
    assert same(plain(everything(other)), plain(everything(state)))


def test_a_checkpoint_loads_into_an_optimiser_that_has_not_stepped(tmp_path: Path) -> None:
    state = fresh()
    advance(state, range(3))
    other = fresh(seed=1)
    load_checkpoint(save(tmp_path, 3, state), other)
    assert same(plain(everything(other)), plain(everything(state)))


def test_the_first_checkpoint_may_come_before_the_first_step(tmp_path: Path) -> None:
    state, other = fresh(), fresh(seed=1)
    load_checkpoint(save(tmp_path, 0, state), other)
    assert same(plain(everything(other)), plain(everything(state)))


def test_there_is_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in ((torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, forbidden)
    for module in ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"):
        monkeypatch.setattr(module, forbidden)
    state = fresh()
    advance(state, range(2))
    path = save(tmp_path, 2, state)
    load_checkpoint(path, fresh(seed=1))
    assert {file.name for file in path.iterdir()} == {
        *("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
    }


# -- whole or not there ------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_write_that_breaks_half_way_leaves_the_last_checkpoint_newest(tmp_path, monkeypatch, calls) -> None:
    """The disk fills up in the weights, the moving average, or the optimiser state."""
    state = fresh()
    advance(state, range(3))
    good = save(tmp_path, 3, state)
    saved = everything(state)
    advance(state, range(3, 6))
    original, made = checkpoint.save_file, []

    def breaks(tensors: dict[str, torch.Tensor], path: Path) -> None:
        made.append(path)
        assert list_checkpoints(tmp_path) == [good]  # nothing unfinished is ever visible
        if len(made) == calls:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", breaks)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 6, state)
    monkeypatch.setattr(checkpoint, "save_file", original)
    assert [path.name for path in tmp_path.iterdir() if path != good] == [".step-00000006.tmp"]
    assert list_checkpoints(tmp_path) == [good]
    assert find_checkpoint(tmp_path) == good
    other = fresh(seed=1)
    load_checkpoint(good, other)
    assert same(plain(everything(other)), plain(saved))
    again = save(tmp_path, 6, state)
    assert list_checkpoints(tmp_path) == [good, again]
    assert not list(tmp_path.glob(".*"))
    load_checkpoint(again, other)
    assert same(plain(everything(other)), plain(everything(state)))


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    state = fresh()
    save(tmp_path, 3, state)
    advance(state, range(2))
    path = save(tmp_path, 3, state)
    other = fresh(seed=1)
    load_checkpoint(path, other)
    assert same(plain(everything(other)), plain(everything(state)))
    assert list_checkpoints(tmp_path) == [path]


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    good = save(tmp_path, 7, fresh())
    for name in ("step-00000009", "step-x", "other", ".step-00000008.tmp"):  # the first has no state.json
        (tmp_path / name).mkdir()
    (tmp_path / ".step-00000008.tmp" / "state.json").write_text("{}")
    (tmp_path / "step-00000010").write_text("a file")
    assert list_checkpoints(tmp_path) == [good]


# -- names and pruning -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes").mkdir()
    state = fresh()
    for step in (8, 9, 10, 11, 123_456_789):
        save(tmp_path, step, state, keep)
    steps = (8, 9, 10, 11, 123_456_789)[-keep:]
    assert list_checkpoints(tmp_path) == [tmp_path / f"step-{step:08d}" for step in steps]
    assert (tmp_path / "notes").is_dir()


def test_checkpoints_are_found_by_number_with_or_without_zeros(tmp_path: Path) -> None:
    state = fresh()
    for step in (9, 10):
        save(tmp_path, step, state)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000010"
    for name in ("step-9", "step-00000009", "9", "checkpoint-9", str(tmp_path / "step-00000009")):
        assert find_checkpoint(tmp_path, name) == tmp_path / "step-00000009"
    for name in ("step-1", "step-", "newest", "step-²"):
        with pytest.raises(UsageError, match=r"--resume-from-checkpoint .*step-00000009, step-00000010"):
            find_checkpoint(tmp_path, name)
    with pytest.raises(UsageError, match="--resume: no complete checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


# -- what does not fit -------------------------------------------------------------------------------


def refused(path: Path, state: TrainingState) -> str:
    with pytest.raises(UsageError) as caught:
        load_checkpoint(path, state)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ema", [True, False])
def test_another_ema_flag_is_refused_in_one_line(tmp_path: Path, ema: bool) -> None:
    assert "--use-ema" in refused(save(tmp_path, 1, fresh(ema=ema)), fresh(ema=not ema))


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
    assert "--resume-from-checkpoint" in refused(path, fresh())


def test_loaded_moments_have_the_memory_layout_of_their_parameters(tmp_path: Path) -> None:
    """Fused AdamW on a GPU refuses anything else; saved files are contiguous, networks there are channels_last."""
    first = fresh()
    first.model.to(memory_format=torch.channels_last)
    advance(first, range(2))
    path = save_checkpoint(tmp_path, 2, first, {}, keep=1)
    second = fresh(seed=1)
    second.model.to(memory_format=torch.channels_last)
    load_checkpoint(path, second)
    moments = [(p, state["exp_avg"]) for p, state in second.optimizer.state.items()]
    assert any(not parameter.is_contiguous() for parameter, _ in moments)
    assert all(parameter.stride() == moment.stride() for parameter, moment in moments)
    assert same(everything(first), everything(second))
