"""Files of data sets: JSON and JSON lines whose errors name the place, and images found by name.

Shapes: N keys looked up.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.images import IMAGE_SUFFIXES, OTHER_IMAGES
from maskvlm.data.safe_open import TODO, Walk, byte_lines, check_below, opened
from maskvlm.data.strict_json import BadJson, json_kind, parse_json
from maskvlm.utils.errors import Absent, ExitCode, UserError
from maskvlm.utils.paths import expand_user

DIGITS = 12  # digits of the number in the name of a COCO image

T = TypeVar("T")


class JsonLine(NamedTuple):
    """A JSON object in a file of JSON lines. `where` is file:line."""

    where: str
    number: int
    record: dict[str, Any]


# ------------------------------------------------------------------ bytes


def digest_of(*files: Path, todo: str = TODO) -> str:
    """SHA-256 of the files' contents, as hexadecimal digits; files may be of any size. Raises UserError if one cannot
    be read; all missing files are named."""
    digests, absent = [], Absent()
    for file in files:
        # the content is hashed in pieces, as a file may be larger than memory
        with absent.noted(), opened(file, todo) as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    absent.check()
    # hash of the digests: the same bytes split differently into files are a different set
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------ json


def load_json(content: bytes, file: Path, line: int | None = None) -> Any:
    """The JSON document in `content`, which is a file or its given line; errors name file and line."""
    todo, place = "Fetch it again", file if line is None else f"{file}:{line}"
    try:
        # "-sig" drops a byte order mark
        return parse_json(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        # an empty file has a message of its own
        if line is None and not error.doc.strip():
            raise UserError(file, "empty file", todo, ExitCode.BAD_DATA) from error
        where, what = f"{file}:{line or error.lineno}", f"not JSON (column {error.colno}: {error.msg})"
        raise UserError(where, what, todo, ExitCode.BAD_DATA) from error
    except UnicodeDecodeError as error:
        raise UserError(place, f"not UTF-8 text (byte {error.start})", todo, ExitCode.BAD_DATA) from error
    except RecursionError as error:
        raise UserError(place, "nested too deeply for JSON data", todo, ExitCode.BAD_DATA) from error
    except ValueError as error:  # Python rejects numbers with thousands of digits
        raise UserError(place, "not JSON (a number is too long)", todo, ExitCode.BAD_DATA) from error


def json_lines(file: Path, todo: str = TODO) -> Iterator[JsonLine]:
    """One object per line, read lazily; blank lines are skipped."""
    with opened(file, todo) as stream:
        for number, content, problem in byte_lines(stream):
            where = f"{file}:{number}"
            if problem:
                raise UserError(where, f"{problem[0]} ({problem[1]})", "Fix this line", ExitCode.BAD_DATA)
            # skip lines of white space
            if content.strip():
                record = load_json(content, file, number)
                if not isinstance(record, dict):
                    what = not_an_object(record)
                    raise UserError(where, what, "Write one object per line", ExitCode.BAD_DATA)
                yield JsonLine(where, number, record)


def not_an_object(record: Any) -> str:
    """What is wrong with a record that is not an object, for messages."""
    return f"{json_kind(record)} instead of a JSON object"


def get(record: Any, key: str, kind: type[T], where: str, layout: str) -> T:
    """A value of a JSON object; a missing key or a wrong type raises a UserError that names the place.

    Args:
        layout: name of the expected layout, for the message ("Karpathy", "VQA v2").
    """
    if not isinstance(record, dict):
        what = f"{json_kind(record)} instead of an object with '{key}'"
    elif isinstance(record.get(key), BadJson):
        what = f"'{key}': {record[key]}"
    elif key not in record:
        what = f"key '{key}' is missing"
    # true is an int for Python
    elif not isinstance(record[key], kind) or (kind is int and isinstance(record[key], bool)):
        what = f"'{key}' is {type(record[key]).__name__} instead of {kind.__name__}"
    else:
        return cast(T, record[key])
    raise UserError(where, what, f"A file in the {layout} layout is needed", ExitCode.BAD_DATA)


def get_name(record: Any, key: str, where: str, layout: str) -> str:
    """An integer, or a text that can serve as a name: plain, not empty, and not leading out of a folder."""
    value = get(record, key, object, where, layout)
    if isinstance(value, bool) or not isinstance(value, int | str):
        what = f"'{key}' is {type(value).__name__} instead of a number or a name"
    elif isinstance(value, int) and value < 0:
        what = f"'{key}' is {value}"
    elif isinstance(value, str) and (not value or clean_caption(value)[0] != value):
        what = f"'{key}' is {value[:80]!r}: empty, or not plain text"
    else:
        check_name(str(value), where)
        return str(value)
    raise UserError(where, what, f"A file in the {layout} layout is needed", ExitCode.BAD_DATA)


def get_label(record: Any, key: str, classes: tuple[str, ...], where: str, layout: str) -> str:
    """One of the classes, ignoring case; also JSON's true and false if they are classes."""
    value = get(record, key, object, where, layout)
    # JSON's true and false become "true" and "false"
    label = str(value).strip().lower() if isinstance(value, str | bool | int | float) else type(value).__name__
    for name in classes:
        if label == name.lower() and isinstance(value, str | bool):
            return name
    named = ", ".join(classes)
    if isinstance(value, int | float) and not isinstance(value, bool):
        what = f"'{key}' is {label[:80]}, a number; the classes are named {named}"
    else:
        what = f"'{key}' is {label[:80]!r}, the classes are {named}"
    raise UserError(where, what, "Correct the label or remove the row", ExitCode.BAD_DATA)


