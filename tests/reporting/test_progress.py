"""The line of a run, and the warning of a loss that learns nothing."""

import csv
import io
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import toy_batch

from maskvlm.objectives.pretraining_losses import ImageTextMatching, PretrainingLoss
from maskvlm.reporting.meters import Readings, StepSpeed
from maskvlm.reporting.progress import LEGEND, StuckLoss, TrainingProgress, status_line, steps_of, stuck_line

LEVELS = {"itc": math.log(6), "itm": 0.6365}


class Module(L.LightningModule):
    """Logs the losses it is told to; `warmup` in steps, as LitModel has it."""

    def __init__(self, losses: dict[str, list[float]], warmup: float = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.losses, self.warmup = losses, warmup
        self.task: Any = SimpleNamespace(
            chance_levels=lambda pairs: {"itc": math.log(pairs), "itm": 0.6365},
            stuck_hints={"itm": ImageTextMatching.stuck_hint},
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log_dict({f"train/{name}": values[batch_idx] for name, values in self.losses.items()}, batch_size=1)
        self.log("train/loss", 1.0, batch_size=1)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", 1.0, batch_size=1)


def train(
    module: L.LightningModule, callbacks: list[L.Callback], steps: int, folder: Path, **settings: Any
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=callbacks, logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"log_every_n_steps": 2, **settings},
    )  # fmt: skip
    batches: Any = [toy_batch(6)] * steps
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, DataLoader(batches[:2], batch_size=None))
    return trainer


def stream_of(progress: TrainingProgress, **settings: Any) -> io.StringIO:
    out = io.StringIO()
    progress.console = Console(file=out, width=140, **settings)
    return out


def test_the_line_shows_each_loss_beside_its_level() -> None:
    readings = Readings({"itc": 2.3149, "mim": 0.0985, "vqa": 12.0}, {"itc": 4.1589, "mim": 0.5})
    line = status_line(readings, StepSpeed(78.3, 0.042), 200)
    assert line == "itc 2.31/4.16  mim 0.0985/0.500  vqa 12.0  78.3 pairs/s  data wait 4 %  3:20 left"
    assert status_line(readings, None, None) == "itc 2.31/4.16  mim 0.0985/0.500  vqa 12.0"


def test_the_line_leaves_out_what_there_is_no_room_for() -> None:
    """Of the recipe with the most losses, at 80 columns beside `step 1234/5000`: each loss is there."""
    losses = {"itc": 2.31, "itm": 0.52, "mlm": 1.23, "mim": 0.0985, "words": 12.0, "spread": 0.0229}
    readings, speed = Readings(losses, dict.fromkeys(losses, 0.5)), StepSpeed(78.3, 0.042)
    whole = status_line(readings, speed, 200)
    assert status_line(readings, speed, 200, len(whole)) == whole
    shorter = [status_line(readings, speed, 200, width) for width in (len(whole) - 1, 80 - 14 - 1, 1)]
    assert [line.count("/0.500") for line in shorter] == [0, 0, 0]
    assert ["data wait" in line for line in shorter] == [True, False, False]
    assert len(shorter[1]) <= 80 - 14 - 1
    assert all(f"{name} " in shorter[1] for name in losses)


def test_a_terminal_of_80_columns_has_one_line(tmp_path: Path) -> None:
    progress = TrainingProgress()
    out = io.StringIO()
    progress.console = Console(file=out, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    names = ("itc", "itm", "mlm", "mim", "words", "spread")
    train(Module({name: [1.234] * 8 for name in names}), [progress], 8, tmp_path)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    drawn = [line for line in plain.splitlines() if line.startswith("step")]
    assert drawn
    assert all(len(part.rstrip()) <= 80 for line in drawn for part in line.split("\r"))


def test_a_log_file_gets_plain_lines_of_losses_and_levels(tmp_path: Path) -> None:
    progress = TrainingProgress(seconds=0)
    out = stream_of(progress)
    train(Module({"itc": [1.0] * 8, "itm": [0.5] * 8}), [progress], 8, tmp_path)
    legend, *lines = out.getvalue().splitlines()
    assert legend == LEGEND
    assert [line.split("  ")[0] for line in lines] == ["step 2/8", "step 4/8", "step 6/8", "step 8/8"]
    assert all("  itc 1.00/1.79  itm 0.500/0.637  " in line for line in lines)
    assert "pairs/s  data wait" in lines[-1]
    assert lines[-1].endswith(" %  0:00 left")


def test_plain_lines_keep_their_distance_but_the_last_is_shown(tmp_path: Path) -> None:
    progress = TrainingProgress(seconds=1000)
    out = stream_of(progress)
    train(Module({"itc": [1.0] * 8}), [progress], 8, tmp_path)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()[1:]] == ["step 2/8", "step 8/8"]


def test_a_run_shorter_than_the_interval_says_its_last_step(tmp_path: Path) -> None:
    progress = TrainingProgress()
    out = stream_of(progress)
    train(Module({"itc": [1.0] * 3}), [progress], 3, tmp_path, log_every_n_steps=50)
    assert out.getvalue().splitlines()[1].startswith("step 3/3  itc 1.00/1.79  ")


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    progress = TrainingProgress(seconds=0)
    out = stream_of(progress)
    train(Module({"itc": [1.0] * 8}), [progress], 8, tmp_path, accumulate_grad_batches=2)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()[1:]] == ["step 2/4", "step 4/4"]


