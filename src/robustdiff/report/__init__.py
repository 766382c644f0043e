"""Runs side by side on one page that needs nothing else.

Reading order: ``collecting`` (what lies in the run folders), ``comparing`` (what may stand in one column, what is best,
what is a tie), ``charts`` (inline SVG), ``page``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from robustdiff.report.collecting import collect
from robustdiff.report.page import render
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

__all__ = ["collect", "render", "report"]


def report(folders: Iterable[str | Path], output: str | Path = "report.html", title: str | None = None) -> Path:
    """Write the page of some run folders; replaces an earlier one.

    Args:
        folders: Run folders.
        output: The file; its folder is made if it is missing.
        title: Its heading. Default: the names of the runs.

    Returns:
        The file.

    Raises:
        UsageError: In one line, if a folder or a file in it cannot be used, or ``output`` is a folder.
    """
    output = Path(output)
    if output.is_dir():
        raise UsageError(f"`output` {output} is a folder: name a file, as in `output` {output / 'report.html'}")
    text = render(collect(folders), title, beside=output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.write_text(output, text)
    return output
