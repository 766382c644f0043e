"""Checkpoints: exact, free of pickle, found by number, pruned."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import advance, everything, flip, fresh, good_steps, plain, same, save
from robustdiff.training import checkpoint
from robustdiff.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from robustdiff.utils.errors import UsageError

# -- exact -----------------------------------------------------------------------------------------


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
        *("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    }


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


def test_counters_may_be_any_json(tmp_path: Path) -> None:
    state = fresh()
    counters = {"images": 3, "note": "ü", "nested": {"a": [1, 2.5, None, True]}, "empty": []}
    record = load_checkpoint(save_checkpoint(tmp_path, 10, state, counters, 2), fresh())
    assert {name: record[name] for name in counters} == counters
    assert record["step"] == 10
    for bad in ({"x": float("nan")}, {"x": [float("inf")]}, {"step": 3}, {"optimizer": 1}, {"ema": 1}, {"extra": 1}):
        with pytest.raises(ValueError):
            save_checkpoint(tmp_path, 20, state, bad, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_as_open_to_others_as_their_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = save(tmp_path / "checkpoints", 1, fresh())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}


# -- found -----------------------------------------------------------------------------------------


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
    for name in ("step-00000009", "step-x", "other", ".step-00000008.tmp"):  # the first has no manifest
        (tmp_path / name).mkdir()
    (tmp_path / ".step-00000008.tmp" / "state.json").write_text("{}")
    shutil.copytree(good, tmp_path / ".step-00000012.trash")
    (tmp_path / "step-00000010").write_text("a file")
    assert list_checkpoints(tmp_path) == [good]
    passed: list[tuple[Path, str]] = []
    (tmp_path / "step-00000010").unlink()
    assert find_checkpoint(tmp_path, damaged=passed) == good
    assert passed == [(tmp_path / "step-00000009", "manifest.json: missing")]  # no kill leaves this; the hidden, yes


def test_checkpoints_are_found_by_number_with_or_without_zeros(tmp_path: Path) -> None:
    state = fresh()
    for step in (9, 10):
        save(tmp_path, step, state)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000010"
    for name in ("step-9", "step-00000009", "9", "checkpoint-9", str(tmp_path / "step-00000009")):
        assert find_checkpoint(tmp_path, name) == tmp_path / "step-00000009"
    for name in ("step-1", "step-", "newest", "step-²", "step-" + "9" * 5000):
        with pytest.raises(UsageError, match=r"`resume_from_checkpoint` .*step-00000009, step-00000010"):
            find_checkpoint(tmp_path, name)
    with pytest.raises(UsageError, match="`resume`: no complete checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


# -- pruned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes").mkdir()
    state = fresh()
    for step in (8, 9, 10, 11, 123_456_789):
        save(tmp_path, step, state, keep)
    steps = (8, 9, 10, 11, 123_456_789)[-keep:]
    assert list_checkpoints(tmp_path) == [tmp_path / f"step-{step:08d}" for step in steps]
    assert (tmp_path / "notes").is_dir()


def test_damaged_ones_do_not_count_when_old_ones_are_deleted(tmp_path: Path) -> None:
    state = fresh()
    paths = {step: save(tmp_path, step, state) for step in (10, 20)}
    flip(paths[20] / "model.safetensors")
    os.utime(paths[20] / "model.safetensors")
    save(tmp_path, 30, state)
    assert list(good_steps(tmp_path)) == [10, 30]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000030"]
    for path in list_checkpoints(tmp_path):  # none good but the one to come
        flip(path / "model.safetensors")
        os.utime(path / "model.safetensors")
    save(tmp_path, 40, state)
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_checkpoint_of_an_earlier_process_is_hashed_once_before_another_is_deleted(tmp_path: Path, monkeypatch):
    state = fresh()
    for step in (10, 20):
        save(tmp_path, step, state)
    monkeypatch.setattr(checkpoint, "_verified", {})
    asked: list[str] = []
    original = checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: asked.append(path.name) or original(path))
    save(tmp_path, 30, state)
    assert asked == ["step-00000020"]
    save(tmp_path, 40, state)
    assert asked == ["step-00000020"]


def test_going_on_from_an_older_one_never_deletes_the_one_just_written(tmp_path: Path) -> None:
    state = fresh()
    for step in (30, 40, 50):
        save(tmp_path, step, state, keep=3)
    for keep, steps in ((3, [35, 40, 50]), (2, [35, 50]), (1, [35])):
        save(tmp_path, 35, state, keep)
        assert list(good_steps(tmp_path)) == steps
