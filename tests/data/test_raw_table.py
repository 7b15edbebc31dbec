"""Tables of text: what a damaged row costs, how columns are found, and which names of images are followed.

How to break the code so that these fail: take a joined row without asking `Table._is_row`, join lines without bound,
decode with errors="replace", follow a name with `..`, merge images by their names instead of their paths.
"""

import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from raw_toys import write

from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.raw.columns import find_columns, split_named, split_of_path
from maskvlm.data.raw.lines import CHUNK, MAX_LINE_BYTES, json_items, text_lines
from maskvlm.utils.errors import ExitCode, UserError


def touch(folder: Path, *names: str) -> None:
    write(folder, dict.fromkeys(names, b""))


def read(file: Path, content: bytes | str, name: str = "csv", images: str = "", **columns: str) -> list[Any]:
    write(file.parent, {file.name: content.encode() if isinstance(content, str) else content})
    return [*open_raw(name, str(file), columns or None, images=images or None).rows()]


def short(rows: list[RawRow | BadRow]) -> dict[int, str]:
    """Line -> captions joined by "|", or the reason why the row is left out."""
    found = [(int(row.origin.split(":")[1]), row) for row in rows]
    return {line: "|".join(row.captions) if isinstance(row, RawRow) else row.reason for line, row in found}


def images_of(rows: list[RawRow | BadRow], folder: Path) -> list[str]:
    """The image of good rows relative to the folder, the reason of bad ones; by line."""
    rows = sorted(rows, key=lambda row: int(row.origin.split(":")[1]))
    return [str(row.image).removeprefix(f"{folder}/") if isinstance(row, RawRow) else row.reason for row in rows]


# ------------------------------------------------------------------ quotes


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('a.jpg,"one, two"\nb.jpg,three', {2: "one, two", 3: "three"}),
        ('a.jpg,"one\ntwo"\nb.jpg,three', {2: "one\ntwo", 4: "three"}),
        ('a.jpg,"one ""two"""\nb.jpg,5" pipe', {2: 'one "two"', 3: '5" pipe'}),
        # left open: the row alone is lost, whatever quotes come after it
        ('a.jpg,"one\nb.jpg,three', {2: "quote left open", 3: "three"}),
        ('a.jpg,"one\nb.jpg,"three\nc.jpg,x', {2: "quote left open", 3: "quote left open", 4: "x"}),
        ('a.jpg,"one\nb.jpg,\x00\nc.jpg,x', {2: "quote left open", 3: "null bytes", 4: "x"}),
        # a caption of several lines, of which one looks like a row
        ('a.jpg,"like\nb.jpg,but darker\nabove"\nb.jpg,x', {2: "like\nb.jpg,but darker\nabove", 5: "x"}),
        ('a.jpg,"a "big" dog"\nb.jpg,three', {2: "quotes do not fit", 3: "three"}),
        ('"one\ntwo"\nb.jpg,three', {2: "quote left open", 3: "missing column", 4: "three"}),
        ('a.jpg,one,two\nb.jpg, "x, y"', {2: "too many columns", 3: "too many columns"}),
    ],
)
def test_a_damaged_row_costs_itself_alone(tmp_path: Path, lines: str, expected: dict[int, str]) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    assert short(read(tmp_path / "x.csv", f"image,caption\n{lines}")) == expected


