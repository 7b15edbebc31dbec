"""Recall against NumPy and the published evaluation of COCO, and orders of two stages against sorting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskvlm.objectives.retrieval_metrics import (
    BLOCK,
    Scores,
    best_items,
    candidates,
    contrast_scores,
    ranking,
    rankings,
    recall,
    recall_chance,
    recall_of,
    retrieval_metrics,
    top_items,
)

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
    ranks = ranking(torch.from_numpy(score).float(), torch.from_numpy(relevant))
    assert recall_of(ranks) == pytest.approx(expected)
    assert ranks.top_Q.tolist() == best[:, 0].tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:failed to import")  # of its faster JSON reader
def test_recall_of_coco_is_that_of_its_published_evaluation() -> None:
    """Noisy vectors for the 5,000 images and 25,000 captions of COCO's test split; the package brings which caption
    belongs to which image. Its R@k is a share, and looks at no more than the best ten."""
    judge = pytest.importorskip("eccv_caption").Metrics()
    caption_C = judge.coco_ids.tolist()
    image_C = [judge.coco_gts["t2i"][caption][0] for caption in caption_C]
    image_B = list(judge.coco_gts["i2t"])
    row = {image: b for b, image in enumerate(image_B)}
    owner_C = torch.tensor([row[image] for image in image_C])
    generator = torch.Generator().manual_seed(0)
    image_BE = torch.randn(len(image_B), 16, generator=generator)
    text_CE = image_BE[owner_C] + 1.2 * torch.randn(len(owner_C), 16, generator=generator)
    scores = Scores(contrast_scores(image_BE, text_CE), None, owner_C)
    ranks = rankings(scores, [0])[0]

    best_BK, best_CK = (part.topk(10, dim=1).indices.tolist() for part in (scores.contrast_BC, scores.contrast_BC.T))
    retrieved = {
        "i2t": {image: [caption_C[c] for c in best] for image, best in zip(image_B, best_BK, strict=True)},
        "t2i": {caption: [image_B[b] for b in best] for caption, best in zip(caption_C, best_CK, strict=True)},
    }
    assert (len(image_B), len(caption_C)) == (5000, 25000)
    for k in (1, 5, 10):
        theirs = judge.coco_5k_recalls(retrieved, "all", K=k)
        assert 0.1 < theirs["t2i"] < 0.9
        assert recall_of(ranks.text, [k]) == {k: pytest.approx(100 * theirs["i2t"])}
        assert recall_of(ranks.image, [k]) == {k: pytest.approx(100 * theirs["t2i"])}


def test_a_tie_counts_against_the_model() -> None:
    relevant = torch.eye(12, dtype=torch.bool)
    assert recall(torch.ones(12, 12), relevant) == {1: 0.0, 5: 0.0, 10: 0.0}
    assert not (ranking(torch.ones(12, 12), relevant).top_Q == torch.arange(12)).any()  # and another is found
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
    for k, level in recall_chance(torch.tensor(counts), items).items():
        drawn = min(k, items)
        missed = [math.comb(items - count, drawn) / math.comb(items, drawn) for count in counts]
        assert level == pytest.approx(100 * (1 - sum(missed) / len(missed)))


# ---------------------------------------------------------------------- orders


def two_stage(contrast_G: np.ndarray, match_G: np.ndarray, k: int) -> list[int]:
    """The k best by contrast in the order of matching, then the others by contrast."""
    best = np.argsort(-contrast_G).tolist()
    return sorted(best[:k], key=lambda item: -match_G[item]) + best[k:]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([-30.0, 0.0, 30.0]))
def test_the_best_by_contrast_come_first_in_the_order_of_matching(
    images: int, captions: int, seed: int, belief: float
) -> None:
    """Also where matching believes in no pair at all: every log-odd is then below every cosine. Pairs that are no
    candidates hold no number."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    contrast = rng.uniform(-1, 1, (images, len(owner))).astype(np.float32)
    odds = (rng.normal(size=contrast.shape) + belief).astype(np.float32)
    for k in (1, 2, 4, 100):
        wanted = candidates(best_items(torch.from_numpy(contrast), k))
        match_BC = torch.from_numpy(odds).masked_fill(~wanted, torch.nan)
        ranks_by_k = rankings(Scores(torch.from_numpy(contrast), match_BC, torch.from_numpy(owner)), [0, k])
        for step in (0, k):
            orders = [two_stage(contrast[b], odds[b], step) for b in range(images)]
            ranks = [[owner[c] == b for c in order].index(True) for b, order in enumerate(orders)]
            assert ranks_by_k[step].text.rank_Q.tolist() == ranks
            assert ranks_by_k[step].text.top_Q.tolist() == [order[0] for order in orders]
            orders = [two_stage(contrast[:, c], odds[:, c], step) for c in range(len(owner))]
            assert ranks_by_k[step].image.rank_Q.tolist() == [order.index(owner[c]) for c, order in enumerate(orders)]


