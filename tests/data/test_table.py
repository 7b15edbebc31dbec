"""Cached tables, and the examples that are read from them."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskvlm.data.files import ImagesByKey
from maskvlm.data.table import EXAMPLE_COLUMNS, ParsedColumns, RowOrigin, Table, TableRows, cached_table, choose_rows
from maskvlm.utils.errors import ExitCode, UserError

COLUMNS: Any = {"word": "string", "numbers": ["int64"]}
TOY_COLUMNS = ParsedColumns({"word": ["a", "b"], "numbers": [[1, 2], []]}, {"left out": [3]})
ORIGIN = RowOrigin(Path("folder/toy.jsonl"), "{file}:{place}")


# ------------------------------------------------------------------ the cache


def test_a_table_is_made_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        table = cached_table("toy-1", str(tmp_path), COLUMNS, lambda: calls.append(1) or TOY_COLUMNS)  # type: ignore[func-returns-value]
        assert table.rows[:] == TOY_COLUMNS.columns
        assert (table.name, table.notes) == ("toy-1", {"left out": [3]})
    assert calls == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["toy-1"]


def test_tables_go_to_the_folder_of_the_library_by_default(own_cache: None, tmp_path: Path) -> None:
    cached_table("toy-1", None, COLUMNS, lambda: TOY_COLUMNS)
    assert (tmp_path / "cache" / "maskvlm" / "toy-1" / "notes.json").is_file()


def test_a_parser_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> ParsedColumns:
        raise UserError("toy.json", "wrong", "Mend it")

    with pytest.raises(UserError, match="wrong"):
        cached_table("toy-1", str(tmp_path / "cache"), COLUMNS, fail)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache cannot be written") as caught:
        cached_table("toy-1", str(tmp_path / "file"), COLUMNS, lambda: TOY_COLUMNS)
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_a_damaged_table_says_what_to_delete(tmp_path: Path) -> None:
    cached_table("toy-1", str(tmp_path), COLUMNS, lambda: TOY_COLUMNS)
    for file in (tmp_path / "toy-1").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"toy-1: the cached table cannot be read .* Delete this folder") as caught:
        cached_table("toy-1", str(tmp_path), COLUMNS, lambda: TOY_COLUMNS)
    assert caught.value.code == ExitCode.IO_ERROR
    shutil.rmtree(tmp_path / "toy-1")
    assert len(cached_table("toy-1", str(tmp_path), COLUMNS, lambda: TOY_COLUMNS).rows) == 2


# ------------------------------------------------------------------ examples


def rows_of(*texts: str, images: int = 1) -> TableRows:
    """Row i stands on line i + 1, has the id `e<i>` and the images `toy <i>-0`, `toy <i>-1`, ..."""
    rows = TableRows(ORIGIN, "pairID")
    for i, text in enumerate(texts):
        keys = [f"toy {i}-{side}" for side in range(images)]
        rows.add(place=i + 1, id=f"e{i}", images=keys, text=text, answers=["yes"], kind="k", group=f"g{i}")
    return rows


def stored(rows: TableRows, folder: Path) -> Table:
    return cached_table("toy-1", str(folder), EXAMPLE_COLUMNS, rows.finish)


def images_of(*keys: str) -> ImagesByKey:
    return ImagesByKey(Path("photos"), {f"toy {key}": f"{key}.png" for key in keys})


def test_an_id_must_not_stand_there_twice() -> None:
    rows = rows_of("a", "b")
    with pytest.raises(UserError) as caught:
        rows.add(place=7, id="e1", images=[], text="c", answers=[])
    assert str(caught.value) == (
        "folder/toy.jsonl:7: pairID 'e1' appears twice, first at toy.jsonl:2. Keep one of the two rows."
    )
    assert "e1" in rows
    assert "e2" not in rows


def test_a_file_without_examples_is_refused() -> None:
    with pytest.raises(UserError, match=r"folder/toy\.jsonl: no example in this file"):
        TableRows(ORIGIN, "id").finish()


def test_rows_come_back_as_examples(tmp_path: Path) -> None:
    examples = choose_rows(stored(rows_of("one", "two", images=2), tmp_path), ORIGIN, "val", images_of(*PAIRS), 0)
    assert len(examples) == 2
    assert examples[1] == {
        "images": ["photos/1-0.png", "photos/1-1.png"],
        "image_ids": ["toy 1-0", "toy 1-1"],
        "text": "two",
        "answers": ["yes"],
        "id": "e1",
        "kind": "k",
        "group": "g1",
        "origin": "toy.jsonl:2",
    }
    assert [*examples.image_ids()] == ["toy 0-0", "toy 0-1", "toy 1-0", "toy 1-1"]
    assert examples.skipped == {}
    assert pickle.loads(pickle.dumps(examples))[1] == examples[1]
    with pytest.raises(IndexError):
        examples[2]


PAIRS = ("0-0", "0-1", "1-0", "1-1")


def test_a_mended_text_is_counted_in_every_split(tmp_path: Path) -> None:
    table = stored(rows_of("a \ud800", "a\x00 b", "w " * 5000), tmp_path)
    for split in ("train", "test"):
        examples = choose_rows(table, ORIGIN, split, images_of("0-0", "1-0", "2-0"), 0)
        assert [examples[i]["text"] for i in range(2)] == ["a \ufffd", "a b"]
        assert examples.skipped == {
            "text surrogate": ["toy.jsonl:1"],
            "text control": ["toy.jsonl:2"],
            "text cut": ["toy.jsonl:3"],
        }


def test_training_leaves_rows_out_and_lists_them(tmp_path: Path) -> None:
    table = stored(rows_of("a", " ", "c", "d", "e"), tmp_path)
    drop = {"too easy": np.array([True, True, False, False, False])}
    examples = choose_rows(table, ORIGIN, "train", images_of("0-0", "1-0", "2-0", "4-0"), 0.34, drop)
    assert [examples[i]["id"] for i in range(len(examples))] == ["e2", "e4"]
    assert [examples[i]["images"] for i in range(2)] == [["photos/2-0.png"], ["photos/4-0.png"]]
    assert examples.skipped == {
        "empty text": ["toy.jsonl:2"],
        "too easy": ["toy.jsonl:1"],
        "missing image": ["toy.jsonl:4"],
    }
    assert [*examples.image_ids()] == ["toy 2-0", "toy 4-0"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_leaves_no_row_out(split: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose_rows(stored(rows_of("a", " ", "c"), tmp_path), ORIGIN, split, images_of("0-0", "1-0", "2-0"), 1)
    assert str(caught.value).startswith("folder/toy.jsonl:2: the text is empty. ")


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_misses_no_image(split: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose_rows(stored(rows_of("a", "b", images=2), tmp_path), ORIGIN, split, images_of("0-0", "0-1", "1-0"), 1)
    assert str(caught.value).startswith(
        f"folder/toy.jsonl:2: 1 of 2 examples of split '{split}' lacks an image in photos: toy 1-1. "
    )
    assert caught.value.code == ExitCode.MISSING_INPUT


def test_images_none_of_which_is_named_are_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 2 examples of split 'train' lack an image"):
        choose_rows(stored(rows_of("a", "b"), tmp_path), ORIGIN, "train", images_of("7-0"), 1.0)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    drop = {"too easy": np.array([True, False])}
    with pytest.raises(UserError, match=r"no examples are left \(empty text: 1, too easy: 1\)"):
        choose_rows(stored(rows_of("a", ""), tmp_path), ORIGIN, "train", images_of("0-0", "1-0"), 1.0, drop)


@pytest.mark.parametrize(
    ("texts", "todo"), [(("a", ""), "Choose easier ones"), (("", " "), "Take the complete file")], ids=["drop", "text"]
)
def test_what_to_do_follows_from_why_nothing_is_left(texts: tuple[str, ...], todo: str, tmp_path: Path) -> None:
    drop = {"too easy": np.array([True, False])}
    with pytest.raises(UserError) as caught:
        choose_rows(
            stored(rows_of(*texts), tmp_path), ORIGIN, "train", images_of(*PAIRS), 1.0, drop, "Choose easier ones"
        )
    assert (caught.value.where, caught.value.todo) == ("folder/toy.jsonl", todo)


def test_a_split_that_may_be_empty_lists_what_it_left_out(tmp_path: Path) -> None:
    drop = {"too easy": np.array([True, True])}
    examples = choose_rows(stored(rows_of("a", "b"), tmp_path), ORIGIN, "train", images_of("0-0"), 0, drop, None)
    assert len(examples) == 0
    assert [*examples.image_ids()] == examples.column("id").to_pylist() == []
    assert examples.skipped == {"too easy": ["toy.jsonl:1", "toy.jsonl:2"]}
    with pytest.raises(IndexError):
        examples[0]


def test_the_fingerprint_follows_table_and_rows(tmp_path: Path) -> None:
    table, all_there, one_there = stored(rows_of("a", "b"), tmp_path), images_of("0-0", "1-0"), images_of("0-0")
    prints = [choose_rows(table, ORIGIN, "train", images, 0.5).fingerprint for images in (all_there, one_there)]
    other = Table("toy-2", table.rows, table.notes)
    prints.append(choose_rows(other, ORIGIN, "train", all_there, 0.5).fingerprint)
    assert len(set(prints)) == 3
    assert choose_rows(table, ORIGIN, "train", all_there, 0).fingerprint == prints[0]
