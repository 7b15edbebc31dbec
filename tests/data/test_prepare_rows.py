"""A row of the prepared form: the image in it, its captions, and why a row is left out.

How to break the code so that these fail: leave `shrink`'s condition out (small images grow), keep any JPEG as it is
(EXIF stays), clip 16-bit grey, drop `screened` (an image twice), take captions as they come.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_raw import encoded, photo, row

from maskvlm.data.prepare.rows import RowMaker, Settings, is_plain, prepare_image, row_digest, screened
from maskvlm.data.raw.base import BadRow

SETTINGS = Settings("toy", 48, 90)
SMALL = photo(3, 60, 40)


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return image


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(((96, 64), (72, 48)), ((64, 96), (48, 72)), ((49, 49), (48, 48)), ((1000, 60), (800, 48))),
        *(((48, 48), (48, 48)), ((200, 20), (200, 20)), ((9, 33), (9, 33))),  # nothing is enlarged
    ],
)
def test_the_shorter_side_becomes_the_chosen_one(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = opened(prepare_image(encoded(photo(0, *size), "PNG"), "x", SETTINGS).data)
    assert image.size == expected
    assert image.quantization == opened(encoded(photo(1), quality=90)).quantization


def test_a_small_plain_jpeg_stays_byte_for_byte(tmp_path: Path) -> None:
    data = encoded(photo(2, 60, 48), quality=71)
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, str(tmp_path / "a.jpg")):
        assert prepare_image(source, "x", SETTINGS)[:1] == (data,)
    assert not prepare_image(encoded(photo(2, 60, 49)), "x", SETTINGS).kept


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(SMALL, quality=95, exif=exif.tobytes())


@pytest.mark.parametrize(
    "data",
    [
        with_exif(1),
        encoded(SMALL, progressive=True),
        encoded(SMALL, comment=b"mine"),
        encoded(SMALL, icc_profile=b"profile"),
        encoded(SMALL.convert("L")),
        encoded(SMALL.convert("CMYK")),
        encoded(SMALL) + b"more",
    ],
)
def test_any_other_small_image_is_coded_anew_without_its_extras(data: bytes) -> None:
    image = prepare_image(data, "x", SETTINGS)
    assert not image.kept
    assert opened(image.data).size == (60, 40)
    assert is_plain(image.data)


def test_orientation_depth_and_transparency() -> None:
    """Orientation before the size is chosen; sixteen bits are scaled; what is transparent becomes white."""
    got = np.asarray(opened(prepare_image(with_exif(6), "x", SETTINGS).data), float)
    wanted = np.asarray(SMALL.transpose(Image.Transpose.ROTATE_270), float)
    assert got.shape == (60, 40, 3)
    assert np.abs(got - wanted).mean() < 8
    ramp = np.linspace(0, 65535, 48 * 48).reshape(48, 48)
    deep = prepare_image(encoded(Image.fromarray(ramp.astype(np.uint16)), "PNG"), "x", SETTINGS)
    assert np.abs(np.asarray(opened(deep.data), float)[..., 0] - ramp / 257).max() < 8
    glass = Image.new("RGBA", (48, 48), (200, 0, 0, 0))
    assert np.asarray(opened(prepare_image(encoded(glass, "PNG"), "x", SETTINGS).data)).min() >= 253


# ------------------------------------------------------------------ rows


def prepare_rows(*rows: object, captioned: bool = True) -> tuple[RowMaker, list[dict[str, object]]]:
    ticks: list[bool] = []
    maker = RowMaker(captioned, SETTINGS, ticks.append)
    batches = [*maker.batches([*rows])]  # type: ignore[list-item]
    table = [each for batch in batches for each in batch.to_pylist()]
    assert len(ticks) == len(rows)
    assert sum(ticks) == len(table) == len(maker.digests)
    return maker, table


def test_a_row_holds_all_that_is_asked_for() -> None:
    maker, (stored,) = prepare_rows(row(7, name="in/a.png", captions=("a\u200b  dog", "", "قطة 猫 😀")))
    image = prepare_image(row(7).image, "x", SETTINGS)
    text = {"captions": ["a dog", "قطة 猫 😀"], "image_id": "toy 7", "source": "toy", "name": "in/a.png"}
    assert stored == {"image": image.data, **text, "origin": "toy.csv:7", "phash": image.phash}
    assert [entry[:2] for entry in maker.mended] == [("caption control", "toy.csv:7"), ("empty caption", "toy.csv:7")]
    assert (maker.captions, maker.left_out) == (2, [])
    _, (stored,) = prepare_rows(row(1, captions=()), captioned=False)  # images of annotated sets need none
    assert stored["captions"] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"captions": ()}, "no caption"),
        ({"captions": ("", " ")}, "empty caption"),
        ({"captions": ("x" * 100_001,)}, "caption too long"),
        ({"image": "/no/such.jpg"}, "missing"),
        ({"image": b""}, "empty"),
        ({"image": b"<html></html>"}, "not an image (text/html)"),
        ({"image": encoded(photo(0))[:400]}, "truncated"),
        ({"image": encoded(photo(0, 4, 4), "PNG")}, "too small"),
        ({"image_id": "a\udcff"}, "name is not text"),
        ({"name": "a\udcff"}, "name is not text"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_under_its_reason(changes: dict[str, object], reason: str) -> None:
    maker, table = prepare_rows(row(1, **changes), row(2))
    assert [entry[:2] for entry in maker.left_out] == [(reason, "toy.csv:1")]
    assert [stored["image_id"] for stored in table] == ["toy 2"]
    assert maker.mended == []


def test_a_second_row_of_an_image_and_an_unknown_split_are_bad_rows() -> None:
    rows = [row(1), row(1, "val", origin="b:9"), BadRow("odd", "c", "c is odd", "train"), row(2, "dev"), row(3)]
    found = [*screened(iter(rows))]
    assert [found[0], found[2], found[4]] == [rows[0], rows[2], rows[4]]
    assert found[1][:2] == ("duplicate image id", "b:9")
    assert found[3][:2] == ("unknown split", "toy.csv:2")


def test_the_digest_follows_every_part_of_a_row() -> None:
    whole = (b"image", ["a", "b"], "id", "name")
    others = [(b"imag", ["ea", "b"], "id", "name"), (b"image", ["ab"], "id", "name"), (b"Image", *whole[1:])]
    others += [(b"image", ["b", "a"], "id", "name"), (b"image", ["a", "b"], "i", "dname")]
    assert row_digest(*whole) == "59705638775a517f259f4a3bfa56f967"
    assert len({row_digest(*each) for each in (whole, *others)}) == 6
