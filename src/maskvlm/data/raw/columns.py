"""Which column of a table is the image, the caption, the id, the split; rows of one image become one row."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from maskvlm.data.raw.base import BadRow, RawRow
from maskvlm.data.raw.lines import one_line
from maskvlm.data.safe_open import LEADS_OUT, Inside
from maskvlm.data.text import clean_caption
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
"""Role -> names of columns, the first that is there is taken; case, spaces and `-` or `_` make no difference."""

SPLITS = {
    **dict.fromkeys(("train", "training", "restval", ""), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def find_columns(there: Sequence[str], given: dict[str, str], where: object) -> dict[str, str]:
    """Role -> the column's own name; roles without a column are left out.

    Raises:
        UserError: a given column, the image or the caption is not there; it lists those that are.
    """
    listed = ", ".join(repr(one_line(name, 40)) for name in there[:30]) or "none"
    for role, name in given.items():
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            todo = f"Take {near[0]!r}" if near else f"Name the column of the {role} as it is in the file"
            raise UserError(where, f"no column {name!r} (there are {listed})", todo, ExitCode.BAD_DATA)
    # reversed: of names that are alike the first column stays
    folded = {_folded(name): name for name in reversed(there)}
    # what the user named goes before what is guessed
    found = dict(given)
    for role, names in ROLES.items():
        fitting = [folded[each] for each in names if each in folded]
        if fitting and role not in found:
            found[role] = fitting[0]
    for role in ("image", "caption"):
        if role not in found:
            what = f"no column for the {role} (there are {listed})"
            todo = f"Name one of them {ROLES[role][0]!r}, or say which it is: --columns {role}=NAME (make: ARGS=)"
            raise UserError(where, what, todo, ExitCode.BAD_DATA)
    return found


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).lower()


def split_named(value: object) -> str | None:
    """ "training" -> "train", also of "train2014" and "train[:10%]"; None where it names none."""
    # letters alone: "train2014" and "train[:10%]" begin with their split
    name = re.match(r"[a-z]*", str(value if value is not None else "").strip().lower())
    return SPLITS.get(name[0]) if name and (name[0] or not str(value or "").strip()) else None


def split_of_path(path: str) -> str:
    """The split that a word of a relative path names, the last such word; "train" where none does."""
    words = [word for word in re.split(r"[^a-z]+", path.lower()) if word]
    # the last one: the file's own name goes before its folders'
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "train")


# ------------------------------------------------------------------ images


def name_problem(name: str) -> str | None:
    """Why an image is not to be looked for under this name, or None."""
    # the fast way, for nearly all names
    if name.isascii() and not name.startswith("/") and ".." not in name and "\x00" not in name:
        return None  # what follows takes some 10 us
    path = PurePosixPath(name)
    if "\x00" in name or clean_caption(name)[1] == "surrogate":
        return "the name is not text"
    if path.is_absolute() or ".." in path.parts:
        return "the name leads out of the folder"
    return None


class Folder:
    """Where the images of a table lie: relative to the table, or in `images/` beside it.

    A name with the whole path is taken too where that is inside; no other file can be named.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._real = str(root.absolute()), os.path.realpath(root)
        self._inside = Inside(root)

    def place(self, name: str) -> tuple[str, tuple[str, str] | None]:
        """The path of an existing file, or (reason, message)."""
        inside = name
        # the path as given, and with its links followed
        for root in (self.root, self._real):
            if name.startswith(f"{root}/") and ".." not in PurePosixPath(name).parts:
                # a whole path within the folder, made relative to it
                inside = name[len(str(root)) + 1 :]
        if problem := name_problem(inside):
            return "", ("unsafe name", f"{one_line(name)!r}: {problem} {one_line(self.root)}")
        for folder in ("", "images"):
            if os.path.isfile(path := os.path.join(self.root, folder, inside)):
                return (path, None) if self._inside.holds(path) else ("", leads_out(name, self.root))
        return "", ("missing image", f"{one_line(name)!r} is not in {one_line(self.root)}")


def leads_out(name: str, root: object) -> tuple[str, str]:
    """(reason, message) for a file that is, or lies behind, a link to somewhere else."""
    return LEADS_OUT, f"{one_line(name)!r} leads out of {one_line(root)}: copy there what it leads to"


def not_looked_at(left_out: dict[str, list[str]], root: object, split: str) -> Iterator[BadRow]:
    """A bad row for each file that a `Walk` through a folder has left out."""
    for reason, paths in left_out.items():
        for path in paths:
            yield BadRow(reason, one_line(path), f"{one_line(path)!r} in {one_line(root)} is not looked at", split)


# ------------------------------------------------------------------ rows


class Merged:
    """Rows of a table, merged by image: the first names id, split and place, each adds its captions.

    Keeps path, id, split, place and captions of every image, and no more.

    Args:
        file: how places are named: `<file>:<place>`.
        prefix: of ids.
        identity: path of the image and the table's own id, if any -> its id; by default prefix and own id, else
            prefix and path.
    """

    def __init__(self, file: str, prefix: str, identity: Callable[[str, str], str] | None = None) -> None:
        self._file = file
        self._identity = identity or (lambda name, own: f"{prefix} {own or name}")
        self._rows: dict[str, list[Any]] = {}  # path -> [place, id, split, caption, caption, ...]
        self._path_of: dict[str, str] = {}

    def add(
        self, path: str, captions: Iterable[str], split: str, place: int, own: str = "", name: str = ""
    ) -> BadRow | None:
        """Take in a row; it is bad where its image is in another split, or its id is another image's."""
        # the image was there: its captions are added
        if row := self._rows.get(path):
            if row[2] != split:
                what = f"its image is in split {row[2]!r} at {self._file}:{row[0]}"
                return BadRow("image in two splits", f"{self._file}:{place}", what, split)
            row.extend(captions)
            return None
        image_id = one_line(self._identity(name or path, own))
        if (other := self._path_of.setdefault(image_id, path)) != path:
            what = f"id {image_id!r} is that of another image, at {self._file}:{self._rows[other][0]}"
            return BadRow("duplicate id", f"{self._file}:{place}", what, split)
        self._rows[path] = [place, image_id, split, *captions]
        return None

    def rows(self) -> Iterator[RawRow]:
        """In the order in which images came first."""
        for path, (place, image_id, split, *captions) in self._rows.items():
            yield RawRow(path, tuple(captions), image_id, split, f"{self._file}:{place}")
