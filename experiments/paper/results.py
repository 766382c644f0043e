"""``results/*.json``: reading rows, what each measure means, numbers as text, which value is best.

Rows are grouped by place: their world, or ``invariance-WORLD`` for the experiment ``invariance``, or
``linear-gaussian``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.paper.image_grid_spec import IMAGE_DIRTS, IMAGE_METHODS, IMAGE_WORLDS
from experiments.paper.toy_grid import DIRTS, FRONTIER, INVARIANCE, MAIN, METHODS
from robustdiff.utils.atomic_io import one_line, read_json
from robustdiff.utils.errors import UsageError

Row = dict[str, Any]
"""One results file, and its name under ``file``."""


class Measure(NamedTuple):
    """A measure's name, unit, and what is good: higher (True), lower (False), 1 ("one"); None: not judged."""

    name: str
    unit: str
    higher_is_better: bool | Literal["one"] | None


MEASURES: Mapping[str, Measure] = {
    "w2": Measure("Wasserstein-2", "data units", False),
    "w2_in_plane": Measure("Wasserstein-2 in the plane", "data units", False),
    "distance": Measure("distance to the plane, rms", "data units", False),
    "coverage": Measure("coverage of the square", "share", True),
    "spurious": Measure("spurious mass", "share", False),
    "spread": Measure("spread about the modes", "true = 1", "one"),
    "score_error": Measure("error of the predicted noise, rms", "noise = 1", False),
    "modes": Measure("modes held", "share", True),
    "frechet": Measure("Frechet distance", "squared data units", False),
    "off_subspace": Measure("energy off the subspace", "per pixel", False),
    "psnr": Measure("PSNR against the projection", "dB", True),
    "variance_low": Measure("least variance ratio", "true = 1", "one"),
    "variance_high": Measure("largest variance ratio", "true = 1", "one"),
    "variance_mean": Measure("mean variance ratio", "true = 1", "one"),
    "variance_large": Measure("variance ratio, largest direction", "true = 1", "one"),
    "variance_small": Measure("variance ratio, smallest direction", "true = 1", "one"),
    **{
        f"sd_{size}{kind}": Measure(f"sd, {size} direction{text}", "data units", None)
        for size in ("large", "small")
        for kind, text in (("_true", ", true"), ("", ", generated"), ("_predicted", ", predicted"))
    },
    "noise_gain": Measure("share of the noise reported", "at sigma/alpha = 10", None),
    "noise_gain_predicted": Measure("the same, predicted", "at sigma/alpha = 10", None),
    "precision": Measure("precision", "share", True),
    "recall": Measure("recall", "share", True),
    "density": Measure("density", "", None),
    "coverage_of_real": Measure("coverage", "share", True),
    "diversity": Measure("diversity", "real = 1", "one"),
    "near-copies": Measure("near-copies", "share", False),
    "noise": Measure("blind noise estimate", "[-1, 1]", None),
    "image_spread": Measure("spread of the pixels", "real = 1", "one"),
    "predicted": Measure("predicted", "", None),
    "measured": Measure("measured", "", None),
    "relative_error": Measure("relative error", "", None),
}
"""Keys of ``values``; a key that is not here is shown by its own name and not judged."""
EVALUATED: Mapping[str, Measure] = {
    "FD": Measure("Frechet distance", "", False),
    "KID": Measure("kernel distance", "", False),
}
"""Distances of ``robustdiff evaluate``, before the dash; what follows is the extractor."""
YARDSTICKS = ("clean-subset", "ideal", "told")
"""Methods that were told which data are clean or how noisy, or the law itself: shown, neither best nor a tie."""
LINEAR = "linear-gaussian"
_NEEDED: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("experiment", "title", "what", "told", "version", "hardware", "torch"), str),
    **dict.fromkeys(("settings", "values", "floor", "curves"), dict),
    **{"seeds": list, "n": int, "seconds": (int, float)},
}
_ORDER = {name: i for i, name in enumerate(dict.fromkeys([*METHODS, *INVARIANCE, *FRONTIER]))}
_IMAGE_ORDER = {name: i for i, name in enumerate(IMAGE_METHODS)}
_DIRT_ORDER = {name: i for i, name in enumerate(dict.fromkeys([*DIRTS, *IMAGE_DIRTS]))}


# -- reading ---------------------------------------------------------------------------------------------


