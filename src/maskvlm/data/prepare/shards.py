"""One shard of a prepared set, made by one process: images decoded, shrunk, hashed and encoded, captions cleaned.

A shard is an Arrow stream. A note in `.making/` records what it was made from, so that a killed run makes no shard
twice. The content of a shard depends only on its rows and the settings.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import PIL
import pyarrow as pa
from PIL import features

from maskvlm.data.files import load_json, opened
from maskvlm.data.phash import KIND
from maskvlm.data.prepare.rows import RowMaker, RowNote, Settings
from maskvlm.data.prepared.manifest import (
    IMAGES,
    MAKING,
    SCHEMA,
    cannot_write_set,
    sha256_of_part,
    whole_set_file,
    write_set_json,
)
from maskvlm.data.prepared.manifest_schema import FORMAT
from maskvlm.data.raw.base import BadRow, RawRow


class Job(NamedTuple):
    """The rows of one shard, and its number in its split."""

    split: str
    number: int
    rows: list[RawRow | BadRow]


class ShardNote(NamedTuple):
    """The content of a shard, stored as its note. file: "" if no row could be used.

    Attributes:
        key: hash of settings and raw rows.
        digests: hashes of the rows' content, 32 hexadecimal digits per row.
        kept: number of images stored unchanged, byte for byte.
    """

    key: str
    file: str
    rows: int
    captions: int
    kept: int
    bytes: int
    sha256: str
    digests: str
    left_out: list[RowNote]
    mended: list[RowNote]


class PreparationStopped(Exception):
    """The run ends before the shard is done."""


# ------------------------------------------------------------------ a shard


def shard_name(job: Job) -> str:
    """Path of a job's shard, relative to the set's folder."""
    return f"{job.split}/data-{job.number:05}.arrow"


def note_file(root: Path, split: str, number: int) -> Path:
    """Path of a shard's note while the set is being prepared."""
    return root / MAKING / f"{split}-{number:05}.json"


def make_shard(root: Path, settings: Settings, job: Job, tick: Callable[[bool], None] = lambda used: None) -> ShardNote:
    """Make the shard, unless it already exists.

    Args:
        root: the set's folder, with `.making/` and the split's folder in it.
        tick: called after each row with whether it was used; may raise to stop.

    Raises:
        UserError: it cannot be written.
    """
    note, key = note_file(root, job.split, job.number), job_key(settings, job)
    if (shard_note := there_already(root, note, key)) is not None:
        # advance the progress bar as if they had been made
        for used in (True,) * shard_note.rows + (False,) * len(shard_note.left_out):
            tick(used)
        return shard_note
    try:
        # an old shard must not stay next to a new note that lists no shard
        (root / shard_name(job)).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write_set(root / shard_name(job), error) from error
    maker = RowMaker(job.split != IMAGES, settings, tick)
    sink: HashingSink | None = None
    batches = maker.batches(job.rows)
    # no file if no row can be used
    if (first := next(batches, None)) is not None:
        with whole_set_file(root / shard_name(job)) as file:
            sink = HashingSink(file)
            # a batch at a time, so that only one batch is in memory
            with pa.ipc.new_stream(pa.PythonFile(sink, "w"), SCHEMA) as stream:
                stream.write_batch(first)
                for batch in batches:
                    stream.write_batch(batch)
    shard_note = ShardNote(
        key=key,
        file=shard_name(job) if sink else "",
        rows=len(maker.digests),
        captions=maker.captions,
        kept=maker.kept,
        bytes=sink.size if sink else 0,
        sha256=sink.sha256.hexdigest() if sink else "",
        digests="".join(maker.digests),
        left_out=maker.left_out,
        mended=maker.mended,
    )
    # after the shard, as a note certifies that its shard is complete
    write_set_json(note, shard_note._asdict(), indent=None)
    return shard_note


class HashingSink:
    """A writable file that computes its hash while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size, self.closed = file, hashlib.sha256(), 0, False

    def write(self, chunk: Any) -> int:
        self.file.write(chunk)
        self.sha256.update(chunk)
        self.size += len(chunk)
        return len(chunk)

    def flush(self) -> None:
        """Do nothing: the file is flushed by whoever opened it."""

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        self.closed = True


# ------------------------------------------------------------------ identity


def job_key(settings: Settings, job: Job) -> str:
    """A hash of everything that the shard depends on: settings, libraries, rows, and image files (by size and time)."""
    # other versions of these may give different bytes
    made_by = (FORMAT, KIND, PIL.__version__, features.version("jpg"), SCHEMA.metadata)
    digest = hashlib.sha256(repr((made_by, settings, job.split, job.number)).encode())
    for row in job.rows:
        image = stamp(row.image) if isinstance(row, RawRow) else None
        # the image is the first field of a `RawRow`: its stamp replaces it
        digest.update(repr((image, row[1:] if isinstance(row, RawRow) else row)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def stamp(image: str | bytes) -> tuple[Any, ...]:
    """Identifies an image without decoding it."""
    if isinstance(image, bytes):
        return (len(image), hashlib.sha256(image).hexdigest())
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return (image,)
    # size and time stand for the content, so that no image is read
    return (image, status.st_size, status.st_mtime_ns)


def read_note(note: Path) -> ShardNote:
    """Read a note. Raises OSError, ValueError, KeyError or TypeError if there is no intact note."""
    with opened(note) as stream:
        content = load_json(stream.read(), note)
    for name in ("left_out", "mended"):
        # JSON turned the tuples into lists
        content[name] = [RowNote(*entry) for entry in content[name]]
    return ShardNote(**content)


def there_already(root: Path, note: Path, key: str) -> ShardNote | None:
    """The note of an earlier run on the same rows, if its shard is unchanged; else None."""
    try:
        shard_note = read_note(note)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    split, _, number = note.stem.rpartition("-")
    # the note may be untrusted: it must name no file but its own shard
    if shard_note.key != key or shard_note.file not in ("", f"{split}/data-{number}.arrow"):
        return None
    shard = root / shard_note.file
    if shard_note.file and not (
        # cheapest check first
        shard.is_file() and shard.stat().st_size == shard_note.bytes and sha256_of_part(shard) == shard_note.sha256
    ):
        return None
    return shard_note
