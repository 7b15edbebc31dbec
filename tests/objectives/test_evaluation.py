"""Held-out metrics: the partner is the one that a name says, and sums are exact over uneven batches."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slow_step import Recorded, build
from torch import Tensor, nn
from torch.nn import functional as F
from toys import CLS, PATCH, SEP, SIZE, slow_cross, take, tokens, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import Context, CrossOutput
from maskvlm.model.heads import patchify
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.cross_batch import Masks
from maskvlm.objectives.evaluation import EVAL_SEED, PretrainingMetrics, gains, one_text
from maskvlm.objectives.masking import mask_patches, mask_tokens
from maskvlm.objectives.novelty import mean_patch
from maskvlm.objectives.retrieval_metrics import recall
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError

IMAGES = 7


def several() -> Batch:
    """Seven images with two captions each, some pixels of each being an object's."""
    batch = toy_batch(IMAGES, captions=2)
    ground = torch.rand(IMAGES, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.2
    return batch._replace(foreground_BHW=ground, index_B=torch.arange(IMAGES) + 10)


def measured(task: Recorded, backbone: MaskVLM, batch: Batch, *sizes: int) -> dict[str, float]:
    measure = PretrainingMetrics(4)
    first = 0
    for size in sizes:
        rows = torch.arange(first, first + size)
        part = take(batch, rows)
        if batch.foreground_BHW is not None:
            part = part._replace(foreground_BHW=batch.foreground_BHW[rows])
        measure.update(task, backbone, part)
        first += size
    return measure.compute(task, backbone)


# ---------------------------------------------------------------------- the slow way


class Slow:
    """Sums over single rows of one batch, with the masks that Measure draws for it."""

    def __init__(self, task: Recorded, backbone: MaskVLM, batch: Batch) -> None:
        self.task, self.backbone, self.batch = task, backbone, batch
        self.masks = task.mask(backbone, batch, Draw(EVAL_SEED, int(batch.index_B[0]), "cpu").local)
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums.setdefault(name, []).append(value)

    def read(self, token_T: Tensor, attention_T: Tensor) -> Tensor:
        token_1T = token_T[attention_T][None]
        return self.backbone.text(token_1T, torch.ones_like(token_1T, dtype=torch.bool))[0]

    @torch.no_grad()
    def words(self) -> None:
        batch, token = self.batch, self.masks.token
        assert token is not None
        rows = len(batch.image_BCHW)
        for c in range(len(batch.token_CT)):
            own = int(batch.owner_C[c])
            other = batch.image_BCHW[(own + 1) % rows]
            images = {
                "": batch.image_BCHW[own],
                "_wrong_image": other,
                "_no_image": torch.zeros_like(other),
            }
            words_TD = self.read(token.token_CT[c], batch.attention_CT[c])
            places = token.mask_CT[c].nonzero().flatten()
            for name, image in images.items():
                out_TD = slow_cross(self.backbone.cross_text, words_TD, self.backbone.image(image[None])[0])
                logits_KV = self.task.tokens.vocabulary(out_TD[places])
                target_K = batch.token_CT[c, places]
                self.add(f"mlm/accuracy{name}", 100.0 * (logits_KV.argmax(1) == target_K))
                self.add(f"mlm/nats{name}", -logits_KV.log_softmax(1)[torch.arange(len(places)), target_K])

    @torch.no_grad()
    def patches(self) -> None:
        batch, patch = self.batch, self.masks.patch
        assert patch is not None
        assert batch.foreground_BHW is not None
        rows = len(batch.image_BCHW)
        captions = [2 * b + int(batch.index_B[b]) % 2 for b in range(rows)]
        whole = [self.read(batch.token_CT[c], batch.attention_CT[c]) for c in captions]
        empty = self.read(torch.tensor([CLS, SEP]), torch.tensor([True, True]))
        for b in range(rows):
            image_LD = self.backbone.image(batch.image_BCHW[b][None], patch.mask_BN[b][None])[0]
            places = patch.mask_BN[b].nonzero().flatten()
            target_KP = patchify(batch.image_BCHW[b][None], PATCH)[0, places]
            things_KP = patchify(batch.foreground_BHW[b].expand(1, 3, -1, -1), PATCH)[0, places]
            for name, text_TD in (
                ("", whole[b]),
                ("_wrong_text", whole[(b + 1) % rows]),
                ("_no_text", empty),
            ):
                out_LD = slow_cross(self.backbone.cross_image, image_LD, text_TD)
                out_LD = slow_cross(self.task.pixels.blocks, out_LD, text_TD)
                error_KP = (self.task.pixels.pixels(out_LD[1 + places]) - target_KP).abs()
                for key, values in (("l1", error_KP), ("mse", error_KP.square())):
                    self.add(f"mim/{key}{name}", values.flatten())
                    self.add(f"mim/object_{key}{name}", values[things_KP])


def test_every_number_is_that_of_single_rows_with_the_partner_named() -> None:
    """Batches of four and three: their sums are joined, not their means. Blocks of 24 px do not divide 32."""
    backbone, task = build(mask_block=24)
    batch = several()
    metrics = measured(task, backbone, batch, 4, 3)
    sums: dict[str, list[Tensor]] = {}
    for rows in (torch.arange(4), torch.arange(4, 7)):
        assert batch.foreground_BHW is not None
        slow = Slow(task, backbone, take(batch, rows)._replace(foreground_BHW=batch.foreground_BHW[rows]))
        slow.words()
        slow.patches()
        for name, values in slow.sums.items():
            sums.setdefault(name, []).extend(values)
    assert len(sums) == 18
    for name, values in sums.items():
        assert metrics[name] == pytest.approx(torch.cat(values).double().mean().item(), rel=1e-5), name
    others = ("_chance", "_gain")
    measured_alone = {name for name in metrics if not name.endswith(others) and not name.startswith("retrieval/")}
    assert measured_alone == {*sums, "score"}


def test_the_gain_of_the_right_partner_is_a_number() -> None:
    words = {"mlm/accuracy": 70.0, "mlm/accuracy_wrong_image": 50.0, "mlm/nats": 1.0, "mlm/nats_wrong_image": 2.5}
    pixels = {"mim/mse": 0.06, "mim/mse_wrong_text": 0.08, "mim/l1": 0.1, "mim/l1_wrong_text": 0.0}
    assert gains(words | pixels) == pytest.approx({"mlm/accuracy_gain": 20, "mlm/nats_gain": 1.5, "mim/mse_gain": 25})
    assert gains({"mlm/accuracy": 70.0}) == {}


def test_levels_of_knowing_nothing() -> None:
    """Over the masked words of all batches together, and the mean colour of each batch."""
    backbone, task = build(text_mask_ratio=1.0, image_mask_ratio=1.0)
    batch = several()
    text = tokens([[5, 5, 6]] * 8 + [[7]] * 6)
    batch = batch._replace(**text)
    metrics = measured(task, backbone, batch, 4, 3)
    assert metrics["mlm/accuracy_chance"] == pytest.approx(100 * 16 / 30)
    shares = torch.tensor([16, 8, 6]) / 30
    assert metrics["mlm/nats_chance"] == pytest.approx(-(shares * shares.log()).sum().item())
    errors = [part - part.mean((0, 2, 3), keepdim=True) for part in batch.image_BCHW.split(4)]
    error = torch.cat(errors)
    assert metrics["mim/l1_chance"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert metrics["mim/mse_chance"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert batch.foreground_BHW is not None
    things = batch.foreground_BHW[:, None].expand_as(error)
    assert metrics["mim/object_l1_chance"] == pytest.approx(error[things].abs().mean().item(), rel=1e-5)


def test_the_level_of_pixels_leaves_out_what_is_not_masked() -> None:
    """An image that could not be read, zeros all over, and places that fill up: blocks of 24 px do not divide 32."""
    backbone, task = build(mask_block=24)
    valid_B = torch.arange(IMAGES) != 2
    batch = several()
    batch = batch._replace(valid_B=valid_B, image_BCHW=(batch.image_BCHW + 2) * valid_B[:, None, None, None])
    metrics = measured(task, backbone, batch, IMAGES)
    patch = Slow(task, backbone, batch).masks.patch
    assert patch is not None
    assert not patch.weight_BK[valid_B].all()
    masked = patchify(batch.image_BCHW, PATCH)[patch.mask_BN].view(-1, 3)
    error = masked - masked.mean(0)
    assert metrics["mim/l1_chance"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert metrics["mim/mse_chance"] == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_nothing_masked_is_no_number() -> None:
    backbone, task = build(text_mask_ratio=0.0, image_mask_ratio=0.0)
    metrics = measured(task, backbone, several(), 4, 3)
    assert math.isnan(metrics["mlm/nats"])
    assert math.isnan(metrics["mim/mse_wrong_text"])
    assert metrics["retrieval/ir_r10"] == 100


def test_retrieval_is_measured_over_all_batches_at_once() -> None:
    backbone, task = build()
    batch = several()
    metrics = measured(task, backbone, batch, 4, 3)
    whole = measured(task, backbone, batch, 7)
    names = [name for name in metrics if name.startswith("retrieval/")]
    assert len(names) == 12 + 6 + 2
    assert (metrics["retrieval/pictures"], metrics["retrieval/captions"]) == (IMAGES, 2 * IMAGES)
    assert metrics["retrieval/ir_r5_chance"] == pytest.approx(100 * 5 / 7)
    assert metrics["retrieval/tr_r1_chance"] == pytest.approx(100 * 1 / 7)
    parts = [metrics[name] for name in ("retrieval/tr_r1", "retrieval/ir_r1", "mlm/accuracy")]
    assert metrics["score"] == pytest.approx(sum(parts) / 3)
    assert {name: metrics[name] for name in names} == {name: whole[name] for name in names}
    with torch.no_grad():
        image_BE = task.projection.embed_image(backbone.image(batch.image_BCHW))
        text_CE = task.projection.embed_text(backbone.text(batch.token_CT, batch.attention_CT), batch.attention_CT)
    relevant_BC = batch.owner_C == torch.arange(IMAGES)[:, None]
    for k, value in recall(image_BE @ text_CE.T, relevant_BC).items():
        assert metrics[f"retrieval/itc_tr_r{k}"] == value
    for k, value in recall(text_CE @ image_BE.T, relevant_BC.T).items():
        assert metrics[f"retrieval/itc_ir_r{k}"] == value


def test_the_card_says_how_retrieval_is_ranked_again() -> None:
    _, task = build(rerank_k=3, rerank_contrast=0.5)
    assert task.card() == {"rerank_k": 3, "rerank_contrast": 0.5}
    assert build(weight_itm=0.0)[1].card()["rerank_k"] == 0


def test_features_of_the_images_are_kept_for_the_checkpoint() -> None:
    """By them a model tells later which images are unlike its data."""
    backbone, task = build()
    assert task.measure.known_images is None
    batch = several()
    task.update(backbone, batch)
    task.compute(backbone)
    with torch.no_grad():
        feature_BD = mean_patch(backbone.image(batch.image_BCHW))
    assert task.measure.known_images is not None
    torch.testing.assert_close(task.measure.known_images, feature_BD.half(), atol=2e-3, rtol=0)
    assert task.measure.known_images.dtype == torch.float16


def test_without_anything_to_choose_a_checkpoint_by_there_is_no_score() -> None:
    """A constant one would keep the first, and end the run for lack of patience."""
    backbone, task = build(weight_itc=0.0, weight_mlm=0.0, weight_mim=0.0)
    task.update(backbone, several())
    assert "score" not in task.compute(backbone)
    # Of a run the latest checkpoint is the best: it rises, so that none is kept for ever and patience does not end it.
    for task.run_progress in (0.25, 0.5):
        task.update(backbone, several())
        assert task.compute(backbone)["score"] == task.run_progress


def test_an_evaluation_that_was_broken_off_leaves_nothing_behind() -> None:
    backbone, task = build()
    task.update(backbone, several())
    whole = task.compute(backbone)
    task.update(backbone, several())
    task.begin_evaluation()
    task.update(backbone, several())
    assert task.compute(backbone) == whole
    for _ in range(2):
        task.update(backbone, several())
    with pytest.raises(UserError, match=r"taken in twice since the last `compute`\. Call task\.begin_evaluation"):
        task.compute(backbone)


def test_the_sample_of_known_images_is_in_the_order_of_the_split() -> None:
    """Whichever process encoded what."""
    backbone, task = build()
    batch, later = several(), several()
    later = later._replace(index_B=later.index_B + 100)
    samples = []
    for batches in ((batch, later), (later, batch)):
        for each in batches:
            task.update(backbone, each._replace(image_BCHW=each.image_BCHW + each.index_B[0] / 100))
        task.compute(backbone)
        samples.append(task.measure.known_images)
    assert torch.equal(*samples)


def test_metrics_start_anew_after_they_were_computed() -> None:
    backbone, task = build()
    first = task
    first.update(backbone, several())
    once = first.compute(backbone)
    first.update(backbone, several())
    assert first.compute(backbone) == once
    assert set(first.compute(backbone)) <= {"score"}


def test_every_checkpoint_is_asked_the_same() -> None:
    """Masks come from the place in the data set, not from the step or the global generator."""
    backbone, task = build()
    once = measured(task, backbone, several(), 7)
    torch.manual_seed(99)
    task.set_uniform(Draw(1, 1, "cpu"))
    assert measured(task, backbone, several(), 7) == once
    moved = several()._replace(index_B=torch.arange(IMAGES) + 20)
    assert measured(task, backbone, moved, 7)["mlm/nats"] != once["mlm/nats"]


def test_a_batch_of_one_image_has_no_wrong_partner() -> None:
    backbone, task = build()
    metrics = measured(task, backbone, several(), 1)
    assert not [name for name in metrics if "wrong" in name]
    assert {"mlm/accuracy", "mlm/nats_no_image", "mim/mse", "mim/mse_no_text"} < metrics.keys()
    six_and_one, six = measured(task, backbone, several(), 6, 1), measured(task, backbone, several(), 6)
    assert six_and_one["mim/mse_wrong_text"] == six["mim/mse_wrong_text"]
    assert six_and_one["mim/mse"] != six["mim/mse"]


@pytest.mark.parametrize("left_out", ["itc", "itm", "mlm", "mim"])
def test_a_weight_of_zero_leaves_out_its_metrics(left_out: str) -> None:
    backbone, task = build(**{f"weight_{left_out}": 0.0})
    metrics = measured(task, backbone, several()._replace(foreground_BHW=None), 4, 3)
    keys = {"itc": "retrieval/itc_tr_r1", "itm": "retrieval/tr_r1", "mlm": "mlm/nats", "mim": "mim/mse"}
    for name, key in keys.items():
        assert (key in metrics) == (name != left_out and (left_out, name) != ("itc", "itm"))
    assert not [name for name in metrics if "object" in name]
    if left_out == "itc":
        assert metrics["score"] == pytest.approx(-metrics["mlm/nats"] - metrics["mim/l1"])
    elif left_out == "itm":
        parts = [metrics[name] for name in ("retrieval/itc_tr_r1", "retrieval/itc_ir_r1", "mlm/accuracy")]
        assert metrics["score"] == pytest.approx(sum(parts) / 3)
    elif left_out == "mlm":
        assert metrics["score"] == (metrics["retrieval/tr_r1"] + metrics["retrieval/ir_r1"]) / 2


def test_without_a_masked_word_the_score_is_recall_alone() -> None:
    backbone, task = build(text_mask_ratio=0.0)
    metrics = measured(task, backbone, several(), 4, 3)
    assert metrics["score"] == (metrics["retrieval/tr_r1"] + metrics["retrieval/ir_r1"]) / 2


def test_without_contrast_and_a_masked_word_the_score_is_that_of_the_pixels() -> None:
    backbone, task = build(text_mask_ratio=0.0, weight_itc=0.0, weight_itm=0.0)
    metrics = measured(task, backbone, several(), 4, 3)
    assert metrics["score"] == -metrics["mim/l1"]


# ---------------------------------------------------------------------- partners that can be seen


class Teller(nn.Module):
    """A cross encoder whose output is what its partner shows, at every position."""

    def context(self, partner: Tensor, attention: Tensor | None = None) -> Context:
        return Context([partner], None, None)  # type: ignore[list-item]

    def forward(self, own: Tensor, context: Context, attention: Tensor | None = None) -> CrossOutput:
        partner: Any = context.blocks[0] if context.index_B is None else context.blocks[0][context.index_B]
        return CrossOutput(partner[:, :1].expand(-1, own.shape[1], -1), partner[:, 0])


def telling_world() -> tuple[Any, Any, Batch]:
    """Image b is of colour 5 + b, all its words are 5 + b; the model says the number that it sees."""
    colour_B = torch.arange(4) + 5
    batch = Batch(
        image_BCHW=colour_B[:, None, None, None].float().expand(4, 3, SIZE, SIZE),
        **tokens([[5 + b] * 3 for b in range(4)]),
        owner_C=torch.arange(4),
        image_id_B=torch.arange(4),
        text_id_C=torch.arange(4),
        valid_B=torch.ones(4, dtype=torch.bool),
        index_B=torch.arange(4),
    )
    backbone = SimpleNamespace(
        image=lambda image, *_: F.one_hot(image[:, 0, 0, 0].long(), 12).float()[:, None].expand(-1, 17, -1),
        text=lambda token, attention: F.one_hot(token[:, 1], 12).float()[:, None].expand(-1, token.shape[1], -1),
        cross_text=Teller(),
        cross_image=Teller(),
        parameters=lambda: iter([torch.zeros(1)]),
    )

    def mask(backbone: Any, batch: Batch, uniform: Any) -> Masks:
        patch = mask_patches(batch.valid_B, (4, 4), 2, 0.6, uniform)
        text = batch.token_CT, batch.special_CT, batch.word_CT
        return Masks(patch, mask_tokens(*text, 0.3, uniform, 4, 12, 5))

    def pixels(image_BLD: Tensor, text: Tensor, attention: Tensor, index_BK: Tensor) -> Tensor:
        value_B1 = image_BLD[:, 0].argmax(-1, keepdim=True).float()
        return value_B1[..., None].expand(-1, index_BK.shape[1], 3 * PATCH**2)

    task = SimpleNamespace(
        weights={"itc": 0, "itm": 0, "mlm": 1, "mim": 1},
        losses=(),
        mask=mask,
        tokens=lambda x: 50 * x,
        pixels=pixels,
        pixel_target=lambda image, index: patchify(image, PATCH).gather(
            1, index[..., None].expand(-1, -1, 3 * PATCH**2)
        ),
    )
    return task, backbone, batch


def test_a_model_that_says_what_its_partner_shows() -> None:
    task, backbone, batch = telling_world()
    measure = PretrainingMetrics(4)
    measure.update(task, backbone, batch)
    metrics = measure.compute(task, backbone)
    assert (metrics["mlm/accuracy"], metrics["mlm/accuracy_wrong_image"], metrics["mlm/accuracy_no_image"]) == (
        100,
        0,
        0,
    )
    assert metrics["mlm/nats"] == pytest.approx(0, abs=1e-6)
    assert metrics["mlm/nats_wrong_image"] == pytest.approx(50)
    assert metrics["mim/l1"] == 0
    assert metrics["mim/l1_wrong_text"] == (1 + 1 + 1 + 3) / 4  # colours 5 6 7 8 read as 6 7 8 5
    assert metrics["mim/mse_wrong_text"] == (1 + 1 + 1 + 9) / 4
    assert metrics["mim/l1_no_text"] == pytest.approx((5 + 6 + 7 + 8) / 4 - SEP)  # the word after the start is the end


# ---------------------------------------------------------------------- parts


def test_captions_of_an_image_take_turns() -> None:
    owner_C = torch.tensor([0, 0, 0, 1, 2, 2])
    batch = toy_batch(3)._replace(owner_C=owner_C, index_B=torch.tensor([3, 4, 5]))
    assert one_text(batch).tolist() == [0, 3, 5]
    assert one_text(batch._replace(index_B=torch.tensor([5, 4, 6]))).tolist() == [2, 3, 4]


def test_nothing_taken_in_gives_nothing() -> None:
    backbone, task = build()
    assert set(PretrainingMetrics(4).compute(task, backbone)) <= {"score"}
    empty = PretrainingMetrics(4)
    empty.add("mlm/nats", torch.zeros(2, 0), torch.zeros(2, 0))
    assert math.isnan(empty.compute(task, backbone)["mlm/nats"])
