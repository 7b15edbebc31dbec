"""Lines of text files that may be damaged anywhere, and JSON lists that are too large for memory."""

import json
import reprlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.data.caption_text import clean_caption, stable_id
from maskvlm.data.safe_open import MAX_LINE_BYTES, byte_lines, content_of, opened
from maskvlm.data.strict_json import parse_first, parse_json
from maskvlm.utils.errors import ExitCode, UserError

CHUNK = 1_000_000
NOT_UTF8 = "not UTF-8 text"
"""The reason for a line that is not UTF-8."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
NO_TEXT = {
    b"PK\x03\x04": ("a spreadsheet (xlsx, ods) or a zip archive, not text", "Save the sheet as csv, in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (xls), not text", "Save the sheet as csv, in UTF-8"),
    b"\x1f\x8b": ("compressed by gzip", "Unpack it first (gunzip -k)"),
    b"PAR1": (
        "a Parquet file, not text",
        "If it holds the images themselves, use the set webdataset instead, else save it as csv (pandas: to_csv)",
    ),
}
"""First bytes of files that are often given as tables -> what they are, and what to do."""


class TextLine(NamedTuple):
    """A line without its line end. `problem` is (reason, message) or None; number counts from 1, as in editors."""

    number: int
    text: str
    problem: tuple[str, str] | None = None


def text_lines(file: Path) -> Iterator[TextLine]:
    """The lines of a UTF-8 file with or without a byte order mark, including blank ones.

    A line that is not UTF-8, contains null bytes or a carriage return, or is longer than MAX_LINE_BYTES has a problem
    and no text; the other lines are not affected.

    Raises:
        UserError: the file cannot be read, or is UTF-16, a spreadsheet, Parquet or compressed.
    """
    with opened(file) as stream:
        for number, content, problem in byte_lines(stream):
            if number == 1 and content.startswith(UTF16):
                raise UserError(file, "UTF-16 text", "Save it as UTF-8", ExitCode.BAD_DATA)
            if number == 1 and (
                kind := next((kind for start, kind in NO_TEXT.items() if content.startswith(start)), None)
            ):
                raise UserError(file, *kind, ExitCode.BAD_DATA)
            # a byte order mark would become part of the first column's name
            content = content.removeprefix(b"\xef\xbb\xbf") if number == 1 else content
            yield TextLine(number, "", problem) if problem else TextLine(number, *decoded(content))


def decoded(content: bytes) -> tuple[str, tuple[str, str] | None]:
    """UTF-8 text, or "" and (reason, message)."""
    # null bytes are valid UTF-8, but in ASCII text saved as UTF-16 every second byte is null
    if b"\x00" in content:
        return "", ("null bytes", f"byte {content.index(0)} is null: the file is damaged, or UTF-16")
    try:
        return content.decode(), None
    except UnicodeDecodeError as error:
        return "", (NOT_UTF8, f"byte {error.start} is not UTF-8; save the file as UTF-8")


def read_text(file: Path, limit: int = MAX_LINE_BYTES) -> tuple[str, tuple[str, str] | None]:
    """A small text file, or "" and (reason, message)."""
    try:
        content = content_of(file, limit)
    except UserError as error:
        return "", ("too large" if error.code == ExitCode.BAD_DATA else "unreadable", error.what)
    return decoded(content.removeprefix(b"\xef\xbb\xbf"))


def json_items(file: Path) -> Iterator[Any]:
    """The items of a JSON file that is a list, one at a time, so that files of a gigabyte cost no memory.

    Raises:
        UserError: the file cannot be read, is not a list, or is damaged; the items before the damage were yielded.
    """
    with opened(file) as stream:
        # text, so that a piece never ends within a character
        reader = TextIOWrapper(stream, encoding="utf-8-sig")
        text, position = _read(reader, file, CHUNK).lstrip(), 1
        if not text.startswith("["):
            todo = "Write its rows as one list, or one to a line in a .jsonl"
            todo += "; if it is a set's own file, name that set, such as coco"
            raise UserError(file, "a list in [ ] is needed", todo, ExitCode.BAD_DATA)
        while True:
            # commas are treated as white space: an extra one does no harm
            while text[position : position + 1] in (" ", "\n", "\r", "\t", ","):
                position += 1
            if text.startswith("]", position):
                if (text[position + 1 :] + _read(reader, file, CHUNK)).strip():
                    raise _damaged(file, "something follows the list")
                return
            # `end` is the end of the text if the item may continue in the next piece
            item, end = _item(text, position, file)
            # a number at the very end of a piece might continue, so an item is only taken if more follows
            if end < len(text):
                yield item
                position = end
                continue
            remaining = len(text) - position
            # at least doubles the text, so that a long item is not parsed again for each megabyte
            more = _read(reader, file, max(CHUNK, remaining)) if remaining < MAX_LINE_BYTES else ""
            if not more:
                raise _damaged(file, "not JSON, or cut short")
            # drop what was yielded
            text, position = text[position:] + more, 0


def _item(text: str, position: int, file: Path) -> tuple[Any, int]:
    """The item and its end, which is the end of the text if it may continue."""
    try:
        return parse_first(text, position)
    except json.JSONDecodeError:
        return None, len(text)
    except (RecursionError, ValueError) as error:
        raise _damaged(file, "nested too deeply, or a number is too long") from error


def _read(reader: TextIOWrapper, file: Path, size: int) -> str:
    try:
        return reader.read(size)
    except UnicodeDecodeError as error:
        raise _damaged(file, "not UTF-8 text") from error


def _damaged(file: Path, what: str) -> UserError:
    return UserError(file, what, "Fetch it again", ExitCode.BAD_DATA)


def json_texts(text: str) -> list[str] | None:
    """The texts of a JSON list of texts; None if it is anything else."""
    try:
        texts = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return texts if isinstance(texts, list) and all(isinstance(each, str) for each in texts) else None


def one_line(text: object, most: int = 200) -> str:
    """A text for messages and ids: one line, printable, encodable."""
    # cut before cleaning, as the text may be a megabyte
    cleaned = clean_caption(str(text)[: most * 2])[0][:most]
    return cleaned if cleaned.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in cleaned)


def one_line_id(text: str) -> str:
    """`one_line`, but different texts stay different: a hash is appended to a text that it changes."""
    line = one_line(text)
    return line if line == text else f"{line[:180]} {stable_id(text):016x}"


def short_value(value: object, most: int = 60) -> str:
    """An untrusted value for a message: one line, however large or deep it is."""
    return one_line(reprlib.repr(value), most)
