"""Locates the values of a shard in its file without trusting the file.

A shard is an Arrow stream with the columns of `manifest.SCHEMA`. Arrow's own reader maps such a file into memory, where
a wrong offset, a file truncated while it is mapped, or a failing disk kills the process silently (SIGSEGV, SIGBUS).
Therefore the frames of the stream are parsed here, every number in them is checked against the size of the file, and
values are read from the file in pieces, so that any damage is an exception.

The format: arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc. The frames are
flatbuffers, in which a table starts with the distance to the list of its fields' positions.
"""

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from maskvlm.data.prepared.manifest import SCHEMA, VALUES

Read = Callable[[int, int], bytes]
"""Offset and size -> exactly that many bytes of the file."""

MOST_META = 1_000_000
"""Maximum bytes of a frame; those of a prepared set have some 1,000."""

_CONTINUES = 0xFFFFFFFF
_SCHEMA, _BATCH = 1, 3  # kinds of frames


class Damaged(Exception):
    """What is wrong with the stream."""


class Piece(NamedTuple):
    """A part of the file."""

    offset: int
    size: int


class Column(NamedTuple):
    """The positions of a column's offsets and values in a batch. For lists of texts, these are the offsets of the
    lists; the offsets of the texts are in `inner`.

    Attributes:
        rows: number of values.
    """

    rows: int
    offsets: Piece
    values: Piece
    inner: "Column | None" = None


class Placed(NamedTuple):
    """A batch of rows, with the positions of its columns."""

    rows: int
    columns: dict[str, Column]


# ------------------------------------------------------------------ frames


def batches(read: Read, size: int) -> Iterator[Placed]:
    """The batches of a stream, in order.

    Args:
        read: reads from the file.
        size: size of the file.

    Raises:
        Damaged: it is not such a stream, has other columns, is cut short, or a number in it points outside.
    """
    # a stream: a frame with the columns, a frame per batch, a frame that ends it
    position, first = 0, True
    while position < size:
        meta, body = frame(read, position, size)
        if not meta:
            if first or body != size:
                raise Damaged(f"{size - body:,} bytes follow its end" if not first else "it has no columns")
            return
        kind, header, length = message(meta)
        # the values must exist before any of them is read
        if body + length > size:
            raise Damaged("cut short")
        if first:
            # Arrow parses only this part: from memory, and without values
            check_schema(read(position, body - position), kind)
        elif kind != _BATCH:
            raise Damaged(f"a frame of kind {kind}")
        else:
            yield placed(meta, header, body, length)
        position, first = body + length, False
    raise Damaged("cut short: it has no end")


def frame(read: Read, position: int, size: int) -> tuple[bytes, int]:
    """The frame at a position (b"" for the one that ends the stream) and the position of its end."""
    if position + 8 > size:
        raise Damaged("cut short")
    # the marker and the length of what follows; length 0 ends the stream
    mark, length = struct.unpack("<II", read(position, 8))
    end = position + 8 + length
    if mark != _CONTINUES or length > MOST_META or end > size:
        raise Damaged("no Arrow stream, or cut short")
    return read(position + 8, length), end


def message(meta: bytes) -> tuple[int, int, int]:
    """Kind of a frame, position of its table, and number of bytes of values that follow."""
    # position of the table `Message`; its fields 1 to 3 are kind, header and length
    root = read_number(meta, "<I", 0)
    kind_at, header_at, length_at = (field(meta, root, index) for index in (1, 2, 3))
    length = read_number(meta, "<q", length_at) if length_at else 0
    if not kind_at or not header_at or length < 0:
        raise Damaged("a frame without content")
    return read_number(meta, "<B", kind_at), follow(meta, header_at), length


def check_schema(content: bytes, kind: int) -> None:
    """Raise Damaged unless the columns are a prepared set's. content: the first frame, preceded by its size."""
    if kind != _SCHEMA:
        raise Damaged("it does not begin with its columns")
    try:
        there = pa.ipc.read_schema(pa.py_buffer(content))
        same, names = there.equals(SCHEMA), there.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Damaged("its columns cannot be read") from error
    if not same:
        raise Damaged(f"columns {ascii(names)[:200]} instead of {SCHEMA.names}")


# ------------------------------------------------------------------ flatbuffers


def read_number(meta: bytes, kind: str, position: int) -> int:
    """A number in a frame; kind: format for `struct`."""
    if not 0 <= position <= len(meta) - struct.calcsize(kind):
        raise Damaged("a number that leads out of its frame")
    return int(struct.unpack_from(kind, meta, position)[0])


def field(meta: bytes, table: int, index: int) -> int:
    """Position of a table's field; 0 if it is absent."""
    # the list of positions is at a signed distance before the table
    places = table - read_number(meta, "<i", table)
    # the list starts with its own size and the table's, 2 bytes each
    at = 4 + 2 * index
    if at + 2 > read_number(meta, "<H", places):
        return 0
    distance = read_number(meta, "<H", places + at)
    return table + distance if distance else 0


def follow(meta: bytes, position: int) -> int:
    """The position to which a reference points."""
    return position + read_number(meta, "<I", position)


def pairs(meta: bytes, table: int, index: int) -> list[tuple[int, int]]:
    """A list of pairs of numbers."""
    at = field(meta, table, index)
    if not at:
        return []
    at = follow(meta, at)
    # a list starts with its number of entries; a pair has 16 bytes
    count = read_number(meta, "<I", at)
    if at + 4 + 16 * count > len(meta):
        raise Damaged("a list that leads out of its frame")
    return [
        (read_number(meta, "<q", place), read_number(meta, "<q", place + 8))
        for place in range(at + 4, at + 4 + 16 * count, 16)
    ]


