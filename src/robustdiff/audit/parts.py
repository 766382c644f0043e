"""The parts of an audit that can be left out, by name: every kind of damage that is acted on, and the regulariser."""

from __future__ import annotations

from collections.abc import Sequence

REGULARISER = "regulariser"
"""What ``auto`` does where no image can be trusted."""


def parts() -> tuple[str, ...]:
    """Names that ``auto_without`` takes."""
    from robustdiff.audit.detector import registered_detectors  # which import torch

    return (*(kind.name for kind in registered_detectors() if kind.acts), REGULARISER)


def check_parts(without: Sequence[str]) -> None:
    """Check names of parts.

    Raises:
        ValueError: If one is unknown.
    """
    if without and (unknown := [name for name in without if name not in parts()]):
        raise ValueError(f"{', '.join(unknown)}: not one of {', '.join(parts())}")
