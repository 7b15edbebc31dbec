"""Users' own data: images listed in a csv, tsv or jsonl file, or in a folder with caption files next to them."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.data.caption_text import stable_id
from maskvlm.data.files import image_names, load_json
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.columns import (
    SPLITS,
    Folder,
    Merged,
    find_columns,
    leads_out,
    not_looked_at,
    split_named,
    split_of_path,
)
from maskvlm.data.raw.lines import (
    NOT_UTF8,
    json_items,
    json_texts,
    one_line,
    one_line_id,
    read_text,
    short_value,
    text_lines,
)
from maskvlm.data.raw.table import RawTable, delimiter_of, split_fields
from maskvlm.data.safe_open import Inside, check_below
from maskvlm.data.strict_json import flaw
from maskvlm.utils.errors import ExitCode, UserError

PROBE, TITLES = 1000, 20
CSV, JSON = (".csv", ".tsv", ".tab"), (".jsonl", ".ndjson", ".json")
"""Suffixes of tables."""
IMAGES_TODO = "; --images FOLDER names another folder of images, which the table may name by paths in it"
UNKNOWN_LICENCE = "not known to this program: see where the data is from"


class FileRow(NamedTuple):
    """A row of a file: values by role, or (reason, message)."""

    place: int
    values: dict[str, Any]
    problem: tuple[str, str] | None = None


class TableSet(RawSet):
    """Rows of one or several csv, tsv, jsonl or json files. Rows with the same image in one file are merged into one
    image with several captions, each once; in different files of a split they are duplicates.

    Image names are relative to their file, or to `images/` next to it, or to the folder `images`, if given. Without a
    column for it, the split is given by the file's name (`val.csv`), else it is `train`.

    Args:
        files: files of one kind.
        name: name of the set; prefix of the ids.
        columns: role -> column, for columns that cannot be found by name.
        images: the folder of the images, if it is not the files' own.
    """

    def __init__(
        self, files: list[Path], name: str, columns: dict[str, str] | None = None, images: Path | None = None
    ) -> None:
        self.files, self.name, self.columns, self.images = files, name, columns or {}, images
        self.facts, self.notes = Facts(name, None, None, UNKNOWN_LICENCE), []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows of each file: first the bad rows, then the images in the order of their first appearance."""
        earlier = Earlier({}, set())
        for file in self.files:
            folder = Folder(self.images, table=file.parent) if self.images else Folder(file.parent, IMAGES_TODO)
            # told, as images of the same names may be beside the table
            if self.images and os.path.realpath(self.images) != os.path.realpath(file.parent):
                note = f"{file.name}: images are taken from {self.images} (--images), and none from beside the table"
                if (note := one_line(note, 1000)) not in self.notes:
                    self.notes.append(note)
            yield from file_rows(file, self.name, self.columns, folder, self.notes, earlier)


class FirstPlace(NamedTuple):
    """First occurrence of an image: `origin` is file and line."""

    split: str
    origin: str
    file: str


class Earlier(NamedTuple):
    """What earlier tables of a set hold. places: images, by path. ids: hashes of their ids."""

    places: dict[str, FirstPlace]
    ids: set[int]


