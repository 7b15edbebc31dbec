"""Recall against NumPy and the published evaluation of COCO, and orders of two stages against sorting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvlm.objectives.retrieval_metrics import (
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
)

# ---------------------------------------------------------------------- recall


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31))
def test_recall_is_the_share_of_queries_with_a_relevant_item_among_the_best(
    queries: int, items: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    score = rng.permuted(np.arange(queries * items).reshape(queries, items), axis=1)
    relevant = rng.random((queries, items)) < 0.3
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


def test_ties_and_what_is_no_number_count_against_the_model() -> None:
    nothing, relevant = {1: 0.0, 5: 0.0, 10: 0.0}, torch.eye(12, dtype=torch.bool)
    assert recall(torch.ones(12, 12), relevant) == nothing
    assert not (ranking(torch.ones(12, 12), relevant).top_Q == torch.arange(12)).any()  # and another is found
    score = torch.tensor([[3.0, 3.0, 1.0], [1.0, 3.0, 1.0]])
    one_each = torch.tensor([[True, False, False], [False, True, False]])
    assert recall(score, one_each, (1, 2)) == {1: 50.0, 2: 100.0}
    both = torch.tensor([[True, True, False]])
    assert recall(score[:1], both, (1,)) == {1: 100.0}  # between two relevant ones it does not matter
    assert recall(torch.full((12, 12), torch.nan), relevant) == nothing
    score = torch.eye(12).masked_fill(relevant.roll(1, 0), torch.nan)
    assert recall(score, relevant, (1,)) == {1: 100.0}  # a NaN elsewhere does no harm
    missed = torch.tensor([[True, False], [False, False]])  # a query without a relevant item
    assert recall(torch.eye(2), missed, (1, 2)) == {1: 50.0, 2: 50.0}


@settings(max_examples=20)
@given(st.integers(1, 15), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_chance_is_that_of_a_draw_by_lot(items: int, relevant: list[int]) -> None:
    counts = [min(count, items) for count in relevant]
    for k, level in recall_chance(torch.tensor(counts), items).items():
        drawn = min(k, items)
        missed = [math.comb(items - count, drawn) / math.comb(items, drawn) for count in counts]
        assert level == pytest.approx(100 * (1 - sum(missed) / len(missed)))


# ---------------------------------------------------------------------- orders


def dense(contrast_QG: torch.Tensor, match_QG: torch.Tensor, k: int) -> torch.Tensor:
    """One score for each item, whose order is that of two stages: all of a matrix at once."""
    best_QK = contrast_QG.topk(min(k, contrast_QG.shape[1]), dim=1).indices
    top_QG = torch.zeros_like(contrast_QG, dtype=torch.bool).scatter(1, best_QK, True)
    least_Q1 = match_QG.masked_fill(~(top_QG & match_QG.isfinite()), torch.inf).amin(1, keepdim=True)
    return torch.where(top_QG, match_QG.double() - least_Q1 + 2, contrast_QG.double())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 60), st.integers(1, 70), st.integers(0, 2**31))
def test_ranks_are_those_of_one_dense_score(images: int, captions: int, k: int, seed: int) -> None:
    """Images without a caption and with several, matches that are no number, equal ones, and ties of contrast where
    it ranks alone; queries in blocks that do not divide them."""
    rng = np.random.default_rng(seed)
    owner_C = torch.from_numpy(rng.integers(0, images, captions))
    contrast_BC = torch.from_numpy(rng.permutation(images * captions).reshape(images, captions) / 1e4).float()
    match_BC = torch.from_numpy(rng.integers(-3, 4, (images, captions))).float()
    match_BC[torch.from_numpy(rng.random((images, captions)) < 0.1)] = torch.nan
    match_BC[torch.from_numpy(rng.random((images, captions)) < 0.05)] = -torch.inf
    relevant_BC = owner_C == torch.arange(images)[:, None]
    tied_BC = torch.from_numpy(rng.integers(0, 3, (images, captions))).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskvlm.objectives.retrieval_metrics.BLOCK", 7)
        for known in (False, True):
            best, of_tied = (best_items(each, k) if known else None for each in (contrast_BC, tied_BC))
            few = (k + 1) // 2
            ranks_by_k = rankings(Scores(contrast_BC, match_BC, owner_C, best), sorted({0, few, k}))
            by_contrast = rankings(Scores(tied_BC, None, owner_C, of_tied), [0])[0]
            for matrix, ours, relevant in (
                (tied_BC, by_contrast.text, relevant_BC),
                (tied_BC.T, by_contrast.image, relevant_BC.T),
                (contrast_BC, ranks_by_k[0].text, relevant_BC),
                (contrast_BC.T, ranks_by_k[0].image, relevant_BC.T),
                (dense(contrast_BC, match_BC, few), ranks_by_k[few].text, relevant_BC),
                (dense(contrast_BC.T, match_BC.T, few), ranks_by_k[few].image, relevant_BC.T),
                (dense(contrast_BC, match_BC, k), ranks_by_k[k].text, relevant_BC),
                (dense(contrast_BC.T, match_BC.T, k), ranks_by_k[k].image, relevant_BC.T),
            ):
                assert torch.equal(ours.rank_Q, ranking(matrix, relevant).rank_Q)
                # Of equal items any may be named: a relevant one where the rank is 0, else an irrelevant one.
                score, right = matrix.masked_fill(matrix.isnan(), -torch.inf), ours.rank_Q == 0
                assert torch.equal(relevant.gather(1, ours.top_Q[:, None])[:, 0], right)
                best_Q = score.masked_fill(relevant != right[:, None], -torch.inf).amax(1)
                assert torch.equal(score.gather(1, ours.top_Q[:, None])[:, 0], best_Q)


def test_candidates_are_the_best_of_either_direction() -> None:
    contrast_BC = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.3, 0.2]])
    assert candidates(best_items(contrast_BC, 1)).tolist() == [[True, True, False], [True, False, True]]


def test_small_differences_of_matching_survive_and_no_number_comes_last() -> None:
    """A model at its start tells pairs apart by millionths; ties would count as misses. And one far log-odd must not
    swallow the differences of the others."""
    contrast_BC, best_is_second = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([1, 0, 1])
    scores = Scores(contrast_BC, torch.tensor([[1e-7, 2e-7, -1e4]]), best_is_second)
    assert rankings(scores, [3])[3].text.rank_Q.tolist() == [0]
    scores = Scores(contrast_BC, torch.tensor([[torch.nan, -1.0, 0.0]]), torch.tensor([0, 1, 1]))
    assert rankings(scores, [2])[2].text.rank_Q.tolist() == [2]
    scores = Scores(contrast_BC.clone().index_fill_(1, torch.tensor([0]), torch.nan), None, best_is_second)
    assert rankings(scores, [0])[0].text.rank_Q.tolist() == [0]


def test_metrics_have_the_names_and_numbers_of_both_stages() -> None:
    """Contrast finds none of two, matching one of two; three captions, the third of the second image."""
    contrast_BC = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.4, 0.1]])
    match_BC = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 1.0]])
    scores = Scores(contrast_BC, match_BC, torch.tensor([0, 1, 1]))
    metrics = retrieval_metrics(scores, rankings(scores, [0, 3]), 3)
    assert {name: value for name, value in metrics.items() if "_r5" not in name and "_r10" not in name} == {
        "retrieval/pictures": 2,
        "retrieval/captions": 3,
        "retrieval/itc_tr_r1": 0.0,
        "retrieval/itc_ir_r1": pytest.approx(100 / 3),
        "retrieval/tr_r1": 50.0,
        "retrieval/ir_r1": pytest.approx(100 / 3),
        "retrieval/tr_r1_chance": pytest.approx(50),
        "retrieval/ir_r1_chance": pytest.approx(50),
        "score": pytest.approx((50 + 100 / 3) / 2),
    }
    alone = retrieval_metrics(scores._replace(match_BC=None), rankings(scores, [0]), 3)
    assert alone.keys() == {key for key in metrics if "itc" in key or "chance" in key or key.endswith("s")} | {"score"}
    assert alone["score"] == pytest.approx((0 + 100 / 3) / 2)
