"""Raw sets of which a fifth of the rows is broken, each in another way, and what is to be found in them.

`make_bad_raw(folder, kind)` writes one as csv, jsonl or webdataset tars and says which rows are to be left out under
which reason, which are to be mended, and which captions have to stay byte by byte.
"""

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from toy_images import SEEDS, SMOOTH, encode, make_png

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.raw import BadRow, RawRow, RawSet

KINDS = ("csv", "jsonl", "webdataset")
LONGEST = 100_000  # characters; what is longer is no caption
GOOD_CAPTIONS = (
    "كلب أسود يركض في الثلج",
    "一只黑狗在雪地里奔跑",
    "🐕 in the snow ❄ 🐾",
    "ein schöner Hund, der läuft",
    "犬が雪の中を走る。",
    'a dog, a "cat" and a bird',
    "собака бежит по снегу",
    "a black dog is running after a white dog in the snow .",
)
MENDED_CAPTIONS = {"a dog\u200b runs\x07": "caption control"}


class Expected(NamedTuple):
    """What reading the set has to find.

    Attributes:
        bad: reason -> origins of the rows that are left out, in the order of the files.
        mended: reason -> origins of the rows that stay with another caption.
        good: origin -> captions of all that stays (those of mended rows as they are in the file).
    """

    bad: dict[str, list[str]]
    mended: dict[str, list[str]]
    good: dict[str, tuple[str, ...]]


