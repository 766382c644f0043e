"""The command line: what it costs to ask for help, what mistakes get, ``corrupt``, and what bad data get.

Long, because it holds every command and its settings: one section per claim.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import linecache
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

import robustdiff
from command_line import fails, grey, tree
from helpers import TINY_UNET as UNET
from robustdiff.commands import main
from robustdiff.data.corruption import KINDS, Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.networks import NETWORKS
from robustdiff.diffusion.pipeline import SCHEDULERS
from robustdiff.losses.equivariance import PRESETS
from robustdiff.utils.images import to_uint8

HEAVY = ("torch", "diffusers", "numpy", "PIL", "accelerate", "scipy", "sklearn")
COMMANDS = [(), ("train",), ("sample",), ("corrupt",)]
FIELDS = [(name, field) for name, command in main.COMMANDS.items() for field in dataclasses.fields(command.config)]


def test_a_warning_of_a_library_is_one_line_without_its_code(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/somewhere/site-packages/library/part/file.py"
    names = {"__name__": "library", "warnings": warnings}
    work = compile("warnings.warn('this is\\nno good', UserWarning)", path, "exec")
    monkeypatch.setattr(main, "_main", lambda *_: exec(work, names) or 0)
    monkeypatch.setattr(linecache, "getline", lambda *_: "the line of code")
    assert main.main(["corrupt"]) == 0
    assert capfd.readouterr().err == "robustdiff: UserWarning of library: this is no good\n"


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning])
def test_what_a_library_will_drop_is_not_for_users(
    kind: type[Warning], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> int:
        warnings.simplefilter("always")
        warnings.warn("use another function", kind, stacklevel=1)
        return 0

    monkeypatch.setattr(main, "_main", run)
    assert main.main(["corrupt"]) == 0
    assert capfd.readouterr().err == ""


# -- help and version --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("train", "--help"), 0),
        (("sample", "--help"), 0),
        (("corrupt", "--help"), 0),
        (("train", "x", "--lerning-rate", "1"), 2),
        (("train", "x", "--corrupt", "blurr"), 2),
        (("sample", "x", "-n", "0"), 2),
        (("corrupt", "x", "y"), 2),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(arguments: tuple[str, ...], status: int) -> None:
    code = f"import sys; from robustdiff.commands.main import main; s = main({list(arguments)})"
    code += f"; print(s, *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == str(status)


def test_importing_the_package_loads_nothing_heavy_and_every_public_name_is_there() -> None:
    code = f"import sys, robustdiff; assert not [m for m in {HEAVY} if m in sys.modules]; dir(robustdiff)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in set(robustdiff.__all__) - {"audit"}:
        assert getattr(robustdiff, name).__name__ == name
    assert callable(robustdiff.audit)  # the room
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = robustdiff.nonesuch


def test_version_and_module_are_the_command(capsys) -> None:
    for flag in ("--version", "-V"):
        assert main.main([flag]) == 0
        assert capsys.readouterr().out == f"robustdiff {robustdiff.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "robustdiff", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"robustdiff {robustdiff.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "robustdiff", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr


def documentation(command: type, field: str) -> str:
    """The text of a field, on one line: below it in the source, or with its type."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(command)).body if isinstance(node, ast.ClassDef))
    for node, following in itertools.pairwise(body):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == field
        if named and isinstance(following, ast.Expr):
            return " ".join(str(ast.literal_eval(following.value)).split())
    said = [about.help for about in get_args(get_type_hints(command, include_extras=True)[field])[1:]]
    assert said, f"{field} has no text"  # of an option that several commands share, with its type
    return str(said[0])


