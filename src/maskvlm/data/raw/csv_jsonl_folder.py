"""Own data: images named in a csv, tsv or jsonl file, or lying in a folder with their captions beside them."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.data.files import image_names, load_json
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.columns import Folder, Merged, find_columns, leads_out, not_looked_at, split_named, split_of_path
from maskvlm.data.raw.lines import NOT_UTF8, json_items, one_line, one_line_id, read_text, short_value, text_lines
from maskvlm.data.raw.table import RawTable
from maskvlm.data.safe_open import Inside, check_below
from maskvlm.data.strict_json import flaw
from maskvlm.utils.errors import ExitCode, UserError

PROBE = 1000
UNKNOWN_LICENCE = "not known to this program: see where the data is from"


class FileRow(NamedTuple):
    """A row of a file: its values by role, or (reason, message)."""

    place: int
    values: dict[str, Any]
    problem: tuple[str, str] | None = None


class TableSet(RawSet):
    """Rows of one or several csv, tsv, jsonl or json files; rows of the same image in one file are one image's
    captions, in another file of the split they are duplicates.

    Images are named relative to their file, or to `images/` beside it. Where no column says the split, the file's
    name does (`val.csv`), else it is `train`.

    Args:
        files: of one kind.
        name: the set's, starts the ids.
        columns: role -> column, for those that are not to be found by their names.
    """

    def __init__(self, files: list[Path], name: str, columns: dict[str, str] | None = None) -> None:
        self.files, self.name, self.columns = files, name, columns or {}
        self.facts, self.notes = Facts(name, None, None, UNKNOWN_LICENCE), []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows of each file: first the bad rows, then the images, in the order in which they first appear."""
        places: dict[str, FirstPlace] = {}
        for file in self.files:
            yield from file_rows(file, self.name, self.columns, self.notes, places)


class FirstPlace(NamedTuple):
    """Where an image stood first: `origin` is file and line."""

    split: str
    origin: str


def file_rows(
    file: Path,
    name: str,
    given_columns: dict[str, str],
    notes: list[str] | None = None,
    places: dict[str, FirstPlace] | None = None,
) -> Iterator[RawRow | BadRow]:
    """The rows of one file; `notes` is told which columns were taken.

    Args:
        places: images of the files before, by path; those of this one are added. An id of a file that is named after a
            split is of that split: in each file they may count from 0.

    Raises:
        UserError: the file cannot be read, or has no column for image or caption.
    """
    # rows wait until the whole file is read: those of an image may stand anywhere in it
    merged, folder, default = Merged(file.name, name), Folder(file.parent), split_of_path(file.stem)
    for entry in _entries(file, given_columns, notes if notes is not None else []):
        origin = f"{file.name}:{entry.place}"
        row = entry.problem or _values(entry.values, default)
        if isinstance(row, Values):
            path, problem = folder.place(row.image)
            # the image's path is its identity: two names may lead to it
            before = places.setdefault(path, FirstPlace(row.split, origin)) if path and places is not None else None
            own = f"{default} {row.id}" if row.id and places is not None and default != "train" else row.id
            bad: BadRow | None
            if problem:
                bad = BadRow(problem[0], origin, problem[1], row.split)
            elif before is not None and before.split != row.split:
                what = f"its image is in split {before.split!r} at {before.origin}"
                bad = BadRow("image in two splits", origin, what, row.split)
            else:
                bad = merged.add(path, row.captions, row.split, entry.place, own, row.image)
            if bad:
                yield bad
        else:
            yield BadRow(row[0], origin, row[1], default)
    yield from merged.rows()


def _entries(file: Path, given_columns: dict[str, str], notes: list[str]) -> Iterator[FileRow]:
    if file.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        yield from _objects(file, given_columns)
        return
    table = RawTable(file)
    try:
        columns = find_columns(table.columns, given_columns, file)
    except UserError as error:
        # both in one line, the encoding first: whoever saves the file anew may write other names
        if (number := first_not_text(file)) is not None:
            what = f"is not UTF-8 text; and {error.what}"
            todo = f"Save the file as UTF-8. {error.todo}"
            raise UserError(f"{file}:{number}", what, todo, error.code) from error
        raise
    # told once: a wrong guess of a column would otherwise go unnoticed
    if (rest := [name for name in table.columns if name not in columns.values() or table.columns.count(name) > 1]) and (
        note := one_line(f"{file.name}: columns taken: {_listed(columns)}; not: {', '.join(dict.fromkeys(rest))}", 1000)
    ) not in notes:
        notes.append(note)
    # of two columns with the same name the first
    at = {role: table.columns.index(name) for role, name in columns.items()}
    for number, fields, problem in table.records():
        yield FileRow(number, {} if problem else {role: fields[n] for role, n in at.items()}, problem)


