"""The parts of an audit, by name; light, so that the command line can list them."""

from __future__ import annotations

from typing import Literal, get_args

AutoPart = Literal["holes", "noise", "blur", "jpeg", "outliers", "duplicates", "regulariser"]
"""What ``--auto`` looks for and acts on."""


AUTO_PARTS: tuple[AutoPart, ...] = get_args(AutoPart)
