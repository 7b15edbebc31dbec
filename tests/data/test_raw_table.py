"""Tables of text: what a damaged row costs, how columns are found, and that no bytes lead astray."""

import csv
import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.raw.columns import find_columns, name_problem, split_named, split_of_path
from maskvlm.data.raw.lines import CHUNK, MAX_LINE_BYTES, json_items, text_lines
from maskvlm.data.raw.table import RawTable
from maskvlm.utils.errors import ExitCode, UserError

FAST = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def read(file: Path, content: bytes | str, name: str = "csv", **columns: str) -> list[RawRow | BadRow]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [*open_raw(name, str(file), columns or None).rows()]


def short(rows: list[RawRow | BadRow]) -> list[Any]:
    """(captions, origin) of good rows, (reason, origin) of bad ones."""
    return [(row.captions if isinstance(row, RawRow) else row.reason, row.origin.split(":")[1]) for row in rows]


# ------------------------------------------------------------------ quotes


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['a.jpg,"one, two"', "b.jpg,three"], [(("one, two",), "2"), (("three",), "3")]),
        (['a.jpg,"one', 'two"', "b.jpg,three"], [(("one\ntwo",), "2"), (("three",), "4")]),
        (['a.jpg,"one ""two"""', "b.jpg,three"], [(('one "two"',), "2"), (("three",), "3")]),
        (['a.jpg,5" pipe', "b.jpg,three"], [(('5" pipe',), "2"), (("three",), "3")]),
        # left open: the row alone is lost, whatever quotes come after it
        (['a.jpg,"one', "b.jpg,three"], [("quote left open", "2"), (("three",), "3")]),
        (['a.jpg,"one', 'b.jpg,"three"'], [("quote left open", "2"), (("three",), "3")]),
        (
            ['a.jpg,"one', 'b.jpg,"three, four"', "c.jpg,x"],
            [("quote left open", "2"), (("three, four",), "3"), (("x",), "4")],
        ),
        # a caption of several lines, of which one looks like a row
        (
            ['a.jpg,"like', "b.jpg,but darker", 'from above"', "b.jpg,x"],
            [(("like\nb.jpg,but darker\nfrom above",), "2"), (("x",), "5")],
        ),
        (['a.jpg,"one', "b.jpg,three", 'c.jpg,big"'], [("quote left open", "2"), (("three",), "3"), (('big"',), "4")]),
        (
            ['a.jpg,"one', 'b.jpg,"three', "c.jpg,x"],
            [("quote left open", "2"), ("quote left open", "3"), (("x",), "4")],
        ),
        (['a.jpg,"a "big" dog"', "b.jpg,three"], [("quotes do not fit", "2"), (("three",), "3")]),
        (['"one', 'two"', "b.jpg,three"], [("quote left open", "2"), ("missing column", "3"), (("three",), "4")]),
        (["a.jpg", "b.jpg,three"], [("missing column", "2"), (("three",), "3")]),
        (["a.jpg,one,two", "b.jpg,three"], [("too many columns", "2"), (("three",), "3")]),
    ],
)
def test_a_damaged_row_costs_itself_alone(tmp_path: Path, lines: list[str], expected: list[Any]) -> None:
    """Fails where a joined row is taken without asking whether it swallowed others (`Table._is_row`)."""
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = short(read(tmp_path / "x.csv", "\n".join(["image,caption", *lines])))
    assert sorted(rows, key=lambda row: row[1]) == expected


