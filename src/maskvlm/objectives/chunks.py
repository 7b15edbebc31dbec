"""Large batches on a small GPU: pairs are computed one chunk at a time, with the losses of the whole batch.

Contrast and hard negatives need every pair of the batch, but only its features. These are kept, and the activations
behind them are recomputed in the backward pass, chunk by chunk (GradCache, Gao et al. 2021, with torch's activation
checkpointing). Accumulating gradients over small batches would change the objective: contrast would compare fewer
pairs.

Shapes: B pairs, n of a chunk, M masked images, T tokens.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskvlm.data.batch import Batch
from maskvlm.model.encoders import Encoder
from maskvlm.objectives.cross_batch import Encoded, Masks, MatchingRows, select_captions
from maskvlm.objectives.hard_negatives import Negatives
from maskvlm.objectives.masking import PatchMask, TokenMask
from maskvlm.objectives.pretraining_losses import Step


def computed_again(compute: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Result of `compute`, which the backward pass calls again, so that none of its intermediate tensors are kept."""
    result: Tensor = checkpoint(compute, *arguments, use_reentrant=False)
    return result


def encoded_in_chunks(
    encoder: Encoder, size: int | None, rows: int, arguments: Callable[[slice], tuple[object, ...]]
) -> Tensor:
    """Features of `rows` rows, `size` at a time. `arguments` returns the encoder's arguments for a slice of rows."""
    # A frozen encoder keeps no activations anyway, and it is frozen only during part of the step.
    run = encoder if size is None or encoder.detached else functools.partial(computed_again, encoder)
    parts = [run(*arguments(part)) for part in slices(rows, size)]
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts])


def slices(rows: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` rows; a single one for None."""
    for first in range(0, rows, size or max(1, rows)):
        yield slice(first, min(rows, first + (size or rows)))


def take_pairs(batch: Batch, rows: slice) -> Batch:
    """These pairs of a batch with one caption per image."""
    return select_captions(batch, rows)._replace(
        image_BCHW=batch.image_BCHW[rows],
        owner_C=torch.arange(rows.stop - rows.start, device=batch.owner_C.device),
        image_id_B=batch.image_id_B[rows],
        valid_B=batch.valid_B[rows],
        index_B=batch.index_B[rows],
        foreground_BHW=None,
        mirrored_B=None if batch.mirrored_B is None else batch.mirrored_B[rows],
    )


def take_masks(masks: Masks, rows: slice, masks_per_text: int) -> Masks:
    """The masks of these pairs; None for images if none of them is masked."""
    patch, token = masks.patch, masks.token
    if patch is not None:
        cut = PatchMask(patch.mask_BN[rows], patch.index_BK[rows], patch.weight_BK[rows], patch.visible)
        patch = cut if len(cut.mask_BN) else None
    if token is not None:
        token = TokenMask(*(part[of_texts(rows, masks_per_text)] for part in token))
    return Masks(patch, token)


def of_texts(rows: slice, masks_per_text: int) -> slice:
    """The masked rows of the texts of these pairs."""
    return slice(rows.start * masks_per_text, rows.stop * masks_per_text)


def take_encoded(encoded: Encoded, rows: slice) -> Encoded:
    """The features of these pairs, without their other captions."""
    image, text, each = encoded.masked_image_BLD, encoded.masked_text_BTD, encoded.masks_per_text
    image = None if image is None or not len(image[rows]) else image[rows]
    text = None if text is None else text[of_texts(rows, each)]
    return Encoded(encoded.image_BLD[rows], encoded.text_BTD[rows], image, text, None, each)


def take_matched(matched: MatchingRows, rows: slice) -> MatchingRows:
    """The rows that these pairs pick from: their own rows, followed by their negatives."""
    image_C, text_B = matched.hard_image_C[rows], matched.hard_text_B[rows]
    own = torch.arange(rows.stop - rows.start, device=text_B.device)
    return MatchingRows(
        torch.cat([matched.image_ULD[rows], matched.image_ULD.index_select(0, image_C)]),
        torch.cat([matched.text_VTD[rows], matched.text_VTD.index_select(0, text_B)]),
        torch.cat([matched.attention_VT[rows], matched.attention_VT.index_select(0, text_B)]),
        own + len(own),
        own + len(own),
    )


def take_step(step: Step, rows: slice) -> Step:
    """The part of a step that belongs to these pairs, before the cross encoders."""
    negatives = step.negatives
    if negatives is not None:
        texts, images = (Negatives(each.index_B[rows], each.weight_B[rows]) for each in negatives)
        negatives = texts, images
    batch, contrast = take_pairs(step.batch, rows), step.contrast
    return step._replace(
        # Only the rows of these pairs; what they are compared with stays whole.
        contrast=contrast._replace(
            image_BE=contrast.image_BE[rows],
            text_BE=contrast.text_BE[rows],
            own_B=contrast.own_B[rows],
            excluded_BG=contrast.excluded_BG[rows],
            text_id_Bm=contrast.text_id_Bm[rows],
        ),
        batch=batch,
        all_captions=batch,
        masks=take_masks(step.masks, rows, step.masks_per_text),
        encoded=take_encoded(step.encoded, rows),
        negatives=negatives,
    )
