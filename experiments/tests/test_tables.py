"""Rows to tables and to the page: what is best, what ties, what is told.

Long, because all read the same hand-made rows.
"""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.paper import tables
from experiments.paper.results import MEASURES, marks
from experiments.paper.toy_grid import MAIN
from robustdiff.report.numbers import number, spread
from robustdiff.utils.errors import UsageError


def value(mean: float, sd: float | None = 0.001) -> dict:
    return {"mean": mean, "sd": sd, "per_seed": [mean]}


def row(method: str, dirt: str = "inlier", w2: float = 0.1, sd: float | None = 0.001, **more) -> dict:
    world = more.pop("world", "plane")
    values = more.pop("values", {MAIN[world]: value(w2, sd)})
    return {
        "format": 1, "experiment": "plane", "world": world, "dirt": dirt, "dirt_spec": [], "method": method,
        "title": method.replace("-", " "), "what": f"what {method} does", "told": "nothing", "family": None,
        "settings": {"m": 20.0}, "seeds": [0, 1, 2] if sd is not None else [0], "n": 2000, "values": values,
        "floor": {key: value(0.02, 0.002) for key in values}, "curves": {}, "seconds": 1.5, "version": "0.1.0",
        "hardware": "cpu, 1 thread", "torch": "2.13.0", "file": f"{world}-{dirt}-{method}.json", **more,
    }  # fmt: skip


def claim(name: str, **more) -> dict:
    values = {"predicted": value(0.5, None), "measured": value(0.51, None), "relative_error": value(0.02, None)}
    both = {"m = 1: predicted": [0.5, 0.4], "m = 1: measured": [0.51, 0.4]}
    made = row("x", values=values) | {"experiment": "linear-gaussian", "claim": name, "curves": both, "seeds": [0]}
    for key in ("world", "dirt", "method", "dirt_spec"):
        del made[key]
    return made | {"file": f"{name}.json"} | more


ROWS = [
    row("plain", "clean", 0.03),
    row("plain", "inlier", 0.31, 0.01),
    row("gated-low", "clean", 0.04, None),
    row("gated-low", "inlier", 0.0712, 0.0031, curves={"calls": [1000, 20], "error_by_calls": [0.07, 0.125]}),
    row("label-floor", "inlier", 0.0731, 0.001),
    row("clean-subset", "inlier", 0.031, 0.001, told="which points are clean"),
]
SWEPT = [
    row(f"constant-m{m}", dirt, w2, None, family="constant")
    for m, price, error in ((1, 0.05, 0.2), (3, 0.09, 0.35), (9, 0.2, 0.05))
    for dirt, w2 in (("clean", price), ("inlier", error))
]


def write(folder: Path, *rows: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for r in rows:
        (folder / r["file"]).write_text(json.dumps({k: v for k, v in r.items() if k != "file"}))
    return folder


def cells(markdown: str, first: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


# -- numbers


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.07123, "0.0712"), (1, "1.00"), (12.34, "12.3"), (1234, "1230"), (0.0999999, "0.100"), (9.999, "10.0"),
     (0, "0"), (-0.5, "-0.500"), (1.23e-5, "1.23e-05"), (1e7, "1.00e+07"), (0.00012345, "0.000123")],
)  # fmt: skip
def test_numbers_have_three_digits(x: float, text: str) -> None:
    assert number(x) == text


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [(0.0712, 0.0031, "0.0712 ± 0.0031"), (0.0712, None, "0.0712"), (0.001, 0.05, "0.0010 ± 0.0500"),
     (12.3, 0.004, "12.3 ± 0.004"), (1.0, 0.0, "1.00 ± 0.00"), (0.0, 0.0, "0 ± 0"), (0.1004, 0.1003, "0.100 ± 0.100")],
)  # fmt: skip
def test_deviations_share_the_decimals(mean: float, sd: float | None, text: str) -> None:
    assert spread(value(mean, sd)) == text


# -- best and ties


def test_the_least_is_best_and_what_lies_within_the_larger_deviation_ties() -> None:
    assert marks([value(0.3, 0.01), value(0.07, 0.001), value(0.073, 0.003), value(0.0731, 0.003)], False) == [
        "", "best", "tie", "",
    ]  # fmt: skip
    assert marks([value(0.07, 0.004), value(0.073, 0.001)], False) == ["best", "tie"]  # the best one's own deviation


def test_the_direction_is_that_of_the_measure() -> None:
    values = [value(0.5), value(0.9), value(1.05), value(1.4)]
    assert marks(values, False) == ["best", "", "", ""]
    assert marks(values, True) == ["", "", "", "best"]
    assert marks(values, "one") == ["", "", "best", ""]
    assert marks(values, None) == [""] * 4


def test_one_seed_counts_with_the_largest_deviation_of_its_column() -> None:
    one = value(0.075, None)
    assert marks([value(0.07, 0.001), one], False) == ["best", ""]
    assert marks([value(0.07, 0.001), one, value(0.3, 0.005)], False) == ["best", "tie", ""]
    assert marks([value(0.07, None), one], False) == ["best", ""]  # nobody has one: only equals tie
    assert marks([None, value(0.07), None], False) == ["", "", ""]  # nothing to compare with


