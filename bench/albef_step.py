r"""Compares the built-in training step with a plain one, as related projects write it: steps of both in turn, and their
ratio.

    OMP_NUM_THREADS=1 PYTHONPATH=src python bench/albef_step.py                # MODEL=tiny, one thread
    OMP_NUM_THREADS=1 PYTHONPATH=src python bench/albef_step.py model=small data.batch_size=32 --steps 4

The plain step trains the same backbone, heads and four losses on the same batches. It is written only for this
comparison, after the public code of ALBEF (salesforce/ALBEF, models/model_pretrain.py), BLIP (models/blip_pretrain.py),
ViLT and METER (modules/objectives.py of each):

- matching runs the whole cross encoders twice, with the true pairs and with 2 B hard ones, and uses the class tokens of
  their outputs (ALBEF, BLIP);
- hard negatives are drawn one at a time by torch.multinomial(...).item(), and their features are stacked (ALBEF, BLIP);
- masked words and masked pixels have separate passes; logits and pixels are computed at every position, and the loss
  selects the masked ones (ALBEF and METER for words, ViLT for patches);
- attention is a product, an additive mask of 0 and -10000, and a softmax; images have a mask of ones (ALBEF, METER).
  The encoders use their libraries' equivalent: timm without fused_attn, transformers with eager attention;
- all features are gathered from all processes (BLIP, for retrieval);
- `plain`: contrast with matching, words, and pixels each encode their own inputs (`infer` in ViLT and METER), and texts
  are padded to the maximum length (BLIP, ViLT, METER);
- `plain, shared`: whole images and texts are encoded once for all, and padded to the longest of the batch (ALBEF).

Parts that would only make it slower are left out: the momentum model of ALBEF and BLIP (a second forward pass of nearly
everything) and its queue, and METER's other stream of the cross encoder where only one is used. Masks, optimiser and
clipping are those of our step. Pairs with the same image or caption are not negatives; in ALBEF they are, which would
change the losses. With the same weights, masks and negatives the losses equal ours up to rounding, which is checked
first. On a CPU, process time is measured, so that other work on the machine matters less.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from maskvlm.cli.bench import Bench
from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import run_command
from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import Attention, CrossEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.cross_batch import Masks, gather_contrast, pad_text
from maskvlm.objectives.loss_functions import pixel_error
from maskvlm.objectives.masking import TokenMask
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.lit import LitModel
from maskvlm.training.optim import build_adamw, parameter_groups
from maskvlm.utils.distributed import Draw, gather

FOUR_LOSSES = (
    "--model.task.weight_words=0", "--model.task.weight_spread=0",
    "--model.task.text_masking=null", "--model.task.masks_per_text=1", "--model.task.image_learns=1",
)  # fmt: skip
Indices = tuple[Sequence[int], Sequence[int]]
"""Row of the hard caption of each image, and row of the hard image of each caption."""


# ---------------------------------------------------------------------- the plain step


class PlainStep:
    """The four losses of `task`, with its heads and weights; see the top of this file.

    Args:
        shared: encode whole images and texts once, not for each objective, and do not pad texts further.
    """

    def __init__(self, backbone: MaskVLM, task: MaskedPretraining, shared: bool = False) -> None:
        if [loss.name for loss in task.losses] != ["itc", "itm", "mlm", "mim"] or task.mask_both:
            raise ValueError("the plain step has the paper's four losses alone")
        self.backbone, self.task, self.shared = backbone, task, shared

    def __call__(self, batch: Batch, masks: Masks | None = None, negatives: Indices | None = None) -> dict[str, Tensor]:
        """Losses by name. `masks` and `negatives` replace those that it would draw."""
        masks = self.task.mask(self.backbone, batch, self.task.uniform) if masks is None else masks
        if not self.shared:
            length, pad_id = self.backbone.text.text_length, self.backbone.text.pad_id
            batch, masks = pad_text(batch, length, pad_id), masks._replace(token=pad_masks(masks.token, length, pad_id))
        with explicit_attention(self.backbone):
            image_BLD, text_BTD = self.encode_image(batch), self.encode_text(batch)
            whole = (image_BLD, text_BTD) if self.shared else None
            contrast, similarities = self.contrast(batch, image_BLD, text_BTD)
            captions, images = map(draw_one_by_one, similarities) if negatives is None else negatives
            return {
                "itc": contrast,
                "itm": self.matching(batch, image_BLD, text_BTD, captions, images),
                "mlm": self.masked_words(batch, masks, whole),
                "mim": self.masked_pixels(batch, masks, whole),
            }

    def encode_image(self, batch: Batch, mask_BN: Tensor | None = None) -> Tensor:
        image_BLD: Tensor = self.backbone.image(batch.image_BCHW, mask_BN)
        return image_BLD

    def encode_text(self, batch: Batch, token_BT: Tensor | None = None) -> Tensor:
        text, token_BT = self.backbone.text, batch.token_CT if token_BT is None else token_BT
        features_BTD: Tensor = text.adapter(text.model(token_BT, batch.attention_CT.long()).last_hidden_state)
        return features_BTD

    def contrast(self, batch: Batch, image_BLD: Tensor, text_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The ITC loss, and the weight of each other row of the batch as a negative, in both directions."""
        head = self.task.projection
        head.clamp_temperature()
        image_BE, text_BE = head.embed_image(image_BLD), head.embed_text(text_BTD, batch.attention_CT)
        gathered = gather_contrast(batch, image_BE, text_BE, head.logit_scale)
        own_BG = F.one_hot(gathered.own_B, gathered.excluded_BG.shape[1]).bool()
        terms, weights = [], []
        for query_BE, key_GE in ((image_BE, gathered.text_GE), (text_BE, gathered.image_GE)):
            logits_BG = (gathered.scale * query_BE @ key_GE.T).masked_fill(
                gathered.excluded_BG & ~own_BG, float("-inf")
            )
            terms.append(F.cross_entropy(logits_BG, gathered.own_B))
            # Slightly more than the probability, as in BLIP: every row has a negative even once contrast is learned.
            weights.append((logits_BG.detach().softmax(1) + 1e-4).masked_fill(gathered.excluded_BG, 0.0))
        return (terms[0] + terms[1]) / 2, weights

    def matching(
        self, batch: Batch, image_BLD: Tensor, text_BTD: Tensor, captions: Sequence[int], images: Sequence[int]
    ) -> Tensor:
        """The ITM loss: a pass with the true pairs, and one with each image's hard caption and vice versa."""
        image_GLD, text_GTD, attention_GT = gather(image_BLD), gather(text_BTD), gather(batch.attention_CT)
        hard_image_BLD = torch.stack([image_GLD[row] for row in images])
        hard_text_BTD = torch.stack([text_GTD[row] for row in captions])
        hard_attention_BT = torch.stack([attention_GT[row] for row in captions])
        true_BD = self.fuse(image_BLD, text_BTD, batch.attention_CT)
        wrong_MD = self.fuse(
            torch.cat([image_BLD, hard_image_BLD]),
            torch.cat([hard_text_BTD, text_BTD]),
            torch.cat([hard_attention_BT, batch.attention_CT]),
        )
        logits_M2 = self.task.matching(torch.cat([true_BD, wrong_MD]))
        label_M = torch.cat([torch.ones(len(true_BD)), torch.zeros(len(wrong_MD))]).long().to(logits_M2.device)
        return F.cross_entropy(logits_M2, label_M)

    def fuse(self, image_MLD: Tensor, text_MTD: Tensor, attention_MT: Tensor) -> Tensor:
        """Product of the class tokens after both cross encoders, [M, D]."""
        there_ML = torch.ones(image_MLD.shape[:2], dtype=torch.bool, device=image_MLD.device)
        image_MLD, text_MTD = (
            cross(self.backbone.cross_image, image_MLD, there_ML, text_MTD, attention_MT),
            cross(self.backbone.cross_text, text_MTD, attention_MT, image_MLD, there_ML),
        )
        return image_MLD[:, 0] * text_MTD[:, 0]

    def masked_words(self, batch: Batch, masks: Masks, whole: tuple[Tensor, Tensor] | None) -> Tensor:
        """The MLM loss."""
        assert masks.token is not None
        image_BLD = self.encode_image(batch) if whole is None else whole[0]
        text_BTD = self.encode_text(batch, masks.token.token_CT)
        there_BL = torch.ones(image_BLD.shape[:2], dtype=torch.bool, device=image_BLD.device)
        read_BTD = cross(self.backbone.cross_text, text_BTD, batch.attention_CT, image_BLD, there_BL)
        target_BT = batch.token_CT.masked_fill(~masks.token.mask_CT, -100)
        return F.cross_entropy(self.task.tokens(read_BTD).float().flatten(0, 1), target_BT.flatten())

    def masked_pixels(self, batch: Batch, masks: Masks, whole: tuple[Tensor, Tensor] | None) -> Tensor:
        """The MIM loss."""
        assert masks.patch is not None
        mask_BN, part = masks.patch.mask_BN, self.task.masked_pixels
        text_BTD = self.encode_text(batch) if whole is None else whole[1]
        image_BLD = self.encode_image(batch, mask_BN)
        there_BL = torch.ones(image_BLD.shape[:2], dtype=torch.bool, device=image_BLD.device)
        for encoder in (self.backbone.cross_image, self.task.pixels.blocks):
            image_BLD = cross(encoder, image_BLD, there_BL, text_BTD, batch.attention_CT)
        # The class token precedes the patches.
        predicted_BNP = self.task.pixels.pixels(image_BLD[:, 1:]).float()
        every_BN = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN)
        error_BN = pixel_error(predicted_BNP, part.target(batch.image_BCHW, every_BN).float(), part.kind).mean(-1)
        return (error_BN * mask_BN).sum() / mask_BN.sum()


