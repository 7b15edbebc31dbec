"""Closed schemas for plain data from someone else's file, with a one-line error for anything that does not fit.

A `Kind` describes the type and range of a value. `Record` names the keys of a mapping, and no other key is read.
Nothing here builds objects: the result is bool, int, float, str, None, and lists and dicts of these.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from maskvlm.utils.errors import ExitCode, UserError

MOST_VALUE = 60  # characters shown of a wrong value
MOST_TEXT = 1000  # characters of a text, by default


class Kind(Protocol):
    """A type with a range."""

    def says(self) -> str:
        """What is expected, in words."""

    def fits(self, value: Any) -> bool:
        """Whether a value is of this kind."""


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def says(self) -> str:
        return "true or false"

    def fits(self, value: Any) -> bool:
        return type(value) is bool


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int = 0
    most: int = 2**53

    def says(self) -> str:
        return f"a whole number from {self.least:,} to {self.most:,}"

    def fits(self, value: Any) -> bool:
        # `type`: true is an int for isinstance
        return type(value) is int and self.least <= value <= self.most


@dataclass(frozen=True)
class Real:
    """A finite number from `least` to `most`."""

    least: float = -1e9
    most: float = 1e9

    def says(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"

    def fits(self, value: Any) -> bool:
        if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
            return False
        return bool(self.least <= value <= self.most)  # a whole number of any length compares with a float


@dataclass(frozen=True)
class Text:
    """Printable text of at most `most` characters that fully matches `pattern`; on one line, unless `lines`."""

    most: int = MOST_TEXT
    pattern: str | None = None
    lines: bool = False

    def says(self) -> str:
        form = "" if self.pattern is None else f" of the form {self.pattern}"
        return f"a text of at most {self.most:,} characters{'' if self.lines else ' on one line'}{form}"

    def fits(self, value: Any) -> bool:
        if type(value) is not str or len(value) > self.most:
            return False
        # no control characters: untrusted texts reach terminals
        printed = value.replace("\n", "") if self.lines else value
        return printed.isprintable() and (self.pattern is None or re.fullmatch(self.pattern, value) is not None)


@dataclass(frozen=True)
class OneOf:
    """One of these values, of the same type."""

    values: tuple[Any, ...]

    def says(self) -> str:
        listing = ", ".join(str(value) for value in self.values[:8])
        return f"one of {listing}, ..." if len(self.values) > 8 else f"one of {listing}" if self.values[1:] else listing

    def fits(self, value: Any) -> bool:
        # the type too: 1 == True == 1.0
        return any(type(value) is type(one) and value == one for one in self.values)


@dataclass(frozen=True)
class AnyOf:
    """One of several kinds."""

    kinds: tuple[Kind, ...]

    def says(self) -> str:
        return " or ".join(kind.says() for kind in self.kinds)

    def fits(self, value: Any) -> bool:
        return any(kind.fits(value) for kind in self.kinds)


@dataclass(frozen=True)
class Listed:
    """A list of values of one kind."""

    kind: Kind
    most: int = 1000
    least: int = 0

    def says(self) -> str:
        return f"a list of {self.least} to {self.most:,} values, each {self.kind.says()}"

    def fits(self, value: Any) -> bool:
        right = type(value) in (list, tuple) and self.least <= len(value) <= self.most
        # the length first, so that a list of millions is not searched
        return right and all(self.kind.fits(part) for part in value)


@dataclass(frozen=True)
class Entries:
    """A mapping from texts to values of one kind."""

    kind: Kind
    most: int = 1000

    def says(self) -> str:
        return f"a mapping of at most {self.most:,} names, each to {self.kind.says()}"

    def fits(self, value: Any) -> bool:
        if type(value) is not dict or len(value) > self.most:
            return False
        return all(Text().fits(name) and self.kind.fits(part) for name, part in value.items())


@dataclass(frozen=True)
class Tree:
    """Plain values, and lists and mappings of them, at most `most` in all and `depth` deep. The keys are not checked:
    before anything is built from it, it must pass another check. With `lines`, texts may have several lines: that other
    check then names the one that may not."""

    most: int = 10_000
    depth: int = 12
    lines: bool = False

    def says(self) -> str:
        return f"at most {self.most:,} plain values, nested at most {self.depth} deep"

    def fits(self, value: Any) -> bool:
        # a traversal without recursion, in a bounded number of steps
        remaining, todo = self.most, [(value, self.depth)]
        while todo:
            one, depth = todo.pop()
            remaining -= 1
            if remaining < 0 or depth < 0:
                return False
            if type(one) is dict:
                if not all(Text().fits(name) for name in one):
                    return False
                todo += [(part, depth - 1) for part in one.values()]
            elif type(one) in (list, tuple):
                todo += [(part, depth - 1) for part in one]
            elif not (one is None or type(one) in (bool, int, float) or Text(10_000, lines=self.lines).fits(one)):
                return False
        return True


@dataclass(frozen=True)
class Nothing:
    """null: for what users may set themselves but a file may not."""

    def says(self) -> str:
        return "nothing"

    def fits(self, value: Any) -> bool:
        return value is None


NOTHING = Nothing()


def maybe(kind: Kind) -> AnyOf:
    """This kind, or null."""
    return AnyOf((kind, NOTHING))


@dataclass(frozen=True)
class Record:
    """The keys of a mapping.

    Args:
        needed: required keys.
        also: optional keys.
        code: exit status if something does not fit: 65 for data, 77 for instructions to build something.
    """

    needed: Mapping[str, Kind] = field(default_factory=dict)
    also: Mapping[str, Kind] = field(default_factory=dict)
    code: ExitCode = ExitCode.BAD_DATA

    def read(self, value: Any, where: str, todo: str = "Get the file again from somebody you trust") -> dict[str, Any]:
        """Check a mapping and return it.

        Raises:
            UserError: it is not a mapping, a key is missing or unknown, or a value is of another kind; names the key.
        """
        if type(value) is not dict:
            raise UserError(where, f"expected a mapping, found {describe_value(value)}", todo, self.code)
        for name, part in value.items():
            kind = self.needed.get(name) or self.also.get(name)
            if kind is None:
                known = ", ".join([*self.needed, *self.also][:12])
                what = f"the key {describe_value(name)} is not known here (known: {known})"
                raise UserError(where, what, todo, self.code)
            if not kind.fits(part):
                what = f"expected {kind.says()}, found {describe_value(part)}"
                raise UserError(f"{where}: {name}", what, todo, self.code)
        missing = [name for name in self.needed if name not in value]
        if missing:
            raise UserError(where, f"the key {missing[0]} is missing", todo, self.code)
        return value


def describe_value(value: Any) -> str:
    """An untrusted value for a message: short, on one line and without control characters, however large it is."""
    if isinstance(value, str):
        # cut first, as `repr` would process a large value whole
        text = repr(value[:MOST_VALUE])
    elif value is None or isinstance(value, bool | float):
        text = repr(value)
    elif isinstance(value, int):
        # Python refuses to print numbers of thousands of digits
        text = repr(value) if abs(value) < 10**40 else f"a number of {value.bit_length():,} bits"
    else:
        size = f" of {len(value):,}" if isinstance(value, dict | list | tuple) else ""
        return f"a {type(value).__name__}{size}"
    return text if len(text) <= MOST_VALUE + 10 else text[:MOST_VALUE] + "..."