def make_bad_raw(folder: Path, kind: str, good: int = 4) -> Expected:
    """Write the set into the folder, which is then RAW; `good` whole rows to a broken one."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"csv": _csv, "jsonl": _jsonl, "webdataset": _tars}[kind](folder, good)


def contents_of(raw: RawSet) -> Expected:
    """What is in it: every image opened, every caption cleaned, as for training."""
    contents = Expected({}, {}, {})
    for row in raw.rows():
        reason, notes = _judge(row)
        if reason:
            contents.bad.setdefault(reason, []).append(row.origin)
            continue
        assert isinstance(row, RawRow)
        contents.good[row.origin] = row.captions
        for note in notes:
            contents.mended.setdefault(note, []).append(row.origin)
    return contents


def _judge(row: RawRow | BadRow) -> tuple[str, list[str]]:
    """The reason for leaving it out, "" for none, and those of what was mended."""
    if isinstance(row, BadRow):
        return row.reason, []
    notes = []
    for caption in row.captions:
        if len(caption) > LONGEST:
            return "caption too long", []
        text, note = clean_caption(caption)
        if not text:
            return "empty caption", []
        notes += [f"caption {note}"] if note else []
    try:
        safe_open(row.image, row.origin)
    except BadImage as bad:
        return bad.reason, []
    return "", notes


# ------------------------------------------------------------------ what is wrong


def bad_images() -> list[tuple[str, bytes]]:
    """(reason, bytes) of each kind of image that is refused."""
    png, jpeg = bytearray(SEEDS["png"]), SEEDS["jpeg"]
    png[png.index(b"IDAT") + 20] ^= 255
    return [
        ("empty", b""),
        ("empty", b"\x00" * 5000),
        ("not an image (text/html)", b"<!DOCTYPE html><html><body>410 Gone</body></html>"),
        ("not an image (application/pdf)", b"%PDF-1.4 a manual"),
        ("format not allowed (image/tiff)", encode(SMOOTH, "TIFF")),
        ("format not allowed (image/svg+xml)", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("truncated", jpeg[: len(jpeg) // 2]),
        ("crc", bytes(png)),
        ("corrupt", b"\xff\xd8\xff\xe0"),
        ("too large", make_png(60_000, 60_000, b"")),
        ("too large", b"\xff\xd8" + b"\xff\xda" * 600),
        ("too small", encode(SMOOTH.resize((4, 4)), "PNG")),
        ("too narrow", encode(Image.new("RGB", (8, 1700)), "PNG")),
    ]


BAD_CAPTIONS = [("empty caption", " "), ("empty caption", "\u200b\u200e"), ("caption too long", "dog " * 1_310_000)]


def _good_row(number: int) -> tuple[bytes, str, str]:
    """Image, its extension, caption."""
    seeds = {"jpeg": "jpg", "progressive": "jpg", "cmyk": "jpg", "png16": "png", "png-p": "png", "webp": "webp"}
    name = [*seeds][number % len(seeds)]
    return SEEDS[name], seeds[name], GOOD_CAPTIONS[number % len(GOOD_CAPTIONS)]


# ------------------------------------------------------------------ csv and jsonl


class _Lines:
    """Lines of a table with the images that they name."""

    def __init__(self, file: Path, good: int, write: Callable[[str, str], bytes], header: bytes = b"") -> None:
        self.file, self.good, self.write = file, good, write
        self.lines, self.number = [header] if header else [], 0
        self.expected = Expected({}, {}, {})
        (file.parent / "images").mkdir(exist_ok=True)

    def image(self, content: bytes, suffix: str = "jpg") -> str:
        self.number += 1
        name = f"{self.number:04d}.{suffix}"
        (self.file.parent / "images" / name).write_bytes(content)
        return name

    def origin(self) -> str:
        return f"{self.file.name}:{len(self.lines)}"

    def add_good(self, count: int) -> None:
        for _ in range(count):
            content, suffix, caption = _good_row(self.number)
            self.lines.append(self.write(self.image(content, suffix), caption))
            self.expected.good[self.origin()] = (caption,)

    def add_bad(self, reason: str, line: bytes) -> None:
        """Good rows before and after it: a broken one must not touch its neighbours."""
        self.add_good(self.good // 2)
        self.lines.append(line)
        self.expected.bad.setdefault(reason, []).append(self.origin())
        self.add_good(self.good - self.good // 2)

    def add_mended(self, reason: str, line: bytes, caption: str) -> None:
        self.lines.append(line)
        self.expected.mended.setdefault(reason, []).append(self.origin())
        self.expected.good[self.origin()] = (caption,)

    def finish(self) -> Expected:
        self.file.write_bytes(b"\n".join(self.lines) + b"\n")
        return self.expected


def _common(lines: _Lines) -> None:
    """Bad images and captions, names of images that are not there or not inside."""
    for reason, content in bad_images():
        lines.add_bad(reason, lines.write(lines.image(content), "a dog"))
    for reason, caption in BAD_CAPTIONS:
        lines.add_bad(reason, lines.write(lines.image(SEEDS["jpeg"]), caption))
    lines.add_bad("missing image", lines.write("nowhere.jpg", "a dog"))
    lines.add_bad("unsafe name", lines.write("../outside.jpg", "a dog"))
    (lines.file.parent.parent / "outside.jpg").write_bytes(SEEDS["jpeg"])
    lines.add_bad("no image", lines.write(" ", "a dog"))
    latin = lines.write(lines.image(SEEDS["jpeg"]), "un chien à la neige").replace("à".encode(), b"\xe0")
    lines.add_bad("not UTF-8 text", latin)
    half = lines.write(lines.image(SEEDS["jpeg"]), "a dog X").replace(b"X", b"\xed\xa0\x80")
    lines.add_bad("not UTF-8 text", half)
    lines.add_bad("null bytes", lines.write(lines.image(SEEDS["jpeg"]), "a dog").replace(b" ", b"\x00"))
    for caption, reason in MENDED_CAPTIONS.items():
        lines.add_mended(reason, lines.write(lines.image(SEEDS["jpeg"]), caption), caption)


def _csv(folder: Path, good: int) -> Expected:
    def write(name: str, caption: str) -> bytes:
        return f'{name},"{caption.replace(chr(34), 2 * chr(34))}",train'.encode("utf-8", "surrogatepass")

    lines = _Lines(folder / "pairs.csv", good, write, "\ufefffilename,caption,split".encode())
    _common(lines)
    name = lines.image(SEEDS["jpeg"])
    lines.add_bad("quote left open", f'{name},"a dog runs,train'.encode())
    lines.add_bad("quotes do not fit", f'{name},"a "big" dog",train'.encode())
    lines.add_bad("missing column", name.encode())
    lines.add_bad("too many columns", f"{name},a dog, running,train".encode())
    lines.add_bad("unknown split", f"{name},a dog,challenge".encode())
    return lines.finish()


def _jsonl(folder: Path, good: int) -> Expected:
    def write(name: str, caption: str) -> bytes:
        return json.dumps({"image": name, "captions": [caption]}, ensure_ascii=False).encode("utf-8", "surrogatepass")

    lines = _Lines(folder / "pairs.jsonl", good, write)
    _common(lines)
    name = lines.image(SEEDS["jpeg"])
    lines.add_bad("not JSON", write(name, "a dog runs")[:-9])
    lines.add_bad("not JSON", b'{"image": "' + b"[" * 100_000)
    lines.add_bad("not an object", b'["a.jpg", "a dog"]')
    lines.add_bad("no caption", json.dumps({"image": name}).encode())
    lines.add_bad("no caption", json.dumps({"image": name, "captions": [7]}).encode())
    lines.add_bad("unknown split", json.dumps({"image": name, "captions": ["a"], "split": "challenge"}).encode())
    half = json.dumps({"image": lines.image(SEEDS["png"], "png"), "captions": ["half \ud83d a pair"]})
    lines.add_mended("caption surrogate", half.encode(), "half \ud83d a pair")
    return lines.finish()


# ------------------------------------------------------------------ tars


class _Tars:
    """Shards in img2dataset's layout: key.jpg, key.json, key.txt, with counts in <shard>_stats.json."""

    def __init__(self, folder: Path, good: int) -> None:
        self.folder, self.good, self.number, self.shards = folder, good, 0, 0
        self.expected = Expected({}, {}, {})
        self.start()

    def start(self, suffix: str = ".tar") -> None:
        self.file = self.folder / f"{self.shards:05d}{suffix}"
        self.buffer, self.images = io.BytesIO(), 0
        mode = "w:gz" if suffix.endswith("gz") else "w"
        self.tar = tarfile.open(fileobj=self.buffer, mode=mode)  # noqa: SIM115  closed by `end`
        self.shards += 1

    def end(self, change: Callable[[bytes], bytes] = lambda data: data, images: int | None = None) -> None:
        self.tar.close()
        self.file.write_bytes(change(self.buffer.getvalue()))
        count = self.images if images is None else images
        stats = {"count": count + 2, "successes": count, "failed_to_download": 2, "failed_to_resize": 0}
        text = json.dumps({**stats, "duration": 1.0, "status_dict": {"success": count, "HTTP Error 404": 2}})
        (self.folder / f"{self.file.name.split('.')[0]}_stats.json").write_text(text)

    def member(self, name: str, content: bytes, **header: Any) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in header.items():
            setattr(info, key, value)
        self.tar.addfile(info, io.BytesIO(content) if info.isreg() else None)

    def sample(self, content: bytes | None, text: bytes | None, suffix: str = "jpg", meta: bytes | None = None) -> str:
        """Gives its origin."""
        key = f"{self.number:09d}"
        self.number += 1
        url = {"url": f"http://example.org/{key}.jpg", "key": key, "status": "success", "width": 64, "height": 48}
        if content is not None:
            self.images += 1
            self.member(f"{key}.{suffix}", content)
        self.member(f"{key}.json", json.dumps(url).encode() if meta is None else meta)
        if text is not None:
            self.member(f"{key}.txt", text)
        return f"{self.file.name}!{key}.{suffix if content is not None else 'json'}"

    def add_good(self, count: int) -> None:
        for _ in range(count):
            content, suffix, caption = _good_row(self.number)
            self.expected.good[self.sample(content, caption.encode(), suffix)] = (caption,)

    def bad(self, reason: str, origin: str) -> None:
        self.expected.bad.setdefault(reason, []).append(origin)
        self.add_good(self.good)