# ------------------------------------------------------------------ a batch


def placed(meta: bytes, header: int, body: int, length: int) -> Placed:
    """The positions of the columns of a batch, whose values are the `length` bytes from `body` on."""
    # fields of `RecordBatch`: length, nodes, buffers, compression
    at, packed = field(meta, header, 0), field(meta, header, 3)
    rows = read_number(meta, "<q", at) if at else 0
    if packed or rows < 0:
        raise Damaged("packed values" if packed else "a batch of less than no rows")
    # nodes: (rows, nulls) per column; buffers: (offset, size); both in the order of the columns
    nodes, buffers = iter(pairs(meta, header, 1)), iter(pairs(meta, header, 2))

    def count(expected: int | None) -> int:
        # (-1, 0): the list is too short
        number, nulls = next(nodes, (-1, 0))
        if number < 0 or nulls or expected not in (None, number):
            raise Damaged("a column of another length than its batch, or with empty values")
        return number

    def piece(least: int) -> Piece:
        offset, size = next(buffers, (-1, 0))
        if offset < 0 or size < 0 or offset + size > length or size < least:
            raise Damaged("a column that leads out of its batch")
        return Piece(body + offset, size)

    def column(kind: str, expected: int | None) -> Column:
        number = count(expected)
        piece(0)  # the validity bitmap: there are no nulls
        if kind == "uint64":
            # plain numbers have no offsets
            return Column(number, Piece(body, 0), piece(8 * number))
        # n values have n + 1 offsets of 4 bytes
        offsets = piece(4 * (number + 1) if number else 0)
        if kind == "list":
            return Column(number, offsets, Piece(body, 0), column("string", None))
        return Column(number, offsets, piece(0))

    # VALUES has the order of the schema, which has been checked
    kinds = {name: "list" if isinstance(kind, list) else kind for name, kind in VALUES.items()}
    columns = {name: column(kind, rows) for name, kind in kinds.items()}
    # anything left over belongs to no column
    if next(nodes, None) or next(buffers, None):
        raise Damaged("more columns than it names")
    return Placed(rows, columns)


# ------------------------------------------------------------------ values


def value(read: Read, column: Column, kind: Any, row: int) -> Any:
    """Value of a column in one row of a batch. kind: as in `manifest.VALUES`. Raises Damaged."""
    if kind == "uint64":
        return struct.unpack("<Q", read(column.values.offset + 8 * row, 8))[0]
    start, end = numbers(read, column, row, 1)
    if column.inner is None:
        content = read(column.values.offset + start, end - start)
        return content if kind == "binary" else read_text_field(content)
    if start == end:
        return []
    # a list of texts in two reads: their offsets, and the bytes of all of them
    ends = numbers(read, column.inner, start, end - start)
    content = read(column.inner.values.offset + ends[0], ends[-1] - ends[0])
    return [read_text_field(content[low - ends[0] : high - ends[0]]) for low, high in pairwise(ends)]


def numbers(read: Read, column: Column, row: int, count: int) -> tuple[int, ...]:
    """The start positions of `count` values from a row on, and the end of the last one."""
    offsets = struct.unpack(
        "<2i" if count == 1 else f"<{count + 1}i", read(column.offsets.offset + 4 * row, 4 * count + 4)
    )
    # offsets of lists count texts, all others count bytes
    most = column.values.size if column.inner is None else column.inner.rows
    # sorted, with the first and last within the column, so that all are
    if offsets[0] < 0 or offsets[-1] > most or offsets != tuple(sorted(offsets)):
        raise Damaged("a value that leads out of its column")
    return offsets


def read_text_field(content: bytes) -> str:
    """Text of a field, decoded from UTF-8. Raises Damaged."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Damaged("a text that is not UTF-8") from error


def array(read: Read, column: Column, kind: Any) -> pa.Array:
    """All values of a batch, checked. Raises Damaged."""
    offsets, values = (pa.py_buffer(read(*piece)) for piece in (column.offsets, column.values))
    try:
        if kind == "uint64":
            # the first buffer is the validity bitmap: None, as there are no nulls
            arrow_array = pa.Array.from_buffers(pa.uint64(), column.rows, [None, values])
        elif column.inner is not None:
            inner = array(read, column.inner, kind[0])
            arrow_array = pa.Array.from_buffers(pa.list_(pa.string()), column.rows, [None, offsets], children=[inner])
        else:
            arrow_array = pa.Array.from_buffers(getattr(pa, kind)(), column.rows, [None, offsets, values])
        # offsets, and that texts are UTF-8
        arrow_array.validate(full=True)
    except (pa.ArrowException, ValueError, UnicodeDecodeError) as error:
        raise Damaged(" ".join(str(error).split())[:100]) from error
    return arrow_array


def check_arrow(read: Read, batch: Placed) -> None:
    """Raise Damaged for a batch with damaged offsets or texts; images are checked when they are decoded."""
    for name, column in batch.columns.items():
        if VALUES[name] != "binary":
            array(read, column, VALUES[name])
        elif column.rows:
            # images: only their offsets, as their bytes are nearly all of the shard
            numbers(read, column, 0, column.rows)
