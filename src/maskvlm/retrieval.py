"""Zero-shot retrieval: contrast picks candidates, the cross encoders and matching re-score them (paper sec. 4).

Shapes: B pictures, C captions (several a picture), E contrast width, L and T positions, D width, M pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from maskvlm.cross import Context
from maskvlm.heads import Matching
from maskvlm.model import Fused, MaskVLM


class Gallery(NamedTuple):
    """Unimodal features of an evaluation set, computed once. owner_C: the picture of each caption."""

    image_BE: Tensor
    text_CE: Tensor
    image_BLD: Tensor
    text_CTD: Tensor
    attention_CT: Tensor
    owner_C: Tensor


class Scores(NamedTuple):
    """Higher is better. text_BC: for text retrieval (a picture looks for captions); image_CB: the reverse."""

    text_BC: Tensor
    image_CB: Tensor


def recall(score_QG: Tensor, relevant_QG: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k in percent: share of queries with at least one relevant item among the best k.

    A tie counts against the model: an irrelevant item of the same score ranks before the relevant one, so a
    model that gives every pair one score has recall 0. So does a score that is no number.
    """
    score_QG = score_QG.masked_fill(score_QG.isnan(), float("-inf"))
    best_Q1 = score_QG.masked_fill(~relevant_QG, float("-inf")).amax(1, keepdim=True)
    rank_Q = ((score_QG >= best_Q1) & ~relevant_QG).sum(1)
    can_hit_Q = relevant_QG.any(1)
    return {k: 100 * ((rank_Q < k) & can_hit_Q).float().mean().item() for k in ks}


def chance(relevant_QG: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k in percent of an order by lot: at least one of a query's relevant items among k drawn of all G."""
    total, relevant_Q = relevant_QG.shape[1], relevant_QG.sum(1).cpu().double()  # an Apple GPU has no float64
    levels = {}
    for k in ks:
        drawn = torch.arange(min(k, total))
        missed_Q = ((total - relevant_Q[:, None] - drawn).clamp(min=0) / (total - drawn)).prod(1)
        levels[k] = 100 * (1 - missed_Q).mean().item()
    return levels


def contrast_scores(gallery: Gallery) -> Scores:
    """Cosine of every picture with every caption."""
    cosine_BC = gallery.image_BE.float() @ gallery.text_CE.float().T
    return Scores(cosine_BC, cosine_BC.T)


@torch.no_grad()
def rerank(backbone: MaskVLM, head: Matching, gallery: Gallery, k: int, chunk: int = 1024) -> Scores:
    """Scores in which each query's k best by contrast are ordered by matching, the others behind by contrast.

    Args:
        backbone, head: in evaluation mode.
        gallery: from the same backbone.
        k: candidates a query; at most the size of the gallery is used.
        chunk: pairs in one pass of the cross encoders; a bound on memory.
    """
    contrast = contrast_scores(gallery)
    top_BC = _top(contrast.text_BC, k)
    top_CB = _top(contrast.image_CB, k)
    image_M, text_M = (top_BC | top_CB.T).nonzero(as_tuple=True)
    match_BC = torch.zeros_like(contrast.text_BC)
    match_BC[image_M, text_M] = match_pairs(backbone, head, gallery, image_M, text_M, chunk)
    # Contrast lies in [-1, 1]: the log-odds are lifted above it, no higher than needed to keep their decimals.
    lifted_BC = match_BC - match_BC.nan_to_num().min() + 2
    return Scores(torch.where(top_BC, lifted_BC, contrast.text_BC), torch.where(top_CB, lifted_BC.T, contrast.image_CB))


@torch.no_grad()
def match_pairs(
    backbone: MaskVLM, head: Matching, gallery: Gallery, image_M: Tensor, text_M: Tensor, chunk: int = 1024
) -> Tensor:
    """Log-odds of a match for M pairs of (picture, caption) rows, float32; keys and values are projected once."""
    text_context = backbone.cross_image.context(gallery.text_CTD, gallery.attention_CT)
    image_context = backbone.cross_text.context(gallery.image_BLD)
    odds = []
    for image_m, text_m in zip(image_M.split(chunk), text_M.split(chunk), strict=True):
        fused = Fused(
            backbone.cross_image(
                gallery.image_BLD[image_m], Context(text_context.blocks, gallery.attention_CT, text_m), every=0
            ).first_BD,
            backbone.cross_text(
                gallery.text_CTD[text_m],
                Context(image_context.blocks, None, image_m),
                gallery.attention_CT[text_m],
                every=0,
            ).first_BD,
        )
        logits_m2 = head(fused.product_MD).float()
        odds.append(logits_m2[:, 1] - logits_m2[:, 0])
    return torch.cat(odds) if odds else torch.zeros(0, device=image_M.device)


def _top(score_QG: Tensor, k: int) -> Tensor:
    index_QK = score_QG.topk(min(k, score_QG.shape[1]), dim=1).indices
    return torch.zeros_like(score_QG, dtype=torch.bool).scatter(1, index_QK, True)
