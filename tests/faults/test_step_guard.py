"""A step that would do harm is not made: weights and moments stay as they are to the bit, its samples are named."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from toys import SIZE, toy_backbone

from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.lit import LitModel
from maskvlm.training.resume import diverged_at
from maskvlm.training.run_record import RunRecord
from maskvlm.training.step_guard import GRADIENT, LEAST, LOSS, SPIKE, WINDOW, LossWindow, StepGuard, median, verdict_of
from maskvlm.utils.errors import ExitCode, UserError

NAN, INF = math.nan, math.inf
AT = 9  # the pass that is poisoned


class Poisoned(LitModel):
    """Passes of these numbers have a loss times `factor`, or `gradient` in one place of one gradient."""

    def __init__(self, at: set[int], factor: float | None = None, gradient: float | None = None) -> None:
        backbone = toy_backbone(length=24, vocab=150)
        backbone.text.tokenizer = None
        task = MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8)
        super().__init__(backbone, task, lr=1e-3, lr_encoders=1e-4, warmup=1)
        self.at, self.factor, self.gradient = at, factor, gradient
        self.passes = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.passes = batch_idx
        return loss * self.factor if self.factor is not None and batch_idx in self.at else loss

    def on_after_backward(self) -> None:
        if self.gradient is not None and self.passes in self.at:
            grad = self.backbone.image.mask_token.grad
            assert grad is not None
            grad.view(-1)[0] = self.gradient


class Shas(L.Callback):
    """sha256 of weights, of moments and of both after each pass, and the rows of each pass."""

    def __init__(self) -> None:
        self.weights: list[str] = []
        self.moments: list[str] = []
        self.rows: list[list[int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows.append(batch.index_B.tolist())
        self.weights.append(sha_of([parameter.detach() for parameter in module.parameters()]))
        state = trainer.optimizers[0].state_dict()["state"]
        self.moments.append(sha_of([value for each in state.values() for value in each.values()]))

    def unchanged(self) -> list[int]:
        """Passes after which weights and moments were what they had been; fails where only one of them was."""
        steps = range(1, len(self.weights))
        weights = [step for step in steps if self.weights[step] == self.weights[step - 1]]
        assert weights == [step for step in steps if self.moments[step] == self.moments[step - 1]]
        return weights


def sha_of(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def fit(
    folder: Path, model: LitModel, steps: int = 12, stop_after: int = 10, guarded: bool = True, **settings: Any
) -> tuple[Shas, StepGuard]:
    spec = model.backbone.input_spec
    accumulate = settings.get("accumulate_grad_batches", 1)
    world = Scenes(train=24, val=6, test=5, size=SIZE)
    data = PairData(world, spec, steps=steps, batch_size=6, randaugment=None, accumulate=accumulate)
    shas, guard = Shas(), StepGuard(stop_after)
    fixed: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
        "devices": 1, "max_epochs": 1, "use_distributed_sampler": False, "enable_checkpointing": False,
        "gradient_clip_val": 1.0, "limit_val_batches": 0, "default_root_dir": folder, "plugins": [SafeCheckpointIO()],
    }  # fmt: skip
    trainer = L.Trainer(**{**fixed, **settings}, callbacks=[shas, *([guard] if guarded else []), RunRecord()])
    try:
        trainer.fit(model, data)
    finally:
        model.trained = True
    return shas, guard


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ({"factor": NAN}, "its loss is not finite (nan)"),
        ({"factor": 1e9}, "its loss shot up ("),
        ({"gradient": -INF}, "a gradient is not finite ("),
    ],
)
def test_the_step_changes_nothing_and_names_its_samples(
    harm: dict[str, float], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no healthy step is skipped after it."""
    model = Poisoned({AT}, **harm)
    shas, guard = fit(tmp_path, model)
    assert shas.unchanged() == [AT]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    content = json.loads((tmp_path / "bad_samples.json").read_text())
    (step,) = content["skipped_steps"]["steps"]
    assert step["step"] == AT + 1
    assert step["reason"].startswith(reason)
    assert [one["index"] for one in step["samples"]] == shas.rows[AT]
    split = Scenes(train=24, val=6, test=5, size=SIZE).split("train")
    for one in step["samples"]:
        assert one["image_id"] == split[one["index"]]["image_id"]
        assert one["origin"] == split[one["index"]]["origin"]
    assert capsys.readouterr().err.count("warning: step ") == 1
    assert guard.in_a_row == 0


