"""Every image that cannot be used is refused in one line with a reason, in no time and without memory."""

import os
import random
import struct
import time
import tracemalloc
import warnings
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from toy_images import NOISE, SEEDS, SMOOTH, encode, make_png, reason

from maskvlm.data.images import FORMATS, MAX_PIXELS, MAX_SCANS, BadImage, safe_open
from maskvlm.utils.errors import ExitCode


@pytest.mark.parametrize("kind", sorted(SEEDS))
def test_an_image_cut_short_is_refused(kind: str) -> None:
    whole = SEEDS[kind]
    for share in (0.0, 0.1, 0.5):
        assert reason(whole[: int(share * len(whole))]) in ({"truncated", "corrupt"} if share else {"empty"})
    if kind != "gif-animation":  # its first frame is whole
        assert reason(whole[:-10]) == "truncated"


def test_half_an_image_is_refused_even_if_pillow_was_told_to_accept_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encode(Image.fromarray(NOISE), "JPEG")
    data = whole[: len(whole) // 2]
    assert np.asarray(Image.open(BytesIO(data))).shape == (48, 64, 3)
    assert reason(data) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_damaged_png_is_found() -> None:
    """Every flipped bit of its pixels, and a text in it that is a bomb."""
    data = encode(Image.fromarray(NOISE[:12, :12]), "PNG", compress_level=0)
    start = data.index(b"IDAT") + 4
    for position in range(start, len(data) - 12, 9):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        assert reason(bytes(flipped)) == "crc"
    info = PngInfo()
    info.add_text("Comment", "x" * 50_000_000, zip=True)
    assert reason(encode(SMOOTH, "PNG", pnginfo=info)) == "corrupt"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.new("RGB", (7, 100)), "PNG"), "too small"),
        (encode(Image.new("RGB", (8, 1601)), "PNG"), "too narrow"),
        (encode(SMOOTH, "PPM"), "not an image (unknown)"),
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404 not found</body></html>", "not an image (text/html)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image (application/postscript)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format not allowed (image/svg+xml)"),
        (b"\x00\x00\x00 ftypavif", "format not allowed (image/heif)"),
        (b"\xff\xd8\xff\xe0", "corrupt"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """One that says how large its screen and its frame are."""
    header = b"GIF89a" + struct.pack("<HHBBB", *screen, 0xF0, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"
    return header + image


def webp(side: int) -> bytes:
    """An animation that says how large it is."""
    data = bytearray(SEEDS["webp-animation"])
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def endless(data: bytes) -> bytes:
    """A progressive JPEG of too many scans."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * MAX_SCANS + data[-2:]


BOMBS = {
    "pixels": make_png(10_000, 10_000, bytes(1251 * 10_000), depth=1),  # true ones
    # in the range where Pillow is silent, warns, refuses
    **{str(side): make_png(side, side, b"") for side in (7072, 9000, 13_000, 2**30)},
    "screen": gif((60_000, 60_000), (9, 9)),
    "frame": gif((9, 9), (9000, 9000)),
    "webp": webp(7100),
    "scans": endless(SEEDS["progressive"]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header_at_once_and_without_memory(name: str) -> None:
    assert reason(BOMBS[name]) in ("too large", "corrupt" if name == "webp" else "too large")  # warm up
    tracemalloc.start()
    try:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reason(BOMBS[name])
        assert time.perf_counter() - start < 0.1
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_an_image_just_under_the_cap_is_decoded() -> None:
    assert 7071**2 <= MAX_PIXELS < 7072**2
    assert reason(make_png(7071, 7071, b"")) == "truncated"
    assert safe_open(encode(Image.new("RGB", (1600, 8)), "PNG"), "x").size == (1600, 8)


# ------------------------------------------------------------------ files and messages


def test_what_is_no_file_that_can_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "giant.png", "wb") as file:
        file.truncate(3_000_000_000)
    assert reason(tmp_path) == "a folder"
    assert reason(tmp_path / "giant.png") == "too large"  # without being read
    for path in (tmp_path / "no.jpg", tmp_path / "pipe", tmp_path / "giant.png" / "x.jpg", "a\x00b", "/dev/zero"):
        with pytest.raises(BadImage, match=r"row 3: .*missing") as caught:
            safe_open(path, "row 3")
        assert caught.value.code == ExitCode.MISSING_INPUT
    (tmp_path / "a.png").write_bytes(SEEDS["png"])
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(BadImage, match=r"unreadable .*Permission denied") as caught:
        safe_open(tmp_path / "a.png", "x")
    assert caught.value.code == ExitCode.IO_ERROR


# ------------------------------------------------------------------ fuzz


def _mutate(data: bytes, rng: random.Random) -> bytes:
    mutant = bytearray(data)
    place = rng.randrange(len(mutant))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randrange(1, 8)):
                mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        case 1:
            del mutant[place:]
        case 2:
            del mutant[place : place + rng.randrange(30)]
        case 3:
            mutant[place:place] = rng.randbytes(rng.randrange(30))
        case _:
            start = rng.randrange(60)
            mutant[start : start + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff"])
    return bytes(mutant)


def _open_or_none(data: bytes) -> Image.Image | None:
    try:
        return safe_open(data, "x")
    except BadImage:
        return None


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_raise_nothing_but_bad_image(count: int) -> None:
    rng = random.Random(0)
    refused = 0
    for head in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"BM"):
        assert _open_or_none(head + rng.randbytes(rng.randrange(300))) is None
    for _ in range(count):
        data = _mutate(SEEDS[rng.choice(sorted(SEEDS))], rng)
        start = time.perf_counter()
        image = _open_or_none(data)
        assert time.perf_counter() - start < 5
        if image is None:
            refused += 1
        else:
            assert (image.mode, image.size) == ("RGB", Image.open(BytesIO(data), formats=FORMATS).size)
    assert count / 8 < refused < count * 7 / 8
