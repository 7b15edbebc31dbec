"""A study's file: cells, what questions compare, and one line for each mistake."""

import csv
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.study.budget import budget_in_steps, flops_of
from maskvlm.study.definition import Metric, read_study
from maskvlm.study.page import write_page
from maskvlm.study.runs import check_same_run, runs_of
from maskvlm.utils.errors import ExitCode, UserError

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


def test_about_may_have_paragraphs_and_a_label_has_one_line(tmp_path: Path) -> None:
    assert read_study(written(tmp_path, STUDY | {"about": "one\n\ntwo\n"})).about == "one\n\ntwo\n"
    for change in ({"title": "one\ntwo\n"}, {"arms": {"few": {"label": "one\ntwo"}, "all": None}}):
        with pytest.raises(UserError, match=r"expected a text of at most 500 characters on one line"):
            read_study(written(tmp_path, STUDY | change))


def test_cells_are_arms_on_parts_of_the_data(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY))
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


def test_a_budget_is_that_of_the_arm_on_as_many_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.study.budget.flops_of", lambda *_: 1)
    few = [{"arms": ["all"], "fraction": 0.1, "options": {"data.steps": 40}}]
    every = [{"arms": ["few", "all"], "options": {"data.steps": 400}}, {"arms": ["few"], "flops_of": "all"}]
    study = read_study(written(tmp_path, STUDY | {"grid": [*few, *every]}))
    assert budget_in_steps(study, study.cell("few@flops-of-all"), tmp_path) == 400
    more = [{"arms": ["all"], "fraction": 0.2, "options": {"data.steps": 80}}]
    study = read_study(written(tmp_path, STUDY | {"grid": [*few, *more, every[1]], "questions": []}))
    with pytest.raises(UserError, match=r"flops_of: all: has cells with other numbers of steps: all@0\.1, all@0\.2"):
        budget_in_steps(study, study.cell("few@flops-of-all"), tmp_path)


def test_a_run_that_spends_another_budget_is_another_run(tmp_path: Path) -> None:
    hashes = []
    for steps in (6, 60):
        study = read_study(written(tmp_path, STUDY | {"options": {"data.steps": steps}}))
        runs = runs_of(study, tmp_path / "runs", counted=())
        hashes.append({run.name: run.sha256 for run in runs})
    assert all(hashes[0][name] != hashes[1][name] for name in hashes[0])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"better": "all", "than": ["few", "all"]}, "all is compared with itself"),
        ({"better": "all", "than": "other"}, "all and other have no seed in common"),
        (
            {"better": "all", "than": "few", "more_than": {"better": "other", "than": "other"}},
            "all and other have no seed in common",
        ),
    ],
)
def test_a_question_that_cannot_be_decided_is_refused(tmp_path: Path, question: Any, message: str) -> None:
    arms = STUDY["arms"] | {"other": None}
    grid = [{"arms": ["few", "all"]}, {"arms": ["other"], "seeds": [7, 8]}]
    questions = [{"claim": "x", "metric": "R@1", **question}]
    with pytest.raises(UserError, match=message):
        read_study(written(tmp_path, STUDY | {"arms": arms, "grid": grid, "questions": questions}))


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
    assert there.folder == run_here.folder
    check_same_run(there)  # a folder of encoders that was moved does not make another run
    other = STUDY | {"run": run.replace("pretrain", "pretrain model=small")}
    assert runs_of(read_study(written(tmp_path, other)), tmp_path, counted=())[0].sha256 != run_here.sha256
    assert study.run == run


def test_a_variable_is_one_word_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCODERS_OF_THIS_TEST", "/it's mine/my encoders")
    run = "pretrain 'encoders=${oc.env:ENCODERS_OF_THIS_TEST}' model=${oc.env:MODEL_OF_THIS_TEST,tiny}"
    study = read_study(written(tmp_path, STUDY | {"run": run}))
    assert study.cells[0].run == ("pretrain", "encoders=/it's mine/my encoders", "model=tiny")
    assert study.run == run


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"title": "${oc.env:HOME}"}, "title"),
        ({"about": "x ${oc.env:HOME}"}, "about"),
        ({"arms": {"few": {"label": "${oc.env:HOME}"}, "all": None}}, "arms.few.label"),
        ({"arms": {"options": {"label": "${oc.env:HOME}"}}}, "arms.options.label"),
        ({"first": {"label": "${oc.env:HOME}", "options": {}}}, "first.label"),
        ({"questions": [{"claim": "${oc.env:HOME}"}]}, "questions.claim"),
        ({"metrics": {"options": {"mean": ["a"], "unit": "${oc.env:HOME}"}}}, "metrics.options.unit"),
    ],
)
def test_no_variable_stands_on_the_page(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=r"study\.yaml: .*would appear on the page") as error:
        read_study(written(tmp_path, STUDY | change))
    assert error.value.where.endswith(f"study.yaml: {key}")
    assert error.value.code == ExitCode.REFUSED


