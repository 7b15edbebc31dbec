"""Finds a table's columns for image, caption, id and split, and merges the rows of one image."""

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from maskvlm.data.caption_text import clean_caption, stable_id
from maskvlm.data.images import IMAGE_SUFFIXES
from maskvlm.data.raw.base import BadRow, RawRow
from maskvlm.data.raw.lines import one_line, one_line_id
from maskvlm.data.safe_open import LEADS_OUT, Inside
from maskvlm.utils.errors import ExitCode, UserError

ROLES = {
    "image": (
        *("image", "image_path", "filepath", "file_path", "file_name", "filename", "image_name", "image_file", "path"),
        *("file", "img", "img_path", "picture", "photo", "jpg", "png", "image_url", "img_url", "url", "link"),
    ),
    "caption": (
        *("caption", "captions", "text", "txt", "title", "sentence", "sentences", "description", "alt_text", "alt"),
        *("comment", "raw"),
    ),
    "id": ("image_id", "img_id", "imgid", "photo_id", "key", "id"),
    "split": ("split", "subset", "partition"),
}
"""Role -> column names; the first one present is used. Case does not matter, nor do spaces, `-` or `_`."""

SPLITS = {
    **dict.fromkeys(("train", "training", "restval", ""), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def find_columns(there: Sequence[str], given_columns: dict[str, str], where: object) -> dict[str, str]:
    """Role -> name of the column; roles without a column are left out.

    Raises:
        UserError: a given column, the image or the caption is missing; lists the columns that exist.
    """
    listed = ", ".join(repr(one_line(name, 40)) for name in there[:30]) or "none"
    for role, name in given_columns.items():
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            todo = f"Take {near[0]!r}" if near else f"Name the column of the {role} as it is in the file"
            raise UserError(where, f"no column {name!r} (available: {listed})", todo, ExitCode.BAD_DATA)
    # reversed, so that the first of several similar columns is kept
    folded = {_folded(name): name for name in reversed(there)}
    # columns named by the user take precedence over guesses
    columns = dict(given_columns)
    for role, names in ROLES.items():
        fitting = [folded[each] for each in names if each in folded]
        if fitting and role not in columns:
            columns[role] = fitting[0]
    # all missing columns in one line, so that the user can fix them at once
    if lacking := [role for role in ("image", "caption") if role not in columns]:
        what = f"no column for the {' and none for the '.join(lacking)} (available: {listed})"
        option = ",".join(f"{role}=NAME" for role in lacking)
        usual = " and another ".join(repr(ROLES[role][0]) for role in lacking)
        todo = f"Name one of them {usual}, or give it: --columns {option} (make: ARGS=)"
        if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in there):
            what = f"the first line is a row, not column names ({listed})"
            todo = f"Write one above it: {','.join(lacking)}"
        raise UserError(where, what, todo, ExitCode.BAD_DATA)
    return columns


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).lower()


def split_named(value: object) -> str | None:
    """ "training" -> "train", also for "train2014" and "train[:10%]"; None and an empty text -> "train"; None is
    returned if the value names no split."""
    # only letters: "train2014" and "train[:10%]" start with their split
    name = re.match(r"[a-z]*", str(value if value is not None else "").strip().lower())
    return SPLITS.get(name[0]) if name and (name[0] or not str(value or "").strip()) else None


def split_of_path(path: str) -> str:
    """The split named by the last such word of a relative path; "train" if there is none."""
    words = [word for word in re.split(r"[^a-z]+", path.lower()) if word]
    # the last one, so that the file's own name takes precedence over its folders'
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "train")


# ------------------------------------------------------------------ images


FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
MOST_BESIDE = 200_000
"""Number of files and folders searched for similar names; beyond it nothing is suggested."""


def name_problem(name: str) -> str | None:
    """Why an image must not be looked up under this name, or None."""
    # the fast path, for nearly all names
    if name.isascii() and not name.startswith("/") and ".." not in name and "\x00" not in name:
        return None  # the full check takes some 10 us
    path = PurePosixPath(name)
    if "\x00" in name or clean_caption(name)[1] == "surrogate":
        return "the name is not text"
    if path.is_absolute() or PurePosixPath(os.path.normpath(name)).parts[:1] == ("..",):
        return "the name leads out of the folder"
    # refused too, as what precedes it may be a link
    return "the name has '..' in it, below the folder" if ".." in path.parts else None


