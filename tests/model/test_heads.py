"""The heads, and the way from an image to its patches and back."""

import math

import pytest
import torch
from torch import Tensor, nn
from toys import slow_cross

from maskvlm.model.cross_attention import CrossEncoder
from maskvlm.model.heads import (
    Classifier,
    Matching,
    PixelDecoder,
    Projection,
    TokenHead,
    patchify,
    unpatchify,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_patchify_is_row_by_row_with_the_channel_last() -> None:
    image_BCHW = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patch_BNP = patchify(image_BCHW, 2)
    assert patch_BNP.shape == (2, 6, 12)
    for number, (r, c) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        expected = image_BCHW[1, :, r : r + 2, c : c + 2].permute(1, 2, 0).flatten()
        assert torch.equal(patch_BNP[1, number], expected)


def test_unpatchify_is_the_inverse() -> None:
    image_BCHW = noise(2, 3, 6, 9)
    assert torch.equal(unpatchify(patchify(image_BCHW, 3), (2, 3), 3), image_BCHW)


@pytest.mark.parametrize("mean", [False, True])
def test_projection_gives_unit_vectors_of_the_class_tokens_and_of_the_mean(mean: bool) -> None:
    """The mean patch is one of patches alone, the mean token one of all that is no padding."""
    head = Projection(8, 6, dim=5, mean=mean)
    image_BLD, text_BTD = noise(3, 4, 8), noise(3, 7, 6)
    there_BT = torch.arange(7) < torch.tensor([[7], [2], [4]])
    subset_BV = torch.tensor([[2, 0], [1, 2], [0, 1]])
    mean_text = torch.stack([row[:length].mean(0) for row, length in zip(text_BTD, (7, 2, 4), strict=True)])
    some = torch.stack([row[1:][index].mean(0) for row, index in zip(image_BLD, subset_BV, strict=True)])
    for vector, layer, x, mean_BD in (
        (head.embed_image(image_BLD), head.image, image_BLD, image_BLD[:, 1:].mean(1)),
        (head.embed_image(image_BLD, subset_BV), head.image, image_BLD, some),
        (head.embed_text(text_BTD, there_BT), head.text, text_BTD, mean_text),
    ):
        read = torch.cat([x[:, 0], mean_BD], 1) if mean else x[:, 0]
        expected = read @ layer.weight.T + layer.bias
        torch.testing.assert_close(vector, expected / expected.norm(dim=1, keepdim=True))
    assert head.image.weight is not head.text.weight


def test_temperature_starts_where_told_keeps_its_bounds_and_returns() -> None:
    """Clamped on reading alone it would have no gradient, and stay where it is for ever."""
    head = Projection(8, 8, temperature=0.07)
    assert head.logit_scale.item() == Projection(8, 8).logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    for log_scale, scale in ((-3.0, 2.0), (math.log(5e3), 1000.0), (90.0, 1000.0)):
        nn.init.constant_(head.log_scale, log_scale)
        assert head.logit_scale.item() == pytest.approx(scale, rel=1e-5)
    head.clamp_temperature()
    assert head.logit_scale.item() == pytest.approx(1000.0)
    head.logit_scale.backward()
    assert head.log_scale.grad is not None
    assert head.log_scale.grad.item() > 0


def test_matching_and_token_head_are_one_linear_layer_each() -> None:
    matching, words = Matching(8), TokenHead(8, 11)
    fused_MD, text_CKD = noise(4, 8), noise(2, 3, 8)
    torch.testing.assert_close(matching(fused_MD), fused_MD @ matching.classify.weight.T + matching.classify.bias)
    logits_CKV = words(text_CKD)
    assert logits_CKV.shape == (2, 3, 11)
    torch.testing.assert_close(logits_CKV, text_CKD @ words.vocabulary.weight.T + words.vocabulary.bias)


def test_the_pixel_decoder_reads_the_text_and_skips_the_class_token() -> None:
    torch.manual_seed(0)
    decoder = PixelDecoder(CrossEncoder(8, 6, layers=2, heads=2), width=8, values=12)
    image_BLD, text_BTD = noise(2, 10, 8), noise(2, 5, 6, seed=1)
    attention_BT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    index_BK = torch.tensor([[0, 4, 8], [7, 1, 2]])
    pixels = decoder(image_BLD, text_BTD, attention_BT, index_BK)
    assert pixels.shape == (2, 3, 12)
    for row, words in ((0, 5), (1, 2)):
        expected = decoder.pixels(slow_cross(decoder.blocks, image_BLD[row], text_BTD[row, :words]))
        torch.testing.assert_close(pixels[row], expected[1 + index_BK[row]], atol=1e-6, rtol=1e-5)


def test_the_classifier_is_two_linear_layers() -> None:
    head = Classifier(width=8, hidden=6, labels=3)
    fused_BD = noise(4, 8)
    first, norm, _, _, second = head.layers
    hidden_BH = nn.functional.layer_norm(fused_BD @ first.weight.T + first.bias, (6,), norm.weight, norm.bias)
    expected_BK = nn.functional.gelu(hidden_BH) @ second.weight.T + second.bias
    torch.testing.assert_close(head(fused_BD), expected_BK)
    torch.manual_seed(0)
    dropping = Classifier(8, 600, 3, dropout=0.5)
    assert not torch.equal(dropping(fused_BD), dropping(fused_BD))
    assert torch.equal(dropping.eval()(fused_BD), dropping(fused_BD))


def test_what_is_put_in_order_is_in_single_precision_also_under_autocast() -> None:
    torch.manual_seed(0)
    projection, matching = Projection(16, 16, 8), Matching(16)
    classifier, tokens = Classifier(16, 16, 5), TokenHead(16, 9).eval()
    classifier.layers[0] = nn.Identity()  # the first layer may be in bfloat16
    image_BLD, text_BTD, fused_MD = torch.randn(3, 5, 16), torch.randn(3, 4, 16), torch.randn(6, 16)
    attention_BT = torch.ones(3, 4, dtype=torch.bool)

    def outputs() -> list[torch.Tensor]:
        return [
            projection.embed_image(image_BLD), projection.embed_text(text_BTD, attention_BT), matching(fused_MD),
            classifier(fused_MD), tokens(text_BTD),
        ]  # fmt: skip

    expected = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        results = outputs()
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
