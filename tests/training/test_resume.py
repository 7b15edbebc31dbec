"""A run that dies goes on as if it had not: what a checkpoint keeps, what the folder tells, what signals do.

`bench/kills.py` is the long version (500 kills) and says how to break the program so that it fails.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from training.small_runs import logged

from maskvlm.checkpoint.io import load, save
from maskvlm.cli.main import main
from maskvlm.data.module import PairData
from maskvlm.data.sampler import FlatBatchSampler, FlatOrder
from maskvlm.training.csv_log import Writer, rows_in
from maskvlm.training.lit import LitModel
from maskvlm.training.resume import differences, newest_of
from maskvlm.utils.errors import UserError
from maskvlm.utils.launch import Finished, requeue
from maskvlm.utils.signals import SIGNALS, Caught

ROOT = Path(__file__).resolve().parents[2]


def process(*command: object) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`: what forks cannot be in a process that has computed gradients."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_killed_and_killed_again_nothing_is_lost(tmp_path: Path) -> None:
    """Fails, for example, with `--break position` or `--break random` (tried: every run differs from its first resumed
    step on)."""
    done = process("bench/kills.py", "--kills", 3, "--workers", 2, "--folder", tmp_path, "--seed", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = yaml.safe_load(done.stdout.partition("\n0 wrong")[0])["counts"]
    assert counts.get("SIGKILL", 0) + counts.get("SIGTERM", 0) == 3
    assert counts["runs"] >= 1


@pytest.mark.slow
def test_two_processes_end_together_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM to both, to both with a gap, to one: 75 from both. Fails where `KeepState.setup` leaves Lightning's
    handlers in place (they hang), or where the wish is not agreed upon."""
    done = process("bench/kills.py", "--pairs", 3, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exits [75, 75]': 1") == 3


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 30), st.data())
def test_a_run_that_goes_on_takes_the_very_next_samples(size: int, batch: int, steps: int, data: st.DataObject) -> None:
    """Fails where the sampler starts its order anew, or at the beginning of the epoch."""
    start = data.draw(st.integers(0, steps))
    whole = list(FlatBatchSampler(FlatOrder(size, 7), batch, steps))
    rest = FlatBatchSampler(FlatOrder(size, 7), batch, steps, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == steps  # Lightning counts from the run's beginning


def test_other_data_or_batches_are_refused() -> None:
    data: Any = SimpleNamespace(share=8, trainer=None, splits={"train": SimpleNamespace(fingerprint="abc")})
    for share, sha, told in ((6, "abc", "8 pairs, but in the checkpoint 6"), (8, "xyz", "xyz")):
        with pytest.raises(UserError, match=told):
            PairData.load_state_dict(data, {"share": share, "batches": 1, "data": sha, "rows": {}})


# ------------------------------------------------------------------ the folder

SAME = "data: {steps: 4, init_args: {workers: 3}}\nrun: elsewhere\n"


def folder_with(tmp_path: Path, **facts: Any) -> Path:
    tmp_path.joinpath("config-fit.yaml").write_text("data: {steps: 4, init_args: {workers: 0}}\nrun: a\n")
    tmp_path.joinpath("versions.json").write_text(json.dumps(facts))
    return tmp_path


def test_how_a_folder_stands(tmp_path: Path) -> None:
    messages: list[str] = []
    assert newest_of(tmp_path / "none", SAME, messages.append) is None
    folder = folder_with(tmp_path)
    assert newest_of(folder, SAME, messages.append) is None  # it died before its first checkpoint
    save({"state_dict": {}}, folder / "previous.ckpt")
    save({"state_dict": {}}, folder / "last.ckpt")
    assert newest_of(folder, SAME, messages.append) == str(folder / "last.ckpt")
    assert not messages
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:-1])
    assert newest_of(folder, SAME, messages.append) == str(folder / "previous.ckpt")
    assert "last.ckpt: truncated (" in messages[0]
    with pytest.raises(UserError, match=r"already holds a run with other settings \(data.steps was 4, is 5\)"):
        newest_of(folder, SAME.replace("4", "5"), messages.append)
    folder_with(tmp_path, finished={"step": 4})
    with pytest.raises(Finished, match="finished at step 4"):
        newest_of(folder, SAME, messages.append)
    (folder / "config-fit.yaml").unlink()
    with pytest.raises(UserError, match=r"no config-fit\.yaml"):
        newest_of(folder, SAME, messages.append)


def test_what_a_run_runs_on_may_change() -> None:
    keep = "maskvlm.training.checkpointing.KeepState"
    was, now = (
        {
            "trainer": {
                "devices": devices, "strategy": strategy, "precision": None,
                "callbacks": [{"class_path": keep, "init_args": {"background": devices > 1}}],
            },
            "data": {"init_args": {"workers": devices, "b": [1]}}, "model": {"compile": devices > 1},
        }
        for devices, strategy in ((1, {"a": 1}), (8, "ddp"))
    )  # fmt: skip
    changed: Any = now
    assert differences(was, now) == []
    changed["trainer"]["precision"] = "16-mixed"
    changed["data"]["init_args"]["b"] = [1, 2]
    assert differences(was, now) == ["trainer.precision was None, is 16-mixed", "data.b[1] was None, is 2"]


