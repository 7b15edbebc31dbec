"""A run's folder: what a short real run leaves, and that no run overwrites another."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training.small_runs import SMALL, as_words, logged

from maskvlm.checkpoint.io import load
from maskvlm.cli.main import main
from maskvlm.training.run_record import RunRecord, claim_folder
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def own(stack: Callable[..., list[str]]) -> list[str]:
    """The words of the finished run after its folder's."""
    return [*stack(WHERE="cpu"), *as_words(SMALL), "--data.steps=4", "--trainer.val_check_interval=2"]


@pytest.fixture(scope="module")
def finished(own: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, made by the real command. Each test leaves it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("maskvlm.reporting.callbacks.Report.draw", lambda *_: None)
        assert main(["fit", "--run", str(folder), *own]) == 0
    return folder


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ------------------------------------------------------------------ what a run leaves


def test_everything_lies_in_the_folder(finished: Path) -> None:
    """Configuration, seed, versions, hash of the data, metrics and curves beside the checkpoints."""
    names = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in finished.iterdir()}
    assert names >= {"config-fit.yaml", "versions.json", "provenance.json", "metrics.csv", "metrics.json", "events"}
    assert names >= {"last.ckpt", "last.ckpt.sha256", "best.ckpt", "best.ckpt.sha256"}
    assert not [path for path in finished.rglob("*") if path.is_dir() or path.name.startswith("crash")]
    assert not (ROOT / "lightning_logs").exists()
    facts = json.loads((finished / "versions.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert (facts["seed"], facts["data"]["train"]["pictures"]) == (0, 24)
    assert len(facts["data"]["sha"]) == 64
    assert facts["finished"]["step"] == 4
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["step"] == 4
    for key in ("retrieval/tr_r1", "retrieval/itc_ir_r10", "mlm/accuracy_wrong_image", "mim/mse"):
        assert isinstance(metrics[key], float)
    assert [step for step, _ in logged(finished, "train/loss")] == [0, 1, 2, 3]
    content = load(finished / "last.ckpt")
    assert content["global_step"] == 4
    assert any(name.startswith("backbone.cross_image.") for name in content["state_dict"])


def test_nothing_touches_the_record_of_a_finished_run(finished: Path, own: list[str]) -> None:
    """The same command has nothing to do, another one would mix two runs; a trial leaves it alone, and a checkpoint is
    measured into files of its own."""
    before = {path.name: path.read_bytes() for path in finished.glob("*.[jyc]*")}
    fit = ["fit", "--run", str(finished), *own]
    assert main(fit) == 0
    assert main([*fit, "--data.steps=5"]) == ExitCode.CANNOT_CREATE
    assert main([*fit, "--trainer.fast_dev_run=true"]) == 0
    assert main(["validate", *fit[1:], "--ckpt_path", "last"]) == 0
    measured, recorded = (json.loads((finished / f"metrics{x}.json").read_text()) for x in ("-validate", ""))
    assert measured == pytest.approx(recorded, rel=1e-5)
    assert {name: (finished / name).read_bytes() for name in before} == before


# ------------------------------------------------------------------ the last evaluation


# ------------------------------------------------------------------ the record's parts


def trainer_of(folder: Path, **facts: Any) -> Any:
    usual = {"is_global_zero": True, "sanity_checking": False, "fast_dev_run": False, "default_root_dir": str(folder)}
    return SimpleNamespace(**usual | facts)


def test_what_a_training_left_out_is_said_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, Any] = {"samples": 32, "problems": {"truncated": 2}, "examples": {"truncated": ["a.jpg"]}}
    rows["left_out"] = {"val": {}, "train": {"missing image": ["toy.json image 3 (3.png)"]}}
    trainer = trainer_of(tmp_path, datamodule=SimpleNamespace(bad_rows=lambda: rows))
    RunRecord().on_train_end(trainer, None)  # type: ignore[arg-type]
    assert "(32 read): truncated: 2, missing image (train): 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "bad_samples.json").read_text()) == rows


# ------------------------------------------------------------------ folders and files


def test_a_start_that_fails_leaves_no_folder(own: list[str], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "job.sh").touch()
    for name in ("new", "kept"):
        assert main(["fit", "--run", str(tmp_path / name), *own, "--data.batch_size=0"]) != 0
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "kept" / "job.sh").exists()  # with something in it, it is not ours alone


def test_small_files_are_json_and_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers, and a name that is no UTF-8 (`versions.json` holds the command)."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        claim_folder(tmp_path / "file" / "run")
    assert caught.value.code == ExitCode.CANNOT_CREATE
    nan, name = float("nan"), os.fsdecode(b"\xff.yaml")
    write_json(tmp_path / "m.json", {"a": nan, "b": {"d": [1, -float("inf"), (nan, 2.5)]}, "e": "NaN", "f": name})
    # `parse_constant` is asked for what is no JSON.
    expected = {"a": None, "b": {"d": [1, None, [None, 2.5]]}, "e": "NaN", "f": name}
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail) == expected

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError) as caught:
        write_json(tmp_path / "m.json", {"a": 1})
    assert caught.value.code == ExitCode.IO_ERROR
    assert json.loads((tmp_path / "m.json").read_text()) == expected
