"""The training step of the paper written out pair by pair: what the batched one must equal."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import PATCH, slow_cross, toy_backbone, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.cross_batch import Masks
from maskvlm.objectives.exchanged_words import ExchangedCaptions
from maskvlm.objectives.hard_negatives import Negatives
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.utils.distributed import Draw


class Recorded(MaskedPretraining):
    """Keeps the masks, negatives and exchanged captions of its last step."""

    masks: Masks
    last_negatives: tuple[Negatives, Negatives] | None
    exchanged: ExchangedCaptions | None

    def exchange(self, *args: Any) -> ExchangedCaptions | None:
        self.exchanged = super().exchange(*args)
        return self.exchanged

    def mask(self, *args: Any) -> Masks:
        self.masks = super().mask(*args)
        return self.masks

    def negatives(self, *args: Any) -> tuple[Negatives, Negatives] | None:
        self.last_negatives = super().negatives(*args)
        return self.last_negatives


def build(backbone: MaskVLM | None = None, **settings: Any) -> tuple[MaskVLM, Recorded]:
    """A step in which everything matters: weights far from their small start values."""
    backbone = backbone or toy_backbone()
    task = Recorded(**{"mask_block": 16, "decoder_layers": 1, "contrast_dim": 8, **settings})
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
    """An image with two captions, a caption of two images, and a hole."""
    batch = toy_batch(8, holes=(4,))
    image_id_B, text_id_C, image_BCHW = (
        batch.image_id_B.clone(),
        batch.text_id_C.clone(),
        batch.image_BCHW.clone(),
    )
    image_id_B[1], image_BCHW[1] = image_id_B[0], image_BCHW[0]
    text_id_C[3] = text_id_C[2]
    return batch._replace(image_id_B=image_id_B, text_id_C=text_id_C, image_BCHW=image_BCHW)


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": parameter.grad
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def each_token_a_word(batch: Batch) -> Batch:
    """The toys' words have two pieces; here every token is a word of its own."""
    number_CT = torch.arange(batch.token_CT.shape[1]).expand_as(batch.token_CT)
    return batch._replace(word_CT=number_CT.masked_fill(batch.special_CT, -1))


