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
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.checkpoint.io import load, save
from maskvlm.cli import main as main_module
from maskvlm.cli.main import main, stopped_early
from maskvlm.data.sampler import FlatBatchSampler, FlatOrder
from maskvlm.training import checkpointing
from maskvlm.training.csv_log import Writer, rows_in
from maskvlm.training.failure import process_rank
from maskvlm.training.lit import LitModel
from maskvlm.training.resume import differences, newest_of
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Finished, Stopped, requeue
from maskvlm.utils.signals import SIGNALS, Caught

ROOT = Path(__file__).resolve().parents[2]


def kills(*options: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as a process of its own: it forks, which a process that has computed gradients cannot."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / "kills.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(("workers", "times"), [("0", 5), ("2", 3)])
def test_killed_and_killed_again_nothing_is_lost(workers: str, times: int, tmp_path: Path) -> None:
    """Fails, for example, with `--break position` or `--break random` (tried: every run differs from its first resumed
    step on)."""
    done = kills("--kills", str(times), "--workers", workers, "--folder", str(tmp_path), "--seed", workers)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = yaml.safe_load(done.stdout.partition("\n0 wrong")[0])["counts"]
    assert counts.get("SIGKILL", 0) + counts.get("SIGTERM", 0) == times
    assert counts["runs"] >= 1


def test_two_processes_end_together_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM to both, to both with a gap, to one: 75 from both. Fails where `KeepState.setup` leaves Lightning's
    handlers in place (they hang), or where the wish is not agreed upon."""
    done = kills("--pairs", "4", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exits [75, 75]': 1") == 4


# ------------------------------------------------------------------ the order of samples


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 30), st.data())
def test_a_run_that_goes_on_takes_the_very_next_samples(size: int, batch: int, steps: int, data: st.DataObject) -> None:
    """Fails where the sampler starts its order anew, or at the beginning of the epoch."""
    start = data.draw(st.integers(0, steps))
    whole = list(FlatBatchSampler(FlatOrder(size, 7), batch, steps))
    rest = FlatBatchSampler(FlatOrder(size, 7), batch, steps, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == steps  # Lightning counts from the run's beginning


# ------------------------------------------------------------------ the folder


def folder_with(tmp_path: Path, **facts: Any) -> Path:
    tmp_path.joinpath("config-fit.yaml").write_text("data: {steps: 4, init_args: {workers: 0}}\nrun: a\n")
    tmp_path.joinpath("versions.json").write_text(json.dumps(facts))
    return tmp_path


SAME = "data: {steps: 4, init_args: {workers: 3}}\nrun: elsewhere\n"


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


def test_a_start_that_failed_does_not_hold_its_folder(tmp_path: Path) -> None:
    """As one with a batch that the processes cannot share: the corrected command has other settings."""
    folder, other = folder_with(tmp_path), SAME.replace("4", "5")
    assert newest_of(folder, other, print) is None
    assert newest_of(folder, SAME, print) is None
    # Figures of a step are a run's, whether it came to a checkpoint or not.
    (folder / "metrics.csv").write_text("step,train/loss\n9,3.2\n")
    with pytest.raises(UserError, match="already holds a run with other settings"):
        newest_of(folder, other, print)
    (folder / "metrics.csv").unlink()
    save({"state_dict": {}}, folder / "best.ckpt")
    with pytest.raises(UserError, match="already holds a run with other settings"):
        newest_of(folder, other, print)


def test_checkpoints_without_a_record_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"no config-fit\.yaml"):
        newest_of(tmp_path, SAME, print)


def test_what_a_run_runs_on_may_change() -> None:
    was: dict[str, Any] = {"trainer": {"devices": 1, "strategy": {"a": 1}, "precision": None}}
    now: dict[str, Any] = {"trainer": {"devices": 8, "strategy": "ddp", "precision": None}}
    was["data"], now["data"] = ({"init_args": {"workers": workers, "b": [1]}} for workers in (0, 9))
    assert differences(was, now) == []
    for where, background in ((was, True), (now, False)):  # where memory is short
        keep = {"class_path": "maskvlm.training.checkpointing.KeepState", "init_args": {"background": background}}
        where["trainer"]["callbacks"] = [keep]
    assert differences(was, now) == []
    was["model"], now["model"] = {"compile": False}, {"compile": True}
    assert differences(was, now) == []
    now["trainer"]["precision"] = "16-mixed"
    now["data"]["init_args"]["b"] = [1, 2]
    assert differences(was, now) == ["trainer.precision was None, is 16-mixed", "data.b[1] was None, is 2"]


def test_an_option_that_is_new_and_a_list_hinders_no_older_run() -> None:
    """Left at its default; of a list each entry is a key."""
    path = f"{LitModel.__module__}.LitModel"  # imported, as a command's classes are
    assert differences({"model": {"lr": 1.0}}, {"model": {"lr": 1.0, "betas": [0.9, 0.999]}}) == []
    other = {"model": {"lr": 1.0, "betas": [0.9, 0.5]}}
    assert differences({"model": {"lr": 1.0}}, other) == ["model.betas[1] was None, is 0.5"]
    longer = {"model": {"betas": [0.9, 0.999]}}
    assert differences({"model": {"betas": [0.9]}}, longer) == ["model.betas[1] was None, is 0.999"]
    was = {"data": {"class_path": path, "init_args": {"lr": 1.0}}}
    now = {"data": {"class_path": path, "init_args": {"lr": 1.0, "betas": [0.9, 0.999]}}}
    assert differences(was, now) == []


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    """Fails where the old file is replaced, or where its `.sha256` does not follow it."""
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in range(3):
        save({"state_dict": {}, "global_step": step}, last, previous)
    assert (load(last)["global_step"], load(previous)["global_step"]) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt", "last.ckpt.sha256", "previous.ckpt", "previous.ckpt.sha256",
    ]  # fmt: skip


# ------------------------------------------------------------------ the log


def test_the_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    first = Writer(str(tmp_path))
    for step in range(4):
        first.log_metrics({"train/loss": step / 2}, step)
        first.save()
    first.log_metrics({"train/loss": 1.5}, 3)  # once is enough
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


def test_what_a_callback_logs_beside_a_loss_is_not_of_an_evaluation(tmp_path: Path) -> None:
    """Its step is not made again, so the row would be lost."""
    log = Writer(str(tmp_path))
    log.log_metrics({"train/loss": 1.0, "temperature": 0.5}, 3)
    log.log_metrics({"score": 5.0}, 3)
    log.save()
    log.forget(3, unmeasured=True, ended=False)
    assert [set(row) - {"step"} for row in log.rows] == [{"train/loss", "temperature"}]


def test_the_evaluation_of_an_end_stays_and_the_step_after_it_is_logged_anew(tmp_path: Path) -> None:
    """Both stand under the step that comes next: of a run that ended after two steps, and then died in its third."""
    log = Writer(str(tmp_path))
    for row, step in (({"train/loss": 1.0}, 1), ({"score": 5.0}, 2), ({"train/loss": 2.0}, 2), ({"score": 6.0}, 3)):
        log.log_metrics(row, step)
    log.forget(1, unmeasured=False, ended=True)
    assert log.rows == []  # nothing is written yet
    log.save()
    log.forget(1, unmeasured=False, ended=True)
    assert [(int(row["step"]), set(row) - {"step"}) for row in log.rows] == [(1, {"train/loss"}), (2, {"score"})]
    log.forget(1, unmeasured=False, ended=False)
    assert [int(row["step"]) for row in log.rows] == [1]


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


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_none(content: bytes) -> None:
    assert isinstance(rows_in(content), list)


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
    assert "stopping: saving the run first; Ctrl-C again ends it now" in capfd.readouterr().err
    caught.restore()
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert caught.count == 0  # what was asked of one training is not asked of the next in this process


def test_a_signal_that_comes_late_does_not_change_how_a_stopped_process_ends(small: list[str], tmp_path: Path) -> None:
    """As when SIGTERM reaches two processes one after the other: the first has stopped both. Fails (-15) where the
    handlers from before the training are back while the command still ends, or while Python does."""
    code = (
        "import os, signal, sys\n"
        "from maskvlm.cli import main\n"
        "from maskvlm.training.lit import LitModel\n"
        "step, stopped = LitModel.training_step, main.stopped_early\n"
        "term = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "LitModel.training_step = lambda *of: (term(), step(*of))[1]\n"
        "main.stopped_early = lambda how: (term(), stopped(how))[1]\n"
        "status = main.main()\n"
        "term()\n"
        "sys.exit(status)\n"
    )
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-c", code, "fit", "--run", str(tmp_path / "run"), *small]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert "SIGTERM: stopped after step 1; " in done.stderr


def test_how_a_stopped_run_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped_early(Stopped("stopped", signal.SIGTERM)) == ExitCode.REQUEUE == 75
    assert stopped_early(Stopped("stopped", signal.SIGINT)) == 130
    assert capsys.readouterr().err == "stopped\nstopped\n"


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


@pytest.fixture(scope="module")
def small(stack: Callable[..., list[str]]) -> list[str]:
    settings = {
        "data.steps": 6, "data.batch_size": 8, "data.source.train": 60, "data.source.val": 6,
        "model.task.rerank_k": 4, "trainer.val_check_interval": 3, "trainer.log_every_n_steps": 1,
    }  # fmt: skip
    return [*stack(WHERE="cpu"), *(f"--{key}={value}" for key, value in settings.items())]


def test_usr1_under_slurm_saves_queues_and_goes_on(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: the signal comes during step 2; the second command ends the run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # alone, it is not yet Lightning's SLURM
    monkeypatch.setattr("maskvlm.cli.main.requeue", lambda: "job 17 is queued again")
    from maskvlm.training.lit import LitModel

    step = LitModel.training_step

    def struck(self: LitModel, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and not self.trainer.ckpt_path:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitModel, "training_step", struck)
    command = ["fit", "--run", str(tmp_path / "run"), *small]
    assert main(command) == 75
    stderr = capsys.readouterr().err
    assert f"SIGUSR1: stopped after step 2; {tmp_path / 'run' / 'last.ckpt'} holds it" in stderr
    assert stderr.rstrip().endswith("job 17 is queued again")
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == 2
    assert main(command) == 0
    assert f"resuming after step 2 ({tmp_path / 'run' / 'last.ckpt'})" in capsys.readouterr().out
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert facts["finished"]["step"] == 6
    assert len(facts["earlier"]) == 1
    rows = rows_in((tmp_path / "run" / "metrics.csv").read_bytes())
    assert [row["step"] for row in rows if "train/loss" in row] == [str(step) for step in range(6)]


def test_an_evaluation_that_was_cut_off_is_made_again(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes within the first evaluation. Fails where `KeepState._measure` does nothing: Lightning passes
    over what was due when the checkpoint was written."""
    monkeypatch.chdir(ROOT)
    from maskvlm.training.lit import LitModel

    step = LitModel.validation_step

    def struck(self: LitModel, batch: Any, batch_idx: int) -> None:
        if not self.trainer.ckpt_path and self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, batch, batch_idx)

    monkeypatch.setattr(LitModel, "validation_step", struck)
    command = ["fit", "--run", str(tmp_path / "run"), *small]
    before = signal.getsignal(signal.SIGTERM)
    assert main(command) == 75
    assert signal.getsignal(signal.SIGTERM) is before  # this process goes on
    content = load(tmp_path / "run" / "last.ckpt")
    assert content["global_step"] == 3
    assert not (tmp_path / "run" / "best.ckpt").exists()
    assert main(command) == 0
    rows = rows_in((tmp_path / "run" / "metrics.csv").read_bytes())
    assert [row["step"] for row in rows if "score" in row] == ["2", "5", "6"]
    assert [row["step"] for row in rows if "train/loss" in row] == [str(step) for step in range(6)]


