"""`maskvlm study`: a study of two tiny runs, made, gone on with, listed, submitted, written up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskvlm.cli.main import main
from maskvlm.utils.errors import ExitCode
from maskvlm.utils.launch import STUDY as OF_STUDY
from maskvlm.utils.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "data.steps": 2, "data.batch_size": 4, "data.eval_batch_size": 6, "data.source.train": 24, "data.source.val": 6,
    "model.task.weight_words": 0, "model.task.rerank_k": 2, "model.task.image_learns": 1,
}  # fmt: skip
STUDY: dict[str, Any] = {
    "name": "toy",
    "run": "pretrain where=cpu",
    "options": SMALL,
    "seeds": [3],
    "arms": {"contrast": {"options": {"model.task.weight_mlm": 0, "model.task.weight_mim": 0}}, "all": {}},
    "grid": [{"arms": ["all"]}, {"arms": ["contrast"], "flops_of": "all"}],
    "metrics": {"R@1": {"mean": ["retrieval/tr_r1", "retrieval/ir_r1"]}},
    "questions": [{"claim": "More is better.", "better": "all", "than": "contrast@flops-of-all", "metric": "R@1"}],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study, in which its runs land."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    for name in ("MASKVLM_RUN_NAME", OF_STUDY, "MASKVLM_ALLOW_IMPORT"):
        # set and deleted: what the command sets is gone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return tmp_path


@pytest.mark.slow
def test_a_study_is_made_once_and_written_up(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "toy.yaml", "--jobs", "2", "--page", "page"]) == 0
    output = capfd.readouterr().out
    assert "2 runs, 2 to do, 2 at a time" in output
    assert "wrote page/README.md (2 of 2 runs)" in output
    runs = place / "checkpoints" / "toy"
    config = yaml.safe_load((runs / "contrast@flops-of-all-s3" / "config-fit.yaml").read_text())
    assert 2 < config["data"]["init_args"]["steps"] < 6  # contrast and matching alone cost about half of all four
    assert "More is better." in (place / "page" / "README.md").read_text()
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*.ckpt")}
    assert main(["study", "toy.yaml"]) == 0
    assert "2 runs, 0 to do, 1 at a time" in capfd.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*.ckpt")} == before
    # on another machine a page has them
    for folder in runs.glob("*-s3"):
        folder.rename(place / folder.name)
    assert main(["study", "toy.yaml", "--page", "page"]) == 0
    output = capfd.readouterr().out
    assert "0 to do" in output
    assert "wrote page/README.md (2 of 2 runs)" in output
    for folder in place.glob("*-s3"):
        folder.rename(runs / folder.name)
    # another option of a run that is there
    (place / "toy.yaml").write_text(yaml.safe_dump(STUDY | {"options": SMALL | {"model.lr": 0.1}}))
    assert main(["study", "toy.yaml"]) == ExitCode.CANNOT_CREATE
    assert "holds a run with this name and other options" in capfd.readouterr().err


@pytest.fixture
def plain(place: Path) -> Path:
    """The same without a budget of operations, which would be counted first."""
    study = STUDY | {"grid": [{"arms": ["all", "contrast"]}], "questions": [], "seeds": 2}
    (place / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return place


def test_runs_are_listed_and_chosen(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "toy.yaml", "--list", "--only", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--folder ")[1].split()[0] for line in lines] == [f"checkpoints/toy/all-s{n}" for n in (0, 1)]
    assert main(["study", "toy.yaml", "--list", "--seeds", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not (plain / "checkpoints").exists()
    for words in (["--only", "some"], ["--seeds", "0", "9"], ["--task", "4"]):
        assert main(["study", "toy.yaml", *words]) == ExitCode.USAGE


def test_a_task_of_an_array_makes_its_run(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def instead(program: str, command: tuple[str, ...]) -> None:
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", instead)
    assert main(["study", "toy.yaml", "--task", "3"]) == 0
    assert commands[0][:6] == (sys.executable, "-m", "maskvlm", "pretrain", "where=cpu", "--folder")
    assert commands[0][6] == "checkpoints/toy/contrast-s1"
    noted = json.loads((plain / "checkpoints" / "toy" / "contrast-s1" / "study.json").read_text())
    assert noted["seed"] == 1
    assert noted["seconds"] is None  # nobody times it
    assert os.environ["MASKVLM_STUDY"] == "0"


def test_a_study_is_an_array_of_jobs_and_first_what_the_others_start_from(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = yaml.safe_load((plain / "toy.yaml").read_text()) | {"first": {"label": "x", "options": {"data.steps": 1}}}
    study["options"]["data.batch_size"] = "${oc.env:BATCH_OF_THIS_TEST}"
    (plain / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setenv("BATCH_OF_THIS_TEST", "4 ")
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["study", "toy.yaml", "--jobs", "2", "--only", "all", "--where", "gpu1"]
    job = plain / "checkpoints" / "toy" / "job.sh"
    assert main([*words, "--submit"]) == 0
    assert "submit again when they are finished" in capsys.readouterr().out
    lines = job.read_text().splitlines()
    assert {"#SBATCH --array=0-1%2", "export BATCH_OF_THIS_TEST='4 '", "#SBATCH --gpus-per-node=1"} <= {*lines}
    assert lines[-1].endswith('-m maskvlm study toy.yaml --only all --where gpu1 --task "$SLURM_ARRAY_TASK_ID"')
    assert main([*words, "--task", "2"]) == ExitCode.USAGE
    assert "all-s0: first-s0, which it starts from, is not finished" in capsys.readouterr().err
    for seed in range(2):
        folder = plain / "checkpoints" / "toy" / f"first-s{seed}"
        folder.mkdir()
        (folder / "versions.json").write_text('{"finished": {"step": 1}}')
        (folder / "metrics.json").write_text('{"score": 1.0}')
    assert main([*words, "--submit"]) == 0
    assert "#SBATCH --array=2-3%2\n" in job.read_text()


def test_a_strangers_study_runs_no_code(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in its options is not typed: a class of the working directory is not imported, here or in a run."""
    (plain / "evil").mkdir()
    (plain / "evil" / "__init__.py").write_text("open('marker', 'w')\n")
    arms = {"a": {"options": {"model.task.image_masking": "evil.Masking"}}}
    (plain / "toy.yaml").write_text(yaml.safe_dump(STUDY | {"arms": arms, "grid": [{"arms": ["a"]}], "questions": []}))
    assert main(["study", "toy.yaml"]) == ExitCode.REFUSED
    assert "--allow-import evil" in capsys.readouterr().err
    assert not (plain / "marker").exists()
    assert not (plain / "checkpoints" / "toy" / "a-s3").exists()
    # nor by a value that looks like an option, nor by the task of an array
    arms["a"]["options"]["model.task.pixel_loss"] = "--allow-import=evil"
    (plain / "toy.yaml").write_text(yaml.safe_dump(STUDY | {"arms": arms, "grid": [{"arms": ["a"]}], "questions": []}))
    for words in (["study", "toy.yaml"], ["study", "toy.yaml", "--task", "0"]):
        assert main(words) != 0
        capsys.readouterr()
        assert not (plain / "marker").exists()


