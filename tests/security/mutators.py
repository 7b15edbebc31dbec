"""What an enemy, or a bad disk, does to files: pure functions of bytes and a `random.Random`.

    mutate("pairs.csv", content, random.Random(7))    # another content, the same for the same seed

`mutate` chooses by the name's extension among the functions below: `images`, `json_text`, `csv_text`, `tar`,
`columns` (Parquet and Arrow), and `any_bytes` for all else. Each of them changes structure or bytes, sometimes both.
"""

import gzip
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

ODD_TEXTS = ("", " ", "\x00", "../../etc/passwd", "/etc/passwd", "\ud800", "\x1b[2J", "a" * 5000, "[MASK]", "٣", "\r")
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 0, 2**63, 10**400, 1e308, [], {}, [[]], "x", *ODD_TEXTS)
ODD_JSON = ("NaN", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '{"a":1,"a":2}', "tru", "'a'")


def any_bytes(data: bytes, random: Random) -> bytes:
    """A few bytes changed, cut, doubled, taken away or put in."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        start = random.randrange(len(content) + 1)
        end = min(len(content), start + random.choice((1, 2, 8, 100, 512)))
        match random.randrange(6):
            case 0:
                content[start : start + 1] = bytes([random.randrange(256)])
            case 1:
                del content[start:]
            case 2:
                del content[start:end]
            case 3:
                content[start:start] = random.randbytes(random.choice((1, 3, 512)))
            case 4:
                content[start:end] = bytes(end - start)
            case 5:
                content[start:start] = content[start:end] * random.choice((1, 2, 20))
    return bytes(content)


def images(data: bytes, random: Random) -> bytes:
    """A damaged image, or another file under its name."""
    others = (b"", b"<html>404</html>", b"%PDF-1.4", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(2000))
    match random.randrange(4):
        case 0:
            return random.choice(others)
        case 1:  # sizes stand near the beginning
            content = bytearray(data)
            for _ in range(4 * bool(content)):
                content[random.randrange(min(len(content), 64))] = random.randrange(256)
            return bytes(content)
        case 2:
            return data[: random.randrange(len(data) + 1)]
    return any_bytes(data, random)


def edited(value: Any, random: Random, odd: Sequence[Any] = ODD_VALUES, names: Sequence[Any] = ODD_TEXTS) -> Any:
    """A document with one thing changed anywhere in it: an odd value, an odd name, a part gone, doubled or moved."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice([*value])
        match random.randrange(7):
            case 0:
                return {name: part for name, part in value.items() if name != key}
            case 1:
                return {random.choice(names) if name == key else name: part for name, part in value.items()}
            case 2:
                return {**value, random.choice(names): random.choice(odd)}
            case 3:
                return {**value, key: random.choice([*value.values()])}
        return {**value, key: edited(value[key], random, odd, names)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place = random.randrange(len(value))
        match random.randrange(4):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, value[place]]
        return [*value[:place], edited(value[place], random, odd, names), *value[place + 1 :]]
    return random.choice(odd)


def json_text(data: bytes, random: Random) -> bytes:
    """A document, or lines of them, with one thing changed, or broken as a text."""
    match random.randrange(6):
        case 0:
            return any_bytes(data, random)
        case 1:  # what is no JSON, or JSON in two ways, in the place of a value
            spots = [number for number, byte in enumerate(data) if byte in b":,["] or [0]
            spot = random.choice(spots) + 1
            return data[:spot] + random.choice(ODD_JSON).encode() + b"," + data[spot:]
    try:
        return json.dumps(edited(json.loads(data), random)).encode()
    except (ValueError, RecursionError):
        lines = data.split(b"\n")
        place = random.randrange(len(lines))
        try:
            lines[place] = json.dumps(edited(json.loads(lines[place]), random)).encode()
        except (ValueError, RecursionError):
            lines[place] = any_bytes(lines[place], random)
        return b"\n".join(lines)


def csv_text(data: bytes, random: Random) -> bytes:
    """A table with quotes, separators, lines and columns that do not fit."""
    kind = random.randrange(6)
    if kind < 2:
        return any_bytes(data, random) if kind else data.replace(b"\n", b"\r") + b"\xe9\xff"
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    spot = random.randrange(len(lines[place]) + 1)
    sign = random.choice((b'"', b'""', b",", b"\t", b";", b"\r", b"\x00", b"\xff", b"../", b"'", b"\n", b"x" * 300_000))
    lines[place] = lines[place][:spot] + sign + lines[place][spot:]
    if kind == 2:
        lines.insert(0, lines[place])
    elif kind == 3:
        random.shuffle(lines)
    return b"\n".join(lines)


def tar(data: bytes, random: Random) -> bytes:
    """An archive joined with another, shifted, cut, packed, or with a link, a device, or a hostile name or size."""
    place = random.randrange(len(data) // 512 + 1) * 512
    match random.randrange(6):
        case 0:
            return data + random.choice((data, random.randbytes(700), bytes(5000) + b"end"))
        case 1:
            return data[:place] + random.choice((random.randbytes(99), bytes(512), bytes(1024))) + data[place:]
        case 2:
            return random.choice((data[:place], gzip.compress(data), gzip.compress(data)[:-9]))
        case 3 | 4:
            info = tarfile.TarInfo(random.choice((*ODD_TEXTS[3:5], "000.jpg", "evil.pkl", "..", "a" * 5000)))
            info.type = random.choice((*b"0123456789gxLKSV",)).to_bytes(1, "big")
            info.size = random.choice((0, 10, 511, 10**6, 8**11 - 1))
            info.linkname = random.choice(("/etc/passwd", "../../x", info.name))
            info.pax_headers = random.choice(({}, {"size": "-5"}, {"path": "../x"}, {"mtime": "nan"}))
            return info.tobuf(random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)), "utf-8", "replace") + data
    return any_bytes(data, random)


def columns(data: bytes, random: Random) -> bytes:
    """A Parquet or Arrow file with numbers changed where its structure stands: at its beginning and end."""
    if random.randrange(4) == 0 or len(data) < 16:
        return any_bytes(data, random)
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        place = random.randrange(min(len(content) - 8, random.choice((64, 1500, 4000, len(content) - 8))))
        if random.randrange(2):
            place = len(content) - 8 - place
        number = random.choice((0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, random.randrange(2**16)))
        size, kind = random.choice(((1, "<B"), (4, "<I"), (8, "<Q")))
        content[place : place + size] = struct.pack(kind, number % 256**size)
    return bytes(content)


BY_SUFFIX: dict[str, Mutator] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp"), images),
    **dict.fromkeys(("json", "jsonl", "ndjson"), json_text),
    **dict.fromkeys(("csv", "tsv", "txt", "token"), csv_text),
    **dict.fromkeys(("parquet", "arrow"), columns),
    "tar": tar,
}


def mutate(name: str, data: bytes, random: Random) -> bytes:
    """The content of a file of that name, changed."""
    if not data:  # of an edit before
        return random.randbytes(random.choice((0, 1, 50)))
    return BY_SUFFIX.get(name.rpartition(".")[2].lower(), any_bytes)(data, random)