def file_rows(
    file: Path,
    name: str,
    given_columns: dict[str, str],
    folder: Folder,
    notes: list[str] | None = None,
    earlier: Earlier | None = None,
) -> Iterator[RawRow | BadRow]:
    """The rows of one file; a line on the columns used is appended to `notes`.

    Args:
        folder: where its images are.
        earlier: what earlier files hold; this file's images and ids are added. Ids in a file named after a split are
            specific to that split, and those of a file that repeats an earlier one's to that file, as each may count
            from 0.

    Raises:
        UserError: the file cannot be read, or has no column for image or caption.
    """
    # rows are held until the whole file is read, as those of an image may be anywhere in it
    merged, default = Merged(file.name, name, repeats=False), split_of_path(file.stem)
    notes = notes if notes is not None else []
    if earlier is not None and default != "train" and file.stem.lower() not in SPLITS:
        note = f"{file.name}: rows without a split of their own are of split {default!r}, as the file's name says"
        if (note := one_line(note, 1000)) not in notes:
            notes.append(note)
    for entry in _entries(file, given_columns, notes):
        origin = f"{file.name}:{entry.place}"
        row = entry.problem or _values(entry.values, default)
        if isinstance(row, Values):
            path, problem = folder.place(row.image)
            # the path identifies the image, as two names may refer to it
            here = FirstPlace(row.split, origin, file.name)
            before = earlier.places.setdefault(path, here) if path and earlier is not None else None
            own = f"{default} {row.id}" if row.id and earlier is not None and default != "train" else row.id
            bad: BadRow | None
            if problem:
                bad = BadRow(problem[0], origin, problem[1], row.split)
            elif before is not None and before.split != row.split:
                what = f"its image is in split {before.split!r} at {before.origin}"
                bad = BadRow("image in two splits", origin, what, row.split)
            elif before is not None and before.file != file.name:
                what = f"its image is in another table, at {before.origin}; put its captions into one"
                bad = BadRow("image in two tables", origin, what, row.split)
            else:
                bad = merged.add(path, row.captions, row.split, entry.place, own, row.image)
            if bad:
                yield bad
        else:
            yield BadRow(row[0], origin, row[1], default)
    yield from merged.rows() if earlier is None else own_ids([*merged.rows()], file, name, notes, earlier.ids)


def own_ids(rows: list[RawRow], file: Path, name: str, notes: list[str], ids: set[int]) -> Iterator[RawRow]:
    """The rows of a table; if an earlier one has used one of their ids, for another image, all ids get this table's
    name. `ids` grows by their hashes."""
    if any(stable_id(row.image_id) in ids for row in rows):
        prefix = one_line(file.stem)
        note = f"{file.name}: its ids are also those of other images in an earlier table; read as {prefix!r} and the id"
        if (note := one_line(note, 1000)) not in notes:
            notes.append(note)
        own = (one_line_id(f"{name} {prefix} {row.image_id.removeprefix(f'{name} ')}") for row in rows)
        rows = [row._replace(image_id=image_id) for row, image_id in zip(rows, own, strict=True)]
    ids.update(stable_id(row.image_id) for row in rows)
    yield from rows


def _entries(file: Path, given_columns: dict[str, str], notes: list[str]) -> Iterator[FileRow]:
    if file.suffix.lower() in JSON:
        yield from _objects(file, given_columns)
        return
    table = RawTable(file)
    try:
        columns = find_columns(table.columns, given_columns, file)
    except UserError as error:
        # both in one line, the encoding first, as saving the file again may change the names
        if (number := first_not_text(file)) is not None:
            what = f"is not UTF-8 text; and {error.what}"
            todo = f"Save the file as UTF-8. {error.todo}"
            raise UserError(f"{file}:{number}", what, todo, error.code) from error
        if number := line_of_columns(file, given_columns):
            todo = f"Line {number} has names that fit: remove the lines above it"
            raise UserError(file, error.what, todo, error.code) from error
        raise
    # reported once, as a wrong guess of a column would otherwise go unnoticed
    rest = [name for name in table.columns if name not in columns.values() or table.columns.count(name) > 1]
    unused = dict.fromkeys(name or "(a column without a name)" for name in rest)
    if (
        rest
        and (note := one_line(f"{file.name}: columns taken: {_listed(columns)}; not: {', '.join(unused)}", 1000))
        not in notes
    ):
        notes.append(note)
    # the first of two columns with the same name
    at = {role: table.columns.index(name) for role, name in columns.items()}
    lists, other_lists = 0, 0
    for number, fields, problem in table.records():
        values: dict[str, Any] = {} if problem else {role: fields[n] for role, n in at.items()}
        text = values.get("caption", "").strip()
        # a text in brackets that is not a list of texts stays one caption
        if text.startswith("[") and (texts := json_texts(text)) is not None:
            lists, values["caption"] = lists + bool(texts), texts
        else:
            other_lists += text.startswith(("['", '["')) and text.endswith("]")
        yield FileRow(number, values, problem)
    for count, what in (
        (lists, "with a JSON list of texts, each of which is a caption"),
        (other_lists, "with a list that is not JSON, which stays one caption; write it as JSON (Python: json.dumps)"),
    ):
        note = one_line(f"{file.name}: {'1 cell' if count == 1 else f'{count:,} cells'} {what}", 1000)
        if count and note not in notes:
            notes.append(note)