def test_a_caption_before_the_image_may_go_over_lines(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    rows = read(tmp_path / "x.csv", 'caption,image\n"one\n\ntwo",a.jpg\n"three,b.jpg\n"four",b.jpg\n')
    assert short(rows) == [("quote left open", "5"), (("one\n\ntwo",), "2"), (("four",), "6")]


def test_a_quote_left_open_in_a_large_file_costs_one_row(tmp_path: Path) -> None:
    """Fails where lines are joined without bound: the rest of the file would be one caption."""
    touch(tmp_path, "a.jpg")
    lines = ["caption;image", '"open', *[f"{n};a.jpg" for n in range(3000)], 'end";a.jpg']
    rows = read(tmp_path / "x.csv", "\n".join(lines))
    assert short(rows)[0] == ("quote left open", "2")
    (good,) = rows[1:]
    assert isinstance(good, RawRow)
    assert len(good.captions) == 3001


def test_the_limit_of_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    limit = csv.field_size_limit()
    (row,) = read(tmp_path / "x.csv", f'image,caption\na.jpg,"{"dog " * 1_300_000}"\n')
    assert isinstance(row, RawRow)
    assert len(row.captions[0]) == 5_200_000
    assert csv.field_size_limit() == limit


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", "image\tcaption\na.jpg\tone, two\n"),
        ("x.csv", "image;caption\r\na.jpg;one, two\r\n"),
        ("x.csv", "\ufeffimage|caption\na.jpg|one, two"),
        ("x.csv", '"image","caption"\n\n"a.jpg","one, two"\n\n'),
        ("x.txt", "image\tcaption\na.jpg\tone, two\n"),
    ],
)
def test_delimiter_line_ends_and_mark_make_no_difference(tmp_path: Path, name: str, content: str) -> None:
    touch(tmp_path, "a.jpg")
    (row,) = read(tmp_path / name, content)
    assert isinstance(row, RawRow)
    assert row[:4] == (str(tmp_path / "a.jpg"), ("one, two",), "csv a.jpg", "train")


def test_excels_line_on_the_delimiter_is_honoured(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    for line in ("sep=;", '"sep=;"', "SEP=;"):
        (row,) = read(tmp_path / "x.csv", f"{line}\r\nimage;caption\r\na.jpg;one, two, three\r\n")
        assert row[1] == ("one, two, three",)
        assert row[4] == "x.csv:3"


def test_rows_of_an_image_are_one(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.jpg")
    table = (
        "file_name,text,image_id,split\na.jpg,one,7,train\nb.jpg,two,8,val\na.jpg,three,7,train\na.jpg,four,7,test\n"
    )
    rows = read(tmp_path / "x.csv", table)
    # One photo, however its place is spelled.
    spelled = table.replace("a.jpg,four", ".//a.jpg,four").replace("a.jpg,three", "images/a.jpg,three")
    assert read(tmp_path / "x.csv", spelled) == rows
    assert rows == [
        BadRow("image in two splits", "x.csv:5", "its image is in split 'train' at x.csv:2", "test"),
        RawRow(str(tmp_path / "images/a.jpg"), ("one", "three"), "csv 7", "train", "x.csv:2"),
        RawRow(str(tmp_path / "images/b.jpg"), ("two",), "csv 8", "val", "x.csv:3"),
    ]


def test_a_caption_that_its_image_has_already_is_left_out(tmp_path: Path) -> None:
    """Fails where the copy of a row is trained on as a second caption, or where it costs the image."""
    touch(tmp_path, "a.jpg", "b.jpg")
    table = "image,caption\na.jpg,one\nb.jpg,one\na.jpg,two\na.jpg, one\nb.jpg,one\n"
    again = "its image has this caption already, at x"
    assert read(tmp_path / "x.csv", table) == [
        BadRow("duplicate caption", "x.csv:5", f"{again}.csv:2", "train"),
        BadRow("duplicate caption", "x.csv:6", f"{again}.csv:3", "train"),
        RawRow(str(tmp_path / "a.jpg"), ("one", "two"), "csv a.jpg", "train", "x.csv:2"),
        RawRow(str(tmp_path / "b.jpg"), ("one",), "csv b.jpg", "train", "x.csv:3"),
    ]
    bad, row = read(tmp_path / "x.jsonl", '{"image": "a.jpg", "caption": ["one", "two", "one"]}\n', "jsonl")
    assert bad == BadRow("duplicate caption", "x.jsonl:1", f"{again}.jsonl:1", "train")
    assert row[1] == ("one", "two")


def test_an_id_is_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    rows = read(tmp_path / "x.csv", "image,caption,id\na.jpg,one,7\nb.jpg,two,7\n")
    assert short(rows) == [("duplicate id", "3"), (("one",), "2")]


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "train.csv").write_text("image,caption\na.jpg,one\n")
    (tmp_path / "val.csv").write_text("image,caption\nb.jpg,two\n")
    rows = [*open_raw("csv", str(tmp_path), as_name="mine").rows()]
    assert [(row.split, row.origin, row[2]) for row in rows] == [
        ("train", "train.csv:2", "mine a.jpg"),
        ("val", "val.csv:2", "mine b.jpg"),
    ]


def test_an_image_of_two_files_is_in_one_split(tmp_path: Path) -> None:
    """Also where the files give it other ids."""
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "train.csv").write_text("image,caption,id\na.jpg,one,1\n")
    (tmp_path / "val.csv").write_text("image,caption,id\nb.jpg,two,10\na.jpg,three,11\n")
    rows = [*open_raw("csv", str(tmp_path), as_name="mine").rows()]
    bad = BadRow("image in two splits", "val.csv:3", "its image is in split 'train' at train.csv:2", "val")
    assert [row if isinstance(row, BadRow) else row.image_id for row in rows] == ["mine 1", bad, "mine val 10"]


