"""The only place that reads and writes checkpoints.

Writing: a temporary file in the same folder, fsync, rename, fsync of the folder, and a `.sha256` file beside it that
`sha256sum -c` understands. The file under the checkpoint's name is intact at all times, old or new. If the old one is
kept as `previous`, there is a moment when it exists under that name only.
Reading: `integrity.py` checks the file before a single byte is unpickled, then only plain types are unpickled, and
`content.py` checks them against a schema: nothing in a checkpoint is ever imported or called.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from maskvlm.checkpoint.content import PLAIN, SCHEMA, check_content, leaves_of
from maskvlm.checkpoint.integrity import (
    ANOTHER,
    Fact,
    bad,
    first_line,
    refused_imports,
    side_file,
    stated,
    verify_checkpoint,
)
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import sync_folder, whole_file
from maskvlm.utils.write_errors import cannot_write

TENSORS = (torch.Tensor, torch.nn.Parameter)


def save(content: Mapping[str, Any], path: str | Path, previous: Path | None = None) -> None:
    """Write a checkpoint; on any failure an existing file is left untouched.

    Args:
        content: tensors and plain types.
        path: path of the file.
        previous: path to which an existing file is moved once the new one is on the disk; None replaces it.

    Raises:
        UserError: the disk is full or fails (74), or the folder cannot be written (73).
        TypeError: the content holds something other than tensors and plain types; the message names its key.
    """
    path = Path(path)
    content = {**content, "schema": SCHEMA}
    for key, value in leaves_of(content):
        # `type`, not isinstance: NumPy's float64 is a float, but is pickled as its own type.
        if type(value) not in PLAIN + TENSORS:
            raise TypeError(f"{path}: {key} is a {type(value).__qualname__}; checkpoints hold plain types only")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            # Find out before the first byte whether the disk is too small.
            _require_space(path, _tensor_bytes(content))
            fact = _write(content, temporary)
            # Both contents are valid during the rename, so a kill between the steps does no harm.
            old = stated(path)
            _write_side(path, [*old, fact])
            if previous is not None and path.exists():
                _rotate(path, previous, old)
        # From here on the old content is no longer valid.
        _write_side(path, [fact])
    except OSError as error:
        raise _cannot_write(path, error) from error


def _rotate(path: Path, previous: Path, facts: list[Fact]) -> None:
    """Move the existing file to `previous`. An intact file is valid at all times: without a `.sha256` it is checked
    against the checksums inside it."""
    # The `.sha256` first, as it belongs to the file that is about to be replaced.
    side_file(previous).unlink(missing_ok=True)
    os.replace(path, previous)
    sync_folder(path.parent)
    if facts:
        _write_side(previous, facts)


def _write(content: Mapping[str, Any], path: Path) -> Fact:
    with path.open("wb") as file:
        tee = _HashingWriter(file)
        try:
            # torch writes to a stream strictly in order, so the hash of the bytes passing through is that of the file.
            torch.save(content, cast(IO[bytes], tee))
        except RuntimeError as error:  # torch hides the writer's OSError behind its own
            if tee.error is None:
                raise
            raise tee.error from error
        file.flush()
        os.fsync(file.fileno())
    return Fact(tee.size, tee.sha256.hexdigest())


class _HashingWriter:
    """Hashes the bytes written, so that a checkpoint need not be read again for its hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, chunk: bytes) -> int:
        try:
            self.file.write(chunk)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(chunk)
        self.size += len(chunk)
        return len(chunk)

    def flush(self) -> None:
        self.file.flush()


def _write_side(path: Path, facts: list[Fact]) -> None:
    lines = [f"# {fact.size} bytes, schema {SCHEMA}\n{fact.sha256}  {path.name}\n" for fact in facts]
    with whole_file(side_file(path)) as temporary:
        temporary.write_text("".join(lines))


def _require_space(path: Path, need: int) -> None:
    free = shutil.disk_usage(path.parent).free
    # Only tensors are counted: the rest of a checkpoint is small.
    if need > free:
        raise OSError(errno.ENOSPC, f"{need} bytes needed, {free} free")


def _cannot_write(path: Path, error: OSError) -> UserError:
    outcome = "the checkpoint that was there is untouched" if path.exists() else "nothing was written"
    other = UserError(path, f"could not be written ({error})", f"Check the disk; {outcome}", ExitCode.IO_ERROR)
    return cannot_write(error, path, outcome) or other


def _tensor_bytes(content: Mapping[str, Any]) -> int:
    return sum(leaf.nbytes for _, leaf in leaves_of(dict(content)) if isinstance(leaf, torch.Tensor))


def load(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, after checking it.

    Raises:
        UserError: it does not exist or is not a file (66), cannot be read (74), is damaged, another kind of file or of
            a later format (65), or would run code or expand without limit (77).
    """
    # First integrity, then plain types, then the schema: each relies on the one before.
    verify_checkpoint(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        what = f"loading it would run or import code ({refused_imports(error)})"
        raise bad(path, what, "Take a checkpoint from a source you trust", ExitCode.REFUSED) from error
    except Exception as error:  # torch's unpickler and its tensor builders raise over a dozen types on wrong content
        raise bad(path, f"damaged ({first_line(error)})", ANOTHER) from error
    return check_content(content, path)
