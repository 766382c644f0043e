"""The ``robustdiff`` command: flags in, one line per error out; everything else is imported when it is needed.

A little over 400 lines, so that every command and every way in which one can fail stand in one place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from robustdiff import __version__
from robustdiff.config import (
    AttackConfig,
    AuditConfig,
    CorruptConfig,
    EvaluateConfig,
    PurifyConfig,
    ReportConfig,
    ReproduceConfig,
    RobustdiffWarning,
    SampleConfig,
    TrainConfig,
    UsageError,
)
from robustdiff.corruption import help_text
from robustdiff.machine import is_out_of_memory, processes, rank

COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "attack": AttackConfig,
    "report": ReportConfig,
    "audit": AuditConfig,
    "corrupt": CorruptConfig,
    "purify": PurifyConfig,
    "reproduce": ReproduceConfig,
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXT = "No space left on device|quota exceeded|File too large"
PARTED = (
    "connection closed by peer|connection reset by peer|socket closed|broken pipe|remote process exited|"
    "communicator was aborted"
)
"""How a process notices that another one has gone; whatever else its network says is shown whole."""
MEMORY_REMEDY = {
    "train": "lower --train-batch-size (--gradient-accumulation-steps makes up for it), or take a smaller --network or "
    "--resolution; with worker processes, fewer --dataloader-num-workers",
    "sample": "lower --batch-size",
    "corrupt": "lower --resolution, or with --poison --batch-size",
    "purify": "lower --batch-size",
    "audit": "close other programs, or take a smaller part of the data",
    "evaluate": "lower --batch-size, or -n",
    "attack": "lower --batch-size or --workers, or add --gradient-checkpointing always",
    "report": "take fewer runs",
    "reproduce": "fewer --workers; for subspace, a smaller --resolution",
}
DESCRIPTION = "Train diffusion models that stay clean when their training images are not."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 done, 1 training failed, 2 wrong usage, 75 out of ``--minutes``, 130 stopped by Ctrl-C,
        143 by SIGTERM. One process of several that fails ends at once with its status, so that its launcher ends the
        others.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        status = _guarded(arguments)
    if status and processes() > 1:  # the interpreter's end would wait for processes that wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _guarded(arguments: list[str]) -> int:
    try:
        status = _main(arguments)
        sys.stdout.flush()  # a reader that has gone is noticed here, not at the interpreter's end
        return status
    except UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        lost = "; nothing since the last checkpoint was saved" if arguments[:1] == ["train"] else ""
        return _fail(f"stopped at once{lost}", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `robustdiff ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(f"out of memory: {MEMORY_REMEDY.get(arguments[0], MEMORY_REMEDY['audit'])}", 2)
        if getattr(error, "errno", None) in FULL or re.search(FULL_TEXT, str(error), re.IGNORECASE):
            going_on = (
                "a training run goes on with --resume, or begins anew with --overwrite if it has no checkpoint yet"
            )
            if arguments[0] in ("reproduce", "attack"):
                going_on = "the same command goes on"
            return _fail(f"no space left on the device: free some, or write elsewhere; {going_on}", 2)
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(f"cannot read or write {error.filename}: {error.strerror}; name another file or folder", 2)
        if processes() > 1:
            if re.search(PARTED, str(error), re.IGNORECASE):
                return _fail("another process stopped: see its message", 1)
            traceback.print_exc()
            return 1
        raise


def _main(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"robustdiff {__version__}")
        return 0
    config = parse(arguments)
    if config is None:
        return 0
    config.validate()
    return _run(config)


def _fail(message: str, status: int) -> int:
    who = f"robustdiff (process {rank()})" if processes() > 1 else "robustdiff"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:  # noqa: ANN401
    """Our own warnings as one line, without the line of code that they come from; once for all processes."""
    if not issubclass(category, RobustdiffWarning):
        print(warnings.formatwarning(message, category, *where[:2]), end="", file=sys.stderr)
    elif rank() == 0:
        print(f"robustdiff: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(config: Any) -> int:  # noqa: ANN401 - one of COMMANDS' dataclasses
    commands: dict[type, Callable[[Any], int]] = {
        TrainConfig: _train,
        SampleConfig: _sample,
        EvaluateConfig: _evaluate,
        AttackConfig: _attack,
        ReportConfig: _report,
        AuditConfig: _audit,
        CorruptConfig: _corrupt,
        PurifyConfig: _purify,
        ReproduceConfig: _reproduce,
    }
    return commands[type(config)](config)


# -- flags -------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> Any | None:  # noqa: ANN401 - one of COMMANDS' dataclasses
    """The command's configuration, or None if help was asked for and printed.

    Raises:
        UsageError: One line for anything that cannot be parsed.
    """
    arguments = _positional_data(arguments)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="robustdiff", description=DESCRIPTION, args=arguments
            )
    except SystemExit as stop:
        if not stop.code:
            if "corrupt" in arguments[:1]:
                print(f"kinds of dirt, for --corrupt:\n{help_text()}")
            return None
    raise UsageError(_one_line(errors.getvalue(), arguments))


def _positional_data(arguments: list[str]) -> list[str]:
    """Accept diffusers' ``--train_data_dir DATA`` and ``--dataset_name ID`` as the positional DATA."""
    result = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in ("--train-data-dir", "--dataset-name"):
            result.append(value if equals else next(rest, ""))
        else:
            result.append(argument)
    return result


