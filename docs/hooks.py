"""What `mkdocs build` makes itself: the API reference by room, the command line, and links that leave this folder.

The reference follows the stubs: every name that a room's ``__init__.pyi`` exports is shown, in its order, so a new
public name needs no entry anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOMS = ("losses", "audit", "training", "data", "diffusion", "evaluation", "attacks", "report")
WIDTH = "100"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the reference."""
    pages = {"robustdiff": top_page(), "commands": command_page()} | {room: room_page(room) for room in ROOMS}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository that are no pages become their names."""

    def name(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        return match[0] if path.startswith("docs/") else f"{match[1]} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\.[^)#]*)(?:#[^)]*)?\)", name, markdown)


def exported(stub: Path) -> list[tuple[str, str]]:
    """What a stub exports, in its order: the name, and the dotted path of what it is."""
    package = ".".join(stub.parent.relative_to(ROOT / "src").parts)
    names = []
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            module = f"{package}.{node.module}" if node.module else package
            names += [(alias.name, f"{module}.{alias.name}") for alias in node.names if alias.asname]
    return names


def room_page(room: str) -> str:
    """The page of one room: its docstring, then every public name."""
    package = ROOT / "src" / "robustdiff" / room
    if not (package / "__init__.pyi").is_file():
        return f"# robustdiff.{room}\n\n::: robustdiff.{room}\n"
    text = f"# robustdiff.{room}\n\n{ast.get_docstring(ast.parse((package / '__init__.py').read_text()))}\n"
    return text + "".join(f"\n::: {path}\n" for _, path in exported(package / "__init__.pyi"))


def top_page() -> str:
    """What ``from robustdiff import`` gives, each with a link to its room."""
    text = "# robustdiff\n\nWhat `from robustdiff import ...` gives; each is described with its room.\n\n"
    for name, path in exported(ROOT / "src" / "robustdiff" / "__init__.pyi"):
        room = path.removeprefix("robustdiff.")
        text += f"* [`{name}`]({room}.md)\n" if room in ROOMS else f"* [`{name}`][{path}]\n"
    return text


def command_page() -> str:
    """Help of every command, as it is printed."""
    from robustdiff.commands.main import COMMANDS, main

    os.environ["COLUMNS"] = WIDTH
    text = "# Command line\n\n"
    for name in ("", *COMMANDS):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main([*name.split(), "--help"])
        text += f"## robustdiff {name}\n\n```text\n{printed.getvalue().strip()}\n```\n\n"
    return text
