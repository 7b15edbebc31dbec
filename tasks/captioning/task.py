"""Captioning: write what an image shows, from left to right (C: a task of ALBEF's successors, not of the paper).

Shapes: B images, C captions, S tokens of a caption, L image positions, D width.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskvlm.data.batch import Batch, Source
from maskvlm.data.inputs import MarkedTexts
from maskvlm.data.text import no_words
from maskvlm.model.cross_attention import Context
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.model.text_decoder import TextDecoder, heads_to_start_from
from maskvlm.objectives.evaluation import EVAL_SEED
from maskvlm.objectives.image_ablation import ImageAblation
from maskvlm.objectives.loaded_model import Model, numbered
from maskvlm.objectives.masking import Uniform
from maskvlm.objectives.methods import Method
from maskvlm.objectives.task import Prediction, Task
from maskvlm.utils.distributed import Draw, gather_objects, shared_count
from maskvlm.utils.errors import check_least
from tasks.captioning.metrics import caption_metrics, cider_function, cider_of_images, usual_caption


class WrittenCaption(NamedTuple):
    """A caption, and the probability of its tokens, 0 to 1: the geometric mean, end token included."""

    caption: str
    probability: float


class CaptionedImage(NamedTuple):
    """An image of the evaluated split, by its row: what was written, and what people wrote."""

    row: int
    caption: str
    references: tuple[str, ...]


def caption_images(task: "Captioning", model: Model, examples: list[tuple[Any, ...]]) -> list[WrittenCaption]:
    """A `Method`: a caption of each image."""
    captions: list[WrittenCaption] = []
    for part, numbers in numbered(examples, model.batch_size):
        image_BCHW = model.pixels([image for (image,) in part], numbers)
        # Random numbers are asked for by the image ablation alone.
        context = task.look(model.backbone, image_BCHW, None, Draw(EVAL_SEED, 0, image_BCHW.device).local)
        captions += task.written(model.backbone, context, len(part))
    return captions


class Captioning(Task):
    """Teacher-forced cross-entropy of a caption's tokens; captions are searched with beams.

    The decoder looks at the image encoder's output, as the text cross encoder does whose weights it starts from. Both
    cross encoders and the text encoder, but for its word embeddings, have no part in it and are frozen.

    Args:
        beams: captions of an image that are searched at the same time; 1 is greedy search. The one of the highest mean
            log probability of its tokens is given.
        image_ablation: the control: noise in the place of every image.

    Raises:
        UserError: beams below 1; aac-metrics is missing, when the first step or evaluation begins.
    """

    name = "captioning"
    source_kind = Source
    methods = MappingProxyType({"caption": Method(caption_images, 1, "", "a caption of an image")})

    def __init__(self, beams: int = 3, image_ablation: bool = False) -> None:
        super().__init__()
        check_least(1, {"model.task.beams": beams})
        self.beams = beams
        self.blind = ImageAblation() if image_ablation else None  # its name in checkpoints
        self.judged = False  # whether the metrics are known to be installed
        self.texts: MarkedTexts | None = None
        self.own: list[CaptionedImage] = []
        self.measured: dict[str, Any] = {}

    def build(self, backbone: MaskVLM) -> None:
        """The decoder. What no loss reaches is frozen."""
        self.writer = TextDecoder(backbone, backbone.text.text_length)
        unread = [each for each in backbone.text.parameters() if each is not backbone.text.word_embeddings]
        backbone.freeze_for_task(*unread, backbone.cross_image, backbone.cross_text, backbone.image.mask_token)

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """Take over the token head of pre-training; the decoder has its weights already."""
        own_heads, copied = heads_to_start_from("writer", heads, self.state_dict())
        return super().warm_start(own_heads) | copied

    # ------------------------------------------------------------------ training

    def forward(self, backbone: MaskVLM, batch: Batch) -> dict[str, Tensor]:
        self.check_metrics()
        # An unreadable image is blank: its features must not be cached under its row.
        row_B = batch.index_B.masked_fill(~batch.valid_B, -1)
        context = self.look(backbone, batch.image_BCHW, row_B, self.uniform)
        likelihood_C = self.writer.log_likelihood(backbone, context, batch.token_CT, batch.attention_CT, batch.owner_C)
        valid_C = batch.valid_B[batch.owner_C].float()
        # Tokens that are predicted: all but the start token.
        count = (batch.attention_CT[:, 1:].sum(1) * valid_C).sum()
        return {self.name: -(likelihood_C * valid_C).sum() / shared_count(count).clamp(min=1)}

    def look(self, backbone: MaskVLM, image_BCHW: Tensor, row_B: Tensor | None, uniform: Uniform) -> Context:
        """What the decoder looks at: the image encoder's output.

        Args:
            row_B: place of each image in the training split, -1 of none, for features that are kept; None keeps none.
            uniform: random numbers of the image ablation.
        """
        if self.blind is not None:
            # The noise differs in each step: nothing to cache.
            image_BCHW, row_B = self.blind(image_BCHW, uniform), None
        return self.writer.decoder.context(backbone.image(image_BCHW, None, row_B))

    # ------------------------------------------------------------------ evaluation

    def check_metrics(self) -> None:
        """Before hours of training. Raises UserError (69) where the metrics are not installed."""
        if not self.judged:
            cider_function()
            self.judged = True

    def written(self, backbone: MaskVLM, context: Context, rows: int) -> list[WrittenCaption]:
        """A caption of each image that is looked at."""
        tokenizer: Any = backbone.text.tokenizer
        if self.texts is None or self.texts.tokenizer is not tokenizer:
            self.texts = MarkedTexts(tokenizer, backbone.text.text_length)
        start, end = self.texts.ends
        # The end token ends a caption; no other special token belongs in one, nor what the head has no logit for.
        special = [token for token in no_words(tokenizer, backbone.text.vocab_size) if token != end]
        searched = self.writer.search(backbone, context, rows, start, end, special, self.beams)
        texts = [self.texts.decode(row[1:]) for row in searched.token_BS.tolist()]
        probability = searched.mean_B.exp().tolist()
        return [WrittenCaption(*each) for each in zip(texts, probability, strict=True)]

    def begin_evaluation(self) -> None:
        self.own = []

    @torch.no_grad()
    def update(self, backbone: MaskVLM, batch: Batch) -> None:
        self.check_metrics()
        # From the batch's place in the split alone: every checkpoint sees the same noise.
        draw = Draw(EVAL_SEED, int(batch.index_B[0]), batch.image_BCHW.device)
        context = self.look(backbone, batch.image_BCHW, None, draw.local)
        captions = self.written(backbone, context, len(batch.image_BCHW))
        references: list[list[str]] = [[] for _ in captions]
        for row, text in zip(batch.owner_C.tolist(), batch.texts, strict=True):
            references[row].append(text)
        rows = zip(batch.index_B.tolist(), captions, references, strict=True)
        self.own += [CaptionedImage(row, one.caption, tuple(texts)) for row, one, texts in rows]

    def compute(self, backbone: MaskVLM) -> dict[str, float]:
        """CIDEr-D times 100 and BLEU in percent (`metrics.py`), each beside what the most frequent caption of the split
        reaches where it is given to all images (`_majority`). `score` is CIDEr-D."""
        shards: list[list[CaptionedImage]] = gather_objects(self.own)  # type: ignore[assignment]
        self.own, self.predictions = [], []
        images = sorted((one for shard in shards for one in shard), key=lambda one: one.row)
        if not images:
            return {}
        references = [one.references for one in images]
        ciders = cider_of_images([one.caption for one in images], references)
        self.predictions = [prediction_of(one, cider) for one, cider in zip(images, ciders, strict=True)]
        usual = usual_caption(references)
        self.measured = {"the most frequent caption": usual}
        metrics: dict[str, float] = {}
        for ending, texts in (("", [one.caption for one in images]), ("_majority", [usual] * len(images))):
            measured = caption_metrics(texts, references)
            metrics |= {f"{self.name}/{name}{ending}": value for name, value in measured.items()}
        return metrics | {f"{self.name}/examples": float(len(images)), "score": metrics[f"{self.name}/cider"]}

    def card(self) -> dict[str, Any]:
        return {
            "beams": self.beams,
            "chosen by": "mean log probability of the tokens, end token included",
            "cider": "CIDEr-D x 100, idf of the references that were measured on",
            "words": "letters and digits in lower case; the official script (PTB tokenizer) differs slightly",
            "blind": self.blind is not None,
            **self.measured,
        }


def prediction_of(one: CaptionedImage, cider: float) -> Prediction:
    """Its line of predictions.jsonl; truth: the first reference. No caption is simply right or wrong: `cider` is its
    CIDEr-D times 100, NaN where it has none."""
    name = f"image {one.row}"
    line = Prediction(
        id=name, text=name, truth=one.references[0], prediction=one.caption, right=None, index=[one.row], kind=""
    )
    return line if math.isnan(cider) else {**line, "measured": {"cider": cider}}
