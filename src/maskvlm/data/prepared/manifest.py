"""The prepared form on disk: names, columns, and small files that are written atomically.

manifest.json                     written last: if it exists, the set is complete
dataset_dict.json                 with <split>/state.json and dataset_info.json, for `datasets.load_from_disk`
<split>/data-00000.arrow          Arrow streams of some thousand rows
skipped.jsonl, first-look.png, annotation files
.making/                          only during preparation: what each finished shard was made from
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from PIL import features

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.prepared.manifest_schema import MOST_BYTES, checked_manifest
from maskvlm.data.safe_open import check_below, content_of, opened
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import whole_file

MANIFEST, SKIPPED, LOOK, MAKING = "manifest.json", "skipped.jsonl", "first-look.png", ".making"
IMAGES = "pictures"
"""The only split of an annotated set."""

SPLITS = ("train", "val", "test", IMAGES)
PACKAGES = ("maskvlm", "pillow", "numpy", "pyarrow", "datasets")

VALUES: dict[str, str | list[str]] = {
    "image": "binary",
    "captions": ["string"],
    "image_id": "string",
    "source": "string",
    "name": "string",
    "origin": "string",
    "phash": "uint64",
}
FEATURES = {
    name: {"feature": {"dtype": kind[0], "_type": "Value"}, "_type": "List"}
    if isinstance(kind, list)
    else {"dtype": kind, "_type": "Value"}
    for name, kind in VALUES.items()
}
"""Column types as stored by `datasets`; written out here so that no process has to import it (a second)."""

SCHEMA = pa.schema(
    [(name, pa.list_(pa.string()) if isinstance(kind, list) else getattr(pa, kind)()) for name, kind in VALUES.items()],
    # the key under which `datasets` stores its own types
    {"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


# ------------------------------------------------------------------ writing


@contextmanager
def whole_set_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file that appears under its name complete and on disk, or not at all.

    Raises:
        UserError: the disk is full (74) or the folder cannot be written (73); the previous file is intact.
    """
    check_set_path(path)
    try:
        # a temporary name of this process, then one rename
        with whole_file(path, f".{os.getpid()}") as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        raise cannot_write_set(path, error) from error


def check_set_path(path: Path) -> None:
    """Check that a path is a possible name of a file or folder, and can be displayed.

    Raises:
        UserError: it has a null byte, is not text, or is too long (73).
    """
    try:
        str(path).encode()
        # only the file system knows how long a name may be
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        what = f"cannot be written ({why})"
        raise UserError(plain_name(path), what, "Give it another name", ExitCode.CANNOT_CREATE) from error


def plain_name(path: Path) -> str:
    """A path for messages: printable, and shortened if long."""
    text = clean_caption(str(path))[0]
    return text if len(text) <= 300 else f"{text[:150]}...{text[-100:]}"


def cannot_write_set(path: Path, error: OSError) -> UserError:
    """The error for an output that cannot be written."""
    # the disk is full, or the user's quota is used up
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    todo = "Free some space and run the same command again" if full else "Check the folder, or name another one"
    code = ExitCode.IO_ERROR if full or error.errno == errno.EIO else ExitCode.CANNOT_CREATE
    what = f"cannot be written ({error.strerror or error})"
    return UserError(plain_name(path), what, f"{todo}; finished shards are kept", code)


def write_set_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write plain data as JSON to a `whole_set_file`."""
    with whole_set_file(path) as file:
        file.write((json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def write_dataset_files(folder: Path, files: list[str], fingerprint: str, licence: str) -> None:
    """Write the files that `datasets.load_from_disk` reads for a split besides its shards."""
    # the keys that `Dataset.save_to_disk` writes
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": licence}
    write_set_json(folder / "state.json", state)
    write_set_json(folder / "dataset_info.json", info)


# ------------------------------------------------------------------ reading


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a prepared set.

    Raises:
        UserError: there is no set, or it is unfinished (66); its manifest is damaged or of another version (65), cannot
            be read (74), or is a link out of the folder (77).
    """
    path = root / MANIFEST
    if not path.is_file():
        # the manifest is written last, `.making` is removed after it
        if (root / MAKING).is_dir():
            todo = "Run the same `maskvlm data` again: it resumes where it stopped"
            raise UserError(root, "this prepared set is unfinished", todo, ExitCode.MISSING_INPUT)
        what = "no prepared set here" if root.is_dir() else "no such folder of a prepared set"
        own = f"from your own table: `maskvlm data csv raw=FILE name={root.name}`"
        from maskvlm.data.raw import SETS  # its readers take a moment to import, and only this error needs them

        command = (
            f"maskvlm data {root.name} FOLDER" if root.name in SETS else f"maskvlm data SET FOLDER name={root.name}"
        )
        todo = f"Make it with `{command}`; {own} (DATA_ROOT holds the sets)"
        raise UserError(path if root.is_dir() else root, what, todo, ExitCode.MISSING_INPUT)
    check_below(path, root)
    return checked_manifest(content_of(path, MOST_BYTES), path)


def tool_versions() -> dict[str, str | None]:
    """Versions of the software used to prepare a set."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "libjpeg": features.version("jpg")}


def sha256_of_part(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises UserError if it cannot be read."""
    with opened(path, "Run `maskvlm data` again, or fetch the file") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------ words


def amount(number: int) -> str:
    """`118,287`, or from a million on `2.95 M`; for published counts."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:.3g} M"


def coverage(images: int, published: int | None) -> str:
    """`2,013,544 images, 68 % of the published 2.95 M`."""
    words = "1 image" if images == 1 else f"{images:,} images"
    if not published:
        return words
    share = 100 * images / published
    if images < published:
        share = min(share, 99)  # 99.6 % would be rounded to 100 %
    # two digits below 10 %
    percent = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
    return f"{words}, {percent} % of the published {amount(published)}"
