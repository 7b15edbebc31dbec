"""Attention by products against torch's kernel."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import toy_backbone, toy_batch

from maskvlm.model.attention_kernel import attend, attend_by_products
from maskvlm.model.maskvlm import MaskVLM


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_products_give_what_the_kernel_gives(rows: int, heads: int, asking: int, context: int, seed: int) -> None:
    """With their gradients; every query sees one position at least."""
    random = torch.Generator().manual_seed(seed)
    draw = [torch.randn(rows, heads, n, 4, generator=random, dtype=torch.double) for n in (asking, context, context)]
    mask_B11S = torch.rand(rows, 1, 1, context, generator=random) < 0.5
    mask_B11S[..., 0] = True
    results = []
    for by_products in (False, True):
        inputs = [x.clone().requires_grad_() for x in draw]
        out = attend(*inputs, mask_B11S, by_products)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_no_part_of_the_model_is_left_out() -> None:
    """Image and text encoder, self- and cross-attention give the same features."""
    backbone, batch = toy_backbone().double().eval(), toy_batch(4)

    def features(model: MaskVLM) -> list[Tensor]:
        image_BLD = model.image(batch.image_BCHW.double())
        text_BTD = model.text(batch.token_CT, batch.attention_CT)
        fused = model.fuse(image_BLD, text_BTD, batch.attention_CT)
        # Values at padding mean nothing.
        return [image_BLD, text_BTD[batch.attention_CT], fused.product_MD]

    changed = copy.deepcopy(backbone)
    attend_by_products(changed)
    expected, outputs = features(backbone), features(changed)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
