"""Retrieval metrics: how images and captions rank each other, and recall, for any source of scores.

Shapes: B images, C captions (several per image), Q queries, G items of the gallery that they search. Everything
is in host memory; only the matrices [B, C] are large (0.5 GB each for COCO's 5,000 x 25,000), and sorting works on a
block of queries at a time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # queries ranked at once: 50 MB for 25,000 items
KS = (1, 5, 10)


class Scores(NamedTuple):
    """Scores of every image with every caption; higher is better.

    Attributes:
        contrast_BC: cosine.
        match_BC: matching log-odds, NaN where a pair was not scored; None if no pair was. Includes what contrast adds
            (see `rerank.score_gallery`).
        owner_C: row of each caption's image.
        best: from `best_items`, if already known.
    """

    contrast_BC: Tensor
    match_BC: Tensor | None
    owner_C: Tensor
    best: "BestItems | None" = None


class BestItems(NamedTuple):
    """The k best by contrast, best first: captions of each image [B, k], and images of each caption [C, k]."""

    text_BK: Tensor
    image_CK: Tensor


class Ranking(NamedTuple):
    """rank_Q: how many irrelevant items come before the best relevant one. top_Q: the top-ranked item."""

    rank_Q: Tensor
    top_Q: Tensor


class Rankings(NamedTuple):
    """text: image-to-text retrieval (TR). image: text-to-image retrieval (IR)."""

    text: Ranking
    image: Ranking


def contrast_scores(image_BE: Tensor, text_CE: Tensor) -> Tensor:
    """Cosine of every image with every caption, [B, C], in float32 even under autocast."""
    with torch.autocast(image_BE.device.type, enabled=False):
        return image_BE.float() @ text_CE.float().T


def top_items(score_QG: Tensor, k: int) -> Tensor:
    """The k best items of each query, best first, [Q, k]; all items if there are fewer.

    Each of the k best lies in one of the k groups of neighbours with the highest maxima, so only about 4,000 of 25,000
    items need to be sorted.
    """
    total = score_QG.shape[1]
    k = min(k, total)
    # Groups of size s leave total / s maxima and k * s members to sort: fewest at s = sqrt(total / k).
    size = 2 ** round(math.log2(math.sqrt(total / k)))
    if size < 2:
        return score_QG.topk(k, dim=1).indices
    grouped = total - total % size
    if score_QG.stride(1) == 1:
        most_Qg = score_QG[:, :grouped].unflatten(1, (-1, size)).amax(2)
    else:
        # Read a transposed matrix in memory order: ten times as fast.
        most_Qg = score_QG.T[:grouped].unflatten(0, (-1, size)).amax(1).T.contiguous()
    group_Qk = most_Qg.topk(min(k, most_Qg.shape[1]), dim=1).indices
    # (Q, k, size) -> (Q, k * size), plus the few left over.
    member_QM = (group_Qk[..., None] * size + torch.arange(size)).flatten(1)
    member_QM = torch.cat([member_QM, torch.arange(grouped, total).expand(len(score_QG), -1)], 1)
    best_Qk = score_QG.gather(1, member_QM).topk(k, dim=1).indices
    return member_QM.gather(1, best_Qk)


def best_items(contrast_BC: Tensor, k: int) -> BestItems:
    """The k best of each query in both directions."""
    text, image = (
        torch.cat([top_items(block_qG, k) for block_qG in score_QG.split(BLOCK)])
        for score_QG in (contrast_BC, contrast_BC.T)
    )
    return BestItems(text, image)


def candidates(best: BestItems) -> Tensor:
    """Pairs to re-rank, [B, C]: a caption among an image's k best, or an image among a caption's k best."""
    wanted_BC = torch.zeros(len(best.text_BK), len(best.image_CK), dtype=torch.bool)
    wanted_BC.scatter_(1, best.text_BK, True)
    # Both directions write into one matrix, the second through its transpose.
    wanted_BC.T.scatter_(1, best.image_CK, True)
    return wanted_BC


def ranking(score_QG: Tensor, relevant_QG: Tensor) -> Ranking:
    """Rank of each query's best relevant item.

    Ties count against the model: an irrelevant item with the same score ranks before the relevant one, so a model that
    gives every pair the same score has recall 0. So do NaN scores. The rank of a query without relevant items is beyond
    any gallery.
    """
    score_QG = score_QG.masked_fill(score_QG.isnan(), -torch.inf)
    # The best relevant item and the best irrelevant one of each query.
    good_Q, good_at_Q = score_QG.masked_fill(~relevant_QG, -torch.inf).max(1)
    bad_at_Q = score_QG.masked_fill(relevant_QG, -torch.inf).argmax(1)
    rank_Q = ((score_QG >= good_Q[:, None]) & ~relevant_QG).sum(1)
    rank_Q = rank_Q.masked_fill(~relevant_QG.any(1), torch.iinfo(torch.long).max)
    return Ranking(rank_Q, torch.where(rank_Q == 0, good_at_Q, bad_at_Q))


def rankings(scores: Scores, ks: Sequence[int]) -> dict[int, Rankings]:
    """Both directions, re-ranked at each k in `ks`: 0 is contrast alone, the gallery size is matching alone."""
    contrast_BC, match_BC, owner_C, best = scores
    image_B = torch.arange(len(contrast_BC))
    if bool(contrast_BC.sum().isnan()):
        contrast_BC, best = lowest_if_nan(contrast_BC), None
    known = (None, None) if best is None or best.text_BK.shape[1] < min(max(ks), len(owner_C)) else best
    text = _rankings(contrast_BC, match_BC, image_B, owner_C, ks, known[0])
    match_CB = None if match_BC is None else match_BC.T
    image = _rankings(contrast_BC.T, match_CB, owner_C, image_B, ks, known[1])
    return {k: Rankings(text[k], image[k]) for k in ks}


def _rankings(
    contrast_QG: Tensor,
    match_QG: Tensor | None,
    query_Q: Tensor,
    item_G: Tensor,
    ks: Sequence[int],
    best_QK: Tensor | None,
) -> dict[int, Ranking]:
    """Ranking of one direction at each k in `ks`; a query and an item of the same image are relevant to each other."""
    parts: dict[int, list[Ranking]] = {k: [] for k in ks}
    relevant_QR = relevant_items(query_Q, item_G)
    for first in range(0, len(query_Q), BLOCK):
        rows = slice(first, first + BLOCK)
        block = QueryBlock(contrast_QG[rows], relevant_QR[rows])
        by_contrast = block.by_contrast(None if best_QK is None else best_QK[rows, 0])
        if match_QG is None or not max(ks):
            for k in ks:
                parts[k].append(by_contrast)
            continue
        # Once for the largest k: smaller k are its prefix.
        top_qK = top_items(block.contrast_qG, max(ks)) if best_QK is None else best_QK[rows]
        match_qK = match_QG[rows].gather(1, top_qK)
        for k in ks:
            # k = 0 is contrast alone.
            parts[k].append(block.reranked(top_qK[:, :k], match_qK[:, :k]) if k else by_contrast)
    return {k: Ranking(*(torch.cat(column) for column in zip(*blocks, strict=True))) for k, blocks in parts.items()}


def relevant_items(query_Q: Tensor, item_G: Tensor) -> Tensor:
    """Indices of the items that are relevant to each query, [Q, R]; padded with G if there are fewer than R."""
    order_G = item_G.argsort(stable=True)
    sorted_G = item_G[order_G]
    first_Q, behind_Q = torch.searchsorted(sorted_G, query_Q), torch.searchsorted(sorted_G, query_Q, right=True)
    most = max(1, int((behind_Q - first_Q).max())) if len(query_Q) else 1
    place_QR = first_Q[:, None] + torch.arange(most)
    there_QR = place_QR < behind_Q[:, None]
    return torch.where(there_QR, order_G[place_QR.clamp(max=len(item_G) - 1)], len(item_G))


class QueryBlock:
    """A block of queries with their contrast to every item and their relevant items. Computes the ranks of `ranking`
    from only the k best items and one comparison with all.

    Args:
        contrast_qG: cosines, without NaN.
        relevant_qR: from `relevant_items`.
    """

    def __init__(self, contrast_qG: Tensor, relevant_qR: Tensor) -> None:
        self.contrast_qG, self.relevant_qR = contrast_qG, relevant_qR
        total = contrast_qG.shape[1]
        self.there_qR = relevant_qR < total
        self.item_qR = relevant_qR.clamp(max=total - 1)
        self.good_qR = contrast_qG.gather(1, self.item_qR).masked_fill(~self.there_qR, -torch.inf)

    def by_contrast(self, first_q: Tensor | None = None) -> Ranking:
        """All items ranked by contrast. first_q: the best item of each query, if known."""
        good_q, at_q = self.good_qR.max(1)
        rank_q = self._before(good_q, slice(None))
        first_q = self.contrast_qG.argmax(1) if first_q is None else first_q.clone()
        # A relevant item may tie with the best irrelevant one, which then comes first.
        tied_q = (first_q[:, None] == self.relevant_qR).any(1) & (rank_q > 0)
        if bool(tied_q.any()):
            first_q[tied_q] = self._best_irrelevant(tied_q)
        return self._ranking(rank_q, self.item_qR.gather(1, at_q[:, None])[:, 0], first_q)

    def reranked(self, top_qK: Tensor, match_qK: Tensor) -> Ranking:
        """The items `top_qK` first, ranked by matching, followed by the others, ranked by contrast. An item whose match
        is NaN comes last of all."""
        total = self.contrast_qG.shape[1]
        match_qK = lowest_if_nan(match_qK)
        is_good_qK = torch.zeros_like(match_qK, dtype=torch.bool)
        on_top_qR = torch.zeros_like(self.there_qR)
        for place, item_q in enumerate(self.relevant_qR.unbind(1)):
            same_qK = top_qK == item_q[:, None]
            is_good_qK |= same_qK
            on_top_qR[:, place] = same_qK.any(1)
        # The best matched relevant item among the top items, if any, and the irrelevant ones that beat or tie with it.
        good_match_q, at_q = match_qK.masked_fill(~is_good_qK, -torch.inf).max(1)
        bad_qK = (match_qK > -torch.inf) & ~is_good_qK
        rank_q = (bad_qK & (match_qK >= good_match_q[:, None])).sum(1)
        good_at_q = top_qK.gather(1, at_q[:, None])[:, 0]
        other_q = good_match_q == -torch.inf
        if bool(other_q.any()):
            # Otherwise the best of the rest: after all irrelevant top items and those that contrast ranks before it.
            good_r, other_at_r = self.good_qR.masked_fill(on_top_qR, -torch.inf)[other_q].max(1)
            top_score_rK = self.contrast_qG[other_q].gather(1, top_qK[other_q])
            also_on_top_r = (~is_good_qK[other_q] & (top_score_rK >= good_r[:, None])).sum(1)
            behind_r = bad_qK[other_q].sum(1) + self._before(good_r, other_q) - also_on_top_r
            # If no relevant item has a score, it ranks after all irrelevant ones.
            irrelevant_r = total - self.there_qR[other_q].sum(1)
            rank_q[other_q] = torch.where(good_r > -torch.inf, behind_r, irrelevant_r)
            good_at_q[other_q] = self.item_qR[other_q].gather(1, other_at_r[:, None])[:, 0]
        # The best irrelevant item: among the top items by matching (the first in a tie), otherwise by contrast.
        best_q1 = match_qK.masked_fill(~bad_qK, -torch.inf).amax(1, keepdim=True)
        bad_at_q = top_qK.masked_fill(~bad_qK | (match_qK < best_q1), total).amin(1)
        none_q = bad_at_q == total
        if bool(none_q.any()):
            bad_at_q[none_q] = self._best_irrelevant(none_q, top_qK)
        return self._ranking(rank_q, good_at_q, bad_at_q)

    def _before(self, good_r: Tensor, rows: Tensor | slice) -> Tensor:
        """How many irrelevant items contrast ranks before, or ties with, a relevant one of this score."""
        before_r = (self.contrast_qG[rows] >= good_r[:, None]).sum(1)
        return before_r - (self.there_qR[rows] & (self.good_qR[rows] >= good_r[:, None])).sum(1)

    def _best_irrelevant(self, rows: Tensor, without_qK: Tensor | None = None) -> Tensor:
        score_rX = F.pad(self.contrast_qG[rows], (0, 1))  # an extra column for padding in relevant_qR
        if without_qK is not None:
            # After all others, but before relevant items, which are never chosen.
            score_rX.scatter_(1, without_qK[rows], torch.finfo(score_rX.dtype).min)
        score_rX.scatter_(1, self.relevant_qR[rows], -torch.inf)
        return score_rX[:, :-1].argmax(1)

    def _ranking(self, rank_q: Tensor, good_at_q: Tensor, bad_at_q: Tensor) -> Ranking:
        rank_q = rank_q.masked_fill(~self.there_qR.any(1), torch.iinfo(torch.long).max)
        return Ranking(rank_q, torch.where(rank_q == 0, good_at_q, bad_at_q))


def lowest_if_nan(score: Tensor) -> Tensor:
    """The scores, with NaN replaced by -inf."""
    return score.masked_fill(score.isnan(), -torch.inf)


def recall(score_QG: Tensor, relevant_QG: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent: share of queries with at least one relevant item in the top k; for ties, see `ranking`."""
    return recall_of(ranking(score_QG, relevant_QG), ks)


