"""Records in a run's folder that inform: damaged, they stop nothing; the one that decides is one line.

And what an older version recorded stays the same run.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from guards import Build
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.training.csv_log import Writer, rows_in
from maskvlm.training.resume import differences, finished, recorded
from maskvlm.training.run_record import earlier, finish_run
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import read_json

DAMAGED = [b"", b"\xff{[", b"[]", b"null", b"[" * 5000, b'{"finished": 3}', b'{"finished": {"step": 1e999}}']


@pytest.mark.guard("maskvlm.utils.whole_files:read_json", gives="json.loads(args[0].read_text())")
@pytest.mark.parametrize("content", DAMAGED[:5])
def test_a_damaged_record_stops_neither_beginning_nor_end(build: Build, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "versions.json").write_bytes(content)
    assert finished(tmp_path) is None
    assert earlier(tmp_path) == {}
    finish_run(tmp_path, 7, 9)
    assert finished(tmp_path) == 7
    assert isinstance(read_json(tmp_path / "versions.json")["finished"]["step"], int)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_no_end(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "versions.json").write_bytes(content)
    assert finished(tmp_path) is None


def test_parts_before_that_are_no_list_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "versions.json").write_text('{"processes": 1, "earlier": "x", "seed": 3}')
    assert earlier(tmp_path) == {"earlier": [{"processes": 1}]}


@pytest.mark.guard("maskvlm.training.resume:recorded", gives="{}")
def test_settings_that_unfold_without_end_are_one_line(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "config-fit.yaml"
    path.write_text(
        "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 4)).replace("*b0", "*a")
    )
    assert recorded(path)["b3"]
    path.write_text("a: &a {b: *a}\n")
    with pytest.raises(UserError) as caught:
        recorded(path)
    assert caught.value.code == ExitCode.BAD_DATA


@given(st.binary(max_size=300))
def test_any_bytes_are_settings_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "config-fit.yaml"
    path.write_bytes(content)
    code = None
    try:
        assert isinstance(recorded(path), dict)
    except UserError as error:
        code = error.code
    assert code in (None, ExitCode.BAD_DATA)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_that_goes_on(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("log", numbered=True)
    (folder / "metrics.csv").write_bytes(b"step,train/loss\n" + content)
    log = Writer(str(folder))
    log.forget(3, unmeasured=True, ended=False)
    log.log_metrics({"train/loss": 1.5}, 3)
    log.save()
    row = rows_in((folder / "metrics.csv").read_bytes())[-1]
    assert (row["step"], row["train/loss"]) == ("3", "1.5")


# ------------------------------------------------------------------ what an older version recorded


def settings(*callbacks: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": list(callbacks), **facts}}


STUCK = "maskvlm.reporting.progress.StuckLoss"


def test_the_guard_of_steps_may_be_added_and_changed() -> None:
    """Runs of 89274c0 have none; who was stopped by it may go on with another number."""
    other = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "step"}}
    guard = {"class_path": "maskvlm.training.step_guard.StepGuard", "init_args": {"stop_after": 10}}
    more = {"class_path": "maskvlm.training.step_guard.StepGuard", "init_args": {"stop_after": 20}}
    assert differences(settings(other), settings(guard, other)) == []
    assert differences(settings(guard, other), settings(other, more)) == []
    assert differences(settings(other), settings(other, {**other, "class_path": STUCK}))


def test_an_option_that_did_not_exist_may_have_its_default() -> None:
    was = {"class_path": STUCK, "init_args": {"share": 0.98, "patience": 0.25}}
    same = {"class_path": STUCK, "init_args": {"share": 0.98, "patience": 0.25, "warmup": None}}
    changed = {"class_path": STUCK, "init_args": {"share": 0.98, "patience": 0.25, "warmup": 5}}
    assert differences(settings(was), settings(same)) == []
    assert differences(settings(was), settings(changed)) == ["trainer.callbacks[StuckLoss].warmup was None, is 5"]
    assert differences(settings(same), settings(was)) == []  # None was, None is


def test_a_run_of_the_commit_before_goes_on_under_the_present_stack(root: Path) -> None:
    """Its callbacks and loggers, as conf/base.yaml listed them, with every default."""
    now = yaml.safe_load((root / "conf" / "base.yaml").read_text())
    was = yaml.safe_load((root / "conf" / "base.yaml").read_text())
    was["trainer"]["callbacks"] = [
        each for each in was["trainer"]["callbacks"] if each["class_path"] != "maskvlm.training.step_guard.StepGuard"
    ]
    assert len(was["trainer"]["callbacks"]) == len(now["trainer"]["callbacks"]) - 1
    assert differences(was, now) == []
