"""Whole runs of a few steps on the built-in world: what is logged, repeated, stored and read back."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from toy_examples import LABELS
from toys import SIZE, toy_backbone
from training.small_runs import At

from maskvlm import MaskVLM
from maskvlm.checkpoint.io import load
from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.text import tokenizer_hash, tokenizer_json
from maskvlm.objectives.classification import Classification
from maskvlm.objectives.novelty import mean_patch
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.task import Task, checked_metrics, checked_terms
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.lit import LitModel
from maskvlm.training.step_guard import StepGuard
from maskvlm.utils.errors import UserError


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


def make_model(task: dict[str, Any] | None = None, **settings: Any) -> LitModel:
    backbone = toy_backbone(length=24, vocab=150, dropout=0.1)
    backbone.text.tokenizer = None
    own = {"mask_block": 16, "decoder_layers": 1, "contrast_dim": 8, "rerank_k": 3, "weight_mlm": 4.0}
    usual = {"lr": 1e-3, "lr_encoders": 1e-4, "lr_cross": 2e-4, "betas": (0.9, 0.98), "warmup": 1}
    return LitModel(backbone, MaskedPretraining(**own | (task or {})), **usual | settings)


def make_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "use_distributed_sampler": False}
    fixed |= {"num_sanity_val_steps": 0, "enable_checkpointing": False, "gradient_clip_val": 1.0}
    return L.Trainer(**{**quiet, **fixed, **settings}, callbacks=list(callbacks), plugins=[SafeCheckpointIO()])


def train(model: LitModel, data: PairData, *callbacks: L.Callback, **settings: Any) -> list[float]:
    """The losses of a training without evaluations."""
    watch, start = Watch(), settings.pop("start", None)
    trainer = make_trainer(watch, *callbacks, limit_val_batches=0, **settings)
    trainer.fit(model, data, ckpt_path=start, weights_only=start and True)
    return watch.losses


Run = tuple[LitModel, PairData, L.Trainer, Watch]


@pytest.fixture(scope="module")
def run() -> Run:
    """Three steps and an evaluation."""
    model, data, watch = make_model(), make_data(), Watch()
    trainer = make_trainer(watch)
    trainer.fit(model, data)
    return model, data, trainer, watch


# ------------------------------------------------------------------ steps


def test_terms_and_their_weighted_sum_are_logged_and_metrics_kept(run: Run) -> None:
    """One epoch of Lightning is the whole run."""
    model, data, trainer, watch = run
    assert (trainer.global_step, len(watch.losses), trainer.current_epoch, data.samples) == (3, 3, 1, 18)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    weights = {"itc": 1, "itm": 1, "mlm": 4, "mim": 1}
    total = sum(weight * logged[f"train/{name}"] for name, weight in weights.items())
    assert total == pytest.approx(logged["train/loss"], rel=1e-6)
    assert logged["train/loss"] == pytest.approx(watch.losses[-1])
    assert 2 < logged["train/mlm"] < 8  # nats of a token out of 150, not four times as much
    assert {"retrieval/itc_tr_r1", "retrieval/ir_r10", "mlm/accuracy_no_image", "mim/mse_wrong_text"} <= logged.keys()
    assert all(logged[name] == pytest.approx(value) for name, value in model.metrics.items())
    assert all(math.isfinite(value) for value in model.metrics.values())


def test_rates_follow_warm_up_and_cosine(run: Run) -> None:
    """One step of warm-up, then down to 3e-5 after the third."""
    _, _, trainer, watch = run
    groups = trainer.optimizers[0].param_groups
    assert all(group["fused"] and group["betas"] == (0.9, 0.98) for group in groups)
    peaks = {"encoders": 1e-4, "cross": 2e-4, "rest": 1e-3}
    names = [group["name"].partition(" ")[0] for group in groups]
    assert {*names} == {*peaks}
    for rates, factor in zip(watch.rates, (1.0, 1.0, 0.5), strict=True):
        assert rates == pytest.approx([3e-5 + (peaks[name] - 3e-5) * factor for name in names])


def test_the_same_seed_gives_the_same_curve_to_the_bit(run: Run) -> None:
    """A run is a function of its seeds: neither what was drawn before nor the workers matter."""
    model, data = make_model(), make_data()
    torch.manual_seed(99)
    assert train(model, data) == run[3].losses
    assert train(make_model(), make_data(workers=1)) == run[3].losses
    assert train(make_model(), make_data(seed=1))[0] != run[3].losses[0]
    assert train(make_model(seed=1), make_data())[0] != run[3].losses[0]


def test_a_run_goes_on_to_the_bit_from_each_of_its_phases(tmp_path: Path) -> None:
    """Contrast alone for three of six steps: saved before it ends, where it ends, and after. What is late has an Adam
    that begins with its own first step."""
    phases = {"contrast_first": 0.5, "freeze_aligned": True, "negative_queue": 12}

    def save(trainer: L.Trainer) -> None:
        trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole, data = make_model(phases), make_data(6, batch_size=4)
    expected = train(whole, data, At(save, 2, 3, 4, 6))
    for step in (2, 3, 4):
        model = make_model(phases)
        assert train(model, make_data(6, batch_size=4), At(save, 6), start=tmp_path / f"{step}.ckpt") == expected[step:]
        again, content = load(tmp_path / "6.ckpt"), load(tmp_path / "6.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(again["state_dict"][name], value), (step, name)
    states, groups = content["optimizer_states"][0]["state"], content["optimizer_states"][0]["param_groups"]
    late = [number for group in groups if group.get("late") for number in group["params"]]
    assert {int(states[number]["step"]) for number in late} == {3}


def test_accumulated_passes_make_one_step() -> None:
    watch, data = Watch(), make_data(steps=2, accumulate=2)
    trainer = make_trainer(watch, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(make_model(), data)
    assert (trainer.global_step, len(watch.losses), len(watch.rates)) == (2, 4, 2)
    assert max(watch.rates[1]) == pytest.approx(1e-3)  # scheduled by step, not by pass


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_and_evaluation_in_every_precision(precision: Any) -> None:
    """Lightning does not clip for a fused optimiser in mixed precision; bfloat16 has nothing to unscale. Attention on a
    CPU is two products there, also where a model is measured alone: torch's kernel is the slower one."""
    norms: list[float] = []

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            norms.extend([torch.cat(grads).norm().item()] if grads else [])

    model, measured, data = make_model(), make_model(), make_data(steps=2)
    make_trainer(Norms(), precision=precision, gradient_clip_val=0.5).fit(model, data)
    assert all(math.isfinite(value) for value in model.metrics.values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-3)
    assert norms
    make_trainer(precision=precision, limit_val_batches=0).validate(measured, make_data())
    for each in (model, measured):
        own = {module.by_products for module in each.modules() if hasattr(module, "by_products")}
        assert own == {precision == "bf16-mixed"}


