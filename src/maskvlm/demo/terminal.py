"""Output of the page to its terminal: only printable characters, whoever wrote the text."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters except tab and newline, then zero-width characters, direction marks and Unicode line separators.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def escaped(text: str) -> str:
    """A text in which characters that would move the cursor, colour, hide, reverse or ring are escaped by number."""
    return _HIDDEN.sub(lambda match: ascii(match.group())[1:-1], text)  # ascii() without its quotes


class Plain:
    """A stream that writes all text `escaped`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text with its control characters escaped; returns the length written."""
        return self.stream.write(escaped(text))

    def writelines(self, lines: Any) -> None:
        """Write each line with `write`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable() -> Iterator[None]:
    """Context in which untrusted text cannot control the terminal, whatever traceback it appears in."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Plain(before[0]), Plain(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