def test_one_bad_pass_of_several_spoils_the_step(tmp_path: Path) -> None:
    """Passes 18 and 19 are step 10; both are listed."""
    shas, _ = fit(tmp_path, Poisoned({18}, NAN), accumulate_grad_batches=2)
    assert [step for step in shas.unchanged() if step % 2] == [19]  # between them nothing is updated anyway
    (step,) = json.loads((tmp_path / "bad_samples.json").read_text())["skipped_steps"]["steps"]
    assert step["step"] == 10
    assert [one["index"] for one in step["samples"]] == shas.rows[18] + shas.rows[19]


def test_in_half_precision(tmp_path: Path) -> None:
    """In float16 with a scaler: what overflows there is the scaler's own, and is not told."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)  # overflows at first
    plugin = MixedPrecision("16-mixed", "cpu", scaler)  # type: ignore[arg-type]
    at = 19
    shas, guard = fit(tmp_path, Poisoned({at}, NAN), steps=21, plugins=[SafeCheckpointIO(), plugin])
    *others, last = shas.unchanged()
    assert last == at
    assert others  # the scaler's
    assert max(others) < at - 2
    assert [one["step"] for one in guard.skipped] == [at + 1]


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """Two, then three; the third of the three ends it, and the weights are those before them."""
    model = Poisoned({2, 3, 5, 6, 7, 8, 9, 10, 11}, factor=NAN)
    with pytest.raises(UserError) as caught:
        fit(tmp_path, model, stop_after=3)
    assert caught.value.code == ExitCode.BAD_DATA
    assert "3 steps in a row were skipped up to step 8" in caught.value.what
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    listed = json.loads((tmp_path / "bad_samples.json").read_text())["skipped_steps"]["steps"]
    assert [one["step"] for one in listed] == [3, 4, 6, 7, 8]
    assert diverged_at(tmp_path) == 8


def test_a_run_whose_steps_were_all_skipped_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all 2 steps were skipped: nothing was learned") as caught:
        fit(tmp_path, Poisoned({0, 1}, factor=NAN), steps=2)
    assert caught.value.code == ExitCode.BAD_DATA
    assert diverged_at(tmp_path) == 2
    fit(tmp_path / "one", Poisoned({0}, factor=NAN), steps=2)  # one step taught something
    assert diverged_at(tmp_path / "one") is None


# ------------------------------------------------------------------ the window


def limits(losses: list[float]) -> tuple[LossWindow, list[int]]:
    """The window after these losses of healthy gradients, and the verdict on each."""
    window, verdicts = LossWindow(), []
    for loss in losses:
        value = torch.tensor(loss)
        verdict = verdict_of(value, torch.tensor(1.0), window.limit(value.device))
        window.take(value, verdict)
        verdicts.append(int(verdict))
    return window, verdicts


def test_what_is_a_spike() -> None:
    falling = [6.0 * 0.98**step for step in range(300)]
    assert set(limits(falling)[1]) == {0}
    assert limits([*falling, 60.0, NAN, INF, 0.01])[1][-4:] == [SPIKE, LOSS, LOSS, 0]
    assert limits([*falling, 5.0])[1][-1] == 0  # what it began with is no spike
    assert limits([1e9] * 3 + [1.0] * 20)[1] == [0] * 23  # nobody knows yet
    noise = np.random.default_rng(0).normal(3.0, 1.0, 2000).tolist()
    assert set(limits(noise)[1]) == {0}
    assert limits([5.0, *[NAN] * 200, *[5.0] * LEAST, 5e9])[1][-1] == SPIKE  # what is not finite takes no part
    assert limits([-5.0] * 20 + [-4.0, 1e6])[1][-2:] == [0, SPIKE]
    assert int(verdict_of(torch.tensor(1.0), torch.tensor(INF), torch.tensor(NAN))) == GRADIENT


@given(st.lists(st.floats(width=32), max_size=30))
def test_the_median_leaves_out_what_is_no_number(values: list[float]) -> None:
    known = sorted(value for value in values if not math.isnan(value))
    middle, count = median(torch.tensor([*values, NAN], dtype=torch.float32))
    assert int(count) == len(known)
    if known:
        assert float(middle) == known[(len(known) - 1) // 2]


def test_a_verdict_never_asks_the_device() -> None:
    """Tensors without data stand for a device that would be waited for."""
    window = LossWindow()
    loss = torch.empty((), device="meta")
    window.take(loss, verdict_of(loss, loss, window.limit(loss.device)))


def test_a_run_that_goes_on_judges_as_before() -> None:
    window, _ = limits([3.0, NAN, *[2.0 + step / 7 for step in range(WINDOW)]])
    again = LossWindow()
    again.load_state_dict(copy.deepcopy(window.state_dict()))
    for loss in (1.5, NAN, 7.25):
        value = torch.tensor(loss)
        assert torch.equal(window.limit(value.device), again.limit(value.device))
        for each in (window, again):
            each.take(value, torch.tensor(0))
