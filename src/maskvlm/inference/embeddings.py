"""Comparing images and texts: unit vectors (ITC), matching of pairs (ITM), and ranking by both.

Shapes: B images, C texts, E contrast width, L and T positions, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskvlm.model.heads import Matching, Projection
from maskvlm.objectives.loaded_model import Model, in_batches, numbered
from maskvlm.utils.errors import UserError


class Ranked(NamedTuple):
    """A candidate: its index in the input, its cosine with the query, and its match probability, None beyond the k that
    were re-ranked."""

    place: int
    similarity: float
    match: float | None


class EncodedSide(NamedTuple):
    """Images or texts. inputs: as passed in. images: whether they are images. vector_XE: unit vectors, float32.
    features: encoder features, [L, D] each, if all were encoded in one batch; otherwise empty."""

    inputs: Sequence[Any]
    images: bool
    vector_XE: Tensor
    features: list[Tensor]


def features_of(model: Model, side: EncodedSide, rows: Sequence[int]) -> list[Tensor]:
    """The encoder's features of these rows, [L, D] each."""
    if side.features:
        return [side.features[row] for row in rows]
    chosen = [side.inputs[row] for row in rows]
    return image_features(model, chosen) if side.images else text_features(model, chosen)


def image_features(model: Model, images: Sequence[Any]) -> list[Tensor]:
    """Features of each image from the image encoder, [L, D] each."""
    return [image_LD for image_BLD in images_encoded(model, images) for image_LD in image_BLD]


def images_encoded(model: Model, images: Sequence[Any]) -> Iterator[Tensor]:
    """Features [B, L, D], one batch of images at a time."""
    return (model.backbone.image(model.pixels(*part)) for part in numbered(images, model.batch_size))


def text_features(model: Model, texts: Sequence[str]) -> list[Tensor]:
    """Features of each text from the text encoder, [T, D] each, without padding."""
    return [text_TD for part in texts_encoded(model, texts) for text_TD in without_padding(*part)]


