"""Pictures to tensors: augmentation for training, plain resizing for evaluation (torchvision v2).

All randomness comes from torch's global generator, so a seed per sample fixes the picture.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from maskvlm.data.batch import InputSpec

BICUBIC = v2.InterpolationMode.BICUBIC

_HUES = (
    "red orange yellow green blue purple violet pink brown black white gr[ae]y beige tan gold golden silver "
    "bronze copper turquoise cyan aqua teal magenta maroon burgundy crimson scarlet navy indigo lavender "
    "lilac olive khaki ivory cream amber blonde? brunette"
)
_COLOUR_WORDS = re.compile(
    rf"\b(?:(?:{'|'.join(_HUES.split())})(?:s|ish|y)?|redd?ish|colou?r\w*|multicolou?r\w*|dark|bright|pale|light)\b",
    re.IGNORECASE,
)
_SIDE_WORDS = re.compile(r"\b(?:left|right)(?:s|most|wards?|y|[- ]?hand(?:ed)?)?\b", re.IGNORECASE)


def names_colour(caption: str) -> bool:
    """Whether an English caption speaks of colour or brightness; changing them would make it untrue."""
    return _COLOUR_WORDS.search(caption) is not None


def names_side(caption: str) -> bool:
    """Whether an English caption says left or right; mirroring the picture would make it untrue."""
    return _SIDE_WORDS.search(caption) is not None


class GeometricRandAugment(v2.RandAugment):
    """RandAugment without the operations that change colours, contrast or brightness."""

    _AUGMENTATION_SPACE = {
        name: operation
        for name, operation in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name in ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Sharpness")
    }


class TrainTransform:
    """Augment one picture as far as its caption stays true.

    Random resized crop, mirror, RandAugment, normalise: the order and the defaults of ALBEF's pre-training,
    the field's baseline; the paper names crop and RandAugment.

    Args:
        spec: size, mean and standard deviation from the encoder.
        crop_scale: least and greatest share of the picture's area that a crop keeps.
        randaugment: number of operations and magnitude (0 to 30), or None for none.
        colour: RandAugment may change colours.
        flip: mirror half of the pictures.
        caption_aware: no colour change where the caption names a colour, no mirroring where it names a side
            (English words).
    """

    def __init__(
        self,
        spec: InputSpec,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        randaugment: tuple[int, int] | None = (2, 7),
        colour: bool = True,
        flip: bool = True,
        caption_aware: bool = True,
    ) -> None:
        self.flip, self.colour, self.caption_aware = flip, colour, caption_aware
        self._crop = v2.RandomResizedCrop(spec.image_size, crop_scale, interpolation=BICUBIC, antialias=True)
        self._mirror = v2.RandomHorizontalFlip()
        self._any, self._geometric = _randaugment(spec, randaugment)
        self._tensor = _to_tensor(spec)

    def __call__(self, image: Image.Image, caption: str = "") -> Tensor:
        """Turn an RGB picture into a normalised float tensor (3, image_size, image_size)."""
        image = self._crop(image)
        if self.flip and not (self.caption_aware and names_side(caption)):
            image = self._mirror(image)
        keep_colour = not self.colour or (self.caption_aware and names_colour(caption))
        image = self._geometric(image) if keep_colour else self._any(image)
        return self._tensor(image)


def _randaugment(spec: InputSpec, setting: tuple[int, int] | None) -> tuple[v2.Transform, v2.Transform]:
    """With and without colour operations; what moves in from outside has the mean colour."""
    if setting is None:
        return v2.Identity(), v2.Identity()
    number, magnitude = setting
    fill = [round(255 * mean) for mean in spec.mean]
    settings: dict[str, Any] = {"num_ops": number, "magnitude": magnitude, "fill": fill}
    settings["interpolation"] = v2.InterpolationMode.BILINEAR
    return v2.RandAugment(**settings), GeometricRandAugment(**settings)


def _to_tensor(spec: InputSpec) -> v2.Transform:
    scale = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.PILToTensor(), scale, v2.Normalize(list(spec.mean), list(spec.std))])


class EvalTransform:
    """Resize to image_size x image_size (bicubic, the whole picture, proportions not kept) and normalise.

    No crop: a caption may speak of the border (ALBEF's convention).
    """

    def __init__(self, spec: InputSpec) -> None:
        self._resize = v2.Resize((spec.image_size, spec.image_size), interpolation=BICUBIC, antialias=True)
        self._tensor = _to_tensor(spec)

    def __call__(self, image: Image.Image, caption: str = "") -> Tensor:
        """Turn an RGB picture into a normalised float tensor (3, image_size, image_size); no randomness."""
        return self._tensor(self._resize(image))


def train_transform(
    spec: InputSpec,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    randaugment: tuple[int, int] | None = (2, 7),
    colour: bool = True,
    flip: bool = True,
    caption_aware: bool = True,
    augment: bool = True,
) -> Callable[..., Tensor]:
    """What training applies: `TrainTransform`, or only the resizing where `augment` is false."""
    if not augment:
        return EvalTransform(spec)
    return TrainTransform(spec, crop_scale, randaugment, colour, flip, caption_aware)


def eval_transform(spec: InputSpec) -> EvalTransform:
    """What evaluation applies."""
    return EvalTransform(spec)
