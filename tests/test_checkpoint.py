"""Checkpoints: exact, whole or not there at all, pruned, and free of pickle."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from helpers import SmallNet, normal
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from robustdiff import checkpoint, durable
from robustdiff.checkpoint import (
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    verify,
)
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
        *("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
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
    assert list(tmp_path.iterdir()) == [good]  # the room is given back
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
    for name in ("step-1", "step-", "newest", "step-²", "step-" + "9" * 5000):
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


# -- killed between any two operations ---------------------------------------------------------------


class Killed(BaseException):
    """Nothing the code may catch."""


@contextlib.contextmanager
def watched(act: Callable[[int, str], None], exchange: bool = True) -> Iterator[list[tuple[str, object]]]:
    """Every change of the disk calls ``act(number, name)`` first; yields the log of (name, what)."""
    log: list[tuple[str, object]] = []
    places = [(os, name) for name in ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "open", open, raising=False)
        if not exchange:
            patch.setattr(durable, "_exchange", lambda a, b: False)

        def watch(module: object, name: str) -> None:
            original = getattr(module, name)

            def wrapped(*arguments: Any, **options: Any) -> object:
                if name == "open" and arguments[1] == "rb":  # changes nothing
                    return original(*arguments, **options)
                what = os.fstat(arguments[0]).st_ino if name == "fsync" else arguments[-1]
                log.append((name, what))
                try:
                    act(len(log) - 1, name)
                except BaseException:
                    if name == "save_file":
                        Path(arguments[1]).write_bytes(b"half")
                    elif name == "open" and "w" in arguments[1]:
                        Path(arguments[0]).write_bytes(b"")
                    raise
                return original(*arguments, **options)

            patch.setattr(module, name, wrapped)

        for module, name in [*places, (durable, "_exchange"), (durable, "open"), (checkpoint, "save_file")]:
            watch(module, name)
        yield log


def killer(at: int) -> Callable[[int, str], None]:
    """From operation ``at`` on nothing happens any more: what is dead does not clean up."""

    def act(number: int, _: str) -> None:
        if number >= at:
            raise Killed

    return act


def good_steps(folder: Path) -> dict[int, Path]:
    """Undamaged checkpoints by step, oldest first."""
    found = {}
    for path in list_checkpoints(folder):
        with contextlib.suppress(UsageError):
            found[int(path.name.split("-")[1].split(".")[0])] = find_checkpoint(folder, path.name)
    return found


def hide(path: Path, suffix: str) -> Path:
    """Rename a checkpoint to what a kill leaves."""
    return path.rename(path.with_name(f".{path.name}.{suffix}"))


def flip(path: Path, place: int = -1) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def only_two(folder: Path) -> None:
    """Steps 10 and 20."""


def swap_cut_short(folder: Path) -> None:
    """A save of step 20 was killed between two renames: both versions are there, neither under its name."""
    shutil.copytree(folder / "step-00000020", folder / ".step-00000020.old")
    hide(folder / "step-00000020", "tmp")


def swap_with_a_bad_end(folder: Path) -> None:
    """Step 20 is damaged, and so is one leftover; the other is not."""
    shutil.copytree(folder / "step-00000020", folder / ".step-00000020.old")
    shutil.copytree(folder / "step-00000020", folder / ".step-00000020.tmp")
    flip(folder / "step-00000020" / "model.safetensors")
    flip(folder / ".step-00000020.tmp" / "ema.safetensors")


def deletion_cut_short(folder: Path) -> None:
    """A pruning and an unfinished save were killed."""
    shutil.copytree(folder / "step-00000010", folder / ".step-00000005.trash")
    (folder / ".step-00000005.trash" / "model.safetensors").unlink()
    shutil.copytree(folder / "step-00000010", folder / ".step-00000030.tmp")
    (folder / ".step-00000030.tmp" / "manifest.json").unlink()


@pytest.mark.parametrize(("step", "exchange"), [(20, True), (20, False), (30, True)])  # 30: there is nothing to swap
@pytest.mark.parametrize("before", [only_two, swap_cut_short, swap_with_a_bad_end, deletion_cut_short])
def test_a_kill_at_any_instant_loses_nothing(tmp_path: Path, before: Callable, step: int, exchange: bool) -> None:
    template, state = tmp_path / "template", fresh()
    contents: dict[int, list[dict[str, object]]] = {}
    for old in (10, 20):
        advance(state, range(old, old + 2))
        save(template, old, state)
        contents[old] = [plain(everything(state))]
    before(template)
    advance(state, range(2))
    contents.setdefault(step, []).append(plain(everything(state)))
    other, seen = fresh(seed=1), set()
    for at in range(1000):
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        with contextlib.suppress(Killed), watched(killer(at), exchange) as log:
            save(folder, step, state)
        assert len(good_steps(folder)) >= 2, log[: at + 1]  # as many as are to be kept
        found = find_checkpoint(folder)
        number = load_checkpoint(found, other)["step"]
        which = [same(plain(everything(other)), content) for content in contents[number]]
        assert any(which), log[: at + 1]
        assert number >= 20
        seen.add((number, which[-1]))
        for number, path in good_steps(folder).items():
            load_checkpoint(path, other)
            assert any(same(plain(everything(other)), content) for content in contents[number])
        last = save(folder, 40, state)
        assert len(good_steps(folder)) == 2
        assert find_checkpoint(folder) == last
        assert not list(folder.glob(".*"))
        if len(log) <= at:
            break
    assert at > 20  # the operations were seen
    assert seen == {(20, step == 30), (step, True)}  # the old one before, the new one after


def test_a_save_that_is_complete_but_for_its_name_counts(tmp_path: Path) -> None:
    state = fresh()
    save(tmp_path, 10, state)
    advance(state, range(2))
    hidden = hide(save(tmp_path, 20, state), "tmp")
    assert list_checkpoints(tmp_path)[-1] == find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "step-20") == hidden
    assert find_checkpoint(tmp_path, hidden.name) == hidden
    save(tmp_path, 30, state, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000020", "step-00000030"]


def test_bytes_are_on_the_disk_before_names_and_names_before_anything_is_deleted(tmp_path: Path) -> None:
    """What a power cut needs, and no kill shows."""
    state = fresh()
    save(tmp_path, 10, state, keep=1)
    with watched(lambda *_: None) as log:
        path = save(tmp_path, 20, state, keep=1)

    def last(name: str, what: object) -> int:
        return max(i for i, entry in enumerate(log) if entry == (name, what))

    inode = {file.name: file.stat().st_ino for file in path.iterdir()}
    manifest = last("replace", path.with_name(f".{path.name}.tmp") / "manifest.json")
    assert len(inode) == 5
    assert all(last("fsync", number) < manifest for number in inode.values())
    folder = last("fsync", path.stat().st_ino)
    named = last("rename", path)
    parent = last("fsync", tmp_path.stat().st_ino)
    deleted = last("rename", tmp_path / ".step-00000010.trash")
    first = min(i for i, (name, _) in enumerate(log) if name in ("unlink", "rmdir"))
    assert manifest < folder < named < parent < deleted < first


@pytest.mark.parametrize(("step", "exchange"), [(20, True), (20, False), (30, True)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_any_write_that_fails_raises_and_leaves_a_good_one(tmp_path: Path, code: int, step: int, exchange) -> None:
    """A full disk, and one that the system has made read-only."""
    template, state = tmp_path / "template", fresh()
    contents = {}
    for old in (10, 20):
        advance(state, range(old, old + 2))
        save(template, old, state)
        contents[old] = [plain(everything(state))]
    advance(state, range(2))
    contents.setdefault(step, []).append(plain(everything(state)))
    other = fresh(seed=1)
    for at in range(1000):
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        writes = []

        def act(number: int, name: str, writes: list[int] = writes, at: int = at) -> None:
            if name not in ("unlink", "rmdir", "_exchange"):
                writes.append(number)
                if len(writes) == at + 1:
                    raise OSError(code, os.strerror(code))

        raised = False
        with watched(act, exchange):
            try:
                save(folder, step, state)
            except OSError as error:
                raised = error.errno == code
        assert raised == (len(writes) > at)
        assert len(good_steps(folder)) >= 2
        number = load_checkpoint(find_checkpoint(folder), other)["step"]
        assert any(same(plain(everything(other)), content) for content in contents[number])
        save(folder, 40, state)
        assert len(good_steps(folder)) == 2
        assert not list(folder.glob(".*"))
        if not raised:
            break
    assert at > 15


def test_errors_of_the_tensor_library_are_errors_of_the_system(tmp_path: Path, monkeypatch) -> None:
    """A limit of 1 kB per file, set by the system itself; the library has an exception of its own for it."""
    state = fresh()
    good = save(tmp_path, 10, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            save(tmp_path, 20, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert Path(caught.value.filename).name == "model.safetensors"
    assert list(tmp_path.iterdir()) == [good]

    def refuses(*_: object) -> None:
        raise SafetensorError("a tensor it does not like")

    monkeypatch.setattr(checkpoint, "save_file", refuses)
    with pytest.raises(SafetensorError, match="does not like"):
        save(tmp_path, 20, state)


# -- damage ------------------------------------------------------------------------------------------


def cut(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the manifest's content."""

    def damage(path: Path) -> None:
        value = json.loads((path / "manifest.json").read_text())
        change(value)
        (path / "manifest.json").write_text(json.dumps(value))

    return damage


