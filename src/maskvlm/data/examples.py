"""Examples of downstream tasks: a text about one or several images, and the expected answer.

A question about a photo, a sentence about two, a hypothesis: one interface for all. Sources live with the tasks.

Shapes: B examples, P images per example, T tokens, K labels, A answers of all examples, H and W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from os import PathLike
from typing import Any, NamedTuple, Protocol, TypedDict, cast

import torch
from PIL import Image
from torch import Tensor

from maskvlm.data.batch import feature_rows, is_record, is_sequence
from maskvlm.data.text import CaptionTokens
from maskvlm.utils.errors import ExitCode, UserError


class Example(TypedDict):
    """One text about images, as returned by a source.

    Attributes:
        images: encoded bytes, a path, or a Pillow image each; the same number in every example of a source.
        image_ids: ids of the images; the same photo has the same id in every data set (`coco 458752`).
        text: question, sentence or hypothesis.
        answers: human answers: one label in most tasks, ten in VQA v2; empty if not published.
        id: the data set's own id (question_id, identifier, pairID), unique in its split; stored with predictions.
        kind: question type or "": metrics are also given by kind.
        group: shared by examples with the same sentence (NLVR's consistency), else "".
        origin: names the row in error messages: file, and line or position.
    """

    images: list[bytes | str | Image.Image]
    image_ids: list[str]
    text: str
    answers: list[str]
    id: str
    kind: str
    group: str
    origin: str


class Examples(Protocol):
    """One split: examples by index. `skipped`: reason -> places of the rows that were left out or repaired."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content, which does not depend on paths or dates."""
        ...

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Reason -> places of the rows that were left out or repaired."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def image_ids(self) -> Iterator[str]:
        """Ids of all its images, each at least once, without opening them."""
        ...


class ExampleSource(ABC):
    """A data set of a downstream task; a new one is a subclass and a YAML file that names it."""

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """The classes of the head, in the order of its outputs; known before any image is read."""

    @abstractmethod
    def split(self, name: str) -> Examples:
        """The examples of `train`, `val` or `test`."""

    def targets(self, answers: list[str]) -> dict[str, float]:
        """Label -> weight in the loss, 0 to 1. Usually one label; VQA's ten answers give several."""
        # an example without an answer has no target: {}
        return dict.fromkeys(answers[:1], 1.0)

    def shares(self, answers: list[str]) -> dict[str, float]:
        """The same for a head that generates answers, which normalises the weights to sum to 1: the share of people who
        gave each answer, if that differs from its score."""
        return self.targets(answers)


def read_example(examples: Examples, index: int) -> Example:
    """The example at an index, checked. Raises UserError as `check_example`."""
    return check_example(examples[index], index)


def check_example(example: Any, index: int) -> Example:
    """An example of a source, which may be of another package and give anything.

    Args:
        index: its place in the split, for the message if it has no origin.

    Raises:
        UserError: a field is missing, or is not what `Example` says (65).
    """
    where = f"example {index}"
    if not is_record(example):
        todo = "Let __getitem__ of the split return a maskvlm.data.examples.Example"
        raise UserError(where, f"is a {type(example).__name__}", todo, ExitCode.BAD_DATA)
    if "origin" in example and isinstance(example["origin"], str):
        where = example["origin"]
    missing = [key for key in Example.__annotations__ if key not in example]
    if missing:
        todo = "Give every field of maskvlm.data.examples.Example; kind and group may be ''"
        raise UserError(where, f"the example has no {', '.join(missing)}", todo, ExitCode.BAD_DATA)
    # What else is read as text is only written to files, where any plain value does.
    for key in ("text", "origin"):
        if not isinstance(example[key], str):
            raise UserError(where, f"{key} is {_shown(example[key])}", "Give a text", ExitCode.BAD_DATA)
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "images": ((bytes, str, PathLike, Image.Image), "bytes, paths or Pillow images"),
        "image_ids": ((str,), "texts"),
        "answers": ((str,), "texts, such as ['3']; a task may read numbers from them"),
    }
    for key, (types, expected) in kinds.items():
        parts = example[key]
        wrong = [one for one in parts if not isinstance(one, types)] if is_sequence(parts) else [parts]
        if wrong:
            inside = "is" if wrong[0] is parts else "holds"
            todo = f"Give a list of {expected}"
            raise UserError(where, f"{key} {inside} {_shown(wrong[0])}", todo, ExitCode.BAD_DATA)
    images, ids = len(example["images"]), len(example["image_ids"])
    if images != ids or not images:
        what = f"the example has {images} images and {ids} image_ids"
        raise UserError(where, what, "Give at least one image, and an id for each", ExitCode.BAD_DATA)
    others = {key: list(example[key]) for key in kinds if not isinstance(example[key], list | tuple)}
    return cast(Example, {**example, **others} if others else example)


def _shown(value: object) -> str:
    """A value of a wrong type in a message."""
    return f"a {type(value).__name__} ({value!r:.40})" if isinstance(value, str | int | float) else type(value).__name__


class AnswerTokens(NamedTuple):
    """All target answers of a batch as tokens. owner_A: row of the example; weight_A: weight of the target."""

    token_AT: Tensor
    attention_AT: Tensor
    owner_A: Tensor
    weight_A: Tensor


class ExampleBatch(NamedTuple):
    """Examples ready for the encoders.

    Attributes:
        image_BPCHW: RGB images: uint8 as loaded, normalised floats once `PairData` has them on the device.
        token_BT, attention_BT, special_BT, word_BT: of the texts, as in `Batch`.
        target_BK: weight of each label.
        valid_B: False if an image could not be read or the text has no words: a blank row with weight 0 that keeps its
            place.
        index_B: position in the split.
        image_id_BP: 63-bit hashes of the image ids.
        answers: the target answers as tokens.
        examples: the examples as the source returned them, without their images.
        problems: (reason, message) of samples that could not be read or had to be repaired.
        mirrored_B: True if the example's images were mirrored, all of them; otherwise as in `Batch`.
    """

    image_BPCHW: Tensor
    # these four in the order of `CaptionTokens`, which is unpacked here
    token_BT: Tensor
    attention_BT: Tensor
    special_BT: Tensor
    word_BT: Tensor
    target_BK: Tensor
    valid_B: Tensor
    index_B: Tensor
    image_id_BP: Tensor
    answers: AnswerTokens
    examples: tuple[Example, ...]
    problems: tuple[tuple[str, str], ...] = ()
    mirrored_B: Tensor | None = None

    @property
    def feature_row_B(self) -> Tensor:
        """The row of each example in a cache of features, [B]; see `feature_rows`."""
        return feature_rows(self.index_B, self.valid_B, self.mirrored_B)


def question_batch(image_BPCHW: Tensor, text: CaptionTokens) -> ExampleBatch:
    """A batch of questions for inference, without targets or real ids."""
    rows, images = image_BPCHW.shape[:2]
    number_B = torch.arange(rows, device=image_BPCHW.device)
    # empty tensors on the device of the images: no answers, A = 0
    none = number_B[:0]
    # (0, 0) tokens, (0,) owners and weights
    nothing = AnswerTokens(none.new_zeros(0, 0), none.new_zeros(0, 0).bool(), none, image_BPCHW.new_zeros(0))
    # K = 0 labels
    target_BK, valid_B = image_BPCHW.new_zeros(rows, 0), torch.ones_like(number_B, dtype=torch.bool)
    # all images of a question share its number
    ids_BP = number_B[:, None].expand(rows, images)
    return ExampleBatch(image_BPCHW, *text, target_BK, valid_B, number_B, ids_BP, nothing, ())
