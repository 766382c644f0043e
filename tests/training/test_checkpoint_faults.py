"""Checkpoints are whole or not there: after kills, errors of the disk, and damage to any file."""

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
from safetensors import SafetensorError

from checkpoints import advance, everything, flip, fresh, good_steps, plain, same, save
from robustdiff.training import checkpoint
from robustdiff.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    verify,
)
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

# -- killed between any two operations -------------------------------------------------------------


class Killed(BaseException):
    """Nothing the code may catch."""


@contextlib.contextmanager
def watched(act: Callable[[int, str], None], exchange: bool = True) -> Iterator[list[tuple[str, object]]]:
    """Every change of the disk calls ``act(number, name)`` first; yields the log of (name, what)."""
    log: list[tuple[str, object]] = []
    places = [(os, name) for name in ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_io, "open", open, raising=False)
        if not exchange:
            patch.setattr(atomic_io, "_exchange", lambda a, b: False)

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

        for module, name in [*places, (atomic_io, "_exchange"), (atomic_io, "open"), (checkpoint, "save_file")]:
            watch(module, name)
        yield log


def killer(at: int) -> Callable[[int, str], None]:
    """From operation ``at`` on nothing happens any more: what is dead does not clean up."""

    def act(number: int, _: str) -> None:
        if number >= at:
            raise Killed

    return act


def hide(path: Path, suffix: str) -> Path:
    """Rename a checkpoint to what a kill leaves."""
    return path.rename(path.with_name(f".{path.name}.{suffix}"))


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


# -- errors ----------------------------------------------------------------------------------------


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


# -- damage ----------------------------------------------------------------------------------------


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
    assert "`resume_from_checkpoint` 'step-20'" in str(caught.value)
    assert said in str(caught.value)
    assert "newest good one is step-00000010" in str(caught.value)
    flip(old / "state.json")
    for name in ("latest", "step-20", "step-10"):
        with pytest.raises(UsageError) as caught:
            find_checkpoint(tmp_path, name, passed)
        assert "`overwrite`" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert (f"{new.name}: {said}" in str(caught.value)) == (name != "step-10")
        assert (f"{old.name}: state.json: sha256 differs" in str(caught.value)) == (name != "step-20")
    assert passed == [(new, said)]  # nothing is added unless something is found


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10, fresh())

    def broken(*_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic_io, "sha256", broken)
    assert verify(path) == "ema.safetensors: Input/output error"