def cross(
    encoder: CrossEncoder, x_BLD: Tensor, attention_BL: Tensor, context_BSD: Tensor, attention_BS: Tensor
) -> Tensor:
    """Run all positions of all rows through all blocks."""
    place_LD = 0.0 if encoder.pos_embed is None else encoder.pos_embed[0]
    own, other = added_mask(attention_BL, x_BLD.dtype), added_mask(attention_BS, x_BLD.dtype)
    blocks: Any = encoder.blocks
    for block in blocks:
        first, second, third = block.norms
        x_BLD = first(x_BLD + block.dropout(attend(block.self_attention, x_BLD + place_LD, x_BLD, own)))
        x_BLD = second(x_BLD + block.dropout(attend(block.cross_attention, x_BLD + place_LD, context_BSD, other)))
        x_BLD = third(x_BLD + block.dropout(block.feed_forward(x_BLD)))
    return x_BLD


def attend(attention: Attention, asking_BLD: Tensor, context_BSD: Tensor, added_B11S: Tensor) -> Tensor:
    """Attention computed explicitly, [B, L, D]."""
    key, value = attention.keys_values(context_BSD)
    # (B, L, D) -> (B, H, L, D / H)
    query = attention.query(asking_BLD).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    score_BHLS = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + added_B11S
    mixed = score_BHLS.softmax(-1) @ value
    return attention.out(mixed.transpose(1, 2).flatten(2))