def squeezed(text: str) -> str:
    """Without blanks and box lines, so that where help breaks its lines does not matter."""
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_shows_every_flag_with_its_text_and_default(command: str, capsys) -> None:
    assert main.main([command, "--help"]) == 0
    shown = squeezed(capsys.readouterr().out)
    for field in dataclasses.fields(main.COMMANDS[command].config):
        text = documentation(main.COMMANDS[command].config, field.name)
        assert squeezed(text) in shown
        if field.default is dataclasses.MISSING:
            assert "(required)" in shown
            continue
        if "Positional" in field.type:  # any number of them
            assert "RUN[RUN...]" in shown
            continue
        assert f"--{field.name.replace('_', '-')}" in shown
        if field.default not in (None, ()):
            assert squeezed(text) + f"(default:{field.default})" in shown


@pytest.mark.parametrize(("command", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_every_number_states_its_unit_or_range(command: str, field: dataclasses.Field) -> None:
    kind = str(get_type_hints(main.COMMANDS[command].config)[field.name])
    if not re.search(r"\b(int|float)\b", kind):
        return
    text = documentation(main.COMMANDS[command].config, field.name)
    units = r"\b(pixels|images|steps|passes|levels|from 0|to 1)\b|1 = |in units of|[<>]=? ?\d"
    if field.name == "seed":  # a seed has no unit: its range
        units = ">= 0"
    assert re.search(units, text, re.IGNORECASE), f"--{field.name}: {text}"


def test_corrupt_help_lists_every_kind_and_parameter_with_its_range(capsys) -> None:
    assert main.main(["corrupt", "--help"]) == 0
    shown = capsys.readouterr().out
    for kind, (meaning, parameters) in KINDS.items():
        assert f"{kind}: {meaning}" in shown
        for name, parameter in parameters.items():
            assert f"{name}={parameter.default}: {parameter.meaning}; {parameter.allowed}" in shown


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("train", "--help"), ("corrupt", "--help")])
def test_a_reader_that_has_gone_is_no_stack_trace(arguments: tuple[str, ...], buffered: bool) -> None:
    """Buffered output fails at the end of the program, unbuffered output in the middle."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "robustdiff", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=environment,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


# -- mistyped commands and flags ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("name a command", "train, sample, evaluate, attack, report, audit, corrupt")),
        (("trian", "x"), ("'trian'", "did you mean train?")),
        (("zzz",), ("'zzz'", "train, sample, evaluate, attack, report, audit, corrupt")),
        (("train",), ("train needs DATA",)),
        (("train", "--seed", "3"), ("train needs DATA",)),
        (("sample",), ("sample needs RUN",)),
        (("corrupt",), ("corrupt needs SRC DST",)),
        (("corrupt", "x"), ("corrupt needs SRC DST",)),
        (("train", "x", "--trian-batch-size", "3"), ("--trian-batch-size", "did you mean --train-batch-size?")),
        (("train", "x", "--trian_batch_size=3"), ("--trian_batch_size", "did you mean --train-batch-size?")),
        (("train", "x", "--no-use-emma"), ("--no-use-emma", "did you mean --")),
        (("train", "x", "--zzzzzz"), ("no flag --zzzzzz", "train --help")),
        (("sample", "x", "--sigma_flor", "1"), ("--sigma_flor", "did you mean --sigma-floor?")),
        (("sample", "x", "--schedular", "ddim"), ("--schedular", "did you mean --scheduler?")),
        (("corrupt", "x", "y", "--overwite"), ("--overwite", "did you mean --overwrite?")),
        (("corrupt", "x", "y", "--corupt=blur"), ("--corupt", "did you mean --corrupt?")),
        (("train", "--seed", "3", "--zzz"), ("no flag --zzz",)),
        (("purify", "x", "y", "--model", "z"), ("no flag --model; MODEL is given without one (see",)),
        (("sample", "--run=x"), ("no flag --run; RUN is given without one (see",)),
        (("sample", "x", "--no-steps"), ("no flag --no-steps; did you mean --steps?",)),
        (("--steps=5", "sample", "x"), ("sample: Unrecognized options: --steps=5 (see",)),
        (("sample", "x", "--init-from", "z"), ("no flag --init-from (see",)),  # which another command has
        (("train", "x", "stray"), ("stray",)),
        (("train", "x", "--seed"), ("--seed", "value")),
        (("sample", "x", "-n"), ("-n", "value")),
        (("corrupt", "x", "y", "--seed"), ("--seed", "value")),
    ],
)
def test_what_cannot_be_parsed_is_one_line_with_the_nearest_name(here: Path, capsys, arguments, words) -> None:
    error = fails(capsys, *arguments)
    for word in words:
        assert word in error
    assert not list(here.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal as Linux makes one")
@pytest.mark.parametrize(
    "arguments", [("--preset", "papr"), ("--seed",), ("--seed", "one"), ("stray",), ("--sed", "1")]
)
def test_on_a_terminal_it_is_the_same_line(here: Path, capsys, arguments) -> None:
    said = fails(capsys, "train", "x", *arguments)
    ours, terminal = os.openpty()
    command = [sys.executable, "-m", "robustdiff", "train", "x", *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    os.close(ours)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(
    ("arguments", "flag", "choices", "nearest"),
    [
        (("train", "x", "--preset", "papr"), "--preset", tuple(PRESETS), "paper"),
        (("train", "x", "--network", "smal"), "--network", tuple(NETWORKS), "small"),
        (("train", "x", "--channels", "2"), "--channels", ("1", "3"), None),
        (("sample", "x", "--scheduler=dddim"), "--scheduler", tuple(SCHEDULERS), "ddim"),
        (("train", "x", "--mixed_precision", "fp17"), "--mixed-precision", ("no", "fp16", "bf16"), "fp16"),
    ],
)
def test_a_bad_choice_names_the_flag_the_choices_and_the_nearest(here, capsys, arguments, flag, choices, nearest):
    error = fails(capsys, *arguments)
    assert flag in error
    assert ", ".join(sorted(choices)) in error
    assert "None" not in error
    if nearest:
        assert f"did you mean {nearest}?" in error
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("train", "x", "--seed", "one"), "--seed"),
        (("train", "x", "--seed", "-1"), "--seed"),
        (("train", "x", "--learning_rate", "fast"), "--learning-rate"),
        (("train", "x", "--lr-warmup-steps", "1.5"), "--lr-warmup-steps"),
        (("train", "x", "--radius-exponent", "nan"), "--radius-exponent"),
        (("train", "x", "--max-bad-fraction", "nan"), "--max-bad-fraction"),
        (("train", "x", "--adam-beta1", "1"), "--adam-beta1"),
        (("sample", "x", "-n", "many"), "-n"),
        (("sample", "x", "-n", "0"), "-n"),
        (("sample", "x", "--relabel", "0.9"), "--relabel"),
        (("sample", "x", "--label-floor", "inf"), "--sigma-floor"),
        (("sample", "x", "--steps", "-3"), "--steps"),
        (("sample", "x", "--batch_size", "0"), "--batch-size"),
        (("corrupt", "x", "y", "--corrupt", "blur", "--seed", "q"), "--seed"),
        (("corrupt", "x", "y", "--corrupt", "blur", "--resolution", "0"), "--resolution"),
        (("corrupt", "x", "y", "--corrupt", "blur:radius=-1"), "--corrupt"),
        (("corrupt", "x", "y", "--corrupt", "blur", "--max-bad-fraction", "2"), "--max-bad-fraction must be"),
        (("corrupt", "x", "y", "--corrupt", "blur", "--max-bad-fraction", "nan"), "--max-bad-fraction must be"),
        (("corrupt", "x", "y", "--corrupt", "blur", "--max-memory-gib", "-1"), "--max-memory-gib -1.0 must be"),
    ],
)
def test_a_bad_number_names_its_flag_in_plain_words(here: Path, capsys, arguments, flag) -> None:
    error = fails(capsys, *arguments)
    assert flag in error
    assert "<class" not in error
    assert "int()" not in error
    assert not list(here.iterdir())


def test_seeds_that_no_generator_takes_are_refused_before_anything_is_done(photos: Path, here: Path, capsys) -> None:
    """torch's CPU generators use 32 bits: 2^32 would repeat 0."""
    for arguments in (("train", str(photos), "--dry-run"), ("sample", str(photos))):
        assert "--seed" in fails(capsys, *arguments, "--seed", str(2**32))
    assert not list(here.iterdir())


