"""The perceptual hash: near copies differ in few bits, other images in many.

How to break the code so that these fail: hash with float cosines of another SIDE (the written-out hashes), compare with
the mean instead of the median (flat images), skip the resize and crop instead (copies).
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_raw import encoded, photo

from maskvlm.data.images import safe_open
from maskvlm.data.phash import distance, phash


def test_the_hash_is_the_same_everywhere() -> None:
    assert [phash(photo(seed)) for seed in (0, 1)] == [15885642605859576127, 3216646951451477809]


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_near(seed: int) -> None:
    image = photo(seed, 480, 320)
    original = phash(image)
    copies = {
        "q60": safe_open(encoded(image, quality=60), "x"),
        "half": image.resize((240, 160), Image.Resampling.BICUBIC),
        "half, q60": safe_open(encoded(image.resize((240, 160)), quality=60), "x"),
        "other proportions": image.resize((300, 300), Image.Resampling.LANCZOS),
        "grey": image.convert("L"),
    }
    assert {
        name: distance(original, phash(copy)) for name, copy in copies.items() if distance(original, phash(copy)) > 4
    } == {}


def test_other_images_are_far() -> None:
    hashes = [phash(photo(seed)) for seed in range(40)]
    apart = [distance(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(apart) >= 12
    assert distance(hashes[0], phash(photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) >= 12


@given(colour=st.tuples(*[st.integers(0, 255)] * 3), side=st.integers(8, 80))
def test_an_image_of_one_colour_has_no_hash(colour: tuple[int, int, int], side: int) -> None:
    assert phash(Image.new("RGB", (side, side + 3), colour)) == 0


def test_photos_are_told_apart(shared_data: Path) -> None:
    files = sorted((shared_data / "flickr8k" / "images").iterdir())[:300]
    images = [safe_open(file, "x") for file in files]
    hashes = [phash(image) for image in images]
    assert all(distance(original, phash(p.resize((80, 80)))) <= 10 for original, p in zip(hashes, images, strict=True))
    apart = [distance(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(apart) > 8
