"""The plug-in interface: pre-training and every downstream task implement it, nothing else knows them."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from maskvlm.data.batch import Batch

if TYPE_CHECKING:
    from maskvlm.model import MaskVLM


class Task(nn.Module, ABC):
    """What is special about one objective: its heads, its losses, its metrics."""

    @abstractmethod
    def build(self, backbone: "MaskVLM") -> None:
        """Create the heads to fit the backbone's widths; called once, before the optimiser exists."""

    @abstractmethod
    def forward(self, backbone: "MaskVLM", batch: Batch) -> dict[str, Tensor]:
        """Named, weighted loss terms of one training batch; LitModel sums and logs them, knowing none."""

    @abstractmethod
    def update(self, backbone: "MaskVLM", batch: Batch) -> None:
        """Take in one evaluation batch."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Metrics over all batches taken in since the last call, then forget them."""

    def floors(self) -> dict[str, float]:
        """No-knowledge level of each loss term: what a model pays that has learned nothing."""
        return {}