def test_an_option_that_is_new_and_a_list_hinders_no_older_run() -> None:
    """Left at its default; of a list each entry is a key."""
    path = f"{LitModel.__module__}.LitModel"  # imported, as a command's classes are
    before, usual, other = {"lr": 1.0}, {"lr": 1.0, "betas": [0.9, 0.999]}, {"lr": 1.0, "betas": [0.9, 0.5]}
    assert differences({"model": before}, {"model": usual}) == []
    assert differences({"model": before}, {"model": other}) == ["model.betas[1] was None, is 0.5"]
    assert differences({"model": {**before, "betas": [0.9]}}, {"model": usual}) == ["model.betas[1] was None, is 0.999"]
    was, now = ({"data": {"class_path": path, "init_args": args}} for args in (before, usual))
    assert differences(was, now) == []


# ------------------------------------------------------------------ the log


def test_the_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    first = Writer(str(tmp_path))
    for step in range(4):
        first.log_metrics({"train/loss": step / 2, "temperature": 1.0}, step)
        first.save()
    first.log_metrics({"train/loss": 1.5, "temperature": 1.0}, 3)  # once is enough
    first.log_metrics({"lr-rest": 0.5}, 3)
    first.log_metrics({"score": 1.5}, 3)
    first.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.5,")  # killed in the middle of a row
    again = Writer(str(tmp_path))
    again.forget(3, unmeasured=True, ended=False)  # goes on after the fourth step, which is still to be measured
    again.log_metrics({"score": 2.5}, 3)
    again.log_metrics({"train/loss": 2.0}, 4)
    again.save()
    rows = rows_in((tmp_path / "metrics.csv").read_bytes())
    assert sum("lr-rest" in row for row in rows) == 1
    assert [(row["step"], row.get("train/loss"), row.get("score")) for row in rows if "lr-rest" not in row] == [
        ("0", "0.0", None), ("1", "0.5", None), ("2", "1.0", None), ("3", "1.5", None), ("3", None, "2.5"),
        ("4", "2.0", None),
    ]  # fmt: skip


def test_a_new_column_never_leaves_half_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's logger opens the file for writing first. Fails where it is rewritten in place."""
    log = Writer(str(tmp_path))
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    before = (tmp_path / "metrics.csv").read_text()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    log.log_metrics({"b": 1.0}, 1)
    with pytest.raises(KeyboardInterrupt):
        log.save()
    assert (tmp_path / "metrics.csv").read_text() == before


# ------------------------------------------------------------------ signals


def test_a_signal_is_noted_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    caught = Caught()
    caught.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (caught.last, caught.count) == (signal.SIGTERM, 1)
    assert capfd.readouterr().err == ""
    os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C is like any other; the second one is impatient
    assert caught.count == 2
    assert "Ctrl-C again ends it now" in capfd.readouterr().err
    caught.restore()
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert caught.count == 0  # what was asked of one training is not asked of the next in this process
    caught.install()
    caught.restore(ending=True)  # a late SIGTERM must not change how a stopped process ends
    assert signal.signal(signal.SIGTERM, before[signal.SIGTERM]) == signal.SIG_IGN
    assert signal.signal(signal.SIGUSR1, before[signal.SIGUSR1]) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]


def test_slurm_is_asked_to_queue_the_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call_log, tool = tmp_path / "asked", tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {call_log}\n')
    tool.chmod(0o755)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue() is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert requeue() == "job 17 is queued again"
    assert call_log.read_text() == "requeue 17\n"
    tool.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    assert requeue() == "job 17 could not be queued again (no such job)"


@pytest.mark.parametrize(
    ("where", "signum", "step"),
    [("training", "SIGUSR1", 2), pytest.param("validation", "SIGTERM", 3, marks=pytest.mark.slow)],
)
def test_usr1_under_slurm_saves_queues_and_goes_on(
    where: str, signum: str, step: int, words: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The signal comes during step 2, or within the first evaluation, which is then made again: fails where
    `KeepState._measure` does nothing, as Lightning passes over what was due when the checkpoint was written."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # alone, it is not yet Lightning's SLURM
    monkeypatch.setattr("maskvlm.cli.main.requeue", lambda: "job 17 is queued again")
    whole = getattr(LitModel, f"{where}_step")

    def struck(self: LitModel, batch: Any, batch_idx: int) -> Any:
        if not self.trainer.ckpt_path and (self.trainer.global_step == 3 if where == "validation" else batch_idx == 1):
            os.kill(os.getpid(), getattr(signal, signum))
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LitModel, f"{where}_step", struck)
    command, before = words("run", data__steps=4), signal.getsignal(signal.SIGTERM)
    assert main(command) == 75
    assert signal.getsignal(signal.SIGTERM) is before  # this process goes on
    stderr = capsys.readouterr().err
    assert f"{signum}: stopped after step {step}; {tmp_path / 'run' / 'last.ckpt'} holds it" in stderr
    assert stderr.rstrip().endswith("job 17 is queued again") == (signum == "SIGUSR1")
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == step
    assert not (tmp_path / "run" / "best.ckpt").exists()
    assert main(command) == 0
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert (facts["finished"]["step"], len(facts["earlier"])) == (4, 1)
    assert [step for step, _ in logged(tmp_path / "run", "train/loss")] == [0, 1, 2, 3]
    assert [step for step, _ in logged(tmp_path / "run", "score")] == [2, 4]
