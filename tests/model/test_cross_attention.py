"""The cross-modality encoder against torch's own attention, and its short cuts against the long way."""

import pytest
import torch
from torch import Tensor, nn
from toys import slow_cross, torch_attention

from maskvlm.model import cross_attention
from maskvlm.model.cross_attention import CrossBlock, CrossEncoder

WIDTH, OTHER, HEADS = 12, 20, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.fixture
def encoder() -> CrossEncoder:
    torch.manual_seed(0)
    encoder = CrossEncoder(WIDTH, OTHER, layers=3, heads=HEADS)
    for parameter in encoder.parameters():  # norms and biases away from 1 and 0
        nn.init.normal_(parameter, std=0.4)
    return encoder


def test_a_block_is_torchs_attention_with_post_norm() -> None:
    torch.manual_seed(0)
    block = CrossBlock(WIDTH, OTHER, HEADS)
    own, other = torch_attention(block.self_attention), torch_attention(block.cross_attention)
    x, context = noise(3, 5, WIDTH), noise(3, 7, OTHER, seed=1)
    self_mask, context_mask = padding([5, 2, 4], 5), padding([7, 1, 3], 7)
    y = block.norms[0](x + own(x, x, x, key_padding_mask=~self_mask)[0])
    y = block.norms[1](y + other(y, context, context, key_padding_mask=~context_mask)[0])
    expected = block.norms[2](y + block.feed_forward(y))
    key_value = block.cross_attention.keys_values(context)
    output = block(x, self_mask[:, None, None], key_value, context_mask[:, None, None])
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


def test_positions_are_added_to_what_queries_are_made_of() -> None:
    """And to nothing else: keys, values and the residual are as without."""
    torch.manual_seed(0)
    block = CrossBlock(WIDTH, OTHER, HEADS)
    own, other = torch_attention(block.self_attention), torch_attention(block.cross_attention)
    x, context, place = noise(3, 5, WIDTH), noise(3, 7, OTHER, seed=1), noise(5, WIDTH, seed=2)
    y = block.norms[0](x + own(x + place, x, x)[0])
    y = block.norms[1](y + other(y + place, context, context)[0])
    expected = block.norms[2](y + block.feed_forward(y))
    output = block(x, None, block.cross_attention.keys_values(context), None, position_LD=place)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("every", [0, 2, None])
def test_an_encoder_that_knows_places_gives_each_block_the_same_ones(every: int | None) -> None:
    torch.manual_seed(0)
    encoder = CrossEncoder(WIDTH, OTHER, layers=2, heads=HEADS, grid=(2, 3))
    assert encoder.pos_embed is not None
    nn.init.normal_(encoder.pos_embed)
    x, context = noise(3, 7, WIDTH), encoder.context(noise(3, 4, OTHER, seed=1))
    hidden = x
    for block, key_value in zip(encoder.blocks, context.blocks, strict=True):
        hidden = block(hidden, None, key_value, None, position_LD=encoder.pos_embed[0])
    output = encoder(x, context, num_full=every)
    torch.testing.assert_close(output.full_RLD, hidden[: 3 if every is None else every], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.cls_BD, hidden[:, 0], atol=1e-6, rtol=1e-5)
    plain = CrossEncoder(WIDTH, OTHER, layers=2, heads=HEADS)
    assert set(encoder.state_dict()) - set(plain.state_dict()) == {"pos_embed"}


