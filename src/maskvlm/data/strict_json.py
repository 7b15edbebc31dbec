"""Untrusted JSON: anything that readers may interpret differently is replaced by a `BadJson`.

This way one row of a long list can be left out and counted, and the others are kept.
"""

import json
from collections import Counter
from typing import Any

DEPTH = 64
"""Maximum nesting of lists and objects. No set read here has deeper ones, which would overflow the stack of any code
that traverses them."""


class BadJson(ValueError):
    """Replaces an object with a repeated key, or a NaN or infinite number; its text says which."""


def parse_json(text: str) -> Any:
    """The JSON document in a text.

    Raises:
        ValueError: it is not JSON (`json.JSONDecodeError`), or a number has thousands of digits.
        RecursionError: nested deeper than DEPTH.
    """
    # on its own the decoder raises RecursionError only at a much greater depth
    return checked(_DECODER.decode(text))


def parse_first(text: str, position: int) -> tuple[Any, int]:
    """The value that starts at a position, and its end. Raises like `parse_json`."""
    value, end = _DECODER.raw_decode(text, position)
    return checked(value), end


def checked(value: Any) -> Any:
    """Return the value. Raises RecursionError if it is nested deeper than DEPTH."""
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
    """What is wrong with a row or one of its values according to `BadJson`, or None."""
    values = record.values() if isinstance(record, dict) else [record]
    return next((str(value) for value in values if isinstance(value, BadJson)), None)


def json_kind(value: Any) -> str:
    """Description of a value, for messages about what was expected instead."""
    return str(value) if isinstance(value, BadJson) else type(value).__name__


def each_key_once(pairs: list[tuple[str, Any]]) -> Any:
    """The object of these keys and values, or a BadJson if a key is repeated."""
    record = dict(pairs)
    # the same length: no key is repeated
    if len(record) == len(pairs):
        return record
    twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return BadJson(f"key {twice[:80]!r} appears twice")


def no_number(name: str) -> Any:
    """The BadJson that replaces NaN and Infinity."""
    return BadJson(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=each_key_once, parse_constant=no_number)