def test_a_quote_left_open_in_a_large_file_costs_one_row(tmp_path: Path) -> None:
    """Fails where lines are joined without bound: the rest of the file would be one caption."""
    touch(tmp_path, "a.jpg", "b.jpg")
    limit = csv.field_size_limit()
    lines = [
        "caption;image",
        f'"one\n\n{"x" * 200_000}";b.jpg',
        '"open',
        *[f"{n};a.jpg" for n in range(300)],
        'e";a.jpg',
    ]
    found = short(read(tmp_path / "x.csv", "\n".join(lines)))
    assert [*found] == [5, 2, 6]
    assert (len(found[2]), found[5], len(found[6].split("|"))) == (200_005, "quote left open", 301)
    assert csv.field_size_limit() == limit


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", "image\tcaption\na.jpg\tone, two\n"),
        ("x.csv", "\ufeffimage|caption\na.jpg|one, two"),
        ("x.txt", '"image"\t"caption"\n\n"a.jpg"\t"one, two"\n\n'),
        ("x.csv", "sep=;\r\nimage;caption\r\na.jpg;one, two\r\n"),
    ],
)
def test_delimiter_line_ends_and_mark_make_no_difference(tmp_path: Path, name: str, content: str) -> None:
    touch(tmp_path, "a.jpg")
    (row,) = read(tmp_path / name, content)
    assert row[:4] == (str(tmp_path / "a.jpg"), ("one, two",), "csv a.jpg", "train")


def test_rows_of_an_image_are_one(tmp_path: Path) -> None:
    """However its place is spelled; a caption that it has already is not trained on twice, and costs no image."""
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "c.jpg")
    lines = ("file_name,text,image_id,split", "a.jpg,one,7,train", "b.jpg,one,8,val", "images/a.jpg,three,7,train")
    more = (".//a.jpg,four,7,test", "c.jpg,five,8,val", "a.jpg, one,7,train")
    assert read(tmp_path / "x.csv", "\n".join([*lines, *more])) == [
        BadRow("image in two splits", "x.csv:5", "its image is in split 'train' at x.csv:2", "test"),
        BadRow("duplicate id", "x.csv:6", "id 'csv 8' is that of another image, at x.csv:3", "val"),
        BadRow("duplicate caption", "x.csv:7", "its image has this caption already, at x.csv:2", "train"),
        RawRow(str(tmp_path / "images/a.jpg"), ("one", "three"), "csv 7", "train", "x.csv:2"),
        RawRow(str(tmp_path / "images/b.jpg"), ("one",), "csv 8", "val", "x.csv:3"),
    ]


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        # a file for each split, whose ids may start anew
        ({"train": "a.jpg,one,0", "val": "b.jpg,two,0"}, ["mine 0", "mine val 0"]),
        # an image of two splits, also where the files give it other ids
        ({"train": "a.jpg,one,1", "val": "b.jpg,x,8\na.jpg,y,9"}, ["mine 1", "image in two splits", "mine val 8"]),
        ({"one": "a.jpg,one,1", "two": "b.jpg,x,8\na.jpg,y,9"}, ["mine 1", "image in two tables", "mine 8"]),
        # all ids of a table change, so that they can be told apart; and no image is lost
        ({"one": "a.jpg,one,0", "two": "b.jpg,x,1\nc.jpg,y,0"}, ["mine 0", "mine two 1", "mine two 0"]),
        ({"my_test": "a.jpg,one,"}, ["mine a.jpg"]),
    ],
)
def test_tables_of_a_folder(tmp_path: Path, tables: dict[str, str], expected: list[str]) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    write(tmp_path, {f"{name}.csv": f"image,caption,id\n{lines}".encode() for name, lines in tables.items()})
    raw = open_raw("csv", str(tmp_path), as_name="mine")
    for _ in range(2):  # notes are given once
        rows = [*raw.rows()]
        assert [row.image_id if isinstance(row, RawRow) else row.reason for row in rows] == expected
    assert len({*raw.notes}) == len(raw.notes)
    assert {row.split for row in rows} == {
        {"one": "train", "two": "train", "my_test": "test"}.get(t, t) for t in tables
    }


