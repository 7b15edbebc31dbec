"""Data sets as memory-mapped Arrow tables, built once and cached, and the examples read from such a table.

A table is named by the content of its files, so that it is rebuilt when they change and shared by several runs. Neither
a large annotation file nor many processes cost memory. Images stay files until they are needed.

Shapes: N rows, P images per row.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.examples import Example
from maskvlm.data.files import ImagesByKey, check_missing
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, so only where it is used

Columns = dict[str, str | list[str]]
"""Name -> Arrow type ("string", "int64"), in a list if each row has a list of them."""

EXAMPLE_VERSION = 1
"""Raise it when `TableRows` makes a different table from the same file; it is part of the tables' names."""


class ParsedColumns(NamedTuple):
    """The result of a parser. columns: name -> N values; notes: anything that JSON can represent."""

    columns: dict[str, list[Any]]
    notes: dict[str, Any]


class Table(NamedTuple):
    """A cached table. `name` identifies it, including its content."""

    name: str
    rows: "Dataset"
    notes: dict[str, Any]


# ------------------------------------------------------------------ the cache


def cached_table(name: str, cache: str | None, columns: Columns, make: Callable[[], ParsedColumns]) -> Table:
    """The table of this name, from the cache or built now.

    Args:
        name: name of its folder; contains a digest of everything the table depends on, and a version.
        cache: folder of the tables; by default in the cache of Hugging Face datasets.
        columns: the columns of the table.
        make: reads the files; called if the cache has no such table.

    Raises:
        UserError: the cache cannot be written, or the cached table cannot be read.
    """
    import datasets

    parent = expand_user(cache) if cache else Path(datasets.config.HF_DATASETS_CACHE) / "maskvlm"
    folder = parent / name
    # the name contains a digest of all inputs, so a cached table is never stale
    if not folder.is_dir():
        # the files are parsed once for all runs
        content = make()
        try:
            _write(content, columns, folder)
        except OSError as error:
            what = f"the cache cannot be written ({error.strerror or error})"
            raise UserError(parent, what, "Set `cache` to another folder", ExitCode.CANNOT_CREATE) from error
    try:
        # memory-mapped: all processes share its pages
        rows = datasets.Dataset.load_from_disk(folder / "table")
        return Table(name, rows, json.loads((folder / "notes.json").read_text()))
    except Exception as error:
        what = f"the cached table cannot be read ({type(error).__name__})"
        raise UserError(folder, what, "Delete this folder; it will be created again", ExitCode.IO_ERROR) from error


def _write(content: ParsedColumns, columns: Columns, folder: Path) -> None:
    """Write the table atomically, as other processes may read or write the same table at the same time."""
    import datasets

    kinds = {
        name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
        for name, kind in columns.items()
    }
    features = datasets.Features(kinds)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # in the same parent folder, as a rename is atomic only within a file system
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as work, _no_bars():
        # `features` determines the order of the columns
        new, values = Path(work) / folder.name, {name: content.columns[name] for name in features}
        datasets.Dataset.from_dict(values, features).save_to_disk(new / "table")
        (new / "notes.json").write_text(json.dumps(content.notes))
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    bars_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars_enabled:
            datasets.enable_progress_bars()


# ------------------------------------------------------------------ examples, going in


class RowOrigin(NamedTuple):
    """How rows are named: `pattern` gives the position of row number `place` in the file ("{file}:{place}")."""

    file: Path
    pattern: str

    def short(self, place: int) -> str:
        """Origin with only the file's name, as stored in examples."""
        return self.pattern.format(file=self.file.name, place=place)

    def full(self, place: int) -> str:
        """Origin with the file's path, as used in errors."""
        return self.pattern.format(file=self.file, place=place)


EXAMPLE_COLUMNS: Columns = {
    "images": ["string"],  # the ids of a row's images
    "text": "string",  # cleaned; "" if nothing was left
    "answers": ["string"],
    "id": "string",
    "kind": "string",
    "group": "string",
    "place": "int64",
}


class TableRows:
    """Collects the columns of an examples table while a file is read.

    Args:
        origin: names the rows in errors.
        id_key: the file's key for the id, for errors.
        more: string columns besides EXAMPLE_COLUMNS.
    """

    def __init__(self, origin: RowOrigin, id_key: str, *more: str) -> None:
        self.origin, self.id_key = origin, id_key
        self.values: dict[str, list[Any]] = {name: [] for name in (*EXAMPLE_COLUMNS, *more)}
        self.notes: dict[str, list[int]] = {}
        self._place_of: dict[str, int] = {}

    def add(
        self,
        place: int,
        id: str,
        images: list[str],
        text: str,
        answers: list[str],
        kind: str = "",
        group: str = "",
        **more: str,
    ) -> None:
        """Append a row. Raises UserError if the id already exists."""
        # a place identifies a row, so the same id at another place is a second row
        if (first := self._place_of.setdefault(id, place)) != place:
            what = f"{self.id_key} '{id}' appears twice, first at {self.origin.short(first)}"
            raise UserError(self.origin.full(place), what, "Keep one of the two rows", ExitCode.BAD_DATA)
        clean, note = clean_caption(text)
        if note and clean:
            self.note(f"text {note}", place)
        row = {"images": images, "text": clean, "answers": answers, "id": id, "kind": kind, "group": group}
        for name, value in {**row, "place": place, **more}.items():
            self.values[name].append(value)

    def __contains__(self, id: str) -> bool:
        return id in self._place_of

    def note(self, reason: str, place: int) -> None:
        """Record a row that was left out or repaired."""
        self.notes.setdefault(reason, []).append(place)

    def finish(self) -> ParsedColumns:
        """The finished table. Raises UserError if no row was added."""
        if not self.values["id"]:
            raise UserError(self.origin.file, "no example in this file", "Take the complete file", ExitCode.BAD_DATA)
        return ParsedColumns(self.values, self.notes)


