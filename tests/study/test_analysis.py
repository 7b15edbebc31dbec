"""Statistics of a study against numbers worked out by hand, and the page that says them."""

import csv
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study.test_definition import STUDY, written

from maskvlm.study.analysis import answer, frame_of, interval, lead, values_of, verdict_by
from maskvlm.study.definition import Comparison, Study, read_study
from maskvlm.study.earlier import earlier_runs
from maskvlm.study.page import write_page
from maskvlm.study.runs import StudyRun, runs_of
from maskvlm.utils.errors import UserError

MORE = {"claim": "It grows.", "better": "all@0.25", "than": "few", "more_than": {"better": "all", "than": "few"}}


def a_study(
    folder: Path, values: dict[str, list[float]], change: dict[str, Any] | None = None
) -> tuple[Study, list[StudyRun]]:
    """Finished runs: cell -> R@1 of each seed."""
    study = read_study(written(folder, STUDY | {"seeds": 4} | (change or {})))
    runs = []
    for cell in study.cells:
        for seed in cell.seeds:
            place = folder / "runs" / f"{cell.name}-s{seed}"
            runs.append(StudyRun(cell, seed, place, ("python", "-m", "maskvlm")))
            if seed < len(values.get(cell.name, [])):
                place.mkdir(parents=True)
                reached = values[cell.name][seed]
                (place / "metrics.json").write_text(json.dumps({"a": reached - 1, "b": reached + 1, "c": None}))
                (place / "versions.json").write_text('{"finished": {"step": 9}}')
    return study, runs