def recall_of(order: Ranking, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent of a given ranking."""
    return {k: 100 * (order.rank_Q < k).double().mean().item() for k in ks}


def recall_chance(relevant_Q: Tensor, total: int, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent of a random order: at least one of a query's relevant items among k drawn from `total`."""
    levels = {}
    for k in ks:
        drawn = torch.arange(min(k, total))
        # Probability that none of k items drawn without replacement is relevant: product of (total - relevant - i) /
        # (total - i).
        missed_Q = ((total - relevant_Q[:, None] - drawn).clamp(min=0).double() / (total - drawn)).prod(1)
        levels[k] = 100 * (1 - missed_Q).mean().item()
    return levels


def named(levels: dict[int, float], name: str, end: str = "") -> dict[str, float]:
    """Recalls by metric name: `retrieval/<name>_r<k><end>`."""
    return {f"retrieval/{name}_r{k}{end}": value for k, value in levels.items()}


def retrieval_metrics(scores: Scores, rankings_at: dict[int, Rankings], k: int) -> dict[str, float]:
    """Recall@1/5/10 in both directions over all captions: by contrast alone (`itc_`) and, if pairs were matched,
    re-ranked at k; with chance levels, gallery sizes, and `score`, the mean of the two R@1.

    Args:
        rankings_at: from `rankings`, at 0 and, if pairs were matched, at k.
    """
    images, captions = scores.contrast_BC.shape
    metrics: dict[str, float] = {"retrieval/pictures": images, "retrieval/captions": captions}
    # Without matching there are only the `itc_` metrics, and `score` is computed from them.
    best = "itc_" if scores.match_BC is None else ""
    for name, ranked in {"itc_": rankings_at[0], best: rankings_at[0 if best else k]}.items():
        metrics |= named(recall_of(ranked.text), f"{name}tr") | named(recall_of(ranked.image), f"{name}ir")
    own_B = torch.bincount(scores.owner_C, minlength=images)
    metrics |= named(recall_chance(own_B, captions), "tr", "_chance")
    metrics |= named(recall_chance(torch.ones_like(scores.owner_C), images), "ir", "_chance")
    metrics["score"] = (metrics[f"retrieval/{best}tr_r1"] + metrics[f"retrieval/{best}ir_r1"]) / 2
    return metrics