def first_not_text(file: Path) -> int | None:
    """The first of the first PROBE lines that is not UTF-8, as in a table saved in Latin-1."""
    lines = islice(text_lines(file), PROBE)
    return next((line.number for line in lines if line.problem and line.problem[0] == NOT_UTF8), None)


def line_of_columns(file: Path, given_columns: dict[str, str]) -> int | None:
    """The first of the first TITLES lines that could be the names of the columns, as below a title."""
    for line in islice(text_lines(file), TITLES):
        names = split_fields(line.text, delimiter_of(file, line.text))
        if isinstance(names, list) and _columns([name.strip() for name in names], given_columns, file):
            return line.number
    return None


def _listed(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} as {role}" for role, name in columns.items())


def _objects(file: Path, given_columns: dict[str, str]) -> Iterator[FileRow]:
    """Rows of JSON objects, which need not have the same keys: an object without keys for image and caption uses those
    of the first object that has them.

    Raises:
        UserError: none of the first PROBE objects has them.
    """
    usual: dict[str, str] = {}
    wrong: UserError | None = None
    # the first pass finds the usual keys, the second one reads
    for entry in islice(_json(file), PROBE):
        if not entry.problem and not usual:
            try:
                usual = find_columns([*entry.values], given_columns, f"{file}:{entry.place}")
            except UserError as error:
                wrong = wrong or error
    if wrong and not usual:
        raise wrong
    # columns are looked up once per set of keys, not once per row
    known: dict[tuple[str, ...], dict[str, str]] = {}
    for entry in _json(file):
        if entry.problem:
            yield entry
            continue
        keys = tuple(entry.values)
        if keys not in known:
            # bounded, as in a hostile file each row may have different keys
            known = known if len(known) < PROBE else {}
            known[keys] = _columns(keys, given_columns, file) or usual
        yield FileRow(entry.place, {role: entry.values.get(name) for role, name in known[keys].items()})


def _columns(keys: Sequence[str], given_columns: dict[str, str], file: Path) -> dict[str, str] | None:
    try:
        return find_columns(keys, given_columns, file)
    except UserError:
        return None


def _json(file: Path) -> Iterator[FileRow]:
    """JSON lines, or the items of one list; values by their own keys."""
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
                # one damaged line does not stop the reading
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
    """The values of a row."""

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
    # Here, where its line is known; rows of the same image are merged later.
    if not any(text.strip() for text in captions):
        return "empty caption", "the caption is empty"
    # a given split must be valid; an empty one is train
    split = default if split_name is None else split_named(split_name)
    if split is None:
        return "unknown split", f"{short_value(split_name)} is not train, val or test"
    # true is an int for Python
    named = isinstance(own, str | int) and not isinstance(own, bool)
    return Values(image.strip(), captions, split, str(own).strip() if named else "")


