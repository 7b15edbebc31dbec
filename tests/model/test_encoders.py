"""Both encoders against timm's and transformers' own, on narrow models with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from maskvlm.data.text import train_tokenizer
from maskvlm.model.encoders import ImageEncoder, TextEncoder, encoders_frozen
from maskvlm.model.hf_text import FINISHED_MASK, takes_finished_mask
from maskvlm.model.text_lengths import MANY
from maskvlm.utils.errors import UserError

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
CAPTIONS = ["a red ball on a table", "two dogs run", "the small blue cube is left of a ball"]


def image_encoder(
    name: str = "vit_tiny_patch16_224", size: int = 64, config: dict[str, Any] | None = None, **kwargs: Any
) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(name, size, random_init=True, config=VIT | (config or {}), **kwargs).eval()


def text_encoder(kind: str = "bert", config: dict[str, Any] | None = None, **kwargs: Any) -> TextEncoder:
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "text_length": 12, "random_init": True, **kwargs}
    return TextEncoder(kind, config=BERT | (config or {}), **settings).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS, 50)


def images(rows: int = 2, size: int = 64) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),  # four registers
        ("deit_tiny_distilled_patch16_224", {}),  # a second class token
        ("deit3_small_patch16_224", {}),  # no position for the class token
        ("vit_base_patch32_clip_224", {"patch_size": 16}),  # a norm before the blocks
        ("eva02_tiny_patch14_224", {"patch_size": 16}),  # rotary positions
        ("beit_base_patch16_224", {}),  # relative positions
        ("vit_small_patch16_dinov3", {}),  # patches as [B, rows, columns, D]
    ],
)
def test_every_vit_gives_what_timm_gives(name: str, config: dict[str, Any]) -> None:
    encoder = image_encoder(name, config=config)
    with torch.no_grad():
        ours, theirs = encoder(images()), encoder.vit.forward_features(images())
        nothing = encoder(images(), torch.zeros(2, 16, dtype=torch.bool))
        masked = encoder(images(), torch.ones(2, 16, dtype=torch.bool))
    assert ours.shape == (2, 1 + encoder.num_patches, encoder.width) == (2, 17, 32)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[:, 1:], theirs[:, -16:], atol=1e-6, rtol=0)
    torch.testing.assert_close(nothing, ours, atol=1e-6, rtol=0)
    torch.testing.assert_close(masked[0], masked[1], atol=1e-6, rtol=0)  # neither image is seen
    assert not torch.allclose(masked[0], ours[0], atol=1e-3)


def test_a_masked_patch_is_the_mask_token_before_its_position() -> None:
    encoder = image_encoder()
    mask_BN = torch.zeros(2, 16, dtype=torch.bool)
    mask_BN[0, [1, 6]] = True
    with torch.no_grad():
        vit, hidden_BND = encoder.vit, encoder.vit.patch_embed(images())
        for row, patch in ((0, 1), (0, 6)):
            hidden_BND[row, patch] = encoder.mask_token[0, 0]
        hidden_BLD = torch.cat([vit.cls_token.expand(2, 1, 32), hidden_BND], 1) + vit.pos_embed
        expected_BLD = vit.norm(vit.blocks(hidden_BLD))
        torch.testing.assert_close(encoder(images(), mask_BN), expected_BLD, atol=1e-6, rtol=0)
        assert torch.equal(encoder.vit.forward_features(images()), encoder(images()))  # the mask is forgotten


def ragged_mask() -> Tensor:
    """Three images of 16 patches: three of them visible, none, and ten."""
    mask_BN = torch.ones(3, 16, dtype=torch.bool)
    mask_BN[0, [0, 7, 9]] = False
    mask_BN[2, 3:13] = False
    return mask_BN


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
@pytest.mark.parametrize("visible", [None, 12])
def test_patches_that_are_left_out_are_not_there(name: str, visible: int | None) -> None:
    """Each image's visible patches alone through the ViT, and the mask token in the places of the others."""
    encoder = image_encoder(name, config={"patch_size": 16}, masked_patches="left_out")
    encoder.adapt(24)
    mask_BN, vit = ragged_mask(), encoder.vit
    with torch.no_grad():
        encoded_BLD = encoder(images(3), mask_BN, None, visible)
        for image, mask_N, encoded_LD in zip(images(3), mask_BN, encoded_BLD, strict=True):
            hidden_1LD = vit._pos_embed(vit.patch_embed(image[None]))
            first = vit.num_prefix_tokens
            visible_1LD = torch.cat([hidden_1LD[:, :first], hidden_1LD[:, first:][:, ~mask_N]], 1)
            out_LD = encoder.adapter(vit.norm(vit.blocks(vit.norm_pre(visible_1LD))))[0]
            expected_LD = encoder.adapter(encoder.mask_token[0]).repeat(17, 1)
            expected_LD[0] = out_LD[0]
            expected_LD[1:][~mask_N] = out_LD[first:]
            torch.testing.assert_close(encoded_LD, expected_LD, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("frozen", "cached"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("masked", ["token", "left_out"])
def test_trained_blocks_may_see_some_patches_of_whole_images(
    frozen: int, cached: bool, masked: str, tmp_path: Path
) -> None:
    """What is frozen sees all of them; masked images behind are as without."""
    folder = str(tmp_path) if cached else None
    encoder = image_encoder(masked_patches=masked, frozen=frozen, feature_cache=folder).train()
    encoder.frozen_blocks.open_cache("here", 3)
    mask_BN = torch.cat([torch.zeros(2, 16, dtype=torch.bool), ragged_mask()])
    subset_WV, row_W, vit = torch.tensor([[3, 0, 15, 7], [9, 2, 4, 1]]), torch.tensor([2, 0]), encoder.vit
    for _ in range(2):  # computed, then read where it is kept
        encoded_BLD = encoder(images(5), mask_BN, row_W, None, subset_WV)
    torch.testing.assert_close(encoded_BLD[2:], encoder(images(5), mask_BN, row_W)[2:], atol=1e-5, rtol=0)
    with torch.no_grad():
        lower_WLD = vit.blocks[:frozen](vit.norm_pre(vit._pos_embed(vit.patch_embed(images(5)[:2]))))
        for encoded_LD, lower_LD, some_V in zip(encoded_BLD, lower_WLD, subset_WV, strict=False):
            visible_1LD = torch.cat([lower_LD[:1], lower_LD[1:][some_V]])[None]
            out_LD = vit.norm(vit.blocks[frozen:](visible_1LD))[0]
            expected_LD = encoder.mask_token[0].repeat(17, 1)
            expected_LD[0], expected_LD[1:][some_V] = out_LD[0], out_LD[1:]
            torch.testing.assert_close(encoded_LD, expected_LD, atol=1e-5, rtol=0)
    encoded_BLD[:2].square().sum().backward()
    gradient = {name: parameter.grad for name, parameter in vit.named_parameters() if parameter.grad is not None}
    learns = {name for name, value in gradient.items() if value.any()}  # masked images give zeros
    assert ("patch_embed.proj.weight" in learns) == (frozen == 0)
    assert "blocks.1.attn.qkv.weight" in learns


@pytest.mark.parametrize("left_out", [False, True])
def test_an_encoder_that_stands_still_gives_the_same_and_learns_nothing(left_out: bool) -> None:
    image = image_encoder(masked_patches="left_out" if left_out else "token").train()
    text = text_encoder().train()
    text.set_tokenizer(train_tokenizer(CAPTIONS, 50))
    token_BT, attention_BT = torch.randint(5, 50, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    expected = image(images(3), ragged_mask()), text(token_BT, attention_BT)
    with encoders_frozen((image, text), True):
        still = image(images(3), ragged_mask()), text(token_BT, attention_BT)
    for one, other in zip(still, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert [part.requires_grad for part in still] == [left_out, False]  # the mask token's place
    assert image(images(3)).requires_grad


@pytest.mark.parametrize(
    ("name", "size", "config", "words"),
    [
        ("vit_tiny_patch16_24", 64, {}, "vit_tiny_patch16_224"),  # the nearest name
        ("vit_base_patch16_siglip_224", 64, {}, "class token"),
        ("vit_small_r26_s32_224", 64, {}, "plain patches"),  # a CNN before the ViT
        ("tnt_s_patch16_224", 64, {}, "plain patches"),  # a transformer without a patch embedding of its own
        ("vit_tiny_patch16_224", 70, {}, "multiple of 16"),
        ("vit_tiny_patch16_224", 64, {"embed_dimm": 3}, "embed_dimm"),
        ("vit_tiny_patch16_224", 64, {"num_heads": 5}, "divisible"),
    ],
)
def test_image_encoders_that_cannot_be(name: str, size: int, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImageEncoder(name, size, random_init=True, config=config)


def test_patches_can_be_left_out_of_a_plain_vit_alone() -> None:
    with pytest.raises(UserError, match=r"masked_patches: .*eva02"):
        image_encoder("eva02_tiny_patch14_224", config={"patch_size": 16}, masked_patches="left_out")


@pytest.mark.parametrize("kind", ["image", "text"])
def test_checkpointing_changes_nothing_but_memory(kind: str) -> None:
    grads = []
    for checkpointing in (False, True):
        if kind == "image":
            encoder, inputs = image_encoder(checkpointing=checkpointing).train(), (images(),)
        else:
            encoder = text_encoder(checkpointing=checkpointing).train()
            inputs = (torch.arange(5, 13).view(2, 4), torch.ones(2, 4, dtype=torch.bool))
        block = encoder.vit.blocks[0].attn if kind == "image" else encoder.model.encoder.layer[0].attention
        passes = []
        block.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        encoder(*inputs).square().mean().backward()
        assert len(passes) == 1 + checkpointing
        grads.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("path", ["left out", "frozen subset", "kept"])
def test_checkpointing_reaches_blocks_that_timm_does_not_run(path: str, tmp_path: Path) -> None:
    """With stochastic depth: what is recomputed drops the same branches."""
    masked = "left_out" if path == "left out" else "token"
    grads = []
    for checkpointing in (False, True):
        folder = str(tmp_path / str(checkpointing)) if path == "kept" else None
        settings: dict[str, Any] = {"frozen": int(path != "left out"), "feature_cache": folder}
        encoder = image_encoder(masked_patches=masked, drop_path=0.5, checkpointing=checkpointing, **settings).train()
        encoder.frozen_blocks.open_cache("here", 3)
        inputs: tuple[Any, ...] = (images(3), ragged_mask())
        if path != "left out":
            subset_WV = None if path == "kept" else torch.tensor([[3, 0, 15], [9, 2, 4], [1, 5, 6]])
            inputs = (images(3), None, torch.arange(3), None, subset_WV)
        passes: list[int] = []
        for number, block in enumerate(encoder.vit.blocks):
            block.attn.register_forward_pre_hook(lambda *_, passes=passes, number=number: passes.append(number))
        torch.manual_seed(1)
        encoder(*inputs).square().mean().backward()
        # Nothing of a frozen block is kept for the backward pass, so nothing is recomputed.
        assert passes.count(0) == 1 + (checkpointing and not settings["frozen"])
        assert passes.count(1) == 1 + checkpointing
        grads.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    torch.testing.assert_close(grads[0], grads[1])


# ---------------------------------------------------------------------- text


def padded(pad: int) -> tuple[Tensor, Tensor]:
    """Two rows of 7 and 4 tokens."""
    token_BT = torch.tensor([[2, 9, 8, 7, 6, 5, 3], [2, 11, 12, 3, pad, pad, pad]])
    attention_BT = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return token_BT, attention_BT


@pytest.mark.parametrize(("kind", "pad"), [("bert", 0), ("roberta", 0), ("roberta", 1), ("electra", 0), ("mpnet", 1)])
def test_text_features_are_those_of_transformers(kind: str, pad: int) -> None:
    encoder = text_encoder(kind, {"pad_token_id": pad})
    token_BT, attention_BT = padded(pad)
    torch.manual_seed(0)
    theirs = AutoModel.from_config(AutoConfig.for_model(**encoder.config.to_dict())).eval()
    theirs.load_state_dict(encoder.model.state_dict(), strict=False)
    with torch.no_grad():
        ours_BTD = encoder(token_BT, attention_BT)
        theirs_BTD = theirs(input_ids=token_BT, attention_mask=attention_BT.long()).last_hidden_state
        alone_1TD = encoder(token_BT[1:, :4], attention_BT[1:, :4])
    assert ours_BTD.shape == (2, 7, encoder.width) == (2, 7, 32)
    torch.testing.assert_close(ours_BTD[attention_BT], theirs_BTD[attention_BT], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours_BTD[1, :4], alone_1TD[0], atol=1e-5, rtol=0)  # padding changes nothing


@pytest.mark.parametrize("kind", sorted(FINISHED_MASK))
@pytest.mark.parametrize("lengths", [(7, 4), (7, 7)])
def test_a_finished_mask_gives_what_a_padding_mask_gives(kind: str, lengths: tuple[int, int]) -> None:
    """As on a GPU, whose host would wait to learn whether there is any padding."""
    settings = {"pad_token_id": 1, "vocab_size": 50} | (BERT if kind != "distilbert" else DISTILBERT)
    torch.manual_seed(0)
    encoder = TextEncoder(kind, 12, random_init=True, vocab_size=50, config=settings).eval()
    assert takes_finished_mask(encoder.model)
    token_BT, _ = padded(1)
    attention_BT = torch.arange(7) < torch.tensor(lengths)[:, None]
    finished = attention_BT[:, None, None, :].expand(-1, 1, 7, -1)
    output, expected = (
        encoder.model(input_ids=token_BT, attention_mask=mask).last_hidden_state for mask in (finished, attention_BT)
    )
    torch.testing.assert_close(output[attention_BT], expected[attention_BT], atol=1e-6, rtol=0)
    encoder.model.config._attn_implementation = "eager"
    assert not takes_finished_mask(encoder.model)


@pytest.mark.parametrize(("kind", "pad"), [("bert", 0), ("roberta", 1), ("mpnet", 1)])
def test_many_texts_in_groups_of_like_length_are_as_each_alone(kind: str, pad: int) -> None:
    """Values and gradients; in float64, so that the order of sums does not count."""
    encoder = text_encoder(kind, {"pad_token_id": pad}).double()
    draw = torch.Generator().manual_seed(3)
    length_B = torch.randint(2, 12, (MANY + 5,), generator=draw)
    attention_BT = torch.arange(12) < length_B[:, None]
    token_BT = torch.randint(5, 50, attention_BT.shape, generator=draw).masked_fill(~attention_BT, pad)
    grouped_BTD = encoder(token_BT, attention_BT)
    weight_BTD = torch.randn(grouped_BTD.shape, generator=draw, dtype=torch.float64) * attention_BT[..., None]
    grouped = torch.autograd.grad((grouped_BTD * weight_BTD).sum(), [*encoder.parameters()])
    rows = zip(token_BT, attention_BT, length_B.tolist(), strict=True)
    alone = [encoder(token_T[None, :length], attention_T[None, :length])[0] for token_T, attention_T, length in rows]
    for output_TD, wanted_TD in zip(grouped_BTD, alone, strict=True):
        torch.testing.assert_close(output_TD[: len(wanted_TD)], wanted_TD)
    total = sum((one * weight_TD[: len(one)]).sum() for one, weight_TD in zip(alone, weight_BTD, strict=True))
    torch.testing.assert_close(grouped, torch.autograd.grad(total, [*encoder.parameters()]))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_no_parameter_is_without_use(kind: str) -> None:
    """DDP would wait for its gradient for ever."""
    encoder = text_encoder(kind)
    encoder(*padded(0)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert encoder.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_model_takes_over_the_trained_tokenizer(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = text_encoder(kind)
    assert encoder.tokenizer is None
    encoder.set_tokenizer(tokenizer)
    encoder.set_tokenizer(train_tokenizer(CAPTIONS, 50))  # the same once more
    other = train_tokenizer(["something else entirely"], 50)
    with pytest.raises(UserError, match=rf"\({len(other)} entries\) differs from the model's, .*\(50 entries\)"):
        encoder.set_tokenizer(other)
    assert encoder.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_tokenizers_that_do_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="50 entries, but the model has rows for 49"):
        text_encoder(vocab_size=49).set_tokenizer(tokenizer)
    with pytest.raises(UserError, match="its padding is token 0, the model's is 1"):
        text_encoder("roberta", {"pad_token_id": 1}).set_tokenizer(tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(UserError, match="no mask token"):
        text_encoder().set_tokenizer(bare)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("gpt2", {}, "is not an encoder trained as a masked language"),
        ("bert", BERT | {"hiden_size": 32}, "Did you mean hidden_size"),
        ("bert", BERT | {"num_attention_heads": 5}, "32.*5"),
        ("bert", BERT | {"hidden_size": "wide"}, "hidden_size"),
        ("./nowhere/roberta", {}, "no such folder"),
        ("layoutlm", BERT, "cannot encode text alone"),
        ("acme/roberta-base", {}, "acme/roberta-base"),  # it may have other heads than the well-known one
        ("ibert", BERT | {"max_position_embeddings": 8}, "12 tokens, but the model has 7 positions"),
    ],
)
def test_text_encoders_that_cannot_be(name: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextEncoder(name, 12, random_init=True, config=config)


# ---------------------------------------------------------------------- readiness


def test_random_weights_must_be_asked_for() -> None:
    image, text = ImageEncoder(image_size=64, config=VIT), TextEncoder(config=BERT | {"num_hidden_layers": 1})
    for encoder, inputs in ((image, (images(),)), (text, padded(1))):
        with pytest.raises(UserError, match=f"the weights of {type(encoder).__name__} are not loaded"):
            encoder(*inputs)
    torch.nn.ModuleDict({"image": image}).load_state_dict({f"image.{k}": v for k, v in image.state_dict().items()})
    assert image(images()).shape == (2, 17, 32)  # a checkpoint of the whole model is as good
