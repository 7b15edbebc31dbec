"""Downstream classification: the base class of NLVR, visual entailment, VQA by classes, and other tasks that pair a
text with one or more images.

Shapes: B examples, P images per example, L image positions, T tokens, D width, K labels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from maskvlm.data.examples import ExampleBatch, ExampleSource, question_batch
from maskvlm.model.heads import Classifier, Matching, Projection, masked_mean
from maskvlm.model.init import init_normal, init_xavier
from maskvlm.model.maskvlm import Fused, MaskVLM
from maskvlm.objectives.answers import ScoredExample, ScoredExamples, by_kind, majority, percent
from maskvlm.objectives.image_ablation import ImageAblation
from maskvlm.objectives.loaded_model import Model, numbered
from maskvlm.objectives.loss_functions import mean_over
from maskvlm.objectives.masking import Uniform
from maskvlm.objectives.task import Task
from maskvlm.utils.distributed import Draw, shared_count
from maskvlm.utils.errors import UserError, check_choices, check_counts, check_shares

EVAL_SEED = 20230502
TOP_LABELS = 5  # labels reported per prediction
SCORING = ("projection.", "matching.")  # pre-training heads
Reads = Literal["fused", "scores"]


class LabelPrediction(NamedTuple):
    """The label, its probability, and the likeliest labels (including it) with their probabilities."""

    answer: str
    probability: float
    likeliest: dict[str, float]


class FusedExamples(NamedTuple):
    """Encoded images and texts, and their fused vectors. X = B * P: the images of an example are adjacent."""

    image_XLD: Tensor
    text_BTD: Tensor
    attention_BT: Tensor
    fused_X: Fused

    @property
    def fused_BX(self) -> Tensor:
        """The P fused vectors side by side, [B, P * 3 * D] (sec. 4, NLVR2; R)."""
        return self.fused_X.joined_MX.unflatten(0, (len(self.text_BTD), -1)).flatten(1)


class Classification(Task):
    """Fused vectors of the images with the text, concatenated, through two linear layers (paper sec. 4; R).

    A fused vector is the two class tokens and their product (C). The matching head uses only the product, which
    measures image-text agreement. A label can also depend on the text itself, so the class tokens are included here.

    Args:
        labels: the classes; linked from the data, not set by hand.
        images_per_example: 1 or more.
        hidden: width between the two layers; None: the backbone's width.
        dropout: dropout rate in the head, 0 to 1.
        image_ablation: control experiment: replace every image by noise.
        reads: input of the head: `fused` vectors (P), or `scores` (C): the text's class token and the mean of its
            tokens, unfused, plus each image's ITC logit and matching log-odds from the pre-training heads, which stay
            frozen. With a few hundred photos, fused vectors are soon memorised; two numbers cannot be.

    Attributes:
        name: prefix of the metrics.

    Raises:
        UserError: no labels, or two that are the same, `images_per_example` or `hidden` below 1, a share
            outside [0, 1], or `scores` from a checkpoint without the pre-training heads.
    """

    name = "classification"
    source_kind = ExampleSource

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        images_per_example: int = 1,
        hidden: int | None = None,
        dropout: float = 0.0,
        image_ablation: bool = False,
        reads: Reads = "fused",
    ) -> None:
        super().__init__()
        if labels is None:
            what = "it has no labels for the task to predict"
            raise UserError("data.source", what, "Choose the task's own data; in a script give labels=data.labels")
        check_label_names(labels)
        check_counts(1, {"model.task.images_per_example": images_per_example, "model.task.hidden": hidden})
        check_shares({"model.task.dropout": dropout})
        check_choices({"model.task.reads": (reads, get_args(Reads))})
        self.labels, self.images_per_example, self.hidden, self.dropout = (
            tuple(labels),
            images_per_example,
            hidden,
            dropout,
        )
        self.blind, self.reads = (
            ImageAblation() if image_ablation else None,
            reads,
        )  # `blind` is its name in checkpoints
        self.scored = ScoredExamples()

    def build(self, backbone: MaskVLM) -> None:
        width = backbone.width
        read = 3 * width * self.images_per_example if self.reads == "fused" else 2 * width + 2 * self.images_per_example
        self.head = Classifier(read, self.hidden or width, len(self.labels), self.dropout)
        init_xavier(self.head)
        if self.reads == "scores":
            # Pre-training heads are frozen; `warm_start` loads them.
            self.matching = Matching(width)
            init_normal(self.matching)
            self.matching.requires_grad_(False)
            self._project(Projection.shaped_as((256, width), width))
        backbone.freeze_for_task(backbone.image.mask_token)  # nothing is masked

    def _project(self, projection: Projection) -> None:
        self.projection = projection
        self.projection.requires_grad_(False)

    def heads_of_labels(self) -> tuple[str, ...]:
        return ("head.",)

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """Also give the projections the checkpoint's width and the inputs they have there.

        Raises:
            UserError: `reads` is `scores`, and the checkpoint lacks the heads for them.
        """
        if self.reads == "scores":
            missing = [name for name in self.state_dict() if name.startswith(SCORING) and name not in heads]
            if missing:
                what = f"scores, but there is no checkpoint that holds {missing[0]}"
                raise UserError("model.task.reads", what, "Set it to fused, or start from pre-training")
            width = self.projection.image.in_features
            self._project(Projection.shaped_as(heads["projection.image.weight"].shape, width))
        return super().warm_start(heads)

    def forward(self, backbone: MaskVLM, batch: ExampleBatch) -> dict[str, Tensor]:
        self.check_ready()
        logits_BK = self.logits(backbone, batch, self.uniform)
        weight_B = batch.valid_B.float()
        loss_B = self.loss(logits_BK.float(), batch.target_BK)
        return {self.name: mean_over(shared_count(weight_B.sum()), (loss_B * weight_B).sum())}

    def loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        """Cross-entropy of each example."""
        return F.cross_entropy(logits_BK, target_BK, reduction="none")

    def logits(self, backbone: MaskVLM, batch: ExampleBatch, uniform: Uniform) -> Tensor:
        """Logits of the labels, [B, K].

        Raises:
            UserError: the number of images per example is not `images_per_example`.
        """
        image = batch.image_BPCHW
        if image.shape[1] != self.images_per_example:
            what = f"the data has {image.shape[1]} images per example, but the task is set to {self.images_per_example}"
            raise UserError("model.task.images_per_example", what, f"Set it to {image.shape[1]}")
        row_B = batch.feature_row_B
        if self.blind is not None:
            # The noise differs in each step, so there is nothing to cache.
            image, row_B = self.blind(image, uniform), row_B.new_full(row_B.shape, -1)
        met = encode_and_fuse(backbone, image, batch.token_BT, batch.attention_BT, row_B)
        return self.head(met.fused_BX if self.reads == "fused" else self.scores(met))

    def scores(self, met: FusedExamples) -> Tensor:
        """The text's class token and mean token, then two numbers per image, [B, 2 * D + 2 * P]."""
        text_BTD, attention_BT = met.text_BTD, met.attention_BT
        # text_BTD is the text encoder's output, without image information.
        mean_BD = masked_mean(text_BTD, attention_BT)
        image_XE = self.projection.embed_image(met.image_XLD)
        text_BE = self.projection.embed_text(text_BTD, attention_BT)
        # (B * P, E) -> (B, P, E), times (B, 1, E), summed over E -> (B, P)
        cosine_BP = (image_XE.unflatten(0, (len(text_BE), -1)) * text_BE[:, None]).sum(2)
        unlike_X, like_X = self.matching(met.fused_X.product_MD).float().unbind(1)
        # ITC logit and matching log-odds of each image.
        scores_BP2 = torch.stack([cosine_BP * self.projection.logit_scale, (like_X - unlike_X).view_as(cosine_BP)], 2)
        return torch.cat([text_BTD[:, 0], mean_BD, scores_BP2.flatten(1)], 1)

    def begin_evaluation(self) -> None:
        self.scored = ScoredExamples()

    @torch.no_grad()
    def update(self, backbone: MaskVLM, batch: ExampleBatch) -> None:
        draw = Draw(EVAL_SEED, int(batch.index_B[0]), batch.image_BPCHW.device)
        best = self.logits(backbone, batch, draw.local).argmax(1).tolist()
        predicted = [self.labels[number] for number in best]
        correct = [
            self.correct(word, example["answers"]) for word, example in zip(predicted, batch.examples, strict=True)
        ]
        self.scored.add(batch, predicted, correct)

    def decisions(self, backbone: MaskVLM, batch: ExampleBatch) -> list[LabelPrediction]:
        """Predicted labels of examples without a known answer."""
        # Only the image ablation uses random numbers.
        draw = Draw(EVAL_SEED, 0, batch.image_BPCHW.device)
        return top_labels(self.probability(self.logits(backbone, batch, draw.local).float()), self.labels)

    def probability(self, logits_BK: Tensor) -> Tensor:
        """Probability of each label (softmax), [B, K]."""
        return logits_BK.softmax(1)

    def correct(self, prediction: str, answers: list[str]) -> float | None:
        """1 if the prediction equals the answer, else 0; None if there is no answer."""
        return float(prediction == answers[0]) if answers else None

    def compute(self, backbone: MaskVLM) -> dict[str, float]:
        """See `Task.compute`. Raises UserError if `extra_metrics` of a subclass gives no dict."""
        scored = self.scored.all()
        self.predictions = [one.line for one in scored]
        metrics = {f"{self.name}/accuracy": percent(scored)}
        metrics[f"{self.name}/accuracy_majority"] = majority(scored, self.correct)
        for kind, part in by_kind(scored).items():
            metrics[f"{self.name}/accuracy/{kind}"] = percent(part)
            metrics[f"{self.name}/accuracy/{kind}_majority"] = majority(part, self.correct)
        extra: Any = self.extra_metrics(scored)
        if not hasattr(extra, "items"):
            where = f"{type(self).__module__}.{type(self).__qualname__}.extra_metrics"
            todo = "Return a dict: each metric by its name, a number"
            raise UserError(where, f"gave a {type(extra).__name__}", todo)
        metrics |= {f"{self.name}/{key}": value for key, value in extra.items()}
        metrics[f"{self.name}/examples"] = float(len(scored))
        return metrics | {"score": metrics[f"{self.name}/accuracy"]}

    def extra_metrics(self, scored: list[ScoredExample]) -> dict[str, float]:
        """Further metrics of the task, without its prefix."""
        return {}

    def card(self) -> dict[str, Any]:
        return {
            "labels": len(self.labels),
            "pictures": self.images_per_example,
            "blind": self.blind is not None,
            "reads": self.reads,
        }

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Entropy of equally frequent labels."""
        return {self.name: float(torch.tensor(float(len(self.labels))).log())}


def check_label_names(labels: Sequence[str]) -> None:
    """Raise UserError unless these are texts, at least one, and all different."""
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise UserError("labels", f"{labels!r:.80} is not a list of texts", "Give a list, such as ['yes', 'no']")
    if not labels:
        raise UserError("labels", "there are none", "Give a list, such as ['yes', 'no']")
    label, times = Counter(labels).most_common(1)[0]
    if times > 1:
        raise UserError("labels", f"{label!r:.80} is given {times} times", "Give each label once")


def top_labels(probability_BK: Tensor, labels: Sequence[str]) -> list[LabelPrediction]:
    """The prediction for each row."""
    top = probability_BK.topk(min(TOP_LABELS, probability_BK.shape[1]))
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    named = [{labels[k]: p for k, p in zip(ks, ps, strict=True)} for ks, ps in rows]
    return [LabelPrediction(*next(iter(each.items())), each) for each in named]


def predict_labels(task: Classification, model: Model, examples: list[tuple[Any, ...]]) -> list[LabelPrediction]:
    """A `Method`: the task's prediction for each example, given as its images followed by its text."""
    predictions: list[LabelPrediction] = []
    for part, numbers in numbered(examples, model.batch_size):
        # All images of an example share its number.
        image_BPCHW = torch.stack(
            [model.pixels(example[:-1], [n] * (len(example) - 1)) for n, example in zip(numbers, part, strict=True)]
        )
        text = model.tokens([example[-1] for example in part])
        predictions += task.decisions(model.backbone, question_batch(image_BPCHW, text))
    return predictions


def encode_and_fuse(
    backbone: MaskVLM, image_BPCHW: Tensor, token_BT: Tensor, attention_BT: Tensor, row_B: Tensor | None = None
) -> FusedExamples:
    """One pass of each image with the same text.

    Args:
        row_B: index of each example in the training split for the feature cache, -1 for none; None: no caching.
    """
    images = image_BPCHW.shape[1]
    row_X = None
    if row_B is not None:
        # Each image of an example has its own row in the cache.
        row_BP = row_B[:, None] * images + torch.arange(images, device=row_B.device)
        row_X = row_BP.masked_fill(row_B[:, None] < 0, -1).flatten()
    # (B, P, 3, H, W) -> (X, 3, H, W); each text is encoded once and then repeated for its P images.
    image_XLD = backbone.image(image_BPCHW.flatten(0, 1), None, row_X)
    text_BTD = backbone.text(token_BT, attention_BT)
    text_XTD, attention_XT = (part.repeat_interleave(images, 0) for part in (text_BTD, attention_BT))
    return FusedExamples(image_XLD, text_BTD, attention_BT, backbone.fuse(image_XLD, text_XTD, attention_XT))
