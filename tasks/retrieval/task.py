"""Fine-tuned image-text retrieval: contrast over all captions of the batch, and matching with hard negatives
(paper sec. 4; heads and weights start from pre-training).

Shapes: B images and C captions of this process, G and H of all processes, L image positions, T tokens, D width,
E contrast width, M matching pairs.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskvlm.data.batch import Batch, Source
from maskvlm.model.heads import Matching, Projection, check_temperature
from maskvlm.model.init import init_normal
from maskvlm.model.maskvlm import Fused, MaskVLM
from maskvlm.objectives import chunks
from maskvlm.objectives import loss_functions as formulas
from maskvlm.objectives.cross_batch import MatchingRows, RowPool, contrast_targets, cross_pairs, matching_rows, pad_text
from maskvlm.objectives.evaluation import EVAL_SEED
from maskvlm.objectives.hard_negatives import Negatives, draw_hard_negatives
from maskvlm.objectives.image_ablation import ImageAblation
from maskvlm.objectives.loss_functions import ContrastTargets
from maskvlm.objectives.pretraining_losses import ImageTextContrast, ImageTextMatching
from maskvlm.objectives.rerank import CHUNK, EncodedBatch, Gallery, gather_gallery, offload, score_gallery
from maskvlm.objectives.retrieval_metrics import Ranking, Rankings, named, rankings, recall_of, retrieval_metrics
from maskvlm.objectives.task import Prediction, Task
from maskvlm.utils.distributed import Draw, gather, shared_count, world_size
from maskvlm.utils.errors import UserError, check_counts, check_least


class CaptionContrast(NamedTuple):
    """Unit vectors of this process's rows and of all processes' columns, the scale of their cosines, and the targets.

    image_BE ... text_HE: unit vectors. image_targets: [B, H] of images; text_targets: [C, G] of captions.
    """

    image_BE: Tensor
    text_CE: Tensor
    image_GE: Tensor
    text_HE: Tensor
    scale: Tensor
    image_targets: ContrastTargets
    text_targets: ContrastTargets


class HardNegatives(NamedTuple):
    """text: one hard caption for each image (B). image: one hard image for each caption (C)."""

    text: Negatives
    image: Negatives


class Retrieval(Task):
    """ITC + ITM, and recall in both directions.

    Args:
        weight_itc: weight of image-text contrast; 0 skips it, and the contrast that picks candidates stays as loaded
            from the checkpoint.
        weight_itm: weight of image-text matching; 0 skips it, and retrieval is by contrast alone.
        contrast_dim: width of the projections; None: that of the initial checkpoint, otherwise 256 (C).
        temperature: initial value, as in pre-training.
        rerank_k: candidates per query that matching re-scores (C; ALBEF: 256 for COCO, 128 for Flickr30k).
        sweep: match every image with every caption, and report R@1 for k = 0, 1, 2, 4, ... up to all.
        chunk: pairs per pass of the cross encoders in retrieval evaluation; bounds memory.
        image_ablation: control experiment: replace every image by noise.
        rerank_contrast: weight of the ITC logit that is added to the matching log-odds (0: matching alone, C;
            1: see `rerank.score_gallery`).

    Raises:
        UserError: a negative weight, both weights 0, a size below 1, or a contrast_dim other than the checkpoint's.
    """

    source_kind = Source
    stuck_hints = MappingProxyType({loss.name: loss.stuck_hint for loss in (ImageTextContrast, ImageTextMatching)})

    def __init__(
        self,
        weight_itc: float = 1.0,
        weight_itm: float = 1.0,
        contrast_dim: int | None = None,
        temperature: float = 0.07,
        rerank_k: int = 128,
        sweep: bool = False,
        chunk: int = CHUNK,
        image_ablation: bool = False,
        rerank_contrast: float = 0.0,
    ) -> None:
        super().__init__()
        check_least(0, {"model.task.rerank_contrast": rerank_contrast})
        check_least(0, {"model.task.weight_itc": weight_itc, "model.task.weight_itm": weight_itm})
        check_counts(
            1, {"model.task.contrast_dim": contrast_dim, "model.task.rerank_k": rerank_k, "model.task.chunk": chunk}
        )
        check_temperature(temperature)
        if not weight_itc and not weight_itm:
            raise UserError("model.task", "both loss weights are 0", "Give at least one weight above 0")
        self.weights = {"itc": weight_itc, "itm": weight_itm}
        self.contrast_dim, self.temperature = contrast_dim, temperature
        self.rerank_k, self.sweep, self.chunk = rerank_k, sweep, chunk
        self.blind = ImageAblation() if image_ablation else None  # its name in checkpoints
        self.rerank_contrast = rerank_contrast
        self.compares_examples = True
        self.pairs_at_once: int | None = None  # in training
        self.encodings: list[EncodedBatch] = []
        self.captions_per_image = 1.0  # captions per image in training, for the chance levels
        self.measured: dict[str, Any] = {}

    def build(self, backbone: MaskVLM) -> None:
        """The heads of `MaskedPretraining`, with the same names. What no loss reaches is frozen."""
        # Also without ITC: contrast picks the candidates for matching.
        self._project((self.contrast_dim or 256, backbone.width), backbone.width)
        if self.weights["itm"]:
            self.matching = Matching(backbone.width)
            init_normal(self.matching)
        unread = () if self.weights["itm"] else (backbone.cross_image, backbone.cross_text)
        backbone.freeze_for_task(backbone.image.mask_token, *unread)

    def _project(self, shape: Sequence[int], width: int) -> None:
        self.projection = Projection.shaped_as(shape, width, self.temperature)
        self.projection.requires_grad_(bool(self.weights["itc"]))

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """Also give the projections the checkpoint's width and inputs: random ones would lose the contrast that it has
        learned. Raises UserError as well if contrast is neither trained nor in the checkpoint."""
        theirs, own = heads.get("projection.image.weight"), self.projection.image
        if theirs is not None and theirs.shape != own.weight.shape:
            if self.contrast_dim is not None and len(theirs) != own.out_features:
                what = f"{self.contrast_dim}, but the checkpoint's projections are {len(theirs)} wide"
                raise UserError("model.task.contrast_dim", what, f"Leave it out, or give {len(theirs)}")
            self._project(theirs.shape, own.in_features)
        if theirs is None and not self.weights["itc"]:
            what = "0, but there is no checkpoint with contrast, which picks the candidates for matching"
            raise UserError("model.task.weight_itc", what, "Give a weight, or start from pre-training with contrast")
        return super().warm_start(heads)

    # ------------------------------------------------------------------ training

    def compute_in_chunks(self, size: int) -> None:
        self.pairs_at_once = size

    def forward(self, backbone: MaskVLM, batch: Batch) -> dict[str, Tensor]:
        # Texts are gathered, which needs the same shape in all processes.
        if world_size() > 1:
            batch = pad_text(batch, backbone.text.text_length, backbone.text.pad_id)
        self.captions_per_image = len(batch.owner_C) / len(batch.valid_B)
        if self.blind is not None:
            batch = batch._replace(image_BCHW=self.blind(batch.image_BCHW, self.uniform))
        # Noise differs in each step, so there is nothing to cache.
        row_B = None if self.blind is not None else batch.feature_row_B
        size, image, token, attention = self.pairs_at_once, batch.image_BCHW, batch.token_CT, batch.attention_CT
        image_BLD = chunks.encoded_in_chunks(
            backbone.image, size, len(image), lambda rows: (image[rows], None, None if row_B is None else row_B[rows])
        )
        text_CTD = chunks.encoded_in_chunks(
            backbone.text, size, len(token), lambda rows: (token[rows], attention[rows])
        )
        # ITC and ITM use the same features: each encoder runs once.
        contrast = self.contrast(batch, image_BLD, text_CTD)
        terms = {}
        if self.weights["itc"]:
            terms["itc"] = self.contrastive_loss(contrast, batch)
        if self.weights["itm"]:
            hard = self.negatives(contrast)
            rows, negatives = matching_rows(image_BLD, text_CTD, batch.attention_CT, hard)
            terms["itm"] = self.matching_loss(backbone, batch, rows, HardNegatives(*negatives))
        return terms

    def contrast(self, batch: Batch, image_BLD: Tensor, text_CTD: Tensor) -> CaptionContrast:
        """Contrast vectors of this process's batch and of the global batch, and their targets."""
        if self.training:
            self.projection.clamp_temperature()
        image_BE = self.projection.embed_image(image_BLD)
        text_CE = self.projection.embed_text(text_CTD, batch.attention_CT)
        return CaptionContrast(
            image_BE, text_CE, gather(image_BE), gather(text_CE), self.projection.logit_scale, *contrast_targets(batch)
        )

    def contrastive_loss(self, contrast: CaptionContrast, batch: Batch) -> Tensor:
        """ITC over all captions of an image: see `formulas.soft_contrastive`."""
        weight_B = batch.valid_B.float()
        weight_C = weight_B[batch.owner_C]
        counts = shared_count(weight_B.sum()), shared_count(weight_C.sum())
        return formulas.soft_contrastive(*contrast, weight_B, weight_C, *counts)

    @torch.no_grad()
    def negatives(self, contrast: CaptionContrast) -> HardNegatives:
        """Draw from the global batch, but never the same image, the same words, or unreadable images."""
        image, text, image_all, text_all, scale, image_targets, text_targets = contrast
        drawn = []
        # A hard text for each image, (B, H), then a hard image for each text, (C, G).
        for query, key, (positive, excluded) in ((image, text_all, image_targets), (text, image_all, text_targets)):
            logits = formulas.similarity(query, key, scale)
            drawn.append(draw_hard_negatives(logits, positive | excluded, self.uniform(*logits.shape)))
        return HardNegatives(*drawn)

    def matching_loss(self, backbone: MaskVLM, batch: Batch, rows: MatchingRows, hard: HardNegatives) -> Tensor:
        """ITM over M = 2C + B pairs, the first C matching and the others hard negatives: (image, its caption),
        (hard image, caption), (image, hard caption)."""
        weight_B, device = batch.valid_B.float(), batch.valid_B.device
        weight_C = weight_B[batch.owner_C]
        own_C, own_B = (torch.arange(len(x), device=device) for x in (weight_C, weight_B))
        image_M = torch.cat([batch.owner_C, rows.hard_image_C, own_B])
        text_M = torch.cat([own_C, own_C, rows.hard_text_B])
        weight_M = torch.cat([weight_C, weight_C * hard.image.weight_B, weight_B * hard.text.weight_B])
        match_M = torch.arange(len(weight_M), device=device) < len(weight_C)
        # Here, since processes must not communicate while chunks are recomputed.
        count = shared_count(weight_M.sum())

        # The tensor is unused: it tells torch which device's random state to restore for recomputation (dropout).
        def of(pairs: slice, image_ULD: Tensor) -> Tensor:
            fused_m = cross(backbone, rows, image_M[pairs], text_M[pairs])
            return formulas.matching(self.matching(fused_m.product_MD), match_M[pairs], weight_M[pairs], count)

        if self.pairs_at_once is None:
            return of(slice(None), rows.image_ULD)
        # There are about as many pairs of each of the three kinds, so a chunk has three times its pairs.
        parts = chunks.slices(len(weight_M), 3 * self.pairs_at_once)
        return torch.stack([chunks.computed_again(of, pairs, rows.image_ULD) for pairs in parts]).sum()

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Chance level of each loss. ITC: log of the number of columns, mean of both directions. ITM: entropy
        of its class prior, m of 2m + 1 pairs with m captions per image (0.6365 for one)."""
        # Of M = 2C + B pairs, C match, with C = m * B.
        share = self.captions_per_image / (2 * self.captions_per_image + 1)
        itc = math.log(max(batch_size, 1)) + math.log(self.captions_per_image) / 2
        itm = -share * math.log(share) - (1 - share) * math.log(1 - share)
        return {name: level for name, level in {"itc": itc, "itm": itm}.items() if self.weights[name]}

    # ------------------------------------------------------------------ evaluation

    def begin_evaluation(self) -> None:
        self.encodings = []

    @torch.no_grad()
    def update(self, backbone: MaskVLM, batch: Batch) -> None:
        image = batch.image_BCHW
        if self.blind is not None:
            # Depends only on the batch's position in the split, so that every checkpoint sees the same noise.
            image = self.blind(image, Draw(EVAL_SEED, int(batch.index_B[0]), image.device).local)
        image_BLD, text_CTD = backbone.image(image), backbone.text(batch.token_CT, batch.attention_CT)
        self.encodings.append(offload(self.projection, batch, image_BLD, text_CTD, matched=bool(self.weights["itm"])))

    @torch.no_grad()
    def compute(self, backbone: MaskVLM) -> dict[str, float]:
        """Recall@1/5/10 in percent and their sum (`rsum`), by contrast alone (`itc_`) and re-ranked; `k<k>_` and
        `k_all_` with the sweep."""
        # Gather what all processes encoded, and discard this process's share.
        gallery, self.encodings = gather_gallery(self.encodings), []
        self.predictions = []
        if gallery is None:
            return {}
        matched = bool(self.weights["itm"])
        # k is capped at the larger gallery; without matching it is 0.
        most = max(len(gallery.owner_C), len(gallery.index_B))
        k, head = min(self.rerank_k, most) if matched else 0, self.matching if matched else None
        added = self.rerank_contrast * float(self.projection.logit_scale)
        scores = score_gallery(backbone, head, gallery, None if self.sweep else k, self.chunk, added)
        # A sweep has matched every pair, so that each k only needs re-sorting.
        swept = sweep_ks(max(scores.contrast_BC.shape)) if self.sweep and matched else {}
        ranks = rankings(scores, sorted({0, k, *swept.values()}))
        self.predictions = predictions(gallery, ranks[k])
        self.measured = {"rerank_k": k, "captions_a_picture": round(len(gallery.owner_C) / len(gallery.index_B), 2)}
        metrics = retrieval_metrics(scores, ranks, k) | rsum(ranks[0], "itc_") | (rsum(ranks[k], "") if k else {})
        # At each k of the sweep, only R@1, in both directions.
        for name, at in swept.items():
            metrics |= named(recall_of(ranks[at].text, [1]), f"{name}_tr")
            metrics |= named(recall_of(ranks[at].image, [1]), f"{name}_ir")
        return metrics

    def card(self) -> dict[str, Any]:
        k = self.rerank_k if self.weights["itm"] else 0
        settings = {"rerank_k": k, "rerank_contrast": self.rerank_contrast, "sweep": self.sweep}
        return {**settings, "blind": self.blind is not None, **self.measured}


def cross(backbone: MaskVLM, rows: MatchingRows, image_M: Tensor, text_M: Tensor) -> Fused:
    """One pass of each cross encoder over M pairs, given their row indices."""
    image, text, attention = rows.image_ULD, rows.text_VTD, rows.attention_VT
    if len(image_M) < len(image):
        # A subset of the pairs: pass only the rows that they need.
        image, text, attention = image[image_M], text[text_M], attention[text_M]
        image_M = text_M = torch.arange(len(image_M), device=image.device)
    image_side, text_side = RowPool(image, None), RowPool(text, attention)
    return Fused(
        cross_pairs(backbone.cross_image, None, image_side, text_side, None, [image_M], [text_M]).cls_BD,
        cross_pairs(backbone.cross_text, None, text_side, image_side, None, [text_M], [image_M]).cls_BD,
    )


def sweep_ks(largest: int) -> dict[str, int]:
    """Name -> k of the sweep: 0, 1, 2, 4, ... and all, which is `largest`."""
    powers = [2**n for n in range(largest.bit_length()) if 2**n < largest]
    return {f"k{k}": k for k in [0, *powers]} | {"k_all": largest}


def rsum(directions: Rankings, name: str) -> dict[str, float]:
    """Sum of the six recalls, at most 600."""
    return {f"retrieval/{name}rsum": sum(sum(recall_of(ranked).values()) for ranked in directions)}


def predictions(gallery: Gallery, directions: Rankings) -> list[Prediction]:
    """The image retrieved for every caption, then the caption retrieved for every image; right: R@1.

    `index` has the retrieved image, then the true one. All captions of an image are true: the truth of a correct
    prediction is that caption, of a wrong one the image's first. `image ROW` is replaced by the photo's id on writing.
    """
    owner, images = gallery.owner_C.tolist(), [f"image {index}" for index in gallery.index_B.tolist()]
    captions = [text or f"caption {row}" for row, text in enumerate(gallery.texts)]
    # Backwards, so that an image's first caption is kept.
    first = {image: captions[row] for row, image in reversed(list(enumerate(owner)))}
    lines = []
    for row, (at, right) in enumerate(_firsts(directions.image)):
        name, index = f"caption {row}", gallery.index_B[[at, owner[row]]].tolist()
        words = gallery.texts[row], images[owner[row]], images[at]
        lines.append(_line(name, words, right, index, "image retrieval"))
    for row, (at, right) in enumerate(_firsts(directions.text)):
        words = images[row], captions[at] if right else first[row], captions[at]
        lines.append(_line(images[row], words, right, gallery.index_B[[row]].tolist(), "text retrieval"))
    return lines


def _firsts(ranking: Ranking) -> list[tuple[int, float]]:
    """First item of each query, with 1 if it is relevant, else 0."""
    return list(zip(ranking.top_Q.tolist(), (ranking.rank_Q == 0).double().tolist(), strict=True))


def _line(name: str, words: tuple[str, str, str], right: float, index: list[int], kind: str) -> Prediction:
    text, truth, prediction = words
    return Prediction(id=name, text=text, truth=truth, prediction=prediction, right=right, index=index, kind=kind)