@pytest.mark.parametrize(
    ("told", "model", "data"),
    [
        ("only the 3 pairs of each pass, not all 6", {}, {"accumulate": 2}),
        ("a pass has one image", {}, {"batch_size": 2, "accumulate": 2}),
        ("a batch of 48 is larger than the 24 training images", {}, {"batch_size": 48}),
        ("min_lr 3e-05 is above", {"lr": 1e-6}, {}),
        ("first phase takes all 1 steps", {"task": {"contrast_first": 0.75}}, {}),
        ("", {}, {}),
    ],
)
def test_what_a_run_is_told(
    told: str, model: dict[str, Any], data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    passes = data.get("accumulate", 1)
    train(make_model(**model), make_data(1, **data), accumulate_grad_batches=passes)
    notes = [each.getMessage() for each in caplog.records if each.getMessage().startswith(("note: ", "warning: "))]
    assert [note for note in notes if told in note][:1] == notes[-1:]
    assert bool(notes) == bool(told)


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_brings_weights_tokenizer_and_what_it_is(run: Run, tmp_path: Path) -> None:
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
    content = load(tmp_path / "last.ckpt")
    assert "labels" not in content  # pre-training decides among none
    assert "hyper_parameters" not in content  # nothing in a checkpoint decides about the model
    assert [entry["steps"] for entry in content["lineage"]] == [3]
    bare = make_model()
    bare.on_load_checkpoint(content)  # without data
    assert tokenizer_json(bare.backbone.text.tokenizer) == content["tokenizer"]


def test_the_test_split_is_measured_and_an_evaluation_begins_anew(run: Run) -> None:
    model, data, _, _ = run
    trainer = make_trainer()
    trainer.test(model, data, verbose=False)
    assert model.metrics["retrieval/pictures"] == 5
    trainer.validate(model, data, verbose=False)
    whole = dict(model.metrics)
    model.task.update(model.backbone, data.normalised(next(iter(data.val_dataloader()))))  # and then it was broken off
    trainer.validate(model, data, verbose=False)
    assert model.metrics == whole


def test_images_are_known_by_the_weights_that_saw_them(tmp_path: Path) -> None:
    """Features of the last evaluation's images, in half precision. By earlier weights any image would be far, or
    none."""
    model, data, trainer = make_model(), make_data(), make_trainer(val_check_interval=2)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "known_images" not in load(tmp_path / "x.ckpt")  # of the third step
    trainer.validate(model, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "y.ckpt")
    known_images = load(tmp_path / "y.ckpt")["known_images"]
    images = torch.cat([data.normalised(batch).image_BCHW for batch in data.val_dataloader()])
    with torch.no_grad():
        expected = mean_patch(model.backbone.eval().image(images))
    torch.testing.assert_close(known_images.float(), expected, atol=1e-3, rtol=0)
    other = make_model()
    make_trainer(limit_val_batches=0).fit(other, make_data(), ckpt_path=tmp_path / "y.ckpt", weights_only=True)
    assert torch.equal(other.known_images, known_images)  # a run that goes on has them at once


# ------------------------------------------------------------------ several trainings in one process


def test_the_data_of_every_training_are_named() -> None:
    """Of one that died what it has read, and no guard is left of it. Fails where the last one alone is named: images of
    the others would count as never seen."""

    def dies(_: L.Trainer) -> None:
        raise KeyError("dies")

    model, first = make_model(), make_data()
    with pytest.raises(KeyError):
        train(model, first, StepGuard(), At(dies, 3))  # in the third step
    assert [entry["steps"] for entry in MaskVLM.from_modules(model.backbone, model.task).config.lineage] == [2]
    # With the tokenizer that the model has by now.
    second = PairData(Scenes(train=12, val=6, test=5, size=SIZE), model.backbone.input_spec, batch_size=6, steps=3)
    train(model, second)
    assert model.guard is None
    other = LitModel(model.backbone, model.task, warmup=1)
    train(other, first)
    shas = [data.splits["train"].fingerprint for data in (first, second, first)]
    assert [(entry.sha, entry.steps) for entry in other.history] == list(zip(shas, (2, 3, 3), strict=True))
    assert shas[0] != shas[1]
    assert [entry["sha"] for entry in MaskVLM.from_modules(model.backbone, model.task).config.lineage] == shas


def test_of_two_tasks_on_one_backbone_each_trains_its_own_parts() -> None:
    """Fails where the task that was built last decides what is frozen for the one that is trained."""
    first = make_model()
    backbone = first.backbone
    alone = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    LitModel(backbone, Classification(LABELS))
    assert not backbone.image.mask_token.requires_grad  # nothing is masked there
    train(first, make_data(1))
    assert {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad} == alone
    assert backbone.image.mask_token.requires_grad


# ------------------------------------------------------------------ tasks


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


Brief = type("Brief", (Plain,), {"compute": lambda self: {}})
"""Its evaluation would fail after the first part of a run."""
Weighted = type("Weighted", (Plain,), {"weights": {"own": 2.0, "late": 0.5, "off": 0.0}})
Misnamed = type("Misnamed", (Plain,), {"weights": {"owm": 2.0}})
LEARNS = {"own": torch.zeros((), requires_grad=True)}


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
    assert checked_terms(Plain(), LEARNS) == LEARNS
    assert checked_terms(Weighted(), LEARNS) == LEARNS  # another step has the other terms
    assert checked_metrics(Plain(), {"own": 1.0}, False) == {"own": 1.0}  # nothing is chosen by it in an evaluation


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (Brief, r"Brief\.compute"),
        (lambda: checked_terms(Plain(), torch.zeros(())), "a tensor of shape"),
        (lambda: checked_terms(Plain(), {}), "no loss"),
        (lambda: checked_terms(Plain(), {"own": torch.zeros(3)}), "own as a tensor"),
        (lambda: checked_terms(Plain(), {"own": 0.5}), "own as a float"),
        (lambda: checked_terms(Plain(), {"own": torch.zeros(())}), "no loss that has a gradient"),
        (lambda: checked_terms(Misnamed(), LEARNS), "owm"),
        (lambda: checked_metrics(Plain(), [1.0], True), "gave a list"),
        (lambda: checked_metrics(Plain(), {"score": 1.0, "own": torch.zeros(3)}, True), "own as a tensor"),
        (lambda: checked_metrics(Plain(), {"own": 1.0}, True), "score"),
        (lambda: LitModel.load_from_checkpoint("first.ckpt"), r"first\.ckpt"),
        (lambda: make_model(lr_cross=-1), r"model\.lr_cross"),
        (lambda: make_model(stable=1.0), r"model\.stable"),
        (lambda: make_model(betas=(0.9,)), r"model\.betas"),
        (lambda: make_model(betas=(0.9, 1.0)), r"model\.betas"),
        (lambda: make_model(chunk=0), r"model\.chunk"),
        (lambda: LitModel(Plain(), toy_backbone()), "LitModel"),  # type: ignore[arg-type]
    ],
)
def test_what_no_run_can_use_is_refused(check: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check()


def test_a_run_checks_what_its_task_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    hook = model.task.register_forward_hook(lambda *_: {})
    with pytest.raises(UserError, match="gave no loss"):
        train(model, make_data(1))
    hook.remove()
    monkeypatch.setattr(MaskedPretraining, "compute", lambda *_: {"own": 1.0})
    with pytest.raises(UserError, match="score"):
        make_trainer().fit(model, make_data(1))


@pytest.mark.parametrize(("field", "value"), [("image_size", 64), ("std", (0.1, 0.2, 0.3)), ("text_length", 8)])
def test_data_prepared_for_another_model_are_refused(field: str, value: Any) -> None:
    """In an evaluation, too, whose figures would be those of other images or texts."""
    model, data = make_model(), make_data()
    data.spec = data.spec._replace(**{field: value})
    for run in (make_trainer().fit, make_trainer().validate):
        with pytest.raises(UserError, match=rf"PairData\(spec\): {field} is "):
            run(model, data)


@pytest.mark.parametrize(("share", "most"), [(0.0, 6), (0.5, 3), (0.8, 1)])
def test_a_warm_up_is_no_longer_than_what_it_warms(share: float, most: int) -> None:
    for longer in (1, 0):
        model = make_model({"contrast_first": share}, warmup=most + longer)
        model._trainer = SimpleNamespace(datamodule=make_data(6), fast_dev_run=False, precision_plugin=None)  # type: ignore[assignment]
        if longer:
            with pytest.raises(UserError, match=rf"model.warmup: {most + 1} steps, but .* for {most} of the run's 6"):
                model.configure_optimizers()
        else:
            model.configure_optimizers()
