"""Joint masked pre-training: mask one side, reconstruct it with the help of the other (paper sec. 3).

Shapes: B pairs of this process, G of all processes, L image positions, T tokens, K masked positions, D width.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from maskvlm.data.batch import Batch
from maskvlm.model.encoders import standing_still
from maskvlm.model.heads import (
    Matching,
    PixelDecoder,
    Projection,
    TokenHead,
    WordDetector,
    normalise_patches,
    patchify,
    pick,
)
from maskvlm.model.init import init_normal, init_xavier
from maskvlm.model.maskvlm import Fused, MaskVLM
from maskvlm.objectives import losses
from maskvlm.objectives.cross_batch import (
    Contrast,
    Encoded,
    Hidden,
    columns,
    cross_all,
    gather_contrast,
    one_each,
    pad_text,
)
from maskvlm.objectives.evaluation import Measure
from maskvlm.objectives.hard_negatives import Queue
from maskvlm.objectives.losses import Negatives, PixelLoss
from maskvlm.objectives.masking import PatchMask, Ratio, TokenMask, Uniform, mask_patches, mask_tokens
from maskvlm.objectives.task import Late, Task
from maskvlm.utils.distributed import gather, shared_count, without_gradient, world_size
from maskvlm.utils.errors import UserError, check_least


class MaskedPretraining(Task):
    """The paper's four losses in one step: ITC + ITM + MLM + MIM.

    Args:
        image_mask_ratio: share of image blocks hidden (0.6, P).
        image_mask_all: in training the probability that a masked image is hidden as a whole (0, P). What its visible
            patches tell would else be learned first, and what its caption tells hardly.
        text_mask_ratio: share of tokens hidden (0.3, P).
        text_draws: maskings of each caption in a step (1, P); each more hides as many words again at little cost.
        text_mask_most: in training the second and further maskings of a caption hide a share that is drawn between
            text_mask_ratio and this one (None: text_mask_ratio). With 1 the model also learns to write from nothing,
            as `caption` asks it to (masks of every size, as in mask-predict, Ghazvininejad et al. 2019).
        image_draws: share of a step's images that are masked (1, P); a masked image costs about as much as a whole one.
        contrast_first: share of the run in which contrast alone is learned (0, P); a step costs less than half then.
            The other three, with the cross encoders, set in after that, on encoders that speak of the same things
            (ALBEF's "align before fuse", here in time).
        negative_queue: pairs of earlier steps among which hard negatives are drawn, too (0: of this step alone, P);
            see `negatives.Queue`. It takes the memory of as many encoded pairs.
        matching_trains_encoders: whether matching trains the two encoders beside the cross encoders (true, P). Where
            contrast has few pairs to learn from, the encoders keep more of what it taught them without.
        contrast_patches: share of the patches of an image, drawn anew in each step, that the trained blocks of its
            encoder see while contrast alone is learned (1, P): cheaper, and less is learned by heart (FLIP, Li et al.
            2023).
        contrast_reads: `class`: contrast reads the two class tokens (P). `class_and_mean`: the mean patch and the mean
            token, too, see `heads.Projection`.
        freeze_aligned: the encoders and contrast learn in that first share of the run alone (false, P), their rates run
            down by its end. The other losses then learn on encoders that stand still, and cost less. `image`: the image
            encoder alone stands still then; the text encoder goes on learning, from hidden words too, and contrast
            against images that no longer move (as in LiT, Zhai et al. 2022).
        mask_block: side of an image block in pixels (32, P); a multiple of the patch size.
        weight_itc, weight_itm, weight_mlm, weight_mim: weight of each loss (1, P); 0 skips its computation.
        weight_words: weight of a fifth loss, which the paper does not have (0): the caption's words from the whole
            picture alone. It stands in for pretrained weights where the image encoder starts from scratch.
        mask_both: reconstruct each side from the *masked* other one (the paper's ablation, slightly worse).
        whole_word: hide all pieces of a word together.
        keep_and_swap: BERT's 80/10/10 replacement instead of always [MASK].
        pixel_loss: l1 (P), squared or smooth_l1.
        pixel_norm: normalise each target patch to mean 0 and variance 1 (MAE's option).
        decoder_layers: blocks of the pixel decoder (3, P).
        contrast_dim: width of the contrast space (256, C).
        temperature: start value of the contrast temperature (0.07, C).
        rerank_k: candidates re-scored by matching when retrieval is measured (C; ALBEF: 128 to 256).
        rerank_contrast: how much the contrast's logit counts beside the log-odds of matching when they are
            (0: matching alone, C; 1: see `rerank.score`).
        tokens_from_words: the token head starts from what is known of words, in the place of N(0, 0.02) and 0: its
            weights from the text encoder's word embeddings, its bias from how frequent each is in the captions.

    Raises:
        UserError: a ratio outside [0, 1], a negative weight, all weights 0, a block that is no multiple of
            the patch size.
    """

    token_count_V: Tensor

    def __init__(
        self,
        image_mask_ratio: float = 0.6,
        text_mask_ratio: float = 0.3,
        mask_block: int = 32,
        weight_itc: float = 1.0,
        weight_itm: float = 1.0,
        weight_mlm: float = 1.0,
        weight_mim: float = 1.0,
        mask_both: bool = False,
        whole_word: bool = False,
        keep_and_swap: bool = False,
        pixel_loss: PixelLoss = "l1",
        pixel_norm: bool = False,
        decoder_layers: int = 3,
        contrast_dim: int = 256,
        temperature: float = 0.07,
        rerank_k: int = 128,
        weight_words: float = 0.0,
        text_draws: int = 1,
        tokens_from_words: bool = False,
        rerank_contrast: float = 0.0,
        image_draws: float = 1.0,
        contrast_first: float = 0.0,
        text_mask_most: float | None = None,
        negative_queue: int = 0,
        matching_trains_encoders: bool = True,
        freeze_aligned: bool | Literal["image"] = False,
        image_mask_all: float = 0.0,
        contrast_patches: float = 1.0,
        contrast_reads: Literal["class", "class_and_mean"] = "class",
    ) -> None:
        super().__init__()
        self.weights = {"itc": weight_itc, "itm": weight_itm, "mlm": weight_mlm, "mim": weight_mim}
        self.weights["words"] = weight_words
        ratios = {"image_mask_ratio": image_mask_ratio, "text_mask_ratio": text_mask_ratio}
        _check_settings(ratios | {"image_mask_all": image_mask_all}, self.weights)
        sizes = {"decoder_layers": decoder_layers, "contrast_dim": contrast_dim, "rerank_k": rerank_k}
        sizes["text_draws"] = self.text_draws = text_draws
        check_least(1, **{f"model__task__{name}": value for name, value in sizes.items()})
        check_least(0.001, model__task__temperature=temperature)
        check_least(0, model__task__rerank_contrast=rerank_contrast, model__task__negative_queue=negative_queue)
        self.image_mask_ratio, self.text_mask_ratio, self.mask_block = (
            image_mask_ratio,
            text_mask_ratio,
            mask_block,
        )
        self.mask_both, self.whole_word, self.keep_and_swap = mask_both, whole_word, keep_and_swap
        self.pixel_loss, self.pixel_norm = pixel_loss, pixel_norm
        self.decoder_layers, self.contrast_dim, self.temperature = decoder_layers, contrast_dim, temperature
        if not 0 < image_draws <= 1 or (mask_both and image_draws < 1):
            what = f"{image_draws} is no share above 0" if not 0 < image_draws <= 1 else "mask_both masks every image"
            raise UserError("model.task.image_draws", what, "Give 1, or a smaller share without mask_both")
        if not 0 < contrast_patches <= 1:
            what = f"{contrast_patches} is no share above 0"
            raise UserError("model.task.contrast_patches", what, "Give 1, or a smaller share")
        self.contrast_patches, self.contrast_reads = contrast_patches, contrast_reads
        if not 0 <= contrast_first < 1 or (contrast_first and not weight_itc):
            what = f"{contrast_first} is no share below 1" if weight_itc else "there is no contrast: weight_itc is 0"
            raise UserError("model.task.contrast_first", what, "Give 0, or a share below 1 with weight_itc above 0")
        if text_mask_most is not None and not text_mask_ratio <= text_mask_most <= 1:
            what = f"{text_mask_most} is no share from text_mask_ratio ({text_mask_ratio}) to 1"
            raise UserError("model.task.text_mask_most", what, "Give such a share, or null")
        if text_mask_most is not None and text_draws == 1:
            what = "it is of the second and further maskings of a caption, and there is one"
            raise UserError("model.task.text_mask_most", what, "Set model.task.text_draws to 2, or this to null")
        self.text_mask_most = text_mask_ratio if text_mask_most is None else text_mask_most
        self.tokens_from_words, self.image_draws, self.image_mask_all = tokens_from_words, image_draws, image_mask_all
        self.contrast_first = contrast_first
        if freeze_aligned and not contrast_first:
            what, todo = (
                "nothing is aligned first: contrast_first is 0",
                "Set it to false, or give contrast_first a share",
            )
            raise UserError("model.task.freeze_aligned", what, todo)
        if freeze_aligned is True and not any(weight for name, weight in self.weights.items() if name != "itc"):
            what = "contrast is the only loss: after contrast_first nothing would learn"
            raise UserError("model.task.freeze_aligned", what, "Set it to false, or give another loss a weight")
        self.freeze_aligned = freeze_aligned
        self.rerank_contrast = rerank_contrast
        if not (matching_trains_encoders or weight_itc or weight_mlm or weight_mim):
            todo = "Set it to true, or give another loss a weight"
            raise UserError("model.task.matching_trains_encoders", "no other loss trains the encoders", todo)
        self.matching_trains_encoders = matching_trains_encoders
        self.queue = Queue(negative_queue) if negative_queue and weight_itm else None
        self.shown = 1  # captions an image in training, for the levels of knowing nothing
        self.measure = Measure(rerank_k, rerank_contrast)

    def build(self, backbone: MaskVLM) -> None:
        patch, width = backbone.image.patch_size, backbone.width
        if self.contrast_patches < 1:
            backbone.image.check_plain("model.task.contrast_patches", "Set it to 1")
        self.kept_sizes = (1 + math.prod(backbone.image.grid), backbone.text.text_length, width, self.contrast_dim)
        if self.mask_block < patch or self.mask_block % patch:
            todo = f"set model.task.mask_block to a multiple of {patch}"
            raise UserError("model.task.mask_block", f"{self.mask_block} px do not hold whole {patch}-px patches", todo)
        if self.weights["itc"]:
            mean = self.contrast_reads == "class_and_mean"
            self.projection = Projection(width, width, self.contrast_dim, self.temperature, mean)
        if self.weights["itm"]:
            self.matching = Matching(width)
        if self.weights["mlm"]:
            self.tokens = TokenHead(width, backbone.text.vocab_size)
            self.register_buffer("token_count_V", torch.zeros(backbone.text.vocab_size), persistent=False)
        if self.weights["mim"]:
            self.pixel_floor: Tensor | None = None
            self.pixels = PixelDecoder(backbone.new_cross(self.decoder_layers), width, 3 * patch**2)
        init_normal(self)
        if self.weights["mlm"] and self.tokens_from_words:
            self.tokens.start_from(backbone.text.word_embeddings)
        if self.weights["itc"]:
            init_xavier(self.projection)
        if self.weights["words"]:  # last, so that the others draw what they draw without it
            self.detector = WordDetector(width, backbone.text.vocab_size)
        self._freeze_unused(backbone)

    def _freeze_unused(self, backbone: MaskVLM) -> None:
        """Parts that no wanted loss reaches get no gradient; DDP would wait for it for ever."""
        if not (self.weights["mim"] or (self.mask_both and self.weights["mlm"])):
            backbone.image.mask_token.requires_grad_(False)
        if not (self.weights["mim"] or self.weights["itm"]):
            backbone.cross_image.requires_grad_(False)
        if not (self.weights["mlm"] or self.weights["itm"]):
            backbone.cross_text.requires_grad_(False)

    def inherit(self, heads: Mapping[str, Tensor]) -> set[str]:
        theirs, own = heads.get("projection.image.weight"), self.state_dict().get("projection.image.weight")
        if theirs is not None and own is not None and theirs.shape[1] != own.shape[1]:
            reads = "class_and_mean" if self.contrast_reads == "class" else "class"
            what = f"{self.contrast_reads}, but contrast of the checkpoint reads {reads}"
            raise UserError("model.task.contrast_reads", what, f"Set it to {reads}")
        return super().inherit(heads)

    def see_words(self, count: Callable[[], Tensor]) -> None:
        if self.weights["mlm"] and self.tokens_from_words:
            self.tokens.expect(count())

    def forward(self, backbone: MaskVLM, batch: Batch) -> dict[str, Tensor]:
        aligned = self.done >= self.contrast_first
        queue = self.queue if aligned else None
        if world_size() > 1 or queue is not None:
            batch = pad_text(batch, backbone.text.text_length, backbone.text.pad_id)
        self.shown = len(batch.owner_C) // len(batch.valid_B)
        batch, every = one_each(batch)  # one caption an image is masked and matched, all are for contrast
        # One pair at first, whose terms count for nothing: every parameter has a gradient, as DDP and FSDP ask for.
        pairs = len(batch.valid_B) if aligned else 1
        shares = (self.image_draws, self.image_mask_all)
        hidden = self.hide(backbone, batch, self.uniform, self.text_draws, shares, pairs)
        still = aligned and self.freeze_aligned is True
        stand = [backbone.image, *([backbone.text] if still else [])]
        alone = not aligned or (self.weights["itc"] > 0 and sum(self.weights.values()) == self.weights["itc"])
        with standing_still(stand, aligned and bool(self.freeze_aligned)):
            some_BV = self.some_patches(backbone, batch) if alone else None
            encoded = self.encode(backbone, every, hidden, some_BV)
        contrast = self.contrast(batch, encoded, some_BV)
        found = self.negatives(contrast if queue is None else queue.widen(contrast, batch), pairs)
        kept = None if queue is None else queue.pairs
        hides = (self.weights["mim"] > 0, self.weights["mlm"] > 0)
        crossed = cross_all(
            backbone,
            encoded,
            batch.attention_CT,
            found,
            hides,
            self.mask_both,
            pairs,
            kept,
            self.matching_trains_encoders,
        )
        if queue is not None and self.training:
            queue.push(batch, encoded, contrast)
        terms = {}
        if self.weights["itc"]:
            terms["itc"] = self.contrast_of(contrast, encoded.other_CTD, batch, every, still)
        if found is not None:
            terms["itm"] = self.matching_loss(crossed.fused_M, found, batch.valid_B)
        if self.weights["words"]:
            terms["words"] = self.words_loss(encoded.image_BLD, batch)
        if self.weights["mlm"] and hidden.token is not None:
            terms["mlm"] = self.token_loss(crossed.text_BTD, batch, hidden.token)
        if self.weights["mim"] and hidden.patch is not None:
            masked = encoded.first_draw_BTD if self.mask_both else None
            seen = encoded.text_BTD if masked is None else masked
            terms["mim"] = self.pixel_loss_of(crossed.image_BLD, seen, batch, hidden.patch)
        if not aligned:
            return {"itc": terms.pop("itc") + 0.0 * sum(terms.values())}
        return terms

    def late(self, backbone: MaskVLM) -> Late:
        """The cross encoders and all heads but contrast's wait for contrast; so does a mask token behind the ViT."""
        if not self.contrast_first:
            return Late()
        first = (backbone.image, backbone.text, self.projection)
        early = {id(parameter) for module in first for parameter in module.parameters()}
        if backbone.image.left_out:
            early.remove(id(backbone.image.mask_token))
        every = (*backbone.parameters(), *self.parameters())
        waiting = [parameter for parameter in every if id(parameter) not in early]
        stop = {True: first, "image": first[:1], False: ()}[self.freeze_aligned]
        stopping = [parameter for module in stop for parameter in module.parameters() if id(parameter) in early]
        return Late(self.contrast_first, waiting, stopping)

    def hide(
        self,
        backbone: MaskVLM,
        batch: Batch,
        uniform: Uniform,
        draws: int = 1,
        shares: tuple[float, float] = (1.0, 0.0),
        pairs: int | None = None,
    ) -> Hidden:
        """Draw this step's masks, for the first `pairs` (None: for all): one each for the first images, by `shares` how
        many of them and how many of these whole; `draws` a caption, whose rows follow each other."""
        texts, pairs = pairs, len(batch.valid_B) if pairs is None else pairs  # in evaluation an image has several texts
        patch = token = None
        if self.weights["mim"] or (self.mask_both and self.weights["mlm"]):
            block = self.mask_block // backbone.image.patch_size
            valid_B = batch.valid_B[: max(1, round(shares[0] * pairs))]
            patch = mask_patches(valid_B, backbone.image.grid, block, self.image_mask_ratio, uniform, shares[1])
        if self.weights["mlm"] or (self.mask_both and self.weights["mim"]):
            text, parts = backbone.text, (batch.token_CT, batch.special_CT, batch.word_CT)
            token_CT, special_CT, word_CT = (part[:texts].repeat_interleave(draws, 0) for part in parts)
            token = mask_tokens(
                token_CT, special_CT, word_CT, self._text_ratio(len(token_CT), draws, uniform), uniform,
                text.mask_id, text.vocab_size, text.text_length, self.whole_word, self.keep_and_swap,
            )  # fmt: skip
        return Hidden(patch, token)

    def _text_ratio(self, rows: int, draws: int, uniform: Uniform) -> float | Ratio:
        """Which share of each text is hidden: of the first of `draws` maskings that of evaluation."""
        if draws == 1 or self.text_mask_most == self.text_mask_ratio:
            return self.text_mask_ratio
        drawn_C = uniform(rows)
        first_C = torch.arange(rows, device=drawn_C.device) % draws == 0
        return Ratio.drawn(self.text_mask_ratio, self.text_mask_most, drawn_C.masked_fill(first_C, 0.0))

    def some_patches(self, backbone: MaskVLM, batch: Batch) -> Tensor | None:
        """Numbers of the patches that contrast sees of each image, [B, V]; None: all."""
        patches = backbone.image.num_patches
        if self.contrast_patches == 1:
            return None
        noise_BN = self.uniform(len(batch.valid_B), patches)
        return noise_BN.argsort(dim=1)[:, : max(1, round(self.contrast_patches * patches))]

    def encode(self, backbone: MaskVLM, batch: Batch, hidden: Hidden, some_BV: Tensor | None = None) -> Encoded:
        """One pass of each encoder over the whole and the masked half of the batch. `batch` has all captions of its
        images, first those that are masked and matched; `some_BV`: what is seen of the whole images."""
        image, token, attention, mask, visible = batch.image_BCHW, batch.token_CT, batch.attention_CT, None, None
        pairs, captions = len(image), len(token)
        if hidden.patch is not None:
            masked_BN, visible = hidden.patch.mask_BN, hidden.patch.visible
            image = torch.cat([image, image[: len(masked_BN)]])
            mask = torch.cat([masked_BN.new_zeros(pairs, masked_BN.shape[1]), masked_BN])
        if hidden.token is not None:
            token = torch.cat([token, hidden.token.token_CT])
            masked = attention[: len(hidden.token.token_CT) // self.text_draws]
            attention = torch.cat([attention, masked.repeat_interleave(self.text_draws, 0)])
        row_B = batch.index_B.masked_fill(~batch.valid_B, -1)
        whole, masked_image = backbone.image(image, mask, row_B, visible, some_BV).tensor_split([pairs])
        text, other, masked = backbone.text(token, attention).tensor_split([pairs, captions])
        return Encoded(
            whole,
            text,
            masked_image if hidden.patch is not None else None,
            masked if hidden.token is not None else None,
            other if captions > pairs else None,
            self.text_draws,
        )

    def contrast(self, batch: Batch, encoded: Encoded, some_BV: Tensor | None = None) -> Contrast:
        """Unit vectors of all processes; where no contrast is learned, all alike: negatives are then uniform."""
        if self.weights["itc"]:
            if self.training:
                self.projection.bound()
            image = self.projection.embed_image(encoded.image_BLD, some_BV)
            text, scale = self.projection.embed_text(encoded.text_BTD, batch.attention_CT), self.projection.scale
        else:
            image = text = torch.zeros_like(encoded.image_BLD[:, 0]).float()
            scale = torch.ones((), device=image.device)
        return gather_contrast(batch, image, text, scale)

    def negatives(self, contrast: Contrast, pairs: int) -> tuple[Negatives, Negatives] | None:
        """For each of the first `pairs` pictures a hard caption, for each of their captions a hard picture, out of the
        global batch and, after it, the queue."""
        if not self.weights["itm"]:
            return None
        image, text, image_all, text_all, scale, _, excluded = contrast
        with torch.no_grad():
            drawn = [
                losses.hard_negatives(losses.similarity(*pair, scale), excluded, self.uniform(*excluded.shape))
                for pair in ((image, text_all), (text, image_all))
            ]
        first = [Negatives(index_B[:pairs], weight_B[:pairs]) for index_B, weight_B in drawn]
        return first[0], first[1]

    def contrast_of(
        self, contrast: Contrast, other_CTD: Tensor | None, batch: Batch, every: Batch, still: bool
    ) -> Tensor:
        """Contrast of the pairs of `batch`, or where images have several captions of all that are in `every`; `still`:
        only to be told."""

        def loss() -> Tensor:
            if other_CTD is None:
                return self.contrastive_loss(contrast, batch.valid_B)
            return self.several_positives(contrast, other_CTD, every)

        return without_gradient(loss) if still else loss()

    def contrastive_loss(self, contrast: Contrast, valid_B: Tensor) -> Tensor:
        own_BG = torch.zeros_like(contrast.excluded_BG).scatter(1, contrast.own_B[:, None], True)
        return losses.contrastive(
            contrast.image_BE, contrast.text_BE, contrast.image_GE, contrast.text_GE, contrast.scale,
            contrast.own_B, contrast.excluded_BG & ~own_BG, valid_B.float(), shared_count(valid_B.float().sum()),
        )  # fmt: skip

    def several_positives(self, contrast: Contrast, other_CTD: Tensor, batch: Batch) -> Tensor:
        """Contrast over all captions of the images, each of which is to be found; `batch` has them in that order."""
        other_CT = batch.attention_CT[len(contrast.text_BE) :]
        text_CE = torch.cat([contrast.text_BE, self.projection.embed_text(other_CTD, other_CT)])
        weight_B = batch.valid_B.float()
        weight_C = weight_B[batch.owner_C]
        return losses.soft_contrastive(
            contrast.image_BE, text_CE, contrast.image_GE, gather(text_CE), contrast.scale, *columns(batch),
            weight_B, weight_C, shared_count(weight_B.sum()), shared_count(weight_C.sum()),
        )  # fmt: skip

    def matching_loss(self, fused_M: Fused, found: tuple[Negatives, Negatives], valid_B: Tensor) -> Tensor:
        valid = valid_B[: len(found[0].weight_B)].float()
        weight_M = torch.cat([valid, valid * found[0].weight_B, valid * found[1].weight_B])
        match_M = torch.arange(len(weight_M), device=weight_M.device) < len(valid)
        return losses.matching(self.matching(fused_M.product_MD), match_M, weight_M, shared_count(weight_M.sum()))

    def words_loss(self, image_BLD: Tensor, batch: Batch) -> Tensor:
        logits_BLV = self.detector(image_BLD)
        words_BV = torch.zeros_like(logits_BLV[:, 0], dtype=torch.float).scatter(1, batch.token_CT, 1.0)
        special_V = torch.zeros_like(words_BV[0]).index_fill(0, batch.token_CT[batch.special_CT], 1.0)
        valid = batch.valid_B.float()
        return losses.words_present(logits_BLV, words_BV * (1 - special_V), valid, shared_count(valid.sum()))

    def token_loss(self, text_BTD: Tensor, batch: Batch, token: TokenMask) -> Tensor:
        texts, draws = len(token.token_CT) // self.text_draws, self.text_draws
        target_CK = batch.token_CT[:texts].repeat_interleave(draws, 0).gather(1, token.index_CK)
        if self.training:
            # Fading keeps float32 counts exact where a frequent word would reach 2^24, and follows the data.
            self.token_count_V.mul_(0.9999).index_add_(0, target_CK.flatten(), token.weight_CK.flatten())
        read_CKD, weight_CK = pick(text_BTD, token.index_CK), token.weight_CK
        if weight_CK.device.type == "cpu":  # about half of the places hold nothing; asking a GPU which would stall it
            there_CK = weight_CK > 0
            read_CKD, target_CK, weight_CK = (x_CK[there_CK][:, None] for x_CK in (read_CKD, target_CK, weight_CK))
        return losses.masked_token(self.tokens(read_CKD), target_CK, weight_CK, shared_count(weight_CK.sum()))

    def pixel_loss_of(self, image_BLD: Tensor, text_BTD: Tensor, batch: Batch, patch: PatchMask) -> Tensor:
        first = len(patch.index_BK)  # the images that are masked
        predicted_BKP = self.pixels(image_BLD, text_BTD[:first], batch.attention_CT[:first], patch.index_BK)
        target_BKP = self.pixel_target(batch.image_BCHW[:first], patch.index_BK)
        count = shared_count(patch.weight_BK.sum())
        if self.training:
            level = target_BKP.mean((0, 1)).unflatten(0, (-1, 3)).mean(0).repeat(target_BKP.shape[-1] // 3)
            flat = losses.masked_pixel(level.expand_as(target_BKP), target_BKP, patch.weight_BK, count, self.pixel_loss)
            self.pixel_floor = flat.detach()
        return losses.masked_pixel(predicted_BKP, target_BKP, patch.weight_BK, count, self.pixel_loss)

    def pixel_target(self, image_BCHW: Tensor, index_BK: Tensor) -> Tensor:
        """Values of the patches at `index_BK`, [B, K, P]; normalised patch by patch if so configured."""
        patch = int((self.pixels.pixels.out_features // 3) ** 0.5)
        target_BKP = pick(patchify(image_BCHW, patch), index_BK)
        return normalise_patches(target_BKP) if self.pixel_norm else target_BKP

    def floors(self, batch_size: int) -> dict[str, float]:
        """No-knowledge level of each loss that is computed.

        ITC: log of the number of columns, mean of both directions. ITM: entropy of its 1:2 class prior, 0.6365. MLM:
        entropy of the hidden tokens of the last 10,000 steps or so. MIM: error of predicting the mean colour of the
        latest batch. The last two are missing until a batch was seen.
        """
        itc = math.log(max(batch_size, 1)) + math.log(self.shown) / 2
        levels = {"itc": itc, "itm": math.log(3) - 2 / 3 * math.log(2)}
        if self.weights["mlm"] and self.token_count_V.any():
            share_V = self.token_count_V / self.token_count_V.sum().clamp(min=1)
            levels["mlm"] = float(torch.special.entr(share_V).sum())
        if self.weights["mim"] and self.pixel_floor is not None:
            levels["mim"] = float(self.pixel_floor)
        return {name: level for name, level in levels.items() if self.weights[name]}

    def state(self) -> dict[str, Tensor]:
        """The queue of negatives, once it holds some."""
        return {} if self.queue is None else self.queue.state()

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        if self.queue is not None:
            self.queue.restore(state, *self.kept_sizes)

    def update(self, backbone: MaskVLM, batch: Batch) -> None:
        self.measure.update(self, backbone, batch)

    def compute(self, backbone: MaskVLM) -> dict[str, float]:
        return self.measure.compute(self, backbone)


def _check_settings(ratios: dict[str, float], weights: dict[str, float]) -> None:
    for name, value in ratios.items():
        if not 0 <= value <= 1:
            raise UserError(f"model.task.{name}", f"{value} is no share", "give a number from 0 to 1")
    for name, value in weights.items():
        if value < 0:
            raise UserError(f"model.task.weight_{name}", f"{value} is negative", "give 0 (off) or more")
    if not any(weights.values()):
        raise UserError("model.task", "all four loss weights are 0", "give at least one weight above 0")
