"""Files and folders: whole or not there, and errors of the disk neither hidden nor invented."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from robustdiff.utils import atomic_io
from robustdiff.utils.atomic_io import (
    check_manifest,
    fsync_file,
    fsync_folder,
    new_folder,
    replace_folder,
    sha256,
    write_json,
    write_text,
)


def failing(code: int):
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fails


def folder(path: Path, content: str) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "sub" / "file").read_text()


# -- fsync -------------------------------------------------------------------------------------------


def test_the_right_file_and_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    file = tmp_path / "a"
    file.write_text("kept")
    fsync_file(file)
    fsync_folder(tmp_path)
    assert synced == [file.stat().st_ino, tmp_path.stat().st_ino]
    assert file.read_text() == "kept"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_folders_is_let_be(tmp_path: Path, monkeypatch, code: int) -> None:
    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(os, "fsync", failing(code))
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        fsync_folder(tmp_path)
    if open_files:
        assert len(os.listdir("/proc/self/fd")) == open_files
    with pytest.raises(OSError):  # files are another matter
        fsync_file(tmp_path / "a")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    for call in (lambda: fsync_folder(tmp_path), lambda: write_text(tmp_path / "a", "x")):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code
    with pytest.raises(FileNotFoundError):
        fsync_folder(tmp_path / "nowhere")


# -- files -------------------------------------------------------------------------------------------


def test_text_and_json_are_written_as_given(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "ü\r\nx\n")
    assert (tmp_path / "a").read_bytes() == "ü\r\nx\n".encode()
    write_json(tmp_path / "a", {"b": [1, None, "ü"]})
    assert json.loads((tmp_path / "a").read_text()) == {"b": [1, None, "ü"]}
    assert (tmp_path / "a").read_text().endswith("}\n")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, name: str, there) -> None:
    if there:
        write_text(tmp_path / "a", "old")
    monkeypatch.setattr(atomic_io if name == "open" else os, name, failing(errno.ENOSPC), raising=name != "open")
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * there


@pytest.mark.parametrize("value", [float("nan"), [float("-inf")], {"a": {"b": float("inf")}}, object()])
def test_what_is_not_strict_json_is_refused_before_anything_is_written(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a", value)
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["a"]


def test_the_file_is_synced_before_it_has_its_name_and_the_folder_after(tmp_path: Path, monkeypatch) -> None:
    log: list[object] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        log.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: log.append("named") or replace(a, b))
    write_text(tmp_path / "a", "12345")
    assert log[:2] == [((tmp_path / "a").stat().st_ino, 5), "named"]
    assert [entry[0] for entry in log[2:]] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_the_hash_is_that_of_the_whole_file(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()


# -- folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left_over(tmp_path: Path, monkeypatch, exchange: bool, there) -> None:
    if not exchange:
        monkeypatch.setattr(atomic_io, "_exchange", lambda a, b: False)
    if there:
        folder(tmp_path / "final", "old")
        folder(tmp_path / ".final.old", "older")  # of an earlier kill
    replace_folder(folder(tmp_path / "new" / "staging", "new"), tmp_path / "final")
    assert content(tmp_path / "final") == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"final", "new"}
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_in_the_way_is_replaced_but_not_followed(tmp_path: Path, kind: str) -> None:
    elsewhere = folder(tmp_path / "elsewhere", "kept")
    final = tmp_path / "final"
    final.symlink_to(elsewhere) if kind == "link" else final.write_text("x")
    replace_folder(folder(tmp_path / "staging", "new"), final)
    assert content(final) == "new"
    assert not final.is_symlink()
    assert content(elsewhere) == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"final", "elsewhere"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_between_two_operations_leaves_old_or_new_where_it_is_said_to_be(tmp_path, exchange: bool) -> None:
    class Killed(BaseException):
        pass

    seen = []
    for at in range(100):
        here = tmp_path / str(at)
        final, staging, old = here / "final", here / "staging", here / ".final.old"
        folder(final, "old")
        folder(staging, "new")
        count = [0]

        def dies(original, count=count, at=at):
            def wrapped(*arguments, **options):
                count[0] += 1
                if count[0] > at:
                    raise Killed
                return original(*arguments, **options)

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, dies(getattr(os, name)))
            patch.setattr(atomic_io, "_exchange", dies(atomic_io._exchange) if exchange else lambda a, b: False)
            try:
                replace_folder(staging, final)
            except Killed:
                killed = True
            else:
                killed = False
        if final.exists():
            seen.append(content(final))
        else:
            assert not exchange
            assert (content(old), content(staging)) == ("old", "new")
            seen.append("between")
        replace_folder(folder(here / "again", "newer"), final)
        assert content(final) == "newer"
        assert not old.exists()
        if not killed:
            break
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert seen.count("between") == (0 if exchange else 1)
    assert seen == sorted(seen, key=["old", "between", "new"].index)


def test_a_swap_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "_exchange", lambda a, b: False)
    folder(tmp_path / "final", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "staging", tmp_path / "final")
    assert content(tmp_path / "final") == "old"
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_is_there_when_it_is_filled_and_an_error_leaves_what_was(tmp_path: Path, there: bool) -> None:
    final = tmp_path / "new" / "final"
    if there:
        folder(final, "old")
    before = sorted(final.rglob("*"))

    def half() -> None:
        with new_folder(final) as unfinished:
            (unfinished / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert sorted(final.rglob("*")) == before
    assert list(final.parent.iterdir()) == [final] * there
    with new_folder(final) as unfinished:
        assert final.exists() == there
        (unfinished / "whole").touch()
    assert [path.name for path in final.iterdir()] == ["whole"]
    assert list(final.parent.iterdir()) == [final]


def test_where_names_cannot_be_swapped_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = folder(tmp_path / "a", "a"), folder(tmp_path / "b", "b")
    assert not atomic_io._exchange(a, tmp_path / "nowhere")
    monkeypatch.setattr(atomic_io.sys, "platform", "darwin")
    assert not atomic_io._exchange(a, b)
    monkeypatch.undo()

    class OldLibrary:
        def __init__(self, _: None) -> None:
            pass

    monkeypatch.setattr(atomic_io.ctypes, "CDLL", OldLibrary)
    assert not atomic_io._exchange(a, b)
    assert (content(a), content(b)) == ("a", "b")


# -- manifests (the rest is tested with checkpoints) -------------------------------------------------


def test_a_manifest_tells_any_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    atomic_io.write_manifest(tmp_path, version=3)
    assert check_manifest(tmp_path, ["a"], ["b", "c"], version=3) == ""
    assert check_manifest(tmp_path, ["a", "b"]) == ""
    assert "version is 3 instead of 4" in check_manifest(tmp_path, ["a", "b"], version=4)
    assert "lists 'b'" in check_manifest(tmp_path, ["a"])
    assert "does not list c" in check_manifest(tmp_path, ["a", "b", "c"])
    (tmp_path / "c").write_text("")
    assert "does not list c" in check_manifest(tmp_path, ["a"], ["b", "c"])
    (tmp_path / "b").write_text("x")
    assert check_manifest(tmp_path, ["a", "b"]) == "b: sha256 differs"
