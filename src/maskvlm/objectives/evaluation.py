"""What pre-training is judged by: retrieval, and each masked loss with the right partner, a wrong one and none.

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
    """Takes in evaluation batches and computes the metrics of an epoch.

    The wrong partner is the next row's in the batch; a batch of one image has none. "None" is an image of
    the mean colour (zeros after normalisation) or a caption without words. Masks depend on the batch's place
    in the data set and on its size (`eval_batch_size`), on what is masked and how, and on the kind of device alone, so
    that every checkpoint of an objective is asked the same, by any number of processes, as long as there are as many
    batches of that size as processes, the last of them perhaps smaller (`data.sampler.size_for_all`). Objectives of
    which one masks images and the other does not are asked about other words.

    Args:
        rerank_k: candidates a query that matching looks at again.
        contrast: share of contrast's logit beside the log-odds of matching, see `rerank.score_gallery`.
        chunk: pairs at once in the cross encoders when it does.

    Attributes:
        known_images: features of some images of the last evaluation (`novelty.sample_of`); None before one.
    """

    def __init__(self, rerank_k: int, contrast: float = 0.0, chunk: int = CHUNK) -> None:
        self.rerank_k, self.rerank_contrast, self.chunk = rerank_k, contrast, chunk
        self.known_images: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.batches: list[EncodedBatch] = []
        self.features: list[tuple[int, Tensor]] = []  # with the place of their first image
        self.masked_words: list[Tensor] = []

    @torch.no_grad()
    def update(self, task: "MaskedPretraining", backbone: MaskVLM, batch: Batch) -> None:
        """One batch: images with all their captions."""
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
        """What losses say of themselves, see `PretrainingLoss.measure`.

        Raises:
            UserError: values and weights of other shapes (2).
        """
        for loss in task.losses:
            for key, (value, weight) in loss.measure(task, evaluated).items() if loss.weight else ():
                # Of other shapes the two would be spread over each other.
                if value.shape != weight.shape:
                    what = f"{key} has values {list(value.shape)} and weights {list(weight.shape)}"
                    where, todo = f"model.task.losses: {type(loss).__name__}.measure", "Give two tensors of one shape"
                    raise UserError(where, what, todo)
                self.add(f"{loss.name}/{key}", value.float(), weight.float())

    def update_mlm(
        self, task: "MaskedPretraining", backbone: MaskVLM, batch: Batch, masks: Masks, image_BLD: Tensor
    ) -> None:
        """Masked-word accuracy (percent) and nats with the image, another one, and none."""
        assert masks.token is not None
        owner, rows = batch.owner_C, len(image_BLD)
        masked_CTD = backbone.text(masks.token.token_CT, batch.attention_CT)
        blank_1LD = backbone.image(torch.zeros_like(batch.image_BCHW[:1]))
        # Row B, behind the images, is the blank one: keys and values are projected once for all three partners.
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
            # (C, K, V) -> (C, V, K): cross_entropy wants classes on the second axis.
            nats_CK = F.cross_entropy(logits_CKV.transpose(1, 2), target_CK, reduction="none")
            self.add(f"mlm/accuracy{name}", 100.0 * (logits_CKV.argmax(-1) == target_CK), weight_CK)
            self.add(f"mlm/nats{name}", nats_CK, weight_CK)

    def update_mim(
        self, task: "MaskedPretraining", backbone: MaskVLM, batch: Batch, masks: Masks, text_CTD: Tensor
    ) -> None:
        """Masked-pixel error with the caption, another one, and none; one caption an image, in turn."""
        assert masks.patch is not None
        chosen_B = one_text(batch)
        text_BTD, attention_BT = text_CTD[chosen_B], batch.attention_CT[chosen_B]
        # "None" is the caption without words: its start and end token moved together to the front, so that they have
        # the first positions.
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
            # The way of training: cross encoder, then decoder, both on the same text.
            out_BLD = backbone.cross_image(masked_BLD, backbone.cross_image.context(words_BTD, mask_BT)).full_RLD
            predicted_BKP = task.pixels(out_BLD, words_BTD, mask_BT, masks.patch.index_BK)
            self.pixel_errors(name, predicted_BKP.float(), target_BKP, weight_BK, objects_BKP)

    def pixel_errors(
        self, name: str, predicted: Tensor, target: Tensor, weight_BK: Tensor, objects_BKP: Tensor | None
    ) -> None:
        """Add the error of all masked patches and, where the data marks objects, of the values that show one."""
        for key, kind in (("mse", "squared"), ("l1", "l1")):
            error_BKP = pixel_error(predicted, target, kind)  # type: ignore[arg-type]
            self.add(f"mim/{key}{name}", error_BKP.mean(-1), weight_BK)
            if objects_BKP is not None:
                self.add(f"mim/object_{key}{name}", error_BKP, objects_BKP)

    def add(self, name: str, value: Tensor, weight: Tensor) -> None:
        """A weighted mean over the evaluation, by exact sums (`math.fsum`). torchmetrics' MeanMetric adds in float32,
        in the order of the batches: over 79 batches it is off by up to 2e-7 of the value, and two processes that share
        them end on another last digit than one does in 12 of 20 cases."""
        self.sums[name].append((float((value * weight).sum()), float(weight.sum())))

    @torch.no_grad()
    def compute(self, task: "MaskedPretraining", backbone: MaskVLM) -> dict[str, float]:
        """All metrics; percent, nats, or error of normalised pixel values.

        Chance levels end in `_chance`: a random order, word frequencies, the mean colour of a batch's masked patches.
        `score` chooses the best checkpoint: the mean of the two R@1 and, where words are learned, of the accuracy of
        masked words. R@1 of a few images alone moves by points from chance, and not at all while contrast is frozen.
        Without contrast, it is minus the losses; where none of the four is learned, how far the run is.
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
                # `score` is the mean of the two R@1 so far: the mean of three has it twice.
                metrics["score"] = (2 * metrics["score"] + metrics["mlm/accuracy"]) / 3
        elif losses := [metrics[name] for name in ("mlm/nats", "mim/l1") if name in metrics]:
            metrics["score"] = -sum(losses)  # no contrast to retrieve with; higher is better
        elif task.run_progress < 1:
            metrics["score"] = task.run_progress  # nothing to choose by: the latest checkpoint counts as the best
        everywhere: list[Any] = gather_objects(self.features)
        # In the order of the split, whoever encoded what: the sample is the same for any number of processes.
        if features := sorted((part for one in everywhere for part in one), key=lambda part: part[0]):
            self.known_images = sample_of(torch.cat([part for _, part in features]))
        self.reset()
        return metrics

    def word_chance(self) -> dict[str, float]:
        """Always guessing the most frequent masked word, and the entropy of the masked words' frequencies."""
        shards: list[Any] = gather_objects([words.cpu() for words in self.masked_words])
        words = [part for shard in shards for part in shard]
        if not any(map(len, words)):
            return {}
        share_V = torch.cat(words).bincount().double() / max(1, sum(map(len, words)))
        entropy = float(torch.special.entr(share_V).sum())
        return {"mlm/accuracy_chance": 100 * float(share_V.max()), "mlm/nats_chance": entropy}

    def retrieval(self, task: "MaskedPretraining", backbone: MaskVLM, gallery: Gallery) -> dict[str, float]:
        """Recall@1/5/10 both ways over all captions, by contrast alone and re-ranked by matching."""
        matched = bool(task.weights["itm"])
        head, added = task.matching if matched else None, self.rerank_contrast * float(task.projection.logit_scale)
        scores = score_gallery(backbone, head, gallery, self.rerank_k, self.chunk, added)
        return retrieval_metrics(scores, rankings(scores, [0, self.rerank_k] if matched else [0]), self.rerank_k)


def gains(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the right partner is worth against a wrong one: in points and nats for words, in percent of the error
    for pixels."""
    values = {}
    if "mlm/accuracy_wrong_image" in metrics:
        values["mlm/accuracy_gain"] = metrics["mlm/accuracy"] - metrics["mlm/accuracy_wrong_image"]
        values["mlm/nats_gain"] = metrics["mlm/nats_wrong_image"] - metrics["mlm/nats"]
    for key in ("mim/mse", "mim/l1", "mim/object_mse", "mim/object_l1"):
        if wrong := metrics.get(f"{key}_wrong_text"):  # nothing to gain where even a wrong caption makes no error
            values[f"{key}_gain"] = 100 * (1 - metrics[key] / wrong)
    return values


def one_text(batch: Batch) -> Tensor:
    """Row of one caption for each image: its (index mod count)-th, so that all phrasings are met."""
    count_B = torch.bincount(batch.owner_C, minlength=len(batch.image_BCHW))
    # Captions stand in the order of their images.
    first_B = count_B.cumsum(0) - count_B
    return first_B + batch.index_B % count_B.clamp(min=1)
