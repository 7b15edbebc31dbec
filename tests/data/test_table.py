"""Cached tables, and the examples that are read from them."""

import pickle
from collections.abc import Callable
from functools import partial
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
    with pytest.raises(ZeroDivisionError):  # a parser that fails leaves nothing behind
        cached_table("toy-2", str(tmp_path / "cache"), COLUMNS, lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file") as caught:
        cached_table("toy-1", str(tmp_path / "file"), COLUMNS, lambda: TOY_COLUMNS)
    assert caught.value.code == ExitCode.CANNOT_CREATE
    for file in (tmp_path / "toy-1").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match="toy-1") as caught:
        cached_table("toy-1", str(tmp_path), COLUMNS, lambda: TOY_COLUMNS)
    assert caught.value.code == ExitCode.IO_ERROR


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


def test_rows_that_are_no_set_are_refused(tmp_path: Path) -> None:
    """No rows, an id that stands there twice, no image, nothing left; in evaluation a row without text or image."""
    rows = rows_of("a", "")
    assert "e1" in rows
    assert "e2" not in rows
    drop = {"too easy": np.array([True, False])}
    table, whole = (stored(rows_of("a", text), tmp_path / f"cache{text}") for text in ("", "b"))
    reads: list[tuple[Callable[[], object], str]] = [
        (lambda: TableRows(ORIGIN, "id").finish(), "no example"),
        (lambda: rows.add(place=7, id="e1", images=[], text="c", answers=[]), "'e1' appears twice"),
        (lambda: choose_rows(table, ORIGIN, "train", images_of("7-0"), 1.0), "lacks an image"),
        (lambda: choose_rows(table, ORIGIN, "train", images_of("0-0"), 1.0, drop), "empty text: 1, too easy: 1"),
    ]
    for split in ("val", "test"):
        reads.append((partial(choose_rows, table, ORIGIN, split, images_of("0-0", "1-0"), 1), r"toy\.jsonl:2: "))
        reads.append((partial(choose_rows, whole, ORIGIN, split, images_of("1-0"), 1), r"toy\.jsonl:1: 1 of 2"))
    for read, name in reads:
        with pytest.raises(UserError, match=name):
            read()


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


def test_training_leaves_rows_out_and_lists_them(tmp_path: Path) -> None:
    """Mended texts too; the fingerprint follows the rows and the table. A split that may be empty can be."""
    table = stored(rows_of("a", " ", "c \ud800", "d", "e"), tmp_path)
    drop = {"too easy": np.array([True, True, False, False, False])}
    examples = choose_rows(table, ORIGIN, "train", images_of("0-0", "1-0", "2-0", "4-0"), 0.34, drop)
    assert [examples[i]["id"] for i in range(len(examples))] == ["e2", "e4"]
    assert [examples[i]["images"] for i in range(2)] == [["photos/2-0.png"], ["photos/4-0.png"]]
    assert examples.skipped == {
        "text surrogate": ["toy.jsonl:3"],
        "empty text": ["toy.jsonl:2"],
        "too easy": ["toy.jsonl:1"],
        "missing image": ["toy.jsonl:4"],
    }
    assert [*examples.image_ids()] == ["toy 2-0", "toy 4-0"]
    there = images_of(*(f"{i}-0" for i in range(5)))
    others = [choose_rows(each, ORIGIN, "train", there, 0, drop) for each in (table, table._replace(name="toy-2"))]
    assert len({examples.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert choose_rows(table, ORIGIN, "train", there, 0.5, drop).fingerprint == others[0].fingerprint
    none = choose_rows(table, ORIGIN, "train", there, 0, {"all": np.ones(5, dtype=bool)}, None)
    assert len(none) == len([*none.image_ids()]) == len(none.column("id")) == 0
