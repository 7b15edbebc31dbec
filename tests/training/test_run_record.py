"""A run's folder: what a short real run leaves, and that no run overwrites another."""

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from maskvlm import MaskVLM
from maskvlm.checkpoint.io import load, save
from maskvlm.checkpoint.provenance import Origin, Provenance
from maskvlm.cli.lightning import Parsed, find_checkpoint, run_command
from maskvlm.cli.main import main
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.run_record import RunRecord, claim_folder, versions
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import write_json

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "data.steps": 4,
    "data.batch_size": 8,
    "data.source.train": 60,
    "data.source.val": 6,
    "data.source.test": 6,
    "model.task.rerank_k": 4,
    "trainer.val_check_interval": 2,
    "trainer.log_every_n_steps": 1,
}
WHOLE = "--trainer.limit_val_batches=1.0"  # along the way, too


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def words(stack: Callable[..., list[str]]) -> list[str]:
    return [*stack(WHERE="cpu"), *(f"--{key}={value}" for key, value in SHORT.items())]


@pytest.fixture(scope="module")
def finished(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, made by the real command."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    before = Path.cwd()
    os.chdir(ROOT)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            code = main(["fit", "--run", str(folder), *words])
    finally:
        os.chdir(before)
    assert code == 0, stderr.getvalue()
    (folder.parent / "told.txt").write_text(stderr.getvalue())
    return folder


def test_the_last_line_is_a_command_that_asks_the_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, line = (finished.parent / "told.txt").read_text().splitlines()
    where, command = line.split(": finished; try it: maskvlm ")
    assert where == str(finished)
    Image.new("RGB", (48, 48)).save(tmp_path / "grey.png")
    words = [str(tmp_path / "grey.png") if word == "IMAGE" else word for word in shlex.split(command)]
    assert words[words.index("--from") + 1] == str(finished / "best.ckpt")
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == command.count("[MASK]") > 0  # words for each


def test_everything_lies_in_the_folder(finished: Path) -> None:
    names = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in finished.iterdir()}
    assert names >= {"config-fit.yaml", "versions.json", "metrics.csv", "metrics.json", "events"}
    assert names >= {"last.ckpt", "last.ckpt.sha256", "best.ckpt", "best.ckpt.sha256"}
    assert names >= {"curves.png", "reconstructions.png"}
    assert not [name for name in names if name.startswith("crash")]
    assert not [path for path in finished.rglob("*") if path.is_dir()]
    assert not (ROOT / "lightning_logs").exists()


def test_a_start_that_fails_leaves_no_folder(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "job.sh").touch()
    for name in ("new", "kept"):
        assert main(["fit", "--run", str(tmp_path / name), *words, "--data.batch_size=0"]) != 0
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "kept" / "job.sh").exists()  # with something in it, it is not ours alone


