"""Example reconstructions: masked patches with the right and a wrong caption, masked words with and without the image.

Shapes: B images with one caption each, N patches, K masked positions, P values of a patch, T tokens,
D width, G guesses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import Context, gather_positions
from maskvlm.model.heads import patchify, unpatchify
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.evaluation import EVAL_SEED, one_text
from maskvlm.objectives.masking import PatchMask, TokenMask
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.utils.distributed import Draw


class FilledImages(NamedTuple):
    """RGB in [0, 1]: the image with masked patches in grey, filled in with its caption, and with a wrong caption.

    error_B, error_wrong_B: mean squared error of the masked values, in normalised pixels.
    """

    masked_BCHW: Tensor
    filled_BCHW: Tensor
    filled_wrong_BCHW: Tensor
    error_B: Tensor
    error_wrong_B: Tensor


class Guesses(NamedTuple):
    """The G likeliest tokens for each masked position, best first, and their probabilities."""

    token_BKG: Tensor
    probability_BKG: Tensor


class GuessedWords(NamedTuple):
    """index_BK: positions, masked where masked_BK is True; the others are padding. Guesses with the image and with a
    blank image (the mean colour)."""

    index_BK: Tensor
    masked_BK: Tensor
    with_image: Guesses
    without_image: Guesses


class Reconstruction(NamedTuple):
    """`images` or `words` is None if the task does not train that loss.

    true_statistics: with `pixel_norm`, the model predicts each patch up to its mean and contrast, which are taken from
    the true patch: the filled-in images look better than the model alone could make them.
    """

    batch: Batch
    image_BCHW: Tensor
    images: FilledImages | None
    words: GuessedWords | None
    true_statistics: bool = False


def subsample(batch: Batch, count: int) -> Batch:
    """At most `count` images, evenly spaced over the batch, with one caption each, cut to the longest caption."""
    size = len(batch.image_BCHW)
    count = min(count, size)
    row = torch.arange(count, device=batch.index_B.device) * size // max(count, 1)
    caption = one_text(batch)[row]
    longest = int(batch.attention_CT[caption].sum(1).max()) if count else 0
    # Fields 1 to 4 of Batch, which have one row per caption.
    token, attention, special, word = (x_CT[caption, :longest].clone() for x_CT in batch[1:5])
    owner = torch.arange(count, device=row.device)
    images = (batch.image_id_B[row], batch.text_id_C[caption], batch.valid_B[row], batch.index_B[row])
    return Batch(batch.image_BCHW[row].clone(), token, attention, special, word, owner, *images)


@torch.no_grad()
def reconstruct(backbone: MaskVLM, task: MaskedPretraining, batch: Batch, guesses: int = 3) -> Reconstruction:
    """Mask parts of each pair and fill them in.

    Args:
        backbone, task: in evaluation mode.
        batch: with one caption per image (see `subsample`); the wrong caption is the next row's. The masks depend only
            on its first image's index, so that every checkpoint gets the same.
        guesses: G, at most the vocabulary size.
    """
    masks = task.mask(backbone, batch, Draw(EVAL_SEED, int(batch.index_B[0]), batch.token_CT.device).local)
    images = words = None
    if task.weights["mim"] and masks.patch is not None:
        images = fill_images(backbone, task, batch, masks.patch)
    if task.weights["mlm"] and masks.token is not None:
        words = guess_words(backbone, task, batch, masks.token, guesses)
    return Reconstruction(batch, to_rgb(backbone, batch.image_BCHW), images, words, task.masked_pixels.norm)


def fill_images(backbone: MaskVLM, task: MaskedPretraining, batch: Batch, patch: PatchMask) -> FilledImages:
    """Predict masked patches from the visible ones and the whole caption."""
    size, picked = backbone.image.patch_size, (patch.index_BK, patch.weight_BK)
    true_BKP = gather_positions(patchify(batch.image_BCHW, size), patch.index_BK)
    image_BLD = backbone.image(batch.image_BCHW, patch.mask_BN)
    text_BTD = backbone.text(batch.token_CT, batch.attention_CT)
    images, errors = [], []
    # 0: each image's own caption. -1: the next row's.
    for shift in (0, -1):
        words_BTD, attention_BT = text_BTD.roll(shift, 0), batch.attention_CT.roll(shift, 0)
        context = backbone.cross_image.context(words_BTD, attention_BT)
        crossed_BLD = backbone.cross_image(image_BLD, context).full_RLD
        values_BKP = task.pixels(crossed_BLD, words_BTD, attention_BT, patch.index_BK).float()
        values_BKP = denormalise(values_BKP, true_BKP) if task.masked_pixels.norm else values_BKP
        filled_BCHW = paste(batch.image_BCHW, values_BKP, *picked, size)
        images.append(to_rgb(backbone, filled_BCHW))
        # (B, K), 0 for padding; then the mean over the masked patches of each image.
        error_BK = (values_BKP - true_BKP).square().mean(-1) * patch.weight_BK
        errors.append(error_BK.sum(1) / patch.weight_BK.sum(1).clamp(min=1))
    rgb_BCHW = to_rgb(backbone, batch.image_BCHW)
    grey_BCHW = paste(rgb_BCHW, torch.full_like(true_BKP, 0.5), *picked, size)
    return FilledImages(grey_BCHW, *images, *errors)


def guess_words(
    backbone: MaskVLM, task: MaskedPretraining, batch: Batch, token: TokenMask, guesses: int
) -> GuessedWords:
    """Predict masked words from the rest of the caption and the whole image, or a blank one."""
    masked_BTD = backbone.text(token.token_CT, batch.attention_CT)
    answers = []
    # The images, then one blank image for all texts.
    for image_BCHW in (batch.image_BCHW, torch.zeros_like(batch.image_BCHW[:1])):
        context = backbone.cross_text.context(backbone.image(image_BCHW))
        # Row of the image that each text attends to: its own, or always the blank one.
        row_B = torch.arange(len(masked_BTD), device=masked_BTD.device) % len(image_BCHW)
        context = Context(context.blocks, None, row_B)
        crossed_BTD = backbone.cross_text(masked_BTD, context, batch.attention_CT).full_RLD
        logits_BKV = task.tokens(gather_positions(crossed_BTD, token.index_CK)).float()
        top = logits_BKV.softmax(-1).topk(min(guesses, logits_BKV.shape[-1]))
        answers.append(Guesses(top.indices, top.values))
    return GuessedWords(token.index_CK, token.weight_CK > 0, *answers)


def paste(image_BCHW: Tensor, patch_BKP: Tensor, index_BK: Tensor, weight_BK: Tensor, size: int) -> Tensor:
    """The image with the patches at `index_BK` replaced where their weight is above 0.

    Everything else stays unchanged.
    """
    grid = image_BCHW.shape[2] // size, image_BCHW.shape[3] // size
    every_BNP = patchify(image_BCHW, size)
    # Padding is written too, with the pixels that are already there.
    new_BKP = torch.where(weight_BK[..., None] > 0, patch_BKP.to(every_BNP), gather_positions(every_BNP, index_BK))
    place_BKP = index_BK[..., None].expand_as(new_BKP)
    return unpatchify(every_BNP.scatter(1, place_BKP, new_BKP), grid, size)


def denormalise(values_BKP: Tensor, true_BKP: Tensor) -> Tensor:
    """Undo the per-patch normalisation of the target, with the true patch's mean and variance."""
    mean, var = true_BKP.mean(-1, keepdim=True), true_BKP.var(-1, keepdim=True)
    return values_BKP * (var + 1e-6).sqrt() + mean


def to_rgb(backbone: MaskVLM, image_BCHW: Tensor) -> Tensor:
    """Normalised pixels back to RGB in [0, 1], float32; values outside are clamped."""
    # (3,) -> (3, 1, 1)
    mean, std = (torch.tensor(x, device=image_BCHW.device)[:, None, None] for x in backbone.input_spec[1:3])
    return (image_BCHW.float() * std + mean).clamp(0, 1)