def known_flags(command: type) -> list[str]:
    """Every flag of a command, as typed."""
    flags = []
    for field in dataclasses.fields(command):
        flags.append("--" + field.name.replace("_", "-"))
        flags += re.findall(r"['\"](--?[a-z][\w-]*)['\"]", str(field.type))
    return flags


def _one_line(text: str, arguments: list[str]) -> str:
    """One sentence out of tyro's boxed message, with the nearest flag or command for a misspelt one."""
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command not in COMMANDS:
        if command is None:
            return f"name a command: {', '.join(COMMANDS)} (see robustdiff --help)"
        return f"{command!r} is no command{_nearest(command, list(COMMANDS))}; there are {', '.join(COMMANDS)}"
    lines = [line.strip("│╭╮╰╯─+|- ") for line in text.splitlines()]  # the last three where boxes are drawn in ASCII
    message = " ".join(line for line in lines[1:] if line).strip()
    title = lines[0] if lines else ""
    help_hint = f" (see robustdiff {command} --help)"
    if title.startswith("Unrecognized"):
        flags = known_flags(COMMANDS[command])
        known = {flag.replace("_", "-") for flag in flags} | {f.replace("--", "--no-", 1) for f in flags}
        for argument in arguments[arguments.index(command) + 1 :]:
            name = argument.split("=")[0].replace("_", "-")
            if name.startswith("-") and name not in known:
                return f"{command} has no flag {argument.split('=')[0]}{_nearest(name, flags)}{help_hint}"
        return f"{command}: {message.split('For full helptext')[0].strip()}{help_hint}"
    value_missing = re.search(r"Missing value for argument '([^']+)'", message)
    if value_missing:
        return f"{command}: {value_missing[1]} needs a value{help_hint}"
    wrong = re.search(r"invalid choice '(.*?)' for argument '([^']+)'", message)
    if wrong:
        choices = _choices(COMMANDS[command], wrong[2])
        return f"{wrong[2]} {wrong[1]!r} is not one of {', '.join(choices)}{_nearest(wrong[1], choices)}{help_hint}"
    wrong = re.search(r"Error parsing (\S+?):", message)
    if wrong:
        values = re.findall(r"'([^']*)'", message.split("Argument helptext")[0])
        kind = "whole number" if "int()" in message else "number"
        return f"{wrong[1]} {values[-1] if values else ''!r} is not a {kind}{help_hint}"
    if title.startswith("Required"):
        field = dataclasses.fields(COMMANDS[command])
        needed = [re.search(r"metavar=['\"](\w+)['\"]", str(f.type)) for f in field if f.default is dataclasses.MISSING]
        names = " ".join(match.group(1) for match in needed if match)
        return f"{command} needs {names}{help_hint}"
    message = re.split(r"Argument helptext|For full helptext", message)[0].strip()
    return f"{command}: {message or title}{help_hint}"


def _choices(command: type, flag: str) -> list[str]:
    """What a flag takes, in the order of its declaration."""
    (field,) = (f for f in dataclasses.fields(command) if "--" + f.name.replace("_", "-") in flag.split("/"))
    return re.findall(r"[\w-]+", re.sub(r".*Literal\[(.*?)\].*", r"\1", str(field.type)))


def _nearest(word: str, choices: list[str]) -> str:
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


# -- commands ----------------------------------------------------------------------------------------


