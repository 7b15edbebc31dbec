"""Parquet files with images in them, as written by img2dataset and on the Hugging Face hub."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from maskvlm.data.raw.columns import ROLES
from maskvlm.data.raw.lines import one_line
from maskvlm.data.raw.samples import KeyedFiles
from maskvlm.data.safe_open import opened
from maskvlm.utils.errors import ExitCode, UserError

BATCH = 32
"""Rows in memory at once."""


def _image_column(schema: pa.Schema, columns: dict[str, str]) -> str | None:
    """Name of a column of bytes, or of the hub's {bytes, path}."""
    names = [columns["image"]] if "image" in columns else ROLES["image"]
    for name in names:
        if name in schema.names:
            kind = schema.field(name).type
            if _is_bytes(kind):
                return name
            # -1: no such field. A string there would be read as the path of any file.
            if pa.types.is_struct(kind) and (place := kind.get_field_index("bytes")) >= 0:
                return name if _is_bytes(kind.field(place).type) else None
    return None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_images(file: Path, columns: dict[str, str]) -> bool:
    """Whether a Parquet file contains images; an unreadable one counts, so that it is reported."""
    try:
        with opened(file) as stream:
            # only the footer is read
            return _image_column(pq.read_schema(stream), columns) is not None
    except (UserError, OSError, ValueError, pa.ArrowException):
        return True


def without_images(file: Path, columns: dict[str, str]) -> UserError:
    """The error for a readable Parquet file in which `has_images` finds none: lists its columns."""
    with opened(file) as stream:
        there = pq.read_schema(stream).names
    names = [columns["image"]] if "image" in columns else [name for name in ROLES["image"] if name in there]
    if names and names[0] in there:
        what = f"column {one_line(names[0], 40)!r} holds no images (bytes)"
        todo = "Name the column that does (--columns image=NAME), or save a table of paths as csv and use the set csv"
    else:
        what = f"no column {one_line(names[0], 40)!r}" if names else "no column for the image"
        todo = "Name the column of images: --columns image=NAME,caption=NAME (make: ARGS=)"
    return UserError(file, f"{what} (available: {listed_names(there)})", todo, ExitCode.BAD_DATA)


def listed_names(names: Sequence[str]) -> str:
    """Names of columns for a message."""
    return ", ".join(repr(one_line(name, 40)) for name in names[:30]) or "none"


def parquet_samples(file: Path | IO[bytes], columns: dict[str, str]) -> Iterator[KeyedFiles]:
    """The rows of a file, in order; an unreadable part is one sample with a problem."""
    row = 0
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(opened(file)) if isinstance(file, Path) else file
            parquet = stack.enter_context(pq.ParquetFile(stream))
            names = parquet.schema_arrow.names
            image = _image_column(parquet.schema_arrow, columns)
            # a dictionary of the row would only have one of the two
            if twice := [name for name in names if names.count(name) > 1]:
                yield KeyedFiles("", "", {}, ("doubled column", f"column {one_line(twice[0])!r} appears twice"))
                return
            if image is None:
                yield KeyedFiles("", "", {}, ("no image", "no column of images"))
                return
            # a few rows at a time, as a row group may contain gigabytes of images
            for batch in parquet.iter_batches(BATCH):
                batch.validate(full=True)  # texts that are not UTF-8, offsets that lead out of their column
                for record in batch.to_pylist():
                    yield _sample(record, image, row)
                    row += 1
    except UserError as error:
        yield KeyedFiles("", "", {}, ("unreadable", one_line(error.what)))
    except Exception as error:  # Arrow's own types, and Python's for an invalid date or number
        yield KeyedFiles("", "", {}, ("damaged archive", f"{one_line(error, 80)}; what is before row {row} was read"))


def _sample(record: dict[str, Any], image: str, row: int) -> KeyedFiles:
    # what remains is the row's metadata
    content = record.pop(image)
    if isinstance(content, dict):
        content = content.get("bytes")
    parts: dict[str, Any] = {"json": record}
    if content is not None:
        parts["image"] = content
    if isinstance(record.get("txt"), str):
        parts["text"] = record["txt"].encode()
    key = record.get("key")
    return KeyedFiles(str(key) if isinstance(key, str | int) else f"{row}", f"row {row}", parts)
