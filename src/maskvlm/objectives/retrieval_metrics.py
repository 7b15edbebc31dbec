"""Retrieval in numbers: how images and captions rank each other, and recall, whatever gave the scores.

Shapes: B images, C captions (several an image), Q queries, G items of the gallery that they search. Everything
is in host memory; the matrices [B, C] are the only large ones (0.5 GB each for COCO's 5,000 x 25,000), and orders
are made of a block of queries at a time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # queries ordered at once: 50 MB for 25,000 items
KS = (1, 5, 10)


class Scores(NamedTuple):
    """What is known of every image with every caption; higher is better.

    Attributes:
        contrast_BC: cosine.
        match_BC: log-odds of a match, NaN where the pair was not scored; None where no pair was. What contrast adds to
            them (see `rerank.score_gallery`) is in them.
        owner_C: row of each caption's image.
        best: from `best_items`, where that is known already.
    """

    contrast_BC: Tensor
    match_BC: Tensor | None
    owner_C: Tensor
    best: "BestItems | None" = None


class BestItems(NamedTuple):
    """The k best by contrast, the best first: captions of each image [B, k], and images of each caption [C, k]."""

    text_BK: Tensor
    image_CK: Tensor


class Ranking(NamedTuple):
    """rank_Q: how many irrelevant items come before the best relevant one. top_Q: the item in the first place."""

    rank_Q: Tensor
    top_Q: Tensor


class Rankings(NamedTuple):
    """text: images look for their captions (TR). image: captions look for their image (IR)."""

    text: Ranking
    image: Ranking


def contrast_scores(image_BE: Tensor, text_CE: Tensor) -> Tensor:
    """Cosine of every image with every caption, [B, C], in float32 also under autocast."""
    with torch.autocast(image_BE.device.type, enabled=False):
        return image_BE.float() @ text_CE.float().T


def top_items(score_QG: Tensor, k: int) -> Tensor:
    """The k best items of each query, the best first, [Q, k]; all of them where there are fewer.

    Every one of the k best lies in one of the k groups of neighbours with the highest maxima: so that of 25,000 items
    some 4,000 are put in order, not all.
    """
    total = score_QG.shape[1]
    k = min(k, total)
    # Groups of size s leave total / s maxima and k * s members to order: least at s = sqrt(total / k).
    size = 2 ** round(math.log2(math.sqrt(total / k)))
    if size < 2:
        return score_QG.topk(k, dim=1).indices
    grouped = total - total % size
    if score_QG.stride(1) == 1:
        most_Qg = score_QG[:, :grouped].unflatten(1, (-1, size)).amax(2)
    else:
        # A transposed matrix is read in the order it lies in memory: ten times as fast.
        most_Qg = score_QG.T[:grouped].unflatten(0, (-1, size)).amax(1).T.contiguous()
    group_Qk = most_Qg.topk(min(k, most_Qg.shape[1]), dim=1).indices
    # (Q, k, size) -> (Q, k * size), and the few that are left over.
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
    """Pairs worth a second look, [B, C]: a caption among an image's k best, or an image among a caption's."""
    wanted_BC = torch.zeros(len(best.text_BK), len(best.image_CK), dtype=torch.bool)
    wanted_BC.scatter_(1, best.text_BK, True)
    # Both directions write into one matrix: the second looks at it transposed.
    wanted_BC.T.scatter_(1, best.image_CK, True)
    return wanted_BC


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
    """Ranking of one direction at each k of `ks`; a query and an item of the same image are relevant to each other."""
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
        # Once for the largest k: the smaller ones are its first places.
        top_qK = top_items(block.contrast_qG, max(ks)) if best_QK is None else best_QK[rows]
        match_qK = match_QG[rows].gather(1, top_qK)
        for k in ks:
            # k = 0 is contrast alone.
            parts[k].append(block.reranked(top_qK[:, :k], match_qK[:, :k]) if k else by_contrast)
    return {k: Ranking(*(torch.cat(column) for column in zip(*blocks, strict=True))) for k, blocks in parts.items()}


def relevant_items(query_Q: Tensor, item_G: Tensor) -> Tensor:
    """Numbers of the items that are relevant to each query, [Q, R]; G where there are fewer than R."""
    order_G = item_G.argsort(stable=True)
    sorted_G = item_G[order_G]
    first_Q, behind_Q = torch.searchsorted(sorted_G, query_Q), torch.searchsorted(sorted_G, query_Q, right=True)
    most = max(1, int((behind_Q - first_Q).max())) if len(query_Q) else 1
    place_QR = first_Q[:, None] + torch.arange(most)
    there_QR = place_QR < behind_Q[:, None]
    return torch.where(there_QR, order_G[place_QR.clamp(max=len(item_G) - 1)], len(item_G))


class QueryBlock:
    """Some queries with their contrast to every item, and what is relevant to them: ranks as `ranking` gives them, from
    a look at the k best alone and one comparison of all.

    Args:
        contrast_qG: cosines, all of them numbers.
        relevant_qR: from `relevant_items`.
    """

    def __init__(self, contrast_qG: Tensor, relevant_qR: Tensor) -> None:
        self.contrast_qG, self.relevant_qR = contrast_qG, relevant_qR
        total = contrast_qG.shape[1]
        self.there_qR = relevant_qR < total
        self.item_qR = relevant_qR.clamp(max=total - 1)
        self.good_qR = contrast_qG.gather(1, self.item_qR).masked_fill(~self.there_qR, -torch.inf)

    def by_contrast(self, first_q: Tensor | None = None) -> Ranking:
        """All items in the order of contrast. first_q: the best one of each query, where that is known."""
        good_q, at_q = self.good_qR.max(1)
        rank_q = self._before(good_q, slice(None))
        first_q = self.contrast_qG.argmax(1) if first_q is None else first_q.clone()
        # A relevant item may be as good as the best irrelevant one, which then comes first.
        tied_q = (first_q[:, None] == self.relevant_qR).any(1) & (rank_q > 0)
        if bool(tied_q.any()):
            first_q[tied_q] = self._best_irrelevant(tied_q)
        return self._ranking(rank_q, self.item_qR.gather(1, at_q[:, None])[:, 0], first_q)

    def reranked(self, top_qK: Tensor, match_qK: Tensor) -> Ranking:
        """The items `top_qK` first, in the order of matching, the others behind them by contrast. An item whose match
        is no number comes last of all."""
        total = self.contrast_qG.shape[1]
        match_qK = lowest_if_nan(match_qK)
        is_good_qK = torch.zeros_like(match_qK, dtype=torch.bool)
        on_top_qR = torch.zeros_like(self.there_qR)
        for place, item_q in enumerate(self.relevant_qR.unbind(1)):
            same_qK = top_qK == item_q[:, None]
            is_good_qK |= same_qK
            on_top_qR[:, place] = same_qK.any(1)
        # The best relevant item on top, if there is one that was matched; before it, and beside it, irrelevant ones.
        good_match_q, at_q = match_qK.masked_fill(~is_good_qK, -torch.inf).max(1)
        bad_qK = (match_qK > -torch.inf) & ~is_good_qK
        rank_q = (bad_qK & (match_qK >= good_match_q[:, None])).sum(1)
        good_at_q = top_qK.gather(1, at_q[:, None])[:, 0]
        other_q = good_match_q == -torch.inf
        if bool(other_q.any()):
            # The best of the others: behind all irrelevant ones on top, and behind those that contrast puts before it.
            good_r, other_at_r = self.good_qR.masked_fill(on_top_qR, -torch.inf)[other_q].max(1)
            top_score_rK = self.contrast_qG[other_q].gather(1, top_qK[other_q])
            also_on_top_r = (~is_good_qK[other_q] & (top_score_rK >= good_r[:, None])).sum(1)
            behind_r = bad_qK[other_q].sum(1) + self._before(good_r, other_q) - also_on_top_r
            # Where no relevant item has any score it stands behind all irrelevant ones.
            irrelevant_r = total - self.there_qR[other_q].sum(1)
            rank_q[other_q] = torch.where(good_r > -torch.inf, behind_r, irrelevant_r)
            good_at_q[other_q] = self.item_qR[other_q].gather(1, other_at_r[:, None])[:, 0]
        # The best irrelevant item: on top by matching (the first of equals), or else by contrast.
        best_q1 = match_qK.masked_fill(~bad_qK, -torch.inf).amax(1, keepdim=True)
        bad_at_q = top_qK.masked_fill(~bad_qK | (match_qK < best_q1), total).amin(1)
        none_q = bad_at_q == total
        if bool(none_q.any()):
            bad_at_q[none_q] = self._best_irrelevant(none_q, top_qK)
        return self._ranking(rank_q, good_at_q, bad_at_q)

    def _before(self, good_r: Tensor, rows: Tensor | slice) -> Tensor:
        """How many irrelevant items contrast puts before a relevant one of this score, or beside it."""
        before_r = (self.contrast_qG[rows] >= good_r[:, None]).sum(1)
        return before_r - (self.there_qR[rows] & (self.good_qR[rows] >= good_r[:, None])).sum(1)

    def _best_irrelevant(self, rows: Tensor, without_qK: Tensor | None = None) -> Tensor:
        score_rX = F.pad(self.contrast_qG[rows], (0, 1))  # a place for relevant items that are not there
        if without_qK is not None:
            # Behind all others, but before what is no choice at all.
            score_rX.scatter_(1, without_qK[rows], torch.finfo(score_rX.dtype).min)
        score_rX.scatter_(1, self.relevant_qR[rows], -torch.inf)
        return score_rX[:, :-1].argmax(1)

    def _ranking(self, rank_q: Tensor, good_at_q: Tensor, bad_at_q: Tensor) -> Ranking:
        rank_q = rank_q.masked_fill(~self.there_qR.any(1), torch.iinfo(torch.long).max)
        return Ranking(rank_q, torch.where(rank_q == 0, good_at_q, bad_at_q))


def lowest_if_nan(score: Tensor) -> Tensor:
    """The scores, with what is no number below all."""
    return score.masked_fill(score.isnan(), -torch.inf)


def recall(score_QG: Tensor, relevant_QG: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent: share of queries with at least one relevant item among the best k; ties: see `ranking`."""
    return recall_of(ranking(score_QG, relevant_QG), ks)


