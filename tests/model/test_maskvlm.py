"""The backbone: two encoders and two cross encoders, neither of which sees the other's inner states."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toys import slow_cross, toy_backbone, toy_batch

from maskvlm.checkpoint.warm_start import Start
from maskvlm.model.encoders import ImageEncoder
from maskvlm.model.init import init_positions
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.utils.errors import UserError


def test_class_tokens_of_pairs_are_those_of_the_slow_way() -> None:
    backbone, batch = toy_backbone().eval(), toy_batch(3)
    image_BLD = backbone.image(batch.image_BCHW)
    text_BTD = backbone.text(batch.token_CT, batch.attention_CT)
    fused = backbone.fuse(image_BLD, text_BTD, batch.attention_CT)
    for row in range(3):
        words_TD = text_BTD[row, batch.attention_CT[row]]
        image_D = slow_cross(backbone.cross_image, image_BLD[row], words_TD)[0]
        text_D = slow_cross(backbone.cross_text, words_TD, image_BLD[row])[0]
        torch.testing.assert_close(fused.image_MD[row], image_D, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fused.text_MD[row], text_D, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fused.product_MD[row], image_D * text_D, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("width", "adapted"), [(None, "image"), (16, "text"), (24, "both"), (32, "image")])
def test_encoders_of_different_widths_get_a_linear_layer(width: int | None, adapted: str) -> None:
    """16 and 32 wide; without a word the cross encoders take the text's width."""
    narrow, wide, batch = toy_backbone(), toy_backbone(width=32), toy_batch(3)
    backbone = MaskVLM(narrow.image, wide.text, 2, 2, width=width)
    assert backbone.width == (width or 32)
    names = {name.split(".")[0] for name in backbone.state_dict() if ".adapter." in name}
    assert names == ({"image", "text"} if adapted == "both" else {adapted})
    image_BLD, text_BTD = backbone.image(batch.image_BCHW), backbone.text(batch.token_CT, batch.attention_CT)
    assert image_BLD.shape[-1] == text_BTD.shape[-1] == backbone.width
    if adapted == "image":
        layer = backbone.image.adapter
        torch.testing.assert_close(image_BLD, layer(backbone.image.vit.forward_features(batch.image_BCHW)))
    assert backbone.fuse(image_BLD, text_BTD, batch.attention_CT).image_MD.shape == (3, backbone.width)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: toy_backbone(cross_heads=5), "cross_heads: 5 does not divide width 16"),
        (lambda: toy_backbone(dropout=1.5), "model.backbone.dropout: 1.5 is out of range"),
        (
            lambda: ImageEncoder("vit_tiny_patch16_224", 32, random_init=True, drop_path=-0.1),
            "drop_path: -0.1 is out of range",
        ),
        (lambda: init_positions(torch.nn.Parameter(torch.zeros(1, 5, 90)), (2, 2)), "embed_dim 90 is not a multiple"),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_places_of_queries_follow_the_size_of_the_image() -> None:
    """A checkpoint of 32 px loaded at 64: the positions of the image cross encoder are resized as the encoder's are."""
    small, large = toy_backbone(query_positions=True), toy_backbone(query_positions=True, size=64)
    origin = Start("x", small.state_dict(), {}, None, None, ())
    provenance = large.take_over(origin)
    resized = {name for name, part in provenance.tensors.items() if part.how == "resized"}
    assert resized == {"image.vit.pos_embed", "cross_image.pos_embed"}
    assert large.cross_image.pos_embed is not None
    assert large.cross_image.pos_embed.shape == (1, 65, 16)


def test_cross_encoders_start_small_but_for_cross_attention_and_encoders_from_xavier() -> None:
    backbone = toy_backbone(width=64)
    block = backbone.cross_image.blocks[0]
    for small in (block.feed_forward[0], block.self_attention.key_value):
        assert small.weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # cut at two deviations
        assert not small.bias.any()
    cross = block.cross_attention
    for layer in (backbone.image.vit.blocks[0].mlp.fc1, cross.query, cross.key_value, cross.out):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_positions_start_as_sines_and_cosines_that_tell_patches_apart(grid: tuple[int, int]) -> None:
    """Against a few lines of NumPy; the class token starts at 0."""
    position = torch.nn.Parameter(torch.full((1, 1 + grid[0] * grid[1], 16), 9.0))
    init_positions(position, grid)
    assert not position[0, 0].any()
    rate_4 = max(grid) ** -(np.arange(4) / 4)
    for number, position_D in enumerate(position[0, 1:].detach().numpy()):
        row, column = divmod(number, grid[1])
        axes = [2**0.5 * wave(place * rate_4) for wave in (np.sin, np.cos) for place in (row, column)]
        assert position_D == pytest.approx(np.concatenate(axes), abs=1e-6)


def test_checkpointing_and_dropout_reach_the_cross_encoders() -> None:
    backbone = toy_backbone(dropout=0.3, checkpointing=True)
    for cross in (backbone.cross_image, backbone.cross_text):
        assert cross.checkpointing
        assert {block.dropout.p for block in cross.blocks} == {0.3}