def first_not_text(file: Path) -> int | None:
    """The first of the first PROBE lines that is no UTF-8 text, as in a table that was saved in Latin-1."""
    lines = islice(text_lines(file), PROBE)
    return next((line.number for line in lines if line.problem and line.problem[0] == NOT_UTF8), None)


def _listed(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} as {role}" for role, name in columns.items())


def _objects(file: Path, given_columns: dict[str, str]) -> Iterator[FileRow]:
    """Objects need not have the same keys; those of the first that has image and caption count where one lacks them.

    Raises:
        UserError: none of the first PROBE has.
    """
    usual: dict[str, str] = {}
    wrong: UserError | None = None
    # first pass: which keys are usual; the second one reads
    for entry in islice(_json(file), PROBE):
        if not entry.problem and not usual:
            try:
                usual = find_columns([*entry.values], given_columns, f"{file}:{entry.place}")
            except UserError as error:
                wrong = wrong or error
    if wrong and not usual:
        raise wrong
    # columns are found once for each set of keys, not once a row
    known: dict[tuple[str, ...], dict[str, str]] = {}
    for entry in _json(file):
        if entry.problem:
            yield entry
            continue
        keys = tuple(entry.values)
        if keys not in known:
            # bounded: in a hostile file each row has keys of its own
            known = known if len(known) < PROBE else {}
            known[keys] = _columns(keys, given_columns, file) or usual
        yield FileRow(entry.place, {role: entry.values.get(name) for role, name in known[keys].items()})


def _columns(keys: tuple[str, ...], given_columns: dict[str, str], file: Path) -> dict[str, str] | None:
    try:
        return find_columns(keys, given_columns, file)
    except UserError:
        return None


def _json(file: Path) -> Iterator[FileRow]:
    """Lines, or the items of one list; values by their own keys."""
    if file.suffix.lower() == ".json":
        # one list: items are counted from 0, lines below from 1
        for place, record in enumerate(json_items(file)):
            yield _entry(place, record)
        return
    for line in text_lines(file):
        if line.problem:
            yield FileRow(line.number, {}, line.problem)
        elif line.text.strip():
            try:
                record = load_json(line.text.encode(), file, line.number)
            except UserError as error:
                # one damaged line does not end the file
                yield FileRow(line.number, {}, ("not JSON", error.what))
                continue
            yield _entry(line.number, record)


def _entry(place: int, record: Any) -> FileRow:
    if problem := flaw(record):
        return FileRow(place, {}, ("not JSON", problem))
    if isinstance(record, dict):
        return FileRow(place, record)
    return FileRow(place, {}, ("not an object", f"{type(record).__name__} where a JSON object belongs"))


class Values(NamedTuple):
    """What a row says."""

    image: str
    captions: list[str]
    split: str
    id: str


def _values(values: dict[str, Any], default: str) -> Values | tuple[str, str]:
    """The row, or (reason, message)."""
    image, own, split_name = values.get("image"), values.get("id"), values.get("split")
    if not isinstance(image, str) or not image.strip():
        return "no image", f"the name of the image is {short_value(image)}"
    captions = texts_in(values.get("caption"))
    if captions is None:
        return "no caption", f"the caption is {short_value(values.get('caption'))}"
    # Here, where its line is known; rows of the same image are put together later.
    if not any(text.strip() for text in captions):
        return "empty caption", "the caption is empty"
    # a split that is given must be one; an empty one is train
    split = default if split_name is None else split_named(split_name)
    if split is None:
        return "unknown split", f"{short_value(split_name)} is not train, val or test"
    # true is an int for Python
    named = isinstance(own, str | int) and not isinstance(own, bool)
    return Values(image.strip(), captions, split, str(own).strip() if named else "")


