"""The plug-in interface: pre-training and every downstream task implement it, nothing else knows them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from maskvlm.data.batch import Batch
from maskvlm.masking import Uniform

if TYPE_CHECKING:
    from maskvlm.model import MaskVLM


class Task(nn.Module, ABC):
    """What is special about one objective: its heads, its losses, its metrics.

    `uniform` gives the random numbers of the current step (see `masking.Uniform`); `weights` is the weight of each
    loss term in the sum, 1 where it has none.
    """

    uniform: Uniform
    weights: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def build(self, backbone: "MaskVLM") -> None:
        """Create the heads to fit the backbone's widths; called once, before the optimiser exists."""

    @abstractmethod
    def forward(self, backbone: "MaskVLM", batch: Batch) -> dict[str, Tensor]:
        """Named loss terms of one training batch; LitModel logs them as they are and sums them by `weights`."""

    @abstractmethod
    def update(self, backbone: "MaskVLM", batch: Batch) -> None:
        """Take in one evaluation batch."""

    @abstractmethod
    def compute(self, backbone: "MaskVLM") -> dict[str, float]:
        """Metrics over all batches taken in since the last call, then forget them."""

    def floors(self, batch_size: int) -> dict[str, float]:
        """No-knowledge level of each loss term: what a model pays that has learned nothing."""
        return {}

    def reseed(self, uniform: Uniform) -> None:
        """Take the random numbers of the coming step; LitModel derives them from (seed, step)."""
        self.uniform = uniform
