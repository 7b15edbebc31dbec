"""A study's file: cells, what questions compare, and one line for each mistake."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskvlm.study.budget import budget_in_steps
from maskvlm.study.definition import Metric, read_study
from maskvlm.study.runs import check_same_run, runs_of
from maskvlm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STUDY: dict[str, Any] = {
    "name": "toy",
    "run": "pretrain model=tiny",
    "options": {"data.steps": 6, "model.lr": 0.1},
    "seeds": 2,
    "arms": {
        "few": {"label": "few losses", "options": {"model.task.weight_mlm": 0, "model.lr": 0.2}},
        "all": None,
    },
    "grid": [{"arms": ["few", "all"]}, {"arms": ["few"], "flops_of": "all"}, {"arms": ["all"], "fraction": 0.25}],
    "metrics": {"R@1": {"mean": ["a", "b"]}, "nats": {"mean": ["c"], "minus": ["d"], "unit": "nats"}},
    "questions": [{"claim": "More is better.", "better": "all", "than": ["few", "few@flops-of-all"], "metric": "R@1"}],
}


def written(folder: Path, study: Any) -> str:
    file = folder / "study.yaml"
    file.write_text(study if isinstance(study, str) else yaml.safe_dump(study, sort_keys=False))
    return str(file)


def test_cells_are_arms_on_parts_of_the_data(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY))
    arms = {"few": {"run": "pretrain model=small"}, "all": None}
    assert read_study(written(tmp_path, STUDY | {"arms": arms})).cell("few").run == ("pretrain", "model=small")
    assert [cell.name for cell in study.cells] == ["few", "all", "few@flops-of-all", "all@0.25"]
    assert [cell.fraction for cell in study.cells] == [1, 1, 1, 0.25]
    # the arm's options win over the study's
    assert dict(study.cell("few").options) == {"data.steps": "6", "model.lr": "0.2", "model.task.weight_mlm": "0"}
    assert dict(study.cell("all").options) == {"data.steps": "6", "model.lr": "0.1"}
    assert [study.label(cell) for cell in study.cells] == [
        "few losses", "all", "few losses, with the operations of all", "all, 25 % of the images",
    ]  # fmt: skip
    (question,) = study.questions
    assert [tuple(pair) for pair in question.comparisons] == [("all", "few"), ("all", "few@flops-of-all")]


def test_every_run_has_its_folder_and_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed by seed, so that all arms can be compared early; a budget of operations in steps."""
    flops = {"few": 30, "all": 100}
    monkeypatch.setattr("maskvlm.study.budget.flops_of", lambda cell, *_: flops[cell.arm])
    study = read_study(written(tmp_path, STUDY))
    runs = runs_of(study, tmp_path / "runs")
    assert [run.name for run in runs] == [
        f"{cell}-s{seed}" for seed in (0, 1) for cell in ("few", "all", "few@flops-of-all", "all@0.25")
    ]
    assert runs[2].command[2:] == (
        "maskvlm", "pretrain", "model=tiny", "--folder", str(tmp_path / "runs" / "few@flops-of-all-s0"),
        "--data.steps=20", "--model.lr=0.2", "--model.task.weight_mlm=0", "--seed_everything=0",
    )  # fmt: skip
    assert runs[7].command[-2:] == ("--seed_everything=1", "--data.fraction=0.25")
    assert budget_in_steps(study, study.cell("all"), tmp_path) is None


def test_the_environment_is_filled_in_for_the_runs_and_not_for_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCODERS_OF_THIS_TEST", "/here/encoders")
    run = "pretrain encoders=${oc.env:ENCODERS_OF_THIS_TEST}"
    study = read_study(written(tmp_path, STUDY | {"run": run}))
    assert study.cells[0].run == ("pretrain", "encoders=/here/encoders")
    run_here = runs_of(study, tmp_path, counted=())[0]
    assert "encoders=/here/encoders" in run_here.command
    monkeypatch.setenv("ENCODERS_OF_THIS_TEST", "/there/enc")
    there = runs_of(read_study(written(tmp_path, STUDY | {"run": run})), tmp_path, counted=())[0]
    assert there.sha256 == run_here.sha256
    run_here.note(1.0)
    check_same_run(there)  # a folder of encoders that was moved does not make another run
    assert study.run == run


def test_a_seed_is_made_once_and_the_machine_can_be_another(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY | {"seeds": [3, 1, 3]}), "gpu1")
    assert study.cells[0].seeds == (3, 1)
    assert study.cells[0].run == ("pretrain", "where=gpu1", "model=tiny")
    again = read_study(
        written(tmp_path, STUDY | {"run": "pretrain where=cpu 'encoders=my folder' --model.lr 1"}), "gpu1"
    )
    assert again.cells[0].run == ("pretrain", "where=gpu1", "encoders=my folder", "--model.lr", "1")