# -- tables


def test_a_table_has_the_floor_first_then_methods_by_dirt() -> None:
    text = tables.table(ROWS[::-1], "plane")
    lines = text.splitlines()
    header = "| method | told | seeds | clean: Wasserstein-2 (data units) ↓ | inlier: Wasserstein-2 (data units) ↓ |"
    assert lines[0] == header
    assert lines[2] == "| floor |  |  | 0.0200 ± 0.0020 | 0.0200 ± 0.0020 |"
    assert [line.split(" | ")[0][2:] for line in lines[3:7]] == ["plain", "gated low", "label floor", "clean subset"]
    assert cells(text, "plain") == ["plain", "nothing", "3", "**0.0300 ± 0.0010**", "0.310 ± 0.010"]
    assert cells(text, "gated low")[2:] == ["1/3", "0.0400 ¹", "**0.0712 ± 0.0031**"]
    assert cells(text, "label floor")[2:] == ["3", "-", "0.0731 ± 0.0010 (tie)"]
    assert cells(text, "clean subset")[1:] == ["which points are clean", "3", "-", "0.0310 ± 0.0010"]
    for note in ("the floor", "Bold: best", "(tie): differs", "¹ one seed", "not compared: clean subset"):
        assert note in lines[-1]


def test_footnotes_explain_only_what_is_shown() -> None:
    text = tables.table([row("plain", w2=0.3), row("gated-low", w2=0.1)], "plane")
    assert "Bold" in text
    assert not re.search(r"tie|¹|not compared", text)


def test_the_floor_is_that_of_most_seeds() -> None:
    few = row("plain", sd=None, floor={"w2": value(0.5, None)})
    assert "0.500" not in tables.table([few, ROWS[3]], "plane")
    assert cells(tables.table([few], "plane"), "floor")[-1] == "0.500 ¹"


def test_swept_rows_stay_out_of_the_tables() -> None:
    assert tables.table(ROWS + SWEPT, "plane") == tables.table(ROWS, "plane")


def test_a_detail_has_every_measure_marked_by_its_own_direction() -> None:
    a = row("plain", values={"w2": value(0.3), "coverage": value(0.9), "new_one": value(3.0)})
    b = row("gated-low", values={"w2": value(0.1), "coverage": value(0.5), "new_one": value(1.0)})
    text = tables.detail([a, b], "plane", "inlier")
    head = "| method | Wasserstein-2 (data units) ↓ | coverage of the square (share) ↑ | new_one |"
    assert text.splitlines()[0] == head
    assert cells(text, "plain") == ["plain", "0.300 ± 0.001", "**0.900 ± 0.001**", "3.00 ± 0.001"]
    assert cells(text, "gated low") == ["gated low", "**0.100 ± 0.001**", "0.500 ± 0.001", "1.00 ± 0.001"]


def test_a_frontier_table_marks_what_nothing_beats() -> None:
    text = tables.frontier_table(ROWS + SWEPT, "plane", "inlier")
    bold = re.findall(r"\*\*(.+?)\*\*", text)
    assert bold == ["constant m9", "plain", "gated low"]  # gated-low beats m1 and m3; nothing is cheaper than plain
    assert "clean subset" in text  # beside them, at plain's price
    assert cells(text, "- | clean subset")[2] == "0.0300 ± 0.0010"
    assert "label floor" not in text  # it has no clean row here


def test_linear_gaussian_has_predicted_beside_measured() -> None:
    text = tables.table([claim("T3"), claim("T10")], "linear-gaussian")
    assert text.splitlines()[0] == "| claim | what | predicted | measured | relative error |"
    assert cells(text, "T10")[2:] == ["0.500", "0.510", "0.0200"]
    assert cells(tables.detail([claim("T3")], "linear-gaussian", "T3"), "m = 1")[1:] == [
        "2",
        "0.450",
        "0.455",
        "0.0141",
    ]
    with pytest.raises(ValueError, match="no claim 'T4': there are T3"):
        tables.detail([claim("T3")], "linear-gaussian", "T4")


def test_the_invariance_experiment_keeps_apart_from_its_world() -> None:
    other = row("plain", "clean", 0.9, experiment="invariance")
    assert tables.table([*ROWS, other], "plane") == tables.table(ROWS, "plane")
    assert cells(tables.table([*ROWS, other], "invariance-plane"), "plain")[-1] == "0.900 ± 0.001"


def test_missing_rows_are_named() -> None:
    with pytest.raises(ValueError, match="no rows of 'ring': there are plane"):
        tables.table(ROWS, "ring")
    with pytest.raises(ValueError, match="no rows of 'plane outliers'"):
        tables.detail(ROWS, "plane", "outliers")


def test_what_breaks_a_table_is_escaped() -> None:
    text = tables.table([row("plain", title="a | b\n<b>*"), ROWS[3]], "plane")
    assert "| a \\| b \\<b>\\* |" in text


