"""Joint masked pre-training: mask one modality and reconstruct it with the help of the other (paper sec. 3).

Shapes: B pairs of this process, G of all processes, L image positions, T tokens, K masked positions, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskvlm.checkpoint.weights import resize_positions
from maskvlm.data.batch import Batch, Source
from maskvlm.model.encoders import encoders_frozen
from maskvlm.model.heads import Matching, PixelDecoder, Projection, TokenHead
from maskvlm.model.init import init_normal
from maskvlm.model.maskvlm import Fused, MaskVLM
from maskvlm.objectives import chunks
from maskvlm.objectives.cross_batch import (
    Contrast,
    Crossed,
    Encoded,
    Masks,
    MatchingRows,
    cross_all,
    first_and_all_captions,
    gather_contrast,
    matching_rows,
    pad_text,
    with_exchanged,
)
from maskvlm.objectives.evaluation import PretrainingMetrics
from maskvlm.objectives.exchanged_words import ExchangedCaptions, exchange_words
from maskvlm.objectives.hard_negatives import Negatives, draw_hard_negatives
from maskvlm.objectives.loss_functions import PixelLoss, similarity
from maskvlm.objectives.masking import (
    ImageMasking,
    PatchMask,
    RandomBlocks,
    RandomTokens,
    TextMasking,
    Texts,
    TokenMask,
    Uniform,
    Vocabulary,
)
from maskvlm.objectives.negative_queue import NegativeQueue
from maskvlm.objectives.pretraining_losses import (
    ContrastReads,
    ImageTextContrast,
    ImageTextMatching,
    MaskedPixels,
    MaskedTokens,
    Need,
    PatchSpread,
    PretrainingLoss,
    Step,
    WordsPresent,
    needed,
)
from maskvlm.objectives.task import Task, TrainingPhases
from maskvlm.utils.distributed import same_everywhere, shared_count, world_size
from maskvlm.utils.errors import (
    UserError,
    check_choices,
    check_counts,
    check_least,
    check_positive_shares,
    check_shares,
)
from maskvlm.utils.overrides import check_overrides


def check_plug_ins(losses: object, image_masking: object, text_masking: object) -> None:
    """Raise UserError if additional losses or maskings are not instances of the expected classes."""
    maskings = [("image_masking", image_masking, ImageMasking), ("text_masking", text_masking, TextMasking)]
    wrong = [(name, kind) for name, value, kind in maskings if value is not None and not isinstance(value, kind)]
    listed = isinstance(losses, Sequence) and all(isinstance(loss, PretrainingLoss) for loss in losses)
    wrong += [] if listed else [("losses", PretrainingLoss)]
    for name, kind in wrong:
        what = f"expected {'a list of objects' if name == 'losses' else 'an object'} of {kind.__name__}"
        raise UserError(f"model.task.{name}", what, "Build it: an object, not its class or name")
    for _, value, kind in maskings:
        if value is not None:
            check_overrides(value, kind)


class MaskedPretraining(Task):
    """The paper's four losses in one step: ITC + ITM + MLM + MIM.

    Args:
        image_mask_ratio: share of image blocks to mask (0.6, P).
        fully_masked_share: in training, the probability that a masked image is masked completely (0, P). Without it,
            the model first learns to fill in from the visible patches and hardly uses the caption.
        text_mask_ratio: share of tokens to mask (0.3, P).
        masks_per_text: maskings per caption and step (1, P); each extra one masks as many words again at little cost.
        text_mask_most: in training, each masking draws its share between text_mask_ratio and this value (None:
            text_mask_ratio); with several maskings per caption, the first keeps text_mask_ratio. With a high share,
            words must be predicted from the image rather than the remaining words; at 1, the model also learns to
            write from scratch, as `caption` requires (all mask sizes, as in mask-predict, Ghazvininejad et al. 2019).
        masked_image_share: share of a step's images that are masked (1, P); a masked image costs about as much as a
            whole one.
        contrast_first: share of the run's steps, 0 to below 1, that train ITC alone (0, P); such a step costs less
            than half. The other losses and the cross encoders are then trained on aligned encoders (ALBEF's
            "align before fuse", here in time).
        negative_queue: number of pairs from earlier steps that also serve as candidates for hard negatives (0: this
            step only, P); see `negative_queue.NegativeQueue`. It needs the memory of that many encoded pairs.
        matching_trains_encoders: whether matching trains the two encoders as well as the cross encoders (true, P).
            With little training data, false preserves more of what the encoders learned from ITC.
        exchanged_share: share of the images, 0 to 1, whose hard caption in matching is their own caption with two
            words exchanged (0, P), see `exchanged_words.exchange_words`. This tests which word belongs to which, and
            costs one more pass of these captions through the text encoder.
        contrast_patches: share of an image's patches, drawn anew in each step, that the trained blocks of its
            encoder see while contrast is trained alone (1, P); cheaper, with less memorisation (FLIP, Li et al. 2023).
        contrast_reads: `class`: contrast uses the two class tokens (P). `class_and_mean`: also the mean patch and the
            mean token, see `heads.Projection`.
        freeze_aligned: true: freeze both encoders and the contrast projections after the ITC-only phase (false, P);
            their learning rates end with it, and later steps cost less. `image`: freeze only the image encoder; the
            text encoder and ITC keep training against fixed image features (LiT, Zhai et al. 2022). The mask token
            of a ViT that reads all positions is not trained either: it is the embedding of the mean colour, or comes
            from the checkpoint if the run starts from one.
        image_learns: share of the run's steps, above 0 to 1, in which the image encoder is trained (1, P); its
            learning rate ends there, and later steps cost less. What is learned late, such as spatial relations, is
            then learned on fixed image features (docs/results/scenes). Cannot be combined with `contrast_first`,
            which has its own phases.
        mask_block: side of an image block in pixels (32, P); a multiple of the patch size.
        weight_itc: weight of image-text contrast (1, P); 0 skips its computation, as for all losses.
        weight_itm: weight of image-text matching (1, P).
        weight_mlm: weight of masked words (1, P).
        weight_mim: weight of masked pixels (1, P).
        weight_words: weight of a fifth loss, which is not in the paper (0), see `pretraining_losses.WordsPresent`.
        weight_spread: weight of a loss on how much each masked patch varies (0: none, P), which teaches where objects
            are, see `pretraining_losses.PatchSpread`.
        losses: additional losses from any package, each a subclass of `pretraining_losses.PretrainingLoss`.
        image_masking: how images are masked (`masking.RandomBlocks` of image_mask_ratio, mask_block and
            fully_masked_share). `masking.DrawnBlocks`: each image gets its own share.
        text_masking: how texts are masked (`masking.RandomTokens` of text_mask_ratio, text_mask_most, whole_word,
            keep_and_swap). `masking.DrawnTokens`: each masking gets its own share.
            `masking.ChosenPhrases`: only the given phrases are masked.
        mask_both: reconstruct each modality from the *masked* other one (the paper's ablation, slightly worse).
        whole_word: mask all pieces of a word together.
        keep_and_swap: in training, BERT's 80/10/10 replacement instead of always [MASK].
        pixel_loss: l1 (P), squared or smooth_l1.
        pixel_norm: normalise each target patch to mean 0 and variance 1 (MAE's option).
        decoder_layers: blocks of the pixel decoder (3, P).
        decoder_positions: add position embeddings to the pixel decoder's queries (false, P), see
            `pretraining_losses.MaskedPixels`.
        contrast_dim: width of the contrast space (256, C).
        temperature: initial value of the contrast temperature (0.07, C).
        rerank_k: candidates re-scored by matching in retrieval evaluation (C; ALBEF: 128 to 256).
        rerank_contrast: weight of the ITC logit that is added to the matching log-odds in re-ranking (0: matching
            alone, C; 1: see `rerank.score_gallery`).
        tokens_from_words: initialise the token head from the text encoder's token embeddings (weights) and the
            captions' token frequencies (bias) instead of N(0, 0.02) and 0.

    Raises:
        UserError: a share, a weight or another number is out of range; all weights are 0; settings contradict each
            other; a loss or masking is not an object of its base class, or two losses have the same name; or, when the
            heads are built, the block is not a multiple of the patch size, or `contrast_patches` is below 1 with a ViT
            that is not plain.
    """

    source_kind = Source
    projection: Projection
    matching: Matching
    tokens: TokenHead
    pixels: PixelDecoder

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
        masks_per_text: int = 1,
        tokens_from_words: bool = False,
        rerank_contrast: float = 0.0,
        masked_image_share: float = 1.0,
        contrast_first: float = 0.0,
        text_mask_most: float | None = None,
        negative_queue: int = 0,
        matching_trains_encoders: bool = True,
        freeze_aligned: bool | Literal["image"] = False,
        image_learns: float = 1.0,
        fully_masked_share: float = 0.0,
        contrast_patches: float = 1.0,
        contrast_reads: ContrastReads = "class",
        losses: Sequence[PretrainingLoss] = (),
        image_masking: ImageMasking | None = None,
        text_masking: TextMasking | None = None,
        decoder_positions: bool = False,
        weight_spread: float = 0.0,
        exchanged_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_plug_ins(losses, image_masking, text_masking)
        check_shares({
            "model.task.image_mask_ratio": image_mask_ratio,
            "model.task.text_mask_ratio": text_mask_ratio,
            "model.task.fully_masked_share": fully_masked_share,
            "model.task.exchanged_share": exchanged_share,
        })  # fmt: skip
        check_positive_shares({
            "model.task.masked_image_share": masked_image_share,
            "model.task.contrast_patches": contrast_patches,
            "model.task.image_learns": image_learns,
        })  # fmt: skip
        if not 0 <= contrast_first < 1:
            todo = "Give 0, or a share below 1"
            raise UserError("model.task.contrast_first", f"{contrast_first} is not a share below 1", todo)
        check_choices({"model.task.freeze_aligned": (freeze_aligned, (True, False, "image"))})
        check_counts(1, {"model.task.rerank_k": rerank_k, "model.task.masks_per_text": masks_per_text})
        check_counts(0, {"model.task.negative_queue": negative_queue})
        check_least(0, {"model.task.rerank_contrast": rerank_contrast})
        # The losses and their settings.
        self.contrastive = ImageTextContrast(weight_itc, contrast_dim, temperature, contrast_reads)
        self.masked_pixels = MaskedPixels(weight_mim, pixel_loss, pixel_norm, decoder_layers, decoder_positions)
        self.masked_tokens = MaskedTokens(weight_mlm, tokens_from_words)
        paper = [self.contrastive, ImageTextMatching(weight_itm), self.masked_tokens, self.masked_pixels]
        self.losses = self._order(paper, [WordsPresent(weight_words), PatchSpread(weight_spread), *losses])
        # Settings that contradict each other; the error names the one to change.
        beside_contrast = any(weight for name, weight in self.weights.items() if name != "itc")
        # WordsPresent (weight_words) trains the image encoder alone.
        both_encoders = bool(weight_itc or weight_mlm or weight_mim or weight_spread)
        for name, contradicts, what, todo in (
            (
                "masked_image_share", mask_both and masked_image_share < 1,
                "mask_both masks every image", "Give 1, or a smaller share without mask_both",
            ),
            (
                "contrast_first", contrast_first and not weight_itc,
                "there is no contrast: weight_itc is 0", "Give 0, or a share below 1 with weight_itc above 0",
            ),
            (
                "freeze_aligned", freeze_aligned and not contrast_first,
                "nothing is aligned first: contrast_first is 0", "Set it to false, or give contrast_first a share",
            ),
            (
                "freeze_aligned", freeze_aligned is True and not beside_contrast,
                "contrast is the only loss: after contrast_first nothing would learn",
                "Set it to false, or give another loss a weight",
            ),
            (
                "image_learns", image_learns < 1 and contrast_first,
                "contrast_first has phases of its own, and freeze_aligned says what is frozen after the first",
                "Set it to 1, or contrast_first to 0",
            ),
            (
                "matching_trains_encoders", not (matching_trains_encoders or both_encoders),
                "no other loss trains the encoders", "Set it to true, or give another loss a weight",
            ),
            (
                "exchanged_share", exchanged_share and not weight_itm,
                f"{exchanged_share}, but there is no matching: weight_itm is 0",
                "Set it to 0, or weight_itm above 0",
            ),
        ):  # fmt: skip
            if contradicts:
                raise UserError(f"model.task.{name}", what, todo)
        # How inputs are masked: passing a masking overrides the settings of the built-in one.
        self.image_masking = image_masking or RandomBlocks(image_mask_ratio, mask_block, fully_masked_share)
        # Checked here because the maskings do not know the names of these options.
        if text_mask_most is not None and not text_mask_ratio <= text_mask_most <= 1:
            what = f"{text_mask_most} is not from text_mask_ratio ({text_mask_ratio}) to 1"
            todo = "Give a share in that range, or null, or a lower text_mask_ratio"
            raise UserError("model.task.text_mask_most", what, todo)
        self.text_masking = text_masking or RandomTokens(text_mask_ratio, text_mask_most, whole_word, keep_and_swap)
        self.mask_both, self.masks_per_text = mask_both, masks_per_text
        self.masked_image_share, self.contrast_patches = masked_image_share, contrast_patches
        self.contrast_first, self.exchanged_share = contrast_first, exchanged_share
        # One mechanism for both: freeze_aligned ends the image encoder's training with the ITC-only phase.
        self.image_learns = contrast_first if freeze_aligned else image_learns
        self.aligned_stops = freeze_aligned is True  # the text encoder and the projections stop with it
        self.rerank_contrast = rerank_contrast
        self.matching_trains_encoders = matching_trains_encoders
        self.queue = NegativeQueue(negative_queue) if negative_queue and weight_itm else None
        self.pairs_at_once: int | None = None
        self.compares_examples = bool(weight_itc or weight_itm)
        self.masked_before = False  # only the first training step checks that a masking masks something
        self.texts_per_image = 1  # captions per image in training, for the chance levels
        self.measure = PretrainingMetrics(rerank_k, rerank_contrast)
        self.tokens_loaded = False  # whether the token head comes from a checkpoint

    def _order(self, paper: Sequence[PretrainingLoss], more: Sequence[PretrainingLoss]) -> list[PretrainingLoss]:
        """The losses with a weight above 0, the paper's first, so that their heads get the same random initial values
        with or without additional losses."""
        for loss in more:
            if not hasattr(loss, "weight"):
                what, todo = "has no weight", "Call super().__init__(weight) in its __init__"
                raise UserError(f"model.task.losses: {type(loss).__name__}", what, todo)
        self.weights = {loss.name: loss.weight for loss in (*paper, *more)}
        if len(self.weights) < len(paper) + len(more):
            names = [loss.name for loss in (*paper, *more)]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError("model.task.losses", f"two losses are called {twice}", "Give one another name")
        if not any(self.weights.values()):
            raise UserError("model.task", "all loss weights are 0", "give at least one weight above 0")
        self.stuck_hints = {loss.name: loss.stuck_hint for loss in (*paper, *more)}
        self.of_paper = sum(loss.weight > 0 for loss in paper)
        return [loss for loss in (*paper, *more) if loss.weight]

    @property
    def needs(self) -> frozenset[Need]:
        """What the losses of this step use. With `mask_both`, `mask` and `_freeze_unused` also add the masked inputs of
        the other modality."""
        return needed(self.losses)

    def build(self, backbone: MaskVLM) -> None:
        if self.contrast_patches < 1:
            backbone.image.check_plain("model.task.contrast_patches", "Set it to 1")
        width, length = backbone.width, backbone.text.text_length
        # L, T, D, E: the sizes that a checkpoint's queue must match.
        self.queue_sizes = (1 + math.prod(backbone.image.grid), length, width, self.contrastive.width)
        self.image_masking.check(backbone.image.patch_size)
        # The image encoder is frozen before any image is masked, so a new mask token could not be trained.
        stops_first = self.contrast_first > 0 and self.image_learns < 1
        if stops_first and not backbone.image.left_out and backbone.origin is None:
            backbone.image.set_mask_token_to_mean_colour()
        paper, more = self.losses[: self.of_paper], self.losses[self.of_paper :]
        self._add_heads(paper, backbone)
        init_normal(self)
        # MLM before ITC, as in earlier versions; only ITC's heads draw random numbers at this point.
        for loss in reversed(paper):
            loss.init_heads(self, backbone)
        # Heads of additional losses come after init_normal: the paper's heads draw the same random numbers with or
        # without them, and the additional heads keep their own initialisation.
        self._add_heads(more, backbone)
        for loss in more:
            loss.init_heads(self, backbone)
        self._freeze_unused(backbone)

    def _add_heads(self, parts: Sequence[PretrainingLoss], backbone: MaskVLM) -> None:
        for loss in parts:
            heads: Any = loss.build(backbone)
            where, todo = f"model.task.losses: {type(loss).__name__}.build", "Return a dict: each head by its name"
            if not isinstance(heads, Mapping | nn.ModuleDict):
                raise UserError(where, f"gave a {type(heads).__name__}", todo)
            for name, head in heads.items():
                if head is not None and not isinstance(head, nn.Module):
                    what = f"gave {name!r:.40} as a {type(head).__name__}"
                    raise UserError(where, what, f"{todo}, an nn.Module (nn.ParameterList for tensors)")
                # add_module would silently replace a head of the same name.
                if hasattr(self, name):
                    raise UserError(f"model.task.losses: {loss.name}", f"its head {name} already exists", "Rename it")
                self.add_module(name, head)

    def _freeze_unused(self, backbone: MaskVLM) -> None:
        """Freeze the parts that no active loss reaches."""
        needs, pairs = self.needs, Need.PAIRS in self.needs
        masked = Need.MASKED_IMAGE in needs or (self.mask_both and Need.MASKED_TEXT in needs)
        reached: list[tuple[nn.Parameter | nn.Module, bool]] = [
            (backbone.image.mask_token, masked),
            (backbone.cross_image, pairs or Need.MASKED_IMAGE in needs),
            (backbone.cross_text, pairs or Need.MASKED_TEXT in needs),
            (backbone.image, needs != {Need.TEXT}),
            (backbone.text, needs != {Need.IMAGE}),
        ]
        backbone.freeze_for_task(*(part for part, is_reached in reached if not is_reached))

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """As `Task.warm_start`, and resizes the pixel decoder's position embeddings if the image size differs.

        Raises:
            UserError: contrast uses different tokens in the checkpoint, or vectors of a different width.
        """
        theirs, own = heads.get("projection.image.weight"), self.state_dict().get("projection.image.weight")
        if theirs is not None and own is not None and theirs.shape[1] != own.shape[1]:
            reads = "class_and_mean" if self.contrastive.reads == "class" else "class"
            what = f"{self.contrastive.reads}, but contrast of the checkpoint reads {reads}"
            raise UserError("model.task.contrast_reads", what, f"Set it to {reads}")
        if theirs is not None and own is not None and len(theirs) != len(own):
            what = f"{len(own)}, but contrast of the checkpoint has vectors of width {len(theirs)}"
            raise UserError("model.task.contrast_dim", what, f"Set it to {len(theirs)}")
        # As in the backbone: the pixel decoder may have position embeddings, and the image size may differ.
        loaded = super().warm_start(resize_positions(heads, self))
        self.tokens_loaded = any(name.startswith("tokens.") for name in loaded)
        return loaded

    def compute_in_chunks(self, size: int) -> None:
        """As `Task.compute_in_chunks`. Raises UserError for an additional loss that needs more than features of whole
        images and texts, and does not set `adds_up`."""
        names = [loss.name for loss in self.losses if not loss.adds_up and loss.needs - {Need.IMAGE, Need.TEXT}]
        if names:
            todo = "Say so in its class (`adds_up`, see PretrainingLoss), or leave model.chunk out"
            raise UserError("model.chunk", f"the loss {names[0]} is not known to add up over chunks of a batch", todo)
        self.pairs_at_once = size

    def use_token_counts(self, count: Callable[[], Tensor]) -> None:
        # A head loaded from a checkpoint has a trained bias.
        if self.weights["mlm"] and self.masked_tokens.from_words and not self.tokens_loaded:
            self.tokens.init_bias_from_counts(count())

    def forward(self, backbone: MaskVLM, batch: Batch) -> dict[str, Tensor]:
        self.check_ready()
        # False in the ITC-only phase.
        aligned = self.run_progress >= self.contrast_first
        step, matched, pairs = self.step(backbone, batch, aligned)
        if self.pairs_at_once is None:
            encoded, attention_CT = step.encoded, step.batch.attention_CT
            if not aligned:
                # A cross encoder projects every row it is given, so pass only the rows of these few pairs.
                rows = slice(0, pairs)
                matched = None if matched is None else chunks.take_matched(matched, rows)
                encoded, attention_CT = chunks.take_encoded(encoded, rows), attention_CT[rows]
            step = step._replace(crossed=self.cross(backbone, encoded, attention_CT, matched, pairs))
            terms = {loss.name: scalar(loss, loss(self, step)) for loss in self.losses}
        else:
            terms = self.in_chunks(backbone, step, matched, pairs)
        if self.training and aligned:
            with torch.no_grad():
                for loss in self.losses:
                    loss.observe(self, step)
        if not aligned:
            # Times 0: unused losses stay in the graph so that every parameter has a gradient (DDP, FSDP).
            return {"itc": terms.pop("itc") + 0.0 * sum(terms.values())}
        return terms

    def in_chunks(self, backbone: MaskVLM, step: Step, matched: MatchingRows | None, pairs: int) -> dict[str, Tensor]:
        """The same losses, with those that add up computed `chunk` pairs at a time; see `chunks.py`."""
        whole = [loss for loss in self.losses if not loss.adds_up]
        terms = {loss.name: scalar(loss, loss(self, step)) for loss in whole}
        parts = [loss for loss in self.losses if loss.adds_up]

        def of(rows: slice, image_BLD: Tensor) -> Tensor:
            part, own = chunks.take_step(step, rows), None if matched is None else chunks.take_matched(matched, rows)
            crossed = self.cross(backbone, part.encoded, part.batch.attention_CT, own, rows.stop - rows.start)
            part = part._replace(crossed=crossed)
            there = [loss for loss in parts if not (Need.MASKED_IMAGE in loss.needs and part.masks.patch is None)]
            sums = {loss.name: scalar(loss, loss(self, part)) for loss in there}
            zero = image_BLD.new_zeros((), dtype=torch.float32)
            return torch.stack([sums.get(loss.name, zero) for loss in parts])

        if parts:
            # A tensor argument tells torch which device's random state to restore (for dropout). Shape: (chunks,
            # losses), summed over chunks; pairs that are not matched in the ITC-only phase are left out.
            image_BLD = step.encoded.image_BLD
            of_chunk = [chunks.computed_again(of, rows, image_BLD) for rows in chunks.slices(pairs, self.pairs_at_once)]
            sums = torch.stack(of_chunk).sum(0)
            terms |= {loss.name: sums[place] for place, loss in enumerate(parts)}
        return {loss.name: terms[loss.name] for loss in self.losses}

    def step(self, backbone: MaskVLM, batch: Batch, aligned: bool) -> tuple[Step, MatchingRows | None, int]:
        """Everything that the losses use before the cross encoders, the rows that matching picks from, and how many
        pairs are masked and matched. `aligned`: the ITC-only phase is over."""
        # Rows of other processes and of the queue are concatenated with this process's: all texts need one length.
        queue = self.queue if aligned else None
        if world_size() > 1 or queue is not None:
            batch = pad_text(batch, backbone.text.text_length, backbone.text.pad_id)
        self.texts_per_image = len(batch.owner_C) // len(batch.valid_B)
        # One caption per image is masked and matched; contrast uses all of them.
        batch, all_captions = first_and_all_captions(batch)
        # In the ITC-only phase one pair is masked and matched with weight 0: DDP and FSDP need a gradient for every
        # parameter. Its masks are drawn once for all processes, so that the patches of contrast, which are drawn next,
        # do not depend on their number.
        pairs = len(batch.valid_B) if aligned else 1
        masks = self.mask(backbone, batch, self.uniform if aligned else same_everywhere(self.uniform), True, pairs)
        # A share of 1 means the whole run, also outside a run (where run_progress is 1).
        frozen = self.image_learns < 1 and self.run_progress >= self.image_learns
        # If the text encoder is frozen too, ITC is only logged; otherwise it still trains the text encoder.
        still = frozen and self.aligned_stops
        stand = [backbone.image, *([backbone.text] if still else [])]
        # Contrast alone can use a subset of the patches; the other losses need all positions.
        alone = not aligned or [loss.name for loss in self.losses] == ["itc"]
        with encoders_frozen(stand, frozen):
            subset_BV = self.sample_patches(backbone, batch) if alone else None
            exchanged = self.exchange(backbone, batch, pairs)
            encoded = self.encode(backbone, all_captions, masks, subset_BV, exchanged)
        # Contrast first, since its similarities are used to draw the negatives; then the pairs for the cross encoders.
        contrast = self.contrast(all_captions, encoded, subset_BV)
        negatives = self.negatives(contrast if queue is None else queue.append_to(contrast, batch), pairs)
        matched = None
        if negatives is not None:
            queued_pairs = None if queue is None else queue.pairs
            features = (encoded.image_BLD, encoded.text_BTD, batch.attention_CT)
            matched, negatives = matching_rows(*features, negatives, queued_pairs)
            matched = with_exchanged(matched, encoded, batch.attention_CT)
            if exchanged is not None:
                negatives = (count_exchanged(negatives[0], exchanged), negatives[1])
        # After the draw: this step's pairs are already among the candidates.
        if queue is not None and self.training:
            queue.push(batch, encoded, contrast)
        settings = (self.masks_per_text, self.mask_both, still)
        step = Step(batch, all_captions, masks, encoded, contrast, negatives, nothing_crossed(encoded), {}, *settings)
        # Here, not in the losses: processes must not communicate while chunks are recomputed.
        counts = {loss.name: shared_count(loss.count(step)) for loss in self.losses if loss.adds_up}
        return step._replace(counts=counts), matched, pairs

    def cross(
        self,
        backbone: MaskVLM,
        encoded: Encoded,
        attention_CT: Tensor,
        matched: MatchingRows | None,
        pairs: int,
    ) -> Crossed:
        """One pass of each cross encoder."""
        if not self.needs & {Need.PAIRS, Need.MASKED_IMAGE, Need.MASKED_TEXT}:
            return nothing_crossed(encoded)
        reconstructs = (Need.MASKED_IMAGE in self.needs, Need.MASKED_TEXT in self.needs)
        parts = (encoded, attention_CT, matched, reconstructs, self.mask_both, pairs, self.matching_trains_encoders)
        return cross_all(backbone, *parts)

    def training_phases(self, backbone: MaskVLM) -> TrainingPhases:
        """With `contrast_first`, the cross encoders, all heads except contrast's and a mask token after the ViT are
        trained only after the ITC-only phase. Otherwise all parameters are trained from the start, and the image
        encoder stops after `image_learns` of the steps."""
        if not self.contrast_first and self.image_learns == 1:
            return TrainingPhases()
        projection = [self.projection] if self.weights["itc"] else []
        first = [backbone.image, backbone.text, *projection]
        # By id: == between tensors compares their values.
        early = {id(parameter) for module in first for parameter in module.parameters()}
        if backbone.image.left_out:
            early.remove(id(backbone.image.mask_token))
        every = (*backbone.parameters(), *self.parameters())
        waiting = [parameter for parameter in every if id(parameter) not in early]
        stop = first if self.aligned_stops else first[:1] if self.image_learns < 1 else []
        stopping = [parameter for module in stop for parameter in module.parameters() if id(parameter) in early]
        if not self.contrast_first:
            return TrainingPhases(self.image_learns, (), stopping)
        return TrainingPhases(self.contrast_first, waiting, stopping)

    def mask(
        self, backbone: MaskVLM, batch: Batch, uniform: Uniform, training: bool = False, pairs: int | None = None
    ) -> Masks:
        """Draw masks.

        Args:
            batch: with one text per image in training; in evaluation an image may have several.
            training: draw `masks_per_text` masks for each text, in adjacent rows, and masks for `masked_image_share`
                of the images; otherwise one mask for each.
            pairs: number of pairs, counted from the first, to mask; None: all.
        """
        # In evaluation there are more texts than images: `pairs` is None, and all images and texts are masked.
        images = len(batch.valid_B) if pairs is None else pairs
        # With a single pair, as in the ITC-only phase, even a valid masking may mask nothing.
        first = training and images > 1 and not self.masked_before
        masks_per_text, share = (self.masks_per_text, self.masked_image_share) if training else (1, 1.0)
        patch = token = None
        if Need.MASKED_IMAGE in self.needs or (self.mask_both and Need.MASKED_TEXT in self.needs):
            # The first images of the batch, which is shuffled in training.
            valid_B, size = batch.valid_B[: max(1, round(share * images))], backbone.image.patch_size
            patch = self.image_masking(valid_B, backbone.image.grid, size, uniform, training)
            check_mask(self.image_masking, patch, PatchMask, (len(valid_B), math.prod(backbone.image.grid)))
            if first:
                check_masks_some(self.image_masking, patch.mask_BN, valid_B.any(), "patch")
        if Need.MASKED_TEXT in self.needs or (self.mask_both and Need.MASKED_IMAGE in self.needs):
            parts = (batch.token_CT, batch.special_CT, batch.word_CT)
            # (C, T) -> (C * masks_per_text, T), with the maskings of a text in adjacent rows.
            token_CT, special_CT, word_CT = (part[:pairs].repeat_interleave(masks_per_text, 0) for part in parts)
            rows = Texts(token_CT, special_CT, word_CT, masks_per_text, training)
            text = backbone.text
            words = Vocabulary(text.mask_id, text.vocab_size, text.text_length, text.ids_of)
            token = self.text_masking(rows, words, uniform)
            check_mask(self.text_masking, token, TokenMask, (token_CT.shape[0], token_CT.shape[1]))
            if first:
                check_masks_some(self.text_masking, token.mask_CT, (~special_CT).any(), "token")
        self.masked_before |= first
        return Masks(patch, token)

    def exchange(self, backbone: MaskVLM, batch: Batch, pairs: int) -> ExchangedCaptions | None:
        """Exchange two words in the captions of the first images: `exchanged_share` of the first `pairs`, at least one.
        None if the share is 0."""
        if not self.exchanged_share:
            return None
        first = max(1, round(self.exchanged_share * pairs))
        # The batch is shuffled in training.
        token_ST, special_ST, word_ST = (part[:first] for part in (batch.token_CT, batch.special_CT, batch.word_CT))
        length, longest = token_ST.shape[1], backbone.text.text_length
        # Drawn for the longest text and then cut, so that the draw does not depend on padding, which depends on the
        # number of processes.
        uniform_STT = self.uniform(first, longest, longest)[:, :length, :length]
        return exchange_words(token_ST, special_ST, word_ST, backbone.text.word_embeddings, uniform_STT)

    def sample_patches(self, backbone: MaskVLM, batch: Batch) -> Tensor | None:
        """Indices of the patches of each image that contrast sees, [B, V]; None: all."""
        patches = backbone.image.num_patches
        if self.contrast_patches == 1:
            return None
        noise_BN = self.uniform(len(batch.valid_B), patches)
        # The first V of a random permutation of the N patches, so without repeats.
        return noise_BN.argsort(dim=1)[:, : max(1, round(self.contrast_patches * patches))]

    def encode(
        self,
        backbone: MaskVLM,
        batch: Batch,
        masks: Masks,
        subset_BV: Tensor | None = None,
        exchanged: ExchangedCaptions | None = None,
    ) -> Encoded:
        """One pass of each encoder over the whole and the masked inputs. `batch` has all captions of its images, first
        those that are masked and matched; `subset_BV`: the patches of the whole images to encode."""
        image, token, attention, mask, visible = batch.image_BCHW, batch.token_CT, batch.attention_CT, None, None
        pairs, captions = len(image), len(token)
        # Whole images, then masked ones, in one batch; no patch of a whole image is masked.
        if masks.patch is not None:
            masked_BN, visible = masks.patch.mask_BN, masks.patch.visible
            image = torch.cat([image, image[: len(masked_BN)]])
            mask = torch.cat([masked_BN.new_zeros(pairs, masked_BN.shape[1]), masked_BN])
        # All captions, then masked captions, each with its original padding mask.
        if masks.token is not None:
            token = torch.cat([token, masks.token.token_CT])
            masked = attention[: len(masks.token.token_CT) // self.masks_per_text]
            attention = torch.cat([attention, masked.repeat_interleave(self.masks_per_text, 0)])
        behind = len(token)
        if exchanged is not None:
            token = torch.cat([token, exchanged.token_CT])
            attention = torch.cat([attention, batch.attention_CT[: len(exchanged.token_CT)]])
        row_B = batch.feature_row_B
        if self.pairs_at_once is None:
            whole, masked_image = backbone.image(image, mask, row_B, visible, subset_BV).tensor_split([pairs])
        else:
            whole = chunks.encoded_in_chunks(
                backbone.image, self.pairs_at_once, pairs,
                lambda rows: (image[rows], None, row_B[rows], None, None if subset_BV is None else subset_BV[rows]),
            )  # fmt: skip
            masked_image = None
            if mask is not None:
                images, masked_BN = image[pairs:], mask[pairs:]
                masked_image = chunks.encoded_in_chunks(
                    backbone.image, self.pairs_at_once, len(images),
                    lambda rows: (images[rows], masked_BN[rows], None, visible),
                )  # fmt: skip
        if backbone.image.stands_still and masks.patch is not None:
            # Masked images train the mask token. In the same graph, whole images would get a gradient that nothing
            # uses.
            whole = whole.detach()
        if self.needs == {Need.IMAGE}:
            every_CTD = whole.new_zeros(captions, 0, whole.shape[-1])  # no loss uses texts
        else:
            every_CTD = chunks.encoded_in_chunks(
                backbone.text, self.pairs_at_once, len(token), lambda rows: (token[rows], attention[rows])
            )
        # (all rows, T, D) -> first captions (B), other captions, masked captions, exchanged captions
        text, other, masked, swapped = every_CTD.tensor_split([pairs, captions, behind])
        return Encoded(
            whole,
            text,
            masked_image if masks.patch is not None else None,
            masked if masks.token is not None else None,
            other if captions > pairs else None,
            self.masks_per_text,
            swapped if exchanged is not None else None,
            None if exchanged is None else exchanged.changed_C,
        )

    def contrast(self, all_captions: Batch, encoded: Encoded, subset_BV: Tensor | None = None) -> Contrast:
        """Unit vectors of all processes. If ITC is off, all are zero and negatives are drawn uniformly.
        all_captions: the batch with the first captions of all images in front."""
        pairs = len(all_captions.valid_B)
        if self.weights["itc"]:
            if self.training:
                self.projection.clamp_temperature()
            image, attention_BT = (
                self.projection.embed_image(encoded.image_BLD, subset_BV),
                all_captions.attention_CT[:pairs],
            )
            text, scale = self.projection.embed_text(encoded.text_BTD, attention_BT), self.projection.logit_scale
        else:
            # Same width as with ITC: checkpoints store a queue of these vectors.
            image = text = encoded.image_BLD.new_zeros(pairs, self.contrastive.width, dtype=torch.float32)
            scale = torch.ones((), device=image.device)
        return gather_contrast(all_captions, image, text, scale)

    def negatives(self, contrast: Contrast, pairs: int) -> tuple[Negatives, Negatives] | None:
        """A hard caption for each of the first `pairs` images and a hard image for each of their captions, as indices
        into the global batch followed by the queue; None if no loss needs pairs."""
        if Need.PAIRS not in self.needs:
            return None
        image, text, image_all, text_all, scale, _, excluded, _ = contrast
        with torch.no_grad():
            # One exclusion mask serves both directions: sharing an image or a text is symmetric.
            drawn = [
                draw_hard_negatives(similarity(*pair, scale), excluded, self.uniform(*excluded.shape))
                for pair in ((image, text_all), (text, image_all))
            ]
        # Drawn for the whole batch and then cut, so that the random numbers do not depend on `pairs`.
        first = [Negatives(index_B[:pairs], weight_B[:pairs]) for index_B, weight_B in drawn]
        return first[0], first[1]

    def pixel_target(self, image_BCHW: Tensor, index_BK: Tensor) -> Tensor:
        """Targets of the masked patches, see `MaskedPixels.target`."""
        return self.masked_pixels.target(image_BCHW, index_BK)

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Chance level of each computed loss; some are missing until a batch has been seen."""
        levels = {loss.name: loss.chance(batch_size, self.texts_per_image) for loss in self.losses}
        return {name: level for name, level in levels.items() if level is not None}

    def card(self) -> dict[str, Any]:
        """How retrieval is re-ranked; k is 0 (no re-ranking) without matching."""
        k = self.measure.rerank_k if self.weights["itm"] else 0
        return {"rerank_k": k, "rerank_contrast": self.rerank_contrast}

    def resume_state(self) -> dict[str, Tensor]:
        """The queue of negatives, if it is not empty."""
        return {} if self.queue is None else self.queue.state()

    def load_resume_state(self, state: Mapping[str, Tensor]) -> None:
        if self.queue is not None:
            self.queue.restore(state, *self.queue_sizes)

    def begin_evaluation(self) -> None:
        self.measure.reset()

    def update(self, backbone: MaskVLM, batch: Batch) -> None:
        self.measure.update(self, backbone, batch)

    def compute(self, backbone: MaskVLM) -> dict[str, float]:
        return self.measure.compute(self, backbone)


def nothing_crossed(encoded: Encoded) -> Crossed:
    """Crossed features with 0 rows, for a step whose cross encoders are not needed or have not run yet."""
    none_D = encoded.image_BLD[:0, 0]
    return Crossed(encoded.image_BLD[:0], encoded.text_BTD[:0], Fused(none_D, none_D))


def count_exchanged(texts: Negatives, exchanged: ExchangedCaptions) -> Negatives:
    """The hard captions and their weights; an exchanged caption counts even if the batch has no negative for its
    image."""
    first = len(exchanged.changed_C)
    there_S = torch.maximum(texts.weight_B[:first], exchanged.changed_C.to(texts.weight_B))
    return texts._replace(weight_B=torch.cat([there_S, texts.weight_B[first:]]))


MASK_FIELDS: dict[type, tuple[dict[str, torch.dtype], str, str]] = {
    PatchMask: ({"mask_BN": torch.bool}, "index_BK", "weight_BK"),
    TokenMask: ({"token_CT": torch.int64, "mask_CT": torch.bool}, "index_CK", "weight_CK"),
}
"""Mask class -> its fields with one entry per position, and their dtypes; its field with the positions that the loss
uses; its field with their weights."""


def check_mask(masking: ImageMasking | TextMasking, mask: object, kind: type, shape: tuple[int, int]) -> None:
    """Raises UserError if a masking, possibly a plug-in, returned anything but a mask of this shape (rows, patches or
    tokens)."""
    where = f"model.task: {type(masking).__name__}"
    if not isinstance(mask, kind):
        raise UserError(where, f"gave a {type(mask).__name__}", f"Return a masking.{kind.__name__}")
    whole, index, weight = MASK_FIELDS[kind]
    for name, dtype in {**whole, index: torch.int64, weight: None}.items():
        value = getattr(mask, name)
        if not isinstance(value, Tensor):
            raise UserError(where, f"gave a {type(value).__name__} as {name}", f"See masking.{kind.__name__}")
        # Index and weight have one column for each position that the loss uses.
        wanted = shape if name in whole else (shape[0], *getattr(mask, index).shape[1:])
        fits = value.is_floating_point() if dtype is None else value.dtype == dtype
        if value.shape != wanted or not fits:
            what = f"gave {name} of shape {list(value.shape)}, {value.dtype}"
            todo = f"Return {list(wanted)}, {dtype or 'floating point'}, see masking.{kind.__name__}"
            raise UserError(where, what, todo)


def check_masks_some(masking: ImageMasking | TextMasking, mask: Tensor, could: Tensor, what: str) -> None:
    """Raises UserError if a plug-in masking masks nothing in a batch that could be masked. It synchronises host and
    device, so only the first step calls it. `RandomBlocks`, `RandomTokens` and their subclasses are exempt: their ratio
    may be 0. `DrawnTokens` is not."""
    if not isinstance(masking, RandomBlocks | RandomTokens) and bool(could) and not bool(mask.any()):
        where = f"model.task: {type(masking).__name__}"
        raise UserError(where, f"masks no {what} of the first batch", "Check its rule; its loss would learn nothing")


def scalar(loss: PretrainingLoss, value: Tensor) -> Tensor:
    """The value of a loss. Raises UserError if it is not a scalar tensor, which can happen with a plug-in."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    what = f"gave a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"gave {value!r:.60}"
    todo = "Return a scalar tensor, the mean over the batch"
    raise UserError(f"model.task.losses: {type(loss).__name__}", what, todo)
