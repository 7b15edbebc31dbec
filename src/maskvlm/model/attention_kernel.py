"""Choice of the attention kernel: torch's default, except for bfloat16 on a CPU, where its choice is slower."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, by_products: bool) -> Tensor:
    """softmax(QK^T / sqrt(D)) V.

    Args:
        query: [B, H, L, D]. key, value: [B, H, S, D].
        mask: bool, broadcast to [B, H, L, S], True where a query may attend; at least one position per query.
        by_products: use two matrix products and a softmax, with [B, H, L, S] in memory; False: torch's fused kernel.

    Returns:
        [B, H, L, D].
    """
    if not by_products:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)
    score_BHLS = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        score_BHLS = score_BHLS.masked_fill(~mask, -torch.inf)
    return score_BHLS.softmax(-1) @ value


def attend_by_products(model: nn.Module) -> None:
    """Compute all attention in the model, including timm's and transformers', as two matrix products and a softmax.

    For bfloat16 on a CPU, where torch's fused kernel takes 1.8 to 6.5 times as long, forward and backward
    (bench/attention.py). In float32, the fused kernel is faster for images.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")
        elif hasattr(module, "fused_attn"):  # timm's
            module.fused_attn = False
        elif hasattr(module, "by_products"):
            module.by_products = True