# ------------------------------------------------------------------ examples, coming out


class TableExamples:
    """Rows of an examples table with their images (an `Examples`).

    Attributes:
        row_N: the selected rows of the table.
        fingerprint: changes with the table and with the selected rows.
        skipped: reason -> the rows that were left out or repaired.
    """

    def __init__(
        self, table: Table, row_N: np.ndarray, number_NP: np.ndarray, images: ImagesByKey, origin: RowOrigin
    ) -> None:
        self.row_N, self.skipped = row_N, dict[str, list[str]]()
        self._rows, self._number_NP, self._images, self._origin = table.rows, number_NP, images, origin
        # the table's name contains the digest of its content
        identity = f"{EXAMPLE_VERSION} {table.name}".encode() + row_N.astype(np.int64).tobytes()
        self.fingerprint = hashlib.sha256(identity).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.row_N)

    def __getitem__(self, index: int, /) -> Example:
        row = self._rows[int(self.row_N[index])]
        return Example(
            # `_number_NP` is indexed by selected row, `row_N` points into the table
            images=[self._images.image(number) for number in self._number_NP[index]],
            image_ids=row["images"],
            text=row["text"],
            answers=row["answers"],
            id=row["id"],
            kind=row["kind"],
            group=row["group"],
            origin=self._origin.short(row["place"]),
        )

    @property
    def image_identity(self) -> str:
        """A hash of its image files; checks each of them."""
        return self._images.identity(np.unique(self._number_NP))

    def image_ids(self) -> Iterator[str]:
        """Ids of all its images, each once, without opening them."""
        for image in pc.unique(pc.list_flatten(self.column("images"))):
            yield image.as_py()

    def column(self, name: str) -> pa.ChunkedArray:
        """One of EXAMPLE_COLUMNS, for the selected rows."""
        return self._rows.data.column(name).take(self.row_N)


def choose_rows(
    table: Table,
    origin: RowOrigin,
    split: str,
    images: ImagesByKey,
    max_missing: float,
    drop: dict[str, np.ndarray] | None = None,
    if_dropped: str | None = "Take the complete file",
) -> TableExamples:
    """The usable rows of a split.

    Args:
        split: for `train`, unusable rows are left out and listed; in other splits they are an error.
        max_missing: the share of training rows that may lack an image.
        drop: reason -> boolean array (N), True for rows to leave out for it, in any split; give it for training only.
        if_dropped: what to do if `drop` leaves no row, for the error; None if the split may be empty.

    Raises:
        UserError: nothing is left, too many images are missing, or evaluation would have to leave a row out.
    """
    # all (N,) of the whole table
    empty_N = np.asarray(table.rows.data.column("text").to_numpy()) == ""
    place_N = table.rows.data.column("place").to_numpy()
    if split != "train" and empty_N.any():
        where, todo = origin.full(place_N[empty_N][0]), "Fix the row: evaluation leaves nothing out"
        raise UserError(where, "the text is empty", todo, ExitCode.BAD_DATA)
    skipped = {reason: places for reason, places in table.notes.items() if places}
    kept_N = np.ones(len(empty_N), bool)
    # a row counts under the first reason for which it is left out
    for reason, out_N in {"empty text": empty_N, **(drop or {})}.items():
        skipped[reason] = place_N[kept_N & out_N].tolist()
        kept_N &= ~out_N
    images_N = table.rows.data.column("images")
    # N lists of P ids -> (N * P,) numbers -> (N, P)
    number_NP = images.find(pc.list_flatten(images_N)).reshape(len(images_N), -1)  # -1: missing
    # one missing image makes an example unusable
    absent_N = kept_N & (number_NP < 0).any(1)
    if absent_N.any():
        skipped["missing image"] = place_N[absent_N].tolist()
        where, absent = origin.full(place_N[absent_N][0]), _absent(table, absent_N, number_NP)
        check_missing(where, split, images.folder, absent, int(kept_N.sum()), max_missing, "examples")
    row_N = np.flatnonzero(kept_N & ~absent_N)
    if not len(row_N) and if_dropped:
        reasons = ", ".join(f"{reason}: {len(places)}" for reason, places in skipped.items() if places)
        todo = if_dropped if any(skipped[reason] for reason in drop or {}) else "Take the complete file"
        raise UserError(origin.file, f"no examples are left ({reasons})", todo, ExitCode.BAD_DATA)
    examples = TableExamples(table, row_N, number_NP[row_N], images, origin)
    # row numbers become places that users can look up
    examples.skipped = {reason: [*map(origin.short, places)] for reason, places in skipped.items() if places}
    return examples


def _absent(table: Table, absent_N: np.ndarray, number_NP: np.ndarray) -> list[str]:
    """The first missing image of each of these rows."""
    # (N,): index of the first missing image of a row; 0 if none is missing
    first_N = (number_NP < 0).argmax(1)
    images = table.rows.data.column("images").filter(pa.array(absent_N)).to_pylist()
    return [each[first] for each, first in zip(images, first_N[absent_N], strict=True)]
