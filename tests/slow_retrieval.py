"""The retrieval task's step written out pair by pair: what the batched one must equal."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import slow_cross, toy_backbone, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.utils.distributed import Draw
from tasks.retrieval.task import HardNegatives, Retrieval


class Recorded(Retrieval):
    """Keeps the negatives of its last step."""

    hard: HardNegatives

    def negatives(self, *args: Any) -> HardNegatives:
        self.hard = super().negatives(*args)
        return self.hard


def build(**settings: Any) -> tuple[MaskVLM, Recorded]:
    """A step in which everything matters: weights far from their small start values."""
    backbone = toy_backbone()
    task = Recorded(**{"contrast_dim": 8, "rerank_k": 4, **settings})
    task.build(backbone)
    torch.manual_seed(5)
    for name, parameter in itertools.chain(backbone.named_parameters(), task.named_parameters()):
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.4)
        elif name != "projection.log_scale":
            parameter.data += 0.2 * torch.randn_like(parameter)
    task.set_uniform(Draw(7, 0, "cpu"))
    return backbone, task


def eventful_batch() -> Batch:
    """Eight images with two captions each: one image twice, a caption of two images, and a hole."""
    batch = toy_batch(8, captions=2, holes=(4,))
    image_id_B, text_id_C, image_BCHW = batch.image_id_B.clone(), batch.text_id_C.clone(), batch.image_BCHW.clone()
    image_id_B[1], image_BCHW[1] = image_id_B[0], image_BCHW[0]
    text_id_C[7] = text_id_C[4]  # the second of image 3 and the first of image 2
    return batch._replace(image_id_B=image_id_B, text_id_C=text_id_C, image_BCHW=image_BCHW)


class Slow:
    """The two losses of the negatives that `task` recorded: each row by itself, nothing padded."""

    def __init__(self, task: Recorded, backbone: MaskVLM, batch: Batch) -> None:
        self.task, self.backbone, self.batch = task, backbone, batch
        self.owner = batch.owner_C.tolist()
        self.images = batch.valid_B.nonzero().flatten().tolist()
        self.captions = [c for c, b in enumerate(self.owner) if b in self.images]
        self.image = [backbone.image(image[None])[0] for image in batch.image_BCHW]
        self.text = [self.read(c) for c in range(len(self.owner))]

    def read(self, row: int) -> Tensor:
        token_1T = self.batch.token_CT[row, self.batch.attention_CT[row]][None]
        return self.backbone.text(token_1T, torch.ones_like(token_1T, dtype=torch.bool))[0]

    def same(self, b: int, c: int) -> bool:
        """Caption c is of the image that b shows."""
        return bool(self.batch.image_id_B[b] == self.batch.image_id_B[self.owner[c]])

    def negative(self, b: int, c: int) -> bool:
        """Another image, none of whose captions says the same."""
        own_texts = self.batch.text_id_C[self.batch.owner_C == b]
        return not self.same(b, c) and bool((own_texts != self.batch.text_id_C[c]).all())

    def itc(self) -> Tensor:
        head = self.task.projection
        image = [F.normalize(head.image(x[0]), dim=0) for x in self.image]
        text = [F.normalize(head.text(x[0]), dim=0) for x in self.text]
        cosine = {(b, c): image[b] @ text[c] * head.log_scale.exp() for b in self.images for c in self.captions}
        means = []
        for queries in ([{(b, c) for c in self.captions} for b in self.images],
                        [{(b, c) for b in self.images} for c in self.captions]):  # fmt: skip
            terms = []
            for pairs in queries:
                positives = [cosine[pair] for pair in sorted(pairs) if self.same(*pair)]
                candidates = torch.stack([cosine[p] for p in sorted(pairs) if self.same(*p) or self.negative(*p)])
                terms.append(candidates.logsumexp(0) - torch.stack(positives).mean())
            means.append(torch.stack(terms).mean())
        return (means[0] + means[1]) / 2

    def itm(self) -> Tensor:
        captions, images = self.task.hard.text, self.task.hard.image
        pairs = [(self.owner[c], c, 1) for c in self.captions]
        pairs += [(int(images.index_B[c]), c, 0) for c in self.captions if images.weight_B[c]]
        pairs += [(b, int(captions.index_B[b]), 0) for b in self.images if captions.weight_B[b]]
        terms = []
        for b, c, match in pairs:
            image = slow_cross(self.backbone.cross_image, self.image[b], self.text[c])[0]
            text = slow_cross(self.backbone.cross_text, self.text[c], self.image[b])[0]
            terms.append(-self.task.matching.classify(image * text).log_softmax(0)[match])
        return torch.stack(terms).mean()