def test_a_cell_with_a_json_list_is_several_captions(tmp_path: Path) -> None:
    """Fails where the list is one caption, brackets and all. Any other text in brackets is one."""
    touch(tmp_path, "a.jpg")
    texts = ['["a dog", "a hound"]', "['a cat', 'a kitten']", "[sic] a bird", "[1]", "[]"]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "red\x1b[31m"], *(["a.jpg", text, ""] for text in texts)])
    raw_set = open_raw("csv", str(tmp_path / "x.csv"))
    captions = "a dog|a hound|['a cat', 'a kitten']|[sic] a bird|[1]"
    assert short([*raw_set.rows()]) == {2: captions, 6: "no caption"}
    assert [note.isprintable() for note in raw_set.notes] == [True] * 3  # no column's name reaches the terminal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\n", "is empty"),
        (b"\xff\xfei\x00m\x00", "UTF-16 text"),
        (b"PK\x03\x04\x14\x00\n", r"a spreadsheet \(xlsx"),
        (b"a,b\xe9\nx,y\n", "x.csv:1: not UTF-8 text"),
        (b"a\x00b\n", "x.csv:1: null bytes"),
        (b"Datei;Worte\na.jpg;Stra\xdfe\n", "x.csv:2: is not UTF-8 text; and no column for the image"),
        (b"image,words\na,b\n", r"no column for the caption \(available: 'image', 'words'\)"),
        (b"photos/one.jpg,a bird\nphotos/two.jpg,a cat\n", "the first line is a row"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "x.csv", content)
    assert caught.value.code == ExitCode.BAD_DATA


def test_columns_and_splits_by_their_names(tmp_path: Path) -> None:
    found = {"image": "Image Path", "caption": "ALT-text", "split": "Split"}
    assert find_columns(["Image Path", "ALT-text", "Split"], {}, "x") == found
    assert find_columns(["url", "image", "title", "caption"], {}, "x") == {"image": "image", "caption": "caption"}
    with pytest.raises(UserError, match=r"no column 'captoin' .* Take 'caption'"):
        read(tmp_path / "x.csv", "image,caption\na.jpg,one\n", caption="captoin")
    touch(tmp_path, "a.jpg")
    assert short(read(tmp_path / "x.csv", "photo,caption,note\na.jpg,one,two\n", caption="note")) == {2: "two"}
    splits = ["train", "Training", "restval", "train2014", "", None, "val", "dev", "validation", "TEST", "test[:10%]"]
    assert [split_named(name) for name in splits] == ["train"] * 6 + ["val"] * 3 + ["test"] * 2
    assert [split_named(name) for name in ("challenge", 3, "12")] == [None, None, None]
    paths = ["train/0.tar", "coco-val-00000.tar", "Validation_GCC-1.1.0-Validation", "00000.tar", "test/train/x"]
    assert [split_of_path(path) for path in paths] == ["train", "val", "val", "train", "train"]


# ------------------------------------------------------------------ names of images