def other_name(name: str) -> Callable[[Path], None]:
    return manifest(lambda value: value["files"].update({name: value["files"].pop("model.safetensors")}))


NAMES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    *((cut(name), rf"{name}: \d+ bytes instead of \d+") for name in NAMES),
    *((lambda path, name=name: flip(path / name), f"{name}: sha256 differs") for name in NAMES),
    *((lambda path, name=name: flip(path / name, 0), f"{name}: sha256 differs") for name in NAMES),
    *((lambda path, name=name: (path / name).unlink(), f"{name}: missing") for name in (*NAMES, "manifest.json")),
    (lambda path: [(path / NAMES[0]).unlink(), (path / NAMES[0]).mkdir()], "model.safetensors: missing"),
    (lambda path: os.truncate(path / "manifest.json", 0), "manifest.json: Expecting value"),
    (cut("manifest.json"), ""),  # the last newline: nothing is lost
    (lambda path: os.truncate(path / "manifest.json", 100), "manifest.json: "),
    (lambda path: os.truncate(path / "manifest.json", 2**21), "manifest.json: too large"),
    (lambda path: (path / "manifest.json").write_bytes(b"\xff{}"), "manifest.json: .*decode"),
    (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json: not a JSON object"),
    (lambda path: (path / "manifest.json").write_text('{"a": NaN}'), "manifest.json: NaN is not JSON"),
    (lambda path: (path / "manifest.json").write_text("[" * 100_000), "manifest.json: "),
    (manifest(dict.clear), "manifest.json: format is None instead of 1"),
    (manifest(lambda value: value.update(format=2)), "manifest.json: format is 2 instead of 1"),
    (manifest(lambda value: value.update(step=10)), "manifest.json: step is 10 instead of 20"),
    (manifest(lambda value: value.update(files=[])), "manifest.json: lists no files"),
    (manifest(lambda value: value["files"].clear()), "manifest.json: does not list ema.safetensors"),
    (manifest(lambda value: value["files"].pop("model.safetensors")), "manifest.json: does not list model.safetensors"),
    (manifest(lambda value: value["files"].pop("ema.safetensors")), "manifest.json: does not list ema.safetensors"),
    (manifest(lambda value: value["files"].update({"state.json": 3})), "has no size and sha256 of state.json"),
    (manifest(lambda value: value["files"]["state.json"].pop("sha256")), "has no size and sha256 of state.json"),
    (manifest(lambda value: value["files"]["state.json"].update(sha256=None)), "state.json: sha256 differs"),
    (manifest(lambda value: value["files"]["state.json"].update(bytes="1")), "state.json: .* instead of '1'"),
    (other_name("weights.safetensors"), "lists 'weights.safetensors', which does not belong there"),
    (other_name("../step-00000010/model.safetensors"), "lists '../step-00000010/model.safetensors', which"),
    (other_name("/etc/hostname"), "lists '/etc/hostname', which does not belong there"),
]