def test_an_image_of_two_files_of_a_split_is_told_with_its_first_place(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "one.csv").write_text("image,caption\na.jpg,one\n")
    (tmp_path / "two.csv").write_text("image,caption\nb.jpg,two\na.jpg,three\n")
    rows = [*open_raw("csv", str(tmp_path)).rows()]
    what = "its image is in another table, at one.csv:2; put its captions into one"
    assert [row for row in rows if isinstance(row, BadRow)] == [
        BadRow("image in two tables", "two.csv:3", what, "train")
    ]


def test_ids_may_start_anew_in_the_file_of_each_split(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    for split, image in (("train", "a"), ("val", "b")):
        (tmp_path / f"{split}.csv").write_text(f"image,caption,id\n{image}.jpg,one,0\n")
    rows = [*open_raw("csv", str(tmp_path), as_name="mine").rows()]
    assert [row[2] for row in rows] == ["mine 0", "mine val 0"]


def test_ids_may_start_anew_in_each_table(tmp_path: Path) -> None:
    """All of a table's ids change, so that they can be told apart; and no image is lost."""
    for table, first in (("one", 0), ("two", 2), ("three", 4)):
        names = [f"{first}.jpg", f"{first + 1}.jpg"]
        touch(tmp_path, *names)
        lines = "".join(f"{name},some,{number}\n" for number, name in enumerate(names, 1 if table == "two" else 0))
        (tmp_path / f"{table}.csv").write_text(f"image,caption,id\n{lines}")
    raw_set = open_raw("csv", str(tmp_path), as_name="mine")
    expected = ["mine 0", "mine 1", "mine three 0", "mine three 1", "mine two 1", "mine two 2"]
    for _ in range(2):  # notes are given once
        assert [row[2] for row in raw_set.rows()] == expected
    assert [note for note in raw_set.notes if "ids" in note] == [
        f"{table}.csv: its ids are also those of other images in an earlier table; read as '{table}' and the id"
        for table in ("three", "two")
    ]


def test_a_split_that_only_the_name_of_a_table_says_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    for name, count in (("my_test.csv", 1), ("test.csv", 0), ("mine.csv", 0)):
        (tmp_path / name).write_text("image,caption\na.jpg,one\n")
        raw_set = open_raw("csv", str(tmp_path / name))
        (row,) = raw_set.rows()
        assert row.split == ("train" if name == "mine.csv" else "test")
        assert len([note for note in raw_set.notes if "are of split 'test'" in note]) == count


def test_names_that_look_alike_in_one_line_have_ids_of_their_own(tmp_path: Path) -> None:
    long = "x" * 120 + "/" + "y" * 90
    names = ["a b.jpg", "a  b.jpg", f"{long}/1.jpg", f"{long}/2.jpg"]
    touch(tmp_path, *names)
    rows = read(tmp_path / "x.csv", "image,caption\n" + "".join(f"{name},one\n" for name in names))
    assert [type(row) for row in rows] == [RawRow] * 4
    ids = [row[2] for row in rows]
    assert ids[0] == "csv a b.jpg"  # an ordinary name is its id
    assert len({*ids}) == 4
    assert all(len(image_id) <= 200 for image_id in ids)


def test_several_tables_of_a_folder_are_read_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{name}.jpg,one\n")
    raw_set = open_raw("csv", str(tmp_path))
    assert raw_set.notes == ["2 tables of this folder are read: a.csv, b.csv; for one alone name the file itself"]
    assert len([*raw_set.rows()]) == 2


def test_a_name_of_a_column_cannot_reach_the_terminal(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "x\x1b[2J.csv").write_text("image,caption,red\x1b[31m \x9b2J\na.jpg,one,1\n")
    raw_set = open_raw("csv", str(tmp_path))
    assert len([*raw_set.rows()]) == 1
    (note,) = raw_set.notes
    assert "columns taken: image as image, caption as caption; not: red" in note
    assert note.isprintable()


def test_images_are_named_inside_the_folder(tmp_path: Path) -> None:
    """Fails where a name may lead out, through `..` or a whole path."""
    touch(tmp_path, "outside.jpg", "in/a.jpg")
    whole = [tmp_path / "in" / "a.jpg", tmp_path / "outside.jpg", tmp_path / "in" / ".." / "outside.jpg"]
    names = ["../outside.jpg", *map(str, whole), "sub/../../outside.jpg", "/etc/hostname", "~/x.jpg"]
    rows = read(tmp_path / "in" / "x.csv", "image,caption\n" + "".join(f"{name},one\n" for name in names))
    assert sorted(short(rows), key=lambda row: row[1]) == [
        ("unsafe name", "2"),
        (("one",), "3"),
        *[("unsafe name", f"{n}") for n in range(4, 8)],
        ("missing image", "8"),
    ]


@pytest.mark.parametrize(("set_name", "file"), [("csv", "x.csv"), ("jsonl", "x.jsonl")])
def test_images_may_be_in_another_folder(tmp_path: Path, set_name: str, file: str) -> None:
    """Relative to that folder or by their whole paths; nothing beside the table, and nothing outside the folder."""
    touch(tmp_path, "photos/a.jpg", "photos/sub/b.jpg", "photos/images/c.jpg", "tables/d.jpg", "outside.jpg")
    photos = tmp_path / "photos"
    names = ["a.jpg", f"{photos}/sub/b.jpg", "c.jpg", "d.jpg", "../outside.jpg", f"{tmp_path}/outside.jpg"]
    lines = ["image,caption", *(f"{name},one" for name in names)]
    if set_name == "jsonl":
        lines = [json.dumps({"image": name, "caption": "one"}) for name in names]
    (tmp_path / "tables" / file).write_text("\n".join(lines) + "\n")
    rows = [*open_raw(set_name, str(tmp_path / "tables" / file), images=str(photos)).rows()]
    found = [str(photos / name) for name in ("a.jpg", "sub/b.jpg", "images/c.jpg")]
    assert [row.image for row in rows if isinstance(row, RawRow)] == found
    wrong = [row for row in rows if isinstance(row, BadRow)]
    assert [row.reason for row in wrong] == ["missing image", "unsafe name", "unsafe name"]
    # its folder is named already
    assert not any("--images" in row.message for row in wrong)
    # without the option, the message says that there is one
    rows = [*open_raw(set_name, str(tmp_path / "tables" / file)).rows()]
    messages = [row.message for row in rows if isinstance(row, BadRow) and row.reason == "unsafe name"]
    assert len(messages) == 3
    assert all("; --images FOLDER names another folder" in message for message in messages)
    # likewise for a link beside the table
    (tmp_path / "tables" / "link.jpg").symlink_to(photos / "a.jpg")
    (tmp_path / "tables" / "x.csv").write_text("image,caption\nlink.jpg,one\n")
    (row,) = open_raw("csv", str(tmp_path / "tables" / "x.csv")).rows()
    assert isinstance(row, BadRow)
    assert "; --images FOLDER names another folder" in row.message


def test_the_named_folder_is_the_only_one(tmp_path: Path) -> None:
    """Fails where nothing says that an image beside the table is not the one that is taken."""
    touch(tmp_path, "photos/a.jpg", "tables/a.jpg")
    table = tmp_path / "tables" / "x.csv"
    table.write_text("image,caption\na.jpg,one\n")
    raw_set = open_raw("csv", str(table), images=str(tmp_path / "photos"))
    assert [row[0] for row in raw_set.rows()] == [str(tmp_path / "photos" / "a.jpg")]
    note = f"x.csv: images are taken from {tmp_path}/photos (--images), and none from beside the table"
    assert raw_set.notes == [note]
    raw_set = open_raw("csv", str(table), images=str(tmp_path / "tables"))
    assert len([*raw_set.rows()]) == 1
    assert raw_set.notes == []


def test_dots_in_a_name_are_relative_to_the_table(tmp_path: Path) -> None:
    """Fails where they are relative to the folder of images, or may leave it, also by a link."""
    touch(tmp_path, "photos/a.jpg", "photos/b.jpg", "tables/photos/b.jpg", "secret/x.jpg")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "secret")
    names = ["../photos/a.jpg", "../photos/sub/../b.jpg", "../secret/x.jpg", "../photos/link/x.jpg", "../photos"]
    table = tmp_path / "tables" / "x.csv"
    table.write_text("image,caption\n" + "".join(f"{name},one\n" for name in names))
    rows = [*open_raw("csv", str(table), images=str(tmp_path / "photos")).rows()]
    assert [row.image for row in rows if isinstance(row, RawRow)] == [
        str(tmp_path / "photos" / name) for name in ("a.jpg", "b.jpg")
    ]
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    assert reasons == ["unsafe name", "link leads out", "unsafe name"]
    (tmp_path / "x.csv").write_text("image,caption\nsub/../a.jpg,one\n")
    (row,) = open_raw("csv", str(tmp_path / "x.csv"), images=str(tmp_path / "photos")).rows()
    assert isinstance(row, BadRow)
    what = "with `..` relative to the table, the name leads out of the folder"
    assert row.message == f"'sub/../a.jpg': {what} {tmp_path}/photos"