def added_mask(attention_BS: Tensor, kind: torch.dtype) -> Tensor:
    """0 for positions that may be attended to, -10000 for others, [B, 1, 1, S]."""
    return (1.0 - attention_BS[:, None, None, :].to(kind)) * -10000.0


def pad_masks(token: TokenMask | None, length: int, pad_id: int) -> TokenMask | None:
    """The masked texts, padded as `pad_text` pads the unmasked ones."""
    if token is None:
        return None
    extra = (0, length - token.token_CT.shape[1])
    return token._replace(token_CT=F.pad(token.token_CT, extra, value=pad_id), mask_CT=F.pad(token.mask_CT, extra))


def draw_one_by_one(weight_BG: Tensor) -> list[int]:
    """A negative for each row, drawn in proportion to its weights. A row with only zeros is an error, as in ALBEF."""
    return [int(torch.multinomial(weight_BG[row], 1).item()) for row in range(len(weight_BG))]


@contextlib.contextmanager
def explicit_attention(backbone: MaskVLM) -> Iterator[None]:
    """Context in which both encoders compute attention as a product, a mask and a softmax."""
    fused: list[Any] = [module for module in backbone.image.vit.modules() if getattr(module, "fused_attn", False)]
    config = backbone.text.model.config
    before = config._attn_implementation
    for module in fused:
        module.fused_attn = False
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True
        config._attn_implementation = before


# ---------------------------------------------------------------------- both, side by side


class Built(Bench):
    """Builds the configured model and data, and runs nothing."""

    model: LitModel

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def built(words: Sequence[str]) -> Built:
    """Model and data of `maskvlm bench` with these words and options, and the paper's four losses."""
    return run_command(Built, ["fit", *COMMANDS["bench"].full([*words, *FOUR_LOSSES])[1:]])


def batches_of(setup: Built, count: int) -> list[Batch]:
    """Training batches of the configured data. Also sets the model's tokenizer for them."""
    data, model = setup.datamodule, setup.model
    data.setup("fit")
    if data.tokenizer is not None:
        model.backbone.text.set_tokenizer(data.tokenizer)
    return [data.normalised(batch) for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]


def noise_batch(pairs: int, backbone: MaskVLM) -> Batch:
    """Noise images with texts of maximum length: the maximum cost of a step. No tokenizer is needed."""
    length, size = backbone.text.text_length, backbone.image.image_size
    backbone.text.tokenizer = SimpleNamespace(mask_token_id=4, pad_token_id=1)  # type: ignore[assignment]
    there = torch.ones(pairs, length, dtype=torch.bool)
    token = torch.randint(5, backbone.text.vocab_size, (pairs, length))
    number, image = torch.arange(pairs), torch.randn(pairs, 3, size, size)
    special = torch.zeros_like(there)
    special[:, [0, -1]] = True
    word = torch.arange(length).expand(pairs, -1).masked_fill(special, -1)
    return Batch(image, token, there, special, word, number, number, number, there[:, 0], number)