class Folder:
    """Finds the images of a table: relative to the table's folder, or to the folder that the user named, or in its
    `images/`.

    An absolute path is also accepted if it is inside, and so is a name with `..`, which is relative to the table; no
    other file can be named. An accented letter may be one character in the table and two on disk (as macOS writes
    names), or vice versa: it is found either way. So is a name that Windows wrote, with backslashes.

    Args:
        root: the folder.
        todo: appended to the messages on names and links that lead out of it.
        table: the folder of the table, if it is another one.
    """

    def __init__(self, root: Path, todo: str = "", table: Path | None = None) -> None:
        self.root, self._real, self._todo = str(root.absolute()), os.path.realpath(root), todo
        self._table, self._has_table = str((table or root).absolute()), table is not None
        self._inside = Inside(root)
        # folder -> its names by case-folded name, with and without suffix; read when a name in it is missing
        self._beside: dict[str, dict[str, str]] = {}
        self._room = MOST_BESIDE

    def place(self, name: str) -> tuple[str, tuple[str, str] | None]:
        """The path of an existing file, or (reason, message)."""
        inside = self._relative(name)
        if problem := name_problem(inside):
            if ".." in PurePosixPath(inside).parts:
                # `_relative` has followed it: from the folder itself the name might not lead out
                problem = "the name leads out of the folder"
                if self._has_table:
                    problem = f"with `..` relative to the table, {problem}"
            return "", ("unsafe name", f"{one_line(name)!r}: {problem} {one_line(self.root)}{self._todo}")
        for spelled in spellings(inside):
            for folder in ("", "images"):
                if os.path.isfile(path := os.path.join(self.root, folder, spelled)):
                    # a normalised path, as it identifies the image: `a.jpg` and `./a.jpg` are the same
                    if self._inside.holds(path):
                        return os.path.normpath(path), None
                    reason, message = leads_out(name, self.root)
                    return "", (reason, message + self._todo)
        return "", self._absence(name, inside)

    def _relative(self, name: str) -> str:
        """The name relative to the folder, if it is an absolute path or has `..`; unchanged if it leads elsewhere."""
        parts = PurePosixPath(name).parts
        # `normpath` resolves `..` without looking at the disk; links are checked when the file is found
        path = os.path.normpath(os.path.join(self._table, name)) if ".." in parts and "\x00" not in name else name
        # the folder as given, and with links resolved
        for root in (self.root, self._real):
            # `/` itself ends in a slash
            if path.startswith(start := f"{root.rstrip('/')}/"):
                return path[len(start) :]
        return name

    def _absence(self, name: str, inside: str) -> tuple[str, str]:
        """(reason, message) for a name without a file."""
        quoted_name = repr(one_line(name))
        if ADDRESS.match(name):
            return "address", f"{quoted_name}: addresses are not fetched; download the images first"
        if any(os.path.isdir(os.path.join(self.root, folder, inside)) for folder in ("", "images")):
            return "folder", f"{quoted_name} is a folder; name an image in it"
        near = next((match for folder in ("", "images") if (match := self._similar(folder, inside))), None)
        question = f"; did you mean {one_line(near)!r}?" if near else ""
        return "missing image", f"{quoted_name} is not in {one_line(self.root)}{question}"

    def _similar(self, folder: str, inside: str) -> str | None:
        """The name of a file that differs only in case or has an image's suffix in addition, as it would be written in
        the table. It is suggested but not used, as it may be another image."""
        place, last = os.path.split(inside)
        looked_at = os.path.join(self.root, folder, place)
        if looked_at not in self._beside and self._room > 0:
            try:
                with os.scandir(looked_at) as entries:
                    there = sorted(entry.name for entry in islice(entries, self._room))
            except OSError:
                there = []
            parts = ((*os.path.splitext(name), name) for name in there)
            names = {folded_name(stem): name for stem, suffix, name in parts if suffix.lower() in IMAGE_SUFFIXES}
            # a whole name takes precedence
            self._beside[looked_at] = names | {folded_name(name): name for name in there}
            self._room -= len(there) + 1
        near = self._beside.get(looked_at, {}).get(folded_name(last))
        path = os.path.join(looked_at, near) if near else ""
        # a link out of the folder is not even suggested
        return os.path.join(place, near) if near and os.path.isfile(path) and self._inside.holds(path) else None