def test_a_name_that_stays_in_the_folder_is_not_said_to_lead_out() -> None:
    assert name_problem("sub/../a.jpg") == "the name has '..' in it, below the folder"
    assert {name_problem(name) for name in ("../a", "a/../../b", "/a")} == {"the name leads out of the folder"}


def test_names_that_windows_wrote(tmp_path: Path) -> None:
    """Fails where a backslash is taken for a part of the name only, or leads out of the folder."""
    touch(tmp_path, "in/sub/a.jpg", "in/b\\c.jpg", "in/b/c.jpg", "out.jpg")
    names = ["sub\\a.jpg", "b\\c.jpg", "..\\out.jpg", "C:\\photos\\a.jpg"]
    rows = read(tmp_path / "in" / "x.csv", "image,caption\n" + "".join(f"{name},one\n" for name in names))
    # a file of just this name comes first
    assert [row.image for row in rows if isinstance(row, RawRow)] == [
        str(tmp_path / "in" / name) for name in ("sub/a.jpg", "b\\c.jpg")
    ]
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["missing image", "missing image"]


def test_a_cell_with_a_json_list_is_several_captions(tmp_path: Path) -> None:
    """Fails where the list is one caption, brackets and all. Any other text in brackets is one."""
    touch(tmp_path, "a.jpg")
    texts = ['["a dog", "a hound"]', '["one"]', "['a cat', 'a kitten']", "[sic] a bird", "[1]", "[]"]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *(["a.jpg", text] for text in texts)])
    raw_set = open_raw("csv", str(tmp_path / "x.csv"))
    assert short([*raw_set.rows()]) == [
        ("no caption", "7"),
        (("a dog", "a hound", "one", "['a cat', 'a kitten']", "[sic] a bird", "[1]"), "2"),
    ]
    assert raw_set.notes == [
        "x.csv: 2 cells with a JSON list of texts, each of which is a caption",
        "x.csv: 1 cell with a list that is not JSON, which stays one caption; write it as JSON (Python: json.dumps)",
    ]