def texts_in(value: Any) -> list[str] | None:
    """A text or a list of texts, as a list; None if it is neither, or empty."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    return None


# ------------------------------------------------------------------ folders


class FolderSet(RawSet):
    """Images with a text file of the same name next to them, or listed in a `metadata.csv` or `metadata.jsonl`.

    The metadata file, as in Hugging Face's ImageFolder, is in the folder or one above, with a column `file_name`.
    Splits are given by folder names (`train/`, `val/`, `test/`).
    """

    def __init__(self, root: Path, name: str, columns: dict[str, str] | None = None) -> None:
        self.root, self.name, self.columns = root, name, columns or {}
        self.facts, self.notes = Facts(name, None, None, UNKNOWN_LICENCE), []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """First the images listed in metadata files, then the other images by name."""
        named: set[str] = set()
        whole_root = Path(os.path.abspath(self.root))  # like the paths of `Folder.place`: without `..`
        # a metadata file may be in any subfolder
        tables = [file for kind in ("csv", "jsonl") for file in self.root.rglob(f"metadata.{kind}")]
        # except hidden ones, as in `Walk`
        tables = [file for file in tables if not any(part[0] == "." for part in file.relative_to(self.root).parts)]
        within = Inside(self.root)
        for file in sorted(tables):
            if not within.holds(file):
                reason, what = leads_out(file.name, self.root)
                yield BadRow(reason, one_line(file.relative_to(self.root)), what, "train")
                continue
            inside = file.parent.relative_to(self.root).as_posix()
            # `file_name` is ImageFolder's column, unless another one was given
            for row in file_rows(file, self.name, {"image": "file_name", **self.columns}, Folder(file.parent)):
                row = row._replace(origin=one_line(f"{inside}/{row.origin}" if inside != "." else row.origin))
                if isinstance(row, BadRow):
                    yield row
                    continue
                named.add(str(row.image))
                # ids are relative to RAW, so that two metadata files may use the same names
                own = Path(str(row.image)).relative_to(whole_root)
                split = split_of_path(own.parent.as_posix())
                image_id = one_line_id(f"{self.name} {own.as_posix()}")
                # a folder's name takes precedence over the table's column
                yield row._replace(split=row.split if split == "train" else split, image_id=image_id)
        left_out: dict[str, list[str]] = {}
        # images not listed in any table
        for name in image_names(self.root, left_out):
            path = whole_root / name
            if str(path) not in named:
                yield self._with_text(path, name, within)
        yield from not_looked_at(left_out, self.root, "train")

    def _with_text(self, path: Path, name: str, within: Inside) -> RawRow | BadRow:
        split, beside = split_of_path(Path(name).parent.as_posix()), path.with_suffix(".txt")
        if not os.path.isfile(beside) and os.path.isfile(capital := path.with_suffix(".TXT")):
            beside = capital  # as some cameras' programs write it
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


def open_table(raw: str, name: str, columns: dict[str, str], images: Path | None, kinds: tuple[str, ...]) -> RawSet:
    """A file of one of these kinds, or a folder of such files, which are all read. images: see `TableSet`.

    Raises:
        UserError: the folder has no such file.
    """
    path = Path(raw)
    if path.is_file():
        return TableSet([path], name, columns, images)
    if not path.is_dir():
        raise UserError(raw, "neither a file nor a folder", "Name a file or a folder", ExitCode.MISSING_INPUT)
    # only in the folder itself, not in subfolders
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds and not file.name.startswith("."))
    if not files:
        what = f"no {' or '.join('*' + kind for kind in kinds)} in this folder"
        raise UserError(raw, what, "Name the file itself", ExitCode.MISSING_INPUT)
    for file in files:
        check_below(file, path)
    tables = TableSet(files, name, columns, images)
    # Reported, as they may be parts of one table or include a stray one that was not meant.
    if len(files) > 1:
        named = ", ".join(one_line(file.name, 60) for file in files[:5]) + (", ..." if len(files) > 5 else "")
        tables.notes.append(f"{len(files)} tables of this folder are read: {named}; for one alone name the file itself")
    return tables


def open_csv(raw: str, name: str, columns: dict[str, str], images: Path | None = None) -> RawSet:
    """Text tables: csv, tsv. images: see `TableSet`."""
    return open_table(raw, name, columns, images, CSV)


def open_jsonl(raw: str, name: str, columns: dict[str, str], images: Path | None = None) -> RawSet:
    """JSON objects, one per line or in one list. images: see `TableSet`."""
    return open_table(raw, name, columns, images, JSON)


def open_folder(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Images with caption files next to them."""
    if not Path(raw).is_dir():
        raise UserError(raw, "not a folder", "Name the folder of the images", ExitCode.MISSING_INPUT)
    return FolderSet(Path(raw), name, columns)
