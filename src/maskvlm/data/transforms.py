"""Images to tensors: augmentation for training, plain resizing for evaluation (torchvision v2).

All randomness comes from torch's global generator, so a seed per sample fixes the image.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from maskvlm.data.batch import InputSpec
from maskvlm.utils.errors import UserError

BICUBIC = v2.InterpolationMode.BICUBIC
Augment = bool | Literal["mirror"]
"""What happens to a training image before it is a tensor, see `PairData(augment)`."""
SQUAREST = 3 / 4  # crops are from 3:4 to 4:3

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
    """Whether an English caption mentions colour or brightness; changing them would make it untrue."""
    return _COLOUR_WORDS.search(caption) is not None


def names_side(caption: str) -> bool:
    """Whether an English caption mentions left or right; mirroring the image would make it untrue."""
    return _SIDE_WORDS.search(caption) is not None


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment, with the same result in less time: it translates by whole pixels, for which
    interpolation changes nothing and takes 1.7 ms instead of 0.1 (224 pixels)."""

    def _apply_image_or_video_transform(
        self, image: Any, transform_id: str, magnitude: float, interpolation: Any, fill: Any
    ) -> Any:
        # torchvision itself truncates the distance to an integer
        if transform_id in ("TranslateX", "TranslateY"):
            interpolation = v2.InterpolationMode.NEAREST
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, interpolation, fill)


class GeometricRandAugment(RandAugment):
    """RandAugment without the operations that change colours, contrast or brightness."""

    _AUGMENTATION_SPACE = {
        name: operation
        for name, operation in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name in ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Sharpness")
    }


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's RandomResizedCrop, with its own bicubic resizing of uint8 instead of Pillow's: 0.3 ms instead of
    0.75 (to 224 pixels). The crops are the same; 2 % of the values differ, by one or two levels of 255."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        left, top, width, height = (params[name] for name in ("left", "top", "width", "height"))
        # left, top, right, bottom
        crop = inpt.crop((left, top, left + width, top + height))
        pixels = torch.frombuffer(bytearray(crop.tobytes("raw", "RGBX")), dtype=torch.uint8)  # four bands are faster
        # (H*W*4,) -> (1, 4, H, W), a view in channels-last memory
        image_BCHW = pixels.view(1, height, width, 4).permute(0, 3, 1, 2)
        image_BCHW = interpolate(image_BCHW, self.size, mode="bicubic", antialias=True)
        # (1, 4, H, W) -> (H, W, 4); reading as RGBX drops the fourth band
        pixels_HWC = image_BCHW[0].permute(1, 2, 0).contiguous().numpy()
        return Image.frombytes("RGB", (self.size[1], self.size[0]), pixels_HWC.tobytes(), "raw", "RGBX")


def check_augmentation(
    crop_scale: tuple[float, float], randaugment: tuple[int, int] | None, flip: bool, augment: Augment
) -> None:
    """Raise UserError for invalid settings of `train_transform`."""
    if augment not in (True, False, "mirror"):
        raise UserError("data.augment", f"{augment!r:.40} is none of its values", "Give true, false or mirror")
    if augment == "mirror" and not flip:
        todo = "Set data.augment false, or leave out data.flip"
        raise UserError("data.flip", "false, but data.augment is mirror", todo)
    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise UserError("data.crop_scale", f"[{low}, {high}] are not shares of an image", "Give 0 < low <= high <= 1")
    if randaugment is not None and (randaugment[0] < 0 or not 0 <= randaugment[1] <= 30):
        what = f"[{randaugment[0]}, {randaugment[1]}] are not a number of operations and a magnitude"
        raise UserError("data.randaugment", what, "Give 0 or more operations and a magnitude of 0 to 30, or null")


class TrainTransform:
    """Augments an image without making its caption untrue.

    Random resized crop, mirror, RandAugment, normalise: the order and the defaults of ALBEF's pre-training,
    the field's baseline; the paper names crop and RandAugment.

    Args:
        spec: size, mean and standard deviation from the encoder.
        crop_scale: minimum and maximum share of the image's area that a crop keeps.
        randaugment: number of operations and magnitude (0 to 30), or None for none.
        colour: whether RandAugment may change colours.
        flip: mirror half of the images.
        caption_aware: do not change colours if the caption names a colour, nor mirror if it names a side (English
            words).
        normalise: return normalised floats; otherwise uint8.

    Attributes:
        least: sufficient length of an image's shorter side in pixels: every crop then has at least as many pixels as
            the tensor. A JPEG that has it at half its size or less may be decoded at that size (`safe_open`).
    """

    def __init__(
        self,
        spec: InputSpec,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        randaugment: tuple[int, int] | None = (2, 7),
        colour: bool = True,
        flip: bool = True,
        caption_aware: bool = True,
        normalise: bool = True,
    ) -> None:
        self.flip, self.colour, self.caption_aware = flip, colour, caption_aware
        self._crop = RandomResizedCrop(spec.image_size, crop_scale)
        self._mirror = v2.RandomHorizontalFlip()
        self._any, self._geometric = _randaugment(spec, randaugment)
        self._tensor = ToTensor(spec, normalise)
        # for a square image with this side, the smallest crop at 3:4 is image_size wide
        self.least = math.ceil(spec.image_size / math.sqrt(crop_scale[0] * SQUAREST))

    def __call__(self, image: Image.Image, caption: str = "") -> Tensor:
        """Turn an RGB image into a tensor (3, image_size, image_size)."""
        image = self._crop(image)
        # mirrored, "on the left" would be untrue
        if self.flip and not (self.caption_aware and names_side(caption)):
            image = self._mirror(image)
        # no operation that changes colours if one is named
        keep_colour = not self.colour or (self.caption_aware and names_colour(caption))
        return self._tensor(self._geometric(image) if keep_colour else self._any(image))


