"""Converts user inputs, images in any form and texts, to encoder inputs: the inference side of `data/`.

Shapes: B images, C texts, T tokens, H and W pixels.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import BytesIO, IOBase, TextIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskvlm.config.safe_yaml import cut
from maskvlm.data.caption_text import clean_caption
from maskvlm.data.images import IMAGE_SUFFIXES, BadImage, safe_open
from maskvlm.data.text import Captioner, CaptionTokens
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.write_errors import write_output

ImageInput = str | Path | bytes | bytearray | memoryview | IOBase | Image.Image | np.ndarray[Any, Any] | Tensor
"""A path, encoded bytes, an open file, a Pillow image, an array [H, W, 3] or [H, W], or a tensor [3, H, W]: 8-bit
integers, or floats from 0 to 1."""

SUFFIXES = tuple(sorted(IMAGE_SUFFIXES))
"""File extensions by which a string is taken for an image."""

MASK = "[MASK]"
"""How users write a masked word, whatever the tokenizer calls it."""


def as_list(value: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether it was a single one; arrays and tensors with four dimensions are lists."""
    if isinstance(value, list | tuple) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 4):
        return [read_once(each) for each in value], False
    return [read_once(value)], True


def read_once(value: Any) -> Any:
    """The content of an open file, which can only be read once. Anything else is returned as is, and so is a file that
    cannot be read: `open_image` says which one it is."""
    if isinstance(value, IOBase) and not isinstance(value, TextIOBase):
        with suppress(OSError, ValueError):
            return value.read()
    return value


def listed_hint(value: object) -> str:
    """What to do besides, if a value that was taken for a single input may hold several: a pandas Series, an array of
    strings, a generator, a set."""
    single = isinstance(value, str | bytes | list | tuple | Mapping) or hasattr(value, "read")
    # A table's list(...) would be the names of its columns.
    listed = isinstance(value, Iterable) and not single and getattr(value, "ndim", 1) == 1
    return "; give several as list(...)" if listed else ""


def is_image(value: object) -> bool:
    """Whether this is an image rather than a text; a string is an image if it names a file."""
    # Not Path.is_file, which raises if a text is longer than a name may be.
    return not isinstance(value, str) or os.path.isfile(value)


def open_image(image: ImageInput, name: str = "image") -> Image.Image:
    """Open an image as upright 8-bit RGB.

    Raises:
        BadImage: it is missing (66), cannot be read (74), or is not an image, damaged or too large (65).
        UserError: an array or tensor has another shape, type or range or no pixels, a file is open in text mode, or it
            is something else that is not an image (2).
    """
    if isinstance(image, Tensor | np.ndarray):
        return Image.fromarray(_eight_bits(image, name))
    # a path names itself in errors
    if isinstance(image, str | Path):
        if not str(image):
            raise UserError(name, "its path is empty", "Name a file")
        image, name = str(image), str(image)
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if isinstance(image, TextIOBase):
        raise UserError(name, "a file opened in text mode", "Open it with 'rb'")
    if isinstance(image, IOBase):
        try:
            image = image.read()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            todo = "Open it with 'rb', and close it later"
            raise BadImage(name, "unreadable", str(error).rstrip("."), todo) from error
    # everything else has become one of these by now
    if not isinstance(image, str | bytes | Image.Image):
        todo = f"Give a path, encoded bytes, a Pillow image, an array or a tensor{listed_hint(image)}"
        raise UserError(name, f"{type(image).__name__} is not an image", todo)
    try:
        return safe_open(image, name)
    except BadImage as bad:
        if bad.reason == "missing" and isinstance(image, str) and looks_like_text(image):
            todo = "It looks like a text: give the image in its place"
            raise BadImage(bad.where, bad.reason, bad.detail, todo) from bad
        raise bad.without_row() from bad


def looks_like_text(name: str) -> bool:
    """Whether this is surely no path of an image: it has several words, and neither a folder nor a suffix."""
    return len(name.split()) > 1 and not os.path.dirname(name) and not Path(name).suffix


