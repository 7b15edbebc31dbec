"""Recall against NumPy, and re-ranking against every pair scored by itself."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_step import build
from torch import Tensor
from toys import slow_cross, toy_batch

from maskvlm.heads import Matching
from maskvlm.model import MaskVLM
from maskvlm.retrieval import Gallery, chance, contrast_scores, match_pairs, recall, rerank

PICTURES, CAPTIONS = 5, 3
OWNER = torch.arange(PICTURES).repeat_interleave(CAPTIONS)


@pytest.fixture(scope="module")
def world() -> tuple[MaskVLM, Matching, Gallery]:
    backbone, task = build()
    batch = toy_batch(PICTURES, captions=CAPTIONS)
    with torch.no_grad():
        image_BLD = backbone.image(batch.image_BCHW)
        text_CTD = backbone.text(batch.token_CT, batch.attention_CT)
        image_BE, text_CE = task.projection.embed_image(image_BLD), task.projection.embed_text(text_CTD)
    gallery = Gallery(image_BE, text_CE, image_BLD, text_CTD, batch.attention_CT, batch.owner_C)
    return backbone.eval(), task.matching, gallery


@torch.no_grad()
def slow_odds(backbone: MaskVLM, head: Matching, gallery: Gallery) -> Tensor:
    """Log-odds of a match of every picture with every caption, one pair at a time."""
    odds_BC = torch.zeros(PICTURES, len(OWNER))
    for b, c in np.ndindex(*odds_BC.shape):
        words_TD = gallery.text_CTD[c, gallery.attention_CT[c]]
        image_D = slow_cross(backbone.cross_image, gallery.image_BLD[b], words_TD)[0]
        text_D = slow_cross(backbone.cross_text, words_TD, gallery.image_BLD[b])[0]
        no, yes = head.classify(image_D * text_D)
        odds_BC[b, c] = yes - no
    return odds_BC


# ---------------------------------------------------------------------- recall


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31))
def test_recall_is_the_share_of_queries_with_a_relevant_item_among_the_best(
    queries: int, items: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    score, relevant = (
        rng.permuted(np.arange(queries * items).reshape(queries, items), axis=1),
        rng.random((queries, items)) < 0.3,
    )
    best = np.argsort(-score, axis=1)
    expected = {k: 100 * np.mean([relevant[q, best[q, :k]].any() for q in range(queries)]) for k in (1, 5, 10)}
    assert recall(torch.from_numpy(score).float(), torch.from_numpy(relevant)) == pytest.approx(expected)


def test_a_tie_counts_against_the_model() -> None:
    relevant = torch.eye(12, dtype=torch.bool)
    assert recall(torch.ones(12, 12), relevant) == {1: 0.0, 5: 0.0, 10: 0.0}
    score = torch.tensor([[3.0, 3.0, 1.0], [1.0, 3.0, 1.0]])
    assert recall(score, torch.tensor([[True, False, False], [False, True, False]]), (1, 2)) == {
        1: 50.0,
        2: 100.0,
    }
    both = torch.tensor([[True, True, False]])
    assert recall(score[:1], both, (1,)) == {1: 100.0}  # between two relevant ones it does not matter


def test_a_broken_model_finds_nothing() -> None:
    relevant = torch.eye(3, 12, dtype=torch.bool)
    assert recall(torch.full((3, 12), torch.nan), relevant) == {1: 0.0, 5: 0.0, 10: 0.0}
    score = torch.eye(3, 12).masked_fill(torch.eye(3, 12, dtype=torch.bool).roll(1, 0), torch.nan)
    assert recall(score, relevant, (1,)) == {1: 100.0}  # a NaN elsewhere does no harm


def test_a_query_without_a_relevant_item_is_missed() -> None:
    assert recall(torch.eye(2), torch.tensor([[True, False], [False, False]]), (1, 2)) == {1: 50.0, 2: 50.0}


@given(st.integers(1, 15), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_chance_is_that_of_a_draw_by_lot(items: int, relevant: list[int]) -> None:
    counts = [min(count, items) for count in relevant]
    relevant_QG = torch.arange(items) < torch.tensor(counts)[:, None]
    for k, level in chance(relevant_QG).items():
        drawn = min(k, items)
        missed = [math.comb(items - count, drawn) / math.comb(items, drawn) for count in counts]
        assert level == pytest.approx(100 * (1 - sum(missed) / len(missed)))


# ---------------------------------------------------------------------- scores


def test_contrast_scores_are_cosines(world: tuple[MaskVLM, Matching, Gallery]) -> None:
    scores = contrast_scores(world[2])
    assert scores.text_BC.shape == (PICTURES, len(OWNER))
    cosine = torch.nn.functional.cosine_similarity(world[2].image_BE[:, None], world[2].text_CE, dim=-1)
    torch.testing.assert_close(scores.text_BC, cosine)
    assert torch.equal(scores.image_CB, scores.text_BC.T)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_log_odds_are_those_of_single_pairs(world: tuple[MaskVLM, Matching, Gallery], chunk: int) -> None:
    image_M, text_M = torch.tensor([4, 0, 2, 2, 1]), torch.tensor([0, 14, 3, 3, 7])
    found = match_pairs(*world, image_M, text_M, chunk)
    torch.testing.assert_close(found, slow_odds(*world)[image_M, text_M], atol=1e-5, rtol=1e-5)
    assert match_pairs(*world, image_M[:0], text_M[:0], chunk).shape == (0,)


def order(score_QG: Tensor) -> list[list[int]]:
    return score_QG.argsort(dim=1, descending=True).tolist()


def test_reranking_everything_orders_by_matching_alone(world: tuple[MaskVLM, Matching, Gallery]) -> None:
    odds_BC = slow_odds(*world)
    scores = rerank(*world, k=1000, chunk=7)
    assert order(scores.text_BC) == order(odds_BC)
    assert order(scores.image_CB) == order(odds_BC.T)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("doubt", [0.0, 30.0])
def test_the_best_by_contrast_come_first_in_the_order_of_matching(
    world: tuple[MaskVLM, Matching, Gallery], k: int, doubt: float
) -> None:
    """Also where matching believes in no pair at all: every log-odd is then below every cosine."""
    backbone, head, gallery = world
    odds_BC, contrast = slow_odds(*world) - doubt, contrast_scores(gallery)
    doubtful = copy.deepcopy(head)
    doubtful.classify.bias.data[0] += doubt
    scores = rerank(backbone, doubtful, gallery, k=k)
    for found, cosine, odds in (
        (scores.text_BC, contrast.text_BC, odds_BC),
        (scores.image_CB, contrast.image_CB, odds_BC.T),
    ):
        by_contrast = order(cosine)
        for row, best in enumerate(by_contrast):
            head_of_row = sorted(best[:k], key=lambda item: -odds[row, item].item())
            assert order(found)[row] == head_of_row + best[k:]


def test_small_differences_of_matching_survive(world: tuple[MaskVLM, Matching, Gallery]) -> None:
    """A model at its start tells pairs apart by thousandths; ties would count as misses."""
    backbone, head, gallery = world
    faint = Matching(head.classify.in_features)
    faint.load_state_dict({name: 1e-2 * value for name, value in head.state_dict().items()})
    scores = rerank(backbone, faint, gallery, k=1000)
    assert order(scores.text_BC) == order(slow_odds(*world))


def test_a_caption_of_padding_width_does_not_matter(world: tuple[MaskVLM, Matching, Gallery]) -> None:
    backbone, head, gallery = world
    pad = torch.nn.functional.pad
    wider = gallery._replace(
        text_CTD=pad(gallery.text_CTD, (0, 0, 0, 4), value=9.0),
        attention_CT=pad(gallery.attention_CT, (0, 4)),
    )
    torch.testing.assert_close(rerank(backbone, head, wider, k=3), rerank(*world, k=3), atol=1e-5, rtol=1e-5)