Terms = Callable[[Batch], dict[str, Tensor]]


class Trained:
    """A model with an optimiser, whose steps can be made in several ways.

    Args:
        setup: the configured model.
        device: the device to train on; on a GPU with bfloat16 autocast.
    """

    def __init__(self, setup: Built, device: torch.device) -> None:
        model, task = setup.model, setup.model.task
        assert isinstance(task, MaskedPretraining)
        self.device, self.backbone, self.task = device, model.backbone, task
        self.modules = nn.ModuleList([self.backbone, self.task]).to(device).train()
        groups = parameter_groups(
            self.backbone, (self.backbone.image, self.backbone.text), self.task,
            model.lr, model.lr_encoders, model.weight_decay,
        )  # fmt: skip
        self.optimizer = build_adamw(groups, model.betas, fused=True)
        self.ways: dict[str, Terms] = {
            "ours": lambda batch: self.task(self.backbone, batch),
            "plain": PlainStep(self.backbone, self.task),
            "plain, shared": PlainStep(self.backbone, self.task, shared=True),
        }

    def terms(self, way: str, batch: Batch, number: int = 0) -> dict[str, Tensor]:
        """The losses of one forward pass."""
        self.task.set_uniform(Draw(0, number, self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.ways[way](batch)

    def step(self, way: str, batch: Batch, number: int = 0) -> None:
        """Forward, backward, clipping and update."""
        self.optimizer.zero_grad()
        terms = self.terms(way, batch, number)
        sum(self.task.weights[name] * term for name, term in terms.items()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()

    def seconds(self, way: str, batches: Sequence[Batch], steps: int) -> float:
        """Seconds per step, averaged over `steps` steps."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self.wait()
        started = clock()
        for number in range(steps):
            self.step(way, batches[number % len(batches)], number)
        self.wait()
        return (clock() - started) / steps

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flops(self, way: str, batch: Batch) -> int:
        """Operations of the matrix products in one step."""
        with FlopCounterMode(display=False) as counter:
            self.step(way, batch)
        return counter.get_total_flops()

    @torch.no_grad()
    def furthest(self, batch: Batch) -> float:
        """Largest relative difference between a loss of the plain steps and ours, with the same masks and negatives and
        without dropout."""
        self.modules.eval()
        self.task.set_uniform(Draw(0, 0, self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            step, _, _ = self.task.step(self.backbone, batch, True)
            assert step.negatives is not None
            captions, images = (part.index_B.tolist() for part in step.negatives)
            every = [self.terms("ours", batch)]
            for way in ("plain", "plain, shared"):
                plain: Any = self.ways[way]
                every.append(plain(batch, step.masks, (captions, images)))
        self.modules.train()
        ours, *others = ({name: float(term) for name, term in terms.items()} for terms in every)
        return max(abs(other[name] / ours[name] - 1) for other in others for name in ours)


def compared(trained: Trained, batches: Sequence[Batch], steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step for each way, measured in turn."""
    for way in trained.ways:
        trained.seconds(way, batches, 2)  # memory is reserved, kernels are selected
    times: dict[str, list[float]] = {way: [] for way in trained.ways}
    for _ in range(repeats):
        for way, seconds in times.items():
            seconds.append(trained.seconds(way, batches, steps))
    return times


def ratios(times: dict[str, list[float]], way: str) -> list[float]:
    """How many times as fast ours was in each round."""
    return [plain / ours for plain, ours in zip(times[way], times["ours"], strict=True)]


def main() -> None:
    """Check that all ways compute the same losses, time them, and print the median ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as of `maskvlm bench`: model=.. data=..")
    parser.add_argument("--steps", type=int, default=4, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=7)
    options, more = parser.parse_known_args()
    torch.set_num_threads(1)
    setup = built(["where=cpu", *options.words, *more])
    batches = batches_of(setup, options.steps)
    trained = Trained(setup, torch.device("cpu"))
    print(f"largest difference of a loss: {trained.furthest(batches[0]):.1e}, with the same masks and negatives")
    times = compared(trained, batches, options.steps, options.repeats)
    flops = {way: trained.flops(way, batches[0]) for way in trained.ways}
    for way, seconds in times.items():
        pairs = len(batches[0].valid_B) / statistics.median(seconds)
        print(f"{way:14} {pairs:7.1f} pairs/s, {flops[way] / 1e9:.2f} GFLOP in matrix products")
    for way in ("plain", "plain, shared"):
        each = ratios(times, way)
        print(
            f"ours is {statistics.median(each):.2f} times as fast as {way} ({min(each):.2f} to {max(each):.2f}; "
            f"operations {flops[way] / flops['ours']:.2f})"
        )


if __name__ == "__main__":
    main()