def save_image(image: Image.Image, path: Path) -> str:
    """Write an image in the format given by the file extension, and return the path.

    Raises:
        UserError: the format does not support it (2), it cannot be written (73), or the disk is full (74).
    """
    content = BytesIO()
    try:
        # In memory first, as an encoder that writes to a file does not report a full disk.
        image.save(content, Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(path, f"cannot be written ({error})", "Name another file, such as out.png") from error
    write_output(path, content.getvalue())
    return str(path)


def _eight_bits(image: Tensor | np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    is_tensor = isinstance(image, Tensor)
    # `float`: numpy has no bfloat16
    array = image.detach().float().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    integers = not image.is_floating_point() if isinstance(image, Tensor) else array.dtype.kind in "iub"
    if array.dtype.kind not in "uifb":
        todo = f"Give 8-bit integers from 0 to 255, or floats from 0 to 1{listed_hint(image)}"
        raise UserError(name, f"array of {array.dtype}", todo)
    if image.dtype in (bool, torch.bool):
        array, integers = array * np.float32(1), False  # true is white, as in Pillow
    shape, wanted = list(array.shape), "[3, H, W]" if is_tensor else "[H, W, 3]"
    if array.ndim == 2:
        # (H, W) -> (H, W, 3)
        array = np.repeat(array[..., None], 3, 2)
    elif is_tensor and array.ndim == 3:
        # (3, H, W) -> (H, W, 3)
        array = array.transpose(1, 2, 0)
    kind = "tensor" if is_tensor else "array"
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise UserError(name, f"{kind} of shape {shape}", f"Give {wanted} or [H, W]")
    if array.size == 0:
        raise UserError(name, f"{kind} of shape {shape} has no pixels", f"Give {wanted} or [H, W] with some")
    # (H, W, 1) -> (H, W, 3)
    array = np.repeat(array, 3, 2) if array.shape[2] == 1 else array
    top = 255 if integers else 1
    # rejects normalised floats, which have negative values and would look like noise
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > top:
        what = f"numbers from {array.min():.3g} to {array.max():.3g}"
        raise UserError(name, what, "Give 8-bit integers from 0 to 255, or floats from 0 to 1; not normalised")
    return np.rint(array.astype(np.float32) * (1 if integers else 255)).astype(np.uint8)


def check_absent(values: Iterable[object]) -> None:
    """Raise UserError if a string looks like the name of an image file that does not exist (66)."""
    for each in values:
        if isinstance(each, str) and Path(each).suffix.lower() in SUFFIXES and not is_image(each):
            raise UserError(each, "no such file", "Check the path", ExitCode.MISSING_INPUT)


def check_whole(method: str, name: str, value: object, least: int) -> None:
    """Raise UserError unless a value is an integer of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise UserError(method, f"{name} is {value!r}"[:80], f"Give a whole number, {least} or more")


def check_no_name(text: str, name: str) -> None:
    """Raise UserError, which calls it `name`, if a text is one word with the suffix of an image. Whether there is such
    a file is not looked up: the text may be a stranger's, who would learn it."""
    if len(text.split()) == 1 and Path(text.strip()).suffix.lower() in SUFFIXES:
        what = f"'{cut(text, 300)}' is the name of an image, not a text"
        raise UserError(name, what, "Give it as the image, and a text in its place")


def check_text(value: object, name: str = "text") -> str:
    """Clean a text. Raises UserError, which calls it `name`, if it is not a string or has no word in it."""
    if not isinstance(value, str):
        todo = f"Give a string, or a list of strings{listed_hint(value)}"
        raise UserError(name, f"{type(value).__name__} is not text", todo)
    text = clean_caption(value)[0]
    if not text:
        raise UserError(name, "it has no words", "Write one")
    return text


class MarkedTexts:
    """Turns texts into tokens, with [MASK] standing for a masked word.

    Args:
        tokenizer, text_length: of the model.
    """

    def __init__(self, tokenizer: Any, text_length: int) -> None:
        self.tokenizer, self.text_length = tokenizer, text_length
        self.captioner = Captioner(tokenizer, text_length)

    def __call__(self, texts: list[str]) -> CaptionTokens:
        """Tokenize C texts as in training."""
        return self.captioner([check_text(text) for text in texts])

    def masked(self, text: str) -> Tensor:
        """Ids of one text, [T], with the mask token's id for each [MASK] (or the tokenizer's own mask token).

        Raises:
            UserError: no word is masked, or a masked word is beyond the model's text length.
        """
        pieces = self.between_masks(check_text(text))
        if len(pieces) == 1:
            raise UserError(f"text '{cut(text, 60)}'", "no word in it is masked", f"Replace one with {MASK}")
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1
            ids += self.captioner.inner(piece if last else piece.rstrip())  # as RoBERTa's, whose mask token takes it
            ids += [] if last else [int(self.tokenizer.mask_token_id)]
        start, end = self.ends
        if len(ids) + 2 > self.text_length:
            ids = ids[: self.text_length - 2]
            # a mask that is cut off would silently go unanswered
            if ids.count(int(self.tokenizer.mask_token_id)) < len(pieces) - 1:
                what = f"a masked word is beyond the {self.text_length - 2} tokens that the model reads"
                raise UserError("text", what, "Shorten it")
        return torch.tensor([start, *ids, end])

    def between_masks(self, text: str) -> list[str]:
        """The parts of a text between its masked words: one more than there are masked words."""
        return text.replace(str(self.tokenizer.mask_token), MASK).split(MASK)

    def count(self, text: str) -> int:
        """Number of tokens of a text, start and end included, however many the model reads."""
        pieces = self.between_masks(clean_caption(text)[0])
        return sum(map(self.captioner.count, pieces)) + len(pieces) - 1 + len(self.ends)

    def unknown_words(self, text: str) -> list[str]:
        """Words and signs of a text unknown to the tokenizer, within the text length; masked words do not count."""
        words, room = list[str](), self.text_length - len(self.ends)
        # as `masked`
        for piece in self.between_masks(clean_caption(text)[0]):
            words += self.captioner.unknown_words(piece, max(0, room), signs=True)
            # a masked word is a token too
            room -= len(self.captioner.inner(piece)) + 1
        return words

    @property
    def ends(self) -> tuple[int, int]:
        """Ids of the start and end tokens."""
        # taken from a tokenized text, as some tokenizers call them cls and sep, others bos and eos
        token = self.captioner(["a"]).token_CT[0].tolist()
        return token[0], token[-1]

    def decode(self, ids: list[int]) -> str:
        """Tokens as text, without special tokens (start, end, padding, mask and unknown)."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return re.sub(r" +(?=[,.:;!?])", "", text)  # WordPiece puts a space before each
