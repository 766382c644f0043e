"""Which class an image is of: folders, links, folders of systems, metadata files, arrays, tables; or why of none."""

import json
import os
import warnings

import datasets
import numpy as np
import pytest
from PIL import Image

from robustdiff.data.dataset import load_images
from robustdiff.utils.errors import DataError, RobustdiffWarning
from source_files import own_cache  # noqa: F401 - autouse: nothing is left in the cache of the user


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4)).astype(np.uint8)).save(path)


def labelled(source, **options):
    """Class of every image by name."""
    loaded = load_images(source, **options)
    assert loaded.labels is not None, loaded.unlabelled
    assert loaded.unlabelled == ""
    return {name: loaded.classes[place] for name, place in zip(loaded.names, loaded.labels.tolist(), strict=True)}


def unlabelled(source, *words):
    """Why a source has no labels."""
    loaded = load_images(source)
    assert (loaded.labels, loaded.classes) == (None, ())
    for word in words:
        assert word in loaded.unlabelled
    return loaded


# -- folders -----------------------------------------------------------------------------------------


def classes(folder):
    for number, name in enumerate(("cat/1.png", "cat/2.png", "dog/3.png")):
        save(folder / name, number)
    return {"cat/1.png": "cat", "cat/2.png": "cat", "dog/3.png": "dog"}


@pytest.mark.parametrize("name", ["all", "zz"])
def test_a_folder_of_links_beside_the_classes_takes_nothing_away(tmp_path, name):
    expected = classes(tmp_path)
    (tmp_path / name).mkdir()
    for one in ("cat", "dog"):
        (tmp_path / name / one).symlink_to(tmp_path / one)
    loaded = load_images(tmp_path)
    assert labelled(tmp_path) == expected
    links = (f"a link to {one}, which is read as itself" for one in ("cat", "dog"))
    assert loaded.skipped == tuple(zip((f"{name}/cat", f"{name}/dog"), links, strict=True))


@pytest.mark.parametrize("elsewhere", ["../shared", ".store"])
def test_two_classes_may_be_links_to_one_folder(tmp_path, elsewhere):
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder / elsewhere / "1.png")
    for name in ("a", "b"):
        (folder / name).symlink_to(elsewhere)
    assert labelled(folder) == {"a/1.png": "a", "b/1.png": "b"}


def test_a_class_that_is_a_link_to_another_is_named(tmp_path):
    classes(tmp_path)
    (tmp_path / "feline").symlink_to("cat")
    with pytest.warns(RobustdiffWarning, match="feline is a link to cat, .* there is no class feline"):
        load_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_images(tmp_path)
    assert again.classes == ("cat", "dog")
    assert load_images(tmp_path).skipped == (("feline", "a link to cat, which is read as itself"),)


def test_links_out_and_back_in_end(tmp_path):
    folder = tmp_path / "data"
    expected = classes(folder)
    save(tmp_path / "out" / "4.png", 4)
    (tmp_path / "out" / "back").symlink_to(folder)
    (tmp_path / "out" / "self").symlink_to(tmp_path / "out")
    (folder / "cat" / "more").symlink_to(tmp_path / "out")
    (folder / "dog" / "up").symlink_to(tmp_path)
    found = labelled(folder)
    assert found == expected | {"cat/more/4.png": "cat", "dog/up/out/4.png": "dog"}


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir",
        "$RECYCLE.BIN",
        "$Recycle.Bin",
        "lost+found",
        "__MACOSX",
        "System Volume Information",
        "#recycle",
        "@tmp",
        "FOUND.000",
        "found.012",
        "Network Trash Folder",
        "Temporary Items",
        "RECYCLED",
        "@__thumb",
    ],
)
def test_folders_of_systems_are_neither_images_nor_classes(tmp_path, name):
    expected = classes(tmp_path)
    save(tmp_path / name / "1.png")
    save(tmp_path / "cat" / name / "SYNOPHOTO_THUMB_M.jpg")
    assert labelled(tmp_path) == expected
    assert load_images(tmp_path).notes == {"system folders ignored": 2}


def test_a_class_whose_only_file_is_bad_keeps_its_number(tmp_path):
    classes(tmp_path)
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "1.png").write_bytes(b"")
    save(tmp_path / "docs" / "4.png")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.pdf").write_bytes(b"no image, and no class")
    with pytest.warns(RobustdiffWarning, match="no image of class bee can be read"):
        loaded = load_images(tmp_path)
    assert loaded.classes == ("bee", "cat", "docs", "dog")
    assert loaded.labels.tolist() == [1, 1, 2, 3]
    assert loaded.describe()["classes"] == {"bee": 0, "cat": 2, "docs": 1, "dog": 1}


