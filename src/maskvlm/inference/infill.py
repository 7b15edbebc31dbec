"""Applications of joint masked modelling: fill in masked words and patches, generate whole captions and regions from
scratch, most certain part first, and score a text word by word.

The paper trains both conditionals, words given the whole image and patches given the whole text (sec. 3); nothing
here needs further training. Generating from scratch goes beyond what training masks (30 % of words, 60 % of patches).

Shapes: B rows, T tokens, K masked positions, V vocabulary, N patches, P values of a patch, L positions, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskvlm.data.text import no_words
from maskvlm.inference import embeddings as embed
from maskvlm.model.heads import patchify
from maskvlm.objectives.loaded_model import Model, device_of
from maskvlm.objectives.reconstructed_examples import denormalise, paste
from maskvlm.utils.errors import UserError

STEPS = 8  # rounds in which masked patches are painted


class Guess(NamedTuple):
    """A word for a masked position and its probability."""

    word: str
    probability: float


class SeenImages(NamedTuple):
    """image_XLD: features of the distinct images. which: row of each input image in it."""

    image_XLD: Tensor
    which: list[int]


def look(model: Model, images: Sequence[Any | None], numbers: Sequence[int]) -> SeenImages:
    """Features of the distinct images; None is an image of the mean colour. numbers: how error messages refer to
    them."""
    # By identity: an image that is paired with several texts is encoded once.
    each = {id(image): image for image in images}
    named = {id(image): number for number, image in zip(numbers, images, strict=True)}
    order = {known: number for number, known in enumerate(each)}
    size, weight = model.backbone.image.image_size, next(model.backbone.parameters())
    # Zeros are the mean colour, as pixels are normalised.
    pixels_XCHW = weight.new_zeros(len(each), 3, size, size)
    rows = [number for number, image in enumerate(each.values()) if image is not None]
    if rows:
        pictures = [image for image in each.values() if image is not None]
        pixels_XCHW[rows] = model.pixels(pictures, [named[id(image)] for image in pictures])
    return SeenImages(model.backbone.image(pixels_XCHW), [order[id(image)] for image in images])


class PairRows(NamedTuple):
    """Image-text pairs. image_XLD: image features. image_B: each row's image. token_BT, attention_BT: its text."""

    image_XLD: Tensor
    image_B: Tensor
    token_BT: Tensor
    attention_BT: Tensor

    def only(self, chosen_B: Tensor) -> "PairRows":
        """Some of the rows."""
        return PairRows(self.image_XLD, self.image_B[chosen_B], self.token_BT[chosen_B], self.attention_BT[chosen_B])


def pair_rows(model: Model, image_XLD: Tensor, image_B: Sequence[int], texts: Sequence[Tensor]) -> PairRows:
    """Image-text pairs with the token ids of `texts`, [T] each, padded to the longest."""
    device = device_of(model)
    token_BT = pad_sequence(list(texts), batch_first=True, padding_value=model.backbone.text.pad_id).to(device)
    length_B1 = torch.tensor([[len(text)] for text in texts], device=device)
    # (B, 1) against (T,) -> (B, T), true on tokens
    attention_BT = torch.arange(token_BT.shape[1], device=device) < length_B1
    return PairRows(image_XLD, torch.tensor(image_B, device=device), token_BT, attention_BT)