def check_name(name: str, where: str) -> None:
    """Reject an image name that leads out of the image folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\x00" in name or clean_caption(name)[1] == "surrogate":
        what = f"file name {name!r} leads out of the folder of images or is not text"
        raise UserError(where, what, "Name files relative to that folder", ExitCode.BAD_DATA)


# ------------------------------------------------------------------ images


class ImagesByKey:
    """Files of a folder by key; stored as Arrow arrays, which data workers share without copying.

    Args:
        folder: the folder that the names are relative to.
        name_of: key -> name of the file.
    """

    def __init__(self, folder: Path, name_of: dict[str, str]) -> None:
        self.folder = folder
        self._key_N = pa.array(list(name_of), pa.string())
        self._name_N = pa.array(list(name_of.values()), pa.string())

    def find(self, key_N: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Image numbers for `path` and `image`, -1 for missing images."""
        # (N,) keys -> (N,) numbers; null for missing keys
        return pc.index_in(key_N, value_set=self._key_N).fill_null(-1).to_numpy().astype(np.int32)

    def path(self, number: int) -> str:
        """The path of a file."""
        return str(self.folder / self._name_N[int(number)].as_py())

    def image(self, number: int) -> str | bytes:
        """An image as stored in examples: its path, or encoded bytes if images are not files."""
        return self.path(number)

    def identity(self, numbers: Iterable[int]) -> str:
        """A hash of the names and sizes of these image files: if it changes, cached results for them are invalid."""
        digest = hashlib.sha256()
        for number in numbers:
            path = self.path(number)
            digest.update(f"{os.path.basename(path)} {os.stat(path).st_size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def image_folder(images: str | Path | None, root: Path, key: str = "data.source.images") -> Path:
    """The given folder of images, else `images/` in the root, else the root.

    Raises:
        UserError: there is no such folder (66), or `images/` is a link out of the root (77).
    """
    beside = root / "images"
    folder = expand_user(images) if images is not None else beside if beside.is_dir() else root
    # the only one of these that the user did not name
    if folder is beside:
        check_below(folder, root)
    if not folder.is_dir():
        what = "there is no such folder of images"
        raise UserError(folder, what, f"Correct {key}", ExitCode.MISSING_INPUT)
    return folder


def image_names(folder: Path, left_out: dict[str, list[str]] | None = None) -> list[str]:
    """Names of all images in the folder and its subfolders, relative to it, sorted; without hidden ones.

    Args:
        left_out: is filled with reason -> names of skipped images and folders (see `Walk`), also of images whose
            format is not read, by their suffixes.

    Raises:
        UserError: there are none (66), or a folder cannot be listed (74).
    """
    names: list[str] = []
    unread: list[str] = []
    walk = Walk(folder)
    for place, files in walk:
        inside = Path(place).relative_to(folder)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            # with / on every system, as names are compared with those in annotation files
            if suffix in IMAGE_SUFFIXES:
                names.append((inside / name).as_posix())
            elif suffix in OTHER_IMAGES:
                unread.append((inside / name).as_posix())
    for reason, paths in walk.left_out.items():
        # "": a folder, whose images are skipped
        fitting = (path for path in paths if os.path.splitext(path)[1].lower() in {*IMAGE_SUFFIXES, ""})
        if left_out is not None:
            left_out[reason] = [*fitting]
    if unread and left_out is not None:
        left_out["image format not read: convert to .jpg or .png"] = sorted(unread)
    if not names:
        what = "no image in this folder" + (f" that can be read; {len(unread)} in other formats" if unread else "")
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(folder, what, f"Name a folder with images ({kinds})", ExitCode.MISSING_INPUT)
    return sorted(names)


def check_missing(
    where: object, split: str, folder: Path, absent: list[str], total: int, max_missing: float, rows: str = "images"
) -> None:
    """Raise UserError if a split lacks too many images.

    Args:
        where: names the file, or its first row without an image.
        absent: the missing images, one per row.
        total: number of rows of the split.
        max_missing: share of training rows that may lack an image; in evaluation none may.
        rows: what is counted, `images` or `examples`; an example counts if it lacks at least one of its images.
    """
    # With fewer rows, an evaluation would measure something else.
    most = max_missing * total if split == "train" else 0
    if len(absent) <= most and len(absent) < total:
        return
    names = list(dict.fromkeys(absent))
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    one, more = ("lacks an image", "lack an image") if rows == "examples" else ("is not", "are not")
    fault = one if len(absent) == 1 else more
    what = f"{len(absent)} of {total} {rows} of split '{split}' {fault} in {folder}: {first}"
    way = "raise data.source.max_missing" if split == "train" else "fetch them: evaluation leaves nothing out"
    todo = f"Set data.source.images to their folder, or {way}"
    if (skipped := folder / "skipped.jsonl").is_file():  # of a prepared set
        todo = f"{skipped} lists the rows left out; fix and prepare them again, or {way}"
    raise UserError(where, what, todo, ExitCode.MISSING_INPUT)


def family_of(part: str) -> str:
    """The data set from which a part of VQA's questions has its images: COCO's ids are shared with other tasks,
    `daquar 3` is not."""
    name = part.split("_")[0]
    return "coco" if name == "mscoco" else name


def images_by_number(names: list[str], part: str) -> dict[str, str]:
    """Image id -> file, by the number at the end of its name.

    If any file has COCO's twelve digits, only those count: Visual Genome's `9.jpg` in the same tree is a different
    image. Among files with the same number, the one with most of the part's words in its path is used.
    """
    # (digits at the end of the name, name) of all files that have any.
    numbered_names = [(end[0], name) for name in names if (end := re.search(r"\d+$", PurePosixPath(name).stem))]
    padded = [each for each in numbered_names if len(each[0]) == DIGITS]
    words = set(part.split("_"))
    # The best match first, so that setdefault keeps it.
    best = sorted(padded or numbered_names, key=lambda each: (-len(words & set(re.split(r"[\W_]+", each[1]))), each[1]))
    chosen: dict[str, str] = {}
    for number, name in best:
        chosen.setdefault(f"{family_of(part)} {int(number)}", name)
    return chosen
