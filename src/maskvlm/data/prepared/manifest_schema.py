"""The closed schema of `manifest.json`, which may come with its set from an untrusted source.

Keys not listed here are not read. File names are plain names inside the set's folder; displayed texts are one printable
line; numbers have bounds, so that an untrusted file cannot cause huge allocations.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.files import load_json
from maskvlm.data.strict_json import json_kind
from maskvlm.utils.errors import ExitCode, UserError

FORMAT = 1
"""Version of the prepared form. Raise it when an older reader would misread a new set."""

MOST_BYTES = 200_000_000
"""Largest size of a manifest: a shard takes 200 bytes, so this is a billion images."""

MOST = 2**53  # of any count
PLAIN = r"(?!\.)[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,200}"
"""Name of a file or folder: not hidden, no `..`, no path to another folder, no control characters."""


class Wrong(Exception):
    """The place in the document, and what is wrong there."""


Kind = Callable[[Any, str], Any]


def count(value: Any, where: str) -> int:
    """A count."""
    # `type`: true is an int for isinstance
    if type(value) is not int or not 0 <= value <= MOST:
        raise Wrong(f"{where} is {_describe(value)} instead of a number from 0 to 2^53")
    return value


def line(value: Any, where: str) -> str:
    """A text for display: control characters are dropped."""
    return clean_caption(exact(value, where))[0]


def exact(value: Any, where: str) -> str:
    """A text for comparison."""
    if type(value) is not str or len(value) > 10_000:
        raise Wrong(f"{where} is {_describe(value)} instead of a text of at most 10,000 characters")
    return value


def fitting(pattern: str, what: str) -> Kind:
    """A text that matches a pattern."""

    def kind(value: Any, where: str) -> str:
        if type(value) is not str or not re.fullmatch(pattern, value):
            raise Wrong(f"{where} is {_describe(value)} instead of {what}")
        return value

    return kind


def several(of: Kind, most: int) -> Kind:
    """A list."""

    def kind(value: Any, where: str) -> list[Any]:
        if type(value) is not list or len(value) > most:
            raise Wrong(f"{where} is {_describe(value)} instead of a list of at most {most:,}")
        return [of(each, f"{where}[{number}]") for number, each in enumerate(value)]

    return kind


def each(of: Kind, most: int = 10_000, name: Kind = line) -> Kind:
    """An object with any keys."""

    def kind(value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict or len(value) > most:
            raise Wrong(f"{where} is {_describe(value)} instead of an object of at most {most:,} keys")
        return {name(key, f"a key of {where}"): of(inner, f"{where}.{key[:80]}") for key, inner in value.items()}

    return kind


def keys_of(needed: dict[str, Kind], optional: dict[str, tuple[Kind, Any]]) -> Kind:
    """An object with these keys; optional keys have a default."""

    def kind(value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise Wrong(f"{where} is {_describe(value)} instead of an object")
        # top-level keys are named without the document
        inner = {name: f"{where}.{name}" if where != DOCUMENT else name for name in (*needed, *optional)}
        if absent := [name for name in needed if name not in value]:
            raise Wrong(f"key '{inner[absent[0]]}' is missing")
        # a new object, without keys that are not listed here
        fields = {name: of(value[name], inner[name]) for name, of in needed.items()}
        for name, (of, default) in optional.items():
            fields[name] = of(value[name], inner[name]) if value.get(name) is not None else default
        return fields

    return kind


def fact(value: Any, where: str) -> Any:
    """A plain value that is not displayed."""
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) <= MOST):
        return value
    return exact(value, where)


def facts(value: Any, where: str) -> dict[str, Any]:
    """Plain values by name, or objects of such values."""
    inner = each(lambda value, where: each(fact)(value, where) if type(value) is dict else fact(value, where))
    values: dict[str, Any] = inner(value, where)
    return values


def _describe(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float | None) else json_kind(value)


DOCUMENT = "the document"
SHA256 = fitting(r"[0-9a-f]{64}", "a sha256")
SHARD = keys_of(
    {
        "file": fitting(f"{PLAIN}/{PLAIN}", "a file in a folder of the set"),
        "rows": count,
        "bytes": count,
        "sha256": SHA256,
    },
    {},
)
SPLIT = keys_of(
    {"pictures": count, "sha256": SHA256, "shards": several(SHARD, 1_000_000)},
    {"captions": (count, 0), "kept": (count, 0), "bytes": (count, 0)},
)
REASONS = each(
    keys_of(
        {"count": count}, {"examples": (several(keys_of({}, {"origin": (line, ""), "message": (line, "")}), 100), [])}
    )
)
SETTINGS = keys_of(
    {},
    {
        **dict.fromkeys(("set", "raw", "name"), (exact, None)),
        "images": (exact, ""),
        **dict.fromkeys(("rows", "side", "quality"), (count, None)),
        "columns": (each(exact, name=exact), None),
    },
)
NAME = fitting(PLAIN, "a name of a file")
MANIFEST_KIND = keys_of(
    {"format": count, "splits": each(SPLIT, 100, NAME)},
    {
        **dict.fromkeys(("name", "title", "licence", "coverage"), (line, "unknown")),
        **dict.fromkeys(("pictures", "captions"), (count, 0)),
        **dict.fromkeys(("published", "phash", "look", "versions", "made"), (facts, {})),
        **dict.fromkeys(("left_out", "mended"), (REASONS, {})),
        "notes": (several(line, 10_000), []),
        "settings": (SETTINGS, {}),
        "files": (each(SHA256, 10_000, NAME), {}),
    },
)


def checked_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """The content of a manifest, restricted to known keys.

    Args:
        content: content of the file; at most MOST_BYTES.
        path: path of the file, for errors.

    Raises:
        UserError: it is damaged, of another kind, or of another version (65).
    """
    document = load_json(content, path)
    format_number = document.get("format") if isinstance(document, dict) else None
    # before the schema, as a newer format may have other keys but should be reported as such
    if type(format_number) is int and format_number != FORMAT:
        what = f"is of format {str(format_number)[:20]}, not of {FORMAT}"
        raise UserError(path, what, "Read it with the version that made it", ExitCode.BAD_DATA)
    try:
        manifest: dict[str, Any] = MANIFEST_KIND(document, DOCUMENT)
    except Wrong as error:
        todo = "Fetch it again, or prepare the set again"
        raise UserError(path, clean_caption(str(error))[0], todo, ExitCode.BAD_DATA) from error
    return manifest
