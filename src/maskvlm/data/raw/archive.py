"""Members of tar archives in the order in which they are written, whatever the archive holds: nothing is extracted."""

import bz2
import gzip
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from maskvlm.data.images import MAX_FILE_BYTES
from maskvlm.data.raw.columns import name_problem
from maskvlm.data.raw.lines import plain

TAR = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.I)
NAMELESS = "(no name)"
_READERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Member(NamedTuple):
    """A file of an archive with its content, or (reason, message); name "" where the archive itself is at fault."""

    name: str
    content: bytes
    problem: tuple[str, str] | None = None


class _Forward:
    """An archive's bytes that are read forward only and in bounded pieces; remembers what was read last.

    tarfile takes sizes from headers on trust: a header with a negative one would lead it round in circles, one with a
    gigabyte of attributes into memory.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_FILE_BYTES + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("a header that claims too much")
        self.last = self._stream.read(size)
        return self.last

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position < self._stream.tell():
            raise tarfile.ReadError("a header that leads backwards")
        return self._stream.seek(position)

    def close(self) -> None:
        self._stream.close()


def members(file: Path) -> Iterator[Member]:
    """The plain files of an archive, folders and hidden files left out; damage is a member with a problem.

    Reasons: "unsafe member name" (it leads out of the archive, or is not text), "not a plain file" (links, devices),
    "bomb" (over MAX_FILE_BYTES; the rest of a compressed archive is then not read, as that would unpack it),
    "truncated archive", "damaged archive".
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(6)
            compressed = next((read for magic, read in _READERS.items() if start.startswith(magic)), None)
            stream.seek(0)
            source = _Forward(compressed(stream) if compressed else stream)
            yield from _members(source, packed=compressed is not None)
    except OSError as error:
        yield Member("", b"", ("unreadable", plain(error.strerror or error)))


def _members(source: _Forward, packed: bool) -> Iterator[Member]:
    try:
        opened: Any = source  # tarfile asks for no more than it has
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            while (header := tar.next()) is not None:
                vars(tar)["members"] = []  # it keeps them all
                base = header.name.rpartition("/")[2]
                if packed and header.size > MAX_FILE_BYTES:
                    yield Member(plain(header.name) or NAMELESS, b"", ("bomb", f"a file of {header.size:,} bytes"))
                    return
                if not header.isdir() and (not base.startswith(".") or base == ".."):
                    yield _member(tar, header)
        if len(source.last) < tarfile.BLOCKSIZE:
            yield Member("", b"", ("truncated archive", "it ends without an end marker; what is before it was read"))
        elif source.last.strip(b"\x00"):
            yield Member("", b"", ("damaged archive", "a header cannot be read; what is before it was read"))
    except Exception as error:  # tarfile and the unpackers raise over a dozen types on damaged bytes
        short = "unexpected end" in str(error) or "end-of-stream" in str(error) or "empty" in str(error)
        reason = "truncated archive" if short or isinstance(error, EOFError) else "damaged archive"
        yield Member("", b"", (reason, f"{plain(error, 80)}; what is before it was read"))


def _member(tar: tarfile.TarFile, header: tarfile.TarInfo) -> Member:
    name = header.name.removeprefix("./")
    if problem := name_problem(name) or ("" if plain(name) else "the name is empty"):
        return Member(plain(name) or NAMELESS, b"", ("unsafe member name", f"{problem} of the archive"))
    if not header.isreg() or header.issparse():
        return Member(name, b"", ("not a plain file", "a link, a device or a file with holes"))
    if header.size > MAX_FILE_BYTES:
        return Member(name, b"", ("bomb", f"a file of {header.size:,} bytes"))
    stream = tar.extractfile(header)
    return Member(name, stream.read() if stream else b"")  # raises where the archive ends within it
