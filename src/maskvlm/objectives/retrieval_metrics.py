"""Retrieval in numbers: how images and captions rank each other, and recall, whatever gave the scores.

Shapes: B images, C captions (several an image), Q queries, G items of the gallery that they search. Everything
is in host memory; the matrices [B, C] are the only large ones (0.5 GB each for COCO's 5,000 x 25,000), and orders
are made of a block of queries at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # queries ordered at once: 50 MB for 25,000 items
KS = (1, 5, 10)


class Scores(NamedTuple):
    """What is known of every image with every caption; higher is better.

    Attributes:
        contrast_BC: cosine.
        match_BC: log-odds of a match, NaN where the pair was not scored; None where no pair was. What contrast adds to
            them (see `rerank.score_gallery`) is in them.
        owner_C: row of each caption's image.
    """

    contrast_BC: Tensor
    match_BC: Tensor | None
    owner_C: Tensor


class Ranking(NamedTuple):
    """rank_Q: how many irrelevant items come before the best relevant one. found_Q: the item in the first place."""

    rank_Q: Tensor
    found_Q: Tensor


class Rankings(NamedTuple):
    """text: images look for their captions (TR). image: captions look for their image (IR)."""

    text: Ranking
    image: Ranking


def contrast_scores(image_BE: Tensor, text_CE: Tensor) -> Tensor:
    """Cosine of every image with every caption, [B, C], in float32 also under autocast."""
    with torch.autocast(image_BE.device.type, enabled=False):
        return image_BE.float() @ text_CE.float().T


def topk_ranks(score_QG: Tensor, k: int) -> Tensor:
    """Place of the k best items of each query, from 0; G for all others."""
    total = score_QG.shape[1]
    best_QK = score_QG.topk(min(k, total), dim=1).indices
    # (Q, k) -> (Q, G): 0, 1, 2, ... at the best items.
    place_QK = torch.arange(best_QK.shape[1]).expand_as(best_QK)
    return torch.full(score_QG.shape, total).scatter(1, best_QK, place_QK)


def candidates(contrast_BC: Tensor, k: int) -> Tensor:
    """Pairs worth a second look, [B, C]: a caption among an image's k best, or an image among a caption's."""
    wanted_BC = torch.zeros(contrast_BC.shape, dtype=torch.bool)
    # Both directions write into one matrix: the second looks at it transposed, without a copy.
    for score_QG, wanted_QG in ((contrast_BC, wanted_BC), (contrast_BC.T, wanted_BC.T)):
        for score_qG, wanted_qG in zip(score_QG.split(BLOCK), wanted_QG.split(BLOCK), strict=True):
            wanted_qG |= topk_ranks(score_qG.contiguous(), k) < k
    return wanted_BC


def rerank_scores(contrast_QG: Tensor, match_QG: Tensor, place_QG: Tensor, k: int) -> Tensor:
    """Scores that put each query's k best by contrast first, in the order of matching; the others follow by contrast.

    Cosines lie in [-1, 1], so the log-odds are lifted above 1; in float64, where lifting rounds nothing that
    float32 told apart.
    """
    top_QG = place_QG < k
    # The lowest finite log-odds among the k best become 2.
    least_Q1 = match_QG.masked_fill(~(top_QG & match_QG.isfinite()), torch.inf).amin(1, keepdim=True)
    return torch.where(top_QG, match_QG.double() - least_Q1 + 2, contrast_QG.double())


def ranking(score_QG: Tensor, relevant_QG: Tensor) -> Ranking:
    """Where each query's best relevant item stands.

    A tie counts against the model: an irrelevant item of the same score ranks before the relevant one, so a
    model that gives every pair one score has recall 0. So does a score that is no number. The rank of a query
    without relevant item is beyond any gallery.
    """
    score_QG = score_QG.masked_fill(score_QG.isnan(), -torch.inf)
    # The best relevant item and the best irrelevant one of each query.
    good_Q, good_at_Q = score_QG.masked_fill(~relevant_QG, -torch.inf).max(1)
    bad_at_Q = score_QG.masked_fill(relevant_QG, -torch.inf).argmax(1)
    rank_Q = ((score_QG >= good_Q[:, None]) & ~relevant_QG).sum(1)
    rank_Q = rank_Q.masked_fill(~relevant_QG.any(1), torch.iinfo(torch.long).max)
    return Ranking(rank_Q, torch.where(rank_Q == 0, good_at_Q, bad_at_Q))


def rankings(scores: Scores, ks: Sequence[int]) -> dict[int, Rankings]:
    """Both directions, re-ranked at each k of `ks`: 0 is contrast alone, the size of the gallery matching alone."""
    contrast_BC, match_BC, owner_C = scores
    image_B = torch.arange(len(contrast_BC))
    text = _rankings(contrast_BC, match_BC, image_B, owner_C, ks)
    image = _rankings(contrast_BC.T, None if match_BC is None else match_BC.T, owner_C, image_B, ks)
    return {k: Rankings(text[k], image[k]) for k in ks}


def _rankings(
    contrast_QG: Tensor, match_QG: Tensor | None, query_Q: Tensor, item_G: Tensor, ks: Sequence[int]
) -> dict[int, Ranking]:
    """Of one direction; a query and an item of the same image are relevant to each other."""
    parts: dict[int, list[Ranking]] = {k: [] for k in ks}
    for first in range(0, len(query_Q), BLOCK):
        rows = slice(first, first + BLOCK)
        # The matrix of captions is a transposed view: a block is copied to be read row by row.
        contrast_qG, relevant_qG = contrast_QG[rows].contiguous(), query_Q[rows, None] == item_G
        # Once for the largest k: the smaller ones are its first places.
        place_qG = topk_ranks(contrast_qG, max(ks))
        for k in ks:
            score_qG = contrast_qG
            # k = 0 is contrast alone.
            if k and match_QG is not None:
                score_qG = rerank_scores(contrast_qG, match_QG[rows], place_qG, k)
            parts[k].append(ranking(score_qG, relevant_qG))
    return {k: Ranking(*(torch.cat(column) for column in zip(*found, strict=True))) for k, found in parts.items()}


def recall(score_QG: Tensor, relevant_QG: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent: share of queries with at least one relevant item among the best k; ties: see `ranking`."""
    return recall_of(ranking(score_QG, relevant_QG), ks)


