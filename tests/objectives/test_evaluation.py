"""Held-out metrics: the partner is the one that a name says, and sums are exact over uneven batches."""

import math

import pytest
import torch
from slow_step import Recorded, build
from torch import Tensor
from toys import CLS, PATCH, SEP, SIZE, slow_cross, take, tokens, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.heads import patchify
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.evaluation import EVAL_SEED, PretrainingMetrics, gains
from maskvlm.objectives.retrieval_metrics import recall
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError

IMAGES = 7


def several() -> Batch:
    """Seven images with two captions each, some pixels of each being an object's."""
    batch = toy_batch(IMAGES, captions=2)
    ground = torch.rand(IMAGES, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.2
    return batch._replace(foreground_BHW=ground, index_B=torch.arange(IMAGES) + 10)


def measured(task: Recorded, backbone: MaskVLM, batch: Batch, *sizes: int, contrast: float = 0.0) -> dict[str, float]:
    measure = PretrainingMetrics(4, contrast)
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
    things = batch.foreground_BHW[:, None].expand_as(error)
    assert metrics["mim/object_l1_chance"] == pytest.approx(error[things].abs().mean().item(), rel=1e-5)


def test_nothing_masked_is_no_number() -> None:
    backbone, task = build(text_mask_ratio=0.0, image_mask_ratio=0.0)
    metrics = measured(task, backbone, several(), 4, 3)
    assert math.isnan(metrics["mlm/nats"])
    assert math.isnan(metrics["mim/mse_wrong_text"])
    assert metrics["score"] == (metrics["retrieval/tr_r1"] + metrics["retrieval/ir_r1"]) / 2
    backbone, task = build(text_mask_ratio=0.0, weight_itc=0.0, weight_itm=0.0)
    metrics = measured(task, backbone, several(), 4, 3)
    assert metrics["score"] == -metrics["mim/l1"]
    assert set(PretrainingMetrics(4).compute(task, backbone)) <= {"score"}  # of no batch at all


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
    # Ranked again by what contrast says, if that weighs most.
    again = measured(task, backbone, batch, 7, contrast=1e4)
    assert metrics["retrieval/tr_r1"] != again["retrieval/tr_r1"] == again["retrieval/itc_tr_r1"]


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
    assert task.compute(backbone) == whole  # and begins anew once it was computed
    for _ in range(2):
        task.update(backbone, several())
    with pytest.raises(UserError, match="taken in twice"):
        task.compute(backbone)


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
    else:
        best = "itc_" if left_out == "itm" else ""
        parts = [metrics[f"retrieval/{best}{name}_r1"] for name in ("tr", "ir")]
        parts += [] if left_out == "mlm" else [metrics["mlm/accuracy"]]
        assert metrics["score"] == pytest.approx(sum(parts) / len(parts))
