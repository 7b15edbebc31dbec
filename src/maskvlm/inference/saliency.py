"""Where the model looks for a word: cross-attention of the word to the patches, and Grad-CAM on it.

Shapes: B rows, T tokens, L image positions (class token first), N patches, H heads, D width.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskvlm.data.inputs import check_text
from maskvlm.model.cross_attention import Attention, CrossEncoder
from maskvlm.objectives.loaded_model import Model
from maskvlm.utils.errors import UserError


class WordSaliency(NamedTuple):
    """attention_N: share of the word's attention on each patch, mean over heads. gradcam_N: attention weighted by how
    much it supports the word (positive gradients), 0 where nothing does. Both sum to 1 or are 0."""

    attention_N: Tensor
    gradcam_N: Tensor


class Traced(NamedTuple):
    """every_BTD: output of the encoder. probabilities: attention of each block, [B, H, T, L]."""

    every_BTD: Tensor
    probabilities: list[Tensor]


def trace(encoder: CrossEncoder, x_BTD: Tensor, context_BLD: Tensor, attention_BT: Tensor) -> Traced:
    """Forward pass of a cross encoder that keeps its cross-attention, which the fused kernel does not return."""
    mask = attention_BT[:, None, None, :]
    shares = []
    for block in encoder.blocks:
        own: Attention = block.self_attention  # type: ignore[assignment]
        other: Attention = block.cross_attention  # type: ignore[assignment]
        # As CrossBlock.forward: no dropout in evaluation, and g_txt has no query positions.
        x_BTD = block.norms[0](x_BTD + own(x_BTD, own.keys_values(x_BTD), mask))  # type: ignore[index, operator]
        query, (key, value) = other._split(other.query(x_BTD)), other.keys_values(context_BLD)
        # (B, H, T, D / H) and (B, H, D / H, L) -> (B, H, T, L); no mask, as an image has no padding.
        share_BHTL = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        shares.append(share_BHTL)
        mixed = other.out((share_BHTL @ value).transpose(1, 2).flatten(2))  # (B, H, T, D / H) -> (B, T, D)
        x_BTD = block.norms[1](x_BTD + mixed)  # type: ignore[index, operator]
        x_BTD = block.norms[2](x_BTD + block.feed_forward(x_BTD))  # type: ignore[index, operator]
    return Traced(x_BTD, shares)


def word_places(model: Model, text: str, word: str) -> tuple[Tensor, Tensor]:
    """Tokens of a text, [T], and the positions of the first occurrence of a word (or several), [K]. Parts of words do
    not match: `circle` is not in `circles`.

    Raises:
        UserError: the word is not in the text, or the tokenizer does not know it.
    """
    check_text(word)
    captioner = model.words.captioner
    tokens = model.tokens([text])
    token_T, word_T = tokens.token_CT[0], tokens.word_CT[0].tolist()
    whole = token_T.tolist()
    # A position between two tokens of the same word is not a border; start and end token (-1) are separate words.
    inside = {at for at in range(1, len(whole)) if word_T[at - 1] == word_T[at] >= 0}
    borders = {*range(len(whole) + 1)} - inside
    for spelt in (word, f" {word}"):  # byte-level tokenizers keep the space before a word
        inner = captioner.inner(spelt)
        # All unknown words map to one token, which would match any other unknown word.
        if captioner.unknown in inner:
            raise UserError("word", f"the model's tokenizer does not know '{word}'", "Use another word")
        for start in range(len(whole) - len(inner) + 1):
            end = start + len(inner)
            if inner and whole[start:end] == inner and {start, end} <= borders:
                return token_T, torch.arange(start, start + len(inner), device=token_T.device)
    cut = f" of which {model.words.text_length - 2} tokens are read" if len(whole) == model.words.text_length else ""
    what = f"'{word}' is not in the text '{text}'{cut}"
    raise UserError("word", what, "Give a word of the text, as it is written there")


@torch.inference_mode(False)  # a service may answer in this mode, whose tensors have no gradient
def explain_word(model: Model, image: Any, text: str, word: str, block: int = -1) -> WordSaliency:
    """Mask the word and fill it in from the image; return where the model looked.

    Args:
        block: block of the text cross encoder whose attention is shown; -1 for the last.
    """
    backbone, head = model.backbone, model.head("tokens", "explain")
    token_T, at_K = word_places(model, text, word)
    masked_T = token_T.clone()
    masked_T[at_K] = backbone.text.mask_id
    attention_1T = torch.ones_like(masked_T, dtype=torch.bool)[None]
    with torch.enable_grad():
        image_1LD = backbone.image(model.pixels([image])).detach()
        text_1TD = backbone.text(masked_T[None], attention_1T).detach()
        # The graph starts at the text features: the encoders need no gradient.
        share = trace(backbone.cross_text, text_1TD.requires_grad_(), image_1LD, attention_1T)
        logits_KV = head(share.every_BTD[0, at_K]).float()
        # log p of all tokens of the word; Grad-CAM weights each attention share by its gradient.
        evidence = logits_KV.log_softmax(-1).gather(1, token_T[at_K, None]).sum()
        (slope,) = torch.autograd.grad(evidence, share.probabilities[block])
    chosen_HKL = share.probabilities[block].detach()[0][:, at_K].float()
    cam_HKL = chosen_HKL * slope[0][:, at_K].float().clamp(min=0)
    # Mean over heads and tokens, without the class token: (H, K, L) -> (N,)
    return WordSaliency(*(_shared(map_HKL.mean((0, 1))[1:]) for map_HKL in (chosen_HKL, cam_HKL)))


def _shared(map_N: Tensor) -> Tensor:
    total = map_N.sum()
    return map_N / total if total > 0 else map_N


def overlay(image: Image.Image, map_RC: Any) -> Image.Image:
    """A map over the patches as a heat map on an image, at the image's own size. Where the map is highest, the heat map
    has 70 % opacity."""
    top = float(map_RC.max())
    level_RC = np.rint(255 * np.asarray(map_RC, dtype=np.float32) / (top or 1.0)).astype(np.uint8)
    # Half a second to import, which no other answer needs.
    from matplotlib import colormaps

    # Bytes throughout, about ten per pixel instead of a hundred with floats: photos have up to 50 million pixels.
    level = Image.fromarray(level_RC).resize(image.size, Image.Resampling.BICUBIC)
    layer = level.copy()
    layer.putpalette((colormaps["inferno"](np.arange(256), bytes=True)[:, :3]).tobytes())
    return Image.composite(layer.convert("RGB"), image, level.point(lambda value: round(0.7 * value)))
