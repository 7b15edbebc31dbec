"""Whole runs of a few steps on the built-in world: what is logged, repeated, stored and read back."""

import copy
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from toy_examples import LABELS, Questions, bare_backbone, data_for, example, trainer_in
from toys import SIZE, toy_backbone

from maskvlm import MaskVLM
from maskvlm.checkpoint.io import load
from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.text import tokenizer_hash, tokenizer_json
from maskvlm.objectives.classification import Classification
from maskvlm.objectives.novelty import evenly_spaced, mean_patch
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.task import Task, checked_metrics, checked_terms
from maskvlm.reporting.progress import StuckLoss
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.checkpointing import KeepState
from maskvlm.training.lit import LitModel
from maskvlm.training.step_guard import StepGuard
from maskvlm.utils.distributed import mix
from maskvlm.utils.errors import UserError
from maskvlm.utils.launch import Stopped


class Watch(L.Callback):
    """The loss and the learning rates of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(outputs["loss"].item())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def make_data(steps: int = 3, **settings: Any) -> PairData:
    backbone = toy_backbone(length=24, vocab=150)
    backbone.text.tokenizer = None
    settings = {"batch_size": 6, "eval_batch_size": 4, "randaugment": None, **settings}
    world = Scenes(train=24, val=6, test=5, size=SIZE)
    return PairData(world, backbone.input_spec, steps=steps, **settings)


def make_model(seed: int = 0, dropout: float = 0.1, **settings: Any) -> LitModel:
    backbone = toy_backbone(length=24, vocab=150, dropout=dropout)
    backbone.text.tokenizer = None
    task = MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8, rerank_k=3, weight_mlm=4.0)
    return LitModel(backbone, task, **{"lr": 1e-3, "lr_encoders": 1e-4, "warmup": 1, "seed": seed, **settings})


def make_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "use_distributed_sampler": False}
    fixed |= {"num_sanity_val_steps": 0, "enable_checkpointing": False, "gradient_clip_val": 1.0}
    return L.Trainer(**{**quiet, **fixed, **settings}, callbacks=list(callbacks), plugins=[SafeCheckpointIO()])


@pytest.fixture(scope="module")
def run() -> tuple[LitModel, PairData, L.Trainer, Watch]:
    """Three steps and an evaluation."""
    model, data, watch = make_model(), make_data(), Watch()
    trainer = make_trainer(watch)
    trainer.fit(model, data)
    return model, data, trainer, watch


def test_one_lightning_epoch_is_the_whole_run(run: tuple[LitModel, PairData, L.Trainer, Watch]) -> None:
    model, data, trainer, watch = run
    assert (trainer.global_step, len(watch.losses), trainer.current_epoch) == (3, 3, 1)
    assert data.samples == 18
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert model.backbone.text.tokenizer is data.tokenizer


def test_terms_and_their_weighted_sum_are_logged(run: tuple[LitModel, PairData, L.Trainer, Watch]) -> None:
    _, _, trainer, watch = run
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    weights = {"itc": 1, "itm": 1, "mlm": 4, "mim": 1}
    total = sum(weight * logged[f"train/{name}"] for name, weight in weights.items())
    assert total == pytest.approx(logged["train/loss"], rel=1e-6)
    assert 2 < logged["train/mlm"] < 8  # nats of a token out of 150, not four times as much
    assert logged["train/loss"] == pytest.approx(watch.losses[-1])


def test_metrics_of_the_last_evaluation_are_kept(run: tuple[LitModel, PairData, L.Trainer, Watch]) -> None:
    model, _, trainer, _ = run
    names = {"retrieval/itc_tr_r1", "retrieval/tr_r1", "retrieval/ir_r10"}
    names |= {f"mlm/accuracy{partner}" for partner in ("", "_wrong_image", "_no_image")}
    names |= {
        f"mim/{kind}{partner}" for kind in ("mse", "l1", "object_mse") for partner in ("", "_wrong_text", "_no_text")
    }
    assert names <= model.metrics.keys()
    assert all(math.isfinite(value) for value in model.metrics.values())
    assert trainer.callback_metrics["mim/mse"].item() == pytest.approx(model.metrics["mim/mse"])
    assert model.metrics["retrieval/tr_r10"] >= model.metrics["retrieval/tr_r5"] >= model.metrics["retrieval/tr_r1"]


def test_rates_follow_warm_up_and_cosine(run: tuple[LitModel, PairData, L.Trainer, Watch]) -> None:
    """One step of warm-up, then down to 3e-5 after the third."""
    _, _, trainer, watch = run
    factors = [1.0, 1.0, 0.5]
    names = [group["name"] for group in trainer.optimizers[0].param_groups]
    for rates, factor in zip(watch.rates, factors, strict=True):
        for name, rate in zip(names, rates, strict=True):
            peak = 1e-4 if name.startswith("encoders") else 1e-3
            assert rate == pytest.approx(3e-5 + (peak - 3e-5) * factor)
    assert trainer.optimizers[0].param_groups[0]["fused"]


def losses(model: LitModel, data: PairData, **settings: Any) -> list[float]:
    watch = Watch()
    make_trainer(watch, limit_val_batches=0, **settings).fit(model, data)
    return watch.losses


def test_the_same_seed_gives_the_same_curve_to_the_bit(
    run: tuple[LitModel, PairData, L.Trainer, Watch],
) -> None:
    """A run is a function of its seeds: neither what was drawn before nor the workers matter."""
    model, data = make_model(), make_data()
    torch.manual_seed(99)
    again = losses(model, data)
    assert again == run[3].losses
    assert losses(make_model(), make_data(workers=1)) == again
    assert losses(make_model(), make_data(seed=1))[0] != again[0]


def test_masks_and_negatives_follow_from_seed_and_step() -> None:
    class Task(MaskedPretraining):
        seeds: ClassVar[list[int]] = []

        def set_uniform(self, uniform: Any) -> None:
            super().set_uniform(uniform)
            self.seeds.append(uniform.generator.initial_seed())

    backbone = toy_backbone(length=24, vocab=150)
    backbone.text.tokenizer = None
    losses(LitModel(backbone, Task(mask_block=16, decoder_layers=1, contrast_dim=8), seed=3), make_data())
    assert Task.seeds == [mix(3, step) for step in range(3)]


def test_accumulated_passes_make_one_step() -> None:
    watch, data = Watch(), make_data(steps=2, accumulate=2)
    trainer = make_trainer(watch, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(make_model(), data)
    assert (trainer.global_step, len(watch.losses), len(watch.rates)) == (2, 4, 2)
    assert max(watch.rates[1]) == pytest.approx(1e-3)  # scheduled by step, not by pass


def test_accumulated_passes_say_what_contrast_is_among(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(make_model(), make_data(steps=1, accumulate=2))
    notes = [record.message for record in caplog.records if "contrast" in record.message]
    assert len(notes) == 1
    assert re.search(
        r"note: gradients are accumulated over 2 passes, .* only the \d+ pairs of each pass, not all \d+; with model",
        notes[0],
    )
    caplog.clear()
    make_trainer(limit_val_batches=0).fit(make_model(), make_data(steps=1))
    assert not [record for record in caplog.records if "contrast" in record.message]


@pytest.mark.parametrize(("size", "passes", "told"), [(1, 1, True), (2, 2, True), (2, 1, False)])
def test_a_pass_of_one_image_is_reported(size: int, passes: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(limit_val_batches=0, accumulate_grad_batches=passes)
    trainer.fit(make_model(), make_data(steps=1, batch_size=size, accumulate=passes))
    notes = [record.message for record in caplog.records if "a pass has one image" in record.message]
    assert len(notes) == told


def test_a_batch_larger_than_the_data_set_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def larger(**settings: Any) -> list[str]:
        caplog.clear()
        make_trainer(limit_val_batches=0).fit(make_model(), make_data(**settings))
        return [record.message for record in caplog.records if "larger than" in record.message]

    rows = 24
    (note,) = larger(batch_size=2 * rows, steps=None, epochs=2)
    assert note.startswith(f"note: a batch of {2 * rows} is larger than the {rows} training images: ")
    assert "each of them 2.0 times, and the run has 1 step; " in note
    assert larger(batch_size=rows, steps=1) == []


class Norms(L.Callback):
    """The norm of all gradients as the optimiser sees them."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.norms += [torch.cat(grads).norm().item()] if grads else []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_and_evaluation_in_every_precision(precision: Any) -> None:
    """Lightning does not clip for a fused optimiser in mixed precision; bfloat16 has nothing to unscale."""
    model, norms = make_model(), Norms()
    make_trainer(norms, precision=precision, gradient_clip_val=0.5).fit(model, make_data(steps=2))
    assert all(math.isfinite(value) for value in model.metrics.values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert norms.norms == pytest.approx([0.5] * len(norms.norms), rel=1e-3)
    assert norms.norms


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("precision", "by_products"), [("bf16-mixed", True), ("32-true", False)])
def test_attention_on_a_cpu_is_two_products_in_bfloat16_alone(precision: Any, by_products: bool, trained: bool) -> None:
    """Of a run, and where a checkpoint is measured: torch's kernel is the slower one there (bench/attention.py)."""
    model, trainer = make_model(), make_trainer(precision=precision, limit_val_batches=0)
    (trainer.fit if trained else trainer.validate)(model, make_data())
    own = [module for module in model.modules() if hasattr(module, "by_products")]
    assert own
    assert all(module.by_products is by_products for module in own)
    assert (model.backbone.text.model.config._attn_implementation == "eager") is by_products


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_come_in_the_precision_of_the_weights(precision: Any, dtype: torch.dtype) -> None:
    dtypes: list[torch.dtype] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, number: int) -> None:
            dtypes.append(batch.image_BCHW.dtype)

    model = make_model()
    trainer = make_trainer(Look(), precision=precision)
    trainer.fit(model, make_data(steps=2))
    assert dtypes == [dtype] * 2
    assert math.isfinite(trainer.callback_metrics["score"])  # matching re-ranks in float32, whatever the default is
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_checkpoint_brings_weights_and_tokenizer(
    run: tuple[LitModel, PairData, L.Trainer, Watch], tmp_path: Path
) -> None:
    model, data, trainer, _ = run
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = make_model()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    make_trainer().validate(other, make_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert other.metrics == model.metrics
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.backbone.text.tokenizer is not None
    assert data.tokenizer is not None
    assert tokenizer_hash(other.backbone.text.tokenizer) == tokenizer_hash(data.tokenizer)


def test_the_stored_tokenizer_needs_no_data(run: tuple[LitModel, PairData, L.Trainer, Watch]) -> None:
    stored: dict[str, Any] = {}
    run[0].on_save_checkpoint(stored)
    assert isinstance(stored["tokenizer"], str)
    bare = make_model()
    bare.on_load_checkpoint(stored)
    assert tokenizer_json(bare.backbone.text.tokenizer) == stored["tokenizer"]
    empty: dict[str, Any] = {}
    make_model().on_save_checkpoint(empty)
    assert (empty["lineage"], empty.keys()) == ([], {"lineage", "model", "task"})


def test_a_checkpoint_of_another_tokenizer_is_refused(
    run: tuple[LitModel, PairData, L.Trainer, Watch],
) -> None:
    stored: dict[str, Any] = {}
    run[0].on_save_checkpoint(stored)
    other, data = make_model(), make_data()
    data.source = Scenes(train=3, val=3, test=3, size=SIZE, seed=5)
    data.setup("fit")
    other.backbone.text.set_tokenizer(data.tokenizer)
    with pytest.raises(UserError, match="tokenizer"):
        other.on_load_checkpoint(stored)


def test_the_test_split_is_measured_like_validation() -> None:
    model = make_model()
    make_trainer().test(model, make_data(), verbose=False)
    assert model.metrics["retrieval/pictures"] == 5


def test_cross_encoders_follow_their_own_rate() -> None:
    watch, model = Watch(), make_model(lr_cross=2e-4)
    make_trainer(watch, limit_val_batches=0).fit(model, make_data(steps=2))
    names = [group["name"].partition(" ")[0] for group in model.trainer.optimizers[0].param_groups]
    peaks = dict(zip(names, watch.rates[1], strict=True))
    assert peaks == pytest.approx({"encoders": 1e-4, "cross": 2e-4, "rest": 1e-3})
    with pytest.raises(UserError, match=r"model\.lr_cross: -1 is too small"):
        make_model(lr_cross=-1)


def test_a_checkpoint_says_which_model_and_labels_it_holds(
    run: tuple[LitModel, PairData, L.Trainer, Watch], tmp_path: Path
) -> None:
    model, _, trainer, _ = run
    model.model_yaml = "model: {}\n"
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = load(tmp_path / "x.ckpt")
    assert content["model"] == "model: {}\n"
    assert "labels" not in content  # pre-training decides among none
    assert [entry["steps"] for entry in content["lineage"]] == [3]


def test_a_checkpoint_keeps_what_its_images_look_like(
    run: tuple[LitModel, PairData, L.Trainer, Watch], tmp_path: Path
) -> None:
    """The features of the last evaluation's images, in half precision; a run that goes on has them at once."""
    model, data, trainer, _ = run
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    known_images = load(tmp_path / "x.ckpt")["known_images"]
    images = torch.cat([data.normalised(batch).image_BCHW for batch in data.val_dataloader()])
    with torch.no_grad():
        expected = mean_patch(model.backbone.eval().image(images))
    torch.testing.assert_close(known_images.float(), expected, atol=1e-3, rtol=0)
    other, more = make_model(), make_trainer(limit_val_batches=0)
    more.fit(other, make_data(steps=4), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(other.known_images, known_images)


def test_images_are_known_by_the_weights_that_saw_them(tmp_path: Path) -> None:
    """Features by earlier weights would make any image far, or none."""
    model, data, trainer = make_model(), make_data(), make_trainer(val_check_interval=2)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "known_images" not in load(tmp_path / "x.ckpt")  # of the third step
    trainer.validate(model, data, verbose=False)
    assert model.known_images is not None
    trainer.save_checkpoint(tmp_path / "y.ckpt")
    trainer.validate(model, data, ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert torch.equal(load(tmp_path / "y.ckpt")["known_images"], model.known_images)


def test_weights_of_a_checkpoint_measure_images_of_all_the_split(
    run: tuple[LitModel, PairData, L.Trainer, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need not be the run's last ones, and of a large split its beginning is not enough."""
    model, data, _, _ = run
    rows = len(data.splits["val"])
    monkeypatch.setattr("maskvlm.training.lit.evenly_spaced", lambda count: evenly_spaced(count, 2))
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    before = copy.deepcopy(model.backbone.image)
    known_images = model.known_images_by(state)
    for name, value in before.state_dict().items():
        assert torch.equal(model.backbone.image.state_dict()[name], value)
    before.load_state_dict({name: 1.5 * value for name, value in before.state_dict().items()})
    images = torch.cat([data.normalised(batch).image_BCHW for batch in data.val_dataloader()])
    with torch.no_grad():
        expected = mean_patch(before.eval()(images[[0, rows - 1]]))
    torch.testing.assert_close(known_images.float(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_images_of_examples_are_known_once_each(count: int, tmp_path: Path) -> None:
    """However many questions are about one, and whichever place it has among an example's."""
    twice = {"image_ids": [f"toy 12 {place}" for place in range(count)], "images": example(12, count)["images"]}
    source = Questions(count, changes={"val": {1: twice}})
    backbone = bare_backbone()
    task: Any = Classification(LABELS, count)
    model = LitModel(backbone, task)
    data, trainer = data_for(backbone, source), trainer_in(tmp_path, limit_val_batches=0)
    trainer.fit(model, data)
    assert model.known_images is None
    assert model.samples_after_training
    model.known_images = known = model.known_images_by(model.state_dict())
    batches = [data.normalised(batch) for batch in data.val_dataloader()]
    image_BPCHW = torch.cat([batch.image_BPCHW for batch in batches])[[0, 2, 3, 4, 5, 6]]
    with torch.no_grad():
        expected = mean_patch(backbone.eval().image(image_BPCHW.flatten(0, 1)))
    torch.testing.assert_close(known.float(), expected, atol=2e-3, rtol=0)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(load(tmp_path / "x.ckpt")["known_images"], known)
    trainer_in(tmp_path, limit_val_batches=0).fit(model, data)
    assert model.known_images is None  # of earlier weights


@pytest.mark.parametrize("examples", [True, False])
def test_what_known_images_are_computed_from_is_all_on_the_device(
    examples: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that stays on the CPU would end a run on a card; there is none here, so a device without data stands for
    one."""
    model: LitModel = LitModel(bare_backbone(), Classification(LABELS)) if examples else make_model()
    data = data_for(model.backbone, Questions()) if examples else make_data()
    trainer_in(tmp_path, limit_val_batches=0).fit(model, data)
    state, seen = model.state_dict(), list[Any]()

    def normalised(batch: Any) -> Any:
        seen.append(batch)
        raise InterruptedError

    monkeypatch.setattr(data, "normalised", normalised)
    monkeypatch.setattr(type(model.trainer.strategy), "root_device", torch.device("meta"))
    with pytest.raises(InterruptedError):
        model.known_images_by(state)
    assert {each.device.type for each in seen[0] if isinstance(each, torch.Tensor)} == {"meta"}


def test_a_control_without_images_knows_none() -> None:
    assert not LitModel(bare_backbone(), Classification(LABELS, image_ablation=True)).samples_after_training
    assert not make_model().samples_after_training  # its evaluations do it


class Plain(Task):
    """The least that a task must be; takes the defaults of all else."""

    def build(self, backbone: Any) -> None:
        self.head, self.other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 2)

    def forward(self, backbone: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {}

    def update(self, backbone: Any, batch: Any) -> None:
        pass

    def compute(self, backbone: Any) -> dict[str, float]:
        return {}


class Brief(Plain):
    """Its evaluation would fail after the first part of a run."""

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        return {}


def test_a_method_with_other_arguments_is_told_when_a_task_is_built() -> None:
    with pytest.raises(UserError, match=r"Brief\.compute: is called as compute\(backbone\)\. Let it take these"):
        Brief()


def test_what_a_task_gets_for_nothing() -> None:
    task, state = Plain(), torch.nn.Linear(2, 3).state_dict()
    task.build(None)
    before = task.other.weight.clone()
    heads = {f"head.{name}": value for name, value in state.items()}
    heads |= {"other.weight": torch.ones(5, 2), "stranger.weight": torch.ones(1)}
    assert task.warm_start(heads) == {"head.weight", "head.bias"}
    assert torch.equal(task.head.weight, state["weight"])
    assert torch.equal(task.other.weight, before)  # of another shape
    assert (task.card(), task.files(), task.chance_levels(4), task.predictions) == ({}, {}, {}, [])
    assert task.weights.get("anything", 1.0) == 1.0


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (torch.zeros(()), "Plain.forward: gave a tensor of shape []"),
        ({}, "Plain.forward: gave no loss"),
        ({"own": torch.zeros(3)}, "Plain.forward: gave own as a tensor of shape [3]"),
        ({"own": 0.5}, "Plain.forward: gave own as a float"),
        ({"own": torch.zeros(())}, "Plain.forward: gave no loss that has a gradient"),
    ],
)
def test_a_task_that_gives_no_losses_is_told(terms: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        checked_terms(Plain(), terms)
    model = make_model()
    model.task.register_forward_hook(lambda *_: terms)
    with pytest.raises(UserError, match=re.escape(message.partition(".")[2])):
        make_trainer().fit(model, make_data())


@pytest.mark.parametrize(
    ("weights", "accepted"),
    [
        ({"own": 2.0}, True),
        ({"own": 2.0, "late": 0.5, "later": 0.5}, True),  # terms that another step has
        ({"off": 0.0}, True),
        ({"owm": 2.0}, False),
    ],
)
def test_a_weight_that_misnames_its_loss_is_refused(weights: dict[str, float], accepted: bool) -> None:
    task, terms = Plain(), {"own": torch.zeros((), requires_grad=True)}
    task.weights = weights
    if accepted:
        assert checked_terms(task, terms) == terms
    else:
        with pytest.raises(UserError, match=r"Plain\.weights: has a weight for owm, and forward gave own\. Name each"):
            checked_terms(task, terms)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([1.0], "Plain.compute: gave a list"),
        ({"score": 1.0, "own": torch.zeros(3)}, "Plain.compute: gave own as a tensor of shape [3]"),
        ({"own": 1.0}, "Plain.compute: gave no 'score'"),
    ],
)
def test_a_task_that_gives_no_metrics_is_told(metrics: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        checked_metrics(Plain(), metrics, True)
    monkeypatch.setattr(MaskedPretraining, "compute", lambda *_: metrics)
    with pytest.raises(UserError, match=re.escape(message.partition(".")[2])):
        make_trainer().fit(make_model(), make_data())


def test_an_evaluation_needs_no_score() -> None:
    """Nothing is chosen by it there."""
    metrics = {"own": torch.ones(1), "numpy": np.float32(0.5), "count": 3}
    assert checked_metrics(Plain(), metrics, False) == metrics


def test_a_loss_without_gradient_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.task.register_forward_hook(lambda task, inputs, terms: terms | {"mim": terms["mim"].detach()})
    with caplog.at_level("WARNING", logger="maskvlm"):
        make_trainer(StuckLoss()).fit(model, make_data())
    (warning,) = [line for line in caplog.messages if "no gradient" in line]
    assert warning.startswith("warning: mim has no gradient")


def test_lightnings_way_to_load_says_what_loads_a_checkpoint() -> None:
    with pytest.raises(UserError, match=r"first\.ckpt: holds only data: .* MaskVLM\.from_pretrained\(path\) builds it"):
        LitModel.load_from_checkpoint("first.ckpt")


def test_a_run_of_one_further_loss_ends_and_its_latest_weights_are_the_best() -> None:
    """As the first run of `studies/claims.yaml`, whose arms wait for it; fails where an evaluation wants a score."""
    weights = dict.fromkeys(("weight_itc", "weight_itm", "weight_mlm", "weight_mim"), 0.0)
    backbone = toy_backbone(length=24, vocab=150)
    backbone.text.tokenizer = None
    model = LitModel(backbone, MaskedPretraining(mask_block=16, weight_words=10.0, **weights), warmup=1)
    trainer = make_trainer()
    trainer.fit(model, make_data())
    assert trainer.global_step == 3
    assert 0 < model.metrics["score"] < 1


def test_words_are_counted_for_new_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second training would overwrite what the first one made of them."""
    model, data, calls = make_model(), make_data(), []
    monkeypatch.setattr(MaskedPretraining, "use_token_counts", lambda *_: calls.append(1))
    for _ in range(2):
        make_trainer(limit_val_batches=0).fit(model, data)
    make_trainer(limit_val_batches=0).fit(LitModel(model.backbone, model.task), data)
    assert calls == [1]


def test_an_evaluation_begins_anew(run: tuple[LitModel, PairData, L.Trainer, Watch]) -> None:
    model, data, _, _ = run
    trainer = make_trainer()
    trainer.validate(model, data, verbose=False)
    whole = dict(model.metrics)
    model.task.update(model.backbone, data.normalised(next(iter(data.val_dataloader()))))  # and then it was broken off
    trainer.validate(model, data, verbose=False)
    assert model.metrics == whole


def test_a_script_gets_its_signal_handlers_back(tmp_path: Path) -> None:
    """After a training that was stopped and after one that ended; fails where the next training stops at once."""

    class Interrupted(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before, model, data = signal.getsignal(signal.SIGTERM), make_model(), make_data()
    with pytest.raises(Stopped):
        make_trainer(KeepState(str(tmp_path)), Interrupted(), enable_checkpointing=True, limit_val_batches=0).fit(
            model, data
        )
    assert signal.getsignal(signal.SIGTERM) is before
    trainer = make_trainer(KeepState(str(tmp_path)), enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(model, data)
    assert trainer.global_step == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_model_whose_training_failed_is_no_longer_guarded() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise KeyError("a mistake of the script")

    model, data = make_model(), make_data()
    with pytest.raises(KeyError):
        make_trainer(StepGuard(), Fails(), limit_val_batches=0).fit(model, data)
    make_trainer(limit_val_batches=0).fit(model, data)
    assert model.guard is None


def test_the_data_of_every_training_of_a_backbone_are_named() -> None:
    """Fails where the last one alone is: images of the others would count as never seen."""
    model, first = make_model(), make_data()
    make_trainer(limit_val_batches=0).fit(model, first)
    # With the tokenizer that the model has by now.
    second = PairData(Scenes(train=12, val=6, test=5, size=SIZE), model.backbone.input_spec, batch_size=6, steps=3)
    once = [(entry.sha, entry.steps) for entry in model.history]
    assert len(once) == 1
    make_trainer(limit_val_batches=0).fit(model, second)
    twice = [(entry.sha, entry.steps) for entry in model.history]
    other = LitModel(model.backbone, model.task, warmup=1)
    make_trainer(limit_val_batches=0).fit(other, first)
    assert [(entry.sha, entry.steps) for entry in other.history] == [*twice, *once]
    assert twice[:1] == once
    assert twice[1] != once[0]
    lineage = MaskVLM.from_modules(model.backbone, model.task).config.lineage
    assert [entry["sha"] for entry in lineage] == [sha for sha, _ in (*twice, *once)]


def test_whoever_measures_a_model_knows_what_it_was_trained_on(tmp_path: Path) -> None:
    """Another trainer than the one that trained it, which has made no step itself; with the weights as they are, or
    with a checkpoint's."""
    model, data = make_model(), make_data()
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    once = [(data.splits["train"].fingerprint, 3)]
    for kwargs in ({}, {"ckpt_path": tmp_path / "trained.ckpt", "weights_only": True}):
        other = make_trainer()
        # Its data have no training split.
        world = Scenes(train=24, val=6, test=5, size=SIZE)
        other.test(model, PairData(world, model.backbone.input_spec, steps=3), verbose=False, **kwargs)
        assert [(entry.sha, entry.steps) for entry in model.history] == once
        assert model.measured_step == 3
        other.save_checkpoint(tmp_path / "measured.ckpt")
        assert [(entry["sha"], entry["steps"]) for entry in load(tmp_path / "measured.ckpt")["lineage"]] == once


def test_what_a_training_that_died_has_read_is_named() -> None:
    """By whoever saves the model as it is in memory, and by the next training of it."""
    model, data = make_model(), make_data()

    class Dies(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("dies")

    with pytest.raises(RuntimeError, match="dies"):
        make_trainer(Dies(), limit_val_batches=0).fit(model, data)
    assert [entry["steps"] for entry in MaskVLM.from_modules(model.backbone, model.task).config.lineage] == [2]
    make_trainer(limit_val_batches=0).fit(model, make_data())
    assert [entry.steps for entry in model.history] == [2, 3]


def test_features_that_are_kept_follow_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the texts alone name them: photos that were replaced would be trained on as they were."""
    names: list[str] = []
    rows: list[int] = []

    class Photos(list[int]):
        fingerprint = "same"

        def __init__(self, identity: str) -> None:
            super().__init__([0])
            self.image_identity = identity

    model = make_model()
    kept = SimpleNamespace(open_cache=lambda follows, count: (names.append(follows), rows.append(count)))
    monkeypatch.setattr(model.backbone.image, "frozen_blocks", kept)
    for identity, versions in (("a", 1), ("b", 1), ("a", 1), ("a", 2)):
        data = SimpleNamespace(versions=versions, splits={"train": Photos(identity)})
        monkeypatch.setattr(LitModel, "data", data)
        monkeypatch.setattr(LitModel, "trainer", SimpleNamespace(precision="32-true"))
        model._open_feature_cache()
    assert names[0] == names[2] != names[1]
    assert names[3] not in names[:3]  # mirrored images have rows of their own
    assert rows == [1, 1, 1, 2]


# ---------------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 64), ("mean", (0.1, 0.2, 0.3)), ("std", (0.1, 0.2, 0.3)), ("text_length", 8)],
)
def test_data_prepared_for_another_model_are_refused(field: str, value: Any) -> None:
    """In an evaluation, too, whose figures would be those of other images or texts."""
    model, data = make_model(), make_data()
    data.spec = data.spec._replace(**{field: value})
    with pytest.raises(UserError, match=rf"PairData\(spec\): {field} is .*, and the model's "):
        make_trainer().fit(model, data)
    with pytest.raises(UserError, match=rf"PairData\(spec\): {field} is "):
        make_trainer().validate(model, data, verbose=False)


def in_two_phases(share: float, **settings: Any) -> LitModel:
    backbone = toy_backbone(length=24, vocab=150)
    backbone.text.tokenizer = None
    task = MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8, rerank_k=3, contrast_first=share)
    return LitModel(backbone, task, **{"warmup": 1, **settings})


@pytest.mark.parametrize(("share", "most"), [(0.0, 6), (0.5, 3), (0.8, 1)])
def test_a_warm_up_is_no_longer_than_what_it_warms(share: float, most: int) -> None:
    with pytest.raises(
        UserError, match=rf"model.warmup: {most + 1} steps, but .* are trained for {most} of the run's 6"
    ):
        make_trainer().fit(in_two_phases(share, warmup=most + 1), make_data(6))
    make_trainer(limit_val_batches=0).fit(in_two_phases(share, warmup=most), make_data(6))


def test_losses_that_no_step_is_left_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for steps, told in ((2, 1), (6, 0)):
        caplog.clear()
        make_trainer(limit_val_batches=0).fit(in_two_phases(0.75), make_data(steps))
        lines = [record.getMessage() for record in caplog.records if "first phase takes all" in record.getMessage()]
        assert len(lines) == told


@pytest.mark.parametrize(("lr", "told"), [(1e-6, 1), (1e-4, 0)])
def test_a_rate_that_never_falls_is_told(lr: float, told: int, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(limit_val_batches=0).fit(make_model(lr=lr), make_data(2))
    lines = [each.getMessage() for each in caplog.records if "min_lr 3e-05 is above" in each.getMessage()]
    assert len(lines) == told
    assert all("Give model.min_lr, such as 1e-07" in line for line in lines)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.9, 0.9), (0.9, 1.0)])
def test_two_decay_rates(betas: Any) -> None:
    with pytest.raises(UserError, match=r"model\.betas: .*Give two numbers from 0 to below 1"):
        make_model(betas=betas)


def test_of_two_tasks_on_one_backbone_each_trains_its_own_parts() -> None:
    """Fails where the task that was built last decides what is frozen for the one that is trained."""
    first = make_model()
    backbone = first.backbone
    alone = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    LitModel(backbone, Classification(LABELS))
    assert not backbone.image.mask_token.requires_grad  # nothing is masked there
    make_trainer(limit_val_batches=0).fit(first, make_data(1))
    assert {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad} == alone
    assert backbone.image.mask_token.requires_grad