def _quiet_libraries() -> None:
    """Keep diffusers' own progress bars and warnings out of the command's output; errors still come through."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _train(config: TrainConfig) -> int:
    from robustdiff.training import Interrupted, TrainingError, train

    _quiet_libraries()
    try:
        train(config)
    except Interrupted as stop:
        return _fail(str(stop), stop.status)
    except TrainingError as error:
        return _fail(str(error), 1)
    return 0


def _sample(config: SampleConfig) -> int:
    from robustdiff.sample_files import sample_to_files

    _quiet_libraries()
    message = sample_to_files(config)
    if message:
        print(message)
    return 0


def _evaluate(config: EvaluateConfig) -> int:
    from robustdiff.evaluation.command import evaluate, summary

    _quiet_libraries()
    written = evaluate(config)
    if written:
        print(summary(written))
    return 0


def _attack(config: AttackConfig) -> int:
    from robustdiff.evaluation.command import summary
    from robustdiff.evaluation.robustness import attack
    from robustdiff.stopping import Interrupted

    _quiet_libraries()
    try:
        print(summary([attack(config)]))
    except Interrupted as stop:
        return _fail(str(stop), stop.status)
    except ArithmeticError as error:
        return _fail(f"attack failed: {error}", 1)
    return 0


def _report(config: ReportConfig) -> int:
    from robustdiff.report import report

    print(report(config.runs, config.output, config.title))
    return 0


def _audit(config: AuditConfig) -> int:
    from robustdiff.audit import audit_images
    from robustdiff.audit_files import check_output, write_audit
    from robustdiff.images import load_images
    from robustdiff.machine import free_memory
    from robustdiff.search import search
    from robustdiff.sources import open_source

    if config.output is not None:
        check_output(config.data, config.output, overwrite=config.overwrite)
    extractor = None
    if config.extractor is not None:
        from robustdiff.evaluation.extractors import open_extractor
        from robustdiff.evaluation.features import extract

        extractor = open_extractor(config.extractor)
    options = {"split": config.split, "config": config.dataset_config_name, "image_column": config.image_column}
    try:
        source = open_source(config.data, **options)
    except UsageError as error:  # as load_images words it
        raise UsageError(f"{config.data}: {error}") from None
    audit = audit_images(source, data=config.data, resolution=config.resolution, memory=free_memory() // 2)
    print(audit.text(), flush=True)
    found = None
    if len({record.size for record in audit.records}) > 1:
        print("damage: not looked for, images differ in size: add --resolution N, the size you would train at")
    elif audit.records:
        images = audit.images
        if images is None:
            images = load_images(config.data, resolution=config.resolution, max_bad_fraction=1.0, **options)
        features = None if extractor is None else extract(extractor, images, cache=None)
        found = search(images, None if features is None else (features.extractor.name, features.values))
        print("damage: not looked for, too few images to compare" if found is None else found.text())
    if config.output is not None:
        write_audit(audit, config.output, overwrite=config.overwrite, also=None if found is None else found.write)
        print(f"{config.output}: {', '.join(sorted(path.name for path in Path(config.output).iterdir()))}")
    return 0


def _corrupt(config: CorruptConfig) -> int:
    from robustdiff.config import check_corruptions
    from robustdiff.dirty_copy import write_dirty_copy
    from robustdiff.images import load_images

    settings: dict[str, Any] = {
        "resolution": config.resolution,
        "max_bad_fraction": config.max_bad_fraction,
        "max_memory": None if config.max_memory_gib is None else int(config.max_memory_gib * 2**30),
        "split": config.split,
        "config": config.dataset_config_name,
        "image_column": config.image_column,
    }
    poison = None
    if config.poison is None:
        images = load_images(config.source, **settings)
    else:
        from robustdiff.poisoning import load_poison

        _quiet_libraries()
        images, poison = load_poison(config, **settings)
    corruptions, target = check_corruptions(config.corrupt), Path(config.destination)
    manifest = write_dirty_copy(images, target, corruptions, config.seed, overwrite=config.overwrite, poison=poison)
    hit = sum(bool(image["corruptions"] or image.get("poison")) for image in manifest["images"])
    print(f"{config.destination}: {len(images)} images, {hit} of them dirty (see manifest.json)")
    return 0


def _purify(config: PurifyConfig) -> int:
    from robustdiff.purified_files import purify_to_files, summary

    _quiet_libraries()
    print(summary(purify_to_files(config), str(config.output)))
    return 0


def _reproduce(config: ReproduceConfig) -> int:
    from concurrent.futures.process import BrokenProcessPool

    from robustdiff.reproduce.command import RowFailed, reproduce
    from robustdiff.stopping import Interrupted

    _quiet_libraries()
    try:
        page = reproduce(config)
    except Interrupted as stop:
        return _fail(str(stop), stop.status)
    except BrokenProcessPool:
        return _fail(
            "a worker process died (out of memory?): run again with fewer --workers; finished rows are kept", 1
        )
    except ArithmeticError as error:
        return _fail(f"training failed: {error}; finished rows are kept", 1)
    except RowFailed as error:
        return _fail(f"{error}; finished rows are kept, the same command tries again", 1)
    if page is not None:
        print(page)
    return 0