def spellings(name: str) -> list[str]:
    """The name, and the same text with decomposed and with composed accents, and with `/` for backslashes."""
    names = [name] if name.isascii() else [*dict.fromkeys([name, *(unicodedata.normalize(f, name) for f in FORMS)])]
    with_slashes = [each.replace("\\", "/") for each in names if "\\" in each]
    return names + [each for each in with_slashes if name_problem(each) is None]


def folded_name(name: str) -> str:
    """A form of the name that is equal for names that differ only in case or in the encoding of accents."""
    return unicodedata.normalize("NFC", name.casefold())


def leads_out(name: str, root: object) -> tuple[str, str]:
    """(reason, message) for a file that is, or is reached through, a link to somewhere else."""
    return LEADS_OUT, f"{one_line(name)!r} leads out of {one_line(root)}: copy there what it leads to"


def not_looked_at(left_out: dict[str, list[str]], root: object, split: str) -> Iterator[BadRow]:
    """A bad row for each file that a `Walk` through a folder has skipped."""
    for reason, paths in left_out.items():
        for path in paths:
            yield BadRow(reason, one_line(path), f"{one_line(path)!r} in {one_line(root)} is not looked at", split)


# ------------------------------------------------------------------ rows


class Merged:
    """Rows of a table, merged by image: the first row sets id, split and place, and each row adds its captions.

    Keeps only path, id, split, place and captions of every image.

    Args:
        file: name of the file in places: `<file>:<place>`.
        prefix: prefix of ids.
        identity: path of the image and the table's own id, if any -> id of the image; by default prefix and own id,
            else prefix and path.
        repeats: keep a caption that the image already has; published sets have some, and are counted with them.
    """

    def __init__(
        self, file: str, prefix: str, identity: Callable[[str, str], str] | None = None, repeats: bool = True
    ) -> None:
        self._file = file
        self._identity = identity or (lambda name, own: f"{prefix} {own or name}")
        self._rows: dict[str, list[Any]] = {}  # path -> [place, id, split, caption, caption, ...]
        self._path_of: dict[str, str] = {}
        # hash of image and caption -> place
        self._place_of: dict[int, int] | None = None if repeats else {}

    def add(
        self, path: str, captions: Iterable[str], split: str, place: int, own: str = "", name: str = ""
    ) -> BadRow | None:
        """Add a row; it is bad if its image is in another split, its id belongs to another image, or one of its
        captions is left out as a repetition."""
        row, origin = self._rows.get(path), f"{self._file}:{place}"
        if row is None:
            image_id = one_line_id(self._identity(name or path, own))
            if (other := self._path_of.setdefault(image_id, path)) != path:
                what = f"id {image_id!r} is that of another image, at {self._file}:{self._rows[other][0]}"
                return BadRow("duplicate id", origin, what, split)
            row = self._rows[path] = [place, image_id, split]
        # of a known image only the captions are added
        elif row[2] != split:
            what = f"its image is in split {row[2]!r} at {self._file}:{row[0]}"
            return BadRow("image in two splits", origin, what, split)
        if self._place_of is None:
            row.extend(captions)
            return None
        before: int | None = None
        for text in captions:
            key = stable_id(f"{path}\n{clean_caption(text)[0]}")
            if key in self._place_of:
                before = self._place_of[key]
            else:
                self._place_of[key] = place
                row.append(text)
        what = f"its image has this caption already, at {self._file}:{before}"
        return None if before is None else BadRow("duplicate caption", origin, what, split)

    def rows(self) -> Iterator[RawRow]:
        """Rows in the order in which their images first appear."""
        for path, (place, image_id, split, *captions) in self._rows.items():
            yield RawRow(path, tuple(captions), image_id, split, f"{self._file}:{place}")
