"""Opens untrusted files, except images and the archives of weights: only regular files.

A pipe would block the program, a device has no end, and a link may lead to any file of this machine.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from maskvlm.utils.errors import ExitCode, UserError

TODO = "Check the name and the folder"
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_SURROGATES = re.compile("[\ud800-\udfff]")
LEADS_OUT = "link leads out"
"""The reason for rows whose file is a link to somewhere else."""


def special(mode: int) -> str | None:
    """The kind of a file that is not a regular file ("a pipe"), else None. mode: from `os.stat`."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no plain file")


@contextmanager
def opened(file: Path, todo: str = TODO) -> Iterator[BufferedReader]:
    """Open a regular file for reading; any error, also while it is read, is raised as a UserError.

    Raises:
        UserError: it is missing, or is a folder, a pipe, a socket or a device (66); it cannot be read (74).
    """
    if "\x00" in str(file):
        raise UserError(repr(str(file)), "no file has a null byte in its name", todo, ExitCode.MISSING_INPUT)
    try:
        # checked on the open file, not by name, as the file may be swapped between two look-ups of its name
        with open(file, "rb", opener=_at_once) as stream:
            check_plain(file, os.fstat(stream.fileno()).st_mode)
            yield stream
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        folder = "" if os.path.isdir(file.parent) else f" (there is no folder {file.parent})"
        raise UserError(file, f"no such file{folder}", todo, ExitCode.MISSING_INPUT) from error
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise UserError(file, what, "Check disk and permissions", ExitCode.IO_ERROR) from error


def content_of(file: Path, most: int, todo: str = TODO) -> bytes:
    """The content of a small file. Raises UserError like `opened`, or if it has more than `most` bytes (65)."""
    with opened(file, todo) as stream:
        # Not `read(most)`, which would allocate that much memory for each small file.
        if os.fstat(stream.fileno()).st_size <= most and len(content := stream.read()) <= most:
            return content
    raise UserError(file, f"more than {most:,} bytes", todo, ExitCode.BAD_DATA)


def _at_once(path: str, flags: int) -> int:
    """Open without blocking, as a pipe would otherwise wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_plain(file: Path, mode: int) -> None:
    """Raise UserError for anything but a regular file. mode: from `os.stat`."""
    if kind := special(mode):
        raise UserError(file, f"is {kind}, not a file", "Name a file, or write it to one first", ExitCode.MISSING_INPUT)


# ------------------------------------------------------------------ lines


MAX_LINE_BYTES = 16_000_000
"""Longer lines are not rows: a caption is cut at 4096 bytes, the largest rows of public sets have some 100 kB."""

_HEAD = 1_000_000


class ByteLine(NamedTuple):
    """A line without its line end, or with a problem: (reason, message). number: counted from 1."""

    number: int
    content: bytes
    problem: tuple[str, str] | None = None


def byte_lines(stream: BufferedReader) -> Iterator[ByteLine]:
    """The lines of a file, which end with LF or CRLF, or with CR if its first million bytes contain no LF.

    A CR within a line is a problem of that line: it is either a different line end, which would join two rows, or does
    not belong in a text. Line numbers are those of the file.
    """
    # the file's line ends
    head = stream.read(_HEAD)
    stream.seek(0)
    ends: tuple[bytes, ...] = (b"\n",)
    read = stream.readline
    if b"\r" in head and b"\n" not in head:
        # only Python's text layer ends lines at a lone CR
        ends, text = (b"\n", b"\r"), TextIOWrapper(stream, "latin-1", newline="")  # latin-1 preserves bytes

        def read(most: int | None = -1, /) -> bytes:
            return text.readline(most or -1).encode("latin-1")

    number = 0
    while line := read(MAX_LINE_BYTES):
        number += 1
        # the rest of the line is skipped piece by piece
        if len(line) == MAX_LINE_BYTES and not line.endswith(ends):
            while (rest := read(MAX_LINE_BYTES)) and not rest.endswith(ends):
                pass
            yield ByteLine(number, b"", ("line too long", f"more than {MAX_LINE_BYTES:,} bytes in one line"))
        elif b"\r" in (content := line.rstrip(b"\r\n")):
            what = f"a carriage return at byte {content.index(13)}; save the file with one kind of line ends"
            yield ByteLine(number, content, ("line ends of two kinds", what))
        else:
            yield ByteLine(number, content)


# ------------------------------------------------------------------ links


class Inside:
    """Checks that files are within a folder after following links: untrusted links must not lead to other files.

    The folder itself may be a link, as the user named it.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        # cached by folder, as a set has a million files in a few folders
        self._within = cache(self._inside)

    def holds(self, path: str | Path) -> bool:
        """Whether the path, after following links, is within the folder."""
        folder, name = os.path.split(path)
        # a file that is not a link is where its folder is
        if name in ("", ".", "..") or os.path.islink(path):
            return self._inside(str(path))
        return self._within(folder)

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        # with a trailing slash, as /data does not contain /database
        return real == self.root or real.startswith(os.path.join(self.root, ""))


class Walk:
    """The files of a folder and its subfolders, without hidden ones, in an order that depends only on their names.

    Attributes:
        left_out: reason -> skipped paths, relative to the folder: links that lead out of it, and names that are not
            text; complete when the walk is.
    """

    def __init__(self, root: str | Path) -> None:
        self.root, self.left_out = Path(root), dict[str, list[str]]()
        self._inside = Inside(self.root)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """Each folder with the names of its files. Raises UserError (74) if one cannot be listed."""
        self.left_out.clear()
        # folders by device and inode, which are the same under any name
        seen_folders: set[tuple[int, int]] = set()
        for place, folders, files in os.walk(self.root, onerror=_cannot_list, followlinks=True):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen_folders:  # a link that leads back
                folders.clear()
                continue
            seen_folders.add((status.st_dev, status.st_ino))
            # in place, as `os.walk` descends into the folders left in this list
            folders[:] = self._select(place, folders)
            yield place, self._select(place, files)

    def _select(self, place: str, names: list[str]) -> list[str]:
        selection = []
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(place, name)
            # Python represents non-UTF-8 bytes of a name as lone surrogates
            reason = "name is not text" if _SURROGATES.search(name) else "" if self._inside.holds(path) else LEADS_OUT
            if reason:
                self.left_out.setdefault(reason, []).append(os.path.relpath(path, self.root))
            else:
                selection.append(name)
        return selection


def _cannot_list(error: OSError) -> None:
    what, todo = f"cannot be read ({error.strerror or error})", "Check disk and permissions"
    raise UserError(error.filename, what, todo, ExitCode.IO_ERROR) from error


def check_below(file: Path, root: Path) -> None:
    """Reject a file in a folder that is a link to somewhere else; a file named with another folder is accepted.

    Raises:
        UserError: it leads out of the folder (77).
    """
    named = os.path.abspath(file).startswith(os.path.join(os.path.abspath(root), ""))
    if named and not Inside(root).holds(file):
        todo = f"Copy what it leads to into {root}, or name the folder where it lies"
        raise UserError(file, f"a link that leads out of {root}", todo, ExitCode.REFUSED)