def _tars(folder: Path, good: int) -> Expected:
    tars, jpeg = _Tars(folder, good), SEEDS["jpeg"]
    for reason, content in bad_images():
        tars.bad(reason, tars.sample(content, b"a dog"))
    for reason, caption in BAD_CAPTIONS:
        tars.bad(reason, tars.sample(jpeg, caption.encode()))
    tars.end()
    tars.start()
    for caption, reason in MENDED_CAPTIONS.items():
        origin = tars.sample(jpeg, caption.encode())
        tars.expected.mended.setdefault(reason, []).append(origin)
        tars.expected.good[origin] = (caption,)
    tars.bad("no image", tars.sample(None, b"a dog"))
    tars.bad("no caption", tars.sample(jpeg, None))
    tars.bad("not JSON", tars.sample(jpeg, b"a dog", meta=b'{"url": '))
    tars.bad("null bytes", tars.sample(jpeg, b"a\x00dog"))
    tars.bad("not UTF-8 text", tars.sample(jpeg, "à la neige".encode("latin-1")))
    tars.bad("not UTF-8 text", tars.sample(jpeg, b"half \xed\xa0\x80 a pair"))
    for name in ("../outside", "/etc/outside"):
        tars.member(f"{name}.jpg", jpeg)
        tars.member(f"{name}.txt", b"a dog")
        tars.images += 1
        tars.bad("unsafe member name", f"{tars.file.name}!{name}.jpg")
    tars.member("link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    tars.bad("not a plain file", f"{tars.file.name}!link.jpg")
    tars.member("device.jpg", b"", type=tarfile.CHRTYPE)
    tars.bad("not a plain file", f"{tars.file.name}!device.jpg")
    first = tars.sample(jpeg, b"a dog")
    tars.expected.good[first] = ("a dog",)
    tars.add_good(1)
    key = first.rpartition("!")[2].removesuffix(".jpg")
    tars.member(f"{key}.jpg", jpeg)
    tars.member(f"{key}.txt", b"another dog")
    tars.images += 1
    tars.bad("duplicate key", f"{tars.file.name}!{key}.jpg")
    tars.end(images=tars.images + 2)  # the link and the device
    _bomb(tars)
    _cut(tars)
    _damaged(tars)
    return tars.expected


def _bomb(tars: _Tars) -> None:
    """A member of 10 GB by its header, in a packed shard."""
    tars.start(".tar.gz")
    tars.bad("too small", tars.sample(bad_images()[-2][1], b"a dog"))
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 10_000_000_000
    tars.tar.fileobj.write(info.tobuf() + bytes(100_000))  # type: ignore[union-attr]
    tars.expected.bad.setdefault("too large", []).append(f"{tars.file.name}!bomb.jpg")
    tars.end(images=tars.images + 1)


def _cut(tars: _Tars) -> None:
    tars.start()
    tars.bad("no caption", tars.sample(SEEDS["png"], None, "png"))
    tars.sample(SEEDS["png"], b"lost", "png")
    tars.tar.fileobj.flush()  # type: ignore[union-attr]
    end = len(tars.buffer.getvalue()) - 4 * 512 - 700  # within the last image
    tars.end(lambda data: data[:end])
    tars.expected.bad.setdefault("truncated archive", []).append(tars.file.name)


def _damaged(tars: _Tars) -> None:
    tars.start()
    tars.bad("no image", tars.sample(None, b"a dog"))
    place = len(tars.buffer.getvalue())
    tars.sample(SEEDS["jpeg"], b"lost")
    garbage = struct.pack(">I", 0xDEADBEEF) * 128
    tars.end(lambda data: data[:place] + garbage + data[place + 512 :])
    tars.expected.bad.setdefault("damaged archive", []).append(tars.file.name)
