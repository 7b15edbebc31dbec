"""Comma- or tab-separated tables whose rows may be damaged: readable rows are read, the others reported by line."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maskvlm.data.images import IMAGE_SUFFIXES
from maskvlm.data.raw.lines import MAX_LINE_BYTES, NOT_UTF8, TextLine, text_lines
from maskvlm.utils.errors import ExitCode, UserError

DELIMITERS = ",\t;|"
MAX_JOINED = 100
"""Maximum number of lines of a quoted field, so that an unclosed quote does not swallow the rest of the file."""
OPEN, WRONG = "open", "wrong"
SEP = re.compile(rf'"?sep=([{re.escape(DELIMITERS)}])"?', re.I)
"""Excel's line above the names of the columns, which gives the delimiter."""


class TableRecord(NamedTuple):
    """A row of a table, or (reason, message). number: the line on which it starts."""

    number: int
    fields: list[str]
    problem: tuple[str, str] | None = None


class RawTable:
    """A table with column names in the first line, or in the second one after Excel's `sep=;`.

    Attributes:
        columns: names of the columns.
        delimiter: that of `sep=`, else by the file's extension, else the most frequent one in the first line.
    """

    def __init__(self, file: Path, delimiter: str | None = None) -> None:
        self.file = file
        self._lines = text_lines(file)
        # lines that were peeked at, but not consumed
        self._ahead: deque[TextLine] = deque()
        # the first line that is not blank
        filled = (line for line in self._lines if line.text.strip() or line.problem)
        header = next(filled, None)
        if header is not None and (sep := SEP.fullmatch(header.text)):
            delimiter, header = delimiter or sep[1], next(filled, None)
        if header is None:
            raise UserError(file, "is empty", "It needs a header and one row per text", ExitCode.BAD_DATA)
        where, todo = f"{file}:{header.number}", "The first line must name the columns"
        if header.problem:
            reason, why = header.problem
            if reason == NOT_UTF8:
                # what to do comes after the semicolon
                why, todo = why.partition(";")[0], "Save the file as UTF-8"
            raise UserError(where, f"{reason} ({why})", todo, ExitCode.BAD_DATA)
        self.delimiter = delimiter or delimiter_of(file, header.text)
        names = split_fields(header.text, self.delimiter)
        if isinstance(names, str) or not any(name.strip() for name in names):
            raise UserError(where, "the names of the columns cannot be read", todo, ExitCode.BAD_DATA)
        self.columns = [name.strip() for name in names]

    def records(self) -> Iterator[TableRecord]:
        """The rows in the order of the file, each once; blank lines are skipped."""
        while (line := self._ahead.popleft() if self._ahead else next(self._lines, None)) is not None:
            if line.problem:
                yield TableRecord(line.number, [], line.problem)
            elif line.text.strip():
                yield self._record(line)

    def _record(self, line: TextLine) -> TableRecord:
        fields, joined = split_fields(line.text, self.delimiter), 0
        # a row that already has an image must not end within the next image's row
        size, own_image = len(line.text), self._has_image(line.text)
        while fields == OPEN and joined < MAX_JOINED and (following := self._peek(joined)):
            size += len(following.text) + 1
            if following.problem or size > MAX_LINE_BYTES:
                break
            joined += 1
            # joined only then, as otherwise a long field would cost the square of its lines
            if '"' in following.text:  # only a quote can close the field
                text = "\n".join([line.text, *(self._ahead[n].text for n in range(joined))])
                fields = split_fields(text, self.delimiter)
                # a mark within another row, such as 5" for five inches, does not close it
                if isinstance(fields, list) and own_image and self._is_row(following.text):
                    fields = OPEN
                    break
        # the peeked lines stay in `_ahead`, and each is read as a row of its own
        if isinstance(fields, str) or (joined and len(fields) != len(self.columns)):
            opened = fields == OPEN or joined
            reason = "quote left open" if opened else "quotes do not fit"
            what = "a quoted field has no end" if opened else "a quote within a quoted field is not doubled"
            return TableRecord(line.number, [], (reason, f"{what}; the next line is read as a new row"))
        for _ in range(joined):
            self._ahead.popleft()
        if len(fields) != len(self.columns):
            reason = "missing column" if len(fields) < len(self.columns) else "too many columns"
            todo = f"put text with {self.delimiter!r} in quotes"
            if any(field.startswith(" ") and field.lstrip().startswith('"') for field in fields):
                todo = "a quoted field must start with its quote: remove the space before it"
            if len(fields) < len(self.columns):
                todo = "give one for each column, even if it is empty"
            what = f"fields: {len(fields)}, columns: {len(self.columns)}; {todo}"
            return TableRecord(line.number, [], (reason, what))
        return TableRecord(line.number, fields)

    def _peek(self, index: int) -> TextLine | None:
        """A line after the current one, without consuming it."""
        while len(self._ahead) <= index and (line := next(self._lines, None)) is not None:
            self._ahead.append(line)
        return self._ahead[index] if index < len(self._ahead) else None

    def _is_row(self, text: str) -> bool:
        """Whether a line within an open quote looks like a row of its own: complete, with an image name."""
        fields = split_fields(text, self.delimiter)
        return (isinstance(fields, str) or len(fields) == len(self.columns)) and self._has_image(text)

    def _has_image(self, text: str) -> bool:
        """Whether any field is the name of an image, ignoring quotes."""
        names = (each.strip() for each in text.split(self.delimiter))
        return any(name[name.rfind(".") :].lower() in IMAGE_SUFFIXES for name in names if "." in name)


def delimiter_of(file: Path, header: str) -> str:
    """The delimiter by the file's extension, else the most frequent one in its header."""
    if file.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    # on a tie, the first of DELIMITERS
    counts = {delimiter: header.count(delimiter) for delimiter in DELIMITERS}
    return max(counts, key=counts.__getitem__)


def split_fields(text: str, delimiter: str) -> list[str] | str:
    """The fields of a row; OPEN if a quote is unclosed, WRONG if quotes are otherwise invalid."""
    # the fast path, for nearly all rows
    if '"' not in text:
        return text.split(delimiter)
    # a process-wide setting, restored below
    limit = csv.field_size_limit(MAX_LINE_BYTES + MAX_JOINED)
    try:
        rows = [*csv.reader([text], delimiter=delimiter, strict=True)]
    except csv.Error as error:
        return OPEN if "unexpected end of data" in str(error) else WRONG
    finally:
        csv.field_size_limit(limit)
    return rows[0] if len(rows) == 1 else WRONG
