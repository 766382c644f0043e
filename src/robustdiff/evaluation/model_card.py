"""The model card's account of what was measured, from the JSON files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

UNMEASURED = " Quality, diversity and copying have not been measured."
"""What a fresh card ends with."""
BEGIN, END = "<!-- measured -->", "<!-- end measured -->"
_REGION = re.compile(f"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n?", re.DOTALL)


def fill_card(folder: Path) -> bool:
    """Write the results of ``folder/evaluation/*.json`` into ``folder/README.md``, in place of earlier ones.

    Args:
        folder: A run folder.

    Raises:
        UsageError: If a result cannot be read; the card is as it was.

    Returns:
        Whether there was a card to fill: one that ``train`` wrote, or that was filled before.
    """
    card = folder / "README.md"
    lines = []
    for path in sorted((folder / "evaluation").glob("*.json")):
        try:
            result = atomic_io.read_json(path)
            lines += _rows(result) if result.get("kind") in ("quality", "memorisation") else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{path} is no result ({atomic_io.one_line(error)}): delete it, and evaluate again"
            ) from None
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if not lines or (UNMEASURED not in text and BEGIN not in text):
        return False
    body = "\n".join(
        [
            BEGIN,
            "",
            "## Measured",
            "",
            "| metric | value | floor (real against real) | n | reference | extractor | sampler |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            "Never compare across extractors, n or references. What each number rests on: `evaluation/*.json`.",
            "",
            END,
        ]
    )
    text = _REGION.sub("\n", text.replace(UNMEASURED, "")).rstrip() + f"\n\n{body}\n"
    atomic_io.write_text(card, text)
    return True


def _rows(result: Mapping[str, Any]) -> list[str]:
    protocol = result["protocol"]
    sampler, extractor = protocol["sampler"], protocol["extractor"]
    drawn = f"{sampler['scheduler']}, {sampler['steps']} steps" if sampler else "images as given"
    beside = protocol["training"] if result["kind"] == "memorisation" else protocol["reference"]
    name = f"{extractor['name']} {(extractor['sha256'] or '')[:8]}".strip()
    lines = []
    for metric, value in result["values"].items():
        floor = "" if value["floor"] is None else f"{value['floor']:.4g}"
        shown = f"{value['value']:.4g}"
        if value["interval"]:
            shown += f" ({value['interval'][0]:.4g} to {value['interval'][1]:.4g})"
        cells = (metric, shown, floor, protocol["n_generated"], beside["source"], name, drawn)
        lines.append(f"| {' | '.join(_escape(str(cell)) for cell in cells)} |")
    return lines


def _escape(text: str) -> str:
    return re.sub(r"([|<`\\])", r"\\\1", " ".join(text.split()))
