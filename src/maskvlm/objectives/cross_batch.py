"""How rows are paired: in contrast, as hard negatives, and in the single pass of each cross encoder.

Shapes: B pairs of this process, G of all processes, M negatives, U rows to pick from, L positions, T tokens,
E contrast width, D width, m captions of each image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import CrossEncoder, CrossOutput
from maskvlm.model.maskvlm import Fused, MaskVLM
from maskvlm.objectives.hard_negatives import Negatives
from maskvlm.objectives.loss_functions import ContrastTargets
from maskvlm.objectives.masking import PatchMask, TokenMask
from maskvlm.utils.distributed import RowExchange, gather, rank, world_size


class Masks(NamedTuple):
    """Masks of this step. patch: for images, if a loss needs MASKED_IMAGE; token: for texts, if one needs MASKED_TEXT;
    otherwise None. With `mask_both`, either loss needs both."""

    patch: PatchMask | None
    token: TokenMask | None


class Encoded(NamedTuple):
    """Encoder outputs.

    Attributes:
        image_BLD, text_BTD: of whole images [B, 1 + N, D] and whole texts [B, T, D], the class token first.
        masked_image_BLD, masked_text_BTD: of masked inputs, if a loss needs MASKED_IMAGE or MASKED_TEXT; otherwise
            None. The `masks_per_text` masked rows of a text are adjacent.
        other_CTD: the other captions of images that have several.
        exchanged_STD: the captions of the first S images with two words exchanged. exchanged_S: False where that
            changed nothing.
    """

    image_BLD: Tensor
    text_BTD: Tensor
    masked_image_BLD: Tensor | None
    masked_text_BTD: Tensor | None
    other_CTD: Tensor | None = None
    masks_per_text: int = 1
    exchanged_STD: Tensor | None = None
    exchanged_S: Tensor | None = None

    @property
    def first_masked_BTD(self) -> Tensor | None:
        """Features of the first masking of each text, [B, T, D]; None if no loss needs masked texts."""
        return None if self.masked_text_BTD is None else self.masked_text_BTD[:: self.masks_per_text]


class Crossed(NamedTuple):
    """Cross encoder outputs.

    Attributes:
        image_BLD: all positions of the masked images, attending to whole texts (MASKED_IMAGE; otherwise no rows).
        text_BTD: all positions of the masked texts, attending to whole images (MASKED_TEXT; otherwise no rows).
        fused_M: class tokens of the 3B matching pairs: true pairs, images with a hard text, texts with a hard image
            (PAIRS; otherwise no rows).
    """

    image_BLD: Tensor
    text_BTD: Tensor
    fused_M: Fused


class Contrast(NamedTuple):
    """Unit vectors of this process's pairs and of all processes' pairs (followed by those of a queue). scale: 1 /
    temperature. own_B: int64 column of each row's partner. excluded_BG: bool, True where a column is not a negative,
    including the row's own column. text_id_Bm: int64, ids of the m captions of each image."""

    image_BE: Tensor
    text_BE: Tensor
    image_GE: Tensor
    text_GE: Tensor
    scale: Tensor
    own_B: Tensor
    excluded_BG: Tensor
    text_id_Bm: Tensor


def same_pairs(image_id_B: Tensor, text_id_Bm: Tensor, image_id_G: Tensor, text_id_Gm: Tensor) -> Tensor:
    """Whether each of the G pairs has the same image as a pair of the batch or shares one of its m captions, so that
    they cannot be negatives of each other, [B, G]."""
    # (B, 1, m, 1) and (1, G, 1, m): any caption of one image with any of the other.
    same_text_BG = (text_id_Bm[:, None, :, None] == text_id_Gm[None, :, None, :]).flatten(2).any(2)
    return same_text_BG | (image_id_B[:, None] == image_id_G)


