"""The ``robustdiff`` command: flags in, one line per error out; everything else is imported when it is needed.

Every way in which a command can fail stands here; what a command does stands in its own file.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from types import TracebackType
from typing import Any

import tyro

from robustdiff import __version__
from robustdiff.attacks.config import AttackConfig, CorruptConfig, PurifyConfig
from robustdiff.commands import attack, audit, corrupt, evaluate, purify, report, sample, train
from robustdiff.commands.audit import AuditConfig
from robustdiff.commands.console import fail, show_warning
from robustdiff.commands.flags import Say, Speak, flags, speak
from robustdiff.commands.report import ReportConfig
from robustdiff.data.corruption import help_text
from robustdiff.diffusion.config import SampleConfig
from robustdiff.evaluation.config import EvaluateConfig
from robustdiff.training.config import TrainConfig
from robustdiff.utils.errors import TrainingError, UsageError
from robustdiff.utils.resources import is_out_of_memory, processes
from robustdiff.utils.signals import Interrupted


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its settings, what it does with them, and what people are told when it fails.

    Attributes:
        config: Dataclass of the settings, with ``validate()``.
        run: Takes the settings, and what prints a text; returns the exit status.
        memory_remedy: What to do when memory runs out.
        goes_on: How to go on when the disk was full.
        aliases: Settings by the names that the library gives them, where those differ.
    """

    config: type
    run: Callable[[Any, Say], int]
    memory_remedy: str
    goes_on: str = "a training run goes on with --resume, or begins anew with --overwrite if it has no checkpoint yet"
    aliases: Mapping[str, str] = field(default_factory=dict)


