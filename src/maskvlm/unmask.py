"""Joint masked modelling put to use: hidden words and patches filled in, whole captions and regions written from
nothing, the most certain part first, and how likely a text is word by word.

The paper trains both conditionals, words given the whole picture and patches given the whole text (sec. 3); nothing
here is trained beyond that. Writing from nothing goes beyond what training hides (30 % of words, 60 % of patches).

Shapes: B rows, T tokens, K hidden positions, V vocabulary, N patches, P values of a patch, L positions, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskvlm import embed
from maskvlm.embed import Model, device_of
from maskvlm.heads import patchify
from maskvlm.reconstruct import denormalise, paste

STEPS = 8  # rounds in which hidden patches are painted


class Guess(NamedTuple):
    """A word for a hidden place and its probability."""

    word: str
    probability: float


def look(model: Model, image: Any | None) -> Tensor:
    """Features of one picture, [1, L, D]; of the mean colour for None."""
    size = model.backbone.image.image_size
    if image is None:
        pixels = next(model.backbone.parameters()).new_zeros(1, 3, size, size)
    else:
        pixels = model.pixels([image])
    return model.backbone.image(pixels)


def word_logits(model: Model, image_1LD: Tensor, token_BT: Tensor, attention_BT: Tensor | None = None) -> Tensor:
    """Logits of every position of every row, all of them about one picture, [B, T, V], float32."""
    backbone, head = model.backbone, model.head("tokens", "fill_mask")
    attention_BT = torch.ones_like(token_BT, dtype=torch.bool) if attention_BT is None else attention_BT
    found = []
    for token, attention in zip(token_BT.split(model.batch_size), attention_BT.split(model.batch_size), strict=True):
        text_BTD = backbone.text(token, attention)
        zeros_B = torch.zeros(len(token), dtype=torch.long, device=token.device)
        context = backbone.cross_text.context(image_1LD, None, zeros_B)
        found.append(head(backbone.cross_text(text_BTD, context, attention).every_RLD).float())
    return torch.cat(found)


def fill_mask(model: Model, image: Any | None, text: str, top_k: int) -> list[list[Guess]]:
    """The likeliest words for each [MASK] of a text, each hidden place by itself."""
    token_T = model.words.masked(text).to(device_of(model))
    logits_TV = word_logits(model, look(model, image), token_T[None])[0]
    hidden_K = (token_T == model.backbone.text.mask_id).nonzero().flatten()
    top = forbid(model, logits_TV[hidden_K]).softmax(-1).topk(min(top_k, logits_TV.shape[1]))
    return [
        [Guess(model.words.decode([token]), p) for token, p in zip(ids, ps, strict=True)]
        for ids, ps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def forbid(model: Model, logits_KV: Tensor) -> Tensor:
    """Start, end, padding and mask token are no words."""
    special = [i for i in model.words.tokenizer.all_special_ids if i < logits_KV.shape[-1]]
    return logits_KV.index_fill(-1, torch.tensor(special, device=logits_KV.device), float("-inf"))


class Written(NamedTuple):
    """A caption, and the mean log probability (nats) of its words when each was written."""

    text: str
    certainty: float


def caption(model: Model, image: Any, lengths: Sequence[int]) -> list[Written]:
    """One caption of each length in tokens, start and end not counted: all words hidden at first, then the most certain
    one of the hidden is written, again and again (mask-predict's order; Ghazvininejad et al. 2019)."""
    image_1LD, device = look(model, image), device_of(model)
    start, end = model.words.ends
    longest, pad, mask = max(lengths) + 2, model.backbone.text.pad_id, model.backbone.text.mask_id
    token_BT = torch.full((len(lengths), longest), pad, device=device)
    for row, length in enumerate(lengths):
        token_BT[row, : length + 2] = torch.tensor([start, *[mask] * length, end])
    attention_BT = token_BT != pad
    total_B = torch.zeros(len(lengths), device=device)
    for _ in range(max(lengths)):
        hidden_BT = token_BT == mask
        if not bool(hidden_BT.any()):
            break
        logits_BTV = forbid(model, word_logits(model, image_1LD, token_BT, attention_BT))
        best = logits_BTV.log_softmax(-1).max(-1)
        value_BT = best.values.masked_fill(~hidden_BT, float("-inf"))
        at_B = value_BT.argmax(1)
        rows = hidden_BT.any(1).nonzero().flatten()
        token_BT[rows, at_B[rows]] = best.indices[rows, at_B[rows]]
        total_B[rows] += value_BT[rows, at_B[rows]]
    ids = [row[1 : length + 1] for row, length in zip(token_BT.tolist(), lengths, strict=True)]
    certainty = [float(total) / length for total, length in zip(total_B, lengths, strict=True)]
    return [Written(model.words.decode(row), value) for row, value in zip(ids, certainty, strict=True)]


def best_caption(model: Model, image: Any, lengths: Sequence[int]) -> str:
    """Of captions of these lengths the one that matches the picture best; without a matching head the most certain."""
    written = [one for one in caption(model, image, lengths) if one.text]
    if getattr(model.task, "matching", None) is None:
        return max(written, key=lambda one: one.certainty).text
    features = embed.image_features(model, [image]) * len(written)
    likely = embed.match(model, features, embed.text_features(model, [one.text for one in written])).tolist()
    return max(zip(likely, written, strict=True), key=lambda pair: pair[0])[1].text


def log_likelihood(model: Model, image: Any | None, text: str) -> Tensor:
    """log p(word | all other words, picture) of each token of a text, [T], nats (Salazar et al. 2020)."""
    token_T = model.tokens([text]).token_CT[0]
    inner = len(token_T) - 2
    token_BT = token_T.repeat(inner, 1)
    row_B = torch.arange(inner, device=token_T.device)
    token_BT[row_B, row_B + 1] = model.backbone.text.mask_id
    logits_BTV = word_logits(model, look(model, image), token_BT)
    return logits_BTV[row_B, row_B + 1].log_softmax(-1)[row_B, token_T[1:-1]]


# ---------------------------------------------------------------------- pictures


def patches(model: Model, image_BCHW: Tensor, mask_BN: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Tensor:
    """Predicted values of every patch, [B, N, P], float32, normalised as the pictures are: of hidden ones from the
    visible ones and the whole text."""
    backbone, task = model.backbone, model.head("pixels", "reconstruct")
    image_BLD = backbone.image(image_BCHW, mask_BN)
    crossed_BLD = backbone.cross_image(image_BLD, backbone.cross_image.context(text_BTD, attention_BT)).every_RLD
    every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
    return task(crossed_BLD, text_BTD, attention_BT, every_BN).float()


def reconstruct(
    model: Model, image_BCHW: Tensor, mask_BN: Tensor, texts: Sequence[str], true_statistics: bool
) -> Tensor:
    """Pictures with their hidden patches filled in at once, normalised [B, 3, H, W].

    Args:
        true_statistics: the model predicts each patch up to its mean and contrast, which are taken from the picture.
    """
    tokens = model.tokens(texts)
    text_BTD = model.backbone.text(tokens.token_CT, tokens.attention_CT)
    values_BNP = patches(model, image_BCHW, mask_BN, text_BTD, tokens.attention_CT)
    size = model.backbone.image.patch_size
    if true_statistics:
        values_BNP = denormalise(values_BNP, patchify(image_BCHW.float(), size))
    every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
    return paste(image_BCHW.float(), values_BNP, every_BN, mask_BN.float(), size)


def inpaint(
    model: Model, image_BCHW: Tensor, mask_BN: Tensor, texts: Sequence[str], steps: int, true_statistics: bool
) -> Tensor:
    """As `reconstruct`, in rounds: of the hidden patches the most certain ones are painted and seen from then on.

    Squared error gives no probability, so a patch counts as certain where three predictions agree, each made with a
    different quarter of the visible patches hidden, too.
    """
    painted_BCHW, left_BN = image_BCHW.float(), mask_BN.clone()
    tokens = model.tokens(texts)
    text_BTD = model.backbone.text(tokens.token_CT, tokens.attention_CT)
    generator = torch.Generator().manual_seed(0)
    size, total_B = model.backbone.image.patch_size, mask_BN.sum(1)
    for step in range(steps):
        keep_B = (total_B * (steps - 1 - step)) // steps  # hidden patches that remain after this round
        given = painted_BCHW.to(image_BCHW.dtype)
        values_BNP = patches(model, given, left_BN, text_BTD, tokens.attention_CT)
        others = []
        for _ in range(3):
            more_BN = torch.rand(mask_BN.shape, generator=generator).to(mask_BN.device) < 0.25
            others.append(patches(model, given, left_BN | more_BN, text_BTD, tokens.attention_CT))
        doubt_BN = torch.stack(others).var(0).mean(-1).masked_fill(~left_BN, -1.0)
        rank_BN = doubt_BN.argsort(dim=1, descending=True).argsort(dim=1)  # the most doubtful first
        stay_BN = left_BN & (rank_BN < keep_B[:, None])
        now_BN = left_BN & ~stay_BN
        if true_statistics:
            values_BNP = denormalise(values_BNP, patchify(image_BCHW.float(), size))
        every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
        painted_BCHW = paste(painted_BCHW, values_BNP, every_BN, now_BN.float(), size)
        left_BN = stay_BN
    return painted_BCHW