def test_options_take_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE_OF_THIS_TEST", "8")
    options = {"data.batch_size": "${oc.env:SIZE_OF_THIS_TEST}"}
    for change in (
        {"options": options},
        {"arms": {name: {"options": options} for name in STUDY["arms"]}},
        {"grid": [{"arms": [*STUDY["arms"]], "options": options}]},
    ):
        study = read_study(written(tmp_path, STUDY | {"questions": []} | change))
        assert all(("data.batch_size", "8") in cell.options for cell in study.cells)
    study = read_study(written(tmp_path, STUDY | {"first": {"label": "x", "options": options}}))
    assert study.first is not None
    assert ("data.batch_size", "8") in study.first.options


def test_a_budget_of_operations_needs_the_steps_of_the_other(tmp_path: Path) -> None:
    study = {**STUDY, "options": {}, "questions": []}
    with pytest.raises(UserError, match=r"flops_of: all: does not set its number of steps\. Give it data\.steps"):
        runs_of(read_study(written(tmp_path, study)), tmp_path)


def test_an_arm_may_have_a_command_of_its_own(tmp_path: Path) -> None:
    arms = {"few": {"run": "pretrain model=small"}, "all": None}
    study = read_study(written(tmp_path, STUDY | {"arms": arms}))
    assert study.cell("few").run == ("pretrain", "model=small")
    assert study.cell("all").run == ("pretrain", "model=tiny")


def test_a_seed_is_made_once_and_the_machine_can_be_another(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY | {"seeds": [3, 1, 3]}), "gpu1")
    assert study.cells[0].seeds == (3, 1)
    assert study.cells[0].run == ("pretrain", "where=gpu1", "model=tiny")
    again = read_study(
        written(tmp_path, STUDY | {"run": "pretrain where=cpu 'encoders=my folder' --model.lr 1"}), "gpu1"
    )
    assert again.cells[0].run == ("pretrain", "where=gpu1", "encoders=my folder", "--model.lr", "1")


