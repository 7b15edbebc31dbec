"""Pre-training losses as components: each defines its name, heads, needs, value and chance level. To add your own loss,
subclass `PretrainingLoss` and name it in the YAML under `model.task.losses`.

The formulas are in `loss_functions.py`. Shapes: B pairs of this process, C captions, L image positions, T tokens,
K masked positions, M matching pairs, P values of a patch, V vocabulary, D width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import gather_positions
from maskvlm.model.heads import (
    Matching,
    PixelDecoder,
    Projection,
    TokenHead,
    WordDetector,
    check_temperature,
    normalise_patches,
    patchify,
)
from maskvlm.model.init import init_positions, init_xavier
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives import loss_functions as formulas
from maskvlm.objectives.cross_batch import Contrast, Crossed, Encoded, Masks, contrast_targets
from maskvlm.objectives.hard_negatives import Negatives
from maskvlm.objectives.loss_functions import PixelLoss
from maskvlm.utils.distributed import gather, shared_count, without_gradient
from maskvlm.utils.errors import UserError, check_choices, check_counts
from maskvlm.utils.on_cpu import on_cpu
from maskvlm.utils.overrides import check_overrides

FADE = 0.9999
"""Decay of the token counts per step: counts follow the data and never reach 2^24, where float32 stops counting."""


class Need(Enum):
    """What a step computes only if a loss needs it."""

    IMAGE = "features of whole images"
    TEXT = "features of whole texts"
    PAIRS = "class tokens of matching pairs after both cross encoders"
    MASKED_IMAGE = "masked images after the cross encoder, informed by whole texts"
    MASKED_TEXT = "masked texts after the cross encoder, informed by whole images"


class Step(NamedTuple):
    """What a training step computed.

    Attributes:
        batch: with one caption per image, the one that is masked and matched. all_captions: with all captions.
        masks: of images and of texts; None if no loss needs them.
        encoded: features of whole and masked inputs.
        contrast: unit vectors; all zero if weight_itc is 0.
        negatives: a hard text for each image and a hard image for each text; None if no loss needs PAIRS. With
            `exchanged_share`, the first images are paired with their own text with two words exchanged instead.
        crossed: outputs of the cross encoders; no rows if the step is computed in chunks and this is the whole step.
        counts: divisor of the sum of each loss that sets `adds_up`, by loss name, see `PretrainingLoss.count`.
        masks_per_text: maskings of each text.
        mask_both: each modality is reconstructed from the masked other one.
        itc_frozen: contrast is no longer trained; its loss is only logged.
    """

    batch: Batch
    all_captions: Batch
    masks: Masks
    encoded: Encoded
    contrast: Contrast
    negatives: tuple[Negatives, Negatives] | None
    crossed: Crossed
    counts: Mapping[str, Tensor]
    masks_per_text: int
    mask_both: bool
    itc_frozen: bool


class EvaluatedBatch(NamedTuple):
    """A batch of held-out images and what an evaluation computed from it, without gradient.

    Attributes:
        backbone: in evaluation mode.
        batch: B images with all their C captions; `owner_C` is the row of each caption's image.
        masks: of images and of captions, the same for every checkpoint.
        image_BLD, text_CTD: features of whole images and whole captions.
    """

    backbone: MaskVLM
    batch: Batch
    masks: Masks
    image_BLD: Tensor
    text_CTD: Tensor


ContrastReads = Literal["class", "class_and_mean"]
"""What contrast's vectors are made of: the class tokens, or also the mean patch and the mean token."""