def texts_in(value: Any) -> list[str] | None:
    """A text, or a list of texts; None where it is neither or has none."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    return None


# ------------------------------------------------------------------ folders


class FolderSet(RawSet):
    """Images with a text file of the same name beside them, or named in a `metadata.csv` or `metadata.jsonl`.

    The metadata file, as Hugging Face's ImageFolder has it, stands in the folder or one above, with a column
    `file_name`. Splits are those that a folder's name says (`train/`, `val/`, `test/`).
    """

    def __init__(self, root: Path, name: str, columns: dict[str, str] | None = None) -> None:
        self.root, self.name, self.columns = root, name, columns or {}
        self.facts, self.notes = Facts(name, None, None, UNKNOWN_LICENCE), []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """First what metadata files name, then the other images by name."""
        named: set[str] = set()
        whole_root = Path(os.path.abspath(self.root))  # as `Folder.place` spells paths: without `..`
        # a metadata file may stand in any folder below
        tables = [file for kind in ("csv", "jsonl") for file in self.root.rglob(f"metadata.{kind}")]
        # nor in hidden ones, as `Walk`
        tables = [file for file in tables if not any(part[0] == "." for part in file.relative_to(self.root).parts)]
        within = Inside(self.root)
        for file in sorted(tables):
            if not within.holds(file):
                reason, what = leads_out(file.name, self.root)
                yield BadRow(reason, one_line(file.relative_to(self.root)), what, "train")
                continue
            inside = file.parent.relative_to(self.root).as_posix()
            # `file_name` is ImageFolder's column, unless another one was given
            for row in file_rows(file, self.name, {"image": "file_name", **self.columns}):
                row = row._replace(origin=one_line(f"{inside}/{row.origin}" if inside != "." else row.origin))
                if isinstance(row, BadRow):
                    yield row
                    continue
                named.add(str(row.image))
                # ids are relative to RAW, so that two metadata files may use the same names
                own = Path(str(row.image)).relative_to(whole_root)
                split = split_of_path(own.parent.as_posix())
                image_id = one_line_id(f"{self.name} {own.as_posix()}")
                # a folder's name goes before the table's column
                yield row._replace(split=row.split if split == "train" else split, image_id=image_id)
        left_out: dict[str, list[str]] = {}
        # images that no table names
        for name in image_names(self.root, left_out):
            path = whole_root / name
            if str(path) not in named:
                yield self._with_text(path, name, within)
        yield from not_looked_at(left_out, self.root, "train")

    def _with_text(self, path: Path, name: str, within: Inside) -> RawRow | BadRow:
        split, beside = split_of_path(Path(name).parent.as_posix()), path.with_suffix(".txt")
        if not os.path.isfile(beside):
            what = (
                f"there is no {one_line(beside.name)} beside it, nor is it listed in a metadata.csv or metadata.jsonl"
            )
            return BadRow("no caption", one_line(name), what, split)
        text, problem = read_text(beside) if within.holds(beside) else ("", leads_out(beside.name, self.root))
        if problem:
            return BadRow(problem[0], one_line(beside.name), problem[1], split)
        return RawRow(str(path), (text,), one_line_id(f"{self.name} {name}"), split, one_line(name))


# ------------------------------------------------------------------ opening


def open_table(raw: str, name: str, columns: dict[str, str], kinds: tuple[str, ...]) -> RawSet:
    """A file of one of these kinds, or a folder with some of them: all are read.

    Raises:
        UserError: the folder has no such file.
    """
    path = Path(raw)
    if path.is_file():
        return TableSet([path], name, columns)
    if not path.is_dir():
        raise UserError(raw, "neither a file nor a folder", "Name a file or a folder", ExitCode.MISSING_INPUT)
    # of one folder, not below it
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds and not file.name.startswith("."))
    if not files:
        what = f"no {' or '.join('*' + kind for kind in kinds)} in this folder"
        raise UserError(raw, what, "Name the file itself", ExitCode.MISSING_INPUT)
    for file in files:
        check_below(file, path)
    tables = TableSet(files, name, columns)
    # Parts of one table, or tables that nobody meant: told, so that a stray one does not go unnoticed.
    if len(files) > 1:
        named = ", ".join(one_line(file.name, 60) for file in files[:5]) + (", ..." if len(files) > 5 else "")
        tables.notes.append(f"{len(files)} tables of this folder are read: {named}; for one alone name the file itself")
    return tables


def open_csv(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Tables of text."""
    return open_table(raw, name, columns, (".csv", ".tsv", ".tab"))


def open_jsonl(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Lines of JSON objects, or one list of them."""
    return open_table(raw, name, columns, (".jsonl", ".ndjson", ".json"))


def open_folder(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Images with captions beside them."""
    if not Path(raw).is_dir():
        raise UserError(raw, "not a folder", "Name the folder of the images", ExitCode.MISSING_INPUT)
    return FolderSet(Path(raw), name, columns)
