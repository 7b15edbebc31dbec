"""Parts of a transformer block that keep less for the backward pass on a GPU. In float32 they give what the parts give
in whose places they are, and parameters have the same names.

Shapes: B rows, L positions, D width.
"""

from collections.abc import Callable

import timm.layers
import torch
from timm.layers import Mlp, fast_layer_norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskvlm.utils.on_cpu import on_cpu


def not_kept(compute: Callable[[Tensor], Tensor], x: Tensor, random: bool = False) -> Tensor:
    """What `compute` gives for x. On a GPU nothing in between is kept: it is computed again in the backward pass, up to
    the last tensor that is needed there, so that a product at the end is not made twice.

    Args:
        compute: cheap operations, and a product at their end.
        random: whether it draws random numbers.
    """
    # A CPU has the memory and lacks the time; compiled code chooses by itself what it keeps.
    if on_cpu(x) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(x)
    result: Tensor = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=random)
    return result


class LayerNorm(nn.LayerNorm):
    """PyTorch's. On a GPU under autocast it reads and gives autocast's type, and only its sums are made in float32:
    PyTorch's own keeps its input in float32, and each product that reads its result keeps a copy of that, too."""

    def forward(self, x: Tensor) -> Tensor:
        # A CPU adds up the gradients of weight and bias in that type, too, which is off by a percent.
        # Meta tensors know no autocast.
        if on_cpu(x) or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return fast_layer_norm(x, list(self.normalized_shape), self.weight, self.bias, self.eps)


class LastNorm(nn.LayerNorm):
    """PyTorch's in the type of its weights, also under autocast: for what is compared afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class FeedForward(nn.Sequential):
    """Linear, GELU, linear, [B, L, D] -> [B, L, D]. Of the middle, four times as wide, what GELU reads is kept, and not
    what it gives."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        first, gelu, last = self
        return not_kept(lambda hidden: last(gelu(hidden)), first(x_BLD))


class LeanMlp(Mlp):
    """timm's `Mlp`, with what `FeedForward` keeps."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.drop2(not_kept(self._after_first, self.fc1(x_BLD), random=self.drop1.p > 0))

    def _after_first(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(hidden))))


LEAN = {Mlp: LeanMlp, timm.layers.LayerNorm: LayerNorm, nn.LayerNorm: LayerNorm}


def keep_less(blocks: nn.Module) -> None:
    """Parts of timm's blocks become those of this file."""
    for part in blocks.modules():
        # By the exact type: a subclass computes something else. Nothing but `forward` differs, so the type is changed.
        part.__class__ = LEAN.get(type(part), type(part))