def test_a_space_before_a_quote_is_named(tmp_path: Path) -> None:
    spaced, plain = read(tmp_path / "x.csv", 'image,caption\na.jpg, "one, two"\na.jpg,one, two\n')
    assert isinstance(spaced, BadRow)
    assert isinstance(plain, BadRow)
    assert "remove the space before it" in spaced.message
    assert "put text with ',' in quotes" in plain.message


def test_the_root_of_the_disk_may_be_the_folder_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "x.csv").write_text(f"image,caption\n{tmp_path}/a.jpg,one\n")
    (row,) = open_raw("csv", str(tmp_path / "x.csv"), images="/").rows()
    assert isinstance(row, RawRow)
    assert row.image == str(tmp_path / "a.jpg")


def test_a_folder_of_images_that_is_of_no_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,one\n")
    with pytest.raises(UserError, match=r"there is no such folder\. Name the folder of the images"):
        open_raw("csv", str(tmp_path / "x.csv"), images=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"set 'folder' has its own layout\. Leave it out, or use csv"):
        open_raw("folder", str(tmp_path), images=str(tmp_path))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_written_otherwise_on_the_disk(tmp_path: Path, forms: tuple[Any, Any]) -> None:
    """Fails where the table's own spelling alone is looked for: macOS writes NFD, most tables are NFC."""
    listed, lies = (unicodedata.normalize(form, "café.jpg") for form in forms)
    touch(tmp_path, f"images/{lies}")
    (row,) = read(tmp_path / "x.csv", f"image,caption\n{listed},one\n")
    assert isinstance(row, RawRow)
    assert row.image == str(tmp_path / "images" / lies)


