"""Interface of a loaded model, so that tasks can define their own methods."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from maskvlm.data.inputs import MarkedTexts
from maskvlm.data.text import CaptionTokens
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.task import Task


class Model(Protocol):
    """What methods use of a loaded model: the backbone, its heads, and inputs as tensors."""

    backbone: MaskVLM
    task: Task
    batch_size: int

    @property
    def words(self) -> MarkedTexts:
        """Converts texts to tokens and back."""
        ...

    def pixels(self, images: Sequence[Any], numbers: Sequence[int] | None = None) -> Tensor:
        """Normalised images [B, 3, H, W] on the model's device, in its precision. numbers: how error messages refer to
        images without a name, 1 to B if left out."""
        ...

    def tokens(self, texts: Sequence[str]) -> CaptionTokens:
        """Token ids and masks of the texts, on the model's device."""
        ...

    def head(self, name: str, method: str) -> Any:
        """A head of the task by its name. Raises UserError if the checkpoint does not have it."""
        ...


def device_of(model: Model) -> torch.device:
    """Device that holds the model's weights."""
    return next(model.backbone.parameters()).device


def numbered(rows: Sequence[Any], size: int) -> Iterator[tuple[Sequence[Any], range]]:
    """Like `in_batches`, each batch with its row numbers, counted from 1."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size], range(start + 1, min(len(rows), start + size) + 1)


def in_batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Batches of at most `size` rows."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