class Mirroring:
    """Draws whether to mirror an image: half of them, but none whose text names a side if `caption_aware`.

    With nothing else changed, an image has two versions, and features of both can be cached, which
    `torchvision.transforms.v2.RandomHorizontalFlip` does not allow: it does not tell which version it returns.
    """

    def __init__(self, caption_aware: bool = True) -> None:
        self.caption_aware = caption_aware

    def draw(self, text: str) -> bool:
        """Whether to mirror the image of this text; one number from torch's generator, whatever the text."""
        drawn = bool(torch.rand(()) < 0.5)
        return drawn and not (self.caption_aware and names_side(text))


def mirror(image: Tensor) -> Tensor:
    """The mirrored image or images, (..., H, W)."""
    mirrored: Tensor = v2.functional.horizontal_flip(image)
    return mirrored


def _randaugment(spec: InputSpec, setting: tuple[int, int] | None) -> tuple[v2.Transform, v2.Transform]:
    """RandAugment with and without colour operations; pixels from outside the image get the mean colour."""
    if setting is None:
        return v2.Identity(), v2.Identity()
    number, magnitude = setting
    # zero after normalising
    fill = [round(255 * mean) for mean in spec.mean]
    settings: dict[str, Any] = {"num_ops": number, "magnitude": magnitude, "fill": fill}
    settings["interpolation"] = v2.InterpolationMode.BILINEAR
    return RandAugment(**settings), GeometricRandAugment(**settings)


class Normalise:
    """Turns 8-bit pixels into normalised floats on their device, bit for bit like ToDtype(scale=True) and Normalize.
    torchvision's Normalize copies mean and deviation to the device at each call, and waits for it."""

    def __init__(self, spec: InputSpec) -> None:
        self._mean_C11, self._std_C11 = (torch.tensor(value)[:, None, None] for value in (spec.mean, spec.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels, (..., 3, H, W)."""
        # copied once: does nothing if they are already on the device
        self._mean_C11, self._std_C11 = self._mean_C11.to(pixels.device), self._std_C11.to(pixels.device)
        return pixels.float().mul_(1 / 255).sub_(self._mean_C11).div_(self._std_C11)


class ToTensor:
    """Turns an RGB image into a tensor (3, H, W): normalised floats, or uint8."""

    def __init__(self, spec: InputSpec, normalise: bool = True) -> None:
        self._normalise = Normalise(spec) if normalise else None

    def __call__(self, image: Image.Image) -> Tensor:
        # torchvision returns a view of (H, W, 3)
        pixels_CHW: Tensor = v2.functional.pil_to_tensor(image).contiguous()
        return pixels_CHW if self._normalise is None else self._normalise(pixels_CHW)


class EvalTransform:
    """Resizes to image_size x image_size (bicubic, the whole image, aspect ratio not kept), as normalised floats or
    uint8.

    No crop, as a caption may mention the border (ALBEF's convention).
    """

    def __init__(self, spec: InputSpec, normalise: bool = True) -> None:
        self._resize = v2.Resize((spec.image_size, spec.image_size), interpolation=BICUBIC, antialias=True)
        self._tensor = ToTensor(spec, normalise)

    def __call__(self, image: Image.Image, caption: str = "") -> Tensor:
        """Turn an RGB image into a tensor (3, image_size, image_size); no randomness."""
        return self._tensor(self._resize(image))


def train_transform(
    spec: InputSpec,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    randaugment: tuple[int, int] | None = (2, 7),
    colour: bool = True,
    flip: bool = True,
    caption_aware: bool = True,
    augment: Augment = True,
    normalise: bool = True,
) -> Callable[..., Tensor]:
    """The transform for training: `TrainTransform` if `augment` is true, otherwise only resizing. With `mirror`, the
    data set mirrors the result, see `Mirroring`."""
    if augment == "mirror" or not augment:
        return EvalTransform(spec, normalise)
    return TrainTransform(spec, crop_scale, randaugment, colour, flip, caption_aware, normalise)


def eval_transform(spec: InputSpec, normalise: bool = True) -> EvalTransform:
    """The transform for evaluation."""
    return EvalTransform(spec, normalise)