# -- robustdiff corrupt ------------------------------------------------------------------------------

DIRT = ("gaussian:sigma=0.3,fraction=0.5", "impulse:amount=0.2,fraction=0.5")


def test_corrupt_writes_what_the_library_computes_and_a_manifest(photos: Path, here: Path, capsys) -> None:
    before = tree(photos)
    flags = [part for spec in DIRT for part in ("--corrupt", spec)]
    assert main.main(["corrupt", str(photos), "dirty", *flags, "--seed", "3"]) == 0
    manifest = json.loads(Path("dirty/manifest.json").read_text())
    clean, corruptions = load_images(photos), [Corruption.parse(spec) for spec in DIRT]
    hit = 0
    for index, entry in enumerate(manifest["images"]):
        dirty, kinds = corrupt(clean.x0(index), corruptions, 3, index)
        written = np.asarray(Image.open(Path("dirty", entry["file"])))
        assert np.array_equal(written, to_uint8(dirty)[0].numpy())
        assert [corruptions[place].kind for place in entry["corruptions"]] == list(kinds)
        assert entry["source"] == clean.names[index]
        hit += bool(kinds)
    assert 0 < hit < 8
    assert f"dirty: 8 images, {hit} of them dirty" in capsys.readouterr().out
    assert manifest["seed"] == 3
    assert manifest["corruptions"] == [str(corruption) for corruption in corruptions]
    assert "clipped" in manifest["written"]
    assert tree(photos) == before
    assert sorted(tree(Path("dirty"))) == sorted([*before, "manifest.json"])
    first = tree(Path("dirty"))
    assert main.main(["corrupt", str(photos), "dirty", *flags, "--seed", "4", "--overwrite"]) == 0
    assert tree(Path("dirty")) != first
    assert (
        main.main(["corrupt", str(photos), "dirty", "--with", DIRT[0], "--with", DIRT[1], "--seed=3", "--overwrite"])
        == 0
    )
    assert tree(Path("dirty")) == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{photos}", "new"), ("--corrupt is missing",)),
        (("{photos}", "new", "--corrupt", "gausian:sigma=0.2"), ("--corrupt", "did you mean gaussian?")),
        (("{photos}", "new", "--corrupt", "gaussian:sgma=0.2"), ("--corrupt", "did you mean sigma?")),
        (("{photos}", "new", "--corrupt", "gaussian:sigma=0.2,fraction=2"), ("--corrupt", "fraction")),
        (("{photos}", "new", "--corrupt", ""), ("--corrupt",)),
        (("{photo}", "new", "--corrupt", "blur"), ("no such file or folder", "did you mean")),
        (("{photos}/0.png", "new", "--corrupt", "blur"), ("give the folder",)),
        (("{photos}", "{mine}", "--corrupt", "blur"), ("not empty", "--overwrite")),
        (("{photos}", "{mine}", "--corrupt", "blur", "--overwrite"), ("not a dirty copy",)),
        (("{photos}", "{photos}", "--corrupt", "blur", "--overwrite"), ("not a dirty copy",)),
        (("{photos}", "{mine}/keep.txt", "--corrupt", "blur"), ("not a folder",)),
        (("{photos}", "{mine}/keep.txt/new", "--corrupt", "blur"), ("keep.txt",)),
        (("{photos}", 300 * "x", "--corrupt", "blur"), ("too long",)),
    ],
)
def test_bad_input_to_corrupt_is_one_line_and_touches_nothing(photos, here, tmp_path, capsys, arguments, words) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "keep.txt").write_text("dear diary")
    before = tree(tmp_path)
    places = {"photos": photos, "photo": str(photos)[:-1], "mine": mine}
    error = fails(capsys, "corrupt", *(argument.format(**places) for argument in arguments))
    for word in words:
        assert word in error
    assert tree(tmp_path) == before
    assert not list(here.iterdir())


