"""Every kind of picture the world sends: exact pixels, or one line with a reason."""

import os
import pickle
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from maskvlm.data.images import FORMATS, MAX_PIXELS, MAX_SCANS, BadImage, safe_open
from maskvlm.errors import ExitCode, UserError

HTML = b"<!DOCTYPE html><html><body>404 not found</body></html>"
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(NOISE[:6, :8]).resize((64, 48), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    image = safe_open(source, "x")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def reason(source: Any, name: str = "x") -> str:
    with pytest.raises(BadImage) as caught:
        safe_open(source, name)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def _seeds() -> dict[str, bytes]:
    turned = SMOOTH.rotate(180)
    frames: dict[str, Any] = {"save_all": True, "append_images": [turned]}
    deep = np.random.default_rng(1).integers(0, 65536, (48, 64)).astype(np.uint16)
    return {
        "jpeg": encode(SMOOTH, "JPEG"),
        "progressive": encode(SMOOTH, "JPEG", progressive=True),
        "cmyk": encode(SMOOTH.convert("CMYK"), "JPEG"),
        "png": encode(SMOOTH, "PNG"),
        "png16": encode(Image.fromarray(deep), "PNG"),
        "png-la": encode(SMOOTH.convert("LA"), "PNG"),
        "png-p": encode(SMOOTH.convert("P"), "PNG", transparency=3),
        "apng": encode(SMOOTH, "PNG", **frames),
        "webp": encode(SMOOTH, "WEBP"),
        "webp-lossless": encode(SMOOTH, "WEBP", lossless=True),
        "webp-animation": encode(SMOOTH, "WEBP", **frames),
        "gif": encode(SMOOTH, "GIF"),
        "gif-animation": encode(SMOOTH, "GIF", **frames),
        "bmp": encode(SMOOTH, "BMP"),
    }


SEEDS = _seeds()


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("kind", sorted(SEEDS))
def test_every_allowed_kind_opens_at_its_size_with_nothing_attached(kind: str) -> None:
    image = safe_open(SEEDS[kind], "x")
    assert (image.mode, image.size, image.info) == ("RGB", (64, 48), {})


def test_lossless_pictures_come_out_exactly() -> None:
    image = Image.fromarray(NOISE)
    for data in (encode(image, "PNG"), encode(image, "BMP"), encode(image, "WEBP", lossless=True)):
        np.testing.assert_array_equal(pixels(data), NOISE)
    np.testing.assert_array_equal(pixels(image), NOISE)


def test_a_jpeg_is_what_pillow_decodes() -> None:
    np.testing.assert_array_equal(pixels(SEEDS["jpeg"]), np.asarray(Image.open(BytesIO(SEEDS["jpeg"]))))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_pictures_keep_their_values(mode: str) -> None:
    image = SMOOTH.convert(mode)
    np.testing.assert_array_equal(pixels(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    deep_HW = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.rint(deep_HW / 65535 * 255)
    png = pixels(encode(Image.fromarray(deep_HW), "PNG"))
    assert np.abs(png - expected[..., None]).max() == 0
    np.testing.assert_array_equal(pixels(Image.fromarray(deep_HW.astype(np.int32))), png)


def test_16_bit_colour_is_scaled_not_clipped() -> None:
    deep_HWC = np.random.default_rng(2).integers(0, 65536, (16, 16, 3)).astype(">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in deep_HWC)
    png = _png(16, 16, rows, depth=16, colour=2)
    assert np.abs(pixels(png) - deep_HWC / 257).max() <= 1


@pytest.mark.parametrize(("top", "given"), [(1, 1.0), (255, 200.0), (65535, 60000.0)])
def test_floats_are_scaled_from_the_range_that_holds_them(top: int, given: float) -> None:
    values_HW = np.linspace(0, given, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint(values_HW / top * 255)[..., None]
    assert np.abs(pixels(Image.fromarray(values_HW)) - expected).max() <= 1


def test_other_floats_are_scaled_from_least_to_greatest() -> None:
    values_HW = np.linspace(-3, 5, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint(np.linspace(0, 255, 256)).reshape(16, 16, 1)
    assert np.abs(pixels(Image.fromarray(values_HW)) - expected).max() <= 1
    assert pixels(Image.fromarray(np.full((9, 9), -3, np.float32))).max() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_picture_of_no_numbers_is_refused(bad: float) -> None:
    assert reason(Image.fromarray(np.full((9, 9), bad, np.float32))) == "not finite"


def test_cmyk_comes_out_in_its_colours_as_adobe_stores_them_inverted_and_as_given() -> None:
    image = Image.new("RGB", (64, 48), (200, 60, 20)).convert("CMYK")
    data = encode(image, "JPEG", quality=100)  # Pillow inverts and adds Adobe's marker
    assert b"Adobe" in data
    assert np.abs(pixels(data) - (200, 60, 20)).max() <= 3
    assert np.abs(pixels(image) - (200, 60, 20)).max() <= 1


def test_transparency_shows_white() -> None:
    red_half = Image.new("RGBA", (16, 16), (255, 0, 0, 127))
    assert pixels(encode(red_half, "PNG"))[0, 0].tolist() == [255, 128, 128]
    assert pixels(encode(red_half, "WEBP", lossless=True))[0, 0].tolist() == [255, 128, 128]
    assert pixels(encode(Image.new("LA", (16, 16), (0, 0)), "PNG")).min() == 255
    assert pixels(Image.new("PA", (16, 16), (0, 0))).min() == 255
    assert pixels(encode(Image.new("L", (16, 16), 7), "PNG", transparency=7)).min() == 255
    assert pixels(encode(Image.new("L", (16, 16), 8), "PNG", transparency=7)).max() == 8
    assert pixels(encode(Image.new("RGB", (16, 16), (1, 2, 3)), "PNG", transparency=(1, 2, 3))).min() == 255
    deep = Image.fromarray(np.full((16, 16), 7000, np.uint16))
    deep.info["transparency"] = 7000
    assert pixels(deep).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_shows_white(kind: str) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (0, 0, 8, 16))
    opened = pixels(encode(image, kind, transparency=1))
    assert opened[0, 0].tolist() == [255, 255, 255]
    assert opened[0, 15].tolist() == [255, 0, 0]


def _oriented(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The stored pixels that EXIF `orientation` turns into `upright` (EXIF 2.3, table 6)."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(stored[orientation](upright))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_give_the_same_pixels(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(_oriented(NOISE, orientation))
    np.testing.assert_array_equal(pixels(encode(stored, "PNG", exif=exif)), NOISE)
    jpeg = safe_open(encode(stored, "JPEG", exif=exif), "x")
    assert jpeg.size == (64, 48)
    assert dict(jpeg.getexif()) == {}


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(SMOOTH, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 40)
    assert safe_open(data, "x").size == (64, 48)


@pytest.mark.parametrize("kind", ["apng", "webp-animation", "gif-animation"])
def test_of_an_animation_the_first_frame_is_shown(kind: str) -> None:
    assert np.abs(pixels(SEEDS[kind]) - np.asarray(SMOOTH)).mean() < 12
    assert np.abs(pixels(SEEDS[kind]) - np.asarray(SMOOTH.rotate(180))).mean() > 30


def test_a_given_image_is_not_touched() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    given = Image.open(BytesIO(encode(SMOOTH, "PNG", exif=exif)))
    assert safe_open(given, "x").size == (48, 64)
    assert given.size == (64, 48)
    assert given.getexif()[ExifTags.Base.Orientation] == 6


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("kind", sorted(SEEDS))
@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.75])
def test_a_picture_cut_short_is_refused(kind: str, left: float) -> None:
    data = SEEDS[kind][: int(left * len(SEEDS[kind]))]
    if kind == "gif-animation" and left == 0.75:
        pytest.skip("its first frame is whole")
    assert reason(data) in ({"truncated", "corrupt"} if left else {"empty"})


@pytest.mark.parametrize("kind", sorted(set(SEEDS) - {"gif-animation"}))
def test_a_picture_without_its_last_ten_bytes_is_truncated(kind: str) -> None:
    assert reason(SEEDS[kind][:-10]) == "truncated"


def test_half_a_picture_is_refused_even_if_pillow_was_told_to_accept_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encode(Image.fromarray(NOISE), "JPEG")
    data = whole[: len(whole) // 2]
    assert np.asarray(Image.open(BytesIO(data))).shape == (48, 64, 3)
    assert reason(data) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


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
def test_what_is_no_picture_is_named(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def test_formats_not_on_the_list_are_refused_though_pillow_reads_them() -> None:
    assert reason(encode(SMOOTH, "TIFF")) == "format not allowed (image/tiff)"
    for kind in ("PPM", "TGA", "ICO", "PCX", "EPS"):
        assert reason(encode(SMOOTH, kind)).startswith(("not an image", "format not allowed"))
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP"}


def test_tiny_and_narrow_pictures_are_refused() -> None:
    assert reason(encode(Image.new("RGB", (1, 1)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (7, 100)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (1, 5000)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (8, 1601)), "PNG")) == "too narrow"
    assert safe_open(encode(Image.new("RGB", (1600, 8)), "PNG"), "x").size == (1600, 8)
    assert reason(Image.new("RGB", (1, 1))) == "too small"


def _png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A true picture of 20,000 x 20,000 pixels, 1 bit each, in 50 kB."""
    return _png(20_000, 20_000, bytes(2501 * 20_000), depth=1)


def test_a_bomb_is_refused_by_its_header_at_once_and_without_memory(bomb: bytes) -> None:
    reason(bomb)  # warm up
    tracemalloc.start()
    try:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert reason(bomb) == "bomb"
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
def test_pictures_over_the_cap_are_bombs_in_pillows_silent_warned_and_refused_range(
    width: int, height: int
) -> None:
    assert width * height > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(_png(width, height, b"")) == "bomb"


def test_a_picture_just_under_the_cap_is_let_in_by_the_header_check() -> None:
    assert reason(_png(7071, 7071, b"")) == "truncated"  # it went on to decode


def _gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", *screen, 0xF0, 0, 0) + bytes(6)
    picture = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"
    return header + picture


@pytest.mark.parametrize(
    "sizes", [((60_000, 60_000), (9, 9)), ((9, 9), (60_000, 60_000)), ((9, 9), (9000, 9000))]
)
def test_a_gif_cannot_hide_its_size(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    assert reason(_gif(*sizes)) == "bomb"


@pytest.mark.parametrize("side", [7100, 16_000, 1 << 24])
def test_a_webp_animation_cannot_hide_its_size(side: int) -> None:
    data = bytearray(SEEDS["webp-animation"])
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    assert reason(bytes(data)) in ("bomb", "corrupt")


def test_a_progressive_jpeg_of_endless_scans_is_a_bomb() -> None:
    data = SEEDS["progressive"]
    last = data.rindex(b"\xff\xda")
    assert reason(data[:last] + data[last:-2] * MAX_SCANS + data[-2:]) == "bomb"


# ------------------------------------------------------------------ files and messages


def test_files_open_by_path_and_by_string(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SEEDS["png"])  # the content counts, not the name
    for source in (tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
        np.testing.assert_array_equal(pixels(source), np.asarray(SMOOTH))


def test_a_missing_file_says_which_and_where(tmp_path: Path) -> None:
    with pytest.raises(BadImage) as caught:
        safe_open(tmp_path / "no.jpg", "pairs.json image 3 (no.jpg)")
    assert caught.value.code == ExitCode.MISSING_INPUT
    assert str(caught.value) == (
        f"pairs.json image 3 (no.jpg): bad picture, missing (no file {tmp_path}/no.jpg). "
        "Check the folder of the pictures and the name."
    )


def test_what_is_no_regular_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "x.jpg", "a\x00b", "/dev/zero"):
        assert reason(path) == "missing"


def test_a_file_that_cannot_be_read_is_the_disks_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert reason(tmp_path / "a.png") == "bomb"
    assert time.perf_counter() - start < 0.1


def test_a_bad_image_is_a_user_error_that_survives_the_way_from_a_data_worker() -> None:
    with pytest.raises(UserError) as caught:
        safe_open(HTML, "a.jpg")
    error = caught.value
    sent = pickle.loads(pickle.dumps(error))
    assert isinstance(sent, BadImage)
    assert (sent.reason, sent.code, str(sent)) == ("not an image (text/html)", ExitCode.BAD_DATA, str(error))


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
            mutant[start : start + 4] = rng.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff"]
            )
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


def test_real_photos_open_and_real_formats_too(shared_data: Path) -> None:
    photos = sorted((shared_data / "flickr8k" / "images").iterdir())[:50]
    assert {safe_open(photo, photo.name).size for photo in photos} == {(160, 160)}
    formats = sorted(path for path in (shared_data / "formats").rglob("*") if path.suffix in (".jpg", ".png"))
    assert formats
    for path in formats[:20]:
        with Image.open(path) as image:
            size = image.size
        assert safe_open(path, path.name).size == size