COMMANDS: dict[str, Command] = {
    "train": Command(
        TrainConfig,
        train.run,
        "lower --train-batch-size (--gradient-accumulation-steps makes up for it), or take a smaller --network or "
        "--resolution; with worker processes, fewer --dataloader-num-workers",
        aliases={"extractor": "evaluate_extractor", "batch_size": "eval_batch_size"},
    ),
    "sample": Command(SampleConfig, sample.run, "lower --batch-size"),
    "evaluate": Command(EvaluateConfig, evaluate.run, "lower --batch-size, or -n"),
    "attack": Command(
        AttackConfig,
        attack.run,
        "lower --batch-size or --workers, or add --gradient-checkpointing always",
        "the same command goes on",
    ),
    "report": Command(ReportConfig, report.run, "take fewer runs"),
    "audit": Command(AuditConfig, audit.run, "close other programs, or take a smaller part of the data"),
    "corrupt": Command(
        CorruptConfig, corrupt.run, "lower --resolution, or with --poison --batch-size", aliases={"model": "poison"}
    ),
    "purify": Command(PurifyConfig, purify.run, "lower --batch-size"),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXT = "No space left on device|quota exceeded|File too large"
PARTED = (
    "connection closed by peer|connection reset by peer|socket closed|broken pipe|remote process exited|"
    "communicator was aborted"
)
"""How a process notices that another one has gone; whatever else its network says is shown whole."""
DESCRIPTION = "Train diffusion models that stay clean when their training images are not."


def main(
    argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS, prog: str = "robustdiff"
) -> int:
    """Run the command.

    Args:
        argv: Its arguments. Default: those of the process.
        commands: By name; one alone takes its flags without being named.
        prog: What help calls it.

    Returns:
        The exit status: 0 done, 1 training failed, 2 wrong usage, 75 out of ``--minutes``, 130 stopped by Ctrl-C,
        143 by SIGTERM. One process of several that fails ends at once with its status, so that its launcher ends the
        others.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = arguments if len(commands) > 1 else [*commands, *arguments]
    speak = _speech(arguments, commands)
    with warnings.catch_warnings(), _last_words(speak):
        warnings.showwarning = partial(show_warning, speak)
        status = _guarded(arguments, commands, prog, speak)
    if status and processes() > 1:  # the interpreter's end would wait for processes that wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _speech(arguments: list[str], commands: Mapping[str, Command]) -> Speak:
    """What turns parameters into flags of the command at hand; if there is none, names stay as they are."""
    command = commands.get(arguments[0]) if arguments else None
    if command is None:
        return str
    return speak(command.config, command.aliases, (other.config for other in commands.values()))


@contextlib.contextmanager
def _last_words(speak: Speak) -> Iterator[None]:
    """One line also where the process ends while its main thread hangs, see :func:`stop_signals`."""
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, Interrupted):
            fail(speak(str(error)), error.status)
        else:
            before(kind, error, trace)

    sys.excepthook = tell
    try:
        yield
    finally:
        sys.excepthook = before


def _guarded(arguments: list[str], commands: Mapping[str, Command], prog: str, speak: Speak) -> int:
    def say(text: str) -> None:
        print(speak(text), flush=True)

    try:
        status = _main(arguments, commands, prog, say)
        sys.stdout.flush()  # a reader that has gone is noticed here, not at the interpreter's end
        return status
    except UsageError as error:
        return fail(speak(str(error)), 2)
    except TrainingError as error:
        return fail(speak(str(error)), 1)
    except Interrupted as stop:
        return fail(speak(str(stop)), stop.status)
    except KeyboardInterrupt:
        lost = "; nothing since the last checkpoint was saved" if arguments[:1] == ["train"] else ""
        return fail(f"stopped at once{lost}", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `robustdiff ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            return fail(f"out of memory: {commands[arguments[0]].memory_remedy}", 2)
        if getattr(error, "errno", None) in FULL or re.search(FULL_TEXT, str(error), re.IGNORECASE):
            goes_on = commands[arguments[0]].goes_on
            return fail(f"no space left on the device: free some, or write elsewhere; {goes_on}", 2)
        if isinstance(error, OSError) and error.filename is not None:
            return fail(f"cannot read or write {error.filename}: {error.strerror}; name another file or folder", 2)
        if processes() > 1:
            if re.search(PARTED, str(error), re.IGNORECASE):
                return fail("another process stopped: see its message", 1)
            traceback.print_exc()
            return 1
        raise


def _main(arguments: list[str], commands: Mapping[str, Command], prog: str, say: Say) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"robustdiff {__version__}")
        return 0
    config = parse(arguments, commands, prog)
    if config is None:
        return 0
    config.validate()
    return commands[arguments[0]].run(config, say)


# -- flags -------------------------------------------------------------------------------------------


def parse(arguments: list[str], commands: Mapping[str, Command] = COMMANDS, prog: str = "robustdiff") -> Any | None:  # noqa: ANN401 - a command's dataclass
    """The command's configuration, or None if help was asked for and printed.

    Raises:
        UsageError: One line for anything that cannot be parsed.
    """
    arguments = _positional_data(arguments)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if len(commands) == 1:
                return tyro.cli(commands[arguments[0]].config, prog=prog, args=arguments[1:])
            configs: dict[str, Callable[..., Any]] = {name: command.config for name, command in commands.items()}
            return tyro.extras.subcommand_cli_from_dict(configs, prog=prog, description=DESCRIPTION, args=arguments)
    except SystemExit as stop:
        if not stop.code:
            if "corrupt" in arguments[:1]:
                print(f"kinds of dirt, for --corrupt:\n{help_text()}")
            return None
    raise UsageError(_one_line(errors.getvalue(), arguments, commands, prog))


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
    """Every flag of a command, as typed; what is given by its place has none."""
    found = []
    for one in dataclasses.fields(command):
        if "Positional" not in str(one.type):
            found.append("--" + one.name.replace("_", "-"))
        found += re.findall(r"['\"](--?[a-z][\w-]*)['\"]", str(one.type))
    return found


def _one_line(text: str, arguments: list[str], commands: Mapping[str, Command], prog: str) -> str:
    """One sentence: the nearest name for a misspelt command or flag, else tyro's own words without their box."""
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is None:
        return f"name a command: {', '.join(commands)} (see {prog} --help)"
    if command not in commands:
        return f"{command!r} is no command{_nearest(command, list(commands))}; there are {', '.join(commands)}"
    called = f"{prog} {command}" if len(commands) > 1 else prog
    help_hint = f" (see {called} --help)"
    config = commands[command].config
    typed = known_flags(config)
    switches = [f"--no-{one.name.replace('_', '-')}" for one in dataclasses.fields(config) if str(one.type) == "bool"]
    known = {flag.replace("_", "-") for flag in (*typed, *switches)}
    for argument in arguments[arguments.index(command) + 1 :]:
        name = argument.split("=")[0]
        if re.match("--?[a-zA-Z]", name) and name.replace("_", "-") not in known:
            place = _places(config).get(name.lstrip("-").replace("-", "_"))
            other = f"; {place} is given without one" if place else _nearest(name.replace("_", "-"), typed)
            return f"{command} has no flag {name}{other}{help_hint}"
    plain = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", "", text)  # colours, where stdout is a terminal
    words = " ".join(word for word in plain.strip().partition("\n")[2].split() if word.strip("+|-"))  # not the title
    # the last one: tyro thinks of the flags of other commands
    said = re.split("Argument helptext|For full helptext|Expected 1 values|Perhaps you meant", words)[0]
    if said.startswith("Missing from"):
        needed = {f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING}
        names = [place for name, place in _places(config).items() if name in needed]
        return f"{command} needs {' '.join(names)}{help_hint}"
    if wrong := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of (.*)", said):
        choices = sorted({*re.findall(r"[\w-]+", wrong[3])} - {"None"})
        return f"{wrong[2]} {wrong[1]!r} is not one of {', '.join(choices)}{_nearest(wrong[1], choices)}{help_hint}"
    if wrong := re.match(r"Error parsing (\S+): .*(int\(\)|float).*?: '(.*)'", said):
        return f"{wrong[1]} {wrong[3]!r} is not a {'whole ' if wrong[2] == 'int()' else ''}number{help_hint}"
    return f"{command}: {said.strip()}{help_hint}"


def _places(config: type) -> dict[str, str]:
    """What is given by its place, as help calls it: DATA, MODEL ..., by the names of the settings."""
    return {name: shown for name, shown in flags(config).items() if not shown.startswith("-")}


def _nearest(word: str, choices: list[str]) -> str:
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