class PretrainingLoss(ABC):
    """Base class of one term in the pre-training loss.

    Args:
        weight: weight of the term in the sum (1); 0 skips its computation.

    Attributes:
        name: name of the term in logs, `train/NAME`, and of its chance level, `level/NAME`.
        needs: what a step must compute for it. What no loss needs is not computed, and its parameters are frozen.
        stuck_hint: what to check if the loss stays at its chance level, for the warning that reports it.
        adds_up: whether the term is a sum over the step's pairs divided by `step.counts[name]`, so that the terms of a
            batch's chunks add up to the term of the whole batch. With `model.chunk`, required of losses that use cross
            encoder outputs; a loss that needs masked images is not called for a chunk without any.

    Raises:
        UserError: the class has no valid `name` or `needs`, a method does not take the arguments with which it is
            called, or the weight is negative or not finite.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    adds_up: ClassVar[bool] = False
    stuck_hint: ClassVar[str] = "the loss of a model that has learned nothing; check the learning rate and the data"

    def __init__(self, weight: float = 1.0) -> None:
        # Classes of other packages pass here too: report a mistake in one as a one-line error.
        where = f"model.task.losses: {type(self).__name__}"
        if not isinstance(getattr(self, "name", None), str) or not self.name.isidentifier():
            raise UserError(where, "has no name", "Give its class a `name` of letters, digits and _")
        needs = getattr(self, "needs", None)
        if not isinstance(needs, frozenset) or not needs or not all(isinstance(need, Need) for need in needs):
            todo = f"Give its class `needs`, a frozenset of some of {', '.join(f'Need.{need.name}' for need in Need)}"
            raise UserError(where, f"needs {needs!r:.80}", todo)
        check_overrides(self, PretrainingLoss, unused=() if self.adds_up else ("count",))
        if not 0 <= weight < math.inf:
            raise UserError(f"model.task.weight_{self.name}", f"{weight} is not a valid weight", "Give 0 (off) or more")
        self.weight = weight

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        """Its heads by name, to match the backbone. The task holds them; checkpoints store them by these names."""
        return {}

    def init_heads(self, heads: Any, backbone: MaskVLM) -> None:
        """Further initialise its heads. At this point, heads of the paper's four losses are N(0, 0.02); those of any
        other loss are as `build` created them."""
        return

    @abstractmethod
    def __call__(self, heads: Any, step: Step) -> Tensor:
        """The term, a scalar: the mean over the global batch (see `distributed.shared_count`).

        Args:
            heads: the task; each head is an attribute with its name from `build`.
        """

    def count(self, step: Step) -> Tensor:
        """Divisor of a loss that adds up, a scalar, for this process's share; by default its number of valid images.
        `step.counts` has the mean over processes, for the whole step."""
        return step.batch.valid_B.float().sum()

    def observe(self, heads: Any, step: Step) -> None:
        """Called in each training pass after the losses, except while contrast is trained alone, without gradient, to
        update the statistics behind the chance level from this process's share only."""
        return

    def measure(self, heads: Any, seen: EvaluatedBatch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Metrics on held-out images, by name: values and weights of the same shape. `metrics.json` and the log have
        the weighted mean over the split as `NAME/KEY`. The paper's four losses are measured by
        `evaluation.PretrainingMetrics`.

        Args:
            heads: as in `__call__`.
            seen: a batch of the split.
        """
        return {}

    def chance(self, batch_size: int, texts_per_image: int) -> float | None:
        """Loss of an untrained model; None: not known (yet).

        Args:
            batch_size: images in one pass over all processes; the global batch, unless gradients are accumulated.
            texts_per_image: captions per image in a step, 1 or more.
        """
        return None


def needed(parts: Iterable[PretrainingLoss]) -> frozenset[Need]:
    """The union of these losses' needs."""
    return frozenset().union(*(loss.needs for loss in parts))


def masked_patches(step: Step) -> Tensor:
    """Number of masked patches in this process's share."""
    assert step.masks.patch is not None
    return step.masks.patch.weight_BK.sum()


# ---------------------------------------------------------------------- the paper's


class ImageTextContrast(PretrainingLoss):
    """ITC: find an image's text among those of the batch, and vice versa (paper sec. 3).

    Args:
        weight: weight of the loss in the sum; 0 skips its computation.
        width: width of the contrast space.
        temperature: initial value.
        reads: use the class tokens, or also the mean patch and token, see `heads.Projection`.
    """

    name, needs = "itc", frozenset({Need.IMAGE, Need.TEXT})
    stuck_hint = (
        "the log of the batch: no pair is told from another; lower the learning rate or warm up longer, "
        "look for mispaired data"
    )

    def __init__(
        self,
        weight: float = 1.0,
        width: int = 256,
        temperature: float = 0.07,
        reads: ContrastReads = "class",
    ) -> None:
        super().__init__(weight)
        check_counts(1, {"model.task.contrast_dim": width})
        check_choices({"model.task.contrast_reads": (reads, get_args(ContrastReads))})
        check_temperature(temperature)
        self.width, self.temperature, self.reads = width, temperature, reads

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        mean = self.reads == "class_and_mean"
        return {"projection": Projection(backbone.width, backbone.width, self.width, self.temperature, mean)}

    def init_heads(self, heads: Any, backbone: MaskVLM) -> None:
        init_xavier(heads.projection)

    def __call__(self, heads: Any, step: Step) -> Tensor:
        def loss() -> Tensor:
            if step.encoded.other_CTD is None:
                return self.of_pairs(step.contrast, step.batch.valid_B)
            return self.of_several(heads, step.contrast, step.encoded.other_CTD, step.all_captions)

        # Frozen: the value is only logged.
        return without_gradient(loss, heads.projection) if step.itc_frozen else loss()

    def of_pairs(self, contrast: Contrast, valid_B: Tensor) -> Tensor:
        """ITC of images with one caption each."""
        # The row's own column is excluded as a negative but must stay here: it is the target, and -inf would make the
        # loss infinite.
        own_BG = torch.zeros_like(contrast.excluded_BG).scatter(1, contrast.own_B[:, None], True)
        return formulas.contrastive(
            contrast.image_BE, contrast.text_BE, contrast.image_GE, contrast.text_GE, contrast.scale,
            contrast.own_B, contrast.excluded_BG & ~own_BG, valid_B.float(), shared_count(valid_B.float().sum()),
        )  # fmt: skip

    def of_several(self, heads: Any, contrast: Contrast, other_CTD: Tensor, all_captions: Batch) -> Tensor:
        """ITC over all captions of the images, each a positive; `all_captions` has them in that order."""
        # The first captions are already embedded; the others come after them in `all_captions`.
        other_CT = all_captions.attention_CT[len(contrast.text_BE) :]
        text_CE = torch.cat([contrast.text_BE, heads.projection.embed_text(other_CTD, other_CT)])
        weight_B = all_captions.valid_B.float()
        weight_C = weight_B[all_captions.owner_C]
        return formulas.soft_contrastive(
            contrast.image_BE, text_CE, contrast.image_GE, gather(text_CE), contrast.scale,
            *contrast_targets(all_captions),
            weight_B, weight_C, shared_count(weight_B.sum()), shared_count(weight_C.sum()),
        )  # fmt: skip

    def chance(self, batch_size: int, texts_per_image: int) -> float:
        """Log of the number of columns, mean of both directions."""
        # (log(B * m) + log(B)) / 2 with m captions per image
        return math.log(max(batch_size, 1)) + math.log(texts_per_image) / 2


class ImageTextMatching(PretrainingLoss):
    """ITM: classify whether image and text match, for each pair and two hard negatives (paper sec. 3)."""

    name, needs, adds_up = "itm", frozenset({Need.PAIRS}), True
    stuck_hint = (
        "its class prior: no match is told from a mismatch; let itc learn first, warm up longer or lower "
        "the learning rate, look for mispaired data"
    )

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        return {"matching": Matching(backbone.width)}

    def __call__(self, heads: Any, step: Step) -> Tensor:
        weight_M = self._weight(step)
        # The first third of the pairs are true pairs.
        match_M = torch.arange(len(weight_M), device=weight_M.device) < len(weight_M) // 3
        logits_M2 = heads.matching(step.crossed.fused_M.product_MD)
        return formulas.matching(logits_M2, match_M, weight_M, step.counts[self.name])

    @staticmethod
    def _weight(step: Step) -> Tensor:
        """Weight of each matching pair, [3 * B], in the order of `cross_all`: true pairs, hard texts, hard images."""
        assert step.negatives is not None
        texts, images = step.negatives
        valid = step.batch.valid_B[: len(texts.weight_B)].float()
        # A row without a possible negative counts only with its true pair.
        return torch.cat([valid, valid * texts.weight_B, valid * images.weight_B])

    def count(self, step: Step) -> Tensor:
        return self._weight(step).sum()

    def chance(self, batch_size: int, texts_per_image: int) -> float:
        """Entropy of its 1:2 class prior, 0.6365."""
        return math.log(3) - 2 / 3 * math.log(2)


class MaskedTokens(PretrainingLoss):
    """MLM: predict the masked tokens of a text from the rest of it and the whole image (paper sec. 3).

    Args:
        weight: weight of the loss in the sum; 0 skips its computation.
        from_words: initialise the head's weights from the text encoder's word embeddings.
    """

    name, needs, adds_up = "mlm", frozenset({Need.MASKED_TEXT}), True
    stuck_hint = (
        "the words' frequencies: neither image nor sentence is used; look at the learning rate and the "
        "tokenizer's unknown words"
    )

    def __init__(self, weight: float = 1.0, from_words: bool = False) -> None:
        super().__init__(weight)
        self.from_words = from_words
        self.count_V: Tensor | None = None

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        return {"tokens": TokenHead(backbone.width, backbone.text.vocab_size)}

    def init_heads(self, heads: Any, backbone: MaskVLM) -> None:
        if self.from_words:
            heads.tokens.init_from_embeddings(backbone.text.word_embeddings)

    def __call__(self, heads: Any, step: Step) -> Tensor:
        index_CK, target_CK, weight_CK = self._masked(step)
        # (C, T, D) -> (C, K, D): the head outputs V numbers per position, so it gets only the masked ones.
        read_CKD = gather_positions(step.crossed.text_BTD, index_CK)
        if on_cpu(weight_CK):  # about half of the entries are padding; on a GPU, finding them would force a sync
            # (C, K, ...) -> (masked, 1, ...)
            there_CK = weight_CK > 0
            read_CKD, target_CK, weight_CK = (x_CK[there_CK][:, None] for x_CK in (read_CKD, target_CK, weight_CK))
        return formulas.masked_token(heads.tokens(read_CKD), target_CK, weight_CK, step.counts[self.name])

    def count(self, step: Step) -> Tensor:
        return self._masked(step)[2].sum()

    def _masked(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Masked positions, their original ids, and their weights, 0 for padding, [C, K] each."""
        token = step.masks.token
        assert token is not None
        # The original captions, each repeated once per masking.
        texts = len(token.token_CT) // step.masks_per_text
        target_CK = step.batch.token_CT[:texts].repeat_interleave(step.masks_per_text, 0).gather(1, token.index_CK)
        return token.index_CK, target_CK, token.weight_CK

    def observe(self, heads: Any, step: Step) -> None:
        _, target_CK, weight_CK = self._masked(step)
        if self.count_V is None:
            self.count_V = torch.zeros(heads.tokens.vocabulary.out_features, device=weight_CK.device)
        # Padding has weight 0 and does not count.
        self.count_V.mul_(FADE).index_add_(0, target_CK.flatten(), weight_CK.flatten().to(self.count_V))

    def chance(self, batch_size: int, texts_per_image: int) -> float | None:
        """Entropy of the masked tokens over roughly the last 10,000 steps."""
        if self.count_V is None or not self.count_V.any():
            return None
        share_V = self.count_V / self.count_V.sum()
        return float(torch.special.entr(share_V).sum())


class MaskedPixels(PretrainingLoss):
    """MIM: predict the pixels of masked patches from the visible ones and the whole text (paper sec. 3).

    Args:
        weight: weight of the loss in the sum; 0 skips its computation.
        kind: l1 (P), squared or smooth_l1.
        norm: normalise each target patch to mean 0 and variance 1 (MAE's option).
        layers: blocks of the pixel decoder (3, P).
        positions: add position embeddings to the decoder's queries (false, P), as `query_positions` of the backbone
            does for the image cross encoder.
    """

    name, needs, adds_up = "mim", frozenset({Need.MASKED_IMAGE}), True
    stuck_hint = "the mean colour: nothing is drawn; look at the learning rate and the pixel loss"

    def __init__(
        self,
        weight: float = 1.0,
        kind: PixelLoss = "l1",
        norm: bool = False,
        layers: int = 3,
        positions: bool = False,
    ) -> None:
        super().__init__(weight)
        check_counts(1, {"model.task.decoder_layers": layers})
        check_choices({"model.task.pixel_loss": (kind, get_args(PixelLoss))})
        self.kind, self.norm, self.layers, self.positions = kind, norm, layers, positions
        self.patch_size = 0  # known once it is built
        self.level: Tensor | None = None

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        self.patch_size = backbone.image.patch_size
        blocks = backbone.new_cross(self.layers, backbone.image.grid if self.positions else None)
        return {"pixels": PixelDecoder(blocks, backbone.width, 3 * self.patch_size**2)}

    def init_heads(self, heads: Any, backbone: MaskVLM) -> None:
        if self.positions:
            init_positions(heads.pixels.blocks.pos_embed, backbone.image.grid)

    def __call__(self, heads: Any, step: Step) -> Tensor:
        patch, first = step.masks.patch, self._images(step)
        assert patch is not None
        # The decoder reads the text encoder's output (C).
        masked = step.encoded.first_masked_BTD if step.mask_both else None
        text_BTD = step.encoded.text_BTD if masked is None else masked
        attention_BT = step.batch.attention_CT[:first]
        predicted_BKP = heads.pixels(step.crossed.image_BLD, text_BTD[:first], attention_BT, patch.index_BK)
        target_BKP = self.target(step.batch.image_BCHW[:first], patch.index_BK)
        count = step.counts[self.name]
        return formulas.masked_pixel(predicted_BKP, target_BKP, patch.weight_BK, count, self.kind)

    def count(self, step: Step) -> Tensor:
        return masked_patches(step)

    @staticmethod
    def _images(step: Step) -> int:
        """Number of masked images, which are the first of the batch."""
        assert step.masks.patch is not None
        return len(step.masks.patch.index_BK)

    def target(self, image_BCHW: Tensor, index_BK: Tensor) -> Tensor:
        """Values of the patches at `index_BK`, [B, K, P]; normalised per patch with `norm`."""
        target_BKP = gather_positions(patchify(image_BCHW, self.patch_size), index_BK)
        return normalise_patches(target_BKP) if self.norm else target_BKP

    def observe(self, heads: Any, step: Step) -> None:
        patch = step.masks.patch
        assert patch is not None
        target_BKP = self.target(step.batch.image_BCHW[: self._images(step)], patch.index_BK)
        flat_BKP = formulas.mean_colour(target_BKP, patch.weight_BK).expand_as(target_BKP)
        self.level = formulas.masked_pixel(flat_BKP, target_BKP, patch.weight_BK, patch.weight_BK.sum(), self.kind)

    def chance(self, batch_size: int, texts_per_image: int) -> float | None:
        """Error of the mean colour of the masked patches of the latest batch."""
        return None if self.level is None else float(self.level)


# ---------------------------------------------------------------------- one more


class WordsPresent(PretrainingLoss):
    """Predict the caption's words from the whole image alone (Fang et al. 2015; not in the paper). It substitutes for
    pretrained weights if the image encoder is trained from scratch.

    Args:
        weight: weight of the loss in the sum; 0 skips its computation.
    """

    name, needs, adds_up = "words", frozenset({Need.IMAGE}), True
    stuck_hint = (
        "the words' frequencies: no image is told from another; look at the learning rate of the image encoder and its "
        "warm-up"
    )

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.count_V: Tensor | None = None
        self.image_count: float | Tensor = 0.0
        self.level: Tensor | None = None

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        return {"detector": WordDetector(backbone.width, backbone.text.vocab_size)}

    def __call__(self, heads: Any, step: Step) -> Tensor:
        logits_BLV = heads.detector(step.encoded.image_BLD)
        valid_B = step.batch.valid_B.float()
        words_BV = self.words(step.batch, logits_BLV.shape[-1])
        return formulas.words_present(logits_BLV, words_BV, valid_B, step.counts[self.name])

    @staticmethod
    def words(batch: Batch, vocabulary: int) -> Tensor:
        """1.0 where a word is in the caption, [B, V]; special tokens are not words."""
        words_BV = batch.image_BCHW.new_zeros(len(batch.token_CT), vocabulary, dtype=torch.float)
        words_BV = words_BV.scatter(1, batch.token_CT, 1.0)
        # Special tokens of this batch, including padding; no others were set above. Summed, since selecting them by a
        # mask would make the host wait for the GPU.
        special_CT = batch.special_CT.to(words_BV)
        special_V = torch.zeros_like(words_BV[0]).index_add(0, batch.token_CT.flatten(), special_CT.flatten())
        return words_BV * (special_V == 0)

    def observe(self, heads: Any, step: Step) -> None:
        valid_B = step.batch.valid_B.float()
        words_BV = self.words(step.batch, heads.detector.words.out_features)
        if self.count_V is None:
            self.count_V = torch.zeros_like(words_BV[0])
        self.count_V.mul_(FADE).add_((words_BV * valid_B[:, None]).sum(0))
        # The same decay for both, so that the share is a mean over the same steps.
        self.image_count = FADE * self.image_count + valid_B.sum()
        share_V = (self.count_V / self.image_count.clamp(min=1)).clamp(1e-6, 1 - 1e-6)
        # Sum of w log p + (1 - w) log(1 - p) over words = w logit(p) + log(1 - p).
        absent = torch.log1p(-share_V).sum()
        # `loss_functions.words_present` of a model that knows only the word frequencies, not the image.
        nats_B = -(words_BV @ torch.logit(share_V) + absent) / words_BV.sum(1).clamp(min=1)
        self.level = (nats_B * valid_B).sum() / valid_B.sum().clamp(min=1)

    def chance(self, batch_size: int, texts_per_image: int) -> float | None:
        """Loss on the latest batch of a model that knows only the word frequencies."""
        return None if self.level is None else float(self.level)


class PatchSpread(PretrainingLoss):
    """Predict the spread of each masked patch (the standard deviation of its pixels, averaged over the channels) from
    the same features as its pixels, by squared error. This loss is not in the paper.

    It teaches the image cross encoder *where* something is before it can tell *what* it is. Painting an object requires
    its place, colour and background at once: over all colours and backgrounds, an object is neither lighter nor darker
    than what is behind it, so the place alone makes no pixel more likely, and for a long time pixels alone teach no
    place. The presence of an object always raises the spread.

    Args:
        weight: weight of the loss in the sum; 0 skips its computation.
    """

    name, needs, adds_up = "spread", frozenset({Need.MASKED_IMAGE}), True
    stuck_hint = "the mean over all masked patches: the caption is not used to tell where things are"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.patch_size = 0  # known once it is built
        self.level: Tensor | None = None

    def build(self, backbone: MaskVLM) -> Mapping[str, nn.Module]:
        self.patch_size = backbone.image.patch_size
        head = nn.Linear(backbone.width, 1)
        init_xavier(head)
        return {"spread": head}

    def __call__(self, heads: Any, step: Step) -> Tensor:
        patch = step.masks.patch
        assert patch is not None
        # + 1: position 0 is the class token. (B, L, D) -> (B, K, D) -> (B, K, 1)
        predicted_BK1 = heads.spread(gather_positions(step.crossed.image_BLD, patch.index_BK + 1))
        count = step.counts[self.name]
        return formulas.masked_pixel(predicted_BK1, self.target(step), patch.weight_BK, count, "squared")

    def count(self, step: Step) -> Tensor:
        return masked_patches(step)

    def target(self, step: Step) -> Tensor:
        """Standard deviation of the pixels of each masked patch, [B, K, 1], in units of normalised pixel values."""
        patch = step.masks.patch
        assert patch is not None
        image_BCHW = step.batch.image_BCHW[: len(patch.index_BK)]
        value_BKP = gather_positions(patchify(image_BCHW, self.patch_size), patch.index_BK)
        # The last axis of a patch is the channel: (B, K, P) -> (B, K, pixels, 3)
        value_BKX3 = value_BKP.float().unflatten(-1, (-1, 3))
        # Written out, as torch.std over an inner axis is four times slower on a CPU. (B, K, 3) -> (B, K, 1)
        variance_BK3 = (value_BKX3 - value_BKX3.mean(2, keepdim=True)).square().mean(2)
        return variance_BK3.sqrt().mean(-1, keepdim=True)

    def observe(self, heads: Any, step: Step) -> None:
        patch, target_BK1 = step.masks.patch, self.target(step)
        assert patch is not None
        count = patch.weight_BK.sum().clamp(min=1)
        mean = (target_BK1[..., 0] * patch.weight_BK).sum() / count
        self.level = formulas.masked_pixel(
            mean.expand_as(target_BK1), target_BK1, patch.weight_BK, patch.weight_BK.sum(), "squared"
        )

    def chance(self, batch_size: int, texts_per_image: int) -> float | None:
        """Variance of the spread over the masked patches of the latest batch."""
        return None if self.level is None else float(self.level)
