"""Every kind of image the world sends comes out as its exact pixels."""

import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image
from toy_images import NOISE, SEEDS, SMOOTH, encode, make_png, pixels, reason

from maskvlm.data.images import safe_open


def test_lossless_images_come_out_exactly() -> None:
    image = Image.fromarray(NOISE)
    for data in (encode(image, "PNG"), encode(image, "BMP"), encode(image, "WEBP", lossless=True)):
        np.testing.assert_array_equal(pixels(data), NOISE)
    np.testing.assert_array_equal(pixels(image), NOISE)
    np.testing.assert_array_equal(pixels(SEEDS["jpeg"]), np.asarray(Image.open(BytesIO(SEEDS["jpeg"]))))
    for mode in ("1", "L", "P"):
        grey = SMOOTH.convert(mode)
        np.testing.assert_array_equal(pixels(encode(grey, "PNG")), np.asarray(grey.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    deep_HW = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.rint(deep_HW / 65535 * 255)
    png = pixels(encode(Image.fromarray(deep_HW), "PNG"))
    assert np.abs(png - expected[..., None]).max() == 0
    np.testing.assert_array_equal(pixels(Image.fromarray(deep_HW.astype(np.int32))), png)

    deep_HWC = np.random.default_rng(2).integers(0, 65536, (16, 16, 3)).astype(">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in deep_HWC)
    assert np.abs(pixels(make_png(16, 16, rows, depth=16, colour=2)) - deep_HWC / 257).max() <= 1


@pytest.mark.parametrize(
    ("least", "greatest", "low", "high"),
    [(0, 1.0, 0, 1), (0, 200.0, 0, 255), (0, 60000.0, 0, 65535), (-3, 5, -3, 5)],
)
def test_floats_are_scaled_from_the_range_that_holds_them(
    least: float, greatest: float, low: float, high: float
) -> None:
    """Or from the least to the greatest where none does."""
    values_HW = np.linspace(least, greatest, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint((values_HW - low) / (high - low) * 255)[..., None]
    assert np.abs(pixels(Image.fromarray(values_HW)) - expected).max() <= 1
    assert pixels(Image.fromarray(np.full((9, 9), -3, np.float32))).max() == 0
    for bad in (np.nan, np.inf):
        assert reason(Image.fromarray(np.full((9, 9), bad, np.float32))) == "not finite"


@pytest.mark.parametrize("kind", sorted(SEEDS))
def test_every_allowed_kind_opens_at_its_size_with_nothing_attached(kind: str) -> None:
    """Of an animation the first frame is shown."""
    image = safe_open(SEEDS[kind], "x")
    assert (image.mode, image.size, image.info) == ("RGB", (64, 48), {})
    if kind in ("apng", "webp-animation", "gif-animation"):
        assert np.abs(pixels(SEEDS[kind]) - np.asarray(SMOOTH)).mean() < 12


def test_cmyk_comes_out_in_its_colours_as_adobe_stores_them_inverted_and_as_given() -> None:
    image = Image.new("RGB", (64, 48), (200, 60, 20)).convert("CMYK")
    data = encode(image, "JPEG", quality=100)
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


def test_all_exif_orientations_give_the_same_pixels() -> None:
    """What is stored is what EXIF's orientation turns upright (EXIF 2.3, table 6)."""
    across = NOISE.transpose(1, 0, 2)
    turned = [NOISE, NOISE[:, ::-1], NOISE[::-1, ::-1], NOISE[::-1]]
    turned += [across, np.rot90(NOISE, 1), across[::-1, ::-1], np.rot90(NOISE, -1)]
    for orientation, stored in enumerate(turned, 1):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image = Image.fromarray(np.ascontiguousarray(stored))
        np.testing.assert_array_equal(pixels(encode(image, "PNG", exif=exif)), NOISE)
        jpeg = safe_open(encode(image, "JPEG", exif=exif), "x")
        assert (jpeg.size, dict(jpeg.getexif())) == ((64, 48), {})
    for damaged in (b"ZZ\x00*", b"MM\x00*\x00\x00\x00\x08\xff\xff", b"MM\x00*\x00\x00\x00\x08\x00\x09\x01\x12"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(pixels(encode(SMOOTH, "PNG", exif=damaged)), np.asarray(SMOOTH))
            assert safe_open(encode(SMOOTH, "JPEG", exif=b"Exif\x00\x00" + damaged), "x").size == (64, 48)
