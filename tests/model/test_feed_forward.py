"""What keeps less computes the same; `tests/gpu_sim` measures how much less."""

import pytest
import timm
import timm.layers
import torch
from torch import Tensor, nn

from maskvlm.model.cross_attention import CrossEncoder
from maskvlm.model.feed_forward import LayerNorm, LeanMlp
from maskvlm.model.vit_weights import create_vit

SETTINGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_vit(**more: float) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=0, **SETTINGS, **more)


def test_a_vit_that_keeps_less_has_the_same_tensors_and_gives_the_same() -> None:
    vit, plain = create_vit("vit_base_patch16_224", SETTINGS), plain_vit()
    vit.load_state_dict(plain.state_dict())  # strict
    assert isinstance(vit.blocks[1].mlp, LeanMlp)
    assert isinstance(vit.blocks[1].norm2, LayerNorm)
    images = noise(3, 3, 32, 32)
    for model in (vit, plain):
        model.forward_features(images).square().mean().backward()
    for (name, ours), theirs in zip(vit.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad is None or torch.equal(ours.grad, theirs.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 3])
def test_what_leaves_a_cross_encoder_is_float32_under_autocast(layers: int) -> None:
    """Matching reads it, and the order of scores counts."""
    encoder = CrossEncoder(16, 16, layers, 2)
    x = noise(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(x, encoder.context(noise(3, 4, 16, seed=1)), num_full=1)
    assert output.full_RLD.dtype == output.cls_BD.dtype == torch.float32