def test_steps_that_are_no_number_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(written(tmp_path, STUDY | {"options": {"data.steps": 1e3}}))
    with pytest.raises(UserError, match=r"flops_of: all: data\.steps is 1000\.0\. Give a whole number"):
        runs_of(study, tmp_path)
    assert len(runs_of(study, tmp_path, counted=())) == 8


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "A study"}, "study.yaml: name: expected a text"),
        ({"arms": {}}, "study.yaml: arms: expected names with values"),
        ({"arms": {"few": {"option": {}}, "all": None}}, "study.yaml: arms.few: the key 'option' is not known here"),
        ({"arms": {"few/er": None}}, "study.yaml: arms: 'few/er' is not a valid folder name"),
        ({"grid": [{"arms": ["fwe"]}]}, "study.yaml: grid 1: there is no fwe. Available: few, all"),
        ({"grid": [{"arms": ["few", "few"]}]}, "study.yaml: grid 1: few appears twice"),
        ({"grid": [{"arms": ["few"], "fraction": 2}]}, "study.yaml: grid 1: fraction: expected a number from 0 to 1"),
        ({"metrics": {"R@1": {"mean": []}}}, "study.yaml: metrics.R@1: mean: expected a list of 1 to 20"),
        ({"columns": ["R@2"]}, "study.yaml: columns: there is no R@2. Available: R@1, nats"),
        ({"seeds": []}, "study.yaml: seeds: expected a whole number"),
        ({"questions": [{"claim": "x"}]}, "study.yaml: question 1: the key better is missing"),
        (
            {"questions": [{"claim": "x", "better": "all", "than": "none", "metric": "R@1"}]},
            "study.yaml: question 1: there is no none. Available: few, all, few@flops-of-all, all@0.25",
        ),
        ({"grid": [{"arms": ["few"], "fraction": 0}]}, "study.yaml: grid 1: a fraction of 0 leaves no training images"),
        (
            {"run": "demo --host 0.0.0.0"},
            "study.yaml: run: does not begin with a command of a study (pretrain, finetune)",
        ),
        ({"run": "pretrain --trainer.fast_dev_run true"}, "study.yaml: run: trainer.fast_dev_run cannot limit a run"),
        (
            {"options": {"trainer.limit_train_batches": 2}},
            "study.yaml: grid 1: few: trainer.limit_train_batches cannot limit a run of a study: ",
        ),
        ({"run": "pretrain --allow-import evil"}, "study.yaml: run: --allow-import is not allowed in a study's file"),
        (
            {"options": {"allow-import": "evil"}},
            "study.yaml: grid 1: few: allow-import is not allowed in a study's file",
        ),
        ({"options": {"allow-import=evil": 1}}, "grid 1: few: allow-import=evil is not allowed in a study's file"),
        ({"options": {"model.lr --debug": 1}}, "grid 1: few: model.lr --debug is not allowed in a study's file"),
        (
            {"options": {"trainer.max_time": "00:01:00:00"}},
            "grid 1: few: trainer.max_time cannot limit a run of a study",
        ),
        ({"options": {"folder": "/elsewhere"}}, "grid 1: few: folder is not allowed in a study's file"),
        ({"run": "pretrain run=x"}, "study.yaml: run: run=x is not allowed in a study's file"),
        ({"run": "pretrain 'x"}, "study.yaml: run: No closing quotation"),
        ({"run": "finetune vqa from=x"}, "study.yaml: grid 2: flops_of counts the operations of pretrain only"),
        ({"arms": {8: None}}, "study.yaml: arms: expected a mapping"),
        ({"metrics": {"R@1": {"mean": ["a"], "as": "gaussian nats"}}}, "metric R@1: as: gaussian nats compares two"),
        ({"first": {"options": {}}}, "study.yaml: first: the key label is missing"),
        (
            {"first": {"label": "x", "options": {"folder": "y"}}},
            "study.yaml: first: folder is not allowed in a study's file",
        ),
        (
            {"first": {"label": "x", "options": {}}, "run": "pretrain from=best.ckpt"},
            "study.yaml: first: few has a from= of its own",
        ),
        (
            {"first": {"label": "x", "options": {}}, "arms": {"few": {"run": "pretrain model=small"}, "all": None}},
            "study.yaml: first: few has model=small, but the run that it starts from model=tiny",
        ),
        (
            {"first": {"label": "x", "options": {}}, "arms": {"first": None}, "grid": [{"arms": ["first"]}]},
            "study.yaml: first: another arm has this name",
        ),
        ({"run": "pretrain encoders=${oc.env:NOT_THERE_AT_ALL}"}, "Environment variable 'NOT_THERE_AT_ALL' not found"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_study(written(tmp_path, STUDY | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value).split("\nexit status")[0]


@pytest.mark.parametrize("text", ["", "- a\n", "name: [", "!!python/object:os.system {}", "name: toy\n"])
def test_what_is_no_study_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"study\.yaml"):
        read_study(written(tmp_path, text))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["all", "few", "R@1", "x", "a.b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["arms", "mean", "all"]), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(key=st.sampled_from(list(STUDY)), value=VALUES)
def test_any_value_is_read_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    try:
        study = read_study(written(tmp_path, STUDY | {key: value}))
    except UserError:
        return
    assert all(cell.arm in study.arms for cell in study.cells)


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_that_come_along_can_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCODERS", "encoders")
    study = read_study(str(file))
    assert study.name == file.stem
    assert study.questions


@pytest.mark.parametrize("page", sorted((ROOT / "docs/results/study").glob("*/runs.csv")), ids=lambda p: p.parent.name)
def test_committed_runs_are_still_those_of_their_study(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a study's options change, for instance because a recipe did: its page could not be completed."""
    monkeypatch.setenv("ENCODERS", "encoders")
    monkeypatch.setattr("maskvlm.study.budget._counted", lambda words: 1)  # derived steps do not count
    runs = runs_of(read_study(str(ROOT / "studies" / f"{page.parent.name}.yaml")), tmp_path)
    wanted = {run.name: run.sha256 for run in runs}
    rows = [*csv.DictReader(page.read_text(encoding="utf-8").splitlines())]
    assert rows
    assert [row["run"] for row in rows if wanted.get(row["run"]) != row["run_sha256"]] == []


def test_the_example_of_the_page_is_a_study(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(name: .*?)```", page, re.DOTALL)
    study = read_study(written(tmp_path, block))
    assert [cell.name for cell in study.cells] == [
        "itc-itm", "words", "itc-itm@0.25", "words@0.25", "itc-itm@flops-of-words",
    ]  # fmt: skip
    assert len(study.questions) == 2


@pytest.mark.parametrize(("name", "arm"), [("claims", "all"), ("recipe", "paper"), ("candidates", "paper")])
def test_the_papers_arm_is_the_papers_whatever_the_built_in_recipe_takes(
    name: str, arm: str, monkeypatch: pytest.MonkeyPatch, stack: Callable[..., list[str]]
) -> None:
    """It differs from the defaults, which are the paper's, in what a small model needs alone."""
    monkeypatch.chdir(ROOT)
    cell = read_study(str(ROOT / "studies" / f"{name}.yaml")).cell(arm)
    assert cell.run == ("pretrain", "model=tiny", "data=scenes")
    options = [f"--{key}={value}" for key, value in cell.options]
    composed = run_command(Parsed, ["fit", *stack(MODEL="tiny", DATA="scenes"), *options]).settings
    task = composed.model.task.init_args
    defaults = {key: each.default for key, each in inspect.signature(MaskedPretraining).parameters.items()}
    differs = {key for key, value in defaults.items() if task[key] != value and not (value == () and not task[key])}
    assert differs <= {"mask_block", "decoder_layers", "weight_mlm", "contrast_dim", "pixel_loss", "rerank_k"}
    assert composed.model.backbone.init_args.query_positions is False
    assert composed.data.init_args.source.init_args.relations == 0


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


def test_the_machine_is_no_part_of_a_run_that_spends_anothers_operations(tmp_path: Path) -> None:
    grid = [{"arms": ["few", "all"]}, {"arms": ["few"], "flops_of": "all"}]
    file = written(tmp_path, STUDY | {"grid": grid, "questions": []})
    here, there = (runs_of(read_study(file, where), tmp_path, counted=()) for where in (None, "gpu1"))
    assert any(run.spent is not None for run in here)
    assert [run.sha256 for run in here] == [run.sha256 for run in there]


def test_a_variable_of_the_first_run_is_not_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THIS_TEST", "hf_xyz")
    secret = {"data.source.root": "${oc.env:SECRET_OF_THIS_TEST}"}
    for change in (
        {"first": {"label": "x", "options": {"data.steps": 9, **secret}}},
        {"options": {**STUDY["options"], **secret}, "first": {"label": "x", "options": {"data.steps": 9}}},
    ):
        study = read_study(written(tmp_path, STUDY | change))
        assert study.first is not None
        assert ("data.source.root", "hf_xyz") in study.first.options
        write_page(study, runs_of(study, tmp_path, counted=()), tmp_path / "page", "maskvlm study x")
        text = (tmp_path / "page" / "README.md").read_text()
        assert "${oc.env:SECRET_OF_THIS_TEST}" in text
        assert "hf_xyz" not in text


def test_operations_are_counted_wherever_the_runs_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a login node has to have the cards that the runs are for."""
    counted: list[list[str]] = []
    monkeypatch.setattr("maskvlm.study.budget._counted", lambda words: counted.append([*words]) or 1)
    study = read_study(written(tmp_path, STUDY | {"run": "pretrain model=tiny where=gpu8 from=x.ckpt"}))
    flops_of(study.cells[0], tmp_path, False)
    assert [word for word in counted[0] if not word.startswith("--")] == ["model=tiny", "from=x.ckpt"]


def test_operations_of_a_long_run_can_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where its interval and warm-up are held against the steps that scenes have by themselves."""
    monkeypatch.chdir(ROOT)
    commands: list[list[str]] = []

    def bench(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout='{"flops": 5}')

    monkeypatch.setattr("maskvlm.study.budget.subprocess", SimpleNamespace(run=bench))
    options = {"data.steps": 9000, "trainer.val_check_interval": 8000, "model.warmup": 7000}
    study = read_study(written(tmp_path, STUDY | {"options": options}))
    assert budget_in_steps(study, study.cell("few@flops-of-all"), tmp_path) == 9000
    for _, _, _, name, *words, last in commands:
        assert (name, last) == ("bench", "--json")
        run_command(Parsed, COMMANDS["pretrain"].full(words))


def test_the_step_that_is_counted_is_one_of_a_run_that_starts_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where the files for continued training are left out: by themselves encoders of a small model stop early."""
    monkeypatch.chdir(ROOT)
    counted: list[list[str]] = []
    monkeypatch.setattr("maskvlm.study.budget._counted", lambda words: counted.append([*words]) or 1)
    first = {"label": "x", "options": {"data.steps": 1}}
    for change, image_learns in (({}, 0.45), ({"first": first}, 1.0)):
        study = read_study(written(tmp_path, STUDY | change))
        budget_in_steps(study, study.cell("few@flops-of-all"), tmp_path)
        for words in counted[-2:]:
            composed = run_command(Parsed, COMMANDS["pretrain"].full(words)).settings
            assert composed.model.task.init_args.image_learns == image_learns
    assert len(counted) == 4