# -- files


def test_rows_are_loaded_in_the_order_of_the_methods(tmp_path: Path) -> None:
    loaded = tables.load(write(tmp_path / "results", *ROWS, claim("T10"), claim("T3")))
    assert [r["file"] for r in loaded] == [r["file"] for r in ROWS if r["dirt"] == "clean"] + [
        f"plane-inlier-{m}.json" for m in ("plain", "gated-low", "label-floor", "clean-subset")
    ] + ["T3.json", "T10.json"]
    assert loaded[0] == ROWS[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2 instead of 1"),
        ({"told": None}, "'told' is None"),
        ({"seeds": "012"}, "'seeds' is '012'"),
        ({"n": True}, "'n' is True"),
        ({"world": "moon"}, "its world is 'moon', not one of plane"),
        ({"values": {"distance": {"mean": 1.0}}}, "values has no 'w2'"),
        ({"values": {"w2": {"mean": "0.1"}}}, r"values\['w2'\] has no mean"),
        ({"values": {"w2": {"sd": 0.1}}}, r"values\['w2'\] has no mean"),
        ({"floor": {"w2": 0.1}}, r"floor\['w2'\] has no mean"),
        ({"experiment": "linear-gaussian"}, "it has no 'claim'"),
    ],
)
def test_a_file_that_is_no_row_is_named(tmp_path: Path, change: dict, message: str) -> None:
    folder = write(tmp_path / "results", ROWS[0], ROWS[1] | change)
    with pytest.raises(UsageError, match=rf"plane-inlier-plain\.json is not a row of results: {message}"):
        tables.load(folder)


@pytest.mark.parametrize("missing", ["format", "world", "settings", "values", "floor", "seconds", "hardware"])
def test_a_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    folder = write(tmp_path / "results", {k: v for k, v in ROWS[0].items() if k != missing})
    with pytest.raises(UsageError, match=missing):
        tables.load(folder)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "results", ROWS[0])
    (folder / "z.json").write_text('{"format": 1, "values": NaN}')
    with pytest.raises(UsageError, match=r"z\.json cannot be read: NaN is not JSON"):
        tables.load(folder)


def test_two_files_of_one_row_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "results", ROWS[0], ROWS[0] | {"file": "copy.json"})
    with pytest.raises(UsageError, match=r"plane-clean-plain\.json and copy\.json hold the same row"):
        tables.load(folder)
    with pytest.raises(UsageError, match="holds no results"):
        tables.load(tmp_path)


ALL = [*ROWS, *SWEPT, claim("T3")]


# -- page


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "plane-inlier-fields.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnot much")
    return path


def test_the_page_contains_every_row_and_asks_for_nothing(picture: Path) -> None:
    text = tables.page(ALL, [picture], "python -m experiments.paper plane", ["Quick run."])
    page = Reader(text)
    links = [
        attributes["href"] for tag, attributes in page.tags if tag == "a" and not attributes["href"].startswith("#")
    ]
    assert links == [f"results/{r['file']}" for r in ALL]
    assert [a["src"] for tag, a in page.tags if tag == "img"] == [
        "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    ]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//\w|@import|url\(", text.split("base64,")[0])
    for r in ALL:
        assert r["title"] in page.words
        assert r["what"] in page.words
    for word in ("Quick run.", "which points are clean", "0.0712 ± 0.0031", "m = 20.0", "plane inlier fields"):
        assert word in page.words, word


def test_the_page_marks_best_ties_floor_and_single_seeds() -> None:
    text = re.sub(r"\s+", " ", tables.page(ROWS, [], "t"))
    main = text[text.index("<tbody>") : text.index("</tbody>")]
    assert re.findall(r'class="number best">([^<]+)', main) == ["0.0300 ± 0.0010", "0.0712 ± 0.0031"]
    assert re.findall(r'class="number tie">([^<]+)', main) == ["0.0731 ± 0.0010 "]
    assert '<tr class="floor"><th scope="row">floor</th>' in main
    assert "0.0400 <small>¹</small>" in main
    assert "prefers-color-scheme: dark" in text
    assert "overflow-x: auto" in text


def test_the_page_escapes_what_it_is_given() -> None:
    evil = "<script>alert('x')</script>"
    rows = [row("plain", title=evil, told=evil, what=evil, settings={evil: evil}, file='"><b>.json'), ROWS[3]]
    text = tables.page(rows, [], evil, [evil])
    assert "<script" not in text
    assert "<b>" not in text
    assert "results/%22%3E%3Cb%3E.json" in text
    assert text.count("&lt;script&gt;") > 5


def test_the_page_of_closed_forms_and_of_a_sweep_alone() -> None:
    text = tables.page([claim("T3")], [], "t")
    assert "T3: every case" in text
    assert "relative error" in text
    assert "constant m9" in tables.page(SWEPT, [], "t")


def test_every_main_measure_is_explained() -> None:
    assert set(MAIN.values()) <= MEASURES.keys()