def test_images_are_named_inside_the_folder(tmp_path: Path) -> None:
    """Fails where a name may lead out, through `..`, a whole path, a backslash or a link. Windows' names are read, and
    accents however the disk has them."""
    raw, (composed, apart) = tmp_path / "in", (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    touch(raw, "a.jpg", "sub/a.jpg", "b\\c.jpg", "b/c.jpg", "UPPER.JPG", apart, f"images/1{composed}", "../outside.jpg")
    (raw / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    expected = {
        "../outside.jpg": "unsafe name",
        "sub/../../outside.jpg": "unsafe name",
        f"{raw}/a.jpg": "a.jpg",
        f"{raw}/../outside.jpg": "unsafe name",
        "/etc/hostname": "unsafe name",
        "~/x.jpg": "missing image",
        "..\\outside.jpg": "missing image",
        "C:\\photos\\a.jpg": "missing image",
        "sub\\a.jpg": "sub/a.jpg",
        "b\\c.jpg": "b\\c.jpg",  # a file of just this name comes first
        "link.jpg": "link leads out",
        "upper.jpg": "missing image",
        "sub": "folder",
        "https://a.org/b.jpg": "address",
        composed: apart,  # macOS writes NFD, most tables are NFC
        f"1{apart}": f"images/1{composed}",
    }
    rows = read(raw / "x.csv", "image,caption\n" + "".join(f"{name},one\n" for name in expected))
    assert images_of(rows, raw) == [*expected.values()]
    assert any("did you mean 'UPPER.JPG'" in row.message for row in rows if isinstance(row, BadRow))


def test_images_may_be_in_another_folder(tmp_path: Path) -> None:
    """Relative to that folder or by their whole paths, with `..` relative to the table; nothing beside the table, and
    nothing outside the folder, also by a link."""
    photos, table = tmp_path / "photos", tmp_path / "tables" / "x.csv"
    touch(photos, "a.jpg", "sub/b.jpg", "images/c.jpg", "e.jpg", "f.jpg")
    touch(tmp_path, "tables/d.jpg", "tables/a.jpg", "outside.jpg", "secret/x.jpg")
    (photos / "link").symlink_to(tmp_path / "secret")
    expected = {
        "a.jpg": "a.jpg",
        f"{photos}/sub/b.jpg": "sub/b.jpg",
        "c.jpg": "images/c.jpg",
        "d.jpg": "missing image",
        "../outside.jpg": "unsafe name",
        f"{tmp_path}/outside.jpg": "unsafe name",
        "../photos/e.jpg": "e.jpg",
        "../photos/sub/../f.jpg": "f.jpg",
        "../photos/link/x.jpg": "link leads out",
        "../photos": "unsafe name",
    }
    content = "image,caption\n" + "".join(f"{name},one\n" for name in expected)
    assert images_of(read(table, content, images=str(photos)), photos) == [*expected.values()]
    with pytest.raises(UserError, match="there is no such folder"):
        read(table, content, images=str(tmp_path / "nowhere"))


# ------------------------------------------------------------------ json


def test_json_lines_with_one_caption_or_several(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    records = [
        {"image": "a.jpg", "caption": "one"},
        {"image": "b.jpg", "captions": ["two", "three", "two"], "split": "val", "id": 5},
        {"file_name": "c.jpg", "text": "four"},
        {"image": "a.jpg"},
    ]
    rows = read(tmp_path / "x.jsonl", "\n\n".join(map(json.dumps, records)), "jsonl")
    assert [row[0] for row in rows[:2]] == ["duplicate caption", "no caption"]
    assert short(rows) == {1: "one", 3: "two|three", 5: "four", 7: "no caption"}
    assert [row[2:4] for row in rows[2:]] == [("jsonl a.jpg", "train"), ("jsonl 5", "val"), ("jsonl c.jpg", "train")]
    rows = read(tmp_path / "x.json", json.dumps(records), "jsonl")
    assert short(rows) == {0: "one", 1: "two|three", 2: "four", 3: "no caption"}
    with pytest.raises(UserError, match=r"no column for the caption \(available: 'image', 'words'\)"):
        read(tmp_path / "x.jsonl", '{"image": "a.jpg", "words": "one"}\n' * 3, "jsonl")


def test_a_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Fails where an item on the border of two pieces is lost, or cut in two."""
    file = tmp_path / "x.json"
    items = [n if n % 3 else {"text": "é" * (n % 1000), "n": [n]} for n in range(6000)]
    file.write_text(json.dumps([*items, "x" * 3 * CHUNK, 1], indent=2, ensure_ascii=False))
    assert [*json_items(file)] == [*items, "x" * 3 * CHUNK, 1]
    for content in (b"", b"{}", b"[", b"[1, 2", b"[1 x]", b'["\xff"]', b"[" * 200_000, b"[" + b"1" * 5000):
        file.write_bytes(content)
        with pytest.raises(UserError):
            [*json_items(file)]


def test_a_line_without_end_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\n" + b"x" * (2 * MAX_LINE_BYTES + 5) + b"\nb\n")
    lines = [(line.number, line.text, line.problem and line.problem[0]) for line in text_lines(tmp_path / "x.txt")]
    assert lines == [(1, "a", None), (2, "", "line too long"), (3, "b", None)]
