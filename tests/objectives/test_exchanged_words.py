"""Captions with two words exchanged, as hard negatives of matching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_step import Slow, build, each_token_a_word, eventful_batch
from torch import Tensor
from torch.nn import functional as F
from toys import slow_cross

from maskvlm.objectives.exchanged_words import exchange_words
from maskvlm.utils.distributed import Draw

# Two kinds of words: 0 to 4 are alike, and so are 5 to 9.
WORDS = F.one_hot(torch.arange(10) // 5, 2).float() + 0.01 * torch.arange(10)[:, None]


def drawn(
    token: list[list[int]], special: list[list[int]], word: list[list[int]], seed: int = 0
) -> tuple[Tensor, Tensor]:
    draw = Draw(seed, 0, "cpu")
    parts = torch.tensor(token), torch.tensor(special).bool(), torch.tensor(word)
    exchange = exchange_words(*parts, WORDS, draw(len(token), len(token[0]), len(token[0])))
    return exchange.token_CT, exchange.changed_C


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 99))
def test_two_words_change_places_and_the_rest_stays(rows: list[list[int]], seed: int) -> None:
    special = [[1, 0, 0, 0, 1]] * len(rows)
    tokens, changed = drawn(rows, special, [[-1, 0, 1, 2, -1]] * len(rows), seed)
    for before, after, did in zip(rows, tokens.tolist(), changed.tolist(), strict=True):
        assert sorted(before) == sorted(after)
        assert (before[0], before[-1]) == (after[0], after[-1])
        assert did == (len(set(before[1:-1])) > 1)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 2 * did


def test_words_of_one_kind_change_places_and_pieces_of_a_longer_word_stay() -> None:
    tokens, changed = drawn([[0, 1, 5, 0]] * 400, [[0, 0, 0, 1]] * 400, [[0, 1, 2, -1]] * 400)
    assert (tokens[:, 2] == 5).float().mean() > 0.95
    tokens, changed = drawn([[0, 1, 2, 3]] * 50, [[0, 0, 0, 0]] * 50, [[0, 1, 1, 2]] * 50)
    assert changed.all()
    assert (tokens == torch.tensor([3, 1, 2, 0])).all()  # tokens 1 and 2 are one word: 0 and 3 are left


@pytest.mark.parametrize(("share", "alike"), [(0.5, False), (0.01, True)])
def test_exchanged_captions_take_the_place_of_hard_ones(share: float, alike: bool) -> None:
    """Half of the images, of which one has a caption of equal words: it keeps its hard caption. Or one image, which
    counts without another negative: all show the same image, so that no caption of the batch is one."""
    batch = eventful_batch()
    token_CT = batch.token_CT.clone()
    token_CT[1] = torch.where(batch.special_CT[1], token_CT[1], 7)
    batch = each_token_a_word(batch._replace(token_CT=token_CT))
    batch = batch._replace(image_id_B=torch.zeros_like(batch.image_id_B)) if alike else batch
    backbone, task = build(exchanged_share=share)
    task.set_uniform(Draw(3, 0, "cpu"))
    term = task(backbone, batch)["itm"]
    exchanged, (texts, images) = task.exchanged, task.last_negatives
    assert exchanged.changed_C.tolist() == ([True] if alike else [True, False, True, True])
    assert bool(texts.weight_B.any()) == bool(images.weight_B.any()) == (not alike)
    slow = Slow(task, backbone, batch)
    pairs = [(slow.image[i], slow.text[i], 1) for i in slow.valid]
    for i in slow.valid:
        if i < len(exchanged.changed_C) and exchanged.changed_C[i]:
            pairs.append((slow.image[i], slow.read(exchanged.token_CT[i], i), 0))
        elif texts.weight_B[i]:
            pairs.append((slow.image[i], slow.text[int(texts.index_B[i])], 0))
        if images.weight_B[i]:
            pairs.append((slow.image[int(images.index_B[i])], slow.text[i], 0))
    losses = []
    for one, other, match in pairs:
        product = slow_cross(backbone.cross_image, one, other)[0] * slow_cross(backbone.cross_text, other, one)[0]
        losses.append(-task.matching.classify(product).log_softmax(0)[match])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(term, expected, atol=1e-6, rtol=1e-5)
    # The encoders learn from them as well (`slow_cross` copies the weights of the cross encoders).
    weights = [p for module in (backbone.image, backbone.text) for p in module.parameters() if p.requires_grad]
    grads = (torch.autograd.grad(each, weights, allow_unused=True, materialize_grads=True) for each in (term, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()) + 1e-6, rtol=1e-4)


def test_no_other_loss_reads_them() -> None:
    batch, terms_by_share = each_token_a_word(eventful_batch()), {}
    for share in (0.0, 1.0):
        backbone, task = build(exchanged_share=share)
        terms_by_share[share] = {name: term.item() for name, term in task(backbone, batch).items()}
    matching = [terms.pop("itm") for terms in terms_by_share.values()]
    assert matching[0] != pytest.approx(matching[1])
    assert terms_by_share[1.0] == pytest.approx(terms_by_share[0.0])