def recall_of(order: Ranking, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall@k in percent of an order that is known."""
    return {k: 100 * (order.rank_Q < k).double().mean().item() for k in ks}


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


def retrieval_metrics(scores: Scores, rankings_at: dict[int, Rankings], k: int) -> dict[str, float]:
    """Recall@1/5/10 both ways over all captions: by contrast alone (`itc_`) and, where pairs were matched, re-ranked
    at k; with the levels of chance, the sizes, and `score`, the mean of the two R@1.

    Args:
        rankings_at: from `rankings`, at 0 and, where pairs were matched, at k.
    """
    images, captions = scores.contrast_BC.shape
    metrics: dict[str, float] = {"retrieval/pictures": images, "retrieval/captions": captions}
    # Without matching there are only the names `itc_`, and `score` is theirs.
    best = "itc_" if scores.match_BC is None else ""
    for name, ranked in {"itc_": rankings_at[0], best: rankings_at[0 if best else k]}.items():
        metrics |= named(recall_of(ranked.text), f"{name}tr") | named(recall_of(ranked.image), f"{name}ir")
    own_B = torch.bincount(scores.owner_C, minlength=images)
    metrics |= named(recall_chance(own_B, captions), "tr", "_chance")
    metrics |= named(recall_chance(torch.ones_like(scores.owner_C), images), "ir", "_chance")
    metrics["score"] = (metrics[f"retrieval/{best}tr_r1"] + metrics[f"retrieval/{best}ir_r1"]) / 2
    return metrics
