"""Every image that cannot be used is refused in one line with a reason, in no time and without memory."""

import os
import pickle
import random
import struct
import time
import tracemalloc
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from toy_images import NOISE, SEEDS, SMOOTH, encode, make_png, reason

from maskvlm.data.images import FORMATS, MAX_PIXELS, MAX_SCANS, BadImage, safe_open
from maskvlm.data.inputs import open_image
from maskvlm.utils.errors import ExitCode, UserError

HTML = b"<!DOCTYPE html><html><body>404 not found</body></html>"


@pytest.mark.parametrize("kind", sorted(SEEDS))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75])
def test_an_image_cut_short_is_refused(kind: str, share: float) -> None:
    data = SEEDS[kind][: int(share * len(SEEDS[kind]))]
    if kind == "gif-animation" and share == 0.75:
        pytest.skip("its first frame is whole")
    assert reason(data) in ({"truncated", "corrupt"} if share else {"empty"})


@pytest.mark.parametrize("kind", sorted(set(SEEDS) - {"gif-animation"}))
def test_an_image_without_its_last_ten_bytes_is_truncated(kind: str) -> None:
    assert reason(SEEDS[kind][:-10]) == "truncated"


def test_half_an_image_is_refused_even_if_pillow_was_told_to_accept_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encode(Image.fromarray(NOISE), "JPEG")
    data = whole[: len(whole) // 2]
    assert np.asarray(Image.open(BytesIO(data))).shape == (48, 64, 3)
    assert reason(data) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


class Growing(Image.Image):
    """An image that turns out larger than its header said."""

    def load(self) -> Any:
        self._size = (640, 480)
        return super().load()


def test_an_image_of_another_size_than_its_header_is_refused() -> None:
    image = Growing()
    image.im, image._mode, image._size = SMOOTH.im, "RGB", (64, 48)
    assert reason(image) == "corrupt"


def test_a_text_bomb_inside_a_png_is_refused() -> None:
    data = encode(SMOOTH, "PNG", pnginfo=_text(50_000_000))
    assert len(data) < 100_000
    assert reason(data) == "corrupt"


def _text(length: int) -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", "x" * length, zip=True)
    return info


def test_every_flipped_bit_of_a_pngs_pixels_is_found() -> None:
    data = encode(Image.fromarray(NOISE[:12, :12]), "PNG", compress_level=0)
    start = data.index(b"IDAT") + 4
    for position in range(start, len(data) - 12, 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        assert reason(bytes(flipped)) == "crc"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"\x00" * 4096, "empty"),
        (HTML, "not an image (text/html)"),
        (b"\n <HTML><head>", "not an image (text/html)"),
        (b"%PDF-1.7 ...", "not an image (application/pdf)"),
        (b'{"error": "quota"}', "not an image (application/json)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image (application/postscript)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format not allowed (image/svg+xml)"),
        (b"\x00\x00\x00 ftypavif", "format not allowed (image/heif)"),
        (b"SIMPLE  =                    T", "format not allowed (image/fits)"),
        (b"8BPS\x00\x01", "format not allowed (image/vnd.adobe.photoshop)"),
        (b"just some words", "not an image (unknown)"),
        (b"\xff\xd8\xff\xe0", "corrupt"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def test_formats_not_on_the_list_are_refused_though_pillow_reads_them() -> None:
    assert reason(encode(SMOOTH, "TIFF")) == "format not allowed (image/tiff)"
    for kind in ("PPM", "TGA", "ICO", "PCX", "EPS"):
        assert reason(encode(SMOOTH, kind)).startswith(("not an image", "format not allowed"))
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP"}


def test_tiny_and_narrow_images_are_refused() -> None:
    assert reason(encode(Image.new("RGB", (1, 1)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (7, 100)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (1, 5000)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (8, 1601)), "PNG")) == "too narrow"
    assert safe_open(encode(Image.new("RGB", (1600, 8)), "PNG"), "x").size == (1600, 8)
    assert reason(Image.new("RGB", (1, 1))) == "too small"


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A true image of 20,000 x 20,000 pixels, 1 bit each, in 50 kB."""
    return make_png(20_000, 20_000, bytes(2501 * 20_000), depth=1)


def test_a_bomb_is_refused_by_its_header_at_once_and_without_memory(bomb: bytes) -> None:
    reason(bomb)  # warm up
    tracemalloc.start()
    try:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert reason(bomb) == "too large"
            times.append(time.perf_counter() - start)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert min(times) < 0.005


def test_the_memory_of_the_process_does_not_grow_with_a_bomb(bomb: bytes) -> None:
    resource = pytest.importorskip("resource")
    reason(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        reason(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5_000  # kB


@pytest.mark.parametrize(("width", "height"), [(7072, 7072), (9000, 9000), (13_000, 13_000), (2**30, 2**30)])
def test_images_over_the_cap_are_bombs_in_pillows_silent_warned_and_refused_range(width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(make_png(width, height, b"")) == "too large"


def test_an_image_just_under_the_cap_is_let_in_by_the_header_check() -> None:
    assert reason(make_png(7071, 7071, b"")) == "truncated"  # it went on to decode


def _gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", *screen, 0xF0, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"
    return header + image


@pytest.mark.parametrize("sizes", [((60_000, 60_000), (9, 9)), ((9, 9), (60_000, 60_000)), ((9, 9), (9000, 9000))])
def test_a_gif_cannot_hide_its_size(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    assert reason(_gif(*sizes)) == "too large"


@pytest.mark.parametrize("side", [7100, 16_000, 1 << 24])
def test_a_webp_animation_cannot_hide_its_size(side: int) -> None:
    data = bytearray(SEEDS["webp-animation"])
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    assert reason(bytes(data)) in ("too large", "corrupt")


def test_a_progressive_jpeg_of_endless_scans_is_a_bomb() -> None:
    data = SEEDS["progressive"]
    last = data.rindex(b"\xff\xda")
    assert reason(data[:last] + data[last:-2] * MAX_SCANS + data[-2:]) == "too large"


# ------------------------------------------------------------------ files and messages


def test_a_missing_file_says_which_and_where(tmp_path: Path) -> None:
    with pytest.raises(BadImage) as caught:
        safe_open(tmp_path / "no.jpg", "pairs.json image 3 (no.jpg)")
    assert caught.value.code == ExitCode.MISSING_INPUT
    assert str(caught.value) == (
        f"pairs.json image 3 (no.jpg): bad image, missing (no file {tmp_path}/no.jpg). "
        "Check the folder of the images and the name."
    )


def test_what_is_no_regular_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    assert reason(tmp_path) == "a folder"
    for path in (tmp_path / "pipe", tmp_path / "file" / "x.jpg", "a\x00b", "/dev/zero"):
        assert reason(path) == "missing"


def test_a_file_that_cannot_be_read_is_the_disks_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(SEEDS["png"])

    def fail(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(BadImage, match=r"unreadable .*Permission denied") as caught:
        safe_open(tmp_path / "a.png", "x")
    assert caught.value.code == ExitCode.IO_ERROR


def test_a_giant_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(3_000_000_000)
    start = time.perf_counter()
    assert reason(tmp_path / "a.png") == "too large"
    assert time.perf_counter() - start < 0.1


def test_a_bad_image_is_a_user_error_that_survives_the_way_from_a_data_worker() -> None:
    with pytest.raises(UserError) as caught:
        safe_open(HTML, "a.jpg")
    error = caught.value
    sent = pickle.loads(pickle.dumps(error))
    assert isinstance(sent, BadImage)
    assert (sent.reason, sent.code, str(sent)) == ("not an image (text/html)", ExitCode.BAD_DATA, str(error))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some words", "not an image (unknown). Give an image (JPEG, PNG, WEBP, GIF or BMP)."),
        (encode(SMOOTH, "TIFF"), "format not allowed (image/tiff). Give an image (JPEG, PNG, WEBP, GIF or BMP)."),
        (None, "a folder. Give an image (JPEG, PNG, WEBP, GIF or BMP)."),
        (encode(SMOOTH, "JPEG")[:-200], "Give another image."),
    ],
)
def test_an_image_that_is_asked_about_by_itself_has_no_row(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.jpg"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: bad image, ")
    assert str(caught.value).endswith(message)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_row_of_another_format_is_told_which_are_allowed() -> None:
    with pytest.raises(BadImage, match="Save it as JPEG, PNG, WEBP, GIF or BMP, or drop its row"):
        safe_open(encode(SMOOTH, "TIFF"), "a.csv:3")


def test_a_hostile_name_cannot_reach_the_terminal() -> None:
    with pytest.raises(BadImage) as caught:
        safe_open(b"", "a\n\x1b[31mb\u202e.jpg")
    assert str(caught.value).startswith("a b.jpg: ")


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


def test_thousands_of_damaged_files_raise_nothing_but_bad_image() -> None:
    rng = random.Random(0)
    refused = accepted = 0
    for _ in range(4000):
        data = _mutate(SEEDS[rng.choice(sorted(SEEDS))], rng)
        start = time.perf_counter()
        image = _open_or_none(data)
        assert time.perf_counter() - start < 5
        if image is None:
            refused += 1
        else:
            accepted += 1
            assert image.mode == "RGB"
            assert image.size == Image.open(BytesIO(data), formats=FORMATS).size
    assert min(refused, accepted) > 500


def _open_or_none(data: bytes) -> Image.Image | None:
    try:
        return safe_open(data, "x")
    except BadImage as caught:
        error = caught
    assert error.reason
    assert "\n" not in str(error)
    return None


@settings(max_examples=200)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"BM"]),
)
def test_no_bytes_at_all_raise_anything_else(data: bytes, start: bytes) -> None:
    _open_or_none(start + data)
