"""Loss functions: tensors in, scalar out, no parameters, no logging.

Shapes: B rows of this process, G rows of all processes (C and H: captions, if images have several), D width,
K masked positions, V vocabulary, P values of a patch. Weights are 0 or 1 (of masked tokens 0 or any number above it,
see `masking.TokenMask`); a sum is divided by `count`, which the caller may average over processes.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PixelLoss = Literal["l1", "squared", "smooth_l1"]


def mean_over(count: Tensor, total: Tensor) -> Tensor:
    """`total` divided by a count at or above 0; `total`, which is then 0, where nothing was counted. The count may be
    below 1: it is averaged over processes, and a masked token may have any weight."""
    return total / torch.where(count > 0, count, 1.0)


def contrastive(
    image_BD: Tensor,
    text_BD: Tensor,
    image_GD: Tensor,
    text_GD: Tensor,
    scale: Tensor,
    own_B: Tensor,
    excluded_BG: Tensor,
    weight_B: Tensor,
    count: Tensor,
) -> Tensor:
    """Image-text contrast (ITC): InfoNCE within the batch, mean of the two directions (paper sec. 3).

    Args:
        image_BD, text_BD: unit vectors of this process's pairs; image_GD, text_GD: of all processes.
        scale: 1 / temperature.
        own_B: int64 in [0, G), the column of each row's partner.
        excluded_BG: bool, False at own_B; True where a column shows the same image, has the same text or is invalid.
        weight_B, count: see the module docstring.

    Returns:
        Nats per pair.
    """
    # An image among all texts, then a text among all images.
    terms = []
    for query_BD, key_GD in ((image_BD, text_GD), (text_BD, image_GD)):
        logits_BG = similarity(query_BD, key_GD, scale).masked_fill(excluded_BG, float("-inf"))
        terms.append((F.cross_entropy(logits_BG, own_B, reduction="none") * weight_B).sum())
    return mean_over(count, (terms[0] + terms[1]) / 2)


class ContrastTargets(NamedTuple):
    """Targets of the rows of a similarity, bool. positive: the same image. excluded: neither positive nor a
    negative."""

    positive_BG: Tensor
    excluded_BG: Tensor


def soft_contrastive(
    image_BD: Tensor,
    text_CD: Tensor,
    image_GD: Tensor,
    text_HD: Tensor,
    scale: Tensor,
    image_targets: ContrastTargets,
    text_targets: ContrastTargets,
    weight_B: Tensor,
    weight_C: Tensor,
    count_B: Tensor,
    count_C: Tensor,
) -> Tensor:
    """Image-text contrast (ITC) for images with several captions: the target is spread equally over all columns of the
    same image, mean of the two directions (ALBEF's rule for fine-tuning).

    Args:
        image_BD, text_CD: unit vectors of this process; image_GD, text_HD: of all processes.
        scale: 1 / temperature.
        image_targets, text_targets: [B, H] of images and [C, G] of captions.
        weight_B, weight_C, count_B, count_C: of images and of captions, see the module docstring.

    Returns:
        Nats per query.
    """
    # (B, H) and (C, G)
    loss_B = soft_cross_entropy(similarity(image_BD, text_HD, scale), image_targets)
    loss_C = soft_cross_entropy(similarity(text_CD, image_GD, scale), text_targets)
    image, text = mean_over(count_B, (loss_B * weight_B).sum()), mean_over(count_C, (loss_C * weight_C).sum())
    return (image + text) / 2


def soft_cross_entropy(logits_BG: Tensor, columns: ContrastTargets) -> Tensor:
    """Cross-entropy [B] with the target spread equally over the positive columns; a row without any gives 0.

    F.cross_entropy also takes soft targets, but excluded columns would give -inf * 0 = NaN.
    """
    target_BG = columns.positive_BG & ~columns.excluded_BG
    excluded_BG = columns.excluded_BG & target_BG.any(1, keepdim=True)  # a row of -inf alone has no softmax
    log_p_BG = logits_BG.masked_fill(excluded_BG, float("-inf")).log_softmax(1)
    return -log_p_BG.masked_fill(~target_BG, 0.0).sum(1) / target_BG.sum(1).clamp(min=1)


def similarity(query_BD: Tensor, key_GD: Tensor, scale: Tensor) -> Tensor:
    """Cosines times `scale`, [B, G], in float32 even under autocast: at scale 1000 bfloat16 is off by up to 2."""
    with torch.autocast(query_BD.device.type, enabled=False):
        return scale.float() * query_BD.float() @ key_GD.float().T


def matching(logits_M2: Tensor, match_M: Tensor, weight_M: Tensor, count: Tensor) -> Tensor:
    """Image-text matching (ITM): two-class cross-entropy over positives and hard negatives, in nats per pair."""
    loss_M = F.cross_entropy(logits_M2.float(), match_M.long(), reduction="none")
    return mean_over(count, (loss_M * weight_M).sum())


def words_present(logits_BLV: Tensor, words_BV: Tensor, weight_B: Tensor, count: Tensor) -> Tensor:
    """Predict which words a caption has, from the image alone: a word is present if any position shows it.

    Noisy-or over positions, p = 1 - prod(1 - p_l), as Fang et al. 2015 (From captions to visual concepts and back)
    detect words in regions. Binary cross-entropy summed over the vocabulary, in nats per distinct token of the caption.
    """
    # log(1 - sigmoid(x)) = -softplus(x), and of independent positions the logs add up: (B, L, V) -> (B, V).
    absent_BV = -F.softplus(logits_BLV.float()).sum(1)  # log probability that no position shows it
    # The clamp keeps log(1 - p) below 0: at 0, the log probability of presence would be -inf. The bound is tiny because
    # the gradient is 0 beyond it, exactly where a present word is predicted absent most confidently.
    present_BV = torch.log(-torch.expm1(absent_BV.clamp(max=-1e-30)))
    # Per distinct token (words_BV has a 1 for each), so that longer captions do not weigh more.
    loss_B = -(words_BV * present_BV + (1 - words_BV) * absent_BV).sum(1) / words_BV.sum(1).clamp(min=1)
    return mean_over(count, (loss_B * weight_B).sum())


def masked_token(logits_CKV: Tensor, target_CK: Tensor, weight_CK: Tensor, count: Tensor) -> Tensor:
    """Masked language modelling (MLM): cross-entropy in nats per masked token; 0 if nothing is masked."""
    # (C, K, V) -> (C * K, V)
    loss_CK = F.cross_entropy(logits_CKV.float().flatten(0, 1), target_CK.flatten(), reduction="none")
    return mean_over(count, (loss_CK * weight_CK.flatten()).sum())


def masked_pixel(
    predicted_BKP: Tensor, target_BKP: Tensor, weight_BK: Tensor, count: Tensor, kind: PixelLoss = "l1"
) -> Tensor:
    """Masked image modelling (MIM): mean error per normalised pixel value of the masked patches; L1 in the paper."""
    error_BKP = pixel_error(predicted_BKP.float(), target_BKP.float(), kind)
    return mean_over(count, (error_BKP.mean(-1) * weight_BK).sum())


def mean_colour(target_BKP: Tensor, weight_BK: Tensor) -> Tensor:
    """Mean colour of the masked patches, as the values of a patch, [P]: the prediction of a model that has learned
    nothing. Zeros if nothing is masked."""
    # (B, K, P) -> (B, K, pixels, 3): the last axis of a patch is the channel.
    colour_BK3 = target_BKP.float().unflatten(-1, (-1, 3)).mean(2)
    colour_3 = (colour_BK3 * weight_BK[..., None]).sum((0, 1)) / weight_BK.sum().clamp(min=1)
    return colour_3.repeat(target_BKP.shape[-1] // 3)


def pixel_error(predicted: Tensor, target: Tensor, kind: PixelLoss) -> Tensor:
    """Elementwise error, in the shape of `predicted`, of the difference d: `l1` abs(d), `squared` d^2, `smooth_l1`
    d^2 / 2 for abs(d) below 1 and abs(d) - 1/2 otherwise."""
    if kind == "l1":
        return (predicted - target).abs()
    if kind == "squared":
        return (predicted - target).square()
    return F.smooth_l1_loss(predicted, target, reduction="none")
