"""Members of untrusted tar archives, in the order in which they were written; nothing is extracted to disk.

An archive is read to its actual end. Concatenated archives (`cat a.tar b.tar`) are read one after the other; anything
else after the end marker of an archive is reported.
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from maskvlm.data.images import MAX_FILE_BYTES
from maskvlm.data.raw.columns import name_problem
from maskvlm.data.raw.lines import one_line
from maskvlm.data.safe_open import opened
from maskvlm.utils.errors import UserError

TAR = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.I)
NAMELESS = "(no name)"
BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20


class Unpacked(io.RawIOBase):
    """Content compressed by bzip2 or xz, in one stream or several concatenated ones. Unlike `bz2.open` and `lzma.open`
    it rejects data after the last stream, except zeros, with which tapes and xz pad."""

    def __init__(self, stream: IO[bytes], new: Callable[[], Any]) -> None:
        self._stream, self._new = stream, new
        self._unpacker = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read like a raw stream. Raises EOFError for a truncated stream, OSError or LZMAError for a damaged one."""
        while True:
            packed = b""
            if self._unpacker.eof:
                # the stream has ended: zeros, another stream, or data that a new decompressor rejects may follow
                packed = self._unpacker.unused_data
                while not packed.strip(b"\x00") and (more := self._stream.read(CHUNK)):
                    packed = more
                if not (packed := packed.lstrip(b"\x00")):
                    return 0
                self._unpacker = self._new()
            # the file must not end within a stream
            elif self._unpacker.needs_input and not (packed := self._stream.read(CHUNK)):
                raise EOFError("unexpected end")
            # at most one buffer of content, however large the decompressed data
            if content := self._unpacker.decompress(packed, len(buffer)):
                buffer[: len(content)] = content
                return len(content)


_READERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),  # rejects trailing data itself
    b"BZh": lambda stream: io.BufferedReader(Unpacked(stream, bz2.BZ2Decompressor), CHUNK),
    b"\xfd7zXZ": lambda stream: io.BufferedReader(Unpacked(stream, lzma.LZMADecompressor), CHUNK),
}


class Member(NamedTuple):
    """A file of an archive with its content, or (reason, message); name "" if the archive itself is at fault."""

    name: str
    content: bytes
    problem: tuple[str, str] | None = None


class Forward:
    """An archive's bytes, read only forward and in bounded pieces; remembers the last piece.

    tarfile trusts the sizes in headers: a negative one would make it loop, and a gigabyte of attributes would be read
    into memory.
    """

    def __init__(self, stream: IO[bytes], packed: bool) -> None:
        self._stream, self._packed = stream, packed
        self._position, self._returned = 0, b""
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        # tarfile reads as much as a header claims
        if not 0 <= size <= MAX_FILE_BYTES + BLOCK:
            raise tarfile.ReadError("a header that claims too much")
        # first the bytes that `rest` has put back
        self.last, self._returned = self._returned[:size], self._returned[size:]
        while len(self.last) < size and (more := self._stream.read(size - len(self.last))):
            self.last += more
        self._position += len(self.last)
        return self.last

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position < self._position:
            raise tarfile.ReadError("a header that leads backwards")
        # a compressed stream cannot seek: it is skipped piece by piece
        while self._position < position and (self._packed or self._returned):
            if not self.read(min(CHUNK, position - self._position)):
                return self._position
        if self._position < position:
            self._position = self._stream.seek(position)
        return self._position

    def rest(self) -> tuple[int, bytes]:
        """Position of the next block that is not all zeros, and the block; b"" at the end of the file."""
        start = self._position
        while chunk := self.read(CHUNK):
            if self._position - start > MAX_FILE_BYTES:
                raise tarfile.ReadError(f"more than {MAX_FILE_BYTES:,} zeros after the end marker")
            if chunk.strip(b"\x00"):
                # whole blocks of zeros, as the next header starts at a block
                skipped = (len(chunk) - len(chunk.lstrip(b"\x00"))) // BLOCK * BLOCK
                # put back for an archive that may follow
                self._returned = chunk[skipped:] + self._returned
                self._position -= len(chunk) - skipped
                return self._position, chunk[skipped : skipped + BLOCK]
        return self._position, b""

    def count(self, most: int) -> str:
        """Number of bytes left, in words; or that there are more than `most`."""
        start = self._position
        while self._position - start <= most and self.read(CHUNK):
            pass
        remaining = self._position - start
        return f"{remaining:,} bytes" if remaining <= most else f"more than {most:,} bytes"

    def close(self) -> None:
        self._stream.close()


