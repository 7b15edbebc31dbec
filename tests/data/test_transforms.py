"""Augmentation: exact pixels where nothing is random, true captions where something is; what makes it faster."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prepared_sets import jpeg, toy_image
from torchvision.transforms import v2
from toy_pairs import Rows, row

from maskvlm.data.batch import InputSpec
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.pairs import TrainPairs
from maskvlm.data.sampler import Pick
from maskvlm.data.transforms import (
    RandAugment,
    RandomResizedCrop,
    ToTensor,
    TrainTransform,
    eval_transform,
    names_colour,
    names_side,
    train_transform,
)

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
SPEC = InputSpec(32, MEAN, STD, 30, 100)
PLAIN = {"crop_scale": (1.0, 1.0), "randaugment": None}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colour gradients, brighter towards the right."""
    y, x = np.mgrid[0:48, 0:64]
    pixels_HWC = np.stack([x * 4, y * 5, 255 - x * 2 - y], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels_HWC)


@pytest.fixture(scope="module")
def square() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def _normalised(image: Image.Image) -> torch.Tensor:
    pixels_CHW = np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 255
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    return torch.from_numpy((pixels_CHW - mean) / std).float()


def test_evaluation_resizes_the_whole_image_and_normalises(photo: Image.Image) -> None:
    image_CHW = eval_transform(SPEC)(photo)
    torch.testing.assert_close(image_CHW, _normalised(photo.resize((32, 32), Image.Resampling.BICUBIC)))
    assert (type(image_CHW), image_CHW.dtype) == (torch.Tensor, torch.float32)
    plain = train_transform(SPEC, augment=False)
    assert torch.equal(plain(photo, "a red dog on the left"), image_CHW)


def _mirrored_share(transform: TrainTransform, image: Image.Image, caption: str) -> float:
    torch.manual_seed(0)
    straight = _normalised(image)
    count = 0
    for _ in range(100):
        image_CHW = transform(image, caption)
        mirrored = torch.allclose(image_CHW, straight.flip(-1), atol=1e-5)
        assert mirrored or torch.allclose(image_CHW, straight, atol=1e-5)
        count += mirrored
    return count / 100


def test_half_of_the_images_are_mirrored_unless_the_caption_names_a_side(square: Image.Image) -> None:
    transform = TrainTransform(SPEC, **PLAIN)
    assert 0.35 < _mirrored_share(transform, square, "a dog beside a cat") < 0.65
    assert _mirrored_share(transform, square, "a dog LEFT of a cat") == 0
    assert _mirrored_share(transform, square, "a dog on the right-hand side") == 0
    unaware = TrainTransform(SPEC, **PLAIN, caption_aware=False)
    assert 0.35 < _mirrored_share(unaware, square, "a dog left of a cat") < 0.65
    assert _mirrored_share(TrainTransform(SPEC, **PLAIN, flip=False), square, "a dog") == 0


def _changes_colour(transform: TrainTransform, caption: str) -> bool:
    """Whether a uniform image in the colour of the fill changes: moving and sharpening cannot do that."""
    torch.manual_seed(0)
    red, green, blue = (round(255 * mean) for mean in MEAN)
    image = Image.new("RGB", (32, 32), (red, green, blue))
    own = _normalised(image)
    return not all(torch.allclose(transform(image, caption), own, atol=1e-5) for _ in range(60))


def test_colours_stay_as_they_are_where_the_caption_names_one(square: Image.Image) -> None:
    """Where they do, geometry is still augmented."""
    transform = TrainTransform(SPEC, (1.0, 1.0), (2, 20))
    assert _changes_colour(transform, "a dog runs")
    assert not _changes_colour(transform, "a Red-haired dog")
    assert _changes_colour(TrainTransform(SPEC, (1.0, 1.0), (2, 20), caption_aware=False), "a red dog")
    assert not _changes_colour(TrainTransform(SPEC, (1.0, 1.0), (2, 20), colour=False), "a dog runs")
    still, own = TrainTransform(SPEC, (1.0, 1.0), (2, 20), flip=False), _normalised(square)
    torch.manual_seed(0)
    assert sum(not torch.allclose(still(square, "a red dog"), own, atol=1e-5) for _ in range(40)) > 25


def test_words_are_found_whole_and_in_their_forms() -> None:
    colours = ["a red dog", "Two BLUES", "reddish hair", "colourful", "a multicolored kite"]
    no_colours = ["a dog", "he reads", "a tanker", "credit", "a greenhouse", "highlight", ""]
    sides = ["on the left", "RIGHT of it", "a left-handed man", "the leftmost", "rightward"]
    no_sides = ["bright", "a cleft", "leftovers", "the righteous", "top", ""]
    assert [caption for caption in [*colours, *no_colours] if names_colour(caption)] == colours
    assert [caption for caption in [*sides, *no_sides] if names_side(caption)] == sides


# ---------------------------------------------------------------------- what makes loading faster


LARGE = InputSpec(48, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), text_length=12, vocab_size=120)


def test_augmentation_gives_torchvisions_pixels(square: Image.Image) -> None:
    """Fails where shears or rotations, which do interpolate, are made without. So do tensors, bit by bit."""
    for magnitude in (7, 30):
        settings: Any = {"num_ops": 3, "magnitude": magnitude, "fill": [120, 115, 103]}
        settings["interpolation"] = v2.InterpolationMode.BILINEAR
        for seed in range(60):
            torch.manual_seed(seed)
            ours = RandAugment(**settings)(square)
            torch.manual_seed(seed)
            assert np.array_equal(np.asarray(ours), np.asarray(v2.RandAugment(**settings)(square))), (magnitude, seed)
    steps = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([*LARGE.mean], [*LARGE.std])]
    tensor = ToTensor(LARGE)(square)
    assert torch.equal(tensor, v2.Compose(steps)(square))
    assert tensor.is_contiguous()


@pytest.mark.parametrize("size", [16, 100])
def test_crops_are_torchvisions_within_two_levels(size: int) -> None:
    """And what is drawn after a crop is the same, too."""
    pillow = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    for seed in range(30):
        torch.manual_seed(seed)
        ours, after = np.asarray(RandomResizedCrop(size, (0.2, 1.0))(toy_image(seed))), torch.rand(1)
        torch.manual_seed(seed)
        theirs = np.asarray(pillow(toy_image(seed)))
        assert torch.equal(after, torch.rand(1))
        assert ours.shape == theirs.shape == (size, size, 3)
        assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_a_large_jpeg_is_decoded_smaller_for_training_and_looks_the_same() -> None:
    big = toy_image(3).resize((600, 450), Image.Resampling.BICUBIC)
    images: list[Image.Image] = []
    transform = TrainTransform(LARGE)

    def spy(image: Image.Image, caption: str) -> torch.Tensor:
        images.append(image)
        return transform(image, caption)

    spy.least = transform.least  # type: ignore[attr-defined]
    TrainPairs(Rows([row(0, image=jpeg(big))]), spy, 0, 48)[Pick(0, 0)]
    assert images[0].size == (300, 225)
    small = np.asarray(big.resize((300, 225), Image.Resampling.BOX), int)
    assert np.abs(np.asarray(images[0], int) - small).mean() < 2
    data = jpeg(big)  # a damaged one is found at a reduced scale, too
    assert safe_open(data, "x", 100).size == (150, 113)
    with pytest.raises(BadImage, match="truncated"):
        safe_open(data[: len(data) // 2], "x", 100)
