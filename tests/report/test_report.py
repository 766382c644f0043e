"""Run folders to one page: what is compared, what ties, what is refused, and that the page needs nothing else.

Long, because it takes the page apart section by section on the same runs.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import report_runs as made
from report_page import Page, check
from robustdiff.report import collect, render, report
from robustdiff.report.comparing import compare, datum, marks, settings
from robustdiff.report.curves import few_steps
from robustdiff.utils.errors import UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    return made.three_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(runs) -> Page:
    return check(report(runs, runs[0].parent / "pages" / "report.html").read_text(encoding="utf-8"))


def alone(folder: Path, *bodies: dict[str, Any]) -> Path:
    """A run folder with nothing but evaluations."""
    for i, body in enumerate(bodies):
        made.write(folder / "evaluation" / f"{i}-{body.get('kind')}.json", body)
    return folder


def searched(*findings: tuple[str, int, str, str], count: int = 2000, clean: int = 800) -> dict[str, Any]:
    """What ``data.json`` and ``found.json`` say was found."""
    names = ("part", "count", "what", "action")
    told = [{**dict(zip(names, one, strict=True)), "level": None} for one in findings]
    return {"count": count, "clean": clean, "findings": told}


NOISY = ("noise", 1200, "white noise, level 0.2", "trained above it")


# -- what was found in the training images ---------------------------------------------------------------


def test_what_runs_and_audits_found_is_a_section_with_its_sheets(runs, tmp_path):
    made.write(tmp_path / "run" / "data.json", {"auto": searched(NOISY)})
    made.grid(tmp_path / "run" / "found-noisy.png", 3)
    made.write(tmp_path / "audit" / "found.json", searched(NOISY, ("holes", 7, "<b>", "filled in"), clean=1))
    made.write(tmp_path / "whole" / "data.json", {"auto": searched(clean=2000)})
    made.grid(tmp_path / "whole" / "found-sheet.png", 4)  # no kind of ours
    page = check(render(collect([runs[0], tmp_path / "run", tmp_path / "audit", tmp_path / "whole"])))
    assert "800 of 2,000 images are trained at every noise level." in page.text
    assert "2,000 images, none of which stands apart: plain training." in page.text
    tables = [table for table in page.tables if table[0][:2] == ["found", "images"]]
    assert tables[0][1] == ["noise", "1,200", "white noise, level 0.2", "trained above it"]
    assert [len(table) for table in tables] == [2, 3]
    assert "<b> filled in" in page.text
    assert "run: the noisiest found-noisy.png" in page.text
    assert "found-sheet" not in page.text
    assert "Not evaluated: run, whole." in page.text  # an audit has nothing to evaluate
    assert any(attributes.get("href") == "#found" for tag, attributes in page.tags if tag == "a")


def test_without_a_search_there_is_no_such_section(page):
    assert not any(attributes.get("id") == "found" for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": None}, "no counts of images"),
        ({"clean": -1}, "no counts of images"),
        ({"findings": 3}, "no list of findings"),
        ({"findings": [3]}, "no count of images"),
        ({"findings": [{"count": 3, "part": "noise"}]}, "not told in words"),
    ],
)
@pytest.mark.parametrize("where", ["data.json", "found.json"])
def test_a_search_that_cannot_be_shown_is_refused_with_the_reason(tmp_path, where, change, reason):
    found = searched(NOISY) | change
    made.write(tmp_path / "run" / where, {"auto": found} if where == "data.json" else found)
    with pytest.raises(UsageError, match=rf"{where}, what was found: .*{reason}; mend or delete it"):
        collect([tmp_path / "run"])


# -- the page --------------------------------------------------------------------------------------------


def test_the_quality_table_says_who_is_best_who_ties_and_what_the_floor_is(page):
    table = page.table("run", "FD-squeezenet10", "KID")
    assert table[0] == [
        "run", "FD-squeezenet10_imagenet ↓°", "KID-squeezenet10_imagenet ↓", "precision ↑", "recall ↑", "density ↑",
        "coverage ↑", "diversity",
    ]  # fmt: skip
    assert table[1] == ["floor: real against real", "3.10", "0.000100", "0.950", "0.950", "0.950", "0.950", "1.00"]
    assert table[3][:4] == ["gated told: nothing", "12.3", "0.00308 ± 0.00030", "0.777 0.747 to 0.797"]
    assert table[4][:3] == ["robust-random told: nothing", "13.1", "0.00327 (tie) ± 0.00030"]
    best = [attributes.get("class") for tag, attributes in page.tags if tag == "td" and "best" in attributes["class"]]
    assert len(best) == 6 + 1 + 3  # squeezenet, pixels, memorisation
    assert "gated is best in FD-squeezenet10_imagenet°; ties with robust-random in KID-squeezenet10" in page.text


def test_the_page_has_every_part_and_links_lead_to_files(page, runs):
    text = page.text
    for words in (
        "797 real images are few",
        "not shown: later.json (kind 'later')",
        "Sampled with ddim, 50 steps, moving average, seed 0.",
        "Floor: two halves of the real images, equally many.",
        "step 8,000, seed 0, 50 sampler steps",
        "Denoising loss",
        "evaluated during training",
        "null: held-out images",
        "lower is better · bar: null 0.0100",
        "lower is better · bar: floor 3.10",
        "Each table is a protocol of its own",
        "95 % interval 0.747 to 0.797; k: 5",
        f"sha256: {made.WEIGHTS}; features: 512",
        f"timesteps: {', '.join(map(str, range(999, 0, -20)))}; seed: 0",
    ):
        assert words in text
    here = runs[0].parent / "pages"
    links = [unquote(href) for href in page.all("href") if not href.startswith("#")]
    assert len(links) == 3 * (5 + 3) + 2
    assert all((here / link).exists() for link in links)
    assert str(runs[0].parent) not in text  # nobody's folders are named in full


def test_training_images_are_shown_once_if_all_runs_have_the_same(runs, tmp_path):
    names = [attributes["alt"] for tag, attributes in Page(render(collect(runs))).tags if tag == "img"]
    assert [name for name in names if "training images" in name] == ["training images, what the runs learn from"]
    folders = made.three_runs(tmp_path)
    made.grid(folders[1] / "evaluation" / "training.png", 5)
    names = [attributes["alt"] for tag, attributes in Page(render(collect(folders))).tags if tag == "img"]
    assert sum("training images" in name for name in names) == 3


def test_only_settings_that_differ_are_side_by_side_and_all_are_folded_out(page, runs):
    table = page.table("setting", "gated")
    assert [row[0] for row in table[1:]] == ["preset flag", "objective plan"]
    assert table[1][1:] == ["plain", "gated", "robust-random"]
    rows = settings(collect(runs))
    assert {row.name for row in rows if not row.differs} >= {"train_batch_size", "images", "sha256", "robustdiff"}
    assert "output_dir" not in {row.name for row in rows}


def test_a_flag_that_is_null_and_one_that_is_not_there_are_the_same(tmp_path):
    for name, flags in (("a", {"new": None, "corrupt": []}), ("b", {"corrupt": ["x"]})):
        made.write(tmp_path / name / "config.json", {"settings": flags})
    found = {row.name: row.values for row in settings(collect([tmp_path / "a", tmp_path / "b"])) if row.differs}
    assert found == {"corrupt": ["none", "x"]}


def test_few_step_curves_are_tables_too_and_timesteps_are_listed_once(page, runs):
    table = page.table("FD-squeezenet10_imagenet after steps")
    assert table[0][1:] == ["5", "10", "20", "50", "100"]
    assert table[3] == ["gated, ddim", "19.7", "16.0", "14.1", "13.0", "12.7"]
    (found,) = few_steps(collect(runs))
    assert [chart.title for chart in found.charts] == ["FD-squeezenet10_imagenet ↓"] * 2
    assert all("floor: 3.1" in chart.svg for chart in found.charts)
    assert dict(found.timesteps)["ddim, 5 steps"] == "999, 799, 599, 399, 199"
    assert len(found.timesteps) == 10


def test_one_run_alone_has_no_marks_and_no_comparison(runs):
    page = check(render(collect(runs[1:2])))
    assert not [a for tag, a in page.tags if tag == "td" and ("best" in a["class"] or "tie" in a["class"])]
    assert "All settings of gated" in page.text
    assert "Only what differs" not in page.text


def test_a_run_without_evaluations_is_shown_and_said_to_lack_them(tmp_path):
    made.training_run(tmp_path / "fresh", preset="gated", lines=1)
    page = check(render(collect([tmp_path / "fresh"])))
    assert "Not evaluated: fresh." in page.text
    assert "Denoising loss" in page.text


def test_names_are_text_and_never_markup(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    body = made.quality(evil, 3.0, told=evil, warnings=[evil])
    body["values"][evil] = made.value(1.0, about={evil: evil, "k": evil})
    body["protocol"]["extractor"]["name"] = body["protocol"]["reference"]["source"] = evil
    other = copy.deepcopy(body) | {"title": "b"}
    memory = made.memorisation(evil, 0.1)
    memory["details"]["copied"] = [[1, evil, 3]]
    few = made.few_steps(evil, 3.0, [evil])
    folder = alone(tmp_path / "a<b>&'c", body, memory, few)
    made.write(folder / "config.json", {"settings": {evil: evil, "preset": evil}, evil: {evil: evil}})
    made.write(folder / "evaluation" / "z.json", {"format": evil})
    made.grid(folder / "evaluation" / "training.png", 1)
    page = check(render(collect([folder, alone(tmp_path / "b", other)]), evil))
    assert page.text.count(evil) > 15


def test_links_survive_names_that_no_url_likes(tmp_path):
    folder = alone(tmp_path / "a b#c?d%20e:f", made.quality("x", 3.0))
    out = report([folder], tmp_path / "out" / "page.html")
    links = [unquote(href) for href in check(out.read_text(encoding="utf-8")).all("href") if not href.startswith("#")]
    assert links == ["../a b#c?d%20e:f", "../a b#c?d%20e:f/evaluation/0-quality.json"]
    assert all((out.parent / link).exists() for link in links)


def test_report_makes_the_folder_replaces_the_page_and_refuses_a_folder(tmp_path):
    folder = alone(tmp_path / "run", made.quality("x", 3.0))
    first = report([folder], tmp_path / "a" / "b" / "report.html", title="First")
    assert "<title>First</title>" in first.read_text(encoding="utf-8")
    assert "<title>x</title>" in report([folder], first).read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="is a folder: name a file"):
        report([folder], tmp_path / "a")


# -- what may be compared --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"n_generated": 999},
        {"n_real": 796},
        {"extractor": {"name": "squeezenet10_imagenet", "kind": "torchscript", "sha256": "d" * 64, "resize": "none"}},
        {"reference": {"source": "digits", "split": "held out", "sha256": "d" * 64}},
        {"reference": {"source": "digits", "split": "train", "sha256": made.REAL}},
    ],
    ids=["generated", "real", "weights", "reference", "split"],
)
def test_numbers_of_different_protocols_are_never_in_one_table(tmp_path, change):
    a, b = made.quality("a", 3.0), made.quality("b", 4.0)
    b["protocol"] |= change
    found = compare(collect([alone(tmp_path / "a", a), alone(tmp_path / "b", b)]), "quality")
    assert [[line.title for line in comparison.lines] for comparison in found] == [["a"], ["b"]]
    assert not any(mark for comparison in found for column in comparison.columns for mark in column.marks)


def test_the_same_weights_under_another_path_are_the_same_extractor(tmp_path):
    a, b = made.quality("a", 3.0), made.quality("b", 4.0)
    b["protocol"]["extractor"]["name"] = "elsewhere/squeezenet"
    b["protocol"]["reference"]["source"] = "elsewhere/digits"
    assert len(compare(collect([alone(tmp_path / "a", a), alone(tmp_path / "b", b)]), "quality")) == 1


def test_a_metric_with_another_k_has_a_column_of_its_own(tmp_path):
    a, b = made.quality("a", 3.0), made.quality("b", 4.0)
    b["values"]["recall"]["about"] = {"k": 3}
    (found,) = compare(collect([alone(tmp_path / "a", a), alone(tmp_path / "b", b)]), "quality")
    columns = {column.name: column for column in found.columns}
    assert [value is None for value in columns["recall (k 5)"].data] == [False, True]
    assert [value is None for value in columns["recall (k 3)"].data] == [True, False]
    assert "precision" in columns


def test_copying_is_compared_only_against_the_same_training_images(tmp_path):
    a, b, c = (made.memorisation(name, 0.1) for name in "abc")
    b["protocol"]["training"] = {"source": "digits", "sha256": "d" * 64}
    folders = [alone(tmp_path / body["title"], body) for body in (a, b, c)]
    found = compare(collect(folders), "memorisation")
    assert [[line.title for line in comparison.lines] for comparison in found] == [["a", "c"], ["b"]]


def test_one_run_sampled_in_two_ways_is_two_lines_with_their_samplers(tmp_path):
    a, b = made.quality("a", 3.0), made.quality("a", 5.0)
    b["protocol"]["sampler"]["steps"] = 10
    (found,) = compare(collect([alone(tmp_path / "a", a, b)]), "quality")
    assert found.samplers_differ
    assert [found.label(i) for i in (0, 1)] == [f"a, ddim, {n} steps, moving average, seed 0" for n in (50, 10)]
    assert "a, ddim, 50 steps, moving average, seed 0 is best in" in check(render(collect([tmp_path / "a"]))).text


def mark(*values: tuple[float, float, float] | float | None, better: str = "lower") -> list[str]:
    entries = [
        {} if v is None else {"value": v} if isinstance(v, float) else {"value": v[0], "interval": [v[1], v[2]]}
        for v in values
    ]
    return marks([datum(entry) for entry in entries], better)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (mark((1.0, 0.5, 1.5), (2.0, 1.6, 2.4)), ["best", ""]),
        (mark((1.0, 0.5, 1.5), (2.0, 1.4, 2.4)), ["best", "tie"]),
        (mark((1.0, 0.5, 1.5), (2.0, 1.4, 2.4), better="higher"), ["tie", "best"]),
        (mark((1.0, 0.5, 1.5), (2.0, 1.4, 2.4), better="neither"), ["", ""]),
        (mark((1.0, 0.5, 2.5), 2.0), ["best", "tie"]),
        (mark((1.0, 0.5, 1.5), 2.0), ["best", ""]),
        (mark(1.0, 1.0, 3.0), ["best", "best", ""]),
        (mark(1.0), [""]),
        (mark(1.0, None), ["", ""]),
        (mark(None, 1.0, 2.0), ["", "best", ""]),
    ],
)
def test_marks(found, expected):
    assert found == expected


def test_a_standard_error_stands_for_its_interval():
    found = datum({"value": 1.0, "interval": None, "about": {"standard_error": 0.1}})
    assert found is not None
    assert found.interval == pytest.approx((0.804, 1.196))
    assert (found.text, found.small) == ("1.00", "± 0.10")


def test_floors_that_differ_are_told_as_a_span(tmp_path):
    a, b = made.quality("a", 3.0), made.quality("b", 4.0)
    b["values"]["FD-squeezenet10_imagenet"]["floor"] = 3.25
    (found,) = compare(collect([alone(tmp_path / "a", a), alone(tmp_path / "b", b)]), "quality")
    assert [column.floor for column in found.columns[:2]] == ["3.10 to 3.25", "0.000100"]


# -- what lies in the folders ----------------------------------------------------------------------------


def test_titles_tell_folders_of_one_name_apart_and_a_folder_given_twice_counts_once(tmp_path):
    folders = [alone(tmp_path / place / "run", made.quality("run", 3.0)) for place in ("a", "b")]
    assert [run.title for run in collect([*folders, folders[0]])] == ["a/run", "b/run"]
    named = [alone(tmp_path / name, made.quality("mine", 3.0)) for name in ("c", "d")]
    assert [run.title for run in collect(named)] == ["mine (c)", "mine (d)"]


def test_what_is_no_run_folder_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, reason in (("missing", "not a folder"), ("file", "not a folder"), ("empty", "holds nothing to report")):
        with pytest.raises(UsageError, match=f"{name}.*{reason}"):
            collect([tmp_path / name])
    with pytest.raises(UsageError, match="at least one run folder"):
        collect([])


@pytest.mark.parametrize("name", ["config.json", "data.json", "evaluation/quality.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\n", b"[1]\n", b'{"images": NaN}\n', b"[" * 100_000 + b"\n"])
def test_damaged_json_is_refused_in_one_line_that_names_the_file(tmp_path, name, content):
    if name.endswith("l") and content == b"{":
        content = b"{\n"
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(str(path))) as error:
        collect([tmp_path / "run"])
    assert "\n" not in str(error.value)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    made.training_run(tmp_path, preset="plain", lines=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 520, "images": 33')
    assert [line["step"] for line in collect([tmp_path])[0].metrics] == [130, 260, 390]


def test_a_damaged_or_missing_picture_is_said_on_the_page(tmp_path):
    folder = alone(tmp_path / "run", made.quality("x", 3.0, sheets={"nearest": "gone.png"}))
    made.grid(folder / "samples" / "step-00000010.png", 1)
    whole = (folder / "samples" / "step-00000010.png").read_bytes()
    (folder / "samples" / "step-00000020.png").write_bytes(whole[: len(whole) // 2])
    page = check(render(collect([folder])))
    assert "gone.png (the file is missing)" in page.text
    assert "step-00000020.png (not a whole PNG" in page.text
    assert len(list(page.all("src"))) == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/x.png", "a\\b.png", "..", "", 3, "c:x.png"])
def test_a_sheet_outside_the_folder_is_refused(tmp_path, name):
    made.grid(tmp_path / "run" / "secret.png", 1)
    folder = alone(tmp_path / "run", made.quality("x", 3.0, sheets={"nearest": name}))
    with pytest.raises(UsageError, match="not the name of a file beside it"):
        collect([folder])


def test_previews_are_the_last_and_evenly_spread_earlier_ones(runs):
    assert [step for step, _ in collect(runs)[0].samples] == [0, 1600, 3200, 4800, 6400, 8000]


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("title",), " ", "no title"),
        (("protocol",), None, "no protocol"),
        (("protocol", "sampler"), [], "protocol['sampler'] is not an object"),
        (("values",), [], "it has no values"),
        (("values", "near-copies", "value"), "3", "values['near-copies']['value'] is not a number"),
        (("values", "near-copies", "better"), "less", "values['near-copies']['better'] is 'less'"),
        (("values", "near-copies", "interval"), [2, 1], "the lower one first"),
        (("values", "near-copies", "about"), {"standard_error": -1}, "is not a number >= 0"),
        (("details", "histogram", "edges", 3), 0.54, "no rising edges"),
        (("details", "histogram", "generated"), [1, 2], "not one count per bin"),
        (("details", "pairs"), [[1, 2]], "not a list of triples"),
        (("details", "curves"), [{"scheduler": "ddim", "steps": [0], "values": {}}], "no counts of steps"),
        (
            ("details", "curves"),
            [{"scheduler": "ddim", "steps": [1, 2], "values": {"FD": [1]}}],
            "not one number per count of steps",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_shown_is_refused_with_the_reason(tmp_path, where, value, reason):
    body = inner = made.memorisation("x", 0.1)
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(UsageError, match=f"0-memorisation.json is not an evaluation: .*{re.escape(reason)}"):
        collect([alone(tmp_path / "run", body)])


def paths(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield at
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(item, (*at, key))


def outcome(folder: Path) -> str:
    """The page, or the line that refuses."""
    try:
        return render(collect([folder]))
    except UsageError as error:
        return str(error)


@pytest.mark.slow
def test_whatever_json_holds_gives_a_page_or_one_line(tmp_path):
    """Every entry of every file, replaced by what does not belong there: rendered soundly, or refused by name."""
    bodies = {
        "evaluation/quality.json": made.quality("x", 3.0),
        "evaluation/memorisation.json": made.memorisation("x", 0.1),
        "evaluation/few-step.json": made.few_steps("x", 3.0, ["ddim"]),
        "config.json": {"settings": {"preset": "a", "seed": 0}, "plan": {"images": 3}, "versions": {"torch": "2"}},
        "data.json": {"data": {"source": "digits", "count": 3}, "corrupt": ["a"], "corrupt_seed": 0},
    }
    bodies["evaluation/memorisation.json"]["details"]["pairs"] = [[1, 2, 0.5]]
    bodies["evaluation/memorisation.json"]["details"]["histogram"] = {
        "edges": [0.0, 0.5, 1.0],
        "generated": [1, 2],
        "null": [2, 1],
    }
    bodies["evaluation/quality.json"]["protocol"]["sampler"]["timesteps"] = [3, 2]
    bodies["evaluation/few-step.json"]["details"]["curves"][0] |= {
        "steps": [1, 2],
        "values": {"FD-squeezenet10_imagenet": [2.0, 3.0]},
        "timesteps": [[1], [2, 1]],
    }
    for name, body in bodies.items():
        made.write(tmp_path / name, body)
    made.write(tmp_path / "metrics.jsonl", {})
    (tmp_path / "metrics.jsonl").write_text('{"images": 5, "loss": 1.5, "denoising": 1e-300, "radius": null}\n')
    sound = render(collect([tmp_path]))
    check(sound)
    strange: list[Any] = [None, "x", "", 0, -1, 1e299, -1e299, 5e-324, 10**400, True, [], {}, [[]], {"a": 1}, [1, 1]]
    shuffled = random.Random(0)
    refused = shown = 0
    for name, body in bodies.items():
        for path in paths(body):
            for value in shuffled.sample(strange, 3):
                broken = copy.deepcopy(body)
                if path:
                    inner: Any = broken
                    for key in path[:-1]:
                        inner = inner[key]
                    inner[path[-1]] = value
                else:
                    broken = value
                (tmp_path / name).write_text(json.dumps(broken))
                if (text := outcome(tmp_path)).startswith("<!doctype html>"):
                    check(text)
                    shown += 1
                else:
                    assert re.fullmatch(f"{re.escape(str(tmp_path / name))}[^\n]+; .+", text)
                    refused += 1
        made.write(tmp_path / name, body)
    assert min(refused, shown) > 100
    assert render(collect([tmp_path])) == sound