def texts_encoded(model: Model, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [C, T, D] and attention [C, T], one batch of texts at a time."""
    for part in in_batches(texts, model.batch_size):
        tokens = model.tokens(part)
        yield model.backbone.text(tokens.token_CT, tokens.attention_CT), tokens.attention_CT


def without_padding(text_CTD: Tensor, attention_CT: Tensor) -> list[Tensor]:
    """[T, D] of each text."""
    # Padding is on the right: the first `length` positions are the text.
    lengths = attention_CT.sum(1).tolist()
    return [text_TD[:length] for text_TD, length in zip(text_CTD, lengths, strict=True)]


def encode(model: Model, inputs: Sequence[Any], images: bool) -> EncodedSide:
    """Unit vectors of images or texts. Features are large (1.8 MB per photo in a base model): they are kept only if the
    inputs fit in one batch, so that memory does not grow with the list."""
    projection: Projection = model.head("projection", "encode_image" if images else "encode_text")
    # The empty first part makes torch.cat work when there is nothing to encode.
    features, vectors, keep = list[Tensor](), [no_vectors(projection)], len(inputs) <= model.batch_size
    if images:
        for image_BLD in images_encoded(model, inputs):
            features += list(image_BLD) if keep else []
            vectors.append(projection.embed_image(image_BLD))
    else:
        for text_CTD, attention_CT in texts_encoded(model, inputs):
            features += without_padding(text_CTD, attention_CT) if keep else []
            vectors.append(projection.embed_text(text_CTD, attention_CT))
    # A model in float64 gives vectors of float64.
    return EncodedSide(inputs, images, torch.cat(vectors).float(), features)


def no_vectors(projection: Projection) -> Tensor:
    """The unit vectors of no images or texts, [0, E]."""
    # float32 whatever the model's precision, like the vectors of `encode`.
    return projection.text.weight.new_zeros(0, projection.text.out_features, dtype=torch.float32)


def match(model: Model, image_features: Sequence[Tensor], text_features: Sequence[Tensor]) -> Tensor:
    """Probability that image and text of each pair match, [M], float32, from their encoders' features."""
    return log_odds(model, image_features, text_features).sigmoid()


def contrast_counts(model: Model) -> float:
    """Factor of the cosine that is added to the matching log-odds (see `rerank.score_gallery`); 0 if it is not
    added."""
    share = float(getattr(model.task, "rerank_contrast", 0.0))
    return share * float(model.head("projection", "rank").logit_scale) if share else 0.0


def log_odds(model: Model, image_features: Sequence[Tensor], text_features: Sequence[Tensor]) -> Tensor:
    """Matching log-odds of each pair, [M], float32."""
    head: Matching = model.head("matching", "match")
    odds = []
    for image, text in zip(
        in_batches(image_features, model.batch_size), in_batches(text_features, model.batch_size), strict=True
    ):
        # Texts were encoded in other batches: re-padded to the longest of these, [T, D] each -> (M, T, D).
        text_MTD = torch.nn.utils.rnn.pad_sequence(list(text), batch_first=True)
        length_M = torch.tensor([len(text_TD) for text_TD in text], device=text_MTD.device)
        # (M, 1) against (T,) -> (M, T), true on tokens
        attention_MT = torch.arange(text_MTD.shape[1], device=text_MTD.device) < length_M[:, None]
        fused = model.backbone.fuse(torch.stack(list(image)), text_MTD, attention_MT)
        logits_M2 = head(fused.product_MD).float()
        # The softmax of both logits is the sigmoid of their difference.
        odds.append(logits_M2[:, 1] - logits_M2[:, 0])
    return torch.cat(odds) if odds else torch.zeros(0)


def pair_up(method: str, images: int, texts: int) -> list[tuple[int, int]]:
    """Pair images and texts: row by row, or a single one with each of the others; no pairs if one is empty and the
    other has at most one item. method: name used in the error message.

    Raises:
        UserError: the lists differ in length.
    """
    if images != texts and 1 not in (images, texts):
        what = f"{images} images and {texts} texts do not make pairs"
        raise UserError(method, what, "Give one of a kind, or as many of both")
    count = max(images, texts) if images and texts else 0
    # A single image or text is always row 0.
    return [(i if images > 1 else 0, i if texts > 1 else 0) for i in range(count)]


def rank_candidates(
    model: Model, queries: Sequence[Any], candidates: Sequence[Any], k: int, images: bool
) -> list[list[Ranked]]:
    """Rank all candidates for each query, best first: the k most similar by matching (and cosine, if the task re-ranks
    by both), then the others by cosine.

    Args:
        images: whether the queries are images and the candidates texts, or vice versa.
    """
    query_side, gallery = encode(model, queries, images), encode(model, candidates, not images)
    similarity_QG = query_side.vector_XE @ gallery.vector_XE.T
    # Stable: for equal cosines, the earlier candidate comes first.
    order = similarity_QG.argsort(dim=1, descending=True, stable=True).tolist()
    # Only matched candidates need their features.
    matched = sorted({row for order_G in order for row in order_G[:k]})
    whole = dict(zip(matched, features_of(model, gallery, matched), strict=True))
    asking = features_of(model, query_side, range(len(queries))) if k else []
    every = []
    for row, order_G in enumerate(order):
        nearest, cosine, first = order_G[:k], similarity_QG[row].tolist(), []
        if nearest:
            # `log_odds` takes images first, whichever side the queries are on.
            sides = [asking[row]] * len(nearest), [whole[g] for g in nearest]
            odds_K = log_odds(model, *(sides if images else sides[::-1])).cpu()
            best = by_match(model, odds_K, similarity_QG[row, nearest].cpu())
            # The reported probability is of matching alone; only the order may also use the cosine.
            first = [Ranked(nearest[at], cosine[nearest[at]], float(odds_K[at].sigmoid())) for at in best]
        every.append(first + [Ranked(g, cosine[g], None) for g in order_G[k:]])
    return every


def by_match(model: Model, odds_K: Tensor, cosine_K: Tensor) -> list[int]:
    """The order of candidates, best first, by matching log-odds and, if the task re-ranks by both, cosine."""
    return (odds_K + contrast_counts(model) * cosine_K).argsort(descending=True, stable=True).tolist()