def test_metrics_are_means_and_differences() -> None:
    metrics = {"a": 4.0, "b": 6.0, "c": 1.0}
    assert Metric("x", ("a", "b")).of(metrics) == 5
    assert Metric("x", ("a",), ("b", "c")).of(metrics) == 0.5
    # an error four times as large is one of ln 2 nats more, if errors are Gaussian
    assert Metric("x", ("c",), ("a",), gaussian=True).of(metrics) == pytest.approx(0.6931471805599453)
    assert str(Metric("x", ("d",)).of(metrics)) == "nan"
    assert str(Metric("x", ("c",), ("c",), gaussian=True).of({"c": 0.0})) == "nan"
    assert Metric("x", ("d",), otherwise=("a", "b")).of(metrics) == 5
    assert Metric("x", ("c",), otherwise=("a",)).of(metrics) == 1


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_committed_runs_are_still_those_of_their_study(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a study's options change, for instance because a recipe did: its page could not be completed."""
    monkeypatch.setenv("ENCODERS", "encoders")
    monkeypatch.setattr("maskvlm.study.budget._counted", lambda words: 1)  # derived steps do not count
    study = read_study(str(file))
    assert (study.name, bool(study.questions)) == (file.stem, True)
    page = ROOT / "docs/results/study" / file.stem / "runs.csv"
    if page.exists():
        wanted = {run.name: run.sha256 for run in runs_of(study, tmp_path)}
        rows = [*csv.DictReader(page.read_text(encoding="utf-8").splitlines())]
        assert rows
        assert [row["run"] for row in rows if wanted.get(row["run"]) != row["run_sha256"]] == []


def test_runs_start_from_the_first_of_their_seed(tmp_path: Path) -> None:
    first = {"label": "masked words alone", "options": {"data.steps": 9, "model.task.weight_itc": 0}}
    blocks = [{"arms": ["few"]}, {"arms": ["all"], "seeds": [1, 4]}]
    study = read_study(written(tmp_path, STUDY | {"first": first, "grid": blocks, "questions": []}))
    runs = runs_of(study, tmp_path)
    assert [run.name for run in runs] == ["first-s0", "first-s1", "first-s4", "few-s0", "few-s1", "all-s1", "all-s4"]
    assert runs[1].command[5:] == (
        "--folder", str(tmp_path / "first-s1"), "--data.steps=9", "--model.lr=0.1", "--model.task.weight_itc=0",
        "--seed_everything=1",
    )  # fmt: skip
    assert [run.start for run in runs[:3]] == [None] * 3
    assert runs[4].start == runs[1]
    assert runs[4].command[5:7] == (f"from={tmp_path / 'first-s1' / 'last.ckpt'}", "--folder")
    assert runs[4].about["command"] == [*runs[4].command[2:]]  # another start is another run
    assert study.label(study.first) == "masked words alone"
    # What it starts from decides its weights, too: made otherwise it is another run.
    first["options"]["data.steps"] = 10
    others = runs_of(read_study(written(tmp_path, STUDY | {"first": first, "grid": blocks, "questions": []})), tmp_path)
    assert others[4].command == runs[4].command
    assert others[4].sha256 != runs[4].sha256
    # A folder made from the earlier one is refused; one of a version that did not note the start is taken.
    runs[4].note(1.0)
    check_same_run(runs[4])
    with pytest.raises(UserError, match="holds a run with this name and other options"):
        check_same_run(others[4])
    file = runs[4].folder / "study.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "start"}))
    check_same_run(others[4])


FIRST = {"label": "x", "options": {}}
QUESTION = {"claim": "x", "metric": "R@1", "better": "all"}
APART = {**QUESTION, "than": "other"}
ELSEWHERE = [{"arms": ["few", "all"]}, {"arms": ["other"], "seeds": [7, 8]}]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"arms": {"few": {"option": {}}, "all": None}}, r"arms\.few: the key 'option'"),
    ({"arms": {"few/er": None}}, "'few/er' is not a valid folder name"),
    ({"grid": [{"arms": ["fwe"]}]}, "there is no fwe"),
    ({"grid": [{"arms": ["few"], "fraction": 0}]}, "leaves no training images"),
    ({"metrics": {"R@1": {"mean": ["a"], "as": "gaussian nats"}}}, "gaussian nats compares two"),
    ({"questions": [{**QUESTION, "than": ["few", "all"]}]}, "all is compared with itself"),
    ({"arms": dict.fromkeys(("few", "all", "other")), "grid": ELSEWHERE, "questions": [APART]}, "no seed in common"),
    # what would run code, write elsewhere or show a secret
    ({"run": "demo --host 0.0.0.0"}, "does not begin with a command of a study"),
    ({"run": "pretrain --allow-import evil"}, "--allow-import is not allowed"),
    ({"options": {"folder": "/elsewhere"}}, "folder is not allowed"),
    ({"first": {"label": "x", "options": {"folder": "y"}}}, "folder is not allowed"),
    ({"title": "${oc.env:HOME}"}, "title: .*would appear on the page"),
    ({"arms": {"options": {"label": "${oc.env:HOME}"}}}, "would appear on the page"),
    ({"run": "pretrain encoders=${oc.env:NOT_THERE_AT_ALL}"}, "NOT_THERE_AT_ALL"),
    # what would make runs of another length, or start elsewhere
    ({"run": "pretrain --trainer.fast_dev_run true"}, "cannot limit a run"),
    ({"run": "finetune vqa from=x"}, "flops_of counts the operations of pretrain only"),
    ({"first": FIRST, "run": "pretrain from=best.ckpt"}, "has a from= of its own"),
    ({"first": FIRST, "arms": {"few": {"run": "pretrain model=small"}, "all": None}}, "few has model=small"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_mistake_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_study(written(tmp_path, STUDY | change))
