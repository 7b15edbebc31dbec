"""Shards of a prepared set, memory-mapped: rows by number, columns without pictures."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from maskvlm.errors import ExitCode, UserError


class Shards:
    """Rows of several shards, opened when first asked for one; pickled as the list of their names.

    Args:
        root: the set's folder.
        shards: as the manifest lists them.

    Raises:
        UserError: a shard is not there or not as long as it was.
    """

    def __init__(self, root: Path, shards: list[dict[str, Any]]) -> None:
        self.root, self.shards = root, shards
        for shard in shards:
            check_size(root / shard["file"], shard["bytes"])
        self._tables: list[pa.Table] | None = None
        self._batches: list[pa.RecordBatch] = []
        self._ends: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "shards": self.shards, "_tables": None, "_batches": [], "_ends": []}

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    def tables(self) -> list[pa.Table]:
        """One for each shard, memory-mapped."""
        if self._tables is None:
            tables = [read_shard(self.root / shard["file"]) for shard in self.shards]
            self._batches = [batch for table in tables for batch in table.to_batches()]
            self._ends = [*accumulate(batch.num_rows for batch in self._batches)]
            self._tables = tables
        return self._tables

    def value(self, name: str, index: int) -> Any:
        """Of a column in a row, counted from 0."""
        self.tables()
        number = bisect_right(self._ends, index)
        batch = self._batches[number]
        return batch.column(name)[index - self._ends[number] + batch.num_rows].as_py()

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        chunks = [chunk for table in self.tables() for chunk in table.column(name).chunks]
        return pa.chunked_array(chunks)


def read_shard(path: Path) -> pa.Table:
    """Memory-mapped. Raises UserError where it is no Arrow stream, or its structure is damaged."""
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            table = stream.read_all()
        table.validate(full=True)  # offsets and texts; a picture's bytes are checked when it is decoded
        return table
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, f"cannot be read ({' '.join(str(error).split())[:100]})") from error


def check_size(path: Path, size: int) -> None:
    """Refuse a shard that is not what the manifest says, as far as can be seen from outside."""
    if not path.is_file():
        raise damaged(path, "is not there, but in the manifest", ExitCode.MISSING_INPUT)
    if (there := path.stat().st_size) != size:
        raise damaged(path, f"has {there:,} bytes instead of {size:,}")


def damaged(path: Path, what: str, code: ExitCode = ExitCode.BAD_DATA) -> UserError:
    """A shard that is not as it was made."""
    todo = f"`python -m maskvlm data-check {path.parent.parent}` tells what else is; fetch it again or prepare anew"
    return UserError(path, what, todo, code)