def test_a_dirty_copy_inside_its_source_is_not_read_as_data_again(photos: Path, here: Path, capsys) -> None:
    """DST inside SRC would turn the copy into source images the next time: refused, or the count is unchanged."""
    status = main.main(["corrupt", str(photos), str(photos / "dirty"), "--corrupt", "blur"])
    capsys.readouterr()
    assert status == 2
    assert len(load_images(photos)) == 8


def test_a_disk_that_refuses_to_be_written_is_one_line(photos: Path, here: Path, capsys, monkeypatch) -> None:
    """Tests may run as root, whom no permission stops: the refusal is simulated."""
    original = Path.mkdir

    def refuse(path: Path, *arguments: object, **keywords: object) -> None:
        if "dirty" in path.name or "run" in path.name or "samples" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        original(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Permission denied" in fails(capsys, "corrupt", str(photos), "dirty", "--corrupt", "blur")
    assert main.main(["train", str(photos), "--output-dir", "run", "--images", "64"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Permission denied" in error
    assert not list(here.iterdir())


def test_corrupt_skips_as_many_unreadable_images_as_it_is_told(photos: Path, here: Path, capsys) -> None:
    for name in ("3.png", "5.png"):
        (photos / name).write_bytes(b"")
    arguments = ("corrupt", str(photos), "dirty", "--corrupt", "blur")
    assert "at least 2 of 8 images" in fails(capsys, *arguments)
    assert main.main([*arguments, "--max-bad-fraction", "0.25"]) == 0
    assert "dirty: 6 images" in capsys.readouterr().out
    assert len(load_images("dirty")) == 6


def test_corrupt_holds_no_more_than_it_is_told(photos: Path, here: Path, monkeypatch) -> None:
    streamed = []

    def load(*arguments: object, **options: object) -> object:
        images = load_images(*arguments, **options)
        streamed.append(images.streamed)
        return images

    monkeypatch.setattr("robustdiff.data.dataset.load_images", load)
    for folder, more in (("held", ("--max-memory-gib", "1")), ("streamed", ("--max-memory-gib", "0"))):
        assert main.main(["corrupt", str(photos), folder, "--corrupt", "impulse:amount=0.2", *more]) == 0
    assert streamed == [False, True]
    assert tree(Path("held")) == tree(Path("streamed"))


# -- stopped, and refused before the work ------------------------------------------------------------


def test_ctrl_c_speaks_of_checkpoints_where_there_are_some(photos: Path, here: Path, capsys, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robustdiff.audit.statistics.image_statistics", stop)
    monkeypatch.setattr("robustdiff.training.trainer.train", stop)
    assert main.main(["audit", str(photos)]) == 130
    assert capsys.readouterr().err == "robustdiff: stopped at once\n"
    assert main.main(["train", str(photos)]) == 130
    assert "nothing since the last checkpoint was saved" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["report", "new/report"])
def test_a_read_only_output_of_audit_is_refused_before_the_work(photos, here, capsys, monkeypatch, place) -> None:
    """Tests may run as root, whom no permission stops: the system's answer is simulated."""
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here and original(path, mode))
    monkeypatch.setattr(
        "robustdiff.audit.statistics.image_statistics", lambda *_, **__: pytest.fail("the work has begun")
    )
    error = fails(capsys, "audit", str(photos), "--output", str(here / place))
    assert "--output" in error
    assert f"{here} is read-only" in error


# -- bad data to robustdiff train --------------------------------------------------------------------


def test_a_missing_folder_suggests_the_nearest(photos: Path, here: Path, capsys) -> None:
    error = fails(capsys, "train", str(photos)[:-2])
    assert "no such file or folder" in error
    assert f"did you mean {photos}?" in error
    assert not list(here.iterdir())


def test_data_that_cannot_be_used_is_one_line_and_nothing_is_written(tmp_path: Path, here: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("no picture")
    (tmp_path / "words" / "fake.png").write_text("no picture either")
    grey(tmp_path / "mixed" / "a.png")
    grey(tmp_path / "mixed" / "b.png", size=(12, 8))
    grey(tmp_path / "mixed" / "c.png", size=(12, 16))
    grey(tmp_path / "odd" / "a.png", size=(7, 9))
    grey(tmp_path / "bad" / "a.png")
    for name in "bcd":
        (tmp_path / "bad" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "text.npy").write_text("no array")
    expected = {
        "empty": ("empty",),
        "words": ("no readable image", "side-car"),
        "mixed": ("different sizes", "--resolution"),
        "odd": ("9 x 7", "multiples of 2", "--resolution 6 or 8"),
        "bad": ("3 of 4 images", "--max-bad-fraction"),
        "text.npy": ("cannot be read as an array",),
    }
    for name, words in expected.items():
        error = fails(capsys, "train", str(tmp_path / name))
        assert name in error or name == "odd"
        for word in words:
            assert word in error
    assert not list(here.iterdir())
    assert main.main(["train", str(tmp_path / "mixed"), "--resolution", "8", "--images", "64", "--dry-run"]) == 0
    assert "3 images, 8 x 8 grey" in capsys.readouterr().out


def tiny_run(data: Path, *flags: str) -> list[str]:
    """A run of one step into ``run``."""
    settings = ["--output-dir", "run", "--images", "2", "--train-batch-size", "2", "--preview-images", "0"]
    Path("unet.json").write_text(json.dumps(UNET))
    return ["train", str(data), *settings, "--model-config-name-or-path", "unet.json", *flags]


def test_unreadable_images_below_the_limit_are_skipped_named_and_counted(photos: Path, here: Path, capsys) -> None:
    (photos / "3.png").write_bytes(b"")
    (photos / "5.png").write_bytes((photos / "5.png").read_bytes()[:60])
    (photos / "notes.txt").write_text("a side-car")
    assert "2 of 8 images" in fails(capsys, *tiny_run(photos))
    assert not Path("run").exists()
    assert main.main(tiny_run(photos, "--max-bad-fraction", "0.25")) == 0
    plan = capsys.readouterr().out
    assert "6 images, 8 x 8 grey" in plan
    assert re.search(r"skipped: +1 empty file, 1 \w", plan)
    account = json.loads(Path("run/data.json").read_text())["data"]
    assert account["count"] == 6
    assert [entry["name"] for entry in account["skipped"]] == ["3.png", "5.png"]
    assert account["skipped"][0]["reason"] == "empty file"
    assert "2 unreadable, skipped" in Path("run/README.md").read_text()


def test_unusual_images_are_converted_and_the_plan_and_data_json_say_so(tmp_path: Path, here: Path, capsys) -> None:
    folder = tmp_path / "unusual"
    folder.mkdir()
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    Image.fromarray(random.integers(0, 65536, (8, 8), dtype=np.uint16)).save(folder / "deep.png")
    colour.quantize(16).save(folder / "palette.png")
    colour.convert("CMYK").save(folder / "print.tif")
    frames = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "turned.jpg", exif=exif)
    colour.putalpha(128)
    colour.save(folder / "glass.png")
    assert main.main(tiny_run(folder)) == 0
    plan = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("converted:"))
    account = json.loads(Path("run/data.json").read_text())["data"]
    assert account["count"] == 6
    assert account["skipped"] == []
    for remark in (
        "16-bit reduced to 8-bit",
        "palette expanded",
        "CMYK converted to RGB",
        "first frame of an animation",
        "EXIF rotation applied",
        "alpha composited over white",
    ):
        assert account["conversions"][remark] == 1
        assert f"1 {remark}" in plan