def gather_contrast(batch: Batch, image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Contrast:
    """Gather the unit vectors of all processes. Excluded as negatives are the same image, images that share one of its
    captions, and invalid rows. batch: from `first_and_all_captions`, with all captions, equally many per image."""
    # All processes hold the same number of rows, gathered in rank order.
    own_B = torch.arange(len(image_BE), device=image_BE.device) + rank() * len(image_BE)
    # (m * B) -> (m, B) -> (B, m)
    text_id_Bm = batch.text_id_C.unflatten(0, (-1, len(image_BE))).T.contiguous()
    same_BG = same_pairs(batch.image_id_B, text_id_Bm, gather(batch.image_id_B), gather(text_id_Bm))
    excluded_BG = same_BG | ~gather(batch.valid_B.to(torch.uint8)).bool()
    return Contrast(image_BE, text_BE, gather(image_BE), gather(text_BE), scale, own_B, excluded_BG, text_id_Bm)


class QueuedPairs(NamedTuple):
    """Pairs of earlier steps as encoded then, without gradient: features, unit vectors, image ids, ids of the m
    captions of each image, and whether they are valid."""

    image_QLD: Tensor
    text_QTD: Tensor
    attention_QT: Tensor
    image_QE: Tensor
    text_QE: Tensor
    image_id_Q: Tensor
    text_id_Qm: Tensor
    valid_Q: Tensor


def contrast_targets(batch: Batch) -> tuple[ContrastTargets, ContrastTargets]:
    """Targets of ITC over the global batch, for images [B, H] and for captions [C, G]. Columns of the same image are
    positive. Columns of another image with the same caption, and invalid columns, are excluded."""
    # owner_C is an index among this process's images; after the gather it must index all images.
    owner_C = batch.owner_C + rank() * len(batch.valid_B)
    owner_H, image_G, text_H = gather(owner_C), gather(batch.image_id_B), gather(batch.text_id_C)
    valid_G = gather(batch.valid_B.to(torch.uint8)).bool()
    # (C, H): two captions are identical. Summed over the captions of an image: (B, H) and (C, G).
    same_CH = (batch.text_id_C[:, None] == text_H).float()
    says_BH = same_CH.new_zeros(len(batch.valid_B), len(text_H)).index_add(0, batch.owner_C, same_CH) > 0
    says_CG = same_CH.new_zeros(len(batch.text_id_C), len(image_G)).index_add(1, owner_H, same_CH) > 0
    # By id, not by position: the same image may occur in the batch twice.
    own_BH = batch.image_id_B[:, None] == image_G[owner_H]
    own_CG = batch.image_id_B[batch.owner_C][:, None] == image_G
    return (
        ContrastTargets(own_BH, (says_BH & ~own_BH) | ~valid_G[owner_H]),
        ContrastTargets(own_CG, (says_CG & ~own_CG) | ~valid_G),
    )


def first_and_all_captions(batch: Batch) -> tuple[Batch, Batch]:
    """A training batch with only the first caption of each image, and with all captions, the first captions in front.

    In training, every image has the same number of captions, in adjacent rows.
    """
    pairs, captions = len(batch.valid_B), len(batch.owner_C)
    if captions == pairs:
        return batch, batch
    # (B * m) -> (B, m) -> (m, B): all first captions, then all second ones, ...
    order_C = torch.arange(captions, device=batch.owner_C.device).unflatten(0, (pairs, -1)).T.flatten()
    return select_captions(batch, order_C[:pairs]), select_captions(batch, order_C)


def select_captions(batch: Batch, index_C: Tensor | slice) -> Batch:
    """The batch with only these captions, in this order; without `texts`, which training does not need."""
    return batch._replace(
        token_CT=batch.token_CT[index_C],
        attention_CT=batch.attention_CT[index_C],
        special_CT=batch.special_CT[index_C],
        word_CT=batch.word_CT[index_C],
        owner_C=batch.owner_C[index_C],
        text_id_C=batch.text_id_C[index_C],
        texts=(),
    )


class RowPool(NamedTuple):
    """Rows of one modality that pairs can pick, and their padding mask."""

    rows_ULD: Tensor
    attention_UL: Tensor | None

    def masked_first(self, masked_FLD: Tensor, of_F: Tensor, whole: bool) -> "RowPool":
        """Masked rows with the padding masks of the rows `of_F`; with `whole`, followed by the rows of this pool."""
        rows, attention = [masked_FLD], self.attention_UL
        masks = [] if attention is None else [attention[of_F]]
        if whole:
            rows.append(self.rows_ULD)
            masks += [] if attention is None else [attention]
        return RowPool(torch.cat(rows), torch.cat(masks) if masks else None)


class MatchingRows(NamedTuple):
    """Rows that matching pairs pick from: this process's rows, followed by fetched ones.

    Attributes:
        image_ULD, text_VTD: features. attention_VT: padding mask of the texts.
        hard_image_C, hard_text_B: int64 row of each caption's hard image, and of each image's hard caption.
    """

    image_ULD: Tensor
    text_VTD: Tensor
    attention_VT: Tensor
    hard_image_C: Tensor
    hard_text_B: Tensor


def matching_rows(
    image_BLD: Tensor,
    text_CTD: Tensor,
    attention_CT: Tensor,
    negatives: tuple[Negatives, Negatives],
    queued_pairs: QueuedPairs | None = None,
) -> tuple[MatchingRows, tuple[Negatives, Negatives]]:
    """The rows that matching needs, and the negatives; a negative that could not be fetched gets weight 0.

    With one process, negatives are among its own rows; with several, they are fetched from the others, with gradient
    (`distributed.RowExchange`).

    Args:
        negatives: a hard caption for each image and a hard image for each caption, as indices into the global batch
            followed by the queue.
        queued_pairs: the queue's rows.
    """
    texts, images = negatives
    if world_size() == 1 and queued_pairs is None:
        return MatchingRows(image_BLD, text_CTD, attention_CT, images.index_B, texts.index_B), negatives
    queued = (None, None, None) if queued_pairs is None else queued_pairs[:3]
    fetched_image, here_C = _fetch([image_BLD], [queued[0]], images.index_B)
    fetched_text, here_B = _fetch([text_CTD, attention_CT], [queued[1], queued[2]], texts.index_B)
    rows = MatchingRows(
        torch.cat([image_BLD, *fetched_image]),
        torch.cat([text_CTD, fetched_text[0]]),
        torch.cat([attention_CT, fetched_text[1]]),
        # This process's rows stay in front, so that all other row indices remain valid.
        torch.arange(len(images.index_B), device=image_BLD.device) + len(image_BLD),
        torch.arange(len(texts.index_B), device=image_BLD.device) + len(text_CTD),
    )
    return rows, (
        texts._replace(weight_B=texts.weight_B * here_B),
        images._replace(weight_B=images.weight_B * here_C),
    )


def with_exchanged(matched: MatchingRows, encoded: Encoded, attention_BT: Tensor) -> MatchingRows:
    """Replace the hard caption of the first images by their own caption with two words exchanged. If nothing was
    exchanged, the hard caption stays: an unchanged caption is not a negative."""
    if encoded.exchanged_STD is None or encoded.exchanged_S is None:
        return matched
    first, hard_text = len(encoded.exchanged_S), matched.hard_text_B
    # After all other rows.
    at_S = torch.arange(first, device=hard_text.device) + len(matched.text_VTD)
    return matched._replace(
        text_VTD=torch.cat([matched.text_VTD, encoded.exchanged_STD]),
        attention_VT=torch.cat([matched.attention_VT, attention_BT[:first]]),
        hard_text_B=torch.cat([torch.where(encoded.exchanged_S, at_S, hard_text[:first]), hard_text[first:]]),
    )


def _fetch(own: list[Tensor], queued: list[Tensor | None], index_M: Tensor) -> tuple[list[Tensor], Tensor]:
    """The rows `index_M` of each tensor in `own`, indexed over the global batch followed by the queue; and whether
    each row arrived, bool [M]."""
    here = len(own[0])
    everywhere = here * world_size()
    if world_size() == 1:
        fetched, arrived_M = [part.index_select(0, index_M.clamp(max=here - 1)) for part in own], index_M < here
    else:
        exchange = RowExchange(index_M, here)
        fetched, arrived_M = [exchange(part) for part in own], exchange.arrived_M
    beyond_M = index_M >= everywhere
    for place, queue_QX in enumerate(queued):
        if queue_QX is not None:
            queue_MX = queue_QX.index_select(0, (index_M - everywhere).clamp(min=0)).to(fetched[place].dtype)
            of_queue = beyond_M.view(-1, *[1] * (queue_MX.ndim - 1))
            fetched[place] = torch.where(of_queue, queue_MX, fetched[place])
    return fetched, arrived_M | beyond_M


def cross_pairs(
    encoder: CrossEncoder,
    masked_BLD: Tensor | None,
    own: RowPool,
    other: RowPool,
    attended_BLD: Tensor | None,
    rows: list[Tensor],
    sees: list[Tensor],
    pairs: int = 1,
) -> CrossOutput:
    """Pass masked rows (all positions) and then matching pairs (class tokens) through one cross encoder.

    Args:
        masked_BLD: masked rows, the same number for each of the first `pairs` whole rows.
        own, other: whole rows of the two modalities.
        rows, sees: for each matching pair, the row in `own` and in `other`.
        attended_BLD: what the masked rows attend to, one row per pair; None: the whole rows of `other`.
        pairs: how many whole rows the masked rows belong to.
    """
    if masked_BLD is None and not rows:  # no loss uses this modality
        return CrossOutput(own.rows_ULD[:0], own.rows_ULD[:0, 0])
    first = 0 if masked_BLD is None else len(masked_BLD)
    # The same number of masked rows for each of the `pairs` whole rows, adjacent.
    of_pair = torch.arange(pairs, device=own.rows_ULD.device).repeat_interleave(first // max(1, pairs))
    # Masked rows attend to the whole row of their pair, or to `attended_BLD`, which is then appended to the others.
    partners = of_pair
    if first and attended_BLD is not None:
        mask = None if other.attention_UL is None else torch.cat([other.attention_UL, other.attention_UL[:pairs]])
        partners = partners + len(other.rows_ULD)
        other = RowPool(torch.cat([other.rows_ULD, attended_BLD]), mask)
    context = encoder.context(other.rows_ULD, other.attention_UL, torch.cat([partners, *sees]))
    # The masked rows come before the whole ones; several pairs may pick the same whole row.
    asking = own if masked_BLD is None else own.masked_first(masked_BLD, of_pair, bool(rows))
    row_B = torch.cat([torch.arange(first, device=of_pair.device), *(row + first for row in rows)])
    # All positions of the masked rows, class tokens of the matching pairs.
    return encoder(asking.rows_ULD, context, asking.attention_UL, num_full=first, row_B=row_B)


def pad_text(batch: Batch, length: int, pad_id: int) -> Batch:
    """Pad captions to `length`, so that all processes hold the same shape."""
    extra = length - batch.token_CT.shape[1]

    def pad(x_CT: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x_CT, (0, extra), value=value)

    return batch._replace(
        token_CT=pad(batch.token_CT, pad_id),
        attention_CT=pad(batch.attention_CT, False),
        special_CT=pad(batch.special_CT, True),
        word_CT=pad(batch.word_CT, -1),
    )


def cross_all(
    backbone: MaskVLM,
    encoded: Encoded,
    attention_BT: Tensor,
    matched: MatchingRows | None,
    reconstructs: tuple[bool, bool],
    mask_both: bool,
    pairs: int,
    matching_trains: bool = True,
) -> Crossed:
    """One pass of each cross encoder over all its rows: first the masked rows, then three matching pairs per pair.

    Matching pairs: (image, its caption), (image, hard caption), (hard image, caption).

    Args:
        matched: the rows that matching picks from; None without matching.
        reconstructs: whether to reconstruct masked patches, and masked words.
        mask_both: reconstruct each modality from the masked other one.
        pairs: number of pairs, counted from the first, that are masked and matched.
        matching_trains: whether the matching pairs' gradient reaches the encoders.
    """
    # Rows that matching can pick: own rows and negatives, with their indices for each kind of pair.
    image, text, attention = encoded.image_BLD, encoded.text_BTD, attention_BT
    images, texts = [], []
    if matched is not None:
        own = torch.arange(pairs, device=image.device)
        image, text, attention, hard_image, hard_text = matched
        images, texts = [own, own, hard_image], [own, hard_text, own]
    # What is reconstructed, and from what: None means the whole rows of the other modality.
    masked_image = encoded.masked_image_BLD if reconstructs[0] else None
    masked_text = encoded.masked_text_BTD if reconstructs[1] else None
    masked = 0 if masked_image is None else len(masked_image)
    attended_text, attended_image = (encoded.first_masked_BTD, encoded.masked_image_BLD) if mask_both else (None, None)
    if not matching_trains:
        # Detach the inputs of matching. MLM and MIM must still train the encoders, so their masked rows attend to the
        # original features.
        image, text = image.detach(), text.detach()
        if not mask_both:
            # For a frozen encoder, the detached rows serve both, so that no row is projected twice.
            attended_text = encoded.text_BTD[:masked] if encoded.text_BTD.requires_grad else None
            attended_image = encoded.image_BLD[:pairs] if encoded.image_BLD.requires_grad else None
    # The two are parallel: each attends to the other modality's encoder output, not to its cross encoder's output.
    image_side, text_side = RowPool(image, None), RowPool(text, attention)
    image_out = cross_pairs(
        backbone.cross_image, masked_image, image_side, text_side, attended_text, images, texts, masked
    )
    text_out = cross_pairs(
        backbone.cross_text, masked_text, text_side, image_side, attended_image, texts, images, pairs
    )
    # Class tokens of the masked rows come first; matching does not use them.
    fused = Fused(image_out.cls_BD[len(image_out.full_RLD) :], text_out.cls_BD[len(text_out.full_RLD) :])
    return Crossed(image_out.full_RLD, text_out.full_RLD, fused)