def test_the_last_step_is_kept_wherever_the_last_evaluation_fell(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with it images of the evaluation of all, where that along the way saw one batch of 64. Weights that were kept
    along the way know as many. Where they are of another step than the printed numbers, a line says so."""
    part = ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--data.source.val=70"]
    at_the_end = ["--trainer.val_check_interval=3", *part[1:]]
    whole = ["--trainer.val_check_interval=2"]
    for number, settings in enumerate([part, ["--trainer.limit_val_batches=0"], at_the_end, whole]):
        folder = tmp_path / str(number)
        assert main(["fit", "--run", str(folder), *words, "--data.steps=3", *settings]) == 0
        assert load(folder / "last.ckpt")["global_step"] == 3
        differs = "of the last step, 3 (last.ckpt); best.ckpt has the weights of step 2," in capsys.readouterr().err
        assert differs == (settings in (part, whole))
    counts = {
        f"{at}/{name}": len(load(tmp_path / at / f"{name}.ckpt")["known_images"])
        for at in "023"
        for name in ("last", "best")
    }
    all_rows = dict.fromkeys(("0/last", "0/best", "2/last", "2/best"), 70)
    assert counts == all_rows | dict.fromkeys(("3/last", "3/best"), 6)


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        (["--trainer.val_check_interval=2", WHOLE], 2),  # after steps 2 and 4: the second is reported at the end
        (["--trainer.val_check_interval=3", WHOLE], 2),  # after step 3, and at the end
        (["--trainer.val_check_interval=4", "--trainer.limit_val_batches=1"], 2),  # a part, then everything
    ],
)
def test_what_the_last_step_was_given_is_not_computed_again(
    settings: list[str], evaluations: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = [], MaskedPretraining.compute

    def counted(self: MaskedPretraining, backbone: Any) -> dict[str, float]:
        computed.append(compute(self, backbone))
        return computed[-1]

    monkeypatch.setattr(MaskedPretraining, "compute", counted)
    assert main(["fit", "--run", str(tmp_path / "run"), *words, *settings]) == 0
    assert len(computed) == evaluations
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written == {"step": 4} | computed[-1]
    # An evaluation of its own finds the same.
    assert main(["validate", "--run", str(tmp_path / "own"), *words, f"--ckpt_path={tmp_path}/run/last.ckpt"]) == 0
    assert len(computed) == evaluations + 1
    assert {"step": 4} | computed[-1] == pytest.approx(written, rel=1e-4)


@pytest.mark.parametrize(("task", "stops"), [("vqa", False), ("vqa", True), ("retrieval", False)])
def test_a_fine_tuned_model_tells_unlike_images(task: str, stops: bool, tmp_path: Path) -> None:
    """Its last and its best weights hold features of the validation images, once each."""
    files = ("model/tiny.yaml", "base.yaml", "finetune.yaml", f"../tasks/{task}/conf.yaml", "where/cpu.yaml")
    words = [word for file in files for word in ("-c", f"conf/{file}")]
    options = {
        "data.steps": 4, "data.epochs": "null", "data.batch_size": 8, "data.eval_batch_size": 16, "data.workers": 0,
        "data.source.train": 60, "data.source.val": 70, "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1, "model.random_init": "true",
    }  # fmt: skip
    words += [f"--{key}={value}" for key, value in options.items()]
    if stops:
        stopping = {"monitor": "score", "mode": "max", "patience": 1, "stopping_threshold": -1.0}
        kind = "lightning.pytorch.callbacks.EarlyStopping"
        (tmp_path / "stop.yaml").write_text(
            yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": kind, "init_args": stopping}]}})
        )
        words += ["-c", str(tmp_path / "stop.yaml")]
    assert main(["fit", "--run", str(tmp_path / "run"), *words]) == 0
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == (2 if stops else 4)
    for name in ("last", "best"):
        model = MaskVLM.from_pretrained(tmp_path / "run" / f"{name}.ckpt")
        known = model.origin.known_images
        assert known is not None
        assert len(known) == len(known.unique(dim=0)) > 50
        assert model.known is not None
        (noise,) = model.far([Image.effect_noise((48, 48), 90).convert("RGB")])
        assert noise is not None
        assert "unlike those that the model was trained on" in noise


def test_a_name_that_is_no_utf8_is_escaped(tmp_path: Path) -> None:
    """`versions.json` holds the command, with the names of files in it."""
    content = {"command": ["fit", os.fsdecode(b"\xff.yaml")]}
    write_json(tmp_path / "versions.json", content)
    assert json.loads((tmp_path / "versions.json").read_text(encoding="utf-8")) == content


def test_left_out_samples_are_said_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, Any] = {"samples": 32, "problems": {"truncated": 2}, "examples": {"truncated": ["a.jpg"]}}
    rows["left_out"] = {"val": {}, "train": {"missing image": ["toy.json image 3 (3.png)"]}}
    trainer: Any = SimpleNamespace(
        fast_dev_run=False,
        datamodule=SimpleNamespace(bad_rows=lambda: rows),
        is_global_zero=True,
        default_root_dir=str(tmp_path),
    )
    RunRecord().on_train_end(trainer, None)  # type: ignore[arg-type]
    output = capsys.readouterr().out
    assert "(32 read): truncated: 2, missing image (train): 1; listed in" in output
    assert json.loads((tmp_path / "bad_samples.json").read_text()) == rows
    rows |= {"problems": {}, "left_out": {"val": {}}}
    RunRecord().on_train_end(trainer, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


def evaluation(folder: Path, skipped: dict[str, list[str]]) -> Any:
    """A trainer after an evaluation of seven rows of `val` and of `test`."""
    rows = type("Rows", (), {"skipped": skipped, "__len__": lambda self: 7})()
    return SimpleNamespace(
        is_global_zero=True, sanity_checking=False, fast_dev_run=False, default_root_dir=str(folder),
        datamodule=SimpleNamespace(splits={"val": rows, "test": rows}),
    )  # fmt: skip


SKIPPED = {"missing image": ["toy.json:3", "toy.json:5"], "empty text": []}


def test_what_an_evaluation_leaves_out_is_said_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, module, path = RunRecord(), SimpleNamespace(metrics={}), tmp_path / "bad_samples.json"
    record.on_validation_end(evaluation(tmp_path, SKIPPED), module)  # type: ignore[arg-type]
    line = f"samples skipped or repaired (val, 7 rows): missing image: 2; listed in {path}\n"
    assert capsys.readouterr().out == line
    assert json.loads(path.read_text())["left_out"] == {"val": SKIPPED}
    record.on_test_end(evaluation(tmp_path, {}), module)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    assert not path.exists()  # it told of an evaluation whose card is replaced, too


def test_measuring_in_a_trainings_folder_keeps_its_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = SimpleNamespace(metrics={})
    for name in ("config-fit.yaml", "bad_samples.json"):
        (tmp_path / name).write_text("the training's")
    RunRecord().on_validation_end(evaluation(tmp_path, SKIPPED), module)
    RunRecord().on_test_end(evaluation(tmp_path, SKIPPED), module)
    assert (tmp_path / "bad_samples.json").read_text() == "the training's"
    for split in ("val", "test"):
        assert json.loads((tmp_path / f"bad_samples-{split}.json").read_text())["left_out"] == {split: SKIPPED}
    assert capsys.readouterr().out.count("samples skipped or repaired") == 2


def test_a_training_says_it_once_and_a_trial_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, record, module = evaluation(tmp_path, SKIPPED), RunRecord(), SimpleNamespace(metrics={})
    record.trained = True
    record.on_validation_end(trainer, module)  # type: ignore[arg-type]
    for fact in ({"fast_dev_run": True}, {"is_global_zero": False}, {"sanity_checking": True}):
        other = SimpleNamespace(**{**vars(trainer), **fact})
        RunRecord().on_validation_end(other, module)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("begins", "written"), [(None, True), ("last.ckpt", False)])
def test_where_weights_come_from_is_said_of_a_run_that_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], begins: str | None, written: bool
) -> None:
    """Of one that goes on the checkpoint brings every tensor. The path is known at this point, not at `setup`."""
    facts = {"is_global_zero": True, "fast_dev_run": False, "default_root_dir": str(tmp_path), "ckpt_path": begins}
    trainer: Any = SimpleNamespace(**facts)
    module: Any = SimpleNamespace(provenance=Provenance({"head.weight": Origin("random", (2, 3))}))
    RunRecord().on_fit_start(trainer, module)
    assert (tmp_path / "provenance.json").exists() == written
    assert ("weights: all random, 1 tensors" in capsys.readouterr().out) == written


def test_a_run_that_goes_on_keeps_what_was_said_of_its_weights(
    finished: Path, words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(finished, folder)
    (folder / "provenance.json").write_text("as it began")
    more = ["--ckpt_path=last", "--data.steps=5", "--trainer.limit_val_batches=0"]
    assert main(["fit", "--run", str(folder), *words, *more]) == 0
    assert (folder / "provenance.json").read_text() == "as it began"


def test_a_trial_of_one_batch_leaves_the_record_alone(finished: Path, words: list[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json")}
    assert main(["fit", "--run", str(finished), *words, "--trainer.fast_dev_run=true"]) == 0
    assert {path.name: path.read_bytes() for path in finished.glob("*.json")} == before


def test_what_was_measured_is_plain_json(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["step"] == 4
    for key in (
        "retrieval/tr_r1",
        "retrieval/itc_ir_r10",
        "mlm/accuracy",
        "mlm/accuracy_wrong_image",
        "mim/mse",
    ):
        assert isinstance(metrics[key], float)


def test_the_curves_are_a_table(finished: Path) -> None:
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train/loss"]) for row in rows) == 4


def test_versions_tell_what_the_run_was_made_of(finished: Path) -> None:
    facts = json.loads((finished / "versions.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert facts["seed"] == 0
    assert facts["data"]["train"]["pictures"] == 60
    assert facts["machine"]["processor"]


def test_the_saved_configuration_repeats_the_run_elsewhere(finished: Path) -> None:
    path = finished / "config-fit.yaml"
    assert yaml.safe_load(path.read_text())["data"]["init_args"]["steps"] == 4
    assert "'{run}'" in path.read_text()  # not this run's folder
    again = run_command(Parsed, ["fit", "-c", str(path), "--run", "elsewhere"]).settings
    assert (again.run, again.data.init_args.batch_size) == ("elsewhere", 8)


def test_a_checkpoint_holds_the_model_and_reads_back(finished: Path) -> None:
    content = load(finished / "last.ckpt")
    assert content["global_step"] == 4
    assert any(name.startswith("backbone.cross_image.") for name in content["state_dict"])
    assert "hyper_parameters" not in content  # nothing in a checkpoint decides about the model


def test_a_second_run_is_refused(finished: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The same command has nothing to do, another one would mix two runs."""
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(["fit", "--run", str(finished), *words]) == 0
    assert (
        capsys.readouterr().out == f"{finished}: already finished at step 4; use another folder (run=) for a new run\n"
    )
    assert main(["fit", "--run", str(finished), *words, "--data.steps=5"]) == ExitCode.CANNOT_CREATE
    error = capsys.readouterr().err
    assert f"error: {finished}: already holds a run with other settings (data.steps was 4, is 5). Choose" in error
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_a_checkpoint_is_measured_without_touching_the_record(
    finished: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = (finished / "metrics.json").read_text()
    assert main(["validate", "--run", str(finished), *words, "--ckpt_path", "last"]) == 0
    assert (finished / "metrics.json").read_text() == recorded
    before, now = json.loads(recorded), json.loads((finished / "metrics-validate.json").read_text())
    assert now["mlm/accuracy"] == before["mlm/accuracy"]
    assert now["mim/mse"] == pytest.approx(before["mim/mse"], rel=1e-5)
    assert (finished / "config-validate.yaml").exists()


def test_what_is_measured_of_another_runs_weights_names_their_step(
    finished: Path, words: list[str], tmp_path: Path
) -> None:
    """By `from`: this command's own trainer has made none."""
    start = str(finished / "last.ckpt")
    assert main(["validate", "--run", str(tmp_path / "measured"), *words, "--from", start]) == 0
    assert json.loads((tmp_path / "measured" / "metrics.json").read_text())["step"] == 4


def test_a_broken_checkpoint_is_one_line(
    finished: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes((finished / "last.ckpt").read_bytes()[:1000])
    arguments = ["validate", "--run", str(tmp_path), *words, "--ckpt_path", str(path)]
    assert main(arguments) == ExitCode.BAD_DATA
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: truncated or damaged (")
    assert len(error.splitlines()) == 1


def test_a_checkpoint_does_not_change_the_settings(words: list[str], tmp_path: Path) -> None:
    """Lightning's own reading of --ckpt_path would put these in the place of the user's."""
    save({"state_dict": {}, "hyper_parameters": {"lr": 9.0}}, tmp_path / "x.ckpt")
    arguments = ["fit", *words, "--model.lr", "0.25", "--ckpt_path", str(tmp_path / "x.ckpt")]
    assert run_command(Parsed, arguments).settings.model.lr == 0.25


def test_words_for_checkpoints(tmp_path: Path) -> None:
    assert find_checkpoint(None, tmp_path, "fit") is None
    with pytest.raises(UserError, match="no checkpoint was given"):
        find_checkpoint(None, tmp_path, "test")
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        find_checkpoint("last", tmp_path, "fit")  # Lightning would start from scratch without a word
    with pytest.raises(UserError, match="is an address"):
        find_checkpoint("https://x/y.ckpt", tmp_path, "fit")
    save({"state_dict": {}}, tmp_path / "last.ckpt")
    assert find_checkpoint("last", tmp_path, "fit") == str(tmp_path / "last.ckpt")
    assert find_checkpoint("best", tmp_path, "fit") == str(tmp_path / "best.ckpt")


def test_a_folder_that_cannot_be_made_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        claim_folder(tmp_path / "file" / "run")
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_small_files_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "m.json", {"a": inf, "b": {"c": nan, "d": [1, -inf, (nan, 2.5)]}, "e": "NaN"})
    # `parse_constant` is asked for what is no JSON.
    content = json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)
    assert content == {"a": None, "b": {"c": None, "d": [1, None, [None, 2.5]]}, "e": "NaN"}


def test_small_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": 1.5, "c": "é"})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": None, "b": 1.5, "c": "é"}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError) as caught:
        write_json(tmp_path / "m.json", {"a": 1})
    assert caught.value.code == ExitCode.IO_ERROR
    assert json.loads((tmp_path / "m.json").read_text())["b"] == 1.5


