"""A loss: how many words the text has, told by the image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.loss_functions import mean_over
from maskvlm.objectives.pretraining_losses import EvaluatedBatch, Need, PretrainingLoss, Step
from maskvlm.utils.distributed import shared_count


class TextLength(PretrainingLoss):
    """Squared error of the number of words, in `unit` words."""

    name, needs = "length", frozenset({Need.IMAGE})

    def __init__(self, weight: float = 1.0, unit: float = 10.0) -> None:
        super().__init__(weight)
        self.unit, self.level = unit, None

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        return {"length": nn.Linear(backbone.width, 1)}

    def words(self, step: Step) -> Tensor:
        return (~step.batch.special_CT).sum(1).float() / self.unit

    def __call__(self, heads: Any, step: Step) -> Tensor:
        error_B = (heads.length(step.encoded.image_BLD[:, 0])[:, 0] - self.words(step)).square()
        valid_B = step.batch.valid_B.float()
        return mean_over(shared_count(valid_B.sum()), (error_B * valid_B).sum())

    def observe(self, heads: Any, step: Step) -> None:
        self.level = self.words(step)[step.batch.valid_B].var(unbiased=False)

    def measure(self, heads: Any, seen: EvaluatedBatch) -> Mapping[str, tuple[Tensor, Tensor]]:
        words_C = (~seen.batch.special_CT).sum(1).float() / self.unit
        predicted_C = heads.length(seen.image_BLD[:, 0])[:, 0][seen.batch.owner_C]
        return {"error": ((predicted_C - words_C).square(), torch.ones_like(words_C))}

    def chance(self, batch_size: int, texts_per_image: int) -> float | None:
        return None if self.level is None else float(torch.as_tensor(self.level))
