"""What the data side and the model side agree on: `InputSpec` going in, `Batch` coming out.

Shapes: B images, C captions (training: as many of each image as `PairData(captions)` says; evaluation: all captions of
each image, C >= B), T tokens, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

from PIL import Image

# Preparing a data set needs rows, and no torch, whose import takes seconds.
if TYPE_CHECKING:
    from torch import Tensor


# A NamedTuple: jsonargparse cannot link a dataclass to a required argument.
class InputSpec(NamedTuple):
    """Facts about inputs that the encoders know and the data module needs; no YAML repeats them.

    `tokenizer` is None where the text encoder starts without one: the data module then trains one of at
    most `vocab_size` entries on its training captions, and the model takes it over.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    text_length: int
    vocab_size: int
    tokenizer: Any | None = None


class Batch(NamedTuple):
    """Images and captions, ready for the encoders; masking happens later, on the device.

    Attributes:
        image_BCHW: RGB: bytes as loaded, normalised floats once `PairData` has them on the device.
        token_CT: token ids, padded to the longest caption of the batch.
        attention_CT: True on tokens, False on padding.
        special_CT: True on start, end and padding: never masked.
        word_CT: index of the word a token belongs to, -1 on specials; for whole-word masking.
        owner_C: row of the caption's image in image_BCHW.
        image_id_B: 63-bit hash of the image's id; rows with the same id show the same image.
        text_id_C: 63-bit hash of the cleaned caption; rows with the same id say the same.
        valid_B: False where the sample could not be read: a hole that keeps its place, blank, with weight 0.
        index_B: the sample's position in the data set.
        foreground_BHW: True on pixels of objects, where the source knows them; for evaluation.
        problems: (reason, message) of each sample that could not be read or had to be mended.
        texts: the cleaned captions, C of them, for predictions.
    """

    image_BCHW: Tensor
    # these four in the order of `CaptionTokens`, which is unpacked here
    token_CT: Tensor
    attention_CT: Tensor
    special_CT: Tensor
    word_CT: Tensor
    owner_C: Tensor
    image_id_B: Tensor
    text_id_C: Tensor
    valid_B: Tensor
    index_B: Tensor
    foreground_BHW: Tensor | None = None
    problems: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()


class Row(TypedDict):
    """One image with its captions, as a source hands it out.

    `image` is encoded bytes, a path, or a Pillow image; `origin` names the row in error messages
    (`dataset_flickr8k.json image 12 (123.jpg)`).
    """

    image: bytes | str | Image.Image
    captions: list[str]
    image_id: str
    origin: str


class Pairs(Protocol):
    """One split of a data set: rows by index. `fingerprint` changes when the content does.

    A split that knows where its objects are may also offer `object_mask(index, size)`, a boolean array
    [size, size]; masked-pixel errors are then measured over object pixels alone, too. One that knows its images'
    ids without opening them offers `image_ids()`: the ids that a checkpoint has seen are kept with it.
    """

    @property
    def fingerprint(self) -> str:
        """Another text for another content; no path or date is in it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class Source(ABC):
    """A data set: what a reader must offer. A new data set is one subclass and one YAML that names it."""

    @abstractmethod
    def split(self, name: str) -> Pairs:
        """The pairs of `train`, `val` or `test`."""
