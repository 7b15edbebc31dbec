"""What a method needs of a loaded model, so that tasks can bring methods of their own."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from maskvlm.data.inputs import MarkedTexts
from maskvlm.data.text import CaptionTokens
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.task import Task


class Model(Protocol):
    """What methods need of a loaded model: the backbone, the heads it has, and its inputs as tensors."""

    backbone: MaskVLM
    task: Task
    batch_size: int

    @property
    def words(self) -> MarkedTexts:
        """Texts to tokens and back."""
        ...

    def pixels(self, images: Sequence[Any], numbers: Sequence[int] | None = None) -> Tensor:
        """Normalised [B, 3, H, W] on the model's device, in its precision. numbers: what errors call images that have
        no name, 1 to B if left out."""
        ...

    def tokens(self, texts: Sequence[str]) -> CaptionTokens:
        """Token ids and masks of the texts, on the model's device."""
        ...

    def head(self, name: str, method: str) -> Any:
        """A head of the task by its name. Raises UserError where the checkpoint has none."""
        ...


def device_of(model: Model) -> torch.device:
    """Device that holds the model's weights."""
    return next(model.backbone.parameters()).device


def numbered(rows: Sequence[Any], size: int) -> Iterator[tuple[Sequence[Any], range]]:
    """`in_batches`, each with the numbers of its rows among all, from 1 on."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size], range(start + 1, min(len(rows), start + size) + 1)


def in_batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Parts of at most `size`."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
