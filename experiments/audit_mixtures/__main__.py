"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

import experiments.audit_mixtures as package
from experiments.audit_mixtures import tables
from experiments.audit_mixtures.measuring import known, run
from experiments.audit_mixtures.sets import plan
from experiments.picture_sets import KINDS
from robustdiff.utils.errors import DataError


def main() -> None:
    """Measure what is missing, and print the tables of the scale."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.audit_mixtures",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", action="append", type=Path, default=[], help="photographs (repeatable)")
    parser.add_argument("--scale", choices=("small", "full"), default="small", help="10 rows or so, or all")
    parser.add_argument("--rows", default="*", help="only rows whose name has this in it; * and ? stand for anything")
    parser.add_argument("--workers", type=int, default=1, help="rows measured at once, one thread each")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and end")
    parser.add_argument("--output", type=Path, default=Path("audit_mixtures.json"), help="JSON file; goes on with it")
    arguments = parser.parse_args()
    folders = {path.resolve().name: path for path in arguments.data}
    if len(folders) < len(arguments.data) or set(folders) & set(KINDS):
        raise SystemExit(f"--data: folders need different names, and none of {', '.join(KINDS)}")
    if arguments.workers < 1:
        raise SystemExit(f"--workers must be at least 1, got {arguments.workers}")
    try:
        planned = plan(folders, arguments.scale)
    except DataError as error:
        raise SystemExit(f"--data {error}") from None
    rows = [row for row in planned if fnmatch(row.name, f"*{arguments.rows}*")]
    if not rows:
        raise SystemExit(f"--rows {arguments.rows}: no row has that in its name; --list prints them")
    there = {one["name"] for one in known(arguments.output)}
    missing = [row for row in rows if row.name not in there]
    if arguments.list:
        print("\n".join(row.name if row in missing else f"{row.name} (done)" for row in rows))
        return
    failed = run(missing, folders, arguments.output, arguments.workers)
    place = {row.name: number for number, row in enumerate(rows)}
    shown = sorted((one for one in known(arguments.output) if one["name"] in place), key=lambda one: place[one["name"]])
    print(tables.everything(shown))
    if failed:
        raise SystemExit(f"{len(failed)} rows failed; the same command tries them again: {', '.join(failed)}")


if __name__ == "__main__":
    main()