def test_an_interval_is_students() -> None:
    estimate = interval([1.0, 2.0, 3.0])
    # t of 0.975 with 2 degrees of freedom is 4.302653; the standard error is 1 / sqrt(3)
    assert (estimate.mean, estimate.values) == (2.0, 3)
    assert estimate.high - estimate.mean == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert estimate.mean - estimate.low == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert interval([2.0, 2.0])[:3] == (2.0, 2.0, 2.0)
    assert math.isnan(interval([2.0]).low)
    assert math.isnan(interval([]).mean)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds that only one of the two has do not count; what differs between seeds alike in both drops out."""
    study, runs = a_study(tmp_path, {"few": [10, 50, 90, 20], "all": [12, 52, 92]})
    frame = frame_of(study, runs)
    assert lead(frame, Comparison("all", "few"), study.metrics["R@1"]).to_dict() == {0: 2, 1: 2, 2: 2}
    lower = read_study(
        written(tmp_path, STUDY | {"metrics": STUDY["metrics"] | {"R@1": {"mean": ["a"], "lower": True}}})
    )
    assert lead(frame_of(lower, runs), Comparison("all", "few"), lower.metrics["R@1"]).to_dict() == {
        0: -2,
        1: -2,
        2: -2,
    }
    assert values_of(frame, "few", study.metrics["nats"]).empty  # that no run has measured


@pytest.mark.parametrize(
    ("few", "by_flops", "verdict"),
    [
        ([10, 11, 12], [10, 11, 12], "holds"),
        ([10, 11, 12], [30, 31, 32], "does not hold"),
        ([10, 11, 12], [10, 31, 12], "undecided"),
        ([10], [10], "undecided"),
        ([10, 11, 12, math.nan], [10, 11, 12], "undecided"),  # one run diverged
        ([], [], "undecided"),
    ],
)
def test_a_claim_holds_where_every_interval_says_so(
    tmp_path: Path, few: list[float], by_flops: list[float], verdict: str
) -> None:
    study, runs = a_study(tmp_path, {"few": few, "few@flops-of-all": by_flops, "all": [20.5, 21, 22]})
    assert answer(frame_of(study, runs), study.questions[0]).verdict == verdict


def test_at_least_so_much(tmp_path: Path) -> None:
    ahead = interval([3.0, 3.1, 3.2])
    assert verdict_by(ahead, 0) == "holds"
    assert verdict_by(ahead, 2.8) == "holds"
    assert verdict_by(ahead, 3) == "undecided"
    assert verdict_by(ahead, 4) == "does not hold"
    assert verdict_by(interval([3.0, 3.0]), 0) == "undecided"  # how much seeds differ is not known
    # As two seeds with the same lead are written in binary.
    assert verdict_by(interval([50.1 - 50.0, 20.1 - 20.0]), 0) == "undecided"
    assert interval([0.0, 0.0])[:3] == (0.0, 0.0, 0.0)


def test_one_lead_against_another(tmp_path: Path) -> None:
    change = {"questions": [{**MORE, "metric": "R@1"}]}
    study, runs = a_study(tmp_path, {"few": [10, 11, 12], "all": [12, 13, 14.1], "all@0.25": [17, 18, 19]}, change)
    (compared,) = answer(frame_of(study, runs), study.questions[0]).compared
    assert compared.by_seed == pytest.approx((5, 5, 4.9))
    assert compared.verdict == "holds"


def test_rounding_decides_nothing(tmp_path: Path) -> None:
    """Leads that are equal but for the last digits of the values whose differences they are."""
    values = {"few": [0.0] * 3, "all": [71.9, 33.3, 8.1], "all@0.25": [71.9 + 2e-14, 33.3 + 3e-14, 8.1 + 2e-14]}
    study, runs = a_study(tmp_path, values, {"questions": [{**MORE, "metric": "R@1"}]})
    (compared,) = answer(frame_of(study, runs), study.questions[0]).compared
    assert len({*compared.by_seed}) > 1
    assert compared.verdict == "undecided"


@pytest.mark.parametrize("cell", ["few", "all", "all@0.25"])
def test_a_run_that_was_lost_on_either_side_leaves_it_undecided(tmp_path: Path, cell: str) -> None:
    """Also one of the lead that is held against."""
    values = {"few": [10, 11, 12], "all": [12, 13, 14.1], "all@0.25": [17, 18, 19]}
    values[cell] = [*values[cell], math.nan]
    study, runs = a_study(tmp_path, values, {"questions": [{**MORE, "metric": "R@1"}]})
    assert answer(frame_of(study, runs), study.questions[0]).verdict == "undecided"


def test_each_comparison_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    values = {"few": [10, 31, 12], "few@flops-of-all": [30, 31, 32], "all": [20.5, 21, 22]}
    study, runs = a_study(tmp_path, values)
    page = write_page(study, runs, tmp_path / "page", "x").read_text()
    assert "| few losses<br>few losses, with the operations of all | " in page
    assert " | undecided<br>does not hold |" in page
    assert "As a whole: **does not hold**. Judged by" in page


def test_a_run_of_the_same_name_with_other_options_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, runs = a_study(tmp_path, {"few": [10, 11]})
    table = write_page(study, runs, tmp_path / "page", "x").with_name("runs.csv")
    write_page(study, runs, tmp_path / "page", "x")
    assert not [*table.parent.glob("before-*")]  # nothing of it would be lost
    with table.open(newline="") as file:
        digest = next(csv.DictReader(file))["run_sha256"]
    before = table.read_text().replace(digest, "0" * 64, 1)
    table.write_text(before)
    write_page(study, runs, tmp_path / "page", "x")
    (aside,) = table.parent.glob("before-*-runs.csv")
    assert aside.read_text() == before
    assert "keeps 1 runs that are no longer in runs.csv" in capsys.readouterr().err


def test_a_label_is_no_formula(tmp_path: Path) -> None:
    arms = {name: (arm or {}) | {"label": f"{name} of $5 to \\frac$"} for name, arm in STUDY["arms"].items()}
    study, runs = a_study(tmp_path, {"few": [10, 11], "all": [12, 13]}, {"arms": arms})
    page = write_page(study, runs, tmp_path / "page", "x")
    assert (page.parent / "question-1.png").is_file()


def test_the_page_says_what_the_runs_say(tmp_path: Path) -> None:
    change = {"title": "A toy", "questions": [*STUDY["questions"], {**MORE, "metric": "R@1"}]}
    study, runs = a_study(
        tmp_path, {"few": [10, 11, 12], "few@flops-of-all": [15, 17, 16], "all": [20, 21, 22.3]}, change
    )
    page = write_page(study, runs, tmp_path / "page", "maskvlm study toy").read_text()
    assert page.startswith("# A toy\n")
    assert "; differences are paired by seed. A comparison holds, or does not, where the whole interval says " in page
    assert "from 9 of 16 runs" in page
    assert "| few losses | 3 |  | 11.0 ± 2.5 |  |" in page
    ahead = "+10.1 points (+9.67 to +10.5, 3 seeds)<br>+5.1 points (+2.24 to +7.96, 3 seeds)"
    against = "few losses<br>few losses, with the operations of all"
    assert f"| 1 | More is better. | {against} | {ahead} | holds<br>holds |" in page
    # What no run tells of is named, without a row, a section or a plot.
    assert "\nNot measured:\n\n- It grows. (no run yet of: all, 25 % of the images)\n" in page
    assert page.count("It grows.") == 1
    assert page.count("25 %") == 1
    cells = "+5.1 points (+2.24 to +7.96, 3 seeds) | holds | +5, +4, +6.3"
    assert f"| all | few losses, with the operations of all | {cells} |" in page
    assert (tmp_path / "page" / "question-1.png").read_bytes().startswith(b"\x89PNG")
    assert "(question-1.png)" in page
    assert not (tmp_path / "page" / "question-2.png").exists()


def test_a_metric_may_be_called_as_a_key_or_a_fact(tmp_path: Path) -> None:
    metrics = {"a": {"mean": ["a"], "minus": ["b"]}, "cell": {"mean": ["b"]}, "R@1": {"mean": ["a", "b"]}}
    study, runs = a_study(tmp_path, {"few": [10, 11]}, {"metrics": metrics})
    frame = frame_of(study, runs)
    assert values_of(frame, "few", study.metrics["a"]).tolist() == [-2, -2]
    assert values_of(frame, "few", study.metrics["cell"]).tolist() == [11, 12]


def test_every_number_can_be_traced_to_its_run(tmp_path: Path) -> None:
    study, runs = a_study(tmp_path, {"few": [10, 11]})
    write_page(study, runs, tmp_path / "page", "maskvlm study toy")
    with (tmp_path / "page" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], float(row["a"])) for row in rows] == [("few-s0", "0", 9), ("few-s1", "1", 10)]
    for row in rows:
        content = (tmp_path / "runs" / row["run"] / "metrics.json").read_bytes()
        assert row["metrics_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_run_that_ended_early_is_named(tmp_path: Path) -> None:
    """Also where it was made elsewhere. Fails where it is averaged with the others without a word."""
    study, runs = a_study(tmp_path, {"few": [10, 11, 12]})
    for seed, steps in ((0, 9), (1, 40)):
        record = {"finished": {"step": 9, "of": steps}}
        (tmp_path / "runs" / f"few-s{seed}" / "versions.json").write_text(json.dumps(record))
    page = write_page(study, runs, tmp_path / "page", "x")
    assert "Not every run made all steps: few-s1 ended at step 9 of 40. " in page.read_text()
    (tmp_path / "here").mkdir()
    _, here = a_study(tmp_path / "here", {})
    again = write_page(study, here, tmp_path / "again", "x", earlier_runs(page.parent, here))
    assert "few-s1 ended at step 9 of 40. " in again.read_text()
    assert "made all steps" not in write_page(study, here, tmp_path / "none", "x").read_text()


def test_a_run_that_diverged_leaves_its_comparisons_undecided(tmp_path: Path) -> None:
    """Also where it was made elsewhere. Fails where its arm is judged by the seeds that remain."""
    values = {"few": [10, 11, 12], "few@flops-of-all": [10, 11, 12], "all": [20.5, 21, 22]}
    study, runs = a_study(tmp_path, values)
    assert answer(frame_of(study, runs), study.questions[0]).verdict == "holds"
    lost = tmp_path / "runs" / "all-s3"
    lost.mkdir()
    (lost / "versions.json").write_text('{"diverged": {"step": 7}}')
    page = write_page(study, runs, tmp_path / "page", "x")
    assert "Not every run made all steps: all-s3 diverged at step 7. " in page.read_text()
    assert "| all | 4 |  | 21.2 ± 1.9 (3) |" in page.read_text()
    (tmp_path / "here").mkdir()
    _, here = a_study(tmp_path / "here", {})
    earlier = earlier_runs(page.parent, here)
    for frame in (frame_of(study, runs), frame_of(study, here, earlier)):
        assert answer(frame, study.questions[0]).verdict == "undecided"


def test_hours_that_nobody_has_counted_are_not_none(tmp_path: Path) -> None:
    study, runs = a_study(tmp_path, {"few": [10, 11, 12], "all": [20, 21, 22]})
    for place, seconds in (("few-s0", 3600), ("few-s1", 10800), ("all-s0", 3600), ("all-s1", 3600), ("all-s2", 3600)):
        (tmp_path / "runs" / place / "study.json").write_text(json.dumps({"seconds": seconds}))
    (tmp_path / "runs" / "few-s2" / "study.json").write_text('{"seconds": null}')
    page = write_page(study, runs, tmp_path / "page", "x").read_text()
    assert "at least 7.0 hours of runs, waiting included; the hours of 1 are not known)" in page
    assert "| few losses | 3 | 2.00 (2) | " in page
    assert "| all | 3 | 1.00 | " in page


def test_the_page_says_what_all_runs_start_from(tmp_path: Path) -> None:
    first = {"label": "masked words alone", "options": {"data.steps": 9}}
    study, runs = a_study(tmp_path, {"few": [10, 11]}, {"first": first})
    page = write_page(study, runs, tmp_path / "page", "x").read_text()
    assert (
        "starts from the last weights of a run of its seed: masked words alone (`--data.steps=9 --model.lr=0.1`)."
        in page
    )
    assert "It diverged" not in page
    lost = tmp_path / "runs" / "first-s1"
    lost.mkdir()
    (lost / "versions.json").write_text('{"diverged": {"step": 7}}')
    (tmp_path / "runs" / "few-s1" / "metrics.json").unlink()
    runs = runs_of(study, tmp_path / "runs", counted=())
    page = write_page(study, runs, tmp_path / "page", "x").read_text()
    assert "It diverged with seed 1: the runs that start from it were not made." in page
    (tmp_path / "without").mkdir()
    without = a_study(tmp_path / "without", {})
    assert "starts from" not in write_page(*without, tmp_path / "without", "x").read_text()


def test_runs_of_a_page_that_was_made_elsewhere_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    study, runs = a_study(tmp_path / "there", {"few": [10, 11], "all": [20, 21.5]})
    page = write_page(study, runs, tmp_path / "page", "x").parent
    (tmp_path / "here").mkdir()
    _, here = a_study(tmp_path / "here", {"few": [10.5]})
    earlier = earlier_runs(page, here)
    assert set(earlier) == {"few-s0", "few-s1", "all-s0", "all-s1"}
    assert earlier["all-s1"].metrics == {"a": 20.5, "b": 22.5}
    assert earlier["all-s1"].sha256 == hashlib.sha256((runs[5].folder / "metrics.json").read_bytes()).hexdigest()
    frame = frame_of(study, here, earlier)
    # The run that was made here, too, counts before the other one.
    assert values_of(frame, "few", study.metrics["R@1"]).tolist() == [10.5, 11]
    # Written again, the table is the same, but for that run.
    again = write_page(study, here, tmp_path / "again", "x", earlier).with_name("runs.csv").read_text().splitlines()
    before = (page / "runs.csv").read_text().splitlines()
    assert [line for line in again if not line.startswith("few-s0")] == [
        line for line in before if not line.startswith("few-s0")
    ]
    # Made by another command it is another run.
    others = [run._replace(cell=replace(run.cell, options=(("model.lr", "1"),))) for run in here]
    capsys.readouterr()
    assert earlier_runs(page, others) == {}
    assert "runs.csv: 4 of 4 rows come from other commands" in capsys.readouterr().err
    assert earlier_runs(tmp_path / "none", here) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column run"),
        ("run,hours,run_sha256,metrics_sha256,a\nfew-s0,,SHA,,x\n", "runs.csv:2: a: 'x' is not a number"),
        ("run,hours,run_sha256,metrics_sha256,a\nfew-s0,,SHA,,1\nall-s0,0.1\n", "runs.csv:3: expected 5 fields"),
        (b"run,hours\xff\n", "is not a table of runs"),
    ],
)
def test_what_is_no_table_of_runs_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    _, runs = a_study(tmp_path, {})
    content = text if isinstance(text, bytes) else text.replace("SHA", runs[0].sha256).encode()
    (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        earlier_runs(tmp_path, runs)
    assert "\n" not in str(error.value).split("\nexit status")[0]


def test_a_study_of_no_runs_has_a_page(tmp_path: Path) -> None:
    study, runs = a_study(tmp_path, {})
    assert "from 0 of 16 runs" in write_page(study, runs, tmp_path / "page", "x").read_text()


@pytest.mark.parametrize(
    ("few", "every", "metric", "reason"),
    [
        ([10, 11], [], "R@1", "no run yet of: all"),
        ([10, 11], [math.inf, math.inf], "R@1", "every run diverged of: all"),
        ([10, math.nan], [math.nan, 13], "R@1", "its cells have no seed in common yet"),
        ([10, 11], [12, 13], "nats", "no nats in the runs of: all"),
    ],
)
def test_why_a_claim_is_not_measured_is_said(
    tmp_path: Path, few: list[float], every: list[float], metric: str, reason: str
) -> None:
    """Infinity stands for a run that diverged, NaN for one that is not over."""
    question = {"claim": "All is more.", "better": "all", "than": "few", "metric": metric}
    study, runs = a_study(tmp_path, {"few": few, "all": every}, {"questions": [question]})
    for cell, values in (("few", few), ("all", every)):
        for seed, value in enumerate(values):
            folder = tmp_path / "runs" / f"{cell}-s{seed}"
            if not math.isfinite(value):
                (folder / "metrics.json").unlink()
                (folder / "versions.json").write_text('{"diverged": {"step": 7}}' if value == math.inf else "{}")
    page = write_page(study, runs, tmp_path / "page", "x").read_text()
    assert f"\nNot measured:\n\n- All is more. ({reason})\n" in page
