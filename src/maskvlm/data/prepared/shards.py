"""Shards of a prepared set: rows by number and columns without images, read from file in pieces (`arrow.py`)."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from maskvlm.data.prepared.arrow import Damaged, Placed, array, batches, check_arrow, value
from maskvlm.data.prepared.manifest import SCHEMA, VALUES
from maskvlm.data.safe_open import check_below, opened, special
from maskvlm.utils.errors import ExitCode, UserError

MOST_OPEN = 128
"""Maximum number of files to keep open, as a process may have a thousand or so; with more shards, each is opened for
every row."""


class ShardSource:
    """The bytes of a shard, in memory or in a file."""

    def __init__(self, path: Path, content: bytes | None = None, keep: bool = True) -> None:
        self.path, self._content, self._keep = path, content, keep
        self._file: Any = None

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises UserError if the file ends before, or cannot be read."""
        if self._content is not None:
            chunk = self._content[offset : offset + size]
        elif self._file is not None:
            # pread uses no file position, so processes may share the open file
            chunk = self._pread(self._file.fileno(), size, offset)
        else:
            with self._opened() as file:
                chunk = self._pread(file, size, offset)
        if len(chunk) < size:
            raise damaged(self.path, "is shorter than before: another process is changing it")
        return chunk

    def _pread(self, file: int, size: int, offset: int) -> bytes:
        try:
            chunk = os.pread(file, size, offset)
            # one call returns at most 2 GB, and may return less; b"" is the end of the file
            while chunk and len(chunk) < size and (more := os.pread(file, size - len(chunk), offset + len(chunk))):
                chunk += more
            return chunk
        except OSError as error:
            raise damaged(self.path, f"cannot be read ({error.strerror or error})", ExitCode.IO_ERROR) from error

    def size(self) -> int:
        """Size of the shard, in bytes."""
        if self._content is not None:
            return len(self._content)
        with self._opened() as file:
            return os.fstat(file).st_size

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with opened(self.path) as stream:
            if self._keep and self._file is None:
                # a second handle, which stays open when `opened` closes its own
                self._file = open(os.dup(stream.fileno()), "rb", buffering=0)  # noqa: SIM115  closed with this
            yield stream.fileno()


class Shard:
    """The rows of one shard.

    Raises:
        UserError: it is not an Arrow stream of a prepared set, or is damaged; images are checked when decoded.
    """

    def __init__(self, source: ShardSource) -> None:
        self._source = source
        try:
            # the positions of all values, checked once
            self.batches: list[Placed] = [*batches(source.read, source.size())]
            for batch in self.batches:
                check_arrow(source.read, batch)
        except Damaged as error:
            raise self._as_user_error(error) from error

    def value(self, batch: Placed, name: str, row: int) -> Any:
        """Value of a column in one row of a batch."""
        try:
            return value(self._source.read, batch.columns[name], VALUES[name], row)
        except Damaged as error:
            raise self._as_user_error(error) from error

    def array(self, batch: Placed, name: str) -> pa.Array:
        """A column of a batch."""
        try:
            return array(self._source.read, batch.columns[name], VALUES[name])
        except Damaged as error:
            raise self._as_user_error(error) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in order."""
        for batch in self.batches:
            for row in range(batch.rows):
                yield {name: self.value(batch, name, row) for name in VALUES}

    def __len__(self) -> int:
        return sum(batch.rows for batch in self.batches)

    def _as_user_error(self, error: Damaged) -> UserError:
        return damaged(self._source.path, f"cannot be read ({error})")


class ShardBatch(NamedTuple):
    """A batch and its shard."""

    shard: Shard
    batch: Placed


class PreparedShards:
    """Rows of several shards, which are opened at first use; pickled as the list of their names.

    Args:
        root: the set's folder.
        shards: as listed in the manifest.

    Raises:
        UserError: a shard is missing (66), has another size (65), or is a link out of the folder (77).
    """

    def __init__(self, root: Path, shards: list[dict[str, Any]]) -> None:
        self.root, self.shards = root, shards
        for shard in shards:
            check_below(root / shard["file"], root)
            # cheap enough for all shards now, so that a truncated file is reported before training starts
            check_shard_size(root / shard["file"], shard["bytes"])
        self._parts: list[ShardBatch] | None = None
        self._ends: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        # open files cannot be pickled, so a data worker opens its own
        return {"root": self.root, "shards": self.shards, "_parts": None, "_ends": []}

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    def parts(self) -> list[ShardBatch]:
        """The batches of all shards, with the positions of values but not the values."""
        if self._parts is None:
            parts: list[ShardBatch] = []
            for each in self.shards:
                # opening a shard checks it; each process does so for itself
                shard = read_shard(self.root / each["file"], keep=len(self.shards) <= MOST_OPEN)
                if len(shard) != each["rows"]:
                    raise damaged(self.root / each["file"], f"has {len(shard)} rows, the manifest says {each['rows']}")
                parts += [ShardBatch(shard, batch) for batch in shard.batches]
            self._ends = [*accumulate(part.batch.rows for part in parts)]
            # last, so that a failure leaves no partial state
            self._parts = parts
        return self._parts

    def value(self, name: str, index: int) -> Any:
        """Value of a column in one row, counted from 0."""
        parts = self.parts()
        # the first batch that ends beyond the row
        number = bisect_right(self._ends, index)
        shard, batch = parts[number]
        # the row within its batch
        return shard.value(batch, name, index - self._ends[number] + batch.rows)

    def chunks(self, name: str) -> Iterator[pa.Array]:
        """A column of all rows, batch by batch."""
        for shard, batch in self.parts():
            yield shard.array(batch, name)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows, in memory."""
        return pa.chunked_array([*self.chunks(name)], SCHEMA.field(name).type)


def read_shard(path: Path, keep: bool = False) -> Shard:
    """Open a shard file. keep: keep the file open. Raises UserError like `Shard`."""
    return Shard(ShardSource(path, keep=keep))


def check_shard_size(path: Path, size: int) -> None:
    """Raise UserError if a shard's file is not as the manifest says, without reading it."""
    try:
        status = os.stat(path)
    except OSError:
        raise damaged(path, "is missing, but the manifest lists it", ExitCode.MISSING_INPUT) from None
    if kind := special(status.st_mode):
        raise damaged(path, f"is {kind}, not a file")
    if status.st_size != size:
        raise damaged(path, f"has {status.st_size:,} bytes instead of {size:,}")


def damaged(path: Path, what: str, code: ExitCode = ExitCode.BAD_DATA) -> UserError:
    """The error for a damaged shard."""
    todo = f"`maskvlm data-check {path.parent.parent}` lists all damage; fetch the file again or prepare the set again"
    return UserError(path, what, todo, code)
