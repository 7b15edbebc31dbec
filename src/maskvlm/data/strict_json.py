"""JSON of strangers: what two readers could understand in two ways is no value, but a `BadJson` in its place.

So a row of a long list can be left out and counted, and the others stay.
"""

import json
from collections import Counter
from typing import Any

DEPTH = 64
"""Lists and objects within each other. Deeper ones are data of no set that is read here, and would overflow the stack
of whatever walks them."""


class BadJson(ValueError):
    """What stands where an object has a key twice, or a number is NaN or infinite; its text says so."""


def parse_json(text: str) -> Any:
    """The document in a text.

    Raises:
        ValueError: it is no JSON (`json.JSONDecodeError`), or a number has thousands of digits.
        RecursionError: nested deeper than DEPTH.
    """
    # by itself the decoder raises RecursionError only much deeper
    return checked(_DECODER.decode(text))


def parse_first(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at a position, and where it ends. Raises as `parse_json`."""
    value, end = _DECODER.raw_decode(text, position)
    return checked(value), end


def checked(value: Any) -> Any:
    """The value. Raises RecursionError where it is nested deeper than DEPTH."""
    # level by level, without recursion
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for outer in level
            if type(outer) is list or type(outer) is dict
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is list or type(inner) is dict
        ]
        if not level:
            return value
    raise RecursionError("nested too deeply")


def flaw(record: Any) -> str | None:
    """What is wrong with a row, or with one of its values, as far as `BadJson` tells."""
    values = record.values() if isinstance(record, dict) else [record]
    return next((str(value) for value in values if isinstance(value, BadJson)), None)


def json_kind(value: Any) -> str:
    """What a value is, for messages about another that belongs there."""
    return str(value) if isinstance(value, BadJson) else type(value).__name__


def each_key_once(pairs: list[tuple[str, Any]]) -> Any:
    """The object of these keys and values."""
    record = dict(pairs)
    # the same length: no key came twice
    if len(record) == len(pairs):
        return record
    twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return BadJson(f"key {twice[:80]!r} appears twice")


def no_number(name: str) -> Any:
    """What stands in the place of NaN and Infinity."""
    return BadJson(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=each_key_once, parse_constant=no_number)
