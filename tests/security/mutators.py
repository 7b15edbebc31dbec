"""What an enemy, or a bad disk, does to files: pure functions of bytes and a `random.Random`.

    mutate("pairs.csv", content, random.Random(7))    # another content, the same for the same seed

`mutate` chooses by the name's extension among the functions below: `images`, `json_text`, `csv_text`, `tar`,
`columns` (Parquet and Arrow), and `any_bytes` for all else. Each of them changes structure or bytes, sometimes both.
"""

import bz2
import gzip
import json
import lzma
import struct
import tarfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

ODD_TEXTS = ("", " ", "\x00", "../../etc/passwd", "/etc/passwd", "\ud800", "\x1b[2J", "a" * 5000, "[MASK]", "٣", "\r")
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 0, 2**63, 10**400, 1e308, [], {}, [[]], "x", *ODD_TEXTS)
ODD_JSON = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 3000,
    '{"a":' * 3000,
    '{"a":1,"a":2}',
    "tru",
    "'a'",
)


# ------------------------------------------------------------------ bytes


def any_bytes(data: bytes, random: Random) -> bytes:
    """A few bytes changed, cut, doubled, moved, taken away or put in."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        start = random.randrange(len(content) + 1)
        end = min(len(content), start + random.choice((1, 2, 8, 100, 512)))
        match random.randrange(7):
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
            case 6:
                if start < len(content):
                    content[start] ^= 1 << random.randrange(8)
    return bytes(content)


def text_bytes(data: bytes, random: Random) -> bytes:
    """Another encoding or other line ends."""
    text = data.decode("utf-8", "replace")
    match random.randrange(7):
        case 0:
            return b"\xef\xbb\xbf" + data
        case 1:
            return text.encode("utf-16")
        case 2:
            return text.encode("latin-1", "replace") + b"\xe9\xff"
        case 3:
            return data.replace(b"\n", b"\r")
        case 4:
            return data.replace(b"\n", b"\r\n")
        case 5:
            half = len(data) // 2
            return data[:half].replace(b"\n", b"\r") + data[half:]
    return data.replace(b" ", b"\x00", 1)


# ------------------------------------------------------------------ images


def images(data: bytes, random: Random) -> bytes:
    """A damaged image, or another file under its name."""
    others = (b"", b"<html>404</html>", b"%PDF-1.4", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(2000))
    match random.randrange(4):
        case 0:
            return random.choice(others)
        case 1:  # sizes stand near the beginning
            content = bytearray(data)
            for _ in range(4):
                if content:
                    content[random.randrange(min(len(content), 64))] = random.randrange(256)
            return bytes(content)
        case 2:
            return data[: random.randrange(len(data) + 1)]
    return any_bytes(data, random)


# ------------------------------------------------------------------ texts


def json_text(data: bytes, random: Random) -> bytes:
    """A document, or lines of them, with values exchanged, keys renamed, doubled or gone, or broken as a text."""
    kind = random.randrange(10)
    if kind < 2:
        return any_bytes(data, random)
    if kind < 3:
        return text_bytes(data, random)
    if kind < 5:
        return _odd_text(data, random)
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


def _odd_text(data: bytes, random: Random) -> bytes:
    """Put what is no JSON, or JSON in two ways, in the place of a value."""
    places = [number for number, byte in enumerate(data) if byte in b":,["]
    if not places:
        return data
    place, odd = random.choice(places) + 1, random.choice(ODD_JSON).encode()
    if random.randrange(2):
        return data[:place] + odd + b"," + data[place:]
    end = min([position for sign in b",}]" if (position := data.find(bytes([sign]), place)) >= 0] or [len(data)])
    return data[:place] + odd + data[end:]


def edited(value: Any, random: Random, depth: int = 0) -> Any:
    """A document with one thing changed anywhere in it."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice([*value])
        match random.randrange(6):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                return {random.choice(ODD_TEXTS) if name == key else name: inner for name, inner in value.items()}
            case 2:
                return {**value, key: random.choice([*value.values()])}
        return {**value, key: edited(value[key], random, depth + 1)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place = random.randrange(len(value))
        match random.randrange(5):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, value[place]]
        return [*value[:place], edited(value[place], random, depth + 1), *value[place + 1 :]]
    if random.randrange(20) == 0:
        for _ in range(200):
            value = [value]
        return value
    return random.choice(ODD_VALUES)