def dense(contrast_QG: torch.Tensor, match_QG: torch.Tensor, k: int) -> torch.Tensor:
    """One score for each item, whose order is that of two stages: all of a matrix at once."""
    best_QK = contrast_QG.topk(min(k, contrast_QG.shape[1]), dim=1).indices
    top_QG = torch.zeros_like(contrast_QG, dtype=torch.bool).scatter(1, best_QK, True)
    least_Q1 = match_QG.masked_fill(~(top_QG & match_QG.isfinite()), torch.inf).amin(1, keepdim=True)
    return torch.where(top_QG, match_QG.double() - least_Q1 + 2, contrast_QG.double())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 60), st.integers(1, 70), st.integers(0, 2**31))
def test_ranks_are_those_of_one_dense_score(images: int, captions: int, k: int, seed: int) -> None:
    """Images without a caption and with several, matches that are no number, and equal ones."""
    rng = np.random.default_rng(seed)
    owner_C = torch.from_numpy(rng.integers(0, images, captions))
    contrast_BC = torch.from_numpy(rng.permutation(images * captions).reshape(images, captions) / 1e4).float()
    match_BC = torch.from_numpy(rng.integers(-3, 4, (images, captions))).float()
    match_BC[torch.from_numpy(rng.random((images, captions)) < 0.1)] = torch.nan
    match_BC[torch.from_numpy(rng.random((images, captions)) < 0.05)] = -torch.inf
    relevant_BC = owner_C == torch.arange(images)[:, None]
    for best in (None, best_items(contrast_BC, k)):
        ranks_by_k = rankings(Scores(contrast_BC, match_BC, owner_C, best), [0, k])
        for at, text, image in (
            (0, contrast_BC, contrast_BC.T),
            (k, dense(contrast_BC, match_BC, k), dense(contrast_BC.T, match_BC.T, k)),
        ):
            assert torch.equal(ranks_by_k[at].text.rank_Q, ranking(text, relevant_BC).rank_Q)
            assert torch.equal(ranks_by_k[at].image.rank_Q, ranking(image, relevant_BC.T).rank_Q)
            # Of equal items any may be named: a relevant one where the rank is 0, else an irrelevant one.
            for matrix, one, relevant in (
                (text, ranks_by_k[at].text, relevant_BC),
                (image, ranks_by_k[at].image, relevant_BC.T),
            ):
                score = matrix.masked_fill(matrix.isnan(), -torch.inf)
                right = one.rank_Q == 0
                assert torch.equal(relevant.gather(1, one.top_Q[:, None])[:, 0], right)
                best_Q = score.masked_fill(relevant != right[:, None], -torch.inf).amax(1)
                assert torch.equal(score.gather(1, one.top_Q[:, None])[:, 0], best_Q)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**31))
def test_ties_of_contrast_count_against_the_model(images: int, captions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    owner_C = torch.from_numpy(rng.integers(0, images, captions))
    contrast_BC = torch.from_numpy(rng.integers(0, 3, (images, captions))).float()
    relevant_BC = owner_C == torch.arange(images)[:, None]
    for best in (None, best_items(contrast_BC, 2)):
        ranks = rankings(Scores(contrast_BC, None, owner_C, best), [0])[0]
        for one, matrix, relevant in (
            (ranks.text, contrast_BC, relevant_BC),
            (ranks.image, contrast_BC.T, relevant_BC.T),
        ):
            expected = ranking(matrix, relevant)
            assert torch.equal(one.rank_Q, expected.rank_Q)
            # What stands first is relevant where the rank is 0, and only there.
            assert torch.equal(relevant.gather(1, one.top_Q[:, None])[:, 0], one.rank_Q == 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 700), st.integers(1, 30), st.integers(0, 2**31), st.booleans())
