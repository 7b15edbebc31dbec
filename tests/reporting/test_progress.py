"""The line of a run, and the warning of a loss that learns nothing."""

import csv
import io
import logging
import math
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


class Data(L.LightningDataModule):
    """So many batches of six pairs; two of them are the validation's."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.total_steps, self.batch_size = steps, 6

    def train_dataloader(self) -> DataLoader[Any]:
        batches: Any = [toy_batch(6)] * self.total_steps
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        batches: Any = [toy_batch(6)] * 2
        return DataLoader(batches, batch_size=None)


def train(
    module: L.LightningModule, callbacks: list[L.Callback], steps: int, folder: Path, **settings: Any
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=callbacks, logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        **{"log_every_n_steps": 2, **settings},
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(steps))
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


def test_a_log_file_gets_plain_lines_of_losses_and_levels(tmp_path: Path) -> None:
    progress = TrainingProgress(seconds=0)
    out = stream_of(progress)
    train(Module({"itc": [1.0] * 8, "itm": [0.5] * 8}), [progress], 8, tmp_path)
    told, legend, time, *lines = out.getvalue().splitlines()
    assert told.startswith("SimpleNamespace: 8 steps of 6 on cpu, then an evaluation and a page of pictures in ")
    assert legend == LEGEND
    assert time == "on this machine these steps take about 0:00"
    assert [line.split("  ")[0] for line in lines] == ["step 2/8", "step 4/8", "step 6/8", "step 8/8"]
    assert all("  itc 1.00/1.79  itm 0.500/0.637  " in line for line in lines)
    assert "pairs/s  data wait" in lines[-1]
    assert lines[-1].endswith(" %  0:00 left")
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/itc"]]
    assert len(rows) == 4
    for row in rows:
        assert float(row["level/itc"]) == pytest.approx(math.log(6))
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


# ---------------------------------------------------------------------- stuck losses


def test_a_stuck_loss_is_told_once_and_only_past_warm_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="maskvlm"):
        train(Module({"itc": [1.0] * 20, "itm": [0.6365] * 20}, warmup=4), [StuckLoss(patience=6)], 20, tmp_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "maskvlm.reporting.progress"]
    assert message == stuck_line("itm", 0.63651, 0.63651, 6, 12, ImageTextMatching.stuck_hint)
    assert message.startswith("warning: itm has stayed at 0.637 since step 6 (now step 12); its chance level is 0.637")


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


def test_amounts_below_one_are_shares() -> None:
    assert steps_of(0.25, 1200) == 300
    assert steps_of(75, 1200) == 75
    assert steps_of(1, 1200) == 1
    assert steps_of(0.25, math.inf) == math.inf
