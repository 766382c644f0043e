"""`robustdiff report`: run folders to one page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from robustdiff.commands.flags import Say
from robustdiff.utils.options import OptionalText, Settings, require


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Make one HTML page of any number of run folders: it needs no network and no other file."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")] = ()
    """Folders that `train`, `evaluate` or `audit` wrote, at least one."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE")] = "report.html"
    """File to write; replaced if it is there."""
    title: OptionalText = None
    """Heading of the page. Default: the names of the runs."""

    def validate(self) -> None:
        """Check that something is named.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        require(bool(self.runs) and "" not in self.runs, "report needs at least one RUN: name a run folder")
        require(self.output != "", "`output` is empty: name a file, such as report.html")
        require(self.title != "", "`title` is empty: give a text, or leave the flag out")


def run(config: ReportConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.report import report

    say(str(report(config.runs, config.output, config.title)))
    return 0