def test_a_stray_picture_is_named(tmp_path):
    classes(tmp_path)
    save(tmp_path / "stray.png")
    unlabelled(tmp_path, "stray.png lies beside the folders")
    (tmp_path / "stray.png").unlink()
    (tmp_path / "stray.pdf").write_bytes(b"no image")
    assert len(labelled(tmp_path)) == 3


def test_a_flat_folder_says_what_would_help(tmp_path):
    save(tmp_path / "a.png")
    unlabelled(tmp_path, "one folder per class", "metadata.csv", "file_name")


# -- metadata files ----------------------------------------------------------------------------------


def write_metadata(folder, kind, rows):
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    else:
        names = list(rows[0])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        (folder / "metadata.csv").write_text("\ufeff" + "\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["label", "category", "Class"])
@pytest.mark.parametrize("values", [("cat", "dog", "cat"), (10, 9, 10)])
def test_labels_of_a_metadata_file(tmp_path, kind, column, values):
    names = ("b.png", "a.png", "deep/c.png")
    for seed, name in enumerate(names):
        save(tmp_path / name, seed)
    write_metadata(
        tmp_path, kind, [{"file_name": n, "text": "x", column: v} for n, v in zip(names, values, strict=True)]
    )
    assert labelled(tmp_path) == {name: str(value) for name, value in zip(names, values, strict=True)}
    assert load_images(tmp_path).classes == (("cat", "dog") if "cat" in values else ("9", "10"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_labels_are_those_that_datasets_reads(tmp_path, kind):
    for seed in range(3):
        save(tmp_path / "train" / f"{seed}.png", seed)
    rows = [{"file_name": f"{seed}.png", "breed": seed % 2} for seed in range(3)]
    write_metadata(tmp_path / "train", kind, rows)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "train"), split="train")
    expected = {os.path.basename(row["image"].filename): str(row["breed"]) for row in theirs}
    assert labelled(tmp_path / "train", label_column="breed") == expected
    assert labelled(tmp_path, label_column="breed") == {f"train/{n}": v for n, v in expected.items()}


def test_an_image_without_a_label_is_named(tmp_path):
    for seed in range(3):
        save(tmp_path / f"{seed}.png", seed)
    rows = [{"file_name": "0.png", "label": "a"}, {"file_name": "2.png", "label": "b"}]
    write_metadata(tmp_path, "jsonl", rows)
    unlabelled(tmp_path, "1.png has no label")


WRITTEN = {
    "semicolons": ("file_name;label\n{0};Käfer\n{1};Öl, roh\n", "utf-8"),
    "semicolons of a German spreadsheet": ("file_name;label\r\n{0};Käfer\r\n{1};Öl, roh\r\n", "cp1252"),
    "tabs of a spreadsheet": ("file_name\tlabel\n{0}\tKäfer\n{1}\tÖl, roh\n", "utf-16"),
    "UTF-8 with a mark, quoted": ('"file_name","label"\n"{0}","Käfer"\n"{1}","Öl, roh"\n', "utf-8-sig"),
    "a space after each comma": ('file_name, my own note, label\n{0}, a b c, Käfer \n{1}, d, "Öl, roh"\n', "utf-8"),
    "spaces": ('file_name   label\n{0}  Käfer\n{1} "Öl, roh"\n', "latin-1"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_table_as_spreadsheets_and_people_write_it(tmp_path, name):
    for seed in range(2):
        save(tmp_path / f"{seed}.png", seed)
    text, encoding = WRITTEN[name]
    (tmp_path / "metadata.csv").write_bytes(text.format("0.png", "1.png").encode(encoding))
    assert labelled(tmp_path) == {"0.png": "Käfer", "1.png": "Öl, roh"}


def test_numbers_with_leading_zeros_are_names(tmp_path):
    values = ("00", "01", "10")
    for seed in range(3):
        save(tmp_path / f"{seed}.png", seed)
    write_metadata(tmp_path, "csv", [{"file_name": f"{seed}.png", "label": values[seed]} for seed in range(3)])
    assert load_images(tmp_path).classes == values


@pytest.mark.parametrize("values", [("cat", "lynx"), ("", "lynx")])
def test_folders_give_the_labels_that_metadata_leave_out(tmp_path, values):
    expected = classes(tmp_path)
    rows = [{"file_name": f"cat/{place + 1}.png", "label": value} for place, value in enumerate(values)]
    write_metadata(tmp_path, "csv", rows)
    assert labelled(tmp_path) == expected | {"cat/2.png": "lynx"}
    gaps = 1 + (values[0] == "")
    assert load_images(tmp_path).notes["labels of folders (metadata has none)"] == gaps


def test_the_folder_that_metadata_lie_in_is_no_label(tmp_path):
    for seed in range(3):
        save(tmp_path / "train" / f"{seed}.png", seed)
    for seed, name in enumerate(("more", "other")):
        save(tmp_path / name / "3.png", 3 + seed)
    write_metadata(tmp_path / "train", "csv", [{"file_name": f"{seed}.png", "label": "a"} for seed in range(2)])
    unlabelled(tmp_path, "train/2.png has no label")


def test_a_column_of_another_name_is_to_be_named(tmp_path):
    save(tmp_path / "0.png")
    write_metadata(tmp_path, "csv", [{"file_name": "0.png", "breed": "a"}])
    unlabelled(tmp_path, "metadata.csv has the columns breed", "`label_column`")


def test_a_column_that_is_not_there(tmp_path):
    save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"`label_column` breed: .* there is no metadata"):
        load_images(tmp_path, label_column="breed")
    write_metadata(tmp_path, "csv", [{"file_name": "0.png", "kind": "a"}])
    with pytest.raises(DataError, match=r"`label_column` breed: .* metadata.csv are kind"):
        load_images(tmp_path, label_column="breed")


def test_a_damaged_metadata_table_costs_nothing(tmp_path):
    expected = classes(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    assert labelled(tmp_path) == expected


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"{", b"[1, 2]\n", b"[" * 100_000, b""])
def test_a_metadata_file_that_is_none_costs_nothing(tmp_path, content):
    expected = classes(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(content)
    assert labelled(tmp_path) == expected


# -- arrays and tables -------------------------------------------------------------------------------

ARRAYS = {
    "float": np.array([2.0, 0.0, 2.0, 1.0]),
    "column": np.array([[2], [0], [2], [1]]),
    "one-hot": np.eye(3)[[2, 0, 2, 1]],
    "one-hot of bool": np.eye(3, dtype=bool)[[2, 0, 2, 1]],
    "text": np.array(["2", "0", "2", "1"]),
    "bytes": np.array([b"2", b"0", b"2", b"1"]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_labels_of_every_type_of_array(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=ARRAYS[name])
    loaded = load_images(tmp_path / "a.npz")
    assert (loaded.classes, loaded.labels.tolist()) == (("0", "1", "2"), [2, 0, 2, 1])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array(list("abab"), object), ("array labels holds Python objects", "labels.astype(str)")),
        (np.array([0, 1, -1, 1]), ("2 has no label",)),
        (np.array([0.5, 1, 2, 3]), ("array labels", "0.5", "whole number")),
        (np.ones((4, 3)), ("array labels", "(4, 3)", "one-hot")),
        (np.zeros(3, int), ("array labels", "(3,)", "4 whole numbers")),
        (np.array([0, 1, np.nan, 1]), ("2 has no label",)),
    ],
    ids=["objects", "-1", "fractions", "not one-hot", "too few", "a gap"],
)
def test_an_array_that_cannot_be_labels_is_named(tmp_path, labels, words):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    unlabelled(tmp_path / "a.npz", *words)
    np.savez(tmp_path / "b.npz", x=pixels, labels=labels)
    if len(labels) == 4:
        unlabelled(tmp_path / "b.npz", *words)


def test_arrays_without_labels_say_where_they_go(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6)).astype(np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", images=pixels)
    unlabelled(tmp_path / "a.npy", ".npz", "labels")
    unlabelled(tmp_path / "a.npz", "an array labels of 4")


def table(path, **columns):
    rows = [{"bytes": (path.parent / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    kinds = {"image": datasets.Image(), **{name: datasets.Value(kind) for name, (kind, _) in columns.items()}}
    data = {"image": rows, **{name: values for name, (_, values) in columns.items()}}
    datasets.Dataset.from_dict(data, features=datasets.Features(kinds)).to_parquet(path)
    return path


def test_a_table_says_what_stands_in_the_way(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", number)
    path = tmp_path / "a.parquet"
    unlabelled(table(path, label=("string", ["a", None, "b", "a"])), "1 of 4 rows have no label", "row 1")
    unlabelled(table(path, breed=("string", list("abab"))), "`label_column`", "breed")
    unlabelled(table(path, label=("int64", [0, 1, 0, 1]), y=("int64", [0, 1, 0, 1])), "label, y", "`label_column`")
    unlabelled(table(path, label=("float64", [0, 1, 0.5, 1])), "column label holds 0.5")
    loaded = load_images(table(path, label=("float64", [0, 1, 2, 1])))
    assert (loaded.classes, loaded.labels.tolist()) == (("0", "1", "2"), [0, 1, 2, 1])