def csv_text(data: bytes, random: Random) -> bytes:
    """A table with quotes, separators, lines and columns that do not fit."""
    kind = random.randrange(6)
    if kind == 0:
        return any_bytes(data, random)
    if kind == 1:
        return text_bytes(data, random)
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    line = bytearray(lines[place])
    spot = random.randrange(len(line) + 1)
    signs = (b'"', b'""', b",", b"\t", b";", b"\r", b"\x00", b"\xff", b"\\", b"../", b"'", b"#", b"\n", b"x" * 300_000)
    line[spot:spot] = random.choice(signs)
    lines[place] = bytes(line)
    match random.randrange(4):
        case 0:
            lines.insert(random.randrange(len(lines)), lines[place])
        case 1:
            del lines[random.randrange(len(lines))]
        case 2:
            random.shuffle(lines)
    return b"\n".join(lines)


# ------------------------------------------------------------------ archives


def tar(data: bytes, random: Random) -> bytes:
    """An archive joined with another, shifted, cut, packed, with odd members or odd headers."""
    place = random.randrange(len(data) // 512 + 1) * 512
    match random.randrange(10):
        case 0:
            return data + data
        case 1:
            return data + random.choice((random.randbytes(700), b"x", bytes(5000) + b"end", bytes(100_000)))
        case 2:
            return data[:place] + random.randbytes(random.randrange(1, 511)) + data[place:]
        case 3:
            return data[:place] + bytes(512 * random.choice((1, 2, 3))) + data[place:]
        case 4:
            return data[:place]
        case 5:
            pack = random.choice((gzip.compress, bz2.compress, lzma.compress))
            return random.choice((pack(data), pack(data) + pack(data), pack(data) + b"junk", pack(data)[:-9]))
        case 6:
            return odd_member(random) + data
        case 7:
            return odd_header(data, random)
        case 8:
            inner = bytearray(data)
            length = random.randrange(1, 2000)
            inner[place : place + length] = images(bytes(inner[place : place + length]) or b"x", random)
            return bytes(inner)
    return any_bytes(data, random)


def odd_member(random: Random) -> bytes:
    """A member (without an end marker) that is a link, a device, has a hostile name or claims a hostile size."""
    info = tarfile.TarInfo(random.choice((*ODD_TEXTS[1:], "000.jpg", "evil.pkl", "..", ".")).replace("\x00", "0"))
    info.type = random.choice((*b"0123456789gxLKSV",)).to_bytes(1, "big")
    info.size = random.choice((0, 10, 511, 10**6, 8**11 - 1))
    info.linkname = random.choice(("/etc/passwd", "../../x", info.name))
    info.pax_headers = random.choice(({}, {"size": "-5"}, {"path": "../x"}, {"mtime": "nan"}))
    form = random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    try:
        return info.tobuf(form, "utf-8", "replace")
    except UnicodeError:  # half a character in a PAX header
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "replace")


def odd_header(data: bytes, random: Random) -> bytes:
    """A field of a member's header changed, with or without the right checksum."""
    start = random.choice(
        [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"] or [0]
    )
    header = bytearray(data[start : start + 512])
    field, length = random.choice(((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    header[field : field + length] = random.choice((bytes(length), random.randbytes(length), b"7" * length))
    if random.randrange(3):
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


# ------------------------------------------------------------------ columns


def columns(data: bytes, random: Random) -> bytes:
    """A Parquet or Arrow file with numbers changed where its structure stands: at its beginning and end."""
    if random.randrange(4) == 0 or len(data) < 16:
        return any_bytes(data, random)
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        near = min(len(content) - 8, random.choice((64, 1500, 4000, len(content) - 8)))
        place = random.randrange(near)
        if random.randrange(2):
            place = len(content) - 8 - place
        number = random.choice((0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, random.randrange(2**16)))
        size, kind = random.choice(((1, "<B"), (4, "<I"), (8, "<Q")))
        content[place : place + size] = struct.pack(kind, number % 256**size)
    return bytes(content)


# ------------------------------------------------------------------ by name


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