def test_all_pairs_at_once_equal_each_pair_alone_without_padding(encoder: CrossEncoder) -> None:
    lengths, others = [6, 3, 1], [4, 2, 5]
    x_BLD, context_BSD = noise(3, 6, WIDTH), noise(3, 5, OTHER, seed=1)
    context = encoder.context(context_BSD, padding(others, 5))
    output = encoder(x_BLD, context, padding(lengths, 6)).full_RLD
    for row, (length, other) in enumerate(zip(lengths, others, strict=True)):
        expected = slow_cross(encoder, x_BLD[row, :length], context_BSD[row, :other])
        torch.testing.assert_close(output[row, :length], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("every", [0, 2, None])
def test_rows_that_pairs_share_give_what_each_pair_alone_gives(layers: int, every: int | None) -> None:
    torch.manual_seed(0)
    encoder = CrossEncoder(WIDTH, OTHER, layers, HEADS, grid=(1, 5))
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    row_B, partner_B, attention = torch.tensor([1, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 0]), padding([6, 2, 4], 6)
    shared, apart = noise(3, 6, WIDTH).requires_grad_(), noise(3, 6, WIDTH).requires_grad_()
    context = encoder.context(noise(3, 4, OTHER, seed=1), padding([4, 1, 2], 4), partner_B)
    output = encoder(shared, context, attention, every, row_B)
    expected = encoder(apart[row_B], context, attention[row_B], every)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for out in (output, expected):
        (out.cls_BD.square().sum() + out.full_RLD.cos().sum()).backward(retain_graph=True)
    torch.testing.assert_close(shared.grad, apart.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_only_what_is_read_is_computed_in_the_last_block(layers: int) -> None:
    torch.manual_seed(0)
    encoder = CrossEncoder(WIDTH, OTHER, layers, HEADS, grid=(1, 5))
    nn.init.normal_(encoder.pos_embed)
    x_BLD, context = noise(4, 6, WIDTH), encoder.context(noise(4, 5, OTHER, seed=1))
    read_RK = torch.tensor([[5, 0, 2], [1, 1, 4], [3, 4, 5]])
    full = encoder(x_BLD, context, num_full=3)
    output = encoder(x_BLD, context, num_full=3, read_RK=read_RK)
    expected = full.full_RLD.gather(1, read_RK[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(output.full_RLD, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.cls_BD[3:], full.cls_BD[3:], atol=1e-6, rtol=1e-6)
    shapes = []
    encoder.blocks[-1].feed_forward.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    encoder(x_BLD, context, num_full=3, read_RK=read_RK)
    assert shapes == [(3, 3, WIDTH), (1, 1, WIDTH)]
    nothing = encoder(x_BLD, context, read_RK=torch.zeros(4, 0, dtype=torch.long))
    assert nothing.full_RLD.shape == (4, 0, WIDTH)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        encoder = CrossEncoder(WIDTH, OTHER, 2, HEADS, dropout=0.2, checkpointing=checkpointing)
        x_BLD, other = noise(4, 6, WIDTH).requires_grad_(), noise(3, 5, OTHER, seed=1).requires_grad_()
        context = encoder.context(other, padding([5, 2, 3], 5), torch.tensor([0, 1, 2, 0]))
        torch.manual_seed(1)  # of dropout
        out = encoder(x_BLD, context, padding([6, 3, 1, 5], 6), num_full=2)
        (out.full_RLD.square().sum() + out.cls_BD.sum()).backward()
        return [part.grad for part in (x_BLD, other, *encoder.parameters())]

    calls: list[int] = []
    hook = CrossBlock.forward
    try:
        CrossBlock.forward = lambda self, *args: (calls.append(1), hook(self, *args))[1]  # type: ignore[method-assign]
        plain, plain_calls = gradients(False), len(calls)
        recomputed = gradients(True)
    finally:
        CrossBlock.forward = hook  # type: ignore[method-assign]
    assert len(calls) == 3 * plain_calls  # each block once more
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_every_parameter_is_used(encoder: CrossEncoder) -> None:
    """Also where only class tokens leave the last block; distributed training waits for each gradient."""
    encoder(noise(2, 4, WIDTH), encoder.context(noise(2, 3, OTHER)), num_full=0).cls_BD.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("full", [0, 7, 40])
def test_many_texts_in_groups_of_like_length_are_as_one_pass(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, rows that several pairs share, and contexts of which pairs pick; in float64."""
    torch.manual_seed(0)
    encoder = CrossEncoder(16, 12, layers=2, heads=2).double()
    text_ULD = torch.randn(30, 9, 16, dtype=torch.float64, requires_grad=True)
    image_VSD = torch.randn(11, 5, 12, dtype=torch.float64, requires_grad=True)
    attention_UL = torch.arange(9) < torch.randint(1, 10, (30,))[:, None]
    row_B, partner_B = torch.randint(0, 30, (40,)), torch.randint(0, 11, (40,))
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(cross_attention, "worth_grouping", lambda *_, grouped=grouped: grouped)
        context = encoder.context(image_VSD, None, partner_B)
        out = encoder(text_ULD, context, attention_UL, full, row_B)
        read = out.full_RLD * attention_UL[row_B[:full], :, None]
        total = read.sin().sum() + out.cls_BD.cos().sum()
        results.append([read, out.cls_BD, *torch.autograd.grad(total, [text_ULD, image_VSD, *encoder.parameters()])])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
