"""What an evaluation leaves in the run's folder, and that no drawing ends a training."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import PATCH, SIZE, toy_backbone

import maskvlm.reporting.callbacks
from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.reporting.callbacks import Report
from maskvlm.training.lit import LitModel


def run(folder: Path, report: Report, fit: bool = False, **settings: Any) -> L.Trainer:
    """If wanted, three steps with an evaluation after the second; then the full evaluation."""
    backbone = toy_backbone(length=24)
    backbone.text.tokenizer = None
    task = MaskedPretraining(mask_block=PATCH, decoder_layers=1, contrast_dim=8, rerank_k=2)
    model = LitModel(backbone, task)
    data = PairData(Scenes(8, 6, 6, SIZE), backbone.input_spec, batch_size=4, steps=3, eval_batch_size=4, max_unknown=1)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, callbacks=[report],
        logger=[CSVLogger(folder, "", ""), TensorBoardLogger(folder, "", "")],
        log_every_n_steps=1, val_check_interval=2, num_sanity_val_steps=1,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
    if fit:
        trainer.fit(model, datamodule=data)
    trainer.validate(model, datamodule=data, verbose=False)
    return trainer


def after_training() -> Report:
    report = Report()
    report.trained = True
    return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run's folder and what was said on the way; drawn once on the way and once at the end."""
    folder = tmp_path_factory.mktemp("run")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskvlm.reporting.callbacks, "say", lines.append)
        run(folder, Report(every=1, count=3), fit=True)
    return folder, lines


def test_the_page_holds_the_table_and_both_images_that_lie_beside_it(finished: tuple[Path, list[str]]) -> None:
    folder, lines = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "captions of an image, re-ranked" in page
    assert re.findall('src="([^"]+)"', page) == ["reconstructions.png", "curves.png"]
    assert Image.open(folder / "curves.png").size == (1386, 924)
    assert Image.open(folder / "reconstructions.png").size[0] == 1256
    assert lines[0].startswith("step 2: Gain of the right partner over a wrong one: masked words ")
    assert lines[1:] == 2 * [f"wrote {folder / 'report.html'}"]


def test_both_images_are_in_tensorboard(finished: tuple[Path, list[str]]) -> None:
    events = EventAccumulator(str(finished[0])).Reload()
    assert events.Tags()["images"] == ["curves", "reconstructions"]
    images = events.Images("reconstructions")
    assert [image.step for image in images] == [2, 3]
    assert (images[1].width, images[1].height) == Image.open(finished[0] / "reconstructions.png").size


def test_measuring_a_checkpoint_prints_the_table_and_leaves_the_runs_images_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Report(count=2))
    assert "captions of an image, re-ranked" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["reconstructions-validate.png"]
    assert [path.name for path in tmp_path.glob("*.html")] == ["report-validate.html"]


def test_an_image_that_fails_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise OSError("no space\nleft on device")

    monkeypatch.setattr(maskvlm.reporting.callbacks, "reconstructions", broken)
    run(tmp_path, after_training())
    assert [record.getMessage() for record in caplog.records if record.name == "maskvlm.reporting.callbacks"] == [
        f"warning: {tmp_path / 'reconstructions.png'} was not drawn: OSError: no space left on device"
    ]
    assert (tmp_path / "curves.png").is_file()
    assert "reconstructions" not in (tmp_path / "report.html").read_text()


def test_a_trial_and_other_processes_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, after_training(), fast_dev_run=True)
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda trainer: False))
    run(tmp_path, after_training())
    assert [*tmp_path.glob("*.png"), *tmp_path.glob("*.html")] == []
