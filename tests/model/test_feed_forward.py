"""What keeps less computes the same; `tests/gpu_sim` measures how much less."""

import pytest
import timm
import timm.layers
import torch
from torch import Tensor, nn

from maskvlm.model.cross_attention import CrossEncoder
from maskvlm.model.feed_forward import FeedForward, LayerNorm, LeanMlp, keep_less, recompute_in_backward
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


def test_a_part_of_another_kind_stays_what_it_is() -> None:
    class Other(timm.layers.Mlp):
        pass

    parts = nn.ModuleList([Other(4), nn.Linear(4, 4), timm.layers.RmsNorm(4), timm.layers.Mlp(4)])
    keep_less(parts)
    assert [type(part) for part in parts] == [Other, nn.Linear, timm.layers.RmsNorm, LeanMlp]


def test_dropout_of_a_vit_is_still_there() -> None:
    vit, plain = create_vit("vit_base_patch16_224", SETTINGS | {"proj_drop_rate": 0.5}), plain_vit(proj_drop_rate=0.5)
    vit.load_state_dict(plain.state_dict())
    outputs = []
    for model in (vit, plain):
        torch.manual_seed(1)
        outputs.append(model.forward_features(noise(2, 3, 32, 32)))
    assert torch.equal(*outputs)


def test_a_norm_is_pytorchs_on_a_cpu() -> None:
    ours, theirs, x = LayerNorm(64), nn.LayerNorm(64), 30 * noise(5, 64) + 100
    ours.load_state_dict({"weight": noise(64), "bias": noise(64, seed=1)})
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("layers", [1, 3])
def test_what_leaves_a_cross_encoder_is_float32_under_autocast(layers: int) -> None:
    """Matching reads it, and the order of scores counts."""
    encoder = CrossEncoder(16, 16, layers, 2)
    x = noise(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(x, encoder.context(noise(3, 4, 16, seed=1)), num_full=1)
    assert output.full_RLD.dtype == output.cls_BD.dtype == torch.float32


def test_gradients_of_norms_in_bfloat16_are_off_by_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes: input, result and weights in bfloat16, sums in float32. Norms in float32 give 0.5 %."""
    torch.manual_seed(0)
    encoder, x = CrossEncoder(64, 64, 3, 4), noise(8, 20, 64)

    def gradient(kind: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", kind, enabled=kind is not None):
            out = encoder(x, encoder.context(noise(8, 6, 64, seed=1))).full_RLD
        parts = torch.autograd.grad((out * noise(8, 20, 64, seed=2)).sum(), list(encoder.parameters()))
        return torch.cat([part.flatten() for part in parts])

    def of_a_gpu(self: LayerNorm, x: Tensor) -> Tensor:
        rounded = (part.bfloat16().float() for part in (self.weight, self.bias))
        return nn.functional.layer_norm(x.bfloat16().float(), self.normalized_shape, *rounded, self.eps).bfloat16()

    exact = gradient(None)
    monkeypatch.setattr(LayerNorm, "forward", of_a_gpu)
    error = (gradient(torch.bfloat16) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.015


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_not_kept_is_computed_again_on_a_gpu() -> None:
    layers, x = FeedForward(32).cuda(), noise(4, 7, 32).cuda()
    calls: list[int] = []
    layers[1].register_forward_hook(lambda *_: calls.append(1))
    layers(x).square().mean().backward()
    assert len(calls) == 2
    gradients = [parameter.grad for parameter in layers.parameters()]
    wanted = torch.autograd.grad(nn.Sequential(*layers)(x).square().mean(), list(layers.parameters()))
    torch.testing.assert_close(gradients, list(wanted), rtol=0, atol=0)


def test_nothing_is_computed_again_on_a_cpu() -> None:
    calls: list[int] = []
    recompute_in_backward(lambda x: calls.append(1) or x * x, noise(3).requires_grad_()).sum().backward()  # type: ignore[func-returns-value]
    assert len(calls) == 1
