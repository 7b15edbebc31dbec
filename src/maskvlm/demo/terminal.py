"""What the page writes to its terminal: characters that show, whoever made the text."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Controls but tab and line end, then characters without width, of direction, and line ends of Unicode.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def escaped(text: str) -> str:
    """A text without what would move the cursor, colour, hide, reverse, or ring: each such character by its number."""
    return _HIDDEN.sub(lambda match: ascii(match.group())[1:-1], text)  # ascii() without its quotes


class Plain:
    """A stream of which all that is written is `escaped`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text without its control characters; returns its length."""
        return self.stream.write(escaped(text))

    def writelines(self, lines: Any) -> None:
        """Each by `write`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable() -> Iterator[None]:
    """Within it a stranger's text cannot take hold of the terminal, in whatever traceback it turns up."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Plain(before[0]), Plain(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