@pytest.mark.parametrize("case", range(len(DAMAGE)))
def test_damage_is_seen_named_and_passed_over(tmp_path: Path, case: int) -> None:
    damage, reason = DAMAGE[case]
    state = fresh()
    advance(state, range(2))
    old, new = save(tmp_path, 10, state), save(tmp_path, 20, state)
    assert verify(old) == verify(new) == ""
    damage(new)
    said = verify(new)
    passed: list[tuple[Path, str]] = []
    found = find_checkpoint(tmp_path, damaged=passed)
    if not reason:
        assert (said, found, passed) == ("", new, [])
        return
    assert re.search(reason, said)
    assert "\n" not in said
    assert len(said) < 300
    assert (found, passed) == (old, [(new, said)])
    assert find_checkpoint(tmp_path) == old
    with pytest.raises(UsageError) as caught:
        find_checkpoint(tmp_path, "step-20", passed)
    assert "--resume-from-checkpoint 'step-20'" in str(caught.value)
    assert said in str(caught.value)
    assert "newest good one is step-00000010" in str(caught.value)
    flip(old / "state.json")
    for name in ("latest", "step-20", "step-10"):
        with pytest.raises(UsageError) as caught:
            find_checkpoint(tmp_path, name, passed)
        assert "--overwrite" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert (f"{new.name}: {said}" in str(caught.value)) == (name != "step-10")
        assert (f"{old.name}: state.json: sha256 differs" in str(caught.value)) == (name != "step-20")
    assert passed == [(new, said)]  # nothing is added unless something is found


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10, fresh())

    def broken(*_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "sha256", broken)
    assert verify(path) == "ema.safetensors: Input/output error"


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


# -- content that fits its manifest, but not the run -------------------------------------------------


def sealed(path: Path) -> Path:
    """Write a manifest for what is there now."""
    (path / "manifest.json").unlink()
    durable.write_manifest(path, format=1, step=int(path.name[5:]))
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
    untouched(path, "state.json|optimizer.safetensors|--use-ema")


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


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_as_open_to_others_as_their_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = save(tmp_path / "checkpoints", 1, fresh())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}
