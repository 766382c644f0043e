"""Class labels from values of any type, as tables, arrays and metadata files hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.sources.base import by_name

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y")
"""Columns of numbers or text that are taken for labels unasked; others may be captions or file names."""

Labels = tuple[tuple[str, ...], "list[int | None] | None", str]
"""Names of the classes; each image's place among them; why there are none."""


def from_values(values: Sequence[Any], what: str) -> Labels:
    """Labels of values, one per image: text, or whole numbers of any type; a gap is None, "", -1 or not a number.

    Args:
        values: The values.
        what: Where they are from, as in "column label".

    Returns:
        No labels, and why, if a value is something else.
    """
    plain = [_plain(value) for value in values]
    strange = next((value for value, one in zip(values, plain, strict=True) if isinstance(one, _Strange)), None)
    if strange is not None:
        return (), None, f"{what} holds {strange!r:.40}: a label is a whole number or a text"
    known = [value for value in plain if value is not None]
    if len({type(value) for value in known}) > 1:
        known = [str(value) for value in known]
    classes, places = by_name(known)
    rest = iter(places)
    return classes, [None if value is None else next(rest) for value in plain], ""


def may_be(shape: tuple[int, ...], dtype: np.dtype[Any], images: tuple[int, ...]) -> bool:
    """Whether an array is of a shape and type that labels of an array of images can have."""
    return dtype.kind in "biufUSO" and shape[:1] == images[:1] and len(shape) in (1, 2)


def from_array(array: NDArray[Any], what: str) -> Labels:
    """Labels of an array: (N,) or (N, 1), or one-hot (N, K), of whole numbers of any type, or of text."""
    if array.ndim == 2 and array.shape[1] > 1:
        if array.dtype.kind in "US" or not (np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all()):
            return (), None, f"{what} of shape {array.shape} is not one-hot: each row must hold one 1 and else 0"
        return tuple(map(str, range(array.shape[1]))), array.argmax(1).tolist(), ""
    return from_values(array.reshape(-1).tolist(), what)


class _Strange:
    """What can be no label."""


def _plain(value: Any) -> int | str | _Strange | None:  # noqa: ANN401 - whatever a file holds
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None or value in ("", -1) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return _Strange()


def label_column(columns: Sequence[str]) -> str | None:
    """The column that is taken for labels unasked: the only one called so."""
    named = [name for name in columns if name.lower() in LABEL_COLUMNS]
    return named[0] if len(named) == 1 else None