def test_the_best_items_are_those_of_a_sorted_list(rows: int, items: int, k: int, seed: int, across: bool) -> None:
    """Whatever remains of groups, and of a matrix that lies the other way round."""
    score = np.random.default_rng(seed).permutation(rows * items).reshape(items, rows).astype(np.float32)
    score_QG = torch.from_numpy(score).T if across else torch.from_numpy(score.T.copy())
    best_QK = top_items(score_QG, k)
    expected = score_QG.sort(dim=1, descending=True).indices[:, :k]
    assert torch.equal(best_QK, expected)


def test_candidates_are_the_best_of_either_direction() -> None:
    contrast_BC = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.3, 0.2]])
    assert candidates(best_items(contrast_BC, 1)).tolist() == [[True, True, False], [True, False, True]]
    assert candidates(best_items(contrast_BC, 3)).all()


def test_small_differences_of_matching_survive() -> None:
    """A model at its start tells pairs apart by millionths; ties would count as misses. And one far log-odd must not
    swallow the differences of the others."""
    match_BC = torch.tensor([[1e-7, 2e-7, -1e4]])
    scores = Scores(torch.tensor([[0.9, 0.8, 0.7]]), match_BC, torch.tensor([1, 0, 1]))
    assert rankings(scores, [3])[3].text.rank_Q.tolist() == [0]


def test_a_match_that_is_no_number_comes_last_of_all() -> None:
    scores = Scores(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[torch.nan, -1.0, 0.0]]), torch.tensor([0, 1, 1]))
    assert rankings(scores, [2])[2].text.rank_Q.tolist() == [2]


def test_more_queries_than_a_block_are_ordered_alike() -> None:
    """At k = 0 as contrast says, where all are matched as matching says."""
    generator = torch.Generator().manual_seed(0)
    images, captions = BLOCK + 3, 2 * BLOCK + 1
    contrast_BC, match_BC = torch.rand(2, images, captions, generator=generator)
    owner_C = torch.randint(images, (captions,), generator=generator)
    ranks_by_k = rankings(Scores(contrast_BC, match_BC, owner_C), [0, captions])
    relevant_BC = owner_C == torch.arange(images)[:, None]
    for k, matrix in ((0, contrast_BC), (captions, match_BC)):
        expected = ranking(matrix, relevant_BC), ranking(matrix.T, relevant_BC.T)
        for ours, one in zip(ranks_by_k[k], expected, strict=True):
            assert torch.equal(ours.rank_Q, one.rank_Q)
            assert torch.equal(ours.top_Q, one.top_Q)


def test_metrics_have_the_names_and_numbers_of_both_stages() -> None:
    """Contrast finds none of two, matching one of two; three captions, the third of the second image."""
    contrast_BC = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.4, 0.1]])
    match_BC = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 1.0]])
    scores = Scores(contrast_BC, match_BC, torch.tensor([0, 1, 1]))
    metrics = retrieval_metrics(scores, rankings(scores, [0, 3]), 3)
    assert (metrics["retrieval/pictures"], metrics["retrieval/captions"]) == (2, 3)
    assert (metrics["retrieval/itc_tr_r1"], metrics["retrieval/tr_r1"]) == (0.0, 50.0)
    assert metrics["retrieval/itc_ir_r1"] == pytest.approx(100 / 3)
    assert metrics["retrieval/ir_r1"] == pytest.approx(100 / 3)
    assert (metrics["retrieval/tr_r1_chance"], metrics["retrieval/ir_r1_chance"]) == (
        pytest.approx(50),
        pytest.approx(50),
    )
    assert metrics["score"] == pytest.approx((50 + 100 / 3) / 2)
    alone = retrieval_metrics(scores._replace(match_BC=None), rankings(scores, [0]), 3)
    assert alone.keys() == {key for key in metrics if "itc" in key or "chance" in key or key.endswith("s")} | {"score"}
    assert alone["score"] == pytest.approx((0 + 100 / 3) / 2)


def test_contrast_is_in_single_precision_also_under_autocast() -> None:
    image_BE, text_CE = nn.functional.normalize(torch.randn(4, 8)), nn.functional.normalize(torch.randn(6, 8))
    with torch.autocast("cpu", torch.bfloat16):
        score_BC = contrast_scores(image_BE, text_CE)
    assert score_BC.dtype == torch.float32
    torch.testing.assert_close(score_BC, nn.functional.cosine_similarity(image_BE[:, None], text_CE, dim=-1))