def text_cross(model: Model, rows: PairRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of rows and the token head's input for them, [B, T, D]: with a large vocabulary, the logits of all rows
    would not fit into memory."""
    backbone = model.backbone
    for chosen_B in torch.arange(len(rows.token_BT), device=rows.token_BT.device).split(model.batch_size):
        part = rows.only(chosen_B)
        used_X, own_B = part.image_B.unique(return_inverse=True)  # only the images of this batch
        text_BTD = backbone.text(part.token_BT, part.attention_BT)
        # Keys and values once per image; own_B is the row of each text's image among them.
        context = backbone.cross_text.context(part.image_XLD[used_X], None, own_B)
        yield chosen_B, backbone.cross_text(text_BTD, context, part.attention_BT).full_RLD


def fill_mask(
    model: Model, images: Sequence[Any | None], numbers: Sequence[int], texts: Sequence[str], top_k: int
) -> list[list[list[Guess]]]:
    """The likeliest words for each [MASK] of each text, given its image; each [MASK] is filled independently."""
    head = model.head("tokens", "fill_mask")
    rows = pair_rows(model, *look(model, images, numbers), [model.words.masked(text) for text in texts])
    guesses = []
    for chosen_B, text_BTD in text_cross(model, rows):
        for token_T, text_TD in zip(rows.token_BT[chosen_B], text_BTD, strict=True):
            # Only masked positions reach the head: (T, D) -> (K, D) -> (K, V).
            logits_KV = forbid(model, head(text_TD[token_T == model.backbone.text.mask_id]).float())
            top = logits_KV.softmax(-1).topk(min(top_k, logits_KV.shape[1]))
            guesses.append(
                [
                    # Forbidden tokens have probability 0.
                    [Guess(model.words.decode([token]), p) for token, p in zip(ids, ps, strict=True) if p > 0]
                    for ids, ps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
            )
    return guesses


def forbid(model: Model, logits_KV: Tensor) -> Tensor:
    """Exclude special tokens (start, end, padding, mask and unknown), and rows of the head beyond the tokenizer: they
    are not words."""
    forbidden = no_words(model.words.tokenizer, logits_KV.shape[-1])
    return logits_KV.index_fill(-1, torch.tensor(forbidden, device=logits_KV.device), float("-inf"))


class Written(NamedTuple):
    """A caption, and the mean log probability (nats) of its words, each at the time it was filled in."""

    text: str
    certainty: float


def write_captions(model: Model, seen_images: SeenImages, lengths: Sequence[int]) -> list[list[Written]]:
    """One caption of each length for each image; lengths are in tokens, without start and end. All words start masked,
    and each round fills in the most certain one (mask-predict's order; Ghazvininejad et al. 2019)."""
    head, mask = model.head("tokens", "caption"), model.backbone.text.mask_id
    start, end = model.words.ends
    # A row for each length of each image, all in one batch.
    blank = [torch.tensor([start, *[mask] * length, end]) for length in lengths]
    which = [number for number in seen_images.which for _ in lengths]
    rows = pair_rows(model, seen_images.image_XLD, which, blank * len(seen_images.which))
    total_B = torch.zeros(len(rows.token_BT), device=rows.token_BT.device)
    # A round fills in one token in every row with a masked one left; short captions finish first.
    for _ in range(max(lengths)):
        open_B = (rows.token_BT == mask).any(1).nonzero().flatten()
        for chosen_B, text_BTD in text_cross(model, rows.only(open_B)):
            now_B = open_B[chosen_B]
            masked_BT = rows.token_BT[now_B] == mask  # with a large vocabulary, logits of the others would be costly
            likeliest = forbid(model, head(text_BTD[masked_BT]).float()).log_softmax(-1).max(-1)
            # (masked,) -> (B, T); -inf at unmasked positions, so that argmax finds a masked one.
            value_BT = total_B.new_full(masked_BT.shape, float("-inf")).masked_scatter(masked_BT, likeliest.values)
            word_BT = torch.zeros_like(rows.token_BT[now_B]).masked_scatter(masked_BT, likeliest.indices)
            at_B1 = value_BT.argmax(1, keepdim=True)
            rows.token_BT[now_B, at_B1[:, 0]] = word_BT.gather(1, at_B1)[:, 0]
            total_B[now_B] += value_BT.gather(1, at_B1)[:, 0]
    ids = rows.token_BT.tolist()
    written = [
        Written(model.words.decode(row[1 : length + 1]), total / length)
        for row, total, length in zip(ids, total_B.tolist(), [*lengths] * len(seen_images.which), strict=True)
    ]
    return [list(each) for each in embed.in_batches(written, len(lengths))]


def best_captions(model: Model, images: Sequence[Any], numbers: Sequence[int], lengths: Sequence[int]) -> list[str]:
    """The best-matching caption of each image among one for each length; without a matching head, the most certain."""
    seen_images = look(model, images, numbers)
    # Tokens can decode to an empty text.
    written = [[one for one in each if one.text.strip()] for each in write_captions(model, seen_images, lengths)]
    if not any(written):
        return [""] * len(written)
    if getattr(model.task, "matching", None) is None:
        return [max(each, key=lambda one: one.certainty).text if each else "" for each in written]
    pairs = [(row, one.text) for row, each in zip(seen_images.which, written, strict=True) for one in each]
    texts = embed.text_features(model, [text for _, text in pairs])
    # One probability per pair, consumed in the order of `pairs`.
    likely = iter(embed.match(model, [seen_images.image_XLD[row] for row, _ in pairs], texts).tolist())
    return [
        max(((next(likely), one.text) for one in each), default=(0, ""), key=lambda pair: pair[0])[1]
        for each in written
    ]


def log_likelihood(
    model: Model, images: Sequence[Any | None], numbers: Sequence[int], texts: Sequence[str]
) -> list[Tensor]:
    """log p(token | all other tokens, image) of each token of each text except start and end, [T - 2] each, nats
    (Salazar et al. 2020)."""
    head, mask = model.head("tokens", "score"), model.backbone.text.mask_id
    whole = [model.tokens([text]).token_CT[0] for text in texts]
    inner = [len(token_T) - 2 for token_T in whole]
    if not all(inner):
        raise UserError("text", f"'{texts[inner.index(0)]}' holds nothing that the tokenizer knows", "Write words")
    # A row for each token of each text, with that token masked and all others visible.
    text_B = [number for number, words in enumerate(inner) for _ in range(words)]
    place_B = torch.tensor([place for words in inner for place in range(1, words + 1)], device=device_of(model))
    image_XLD, which = look(model, images, numbers)
    rows = pair_rows(model, image_XLD, [which[number] for number in text_B], [whole[number] for number in text_B])
    row_B = torch.arange(len(place_B), device=place_B.device)
    target_B = rows.token_BT[row_B, place_B]  # read before it is masked
    rows.token_BT[row_B, place_B] = mask
    parts = []
    for chosen_B, text_BTD in text_cross(model, rows):
        # One position per row: (B, T, D) -> (B, D)
        hidden_BD = text_BTD[torch.arange(len(chosen_B), device=place_B.device), place_B[chosen_B]]
        log_p_BV = head(hidden_BD).float().log_softmax(-1)
        parts.append(log_p_BV.gather(1, target_B[chosen_B, None])[:, 0])
    return list(torch.cat(parts).split(inner))


# ---------------------------------------------------------------------- images


def patches(model: Model, image_BCHW: Tensor, mask_BN: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Tensor:
    """Predicted values of every patch, [B, N, P], float32, normalised like the images: masked patches are predicted
    from the visible ones and the whole text."""
    backbone, task = model.backbone, model.head("pixels", "reconstruct")
    image_BLD = backbone.image(image_BCHW, mask_BN)
    crossed_BLD = backbone.cross_image(image_BLD, backbone.cross_image.context(text_BTD, attention_BT)).full_RLD
    # Every patch is predicted, including visible ones; `paste` uses the masked ones.
    every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
    return task(crossed_BLD, text_BTD, attention_BT, every_BN).float()


def reconstruct_images(
    model: Model, image_BCHW: Tensor, mask_BN: Tensor, texts: Sequence[str], true_statistics: bool
) -> Tensor:
    """Images with their masked patches filled in in one pass, normalised [B, 3, H, W].

    Args:
        true_statistics: the model predicts each patch up to its mean and contrast, which are taken from the image.
    """
    tokens = model.tokens(texts)
    text_BTD = model.backbone.text(tokens.token_CT, tokens.attention_CT)
    values_BNP = patches(model, image_BCHW, mask_BN, text_BTD, tokens.attention_CT)
    size = model.backbone.image.patch_size
    if true_statistics:
        values_BNP = denormalise(values_BNP, patchify(image_BCHW.float(), size))
    every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
    # Pasted in float32, so that predictions are not rounded to the model's precision.
    return paste(image_BCHW.float(), values_BNP, every_BN, mask_BN.float(), size)


def inpaint_images(
    model: Model, image_BCHW: Tensor, mask_BN: Tensor, texts: Sequence[str], steps: int, true_statistics: bool
) -> Tensor:
    """Paint as `reconstruct` does, but in rounds: the most certain masked patches are painted and visible from then on.

    Pixel prediction gives no probability, so a patch counts as certain if three predictions agree, each made with a
    different quarter of the visible patches also masked.
    """
    painted_BCHW, remaining_BN = image_BCHW.float(), mask_BN.clone()
    tokens = model.tokens(texts)
    text_BTD = model.backbone.text(tokens.token_CT, tokens.attention_CT)
    # Drawn on the CPU, so that masks are the same on every device.
    generator = torch.Generator().manual_seed(0)
    size, total_B = model.backbone.image.patch_size, mask_BN.sum(1)
    for step in range(steps):
        if not remaining_BN.any():
            break
        keep_B = (total_B * (steps - 1 - step)) // steps  # masked patches that remain after this round
        current_BCHW = painted_BCHW.to(image_BCHW.dtype)
        values_BNP = patches(model, current_BCHW, remaining_BN, text_BTD, tokens.attention_CT)
        others = []
        for _ in range(3):
            # One mask for all images, so that an image's result does not depend on the rest of the batch.
            more_N = torch.rand(mask_BN.shape[1], generator=generator).to(mask_BN.device) < 0.25
            others.append(patches(model, current_BCHW, remaining_BN | more_N, text_BTD, tokens.attention_CT))
        # Variance of the predictions, (3, B, N, P) -> (B, N); -1 sorts visible patches after all masked ones.
        doubt_BN = torch.stack(others).var(0).mean(-1).masked_fill(~remaining_BN, -1.0)
        # argsort of argsort is the rank of each patch in that order.
        rank_BN = doubt_BN.argsort(dim=1, descending=True).argsort(dim=1)  # most uncertain first
        stay_BN = remaining_BN & (rank_BN < keep_B[:, None])
        now_BN = remaining_BN & ~stay_BN
        # Mean and contrast are those of the input image, not of what has been painted.
        if true_statistics:
            values_BNP = denormalise(values_BNP, patchify(image_BCHW.float(), size))
        every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
        painted_BCHW = paste(painted_BCHW, values_BNP, every_BN, now_BN.float(), size)
        remaining_BN = stay_BN
    return painted_BCHW