def test_why_a_name_is_no_file(tmp_path: Path) -> None:
    touch(tmp_path, "UPPER.JPG", "images/sub/É.jpg", "outside.jpg", "1000268201.jpg", "v1.2.png", "notes.txt")
    (tmp_path / "LINK.jpg").symlink_to("/etc/hostname")
    names = [
        "upper.jpg",
        "sub/é.jpg",
        "sub",
        "https://a.org/b.jpg",
        "no.jpg",
        "link.jpg",
        "1000268201",
        "v1.2",
        "notes",
    ]
    rows = read(tmp_path / "x.csv", "image,caption\n" + "".join(f"{name},one\n" for name in names))
    assert [(row.reason, row.message) for row in rows if isinstance(row, BadRow)] == [
        ("missing image", f"'upper.jpg' is not in {tmp_path}; did you mean 'UPPER.JPG'?"),
        ("missing image", f"'sub/é.jpg' is not in {tmp_path}; did you mean 'sub/É.jpg'?"),
        ("folder", "'sub' is a folder; name an image in it"),
        ("address", "'https://a.org/b.jpg': addresses are not fetched; download the images first"),
        ("missing image", f"'no.jpg' is not in {tmp_path}"),
        ("missing image", f"'link.jpg' is not in {tmp_path}"),
        ("missing image", f"'1000268201' is not in {tmp_path}; did you mean '1000268201.jpg'?"),
        ("missing image", f"'v1.2' is not in {tmp_path}; did you mean 'v1.2.png'?"),
        ("missing image", f"'notes' is not in {tmp_path}"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.csv: is empty. It needs a header and one row per text."),
        (b"\n\n", "is empty"),
        (b"\xff\xfei\x00m\x00", "UTF-16 text. Save it as UTF-8"),
        (
            b"PK\x03\x04\x14\x00\n",
            "a spreadsheet (xlsx, ods) or a zip archive, not text. Save the sheet as csv, in UTF-8.",
        ),
        (b"\xd0\xcf\x11\xe0\xa1\n", "a spreadsheet (xls), not text. Save the sheet as csv, in UTF-8."),
        (gzip.compress(b"image,caption\n", mtime=0), "compressed by gzip. Unpack it first (gunzip -k)."),
        (
            b"PAR1\x15\x04\n",
            "a Parquet file, not text. If it holds the images themselves, use the set webdataset instead",
        ),
        (b"a,b\xe9\nx,y\n", "x.csv:1: not UTF-8 text (byte 3 is not UTF-8). Save the file as UTF-8."),
        (b"a\x00b\n", "x.csv:1: null bytes"),
        (b'"image,caption\n', "x.csv:1: the names of the columns cannot be read"),
        (
            b"name,words\na,b\n",
            "no column for the image and none for the caption (available: 'name', 'words'). Name one of them 'image' "
            "and another 'caption', or give it: --columns image=NAME,caption=NAME (make: ARGS=).",
        ),
        (
            b"Datei;Worte\na.jpg;Stra\xdfe\n",
            "x.csv:2: is not UTF-8 text; and no column for the image and none for the caption (available: 'Datei', "
            "'Worte'). Save the file as UTF-8. Name one of them",
        ),
        (
            b"Our photos\n;\nimage;caption\na.jpg;one\n",
            "no column for the image and none for the caption (available: 'Our photos'). "
            "Line 3 has names that fit: remove the lines above it.",
        ),
        (b"sep=;\n", "is empty"),
        (b"image,words\na,b\n", "no column for the caption (available: 'image', 'words')"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x.csv", content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == ExitCode.BAD_DATA


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=r"no column 'captoin' \(available: 'image', 'caption'\)\. Take 'caption'"):
        read(tmp_path / "x.csv", "image,caption\na.jpg,one\n", caption="captoin")
    (row,) = read(tmp_path / "x.csv", "photo,caption,note\na.jpg,one,two\n", caption="note")
    assert isinstance(row, RawRow)
    assert row.captions == ("two",)


def test_columns_are_found_by_their_names() -> None:
    assert find_columns(["Image Path", "ALT-text", "Split"], {}, "x") == {
        "image": "Image Path",
        "caption": "ALT-text",
        "split": "Split",
    }
    assert find_columns(["url", "image", "title", "caption"], {}, "x") == {"image": "image", "caption": "caption"}


def test_splits_by_their_names() -> None:
    names = ["train", "Training", "restval", "train2014", "", None, "val", "dev", "validation", "TEST", "test[:10%]"]
    assert [split_named(name) for name in names] == ["train"] * 6 + ["val"] * 3 + ["test"] * 2
    assert [split_named(name) for name in ("challenge", 3, "12")] == [None, None, None]
    paths = ["train/0.tar", "coco-val-00000.tar", "Validation_GCC-1.1.0-Validation", "00000.tar", "test/train/x"]
    assert [split_of_path(path) for path in paths] == ["train", "val", "val", "train", "train"]


# ------------------------------------------------------------------ json


def test_json_lines_with_one_caption_or_several(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    records = [
        {"image": "a.jpg", "caption": "one"},
        {"image": "b.jpg", "captions": ["two", "three"], "split": "val", "id": 5},
        {"file_name": "c.jpg", "text": "four"},
        {"image": "a.jpg"},
    ]
    rows = read(tmp_path / "x.jsonl", "\n\n".join(map(json.dumps, records)), "jsonl")
    assert short(rows) == [("no caption", "7"), (("one",), "1"), (("two", "three"), "3"), (("four",), "5")]
    assert [row[2:4] for row in rows[1:]] == [("jsonl a.jpg", "train"), ("jsonl 5", "val"), ("jsonl c.jpg", "train")]
    assert short(read(tmp_path / "x.json", json.dumps(records), "jsonl")) == [
        ("no caption", "3"),
        (("one",), "0"),
        (("two", "three"), "1"),
        (("four",), "2"),
    ]


def test_json_without_a_caption_anywhere_lists_its_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl:1: no column for the caption \(available: 'image', 'words'\)"):
        read(tmp_path / "x.jsonl", '{"image": "a.jpg", "words": "one"}\n' * 3, "jsonl")


def test_a_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Fails where an item on the border of two pieces is lost, or cut in two."""
    items = [n if n % 3 else {"text": "é" * (n % 1000), "n": [n]} for n in range(6000)]
    for spaces in (None, 2):
        file = tmp_path / "x.json"
        file.write_text(json.dumps(items, indent=spaces, ensure_ascii=False))
        assert file.stat().st_size > 2 * CHUNK
        assert [*json_items(file)] == items
    file.write_text(json.dumps(["x" * 3 * CHUNK, 1]))
    assert [len(str(item)) for item in json_items(file)] == [3 * CHUNK, 1]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[", b"[1, 2", b"[1 x]", b'["\xff"]', b"[" * 200_000, b"[" + b"1" * 5000]
)
def test_a_damaged_list_is_the_users_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError):
        [*json_items(tmp_path / "x.json")]


def test_a_line_without_end_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"a\n" + b"x" * (2 * MAX_LINE_BYTES + 5) + b"\nb\n")
    lines = [*text_lines(file)]
    assert [(line.number, line.text, line.problem and line.problem[0]) for line in lines] == [
        (1, "a", None),
        (2, "", "line too long"),
        (3, "b", None),
    ]


# ------------------------------------------------------------------ any bytes

PIECES = st.sampled_from(
    b'image caption a.jpg b.png , , " " \x00 \xff \xe9 "" one { } [ ] : {"image":"a.jpg","caption":"x"}'.split(b" ")
    + b"\n|\n|\r\n|\t| |\xed\xa0\x80|\\ud800".split(b"|")
)
BYTES = st.binary(max_size=200) | st.lists(PIECES, max_size=40).map(b"".join)


def outcome(read_all: Callable[[], list[RawRow | BadRow]]) -> list[RawRow | BadRow]:
    """Rows; [] where the file is refused in one line. Any other exception fails the test."""
    try:
        rows = read_all()
    except UserError as error:
        rows, refusal = [], str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
    for row in rows:
        assert isinstance(row, RawRow | BadRow)
        assert row.split in ("train", "val", "test")
        row.origin.encode()
        if isinstance(row, RawRow):
            assert row.captions
            row.image_id.encode()
        else:
            assert row.reason
            row.message.encode()
            assert "\n" not in row.message
    return rows


@FAST
@given(BYTES, st.booleans())
def test_any_bytes_as_csv(tmp_path: Path, content: bytes, header: bool) -> None:
    touch(tmp_path, "a.jpg", "b.png")
    outcome(lambda: read(tmp_path / "x.csv", b"image,caption\n" + content if header else content))


@FAST
@given(BYTES)
def test_any_bytes_as_jsonl(tmp_path: Path, content: bytes) -> None:
    touch(tmp_path, "a.jpg", "b.png")
    good = b'{"image": "a.jpg", "caption": "x"}\n'
    rows = outcome(lambda: read(tmp_path / "x.jsonl", good + content, "jsonl"))
    assert any(isinstance(row, RawRow) for row in rows), "the first line is whole"
    outcome(lambda: read(tmp_path / "x.json", content, "jsonl"))


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=20)


@FAST
@given(st.lists(CELLS, min_size=1, max_size=8))
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, captions: list[str]) -> None:
    """Fails where a quoted field with line ends, quotes or delimiters in it is not put together again."""
    file = tmp_path / "x.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([["image", "caption"], *[[f"{n}.jpg", text] for n, text in enumerate(captions)]])
    records = [*RawTable(file).records()]
    swallowed = any(any(suffix in text for suffix in (".jpg", ".png")) for text in captions)
    assert swallowed or [record.fields for record in records] == [[f"{n}.jpg", text] for n, text in enumerate(captions)]


def test_a_table_in_a_hidden_folder_is_none_of_the_set(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", ".cache/b.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.jpg,one\n")
    (tmp_path / ".cache" / "metadata.csv").write_text("x,y\n1,2\n")
    assert [row[1] for row in open_raw("folder", str(tmp_path)).rows()] == [("one",)]


def test_a_folder_may_be_named_from_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`../photos`: fails where paths with and without `..` are compared."""
    touch(tmp_path, "photos/a.jpg", "photos/b.jpg", "here/x")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,caption\na.jpg,one\n")
    (tmp_path / "photos" / "b.txt").write_text("two")
    monkeypatch.chdir(tmp_path / "here")
    rows = [*open_raw("folder", "../photos").rows()]
    assert [(row[1], row.image_id) for row in rows if isinstance(row, RawRow)] == [
        (("one",), "folder a.jpg"),
        (("two",), "folder b.jpg"),
    ]