def test_levels_and_speed_are_logged(tmp_path: Path) -> None:
    train(Module({"itc": [1.0] * 4, "itm": [0.5] * 4}), [TrainingProgress()], 4, tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/itc"]]
    assert len(rows) == 2
    for row in rows:
        assert float(row["level/itc"]) == pytest.approx(LEVELS["itc"])
        assert float(row["level/itm"]) == pytest.approx(LEVELS["itm"])
        assert float(row["train/pairs_per_second"]) > 0
        assert 0 <= float(row["train/data_wait"]) <= 1


def test_a_terminal_gets_a_bar_and_evaluations_are_shown(tmp_path: Path) -> None:
    progress = TrainingProgress()
    out = stream_of(progress, force_terminal=True)
    trainer = train(Module({"itc": [1.0] * 4}), [progress], 4, tmp_path)
    assert "itc 1.00/1.79" in out.getvalue()
    assert "step 4/4" in out.getvalue()
    assert "computing metrics" in out.getvalue()
    assert "evaluated" not in out.getvalue()
    assert progress.bar is None
    trainer.validate(trainer.lightning_module, DataLoader([toy_batch(2)], batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert "evaluated" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_are_silent(terminal: bool) -> None:
    progress = TrainingProgress(seconds=0)
    out = stream_of(progress, force_terminal=terminal)
    trainer: Any = SimpleNamespace(
        is_global_zero=False, estimated_stepping_batches=4, global_step=1, world_size=2, log_every_n_steps=1
    )
    module = Module({})
    progress.setup(trainer, module, "fit")
    progress.on_train_start(trainer, module)
    progress.on_train_batch_start(trainer, module, toy_batch(2), 0)
    progress.on_train_batch_end(trainer, module, None, toy_batch(2), 0)
    progress.on_train_end(trainer, module)
    assert out.getvalue() == ""


# ---------------------------------------------------------------------- stuck losses


def test_a_stuck_loss_is_told_once_and_only_past_warm_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stuck = StuckLoss(patience=6)
    losses = {"itc": [1.0] * 20, "itm": [0.6365] * 20}
    with caplog.at_level(logging.WARNING, logger="maskvlm"):
        train(Module(losses, warmup=4), [stuck], 20, tmp_path)
    assert [record.getMessage() for record in caplog.records if record.name == "maskvlm.reporting.progress"] == [
        "warning: itm has stayed at 0.637 since step 6 (now step 12); its chance level is 0.637, its class "
        "prior: no match is told from a mismatch; let itc learn first, warm up longer or lower the learning "
        "rate, look for mispaired data"
    ]


def test_nothing_is_told_before_warm_up_and_patience_have_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="maskvlm"):
        train(Module({"itm": [0.6365] * 20}, warmup=0.7), [StuckLoss(patience=6)], 20, tmp_path)
    assert [record for record in caplog.records if record.name == "maskvlm.reporting.progress"] == []


def test_a_loss_that_leaves_its_level_is_given_time_again(caplog: pytest.LogCaptureFixture) -> None:
    stuck = StuckLoss()
    with caplog.at_level(logging.WARNING, logger="maskvlm"):
        for step, loss in ((10, 1.0), (20, 0.97), (30, 0.99), (40, 1.2)):
            stuck.look(step, 20, Readings({"new": loss, "free": 9.0}, {"new": 1.0}), {})
        assert caplog.records == []
        stuck.look(50, 20, Readings({"new": 1.1}, {"new": 1.0}), {})
        stuck.look(60, 20, Readings({"new": 1.1}, {"new": 1.0}), {})
    line = stuck_line("new", 1.1, 1.0, 30, 50, PretrainingLoss.stuck_hint)
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_loss_that_comes_down_from_far_above_its_level_does_not_sit(caplog: pytest.LogCaptureFixture) -> None:
    stuck = StuckLoss()
    with caplog.at_level(logging.WARNING, logger="maskvlm"):
        for step, loss in ((10, 9.0), (20, 6.0), (30, 4.4), (40, 3.6), (50, 3.4)):
            stuck.look(step, 20, Readings({"new": loss}, {"new": 2.9}), {})
        assert caplog.records == []
        for step in (60, 70, 80):
            stuck.look(step, 20, Readings({"new": 3.4}, {"new": 2.9}), {})
    assert len(caplog.records) == 1


def test_the_warning_of_an_unknown_loss_is_one_line_too() -> None:
    assert stuck_line("vqa", 8.05, 8.049, 300, 600, PretrainingLoss.stuck_hint) == (
        "warning: vqa has stayed at 8.05 since step 300 (now step 600); its chance level is 8.05, "
        "the loss of a model that has learned nothing; check the learning rate and the data"
    )


def test_amounts_below_one_are_shares() -> None:
    assert steps_of(0.25, 1200) == 300
    assert steps_of(75, 1200) == 75
    assert steps_of(1, 1200) == 1
    assert steps_of(0.25, math.inf) == math.inf
