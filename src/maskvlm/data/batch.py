"""The interface between data and model: `InputSpec` goes in, `Batch` comes out.

Shapes: B images, C captions (training: `PairData(captions)` per image; evaluation: all captions of each image, C >= B),
T tokens, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, cast

from PIL import Image

from maskvlm.utils.errors import ExitCode, UserError

# Preparing a data set needs rows but not torch, whose import takes seconds.
if TYPE_CHECKING:
    from torch import Tensor


# A NamedTuple: jsonargparse cannot link a dataclass to a required argument.
class InputSpec(NamedTuple):
    """Properties of the inputs that the encoders know and the data module needs, so that no YAML repeats them.

    `tokenizer` is None if the text encoder starts without one: the data module then trains one with at most
    `vocab_size` entries on its training captions, which the model adopts.
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
        image_BCHW: RGB images: uint8 as loaded, normalised floats once `PairData` has them on the device.
        token_CT: token ids, padded to the longest caption of the batch.
        attention_CT: True for tokens, False for padding.
        special_CT: True for start, end and padding, which are never masked.
        word_CT: index of the word a token belongs to, -1 on specials; for whole-word masking.
        owner_C: row of the caption's image in image_BCHW.
        image_id_B: 63-bit hash of the image's id; rows with the same id show the same image.
        text_id_C: 63-bit hash of the cleaned caption in lower case; rows with the same id have the same text, ignoring
            case.
        valid_B: False if the sample could not be read: a blank placeholder with weight 0 that keeps its place.
        index_B: the sample's position in the data set.
        mirrored_B: True if the image was mirrored; None if the data show every image in one version only, or in more
            than the two (`PairData(augment)`).
        foreground_BHW: True for pixels of objects, if the source knows them; for evaluation.
        problems: (reason, message) of each sample that could not be read or had to be repaired.
        texts: the C cleaned captions, for predictions.
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
    mirrored_B: Tensor | None = None

    @property
    def feature_row_B(self) -> Tensor:
        """The row of each image in a cache of features, [B]; see `feature_rows`."""
        return feature_rows(self.index_B, self.valid_B, self.mirrored_B)


def feature_rows(index_B: Tensor, valid_B: Tensor, mirrored_B: Tensor | None) -> Tensor:
    """Rows in a cache of features (`model/features.py`), [B], from the fields of `Batch` of the same names. If images
    are mirrored, a sample has two rows next to each other. -1 for a sample that could not be read: its image is blank,
    so nothing may be stored for it."""
    row_B = index_B if mirrored_B is None else 2 * index_B + mirrored_B
    return row_B.masked_fill(~valid_B, -1)


class Row(TypedDict):
    """One image with its captions, as returned by a source.

    `image` is encoded bytes, a path, or a Pillow image; `origin` names the row in error messages
    (`dataset_flickr8k.json image 12 (123.jpg)`).
    """

    image: bytes | str | Image.Image
    captions: list[str]
    image_id: str
    origin: str


def check_row(row: Any, index: int) -> Row:
    """A row of a source, which may be of another package and give anything.

    Args:
        index: its place in the split, for the message if it has no origin.

    Raises:
        UserError: a field is missing, the captions are no list of texts, or the image's id is no text (65).
    """
    where = f"row {index}"
    if not is_record(row):
        todo = "Let __getitem__ of the split return a maskvlm.data.batch.Row"
        raise UserError(where, f"is a {type(row).__name__}", todo, ExitCode.BAD_DATA)
    if "origin" in row and isinstance(row["origin"], str):
        where = row["origin"]
    if missing := [key for key in Row.__annotations__ if key not in row]:
        todo = "Give every field of maskvlm.data.batch.Row"
        raise UserError(where, f"the row has no {', '.join(missing)}", todo, ExitCode.BAD_DATA)
    captions = row["captions"]
    # One text would be taken for a list of letters.
    if not is_sequence(captions) or not all(isinstance(text, str) for text in captions):
        raise UserError(where, f"captions is {captions!r:.60}", "Give a list of texts", ExitCode.BAD_DATA)
    for key in ("image_id", "origin"):
        if not isinstance(row[key], str):
            raise UserError(where, f"{key} is {row[key]!r:.60}", "Give a text", ExitCode.BAD_DATA)
    if isinstance(captions, list | tuple):
        return cast(Row, row)
    # An array of several texts has no truth value, for which readers ask.
    return cast(Row, {**row, "captions": list(captions)})


def is_record(value: object) -> bool:
    """Whether it has values by name: a dict, another mapping, or a row of a table."""
    return hasattr(value, "keys") and hasattr(value, "__getitem__")


def is_sequence(value: object) -> bool:
    """Whether it has several values in an order: a list, a tuple, an array, but not a text or bytes."""
    ordered = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "keys")
    return ordered and not isinstance(value, str | bytes | bytearray | memoryview)


class Pairs(Protocol):
    """One split of a data set: rows by index. `fingerprint` changes when the content does.

    A split that knows where its objects are may also offer `object_mask(index, size)`, a boolean array
    [size, size]; masked-pixel errors are then also measured over object pixels only. A split that knows its images'
    ids without opening them offers `image_ids()`: the ids that a checkpoint has seen are stored with it.
    """

    @property
    def fingerprint(self) -> str:
        """A hash of the content, which does not depend on paths or dates."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class Source(ABC):
    """A data set: the interface of a reader. A new data set is one subclass and one YAML file that names it."""

    @abstractmethod
    def split(self, name: str) -> Pairs:
        """The pairs of `train`, `val` or `test`."""
