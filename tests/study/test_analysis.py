"""Statistics of a study against numbers worked out by hand, and the page that says them."""

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
from maskvlm.study.runs import StudyRun

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
    metrics = STUDY["metrics"] | {"R@1": {"mean": ["a"], "lower": True}}
    lower = read_study(written(tmp_path, STUDY | {"metrics": metrics}))
    against = lead(frame_of(lower, runs), Comparison("all", "few"), lower.metrics["R@1"])
    assert against.to_dict() == {0: -2, 1: -2, 2: -2}
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


def test_the_page_says_what_the_runs_say(tmp_path: Path) -> None:
    change = {"title": "A toy", "questions": [*STUDY["questions"], {**MORE, "metric": "R@1"}]}
    study, runs = a_study(
        tmp_path, {"few": [10, 11, 12], "few@flops-of-all": [15, 17, 16], "all": [20, 21, 22.3]}, change
    )
    page = write_page(study, runs, tmp_path / "page", "maskvlm study toy").read_text()
    assert page.startswith("# A toy\n")
    assert "from 9 of 16 runs" in page
    assert "| few losses | 3 |  | 11.0 ± 2.5 |  |" in page
    ahead = "+10.1 points (+9.67 to +10.5, 3 seeds)<br>+5.1 points (+2.24 to +7.96, 3 seeds)"
    against = "few losses<br>few losses, with the operations of all"
    assert f"| 1 | More is better. | {against} | {ahead} | holds<br>holds |" in page
    # What no run tells of is named, without a row, a section or a plot.
    assert "- It grows. (no run yet of: all, 25 % of the images)\n" in page
    assert page.count("It grows.") == 1
    cells = "+5.1 points (+2.24 to +7.96, 3 seeds) | holds | +5, +4, +6.3"
    assert f"| all | few losses, with the operations of all | {cells} |" in page
    assert (tmp_path / "page" / "question-1.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "page" / "question-2.png").exists()


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
    again = write_page(study, here, tmp_path / "again", "x", earlier).parent
    tables = [(folder / "runs.csv").read_text().splitlines() for folder in (again, page)]
    assert {*tables[0]} ^ {*tables[1]} == {table[1] for table in tables if table[1].startswith("few-s0")}
    # Made by another command it is another run.
    others = [run._replace(cell=replace(run.cell, options=(("model.lr", "1"),))) for run in here]
    capsys.readouterr()
    assert earlier_runs(page, others) == {}
    assert "runs.csv: 4 of 4 rows come from other commands" in capsys.readouterr().err
    assert earlier_runs(tmp_path / "none", here) == {}