@pytest.mark.slow
def test_a_run_of_a_study_imports_nothing_from_where_it_is_made(plain: Path) -> None:
    (plain / "evil.py").write_text("open('marker', 'w')\n")
    command = [sys.executable, "-m", "maskvlm", "pretrain", "--model.task.image_masking", "evil.Masking"]
    done = subprocess.run(command, env=os.environ | {"MASKVLM_STUDY": "1"}, capture_output=True, text=True)
    assert done.returncode == ExitCode.REFUSED, done.stderr
    assert not (plain / "marker").exists()


def test_a_wrong_option_of_any_arm_is_told_before_a_run(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"all": {}, "contrast": {"options": {"model.task.weight_mlmm": 0}}}
    (plain / "toy.yaml").write_text(yaml.safe_dump(yaml.safe_load((plain / "toy.yaml").read_text()) | {"arms": arms}))
    assert main(["study", "toy.yaml"]) == ExitCode.USAGE
    assert "contrast: --model.task.weight_mlmm" in capsys.readouterr().err
    assert not (plain / "checkpoints" / "toy" / "all-s0").exists()


def test_two_studies_of_one_name_do_not_meet(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock()
    lock.take(plain / "checkpoints" / "toy")
    try:
        assert main(["study", "toy.yaml"]) == ExitCode.CANNOT_CREATE
        assert "another process is training here" in capsys.readouterr().err
    finally:
        lock.release()


def test_a_page_replaces_no_file_of_somebody_else(plain: Path) -> None:
    (plain / "docs").mkdir()
    (plain / "docs" / "README.md").write_text("mine")
    assert main(["study", "toy.yaml", "--page", "docs", "--page-only"]) == ExitCode.CANNOT_CREATE
    assert (plain / "docs" / "README.md").read_text() == "mine"
