"""`maskvlm study`: a study of two tiny runs, made, gone on with, listed, submitted, written up."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskvlm.cli.main import main
from maskvlm.cli.slurm import ranges
from maskvlm.cli.study import unknown_keys
from maskvlm.study.definition import Metric
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


def test_a_study_is_made_once_and_written_up(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "toy.yaml", "--jobs", "2", "--page", "page"]) == 0
    output = capfd.readouterr().out
    assert "2 runs, 2 to do, 2 at a time" in output
    assert "wrote page/README.md (2 of 2 runs)" in output
    runs = place / "checkpoints" / "toy"
    steps = yaml.safe_load((runs / "contrast@flops-of-all-s3" / "config-fit.yaml").read_text())["data"]["init_args"][
        "steps"
    ]
    assert 2 < steps < 6  # contrast and matching alone cost about half of all four
    assert "More is better." in (place / "page" / "README.md").read_text()
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*.ckpt")}
    assert main(["study", "toy.yaml"]) == 0
    assert "2 runs, 0 to do, 1 at a time" in capfd.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*.ckpt")} == before
    (runs / "README.md").unlink()
    assert main(["study", "toy.yaml", "--page-only", "--page", "elsewhere"]) == 0
    assert "wrote elsewhere/README.md (2 of 2 runs)" in capfd.readouterr().out
    assert (place / "elsewhere" / "runs.csv").is_file()
    assert not (runs / "README.md").exists()
    # on another machine a page has them
    for folder in runs.glob("*-s3"):
        folder.rename(place / folder.name)
    assert main(["study", "toy.yaml", "--page", "page"]) == 0
    output = capfd.readouterr().out
    assert "0 to do" in output
    assert "wrote page/README.md (2 of 2 runs)" in output
    assert main(["study", "toy.yaml", "--page", "page", "--submit"]) == 0
    assert "nothing to submit: 2 runs are finished" in capfd.readouterr().out
    rows = (place / "page" / "runs.csv").read_text().splitlines(keepends=True)
    remaining = [row for row in rows if not row.startswith("contrast")]
    assert len(remaining) == len(rows) - 1
    (place / "fewer").mkdir()
    (place / "fewer" / "runs.csv").write_text("".join(remaining))
    assert main(["study", "toy.yaml", "--page", "fewer", "--submit"]) == 0
    assert "#SBATCH --array=1%1\n" in (runs / "job.sh").read_text()
    for folder in place.glob("*-s3"):
        folder.rename(runs / folder.name)
    # another option of a run that is there
    (place / "toy.yaml").write_text(yaml.safe_dump(STUDY | {"options": SMALL | {"model.lr": 0.1}}))
    assert main(["study", "toy.yaml"]) == ExitCode.CANNOT_CREATE
    assert "holds a run with this name and other options" in capfd.readouterr().err


def test_operations_are_counted_for_the_runs_that_are_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[list[str]] = []

    def make(study: Any, runs: list[Any], *_: Any) -> int:
        made.append([run.name for run in runs])
        return 0

    counted: list[str] = []

    def flops_of(cell: Any, *_: Any) -> int:
        counted.append(cell.name)
        return 1

    monkeypatch.setattr("maskvlm.cli.study.make_runs", make)
    monkeypatch.setattr("maskvlm.study.budget.flops_of", flops_of)
    assert main(["study", "toy.yaml", "--only", "all"]) == 0
    assert main(["study", "toy.yaml", "--page-only"]) == 0
    assert counted == []
    assert main(["study", "toy.yaml", "--only", "contrast@flops-of-all"]) == 0
    assert sorted(counted) == ["all", "contrast@flops-of-all"]
    assert made == [["all-s3"], ["contrast@flops-of-all-s3"]]
    # A task of an array counts those of its own run.
    counted.clear()
    monkeypatch.setattr(os, "execv", lambda *_: sys.exit(0))
    assert main(["study", "toy.yaml", "--task", "0"]) == 0
    assert counted == []
    assert main(["study", "toy.yaml", "--task", "1"]) == 0
    assert sorted(counted) == ["all", "contrast@flops-of-all"]


@pytest.mark.parametrize("key", ["trainer.val_check_interval", "model.warmup"])
def test_what_is_longer_than_the_steps_of_a_budget_is_told_before_a_run(
    key: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many they are is known once operations are counted: half as many as the two of the other arm."""
    monkeypatch.setattr("maskvlm.study.budget.flops_of", lambda cell, *_: 1 if cell.arm == "all" else 2)
    (place / "toy.yaml").write_text(yaml.safe_dump(STUDY | {"options": SMALL | {key: 2}}, sort_keys=False))
    assert main(["study", "toy.yaml"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"error: contrast@flops-of-all: {key}: 2, but the run has 1 ")
    assert not (place / "checkpoints" / "toy" / "all-s3").exists()


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


def test_a_study_is_an_array_of_jobs(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = yaml.safe_load((plain / "toy.yaml").read_text())
    study["options"]["data.batch_size"] = "${oc.env:BATCH_OF_THIS_TEST}"
    (plain / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setenv("BATCH_OF_THIS_TEST", "4 ")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["study", "toy.yaml", "--submit", "--jobs", "2", "--only", "all", "--where", "gpu1"]) == 0
    assert "checkpoints/toy/job.sh: written; sbatch was not found here" in capsys.readouterr().out
    script = (plain / "checkpoints" / "toy" / "job.sh").read_text()
    assert "#SBATCH --array=0-1%2\n" in script
    assert "export BATCH_OF_THIS_TEST='4 '\n" in script
    assert "#SBATCH --gpus-per-node=1\n" in script
    assert script.rstrip().endswith('-m maskvlm study toy.yaml --only all --where gpu1 --task "$SLURM_ARRAY_TASK_ID"')


def test_an_array_makes_first_what_the_others_start_from(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = yaml.safe_load((plain / "toy.yaml").read_text()) | {"first": {"label": "x", "options": {"data.steps": 1}}}
    (plain / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["study", "toy.yaml", "--submit", "--only", "all"]) == 0
    assert "the other 2 start from these: submit again when they are finished" in capsys.readouterr().out
    assert "#SBATCH --array=0-1%1\n" in (plain / "checkpoints" / "toy" / "job.sh").read_text()
    assert main(["study", "toy.yaml", "--only", "all", "--task", "2"]) == ExitCode.USAGE
    assert "all-s0: first-s0, which it starts from, is not finished" in capsys.readouterr().err
    for seed in range(2):
        folder = plain / "checkpoints" / "toy" / f"first-s{seed}"
        folder.mkdir()
        (folder / "versions.json").write_text('{"finished": {"step": 1}}')
        (folder / "metrics.json").write_text('{"score": 1.0}')
    assert main(["study", "toy.yaml", "--submit", "--only", "all"]) == 0
    assert "#SBATCH --array=2-3%1\n" in (plain / "checkpoints" / "toy" / "job.sh").read_text()


def test_numbers_of_an_array_are_ranges() -> None:
    assert ranges([0]) == "0"
    assert ranges([7, 1, 2, 3, 9, 10]) == "1-3,7,9-10"


def test_a_strangers_study_runs_no_code(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in its options is not typed: a class of the working directory is not imported, here or in a run."""
    (plain / "evil").mkdir()
    (plain / "evil" / "__init__.py").write_text("open('marker', 'w')\n")
    arms = {"a": {"options": {"model.task.image_masking": "evil.Masking"}}}
    (plain / "toy.yaml").write_text(yaml.safe_dump(STUDY | {"arms": arms, "grid": [{"arms": ["a"]}], "questions": []}))
    assert main(["study", "toy.yaml"]) == ExitCode.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("error: a: --model.task.image_masking: class evil.Masking")
    assert "--allow-import evil" in error
    assert not (plain / "marker").exists()
    assert not (plain / "checkpoints" / "toy" / "a-s3").exists()
    # nor where operations are counted first, nor by a value that looks like an option
    both = {"grid": [{"arms": ["b"]}, {"arms": ["a"], "flops_of": "b"}], "questions": []}
    hidden = arms["a"]["options"] | {"model.task.pixel_loss": "--allow-import=evil"}
    for options in (arms["a"]["options"], hidden):
        (plain / "toy.yaml").write_text(yaml.safe_dump(STUDY | both | {"arms": {"a": {"options": options}, "b": {}}}))
        for words in (["study", "toy.yaml"], ["study", "toy.yaml", "--task", "1"]):
            assert main(words) != 0
            capsys.readouterr()
            assert not (plain / "marker").exists()
    command = [sys.executable, "-m", "maskvlm", "pretrain", "--model.task.image_masking", "evil.Masking"]
    done = subprocess.run(command, env=os.environ | {"MASKVLM_STUDY": "1"}, capture_output=True, text=True)
    assert done.returncode == ExitCode.REFUSED, done.stderr
    assert not (plain / "marker").exists()


def test_a_wrong_option_of_any_arm_is_told_before_a_run(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"all": {}, "contrast": {"options": {"model.task.weight_mlmm": 0}}}
    (plain / "toy.yaml").write_text(yaml.safe_dump(yaml.safe_load((plain / "toy.yaml").read_text()) | {"arms": arms}))
    assert main(["study", "toy.yaml"]) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("error: contrast: --model.task.weight_mlmm: unknown key (did you mean ")
    assert not (plain / "checkpoints" / "toy" / "all-s0").exists()


@pytest.mark.parametrize("cell", ["first", "contrast"])
def test_a_run_that_would_measure_nothing_is_told_before_a_run(
    cell: str, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would never be finished, and what starts from it would wait for ever."""
    options = {cell: {"trainer.limit_val_batches": 0}}
    first = {"label": "x", "options": {"data.steps": 1} | options.get("first", {})}
    arms = {"all": {}, "contrast": {"options": options.get("contrast", {})}}
    study = yaml.safe_load((plain / "toy.yaml").read_text()) | {"first": first, "arms": arms}
    (plain / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", "toy.yaml"]) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith(f"error: {cell}: trainer.limit_val_batches: 0 turns evaluation off")
    assert not (plain / "checkpoints" / "toy" / "first-s0").exists()


def test_two_studies_of_one_name_do_not_meet(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock()
    lock.take(plain / "checkpoints" / "toy")
    try:
        assert main(["study", "toy.yaml"]) == ExitCode.CANNOT_CREATE
        assert "another process is training here" in capsys.readouterr().err
    finally:
        lock.release()


def test_a_key_that_no_run_measures_is_told() -> None:
    metric = Metric("R@1", ("retrieval/tr_r11",), otherwise=("mlm/accuracy",))
    metrics = {"retrieval/tr_r1": 1.0, "mlm/accuracy": 1.0}
    hint = "retrieval/tr_r11 (did you mean retrieval/tr_r1?)"
    assert unknown_keys([metric], metrics) == [f"metric R@1: the first run has no {hint}"]
    assert unknown_keys([metric], metrics, "no run") == [f"metric R@1: no run has {hint}"]


def test_a_list_and_a_page_say_what_does_not_fit(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plain / "checkpoints" / "toy" / "all-s0"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text('{"cell": "all", "seed": 0, "command": ["maskvlm", "pretrain"]}')
    (folder / "versions.json").write_text('{"finished": {"step": 1}}')
    (folder / "metrics.json").write_text('{"score": 1.0}')
    assert main(["study", "toy.yaml", "--list"]) == 0
    states = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["other options", "step 0", "step 0", "step 0"]
    (folder / "study.json").unlink()
    assert main(["study", "toy.yaml", "--page-only"]) == 0
    assert "warning: metric R@1: no run has retrieval/tr_r1" in capsys.readouterr().err


def test_a_missing_package_is_told_before_any_run(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else find_spec(name))
    assert main(["study", "toy.yaml"]) == ExitCode.UNAVAILABLE
    assert capsys.readouterr().err.startswith("error: study: scipy not installed. Run `make study`, or pip install")
    assert not (plain / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["nothing"], "nothing: no such study. Give a YAML file, or one of ", ExitCode.MISSING_INPUT),
        (["toy.yaml", "--only", "some"], "--only: there is no some. Available: all, contrast", ExitCode.USAGE),
        (["toy.yaml", "--seeds", "9"], "--seeds: no run has seed 9. Available: 0, 1", ExitCode.USAGE),
        (["toy.yaml", "--seeds", "0", "9"], "--seeds: no run has seed 9. Available: 0, 1", ExitCode.USAGE),
        (["toy.yaml", "--task", "4"], "--task: there is no run 4. Give 0 to 3", ExitCode.USAGE),
        (["toy.yaml", "--jobs", "0"], "--jobs", ExitCode.USAGE),
        ([], "FILE", ExitCode.USAGE),
    ],
)
def test_a_mistake_is_one_line(
    plain: Path, words: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_commands_that_are_told_can_be_copied(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = yaml.safe_load((plain / "toy.yaml").read_text())
    study["options"]["model.task.text_masking"] = {"class_path": "maskvlm.objectives.masking.DrawnTokens"}
    (plain / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", "toy.yaml", "--list"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert '--model.task.text_masking={"class_path": "maskvlm.objectives.masking.DrawnTokens"}' in shlex.split(line)
    assert main(["study", "toy.yaml", "--page-only", "--allow-import", "acme"]) == 0
    page = (plain / "checkpoints" / "toy" / "README.md").read_text()
    assert "Made by `maskvlm study toy.yaml --allow-import acme`" in page


def test_a_page_never_erases_what_runs_gave_elsewhere(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does one of no run stand in the way of the study."""
    assert main(["study", "toy.yaml", "--page", "page", "--page-only"]) == 0
    assert main(["study", "toy.yaml", "--page", "page", "--page-only"]) == 0
    table = "run,hours,metrics_sha256,run_sha256,R@1\nelsewhere-s0,1.0,ab,cd,50.0\n"
    (plain / "page" / "runs.csv").write_text(table)
    capsys.readouterr()
    assert main(["study", "toy.yaml", "--page", "page", "--page-only"]) == 0
    (aside,) = (plain / "page").glob("before-*-runs.csv")
    assert aside.read_text() == table
    assert "keeps 1 runs that are no longer in runs.csv" in capsys.readouterr().err


def test_a_page_replaces_no_file_of_somebody_else(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plain / "docs").mkdir()
    (plain / "docs" / "README.md").write_text("mine")
    assert main(["study", "toy.yaml", "--page", "docs", "--page-only"]) == ExitCode.CANNOT_CREATE
    error = capsys.readouterr().err
    what = "is not the page of a study, and would be overwritten"
    assert error == f"error: docs/README.md: {what}. Give --page a folder of its own.\n"
    assert (plain / "docs" / "README.md").read_text() == "mine"


def test_of_a_tasks_processes_one_notes_the_run(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(*_: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", instead)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(["study", "toy.yaml", "--task", "3"]) == 0
    assert not (plain / "checkpoints" / "toy" / "contrast-s1" / "study.json").exists()