def load(folder: Path) -> list[Row]:
    """Every row in a folder, in the order of ``toy_grid.METHODS``.

    Args:
        folder: With one JSON file per row.

    Raises:
        UsageError: In one line that names the file, if one is not a row; or if there are none, or two of the same name.
    """
    rows: list[Row] = []
    names: dict[tuple[str, ...], str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            row = read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read: {one_line(error)}; delete it and run the row again") from None
        if wrong := _wrong(row):
            raise UsageError(f"{path} is not a row of results: {wrong}; delete it and run the row again")
        if earlier := names.get(key_of(row)):
            raise UsageError(f"{path} and {earlier} hold the same row ({' '.join(key_of(row))}): delete one of them")
        names[key_of(row)] = path.name
        rows.append({**row, "file": path.name})
    if not rows:
        raise UsageError(f"{folder} holds no results: run `python -m experiments.paper NAME` first")
    places = {
        place: i for i, place in enumerate([*MAIN, *(f"invariance-{world}" for world in MAIN), *IMAGE_WORLDS, LINEAR])
    }
    rows.sort(
        key=lambda row: (
            places.get(place_of(row), 99),
            dirt_rank(row.get("dirt", "")),
            method_rank(row),
            _claim_rank(row),
        )
    )
    return rows


def _wrong(row: Row) -> str:
    """What keeps this from being a row, or an empty text."""
    if row.get("format") != 1:
        return f"format is {row.get('format')!r:.40} instead of 1"
    linear = row.get("experiment") == LINEAR
    for key, kind in {**_NEEDED, **dict.fromkeys(("claim",) if linear else ("world", "dirt", "method"), str)}.items():
        if key not in row:
            return f"it has no {key!r}"
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            return f"{key!r} is {row[key]!r:.40}"
    known = (*MAIN, *IMAGE_WORLDS)
    if not linear and row["world"] not in known:
        return f"its world is {row['world']!r:.40}, not one of {', '.join(known)}"
    if not linear and row["world"] in IMAGE_WORLDS and not isinstance(row.get("main"), str):
        return "it has no 'main'"
    for group in ("values", "floor"):
        for key, value in row[group].items():
            if not isinstance(value, dict) or not all(_number(value.get(name)) for name in ("mean", "sd")):
                return f"{group}[{key!r}] has no mean"
            if value.get("mean") is None:
                return f"{group}[{key!r}] has no mean"
    main = main_of(row)
    return "" if main in row["values"] else f"values has no {main!r}"


def _number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def place_of(row: Row) -> str:
    """Its world, ``invariance-WORLD``, or ``linear-gaussian``."""
    if row["experiment"] == LINEAR:
        return LINEAR
    world: str = row["world"]
    return f"invariance-{world}" if row["experiment"] == "invariance" else world


def key_of(row: Row) -> tuple[str, ...]:
    """What tells it from every other row: place, dirt and method; of the closed forms, the claim."""
    return (LINEAR, row["claim"]) if row["experiment"] == LINEAR else (place_of(row), row["dirt"], row["method"])


def dirt_rank(dirt: str) -> int:
    """Place of a kind of dirt in the order of ``toy_grid.DIRTS``; unknown kinds come last."""
    return _DIRT_ORDER.get(dirt, len(_DIRT_ORDER))


def method_rank(row: Row) -> int:
    """Place of a row's method in the order of ``toy_grid.METHODS``, or of the image grid's; unknown ones come last."""
    if row.get("world") in IMAGE_WORLDS:
        return _IMAGE_ORDER.get(row.get("method", ""), len(_IMAGE_ORDER))
    return _ORDER.get(row.get("method", ""), len(_ORDER))


def _claim_rank(row: Row) -> int:
    """T3 before T10."""
    return int("0" + "".join(filter(str.isdecimal, row.get("claim", ""))))


def main_of(row: Row) -> str:
    """The measure that rows of its place are ranked by."""
    main: str = "measured" if row["experiment"] == LINEAR else row.get("main") or MAIN[row["world"]]
    return main


def measure(key: str) -> Measure:
    """What a key of ``values`` means; that of an evaluation carries its extractor, as ``FD-pixels`` or ``FID``."""
    if key in MEASURES:
        return MEASURES[key]
    metric, dash, extractor = key.partition("-")
    if (metric in EVALUATED and dash) or key in ("FID", "KID"):
        name, unit, better = EVALUATED["FD" if key == "FID" else metric]
        return Measure(f"{name}, {extractor}" if dash else key, unit, better)
    return Measure(key, "", None)


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, standard deviation (None for one seed) and every seed's value, by measure."""
    found = {}
    for key in runs[0]:
        each = [run[key] for run in runs]
        sd = statistics.stdev(each) if len(each) > 1 else None
        found[key] = {"mean": statistics.fmean(each), "sd": sd, "per_seed": each}
    return found


# -- numbers ---------------------------------------------------------------------------------------------


def marks(values: Sequence[Mapping[str, Any] | None], better: bool | Literal["one"] | None) -> list[str]:
    """Mark "best", "tie" or "" for each value of a column.

    A tie is a difference to the best that is not larger than the larger standard deviation of the two; a value of one
    seed counts with the largest deviation of the column. A column with one value, or of no judged measure, has none.

    Args:
        values: With ``mean`` and ``sd``; None: not in the comparison.
        better: As in :class:`Measure`.
    """
    judged = [value for value in values if value]
    if better is None or len(judged) < 2:
        return [""] * len(values)

    def loss(value: Mapping[str, Any]) -> float:
        mean = float(value["mean"])
        return abs(mean - 1) if better == "one" else -mean if better else mean

    widest = max((value["sd"] for value in judged if value.get("sd") is not None), default=0.0)
    best = min(judged, key=loss)

    def mark(value: Mapping[str, Any] | None) -> str:
        if not value:
            return ""
        if loss(value) == loss(best):
            return "best"
        limit = max(widest if v.get("sd") is None else v["sd"] for v in (value, best))
        return "tie" if loss(value) - loss(best) <= limit * (1 + 1e-9) else ""

    return [mark(value) for value in values]
