"""Transformer block parts that save fewer activations for the backward pass on a GPU. In float32, their results equal
those of the parts they replace, and their parameters have the same names.

Shapes: B rows, L positions, D width.
"""

from collections.abc import Callable

import timm.layers
import torch
from timm.layers import Mlp, fast_layer_norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskvlm.utils.on_cpu import on_cpu


def recompute_in_backward(compute: Callable[[Tensor], Tensor], x: Tensor, random: bool = False) -> Tensor:
    """Result of `compute` for x. On a GPU, no intermediate tensors are kept: the backward pass recomputes them, up to
    the last one it needs, so that a final matrix product is not computed twice.

    Args:
        compute: cheap operations, followed by a matrix product.
        random: whether `compute` draws random numbers.
    """
    # A CPU has the memory but not the time; compiled code decides by itself what to keep.
    if on_cpu(x) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(x)
    result: Tensor = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=random)
    return result


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, except on a GPU under autocast: there, input and output have autocast's dtype, and only sums
    are in float32. PyTorch's own keeps its input in float32, and each product that uses its output keeps a copy."""

    def forward(self, x: Tensor) -> Tensor:
        # A CPU would also sum the gradients of weight and bias in autocast's dtype, with an error of one percent.
        # Meta tensors have no autocast.
        if on_cpu(x) or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return fast_layer_norm(x, list(self.normalized_shape), self.weight, self.bias, self.eps)


class LastNorm(nn.LayerNorm):
    """PyTorch's LayerNorm in the dtype of its weights, even under autocast: for features whose scores are compared."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class FeedForward(nn.Sequential):
    """Linear, GELU, linear, [B, L, D] -> [B, L, D]. The backward pass keeps the input of GELU (width 4 * D) and
    recomputes its output."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        first, gelu, last = self
        return recompute_in_backward(lambda hidden: last(gelu(hidden)), first(x_BLD))


class LeanMlp(Mlp):
    """timm's `Mlp`, keeping as little for the backward pass as `FeedForward`."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.drop2(recompute_in_backward(self._after_first, self.fc1(x_BLD), random=self.drop1.p > 0))

    def _after_first(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(hidden))))


LEAN = {Mlp: LeanMlp, timm.layers.LayerNorm: LayerNorm, nn.LayerNorm: LayerNorm}


def keep_less(blocks: nn.Module) -> None:
    """Replace the parts of timm's blocks by those of this module, in place."""
    for part in blocks.modules():
        # Match the exact type: a subclass computes something else. Only `forward` differs, so changing the class works.
        part.__class__ = LEAN.get(type(part), type(part))