class Slow:
    """The losses of the masks and negatives that `task` recorded: each row by itself, nothing padded."""

    def __init__(self, task: Recorded, backbone: MaskVLM, batch: Batch) -> None:
        self.task, self.backbone, self.batch = task, backbone, batch
        self.valid = batch.valid_B.nonzero().flatten().tolist()
        rows = range(len(batch.image_BCHW))
        self.image = [backbone.image(batch.image_BCHW[r : r + 1])[0] for r in rows]
        self.text = [self.read(batch.token_CT[r], r) for r in rows]
        self.masked_image, self.masked_text = self.image, self.text
        if task.masks.patch is not None:
            mask = task.masks.patch.mask_BN
            self.masked_image = [backbone.image(batch.image_BCHW[r : r + 1], mask[r : r + 1])[0] for r in rows]
        if task.masks.token is not None:
            self.masked_text = [self.read(self.draws(r)[0], r) for r in rows]

    def draws(self, row: int) -> Tensor:
        """The maskings of one text, [draws, T]."""
        assert self.task.masks.token is not None
        return self.task.masks.token.token_CT.unflatten(0, (-1, self.task.masks_per_text))[row]

    def read(self, token_T: Tensor, row: int) -> Tensor:
        token_1T = token_T[self.batch.attention_CT[row]][None]
        return self.backbone.text(token_1T, torch.ones_like(token_1T, dtype=torch.bool))[0]

    def itc(self) -> Tensor:
        head, batch = self.task.projection, self.batch
        image = [F.normalize(head.image(x[0]), dim=0) for x in self.image]
        text = [F.normalize(head.text(x[0]), dim=0) for x in self.text]
        terms = []
        for i in self.valid:
            columns = [
                j
                for j in self.valid
                if i == j or (batch.image_id_B[i] != batch.image_id_B[j] and batch.text_id_C[i] != batch.text_id_C[j])
            ]
            for query, keys in ((image[i], text), (text[i], image)):
                logits = torch.stack([query @ keys[j] for j in columns]) * head.log_scale.exp()
                terms.append(-logits.log_softmax(0)[columns.index(i)])
        return torch.stack(terms).mean()

    def itm(self) -> Tensor:
        assert self.task.last_negatives is not None
        captions, images = self.task.last_negatives
        pairs = [(i, i, 1) for i in self.valid]
        pairs += [(i, int(captions.index_B[i]), 0) for i in self.valid if captions.weight_B[i]]
        pairs += [(int(images.index_B[i]), i, 0) for i in self.valid if images.weight_B[i]]
        terms = []
        for i, j, match in pairs:
            image = slow_cross(self.backbone.cross_image, self.image[i], self.text[j])[0]
            text = slow_cross(self.backbone.cross_text, self.text[j], self.image[i])[0]
            terms.append(-self.task.matching.classify(image * text).log_softmax(0)[match])
        return torch.stack(terms).mean()

    def mlm(self) -> Tensor:
        assert self.task.masks.token is not None
        partner = self.masked_image if self.task.mask_both else self.image
        terms = []
        for i, draw in itertools.product(self.valid, range(self.task.masks_per_text)):
            out = slow_cross(self.backbone.cross_text, self.read(self.draws(i)[draw], i), partner[i])
            masked_T = self.task.masks.token.mask_CT[i * self.task.masks_per_text + draw]
            for place in masked_T.nonzero().flatten().tolist():
                logits = self.task.tokens.vocabulary(out[place])
                terms.append(-logits.log_softmax(0)[self.batch.token_CT[i, place]])
        return torch.stack(terms).mean()

    def mim(self) -> Tensor:
        assert self.task.masks.patch is not None
        partner = self.masked_text if self.task.mask_both else self.text
        terms = []
        for i in self.valid:
            out = slow_cross(self.backbone.cross_image, self.masked_image[i], partner[i])
            out = slow_cross(self.task.pixels.blocks, out, partner[i])
            for n in self.task.masks.patch.mask_BN[i].nonzero().flatten().tolist():
                r, c = n // 4 * PATCH, n % 4 * PATCH
                target = self.batch.image_BCHW[i, :, r : r + PATCH, c : c + PATCH].permute(1, 2, 0).flatten()
                if self.task.masked_pixels.norm:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                d = self.task.pixels.pixels(out[1 + n]) - target
                terms.append(d.square().mean() if self.task.masked_pixels.kind == "squared" else d.abs().mean())
        return torch.stack(terms).mean()

    def spread(self) -> Tensor:
        """Standard deviation of each masked patch's pixels, from the image side's cross encoder alone."""
        assert self.task.masks.patch is not None
        partner = self.masked_text if self.task.mask_both else self.text
        terms = []
        for i in self.valid:
            out = slow_cross(self.backbone.cross_image, self.masked_image[i], partner[i])
            for n in self.task.masks.patch.mask_BN[i].nonzero().flatten().tolist():
                r, c = n // 4 * PATCH, n % 4 * PATCH
                patch_3X = self.batch.image_BCHW[i, :, r : r + PATCH, c : c + PATCH].flatten(1)
                deviation_3 = (patch_3X - patch_3X.mean(1, keepdim=True)).square().mean(1).sqrt()
                terms.append((self.task.spread(out[1 + n])[0] - deviation_3.mean()).square())
        return torch.stack(terms).mean()

    def words(self) -> Tensor:
        """Of each image the words of its text: seen where any position shows it, of which none may."""
        terms = []
        for i in self.valid:
            shown_LV = torch.sigmoid(self.task.detector(self.image[i]))
            absent_V = (1 - shown_LV).prod(0)
            special = {int(token) for token in self.batch.token_CT[self.batch.special_CT]}
            there = {int(token) for token in self.batch.token_CT[i]} - special
            nats = [-torch.log(1 - absent_V[v] if v in there else absent_V[v]) for v in range(len(absent_V))]
            terms.append(torch.stack(nats).sum() / max(1, len(there)))
        return torch.stack(terms).mean()