@pytest.mark.parametrize("steps", [5, 6])
def test_a_training_that_diverges_keeps_its_last_whole_checkpoint(
    steps: int, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stock loop ends well, with weights that are all NaN, and such a checkpoint. In the fifth step, after which
    the run ends, or is measured, all weights are lost (no step does that any more: see tests/faults/test_guard.py);
    fails where the last checkpoint, or those along the way, are not looked at."""
    monkeypatch.chdir(ROOT)
    from maskvlm.training.lit import LitModel

    step = LitModel.optimizer_step

    def lost(self: LitModel, epoch: int, batch_idx: int, *rest: Any) -> None:
        step(self, epoch, batch_idx, *rest)
        if batch_idx == 4:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.fill_(float("nan"))

    monkeypatch.setattr(LitModel, "optimizer_step", lost)
    assert main(["fit", "--run", str(tmp_path / "run"), *small, f"--data.steps={steps}"]) == ExitCode.USAGE
    assert "the training has diverged: " in capsys.readouterr().err
    content = load(tmp_path / "run" / "last.ckpt")
    assert content["global_step"] == 3
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_weights_that_all_processes_hold_are_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a run has ended they lie on the processor, where NCCL exchanges nothing. Parts of sharded ones are."""
    module, exchanges = torch.nn.Linear(2, 2), list[int]()
    trainer: Any = SimpleNamespace(lightning_module=module, global_step=3)
    monkeypatch.setattr(checkpointing, "shared_count", lambda count_N: exchanges.append(len(count_N)) or count_N)
    checkpointing.check_finite(trainer, Path("run"))
    assert exchanges == []
    monkeypatch.setattr(checkpointing, "is_sharded", lambda value: value.ndim == 2)
    checkpointing.check_finite(trainer, Path("run"))
    assert exchanges == [2]
    module.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="1 of 2 tensors are not finite at step 3"):
        checkpointing.check_finite(trainer, Path("run"))


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, 5),  # torchrun within a job
        ({"LOCAL_RANK": "3", "SLURM_PROCID": "0"}, 3),  # Lightning's own, in an interactive shell of SLURM
        ({"SLURM_PROCID": "4"}, 4),
    ],
)
def test_the_number_of_a_process_before_it_meets_others(
    variables: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == number


@pytest.mark.parametrize(
    ("variables", "waits"),
    [
        ({"LOCAL_RANK": "1"}, True),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, True),  # Lightning's own, in an interactive shell of SLURM
        ({"SLURM_PROCID": "1"}, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_a_process_that_lightning_started_leaves_after_the_first(
    variables: dict[str, str], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    waited = list[bool]()
    monkeypatch.setattr(main_module, "leave_after_parent", lambda: waited.append(True))
    assert stopped_early(Stopped("x", signal.SIGTERM)) == ExitCode.REQUEUE
    assert waited == [True] * waits


def test_other_data_or_batches_are_refused() -> None:
    from maskvlm.data.module import PairData

    data: Any = SimpleNamespace(share=8, trainer=None, splits={"train": SimpleNamespace(fingerprint="abc")})
    with pytest.raises(UserError, match="a pass has 8 pairs, but in the checkpoint 6"):
        PairData.load_state_dict(data, {"share": 6, "batches": 1, "data": "abc", "rows": {}})
    with pytest.raises(UserError, match=r"the training data \(abc\) are not those that the .* trained on \(xyz\)"):
        PairData.load_state_dict(data, {"share": 8, "batches": 1, "data": "xyz", "rows": {}})