def members(file: Path | IO[bytes]) -> Iterator[Member]:
    """The plain files of an archive, without folders and hidden files; damage is a member with a problem.

    Reasons: "unsafe member name" (it leads out of the archive, or is not text), "not a plain file" (links, devices),
    "too large" (over MAX_FILE_BYTES; the rest of a compressed archive is then not read, as that would decompress it),
    "truncated archive", "damaged archive", "data after the end marker" (which are not an archive), "unreadable" (the
    file cannot be opened or read).

    Args:
        file: path of the archive, or the open archive.
    """
    try:
        if isinstance(file, Path):
            with opened(file) as stream:
                yield from _unpacked(stream)
        else:
            yield from _unpacked(file)
    except UserError as error:
        yield Member("", b"", ("unreadable", one_line(error.what)))


def _unpacked(stream: IO[bytes]) -> Iterator[Member]:
    start = stream.read(6)
    stream.seek(0)
    reader = next((read for magic, read in _READERS.items() if start.startswith(magic)), None)
    try:
        source = Forward(reader(stream) if reader else stream, reader is not None)
        yield from joined(source, reader is not None)
    except Exception as error:  # tarfile and the decompressors raise over a dozen types on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise
        short = any(word in str(error) for word in ("unexpected end", "end-of-stream", "empty"))
        reason = "truncated archive" if short or isinstance(error, EOFError) else "damaged archive"
        yield Member("", b"", (reason, f"{one_line(error, 80)}; what is before it was read"))


def joined(source: Forward, packed: bool) -> Iterator[Member]:
    """The members of an archive, and of those that follow it."""
    # tarfile stops the same way at the end marker, a truncation or an unreadable header: the last block tells which
    while (yield from _members(source, packed)):
        if len(source.last) < BLOCK:
            yield Member("", b"", ("truncated archive", "it ends without an end marker; what is before it was read"))
            return
        if source.last.strip(b"\x00"):
            what = f"a header cannot be read, {source.tell() - BLOCK:,} bytes from its beginning"
            yield Member("", b"", ("damaged archive", f"{what}; what is before it was read"))
            return
        position, block = source.rest()
        if not block:
            return
        try:
            # only to check whether another archive starts here
            tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            what = f"{source.count(MAX_FILE_BYTES)} that are not an archive follow its end, from byte {position:,} on"
            yield Member("", b"", ("data after the end marker", f"{what}; what is before it was read"))
            return


def _members(source: Forward, packed: bool) -> Generator[Member, None, bool]:
    """The members of one archive; returns False if the rest must not be read."""
    file: Any = source  # tarfile needs no other methods
    # "r:": uncompressed; `Forward`'s stream has already been decompressed
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (header := tar.next()) is not None:
            vars(tar)["members"] = []  # tarfile would keep them all
            base = header.name.rpartition("/")[2]
            # continuing would decompress it
            if packed and header.size > MAX_FILE_BYTES:
                yield Member(one_line(header.name) or NAMELESS, b"", ("too large", f"a file of {header.size:,} bytes"))
                return False
            # ".." is not a hidden file but a name that leads out, which `_member` reports
            if not header.isdir() and (not base.startswith(".") or base == ".."):
                yield _member(tar, header)
    return True


def _member(tar: tarfile.TarFile, header: tarfile.TarInfo) -> Member:
    name = header.name.removeprefix("./")
    if problem := name_problem(name) or ("" if one_line(name) else "the name is empty"):
        return Member(one_line(name) or NAMELESS, b"", ("unsafe member name", f"{problem} of the archive"))
    if not header.isreg() or header.issparse():
        return Member(name, b"", ("not a plain file", "a link, a device or a file with holes"))
    if header.size > MAX_FILE_BYTES:
        return Member(name, b"", ("too large", f"a file of {header.size:,} bytes"))
    # a file object within the archive; nothing is written
    stream = tar.extractfile(header)
    return Member(name, stream.read() if stream else b"")  # raises if the archive ends within it