def recall_of(found: Ranking, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent of an order that is known."""
    return {k: 100 * (found.rank_Q < k).double().mean().item() for k in ks}


def recall_chance(relevant_Q: Tensor, total: int, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent of a random order: at least one of a query's relevant items among k drawn of `total`."""
    levels = {}
    for k in ks:
        drawn = torch.arange(min(k, total))
        # None of k items is relevant, drawn without putting back: product of (total - relevant - i) / (total - i).
        missed_Q = ((total - relevant_Q[:, None] - drawn).clamp(min=0).double() / (total - drawn)).prod(1)
        levels[k] = 100 * (1 - missed_Q).mean().item()
    return levels


def named(levels: dict[int, float], name: str, end: str = "") -> dict[str, float]:
    """Recalls under the names of metrics: `retrieval/<name>_r<k><end>`."""
    return {f"retrieval/{name}_r{k}{end}": value for k, value in levels.items()}


def retrieval_metrics(scores: Scores, found: dict[int, Rankings], k: int) -> dict[str, float]:
    """Recall@1/5/10 both ways over all captions: by contrast alone (`itc_`) and, where pairs were matched, re-ranked
    at k; with the levels of chance, the sizes, and `score`, the mean of the two R@1.

    Args:
        found: from `rankings`, at 0 and, where pairs were matched, at k.
    """
    images, captions = scores.contrast_BC.shape
    metrics: dict[str, float] = {"retrieval/pictures": images, "retrieval/captions": captions}
    # Without matching there are only the names `itc_`, and `score` is theirs.
    best = "itc_" if scores.match_BC is None else ""
    for name, ranked in {"itc_": found[0], best: found[0 if best else k]}.items():
        metrics |= named(recall_of(ranked.text), f"{name}tr") | named(recall_of(ranked.image), f"{name}ir")
    own_B = torch.bincount(scores.owner_C, minlength=images)
    metrics |= named(recall_chance(own_B, captions), "tr", "_chance")
    metrics |= named(recall_chance(torch.ones_like(scores.owner_C), images), "ir", "_chance")
    metrics["score"] = (metrics[f"retrieval/{best}tr_r1"] + metrics[f"retrieval/{best}ir_r1"]) / 2
    return metrics
