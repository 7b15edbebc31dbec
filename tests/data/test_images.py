"""Every kind of image the world sends comes out as its exact pixels."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from toy_images import NOISE, SEEDS, SMOOTH, encode, make_png, pixels, reason

from maskvlm.data.images import safe_open


@pytest.mark.parametrize("kind", sorted(SEEDS))
def test_every_allowed_kind_opens_at_its_size_with_nothing_attached(kind: str) -> None:
    image = safe_open(SEEDS[kind], "x")
    assert (image.mode, image.size, image.info) == ("RGB", (64, 48), {})


def test_lossless_images_come_out_exactly() -> None:
    image = Image.fromarray(NOISE)
    for data in (encode(image, "PNG"), encode(image, "BMP"), encode(image, "WEBP", lossless=True)):
        np.testing.assert_array_equal(pixels(data), NOISE)
    np.testing.assert_array_equal(pixels(image), NOISE)


def test_a_jpeg_is_what_pillow_decodes() -> None:
    np.testing.assert_array_equal(pixels(SEEDS["jpeg"]), np.asarray(Image.open(BytesIO(SEEDS["jpeg"]))))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_images_keep_their_values(mode: str) -> None:
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
    png = make_png(16, 16, rows, depth=16, colour=2)
    assert np.abs(pixels(png) - deep_HWC / 257).max() <= 1


@pytest.mark.parametrize(("top", "maximum"), [(1, 1.0), (255, 200.0), (65535, 60000.0)])
def test_floats_are_scaled_from_the_range_that_holds_them(top: int, maximum: float) -> None:
    values_HW = np.linspace(0, maximum, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint(values_HW / top * 255)[..., None]
    assert np.abs(pixels(Image.fromarray(values_HW)) - expected).max() <= 1


def test_other_floats_are_scaled_from_least_to_greatest() -> None:
    values_HW = np.linspace(-3, 5, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint(np.linspace(0, 255, 256)).reshape(16, 16, 1)
    assert np.abs(pixels(Image.fromarray(values_HW)) - expected).max() <= 1
    assert pixels(Image.fromarray(np.full((9, 9), -3, np.float32))).max() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_of_no_numbers_is_refused(bad: float) -> None:
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


@pytest.mark.parametrize(
    "header", [b"ZZ\x00*", b"MM\x00*\x00\x00\x00\x08\xff\xff", b"MM\x00*\x00\x00\x00\x08\x00\x09\x01\x12"]
)
def test_damaged_exif_costs_neither_the_image_nor_a_warning(header: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(encode(SMOOTH, "PNG", exif=header)), np.asarray(SMOOTH))
        assert safe_open(encode(SMOOTH, "JPEG", exif=b"Exif\x00\x00" + header), "x").size == (64, 48)


@pytest.mark.parametrize("kind", ["apng", "webp-animation", "gif-animation"])
def test_of_an_animation_the_first_frame_is_shown(kind: str) -> None:
    assert np.abs(pixels(SEEDS[kind]) - np.asarray(SMOOTH)).mean() < 12
    assert np.abs(pixels(SEEDS[kind]) - np.asarray(SMOOTH.rotate(180))).mean() > 30


def test_a_given_image_is_not_touched() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(BytesIO(encode(SMOOTH, "PNG", exif=exif)))
    assert safe_open(image, "x").size == (48, 64)
    assert image.size == (64, 48)
    assert image.getexif()[ExifTags.Base.Orientation] == 6


def test_files_open_by_path_and_by_string(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SEEDS["png"])  # the content counts, not the name
    for source in (tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
        np.testing.assert_array_equal(pixels(source), np.asarray(SMOOTH))


def test_real_photos_open_and_real_formats_too(shared_data: Path) -> None:
    photos = sorted((shared_data / "flickr8k" / "images").iterdir())[:50]
    assert {safe_open(photo, photo.name).size for photo in photos} == {(160, 160)}
    formats = sorted(path for path in (shared_data / "formats").rglob("*") if path.suffix in (".jpg", ".png"))
    assert formats
    for path in formats[:20]:
        with Image.open(path) as image:
            size = image.size
        assert safe_open(path, path.name).size == size
