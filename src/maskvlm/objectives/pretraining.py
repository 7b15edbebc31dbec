"""Joint masked pre-training: mask one side, reconstruct it with the help of the other (paper sec. 3).

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
from maskvlm.utils.distributed import shared_count, world_size
from maskvlm.utils.errors import UserError, check_least, check_shares


def check_plug_ins(losses: object, image_masking: object, text_masking: object) -> None:
    """Raise UserError for further losses or maskings that are no objects of their classes."""
    maskings = [("image_masking", image_masking, ImageMasking), ("text_masking", text_masking, TextMasking)]
    wrong = [(name, kind) for name, value, kind in maskings if value is not None and not isinstance(value, kind)]
    listed = isinstance(losses, Sequence) and all(isinstance(loss, PretrainingLoss) for loss in losses)
    wrong += [] if listed else [("losses", PretrainingLoss)]
    for name, kind in wrong:
        what = f"expected {'a list of objects' if name == 'losses' else 'an object'} of {kind.__name__}"
        raise UserError(f"model.task.{name}", what, "Build it: an object, not its class or name")


class MaskedPretraining(Task):
    """The paper's four losses in one step: ITC + ITM + MLM + MIM.

    Args:
        image_mask_ratio: share of image blocks masked (0.6, P).
        fully_masked_share: in training the probability that a masked image is masked as a whole (0, P). Otherwise the
            model learns to fill in from the visible patches first and hardly uses the caption.
        text_mask_ratio: share of tokens masked (0.3, P).
        masks_per_text: maskings of each caption in a step (1, P); each more masks as many words again at little cost.
        text_mask_most: in training a masking masks a share that is drawn between text_mask_ratio and this one (None:
            text_mask_ratio); of several maskings of a caption the first keeps text_mask_ratio. With much masked, a word
            is told from the image, not from the words that are left; with 1 the model also learns to write from
            nothing, as `caption` asks it to (masks of every size, as in mask-predict, Ghazvininejad et al. 2019).
        masked_image_share: share of a step's images that are masked (1, P); a masked image costs about as much as a
            whole one.
        contrast_first: share of the run's steps, 0 to below 1, that train ITC alone (0, P); such a step costs less
            than half. The other losses and the cross encoders are trained after it, on aligned encoders (ALBEF's
            "align before fuse", here in time).
        negative_queue: pairs of earlier steps among which hard negatives are drawn, too (0: of this step alone, P);
            see `negative_queue.NegativeQueue`. It takes the memory of as many encoded pairs.
        matching_trains_encoders: whether matching trains the two encoders beside the cross encoders (true, P). With
            few pairs to learn from, false keeps more of what ITC taught the encoders.
        exchanged_share: share of the images, 0 to 1, whose hard caption in matching is their own one with two words
            exchanged (0, P), see `exchanged_words.exchange_words`: matching is asked which word belongs to which, at
            the cost of one more pass of these captions through the text encoder.
        contrast_patches: share of the patches of an image, drawn anew in each step, that the trained blocks of its
            encoder see while contrast alone is learned (1, P): cheaper, and less is learned by heart (FLIP, Li et al.
            2023).
        contrast_reads: `class`: contrast reads the two class tokens (P). `class_and_mean`: the mean patch and the mean
            token, too, see `heads.Projection`.
        freeze_aligned: true: both encoders and the contrast projections are frozen after the ITC-only phase (false,
            P); their learning rates end with it, and later steps cost less. `image`: only the image encoder is
            frozen; the text encoder and ITC go on learning against fixed image features (LiT, Zhai et al. 2022). The
            mask token of a ViT that reads all positions does not learn either: it is the mean colour's embedding, or
            a checkpoint's where the run starts from one.
        image_learns: share of the run's steps, above 0 to 1, in which the image encoder learns (1, P); its learning
            rate ends there, and later steps cost less. What comes late, such as how two things stand to each other, is
            then learned on image features that do not move (docs/results/scenes). Not beside `contrast_first`, which
            has phases of its own.
        mask_block: side of an image block in pixels (32, P); a multiple of the patch size.
        weight_itc, weight_itm, weight_mlm, weight_mim: weight of each loss (1, P); 0 skips its computation.
        weight_words: weight of a fifth loss, which the paper does not have (0), see `pretraining_losses.WordsPresent`.
        weight_spread: weight of a loss on how much each masked patch varies (0: none, P), which teaches where things
            are, see `pretraining_losses.PatchSpread`.
        losses: further losses, of any package: each a class of `pretraining_losses.PretrainingLoss`.
        image_masking: how images are masked (`masking.RandomBlocks` of image_mask_ratio, mask_block and
            fully_masked_share). `masking.DrawnBlocks`: each image has a share of its own.
        text_masking: how texts are (`masking.RandomTokens` of text_mask_ratio, text_mask_most, whole_word,
            keep_and_swap). `masking.DrawnTokens`: each masking has a share of its own.
            `masking.ChosenPhrases`: given phrases are masked alone.
        mask_both: reconstruct each side from the *masked* other one (the paper's ablation, slightly worse).
        whole_word: mask all pieces of a word together.
        keep_and_swap: BERT's 80/10/10 replacement instead of always [MASK].
        pixel_loss: l1 (P), squared or smooth_l1.
        pixel_norm: normalise each target patch to mean 0 and variance 1 (MAE's option).
        decoder_layers: blocks of the pixel decoder (3, P).
        decoder_positions: the pixel decoder's queries know their places (false, P), see
            `pretraining_losses.MaskedPixels`.
        contrast_dim: width of the contrast space (256, C).
        temperature: start value of the contrast temperature (0.07, C).
        rerank_k: candidates re-scored by matching when retrieval is measured (C; ALBEF: 128 to 256).
        rerank_contrast: weight of the ITC logit that is added to the matching log-odds in re-ranking (0: matching
            alone, C; 1: see `rerank.score_gallery`).
        tokens_from_words: initialise the token head from the text encoder's token embeddings (weights) and the
            captions' token frequencies (bias) instead of N(0, 0.02) and 0.

    Raises:
        UserError: a ratio outside [0, 1], a negative weight, all weights 0, a block that is no multiple of
            the patch size.
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
        contrast_reads: Literal["class", "class_and_mean"] = "class",
        losses: Sequence[PretrainingLoss] = (),
        image_masking: ImageMasking | None = None,
        text_masking: TextMasking | None = None,
        decoder_positions: bool = False,
        weight_spread: float = 0.0,
        exchanged_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_plug_ins(losses, image_masking, text_masking)
        shares = (image_mask_ratio, text_mask_ratio, fully_masked_share, exchanged_share)
        names = ("image_mask_ratio", "text_mask_ratio", "fully_masked_share", "exchanged_share")
        check_shares({f"model.task.{name}": share for name, share in zip(names, shares, strict=True)})
        check_least(1, {"model.task.rerank_k": rerank_k, "model.task.masks_per_text": masks_per_text})
        check_least(0, {"model.task.rerank_contrast": rerank_contrast, "model.task.negative_queue": negative_queue})
        # The losses and what they need to know.
        self.contrastive = ImageTextContrast(weight_itc, contrast_dim, temperature, contrast_reads)
        self.masked_pixels = MaskedPixels(weight_mim, pixel_loss, pixel_norm, decoder_layers, decoder_positions)
        self.masked_tokens = MaskedTokens(weight_mlm, tokens_from_words)
        paper = [self.contrastive, ImageTextMatching(weight_itm), self.masked_tokens, self.masked_pixels]
        self.losses = self._order(paper, [WordsPresent(weight_words), PatchSpread(weight_spread), *losses])
        # How inputs are masked: a given class makes the settings of the built-in one idle.
        self.image_masking = image_masking or RandomBlocks(image_mask_ratio, mask_block, fully_masked_share)
        # Here, as the maskings know nothing of the names of these options.
        if text_mask_most is not None and not text_mask_ratio <= text_mask_most <= 1:
            what = f"{text_mask_most} is no share from text_mask_ratio ({text_mask_ratio}) to 1"
            todo = "Give such a share, or null, or a lower text_mask_ratio"
            raise UserError("model.task.text_mask_most", what, todo)
        self.text_masking = text_masking or RandomTokens(text_mask_ratio, text_mask_most, whole_word, keep_and_swap)
        self.mask_both, self.masks_per_text = mask_both, masks_per_text
        # Settings that depend on each other; an error names the one to change.
        if not 0 < masked_image_share <= 1 or (mask_both and masked_image_share < 1):
            what = (
                f"{masked_image_share} is no share above 0"
                if not 0 < masked_image_share <= 1
                else "mask_both masks every image"
            )
            raise UserError("model.task.masked_image_share", what, "Give 1, or a smaller share without mask_both")
        if not 0 < contrast_patches <= 1:
            what = f"{contrast_patches} is no share above 0"
            raise UserError("model.task.contrast_patches", what, "Give 1, or a smaller share")
        self.contrast_patches = contrast_patches
        if not 0 <= contrast_first < 1 or (contrast_first and not weight_itc):
            what = f"{contrast_first} is no share below 1" if weight_itc else "there is no contrast: weight_itc is 0"
            raise UserError("model.task.contrast_first", what, "Give 0, or a share below 1 with weight_itc above 0")
        self.masked_image_share, self.contrast_first = masked_image_share, contrast_first
        if freeze_aligned and not contrast_first:
            what, todo = (
                "nothing is aligned first: contrast_first is 0",
                "Set it to false, or give contrast_first a share",
            )
            raise UserError("model.task.freeze_aligned", what, todo)
        if freeze_aligned is True and not any(weight for name, weight in self.weights.items() if name != "itc"):
            what = "contrast is the only loss: after contrast_first nothing would learn"
            raise UserError("model.task.freeze_aligned", what, "Set it to false, or give another loss a weight")
        if not 0 < image_learns <= 1:
            todo = "Give 1, or a smaller share"
            raise UserError("model.task.image_learns", f"{image_learns} is no share above 0", todo)
        if image_learns < 1 and contrast_first:
            what = "contrast_first has phases of its own, and freeze_aligned says what is frozen after the first"
            todo = "Set it to 1, or contrast_first to 0"
            raise UserError("model.task.image_learns", what, todo)
        # One mechanism: freezing what is aligned ends the image encoder's learning with the ITC-only phase.
        self.image_learns = contrast_first if freeze_aligned else image_learns
        self.aligned_stops = freeze_aligned is True  # the text encoder and the projections stop with it
        self.rerank_contrast = rerank_contrast
        # The words that are present (weight_words) train the image encoder alone.
        if not (matching_trains_encoders or weight_itc or weight_mlm or weight_mim or weight_spread):
            todo = "Set it to true, or give another loss a weight"
            raise UserError("model.task.matching_trains_encoders", "no other loss trains the encoders", todo)
        self.matching_trains_encoders = matching_trains_encoders
        self.queue = NegativeQueue(negative_queue) if negative_queue and weight_itm else None
        if exchanged_share and not weight_itm:
            what, todo = (
                f"{exchanged_share}, but there is no matching: weight_itm is 0",
                "Set it to 0, or weight_itm above 0",
            )
            raise UserError("model.task.exchanged_share", what, todo)
        self.exchanged_share = exchanged_share
        self.pairs_at_once: int | None = None
        self.compares_examples = bool(weight_itc or weight_itm)
        self.masked_before = False  # a masking that masks nothing is looked for in the first training step alone
        self.texts_per_image = 1  # of an image in training, for the chance levels
        self.measure = PretrainingMetrics(rerank_k, rerank_contrast)
        self.tokens_loaded = False  # whether the token head is a checkpoint's

    def _order(self, paper: Sequence[PretrainingLoss], more: Sequence[PretrainingLoss]) -> list[PretrainingLoss]:
        """The losses of weight above 0, the paper's first: their heads then get the same random initial values with
        or without further losses."""
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
        """What the losses of this step read. With `mask_both` the masked inputs of the other modality are added in
        `mask` and in `_freeze_unused`."""
        return needed(self.losses)

    def build(self, backbone: MaskVLM) -> None:
        if self.contrast_patches < 1:
            backbone.image.check_plain("model.task.contrast_patches", "Set it to 1")
        width, length = backbone.width, backbone.text.text_length
        # L, T, D, E: what a checkpoint's queue must fit.
        self.queue_sizes = (1 + math.prod(backbone.image.grid), length, width, self.contrastive.width)
        self.image_masking.check(backbone.image.patch_size)
        # Before images are masked for the first time their encoder stands still, which a new token would need to learn.
        stops_first = self.contrast_first > 0 and self.image_learns < 1
        if stops_first and not backbone.image.left_out and backbone.origin is None:
            backbone.image.set_mask_token_to_mean_colour()
        paper, more = self.losses[: self.of_paper], self.losses[self.of_paper :]
        self._add_heads(paper, backbone)
        init_normal(self)
        # MLM before ITC, as in earlier versions; only ITC's heads draw random numbers here.
        for loss in reversed(paper):
            loss.init_heads(self, backbone)
        # Heads of further losses come after init_normal: the paper's heads draw the same random numbers with or
        # without them, and theirs keep their own initialisation.
        self._add_heads(more, backbone)
        for loss in more:
            loss.init_heads(self, backbone)
        self._freeze_unused(backbone)

    def _add_heads(self, parts: Sequence[PretrainingLoss], backbone: MaskVLM) -> None:
        for loss in parts:
            for name, head in loss.build(backbone).items():
                # add_module would silently replace a head of the same name.
                if hasattr(self, name):
                    raise UserError(f"model.task.losses: {loss.name}", f"its head {name} is there already", "Rename it")
                self.add_module(name, head)

    def _freeze_unused(self, backbone: MaskVLM) -> None:
        """Freeze the parts that no wanted loss reaches."""
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
        """As `Task.warm_start`; positions of the pixel decoder are resized to another image size.

        Raises:
            UserError: the checkpoint's contrast reads other tokens, or has vectors of another width.
        """
        theirs, own = heads.get("projection.image.weight"), self.state_dict().get("projection.image.weight")
        if theirs is not None and own is not None and theirs.shape[1] != own.shape[1]:
            reads = "class_and_mean" if self.contrastive.reads == "class" else "class"
            what = f"{self.contrastive.reads}, but contrast of the checkpoint reads {reads}"
            raise UserError("model.task.contrast_reads", what, f"Set it to {reads}")
        if theirs is not None and own is not None and len(theirs) != len(own):
            what = f"{len(own)}, but contrast of the checkpoint has vectors of width {len(theirs)}"
            raise UserError("model.task.contrast_dim", what, f"Set it to {len(theirs)}")
        # As the backbone's: the pixel decoder may know places, and the image may have another size.
        loaded = super().warm_start(resize_positions(heads, self))
        self.tokens_loaded = any(name.startswith("tokens.") for name in loaded)
        return loaded

    def compute_in_chunks(self, size: int) -> None:
        """As `Task.compute_in_chunks`. Raises UserError for a further loss that does not say that it adds up."""
        names = [loss.name for loss in self.losses if not loss.adds_up and loss.needs - {Need.IMAGE, Need.TEXT}]
        if names:
            todo = "Say so in its class (`adds_up`, see PretrainingLoss), or leave model.chunk out"
            raise UserError("model.chunk", f"the loss {names[0]} is not known to add up over chunks of a batch", todo)
        self.pairs_at_once = size

    def use_token_counts(self, count: Callable[[], Tensor]) -> None:
        # A head that a checkpoint brings has learned its bias.
        if self.weights["mlm"] and self.masked_tokens.from_words and not self.tokens_loaded:
            self.tokens.init_bias_from_counts(count())

    def forward(self, backbone: MaskVLM, batch: Batch) -> dict[str, Tensor]:
        # False in the phase that trains ITC alone.
        aligned = self.run_progress >= self.contrast_first
        step, matched, pairs = self.step(backbone, batch, aligned)
        if self.pairs_at_once is None:
            encoded, attention_CT = step.encoded, step.batch.attention_CT
            if not aligned:
                # A cross encoder projects every row that it is given: none but those of the few pairs.
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
            # Times 0: unused losses stay in the graph, so that every parameter has a gradient (DDP, FSDP).
            return {"itc": terms.pop("itc") + 0.0 * sum(terms.values())}
        return terms

    def in_chunks(self, backbone: MaskVLM, step: Step, matched: MatchingRows | None, pairs: int) -> dict[str, Tensor]:
        """The same losses, of which those that add up are computed for `chunk` pairs at a time; see `chunks.py`."""
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
            # A tensor among the arguments tells torch whose random numbers to draw again (dropout's). (chunks, losses):
            # chunks add up; the pairs that are not matched in the phase of contrast alone stay out.
            image_BLD = step.encoded.image_BLD
            of_chunk = [chunks.computed_again(of, rows, image_BLD) for rows in chunks.slices(pairs, self.pairs_at_once)]
            sums = torch.stack(of_chunk).sum(0)
            terms |= {loss.name: sums[place] for place, loss in enumerate(parts)}
        return {loss.name: terms[loss.name] for loss in self.losses}

    def step(self, backbone: MaskVLM, batch: Batch, aligned: bool) -> tuple[Step, MatchingRows | None, int]:
        """Everything that the losses read before the cross encoders, the rows that matching picks from, and how many of
        the pairs are masked and matched. `aligned`: contrast alone has been learned for long enough."""
        # Rows of other processes and of the queue are put beside the own ones: all texts need one length.
        queue = self.queue if aligned else None
        if world_size() > 1 or queue is not None:
            batch = pad_text(batch, backbone.text.text_length, backbone.text.pad_id)
        self.texts_per_image = len(batch.owner_C) // len(batch.valid_B)
        # One caption an image is masked and matched; contrast has all.
        batch, all_captions = first_and_all_captions(batch)
        # In the ITC-only phase one pair is masked and matched with weight 0: DDP and FSDP need a gradient for every
        # parameter.
        pairs = len(batch.valid_B) if aligned else 1
        masks = self.mask(backbone, batch, self.uniform, True, pairs)
        # A share of 1 is that of the whole run, also where no run counts its steps (run_progress is 1 there).
        frozen = self.image_learns < 1 and self.run_progress >= self.image_learns
        # Where the text encoder stops as well, ITC is only logged; else it still learns that one.
        still = frozen and self.aligned_stops
        stand = [backbone.image, *([backbone.text] if still else [])]
        # Contrast alone can do with some of the patches; the other losses read all positions.
        alone = not aligned or [loss.name for loss in self.losses] == ["itc"]
        with encoders_frozen(stand, frozen):
            subset_BV = self.sample_patches(backbone, batch) if alone else None
            exchanged = self.exchange(backbone, batch, pairs)
            encoded = self.encode(backbone, all_captions, masks, subset_BV, exchanged)
        # Contrast before negatives, which are drawn by its similarities; these before the pairs that are crossed.
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
        # After the draw: this step's pairs are among its candidates already.
        if queue is not None and self.training:
            queue.push(batch, encoded, contrast)
        settings = (self.masks_per_text, self.mask_both, still)
        step = Step(batch, all_captions, masks, encoded, contrast, negatives, nothing_crossed(encoded), {}, *settings)
        # Here, not in the losses: of chunks that are computed again the processes may not exchange anything.
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

    def late(self, backbone: MaskVLM) -> TrainingPhases:
        """With `contrast_first` the cross encoders, all heads but contrast's and a mask token behind the ViT train only
        after contrast has trained alone. Otherwise all parameters train from the start; the image encoder stops after
        `image_learns` of the steps."""
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
            batch: in training with one text an image; in evaluation an image has several.
            training: draw `masks_per_text` masks for each text, in adjacent rows, and masks for `masked_image_share`
                of the images; else one mask for each.
            pairs: how many of the pairs, from the first one on, are masked; None: all.
        """
        # In evaluation there are more texts than images: `pairs` is None, and all of both are masked.
        images = len(batch.valid_B) if pairs is None else pairs
        # With a single pair, as in the ITC-only phase, a valid masking may mask nothing.
        first = training and images > 1 and not self.masked_before
        masks_per_text, share = (self.masks_per_text, self.masked_image_share) if training else (1, 1.0)
        patch = token = None
        if Need.MASKED_IMAGE in self.needs or (self.mask_both and Need.MASKED_TEXT in self.needs):
            # The first images of the batch, which is in random order in training.
            valid_B, size = batch.valid_B[: max(1, round(share * images))], backbone.image.patch_size
            patch = self.image_masking(valid_B, backbone.image.grid, size, uniform, training)
            check_mask(self.image_masking, patch, PatchMask, (len(valid_B), math.prod(backbone.image.grid)))
            if first:
                check_masks_some(self.image_masking, patch.mask_BN, valid_B.any(), "patch")
        if Need.MASKED_TEXT in self.needs or (self.mask_both and Need.MASKED_IMAGE in self.needs):
            parts = (batch.token_CT, batch.special_CT, batch.word_CT)
            # (C, T) -> (C * masks_per_text, T), the maskings of a text side by side.
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
        """Two words exchanged in the captions of the first images, which are `exchanged_share` of the first `pairs`, at
        least one; None without such a share."""
        if not self.exchanged_share:
            return None
        first = max(1, round(self.exchanged_share * pairs))
        # The batch is in random order in training.
        token_ST, special_ST, word_ST = (part[:first] for part in (batch.token_CT, batch.special_CT, batch.word_CT))
        length, longest = token_ST.shape[1], backbone.text.text_length
        # Drawn for the longest text and then cut: what is drawn does not depend on padding, which depends on the number
        # of processes.
        uniform_STT = self.uniform(first, longest, longest)[:, :length, :length]
        return exchange_words(token_ST, special_ST, word_ST, backbone.text.word_embeddings, uniform_STT)

    def sample_patches(self, backbone: MaskVLM, batch: Batch) -> Tensor | None:
        """Numbers of the patches that contrast sees of each image, [B, V]; None: all."""
        patches = backbone.image.num_patches
        if self.contrast_patches == 1:
            return None
        noise_BN = self.uniform(len(batch.valid_B), patches)
        # The first V of a random order of the N patches: none comes twice.
        return noise_BN.argsort(dim=1)[:, : max(1, round(self.contrast_patches * patches))]

    def encode(
        self,
        backbone: MaskVLM,
        batch: Batch,
        masks: Masks,
        subset_BV: Tensor | None = None,
        exchanged: ExchangedCaptions | None = None,
    ) -> Encoded:
        """One pass of each encoder over the whole and the masked half of the batch. `batch` has all captions of its
        images, first those that are masked and matched; `subset_BV`: what is seen of the whole images."""
        image, token, attention, mask, visible = batch.image_BCHW, batch.token_CT, batch.attention_CT, None, None
        pairs, captions = len(image), len(token)
        # Whole images, then masked ones, in one batch; of the whole ones no patch is masked.
        if masks.patch is not None:
            masked_BN, visible = masks.patch.mask_BN, masks.patch.visible
            image = torch.cat([image, image[: len(masked_BN)]])
            mask = torch.cat([masked_BN.new_zeros(pairs, masked_BN.shape[1]), masked_BN])
        # All captions, then masked ones, each with the padding mask of its caption.
        if masks.token is not None:
            token = torch.cat([token, masks.token.token_CT])
            masked = attention[: len(masks.token.token_CT) // self.masks_per_text]
            attention = torch.cat([attention, masked.repeat_interleave(self.masks_per_text, 0)])
        behind = len(token)
        if exchanged is not None:
            token = torch.cat([token, exchanged.token_CT])
            attention = torch.cat([attention, batch.attention_CT[: len(exchanged.token_CT)]])
        # An unreadable image is blank: its features must not be cached under its row.
        row_B = batch.index_B.masked_fill(~batch.valid_B, -1)
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
            # Masked images train the mask token. Left in one graph with them, whole ones would get a gradient that
            # nothing reads.
            whole = whole.detach()
        if self.needs == {Need.IMAGE}:
            every_CTD = whole.new_zeros(captions, 0, whole.shape[-1])  # no loss reads texts
        else:
            every_CTD = chunks.encoded_in_chunks(
                backbone.text, self.pairs_at_once, len(token), lambda rows: (token[rows], attention[rows])
            )
        # (all rows, T, D) -> first captions (B), further captions, masked captions, exchanged ones
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
        """Unit vectors of all processes. Where no contrast is learned all are zero, and negatives are drawn uniformly.
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
            # As wide as they would be: a queue of them is kept in checkpoints.
            image = text = encoded.image_BLD.new_zeros(pairs, self.contrastive.width, dtype=torch.float32)
            scale = torch.ones((), device=image.device)
        return gather_contrast(all_captions, image, text, scale)

    def negatives(self, contrast: Contrast, pairs: int) -> tuple[Negatives, Negatives] | None:
        """A hard caption for each of the first `pairs` images and a hard image for each of their captions, by their
        numbers in the global batch or, after it, in the queue; None where no loss needs pairs."""
        if Need.PAIRS not in self.needs:
            return None
        image, text, image_all, text_all, scale, _, excluded, _ = contrast
        with torch.no_grad():
            # One exclusion serves both directions: whether two pairs share image or text does not depend on the side.
            drawn = [
                draw_hard_negatives(similarity(*pair, scale), excluded, self.uniform(*excluded.shape))
                for pair in ((image, text_all), (text, image_all))
            ]
        # Drawn for the whole batch and then cut: the random numbers do not depend on `pairs`.
        first = [Negatives(index_B[:pairs], weight_B[:pairs]) for index_B, weight_B in drawn]
        return first[0], first[1]

    def pixel_target(self, image_BCHW: Tensor, index_BK: Tensor) -> Tensor:
        """What masked pixels are compared with, see `MaskedPixels.target`."""
        return self.masked_pixels.target(image_BCHW, index_BK)

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Chance level of each loss that is computed; of some it is missing until a batch was seen."""
        levels = {loss.name: loss.chance(batch_size, self.texts_per_image) for loss in self.losses}
        return {name: level for name, level in levels.items() if level is not None}

    def card(self) -> dict[str, Any]:
        """How retrieval is re-ranked; not at all without matching (k is 0)."""
        k = self.measure.rerank_k if self.weights["itm"] else 0
        return {"rerank_k": k, "rerank_contrast": self.rerank_contrast}

    def resume_state(self) -> dict[str, Tensor]:
        """The queue of negatives, once it holds some."""
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
    """Crossed features of 0 rows, for a step in which the cross encoders are not read, or not run yet."""
    none_D = encoded.image_BLD[:0, 0]
    return Crossed(encoded.image_BLD[:0], encoded.text_BTD[:0], Fused(none_D, none_D))


def count_exchanged(texts: Negatives, exchanged: ExchangedCaptions) -> Negatives:
    """The hard captions and their weights; an exchanged one counts even if the batch has no negative for its image."""
    first = len(exchanged.changed_C)
    there_S = torch.maximum(texts.weight_B[:first], exchanged.changed_C.to(texts.weight_B))
    return texts._replace(weight_B=torch.cat([there_S, texts.weight_B[first:]]))


MASK_FIELDS: dict[type, tuple[dict[str, torch.dtype], str, str]] = {
    PatchMask: ({"mask_BN": torch.bool}, "index_BK", "weight_BK"),
    TokenMask: ({"token_CT": torch.int64, "mask_CT": torch.bool}, "index_CK", "weight_CK"),
}
"""Kind of mask -> its fields with an entry for every position, with dtypes; its field with the positions that the loss
reads; its field with their weights."""


def check_mask(masking: ImageMasking | TextMasking, mask: object, kind: type, shape: tuple[int, int]) -> None:
    """Raises UserError where a masking, which may be a plug-in, returned anything but a mask of this shape: rows by
    patches or tokens."""
    where = f"model.task: {type(masking).__name__}"
    if not isinstance(mask, kind):
        raise UserError(where, f"gave a {type(mask).__name__}", f"Return a masking.{kind.__name__}")
    whole, index, weight = MASK_FIELDS[kind]
    for name, dtype in {**whole, index: torch.int64, weight: None}.items():
        value = getattr(mask, name)
        if not isinstance(value, Tensor):
            raise UserError(where, f"gave a {type(value).__name__} as {name}", f"See masking.{kind.__name__}")
        # Index and weight have one column for each place that the loss looks at.
        wanted = shape if name in whole else (shape[0], *getattr(mask, index).shape[1:])
        fits = value.is_floating_point() if dtype is None else value.dtype == dtype
        if value.shape != wanted or not fits:
            what = f"gave {name} of shape {list(value.shape)}, {value.dtype}"
            todo = f"Return {list(wanted)}, {dtype or 'floating point'}, see masking.{kind.__name__}"
            raise UserError(where, what, todo)


def check_masks_some(masking: ImageMasking | TextMasking, mask: Tensor, could: Tensor, what: str) -> None:
    """Raises UserError where a plug-in masking masks nothing of a batch that could be masked. It synchronises host
    and device, so only the first step calls it. The built-in maskings are exempt: their ratio may be 0."""
    if not isinstance(masking, RandomBlocks | RandomTokens) and bool(could) and not bool(mask.any()):
        where = f"model.task: {type(masking).__name__}"
        raise UserError(where, f"masks no {what} of the first batch", "Check its rule; its loss would learn nothing")


def scalar(loss: PretrainingLoss, value: Tensor) -> Tensor:
    """The value of a loss. Raises UserError where it is no scalar tensor, which a plug-in may give."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    what = f"gave a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"gave {value!r:.60}"
    todo = "Return a scalar tensor, the mean over the batch"
    raise UserError(f"model.task.losses: {type(loss).__name__}", what, todo)