def test_versions_outside_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.training.run_record.__file__", "/no/such/folder/run.py")
    assert versions()["commit"] is None


def test_two_processes_tell_a_mistake_once(words: list[str], tmp_path: Path) -> None:
    """Both ranks find it; one says it, the other who did. And a batch they cannot share is refused."""
    command = [sys.executable, "-m", "maskvlm", "fit", "--run", str(tmp_path / "run"), *words]
    command += ["--trainer.devices", "2", "--data.batch_size", "7"]
    path = os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "data.batch_size: 7 pairs cannot be split evenly among 2 processes" in errors[0]
    assert "Traceback" not in done.stderr
    assert done.returncode == ExitCode.USAGE


def test_a_folder_without_a_training_holds_the_metrics_themselves(tmp_path: Path) -> None:
    """What was measured elsewhere is this folder's own; in a training's folder it stands beside."""
    function = SimpleNamespace(value="validate")
    trainer: Any = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, fast_dev_run=False, global_step=0, default_root_dir=str(tmp_path),
        state=SimpleNamespace(fn=function),
    )  # fmt: skip
    module: Any = SimpleNamespace(metrics={"score": 1.5})
    RunRecord().on_validation_end(trainer, module)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"step": 0, "score": 1.5}
    (tmp_path / "config-fit.yaml").touch()
    module.metrics = {"score": 2.5}
    RunRecord().on_validation_end(trainer, module)
    assert json.loads((tmp_path / "metrics.json").read_text())["score"] == 1.5
    assert json.loads((tmp_path / "metrics-validate.json").read_text())["score"] == 2.5


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_start_that_goes_on_is_written_once(goes_on: bool, tmp_path: Path) -> None:
    """By the command line after the checkpoint is found to fit; in a script, which does not say so, before."""
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), is_global_zero=True, fast_dev_run=False, world_size=1,
        precision="32-true", datamodule=None, default_root_dir=str(tmp_path), ckpt_path=str(tmp_path / "last.ckpt"),
    )  # fmt: skip
    record, path = RunRecord(), tmp_path / "versions.json"
    record.goes_on = goes_on
    record.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert path.exists() != goes_on
    record.on_load_checkpoint(trainer, None, {})  # type: ignore[arg-type]
    assert "earlier" not in json.loads(path.read_text())
