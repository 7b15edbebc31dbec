"""Evaluation of pre-training: retrieval, and each masked loss with the right partner, a wrong one and none.

Shapes: B images, C captions, K masked positions, P values of a patch.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import Context, gather_positions
from maskvlm.model.heads import patchify
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.cross_batch import Masks
from maskvlm.objectives.loss_functions import mean_colour, pixel_error
from maskvlm.objectives.novelty import mean_patch, sample_of
from maskvlm.objectives.pretraining_losses import EvaluatedBatch
from maskvlm.objectives.rerank import CHUNK, EncodedBatch, Gallery, gather_gallery, offload, score_gallery
from maskvlm.objectives.retrieval_metrics import rankings, retrieval_metrics
from maskvlm.utils.distributed import Draw, gather_objects
from maskvlm.utils.errors import UserError

if TYPE_CHECKING:
    from maskvlm.objectives.pretraining import MaskedPretraining

EVAL_SEED = 20230501


class PretrainingMetrics:
    """Collects evaluation batches and computes the metrics of an epoch.

    The wrong partner is that of the next row in the batch. An image alone in its batch has none; with batches of three
    or more, `data.sampler.evaluation_batches` leaves none alone. "None" is an image of the mean colour (zeros after
    normalisation) or a caption without words.

    Masks depend only on the batch's position in the data set and its size (`eval_batch_size`), on what is masked and
    how, and on the kind of device. Every checkpoint of an objective is therefore evaluated on the same masks, with any
    number of processes, provided that there are at least as many batches of that size as processes; the last may be
    smaller (`data.sampler.size_for_all`). Two objectives of which only one masks images get different masked words.

    Args:
        rerank_k: candidates per query that matching re-ranks.
        contrast: weight of the ITC logit added to the matching log-odds, see `rerank.score_gallery`.
        chunk: pairs per pass of the cross encoders in re-ranking.

    Attributes:
        known_images: features of a sample of the last evaluation's images (`novelty.sample_of`); None before the first.
    """

    def __init__(self, rerank_k: int, contrast: float = 0.0, chunk: int = CHUNK) -> None:
        self.rerank_k, self.rerank_contrast, self.chunk = rerank_k, contrast, chunk
        self.known_images: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Discard all batches."""
        self.sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.batches: list[EncodedBatch] = []
        self.features: list[tuple[int, Tensor]] = []  # with the index of their first image
        self.masked_words: list[Tensor] = []

    @torch.no_grad()
    def update(self, task: "MaskedPretraining", backbone: MaskVLM, batch: Batch) -> None:
        """Add one batch: images with all their captions."""
        draw = Draw(EVAL_SEED, int(batch.index_B[0]), batch.token_CT.device)
        masks = task.mask(backbone, batch, draw.local)
        image_BLD = backbone.image(batch.image_BCHW)
        text_CTD = backbone.text(batch.token_CT, batch.attention_CT)
        self.features.append((int(batch.index_B[0]), mean_patch(image_BLD).cpu()))
        if task.weights["mlm"]:
            self.update_mlm(task, backbone, batch, masks, image_BLD)
        if task.weights["mim"]:
            self.update_mim(task, backbone, batch, masks, text_CTD)
        self.update_others(task, EvaluatedBatch(backbone, batch, masks, image_BLD, text_CTD))
        if task.weights["itc"]:
            self.batches.append(offload(task.projection, batch, image_BLD, text_CTD, matched=bool(task.weights["itm"])))

    def update_others(self, task: "MaskedPretraining", evaluated: EvaluatedBatch) -> None:
        """Add the losses' own metrics, see `PretrainingLoss.measure`.

        Raises:
            UserError: values and weights are no tensors, or differ in shape (2).
        """
        for loss in task.losses:
            measured: Any = loss.measure(task, evaluated) if loss.weight else {}
            where = f"model.task.losses: {type(loss).__name__}.measure"
            todo = "Return a dict: each metric by its name, as a pair of tensors: values and weights"
            if not isinstance(measured, Mapping):
                raise UserError(where, f"gave a {type(measured).__name__}", todo)
            for key, pair in measured.items():
                pair_of_tensors = isinstance(pair, tuple | list) and all(isinstance(part, Tensor) for part in pair)
                if not pair_of_tensors or len(pair) != 2:
                    raise UserError(where, f"gave {key} as {type(pair).__name__}", todo)
                value, weight = pair
                # Different shapes would be broadcast against each other.
                if value.shape != weight.shape:
                    what = f"{key} has values {list(value.shape)} and weights {list(weight.shape)}"
                    raise UserError(where, what, "Give two tensors of one shape")
                self.add(f"{loss.name}/{key}", value.float(), weight.float())

    def update_mlm(
        self, task: "MaskedPretraining", backbone: MaskVLM, batch: Batch, masks: Masks, image_BLD: Tensor
    ) -> None:
        """Masked-word accuracy (percent) and cross-entropy (nats) with the image, a wrong one, and none."""
        assert masks.token is not None
        owner, rows = batch.owner_C, len(image_BLD)
        masked_CTD = backbone.text(masks.token.token_CT, batch.attention_CT)
        blank_1LD = backbone.image(torch.zeros_like(batch.image_BCHW[:1]))
        # Row B, after the images, is the blank one: keys and values are projected once for all three partners.
        context = backbone.cross_text.context(torch.cat([image_BLD, blank_1LD]))
        target_CK = batch.token_CT.gather(1, masks.token.index_CK)
        weight_CK = masks.token.weight_CK
        self.masked_words.append(target_CK[weight_CK > 0])
        partners = {"": owner, "_wrong_image": (owner + 1) % rows, "_no_image": torch.full_like(owner, rows)}
        for name, image_row_C in partners.items():
            if rows == 1 and name == "_wrong_image":
                continue
            crossed = backbone.cross_text(masked_CTD, Context(context.blocks, None, image_row_C), batch.attention_CT)
            logits_CKV = task.tokens(gather_positions(crossed.full_RLD, masks.token.index_CK)).float()
            # (C, K, V) -> (C, V, K): cross_entropy expects classes on the second axis.
            nats_CK = F.cross_entropy(logits_CKV.transpose(1, 2), target_CK, reduction="none")
            self.add(f"mlm/accuracy{name}", 100.0 * (logits_CKV.argmax(-1) == target_CK), weight_CK)
            self.add(f"mlm/nats{name}", nats_CK, weight_CK)

    def update_mim(
        self, task: "MaskedPretraining", backbone: MaskVLM, batch: Batch, masks: Masks, text_CTD: Tensor
    ) -> None:
        """Masked-pixel error with the caption, a wrong one, and none; one caption per image (see `one_text`)."""
        assert masks.patch is not None
        chosen_B = one_text(batch)
        text_BTD, attention_BT = text_CTD[chosen_B], batch.attention_CT[chosen_B]
        # "None" is the caption without words: only its start and end tokens, moved to the first positions.
        empty_BT = batch.special_CT[chosen_B] & attention_BT
        order_BT = empty_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        empty_BTD = backbone.text(batch.token_CT[chosen_B].gather(1, order_BT), empty_BT.gather(1, order_BT))
        # Masked images and targets are the same for all three captions.
        masked_BLD = backbone.image(batch.image_BCHW, masks.patch.mask_BN, None, masks.patch.visible)
        target_BKP = task.pixel_target(batch.image_BCHW, masks.patch.index_BK)
        weight_BK, objects_BKP = masks.patch.weight_BK, None
        if batch.foreground_BHW is not None:
            objects_BCHW = batch.foreground_BHW[:, None].expand(-1, 3, -1, -1).float()
            # 1.0 at each pixel value of a masked patch that shows an object.
            inside_BKP = gather_positions(patchify(objects_BCHW, backbone.image.patch_size), masks.patch.index_BK)
            objects_BKP = inside_BKP * weight_BK[..., None]
        level_BKP = mean_colour(target_BKP, weight_BK).expand_as(target_BKP)
        self.pixel_errors("_chance", level_BKP, target_BKP, weight_BK, objects_BKP)
        partners = (
            ("", text_BTD, attention_BT),
            ("_wrong_text", text_BTD.roll(-1, 0), attention_BT.roll(-1, 0)),
            ("_no_text", empty_BTD, empty_BT.gather(1, order_BT)),
        )
        for name, words_BTD, mask_BT in partners:
            if len(words_BTD) == 1 and name == "_wrong_text":
                continue
            # As in training: cross encoder, then decoder, both with the same text.
            out_BLD = backbone.cross_image(masked_BLD, backbone.cross_image.context(words_BTD, mask_BT)).full_RLD
            predicted_BKP = task.pixels(out_BLD, words_BTD, mask_BT, masks.patch.index_BK)
            self.pixel_errors(name, predicted_BKP.float(), target_BKP, weight_BK, objects_BKP)

    def pixel_errors(
        self, name: str, predicted: Tensor, target: Tensor, weight_BK: Tensor, objects_BKP: Tensor | None
    ) -> None:
        """Add the error of all masked patches and, if the data marks objects, of the pixel values that show one."""
        for key, kind in (("mse", "squared"), ("l1", "l1")):
            error_BKP = pixel_error(predicted, target, kind)  # type: ignore[arg-type]
            self.add(f"mim/{key}{name}", error_BKP.mean(-1), weight_BK)
            if objects_BKP is not None:
                self.add(f"mim/object_{key}{name}", error_BKP, objects_BKP)

    def add(self, name: str, value: Tensor, weight: Tensor) -> None:
        """Add to a weighted mean over the evaluation, computed from exact sums (`math.fsum`). torchmetrics' MeanMetric
        adds in float32, in batch order: over 79 batches its relative error reaches 2e-7, and in 12 of 20 cases two
        processes end with a different last digit than one."""
        self.sums[name].append((float((value * weight).sum()), float(weight.sum())))

    @torch.no_grad()
    def compute(self, task: "MaskedPretraining", backbone: MaskVLM) -> dict[str, float]:
        """All metrics, in percent, nats, or error of normalised pixel values.

        Chance levels end in `_chance`: a random order, word frequencies, the mean colour of a batch's masked patches.
        `score` selects the best checkpoint: the mean of the two R@1 and, with MLM, the masked-word accuracy. With few
        images, R@1 alone moves by points at random, and it does not change at all while contrast is frozen. Without
        contrast, `score` is minus the sum of `mlm/nats` and `mim/l1`, as far as they are measured. With neither
        contrast nor MLM nor MIM, it is the run's progress, and outside a run there is none.
        """
        metrics = {}
        shards: list[Any] = gather_objects(dict(self.sums))  # a process may have had no batch at all
        for name in dict.fromkeys(name for shard in shards for name in shard):
            parts = [part for shard in shards for part in shard.get(name, ())]
            total, weight = (math.fsum(column) for column in zip(*parts, strict=True))  # exact in any order
            metrics[name] = total / weight if weight else math.nan
        metrics |= gains(metrics)
        metrics |= self.word_chance()
        gallery = gather_gallery(self.batches)
        if gallery is not None:
            metrics |= self.retrieval(task, backbone, gallery)
            if math.isfinite(metrics.get("mlm/accuracy", math.nan)):  # no word may have been masked
                # `score` is the mean of the two R@1 so far, so it counts twice in the mean of three.
                metrics["score"] = (2 * metrics["score"] + metrics["mlm/accuracy"]) / 3
        elif losses := [metrics[name] for name in ("mlm/nats", "mim/l1") if math.isfinite(metrics.get(name, math.nan))]:
            metrics["score"] = -sum(losses)  # no contrast to retrieve with; higher is better
        elif task.run_progress < 1:
            metrics["score"] = task.run_progress  # nothing to choose by: the latest checkpoint counts as the best
        everywhere: list[Any] = gather_objects(self.features)
        # In split order, so that the sample is the same for any number of processes.
        if features := sorted((part for one in everywhere for part in one), key=lambda part: part[0]):
            self.known_images = sample_of(torch.cat([part for _, part in features]))
        self.reset()
        return metrics

    def word_chance(self) -> dict[str, float]:
        """Accuracy of always guessing the most frequent masked word, and the entropy of the masked words."""
        shards: list[Any] = gather_objects([words.cpu() for words in self.masked_words])
        words = [part for shard in shards for part in shard]
        if not any(map(len, words)):
            return {}
        share_V = torch.cat(words).bincount().double() / max(1, sum(map(len, words)))
        entropy = float(torch.special.entr(share_V).sum())
        return {"mlm/accuracy_chance": 100 * float(share_V.max()), "mlm/nats_chance": entropy}

    def retrieval(self, task: "MaskedPretraining", backbone: MaskVLM, gallery: Gallery) -> dict[str, float]:
        """Recall@1/5/10 in both directions over all captions, by contrast alone and re-ranked by matching."""
        matched = bool(task.weights["itm"])
        head, added = task.matching if matched else None, self.rerank_contrast * float(task.projection.logit_scale)
        scores = score_gallery(backbone, head, gallery, self.rerank_k, self.chunk, added)
        return retrieval_metrics(scores, rankings(scores, [0, self.rerank_k] if matched else [0]), self.rerank_k)


def gains(metrics: Mapping[str, float]) -> dict[str, float]:
    """Gain from the right partner over a wrong one: in points and nats for words, in percent of the error for
    pixels."""
    values = {}
    if "mlm/accuracy_wrong_image" in metrics:
        values["mlm/accuracy_gain"] = metrics["mlm/accuracy"] - metrics["mlm/accuracy_wrong_image"]
        values["mlm/nats_gain"] = metrics["mlm/nats_wrong_image"] - metrics["mlm/nats"]
    for key in ("mim/mse", "mim/l1", "mim/object_mse", "mim/object_l1"):
        if wrong := metrics.get(f"{key}_wrong_text"):  # nothing to gain where even a wrong caption makes no error
            values[f"{key}_gain"] = 100 * (1 - metrics[key] / wrong)
    return values


def one_text(batch: Batch) -> Tensor:
    """Row of one caption for each image: its (index mod count)-th, so that all phrasings are covered."""
    count_B = torch.bincount(batch.owner_C, minlength=len(batch.image_BCHW))
    # Captions are in the order of their images.
    first_B = count_B.cumsum(0) - count_B
    return first_B + batch.index_B % count_B.clamp(min=1)
