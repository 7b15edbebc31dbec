r"""Kills a small training run at random moments, restarts the same command until it is finished, and compares it with a
run that was never killed: the loss of every step, weights, optimiser and the log table must be equal bit for bit.

    python bench/kills.py --kills 500                                      # half SIGKILL, half SIGTERM
    python bench/kills.py --kills 500 --workers 2 --folder /dev/shm/kills  # another file system than TMPDIR
    python bench/kills.py --pairs 40                                       # two processes: SIGTERM to both, to one
    python bench/kills.py --writes 100                                     # SIGKILL in the middle of background writes

To see it fail, break the program first, for example by

    --break position   the position in the data is not restored
    --break random     random numbers continue from the state of the process, instead of from (seed, batch)
    --break evaluation an evaluation that is due when a checkpoint is written is not made up for
    --break snapshot   with --writes: the state itself is written, not a copy of it

(Kills cannot show that no file is torn when the power fails: see tests/checkpoint/test_checkpoint.py.)
Two in five of the SIGKILLs come while a checkpoint is being written.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from rich.progress import track

from maskvlm.checkpoint.background import SNAPSHOTS, Snapshot
from maskvlm.checkpoint.integrity import newest_valid
from maskvlm.checkpoint.io import load
from maskvlm.cli.main import main
from maskvlm.data.module import PairData
from maskvlm.training.checkpoint_io import SafeCheckpointIO

ROOT = Path(__file__).resolve().parents[1]
LATER = (
    "maskvlm.cli.lightning", "maskvlm.data.scenes.source", "maskvlm.reporting.callbacks", "maskvlm.reporting.progress",
    "maskvlm.training.step_guard", "torch.utils.tensorboard",
)  # fmt: skip
"""Modules that a run imports later. Importing them here saves each fork a second."""
for name in LATER:
    import_module(name)
STEPS, EVERY, MEASURED = 40, 4, 16
STACK = ("base", "model/tiny", "pretrain", "pretrain-tiny", "data/scenes", "where/cpu")
SMALL: dict[str, Any] = {
    "data.steps": STEPS,
    "data.batch_size": 8,
    "data.augment": True,
    "data.source.train": 60,  # an epoch is 7.5 batches: ends of epochs fall within batches and between them
    "data.source.val": 6,
    "data.source.test": 6,
    "model.task.rerank_k": 4,
    "model.task.weight_words": 0,
    "model.task.negative_queue": 12,
    "model.task.decoder_layers": 1,
    "model.backbone.cross_layers": 1,
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
    "trainer.val_check_interval": MEASURED,
    "trainer.log_every_n_steps": 1,
}
RUN_SETTINGS = """
trainer:
  logger: [{class_path: maskvlm.training.csv_log.RunLog, init_args: {save_dir: "{run}", name: "", version: ""}}]
  callbacks:
  - {class_path: maskvlm.training.run_record.RunRecord}
  - {class_path: maskvlm.training.step_guard.StepGuard}
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: "{run}", filename: best, enable_version_counter: false, monitor: score, mode: max}
  - {class_path: maskvlm.training.checkpointing.KeepState, init_args: {folder: "{run}", steps: STEPS, minutes: 10}}
"""


class Result(NamedTuple):
    """The parts of a finished run that must not depend on kills."""

    log: list[dict[str, str]]
    state: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]


# ------------------------------------------------------------------ runs


def command(folder: Path, workers: int, more: tuple[str, ...] = ()) -> list[str]:
    """The arguments of the small training run."""
    # Written once; the command fills in `{run}`.
    run_yaml = folder.parent / "kept.yaml"
    if not run_yaml.exists():
        run_yaml.write_text(RUN_SETTINGS.replace("STEPS", str(EVERY)))
    stack = [word for name in STACK for word in ("-c", str(ROOT / "conf" / f"{name}.yaml"))]
    settings = [f"--{key}={value}" for key, value in SMALL.items()]
    return ["fit", "--run", str(folder), *stack, "-c", str(run_yaml), *settings, f"--data.workers={workers}", *more]


def fork(arguments: list[str], broken: str = "", env: dict[str, str] | None = None, log: Path | None = None) -> int:
    """Run the command in a fork of this process, which has everything imported; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout.flush()
        # The child's own output goes to its log; the parent keeps its terminal.
        out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(env or {})
        # Threads do not survive a fork; with a single thread none is started.
        torch.set_num_threads(1)
        with breaking(broken):
            code = main(arguments)
    except BaseException as error:
        print(repr(error))
        code = 99
    # Not sys.exit: the parent's exit handlers must not run here.
    os._exit(code)


def breaking(how: str) -> Any:
    """Context in which one requirement of exact resumption is broken."""
    if how == "position":
        return mock.patch.object(PairData, "load_state_dict")
    if how == "random":
        return mock.patch("maskvlm.training.lit.mix", side_effect=lambda *values: time.time_ns() % 2**60)
    if how == "evaluation":
        return mock.patch("maskvlm.training.checkpointing.evaluate_now")
    if how == "snapshot":
        return mock.patch.object(Snapshot, "take", lambda self, content: dict(content))
    return mock.patch.dict(os.environ, {})


def wait(child: int, seconds: float = 300.0) -> int:
    """Wait for a child; returns its exit status, negative for a signal. Raises TimeoutError."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} did not end within {seconds:.0f} s")


def result(folder: Path) -> Result:
    """Result of a finished run. Raises AssertionError if its checkpoint is of another step."""
    with (folder / "metrics.csv").open(newline="") as file:
        log = [{k: v for k, v in row.items() if v and k not in VOLATILE} for row in csv.DictReader(file)]
    content = load(folder / "last.ckpt")
    assert content["global_step"] == STEPS, content["global_step"]
    moments = {f"{n}.{k}": v for n, each in content["optimizer_states"][0]["state"].items() for k, v in each.items()}
    # Rows with only volatile values are left out.
    return Result([row for row in log if row.keys() - {"step", "epoch"}], content["state_dict"], moments)


# These depend on the clock.
VOLATILE = ("train/pairs_per_second", "train/data_wait")


def differences(one: Result, other: Result) -> list[str]:
    """Everything that is not equal bit for bit."""
    lines = []
    if one.log != other.log:
        unlike = [(a, b) for a, b in zip(one.log, other.log, strict=False) if a != b]
        keys = [key for key in unlike[0][0] if unlike[0][0][key] != unlike[0][1].get(key)] if unlike else []
        where = f"at step {unlike[0][0]['step']} in {', '.join(keys[:3])}" if unlike else "in number"
        lines.append(f"log: {len(one.log)} and {len(other.log)} rows, first difference {where}")
    for name in ("state", "optimiser"):
        was, now = getattr(one, name), getattr(other, name)
        unequal = [key for key in was if key not in now or not torch.equal(was[key], now[key])]
        if unequal or was.keys() != now.keys():
            first = unequal[0] if unequal else "one that was not there"
            lines.append(f"{name}: {len(unequal)} of {len(was)} tensors differ, first {first}")
    return lines


# ------------------------------------------------------------------ one process, killed again and again


def kill_runs(folder: Path, kills: int, workers: int, broken: str, seed: int) -> dict[str, Any]:
    """Run trainings until `kills` kills have been survived.

    Returns:
        counts of kills by kind and of runs, and the runs that differ from the one never killed, with the differences.
    """
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    # The run that is never killed comes first: its duration determines when to strike.
    status = wait(fork(command(folder / "whole", workers)))
    assert status == 0, f"the run without kills ended with {status}"
    duration, whole = time.monotonic() - began, result(folder / "whole")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in track(range(10**6), description=f"killing ({workers} workers)", disable=not sys.stdout.isatty()):
        run, survived = folder / f"run{number}", 0
        # Restarted until it is finished, however often it is killed.
        while True:
            child = fork(command(run, workers), broken, log=folder / f"run{number}.txt")
            if counts["SIGKILL"] + counts["SIGTERM"] < kills:
                # Equally many of both kinds, in turn.
                kind = signal.SIGKILL if counts["SIGKILL"] <= counts["SIGTERM"] else signal.SIGTERM
                began_writing = strike(child, kind, run, duration, chance)
                if began_writing is not None:
                    survived += 1
                    counts[kind.name] += 1
                    counts["of them, while a checkpoint is written"] += began_writing
            status = wait(child)
            if status == 0:
                break
            counts[f"exit {status}"] += 1
            # 75: stopped by SIGTERM with a checkpoint; anything but that and the signals themselves is wrong.
            if status not in (-signal.SIGKILL, -signal.SIGTERM, 75):
                wrong.append(f"run{number}: ended with {status}: {(folder / f'run{number}.txt').read_text()[-500:]}")
                break
        counts["runs"] += 1
        counts["most kills of one run"] = max(counts["most kills of one run"], survived)
        if status == 0 and (unequal := differences(whole, result(run))):
            wrong.append(f"run{number}: {'; '.join(unequal)}")
        # A correct run is removed; a wrong one is kept for inspection.
        if not wrong or not wrong[-1].startswith(f"run{number}:"):
            shutil.rmtree(run)
        if counts["SIGKILL"] + counts["SIGTERM"] >= kills:
            return {"counts": dict(counts), "wrong": wrong, "seconds": time.monotonic() - began}
    raise AssertionError


def strike(child: int, kind: signal.Signals, run: Path, duration: float, chance: random.Random) -> bool | None:
    """Kill the process at a random moment; in two of five cases when it starts to write a checkpoint.

    Returns:
        Whether it was writing one; None if it had ended before.
    """
    born = time.time()
    until = time.monotonic() + chance.uniform(0.2, 0.75) * duration
    wanted = chance.random() < 0.4
    while time.monotonic() < until or wanted:
        # WNOWAIT leaves the status for a later `wait`.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None
        if wanted and writing(run, born) and chance.random() < 0.5:
            break
        time.sleep(0.0005 if wanted else 0.003)
    in_write = writing(run, born)
    os.kill(child, kind)
    return in_write


def writing(run: Path, since: float) -> bool:
    """Whether a checkpoint is half written now. Older files are ignored, as an earlier process may have left them."""
    try:
        return any(path.stat().st_mtime > since for path in run.glob(".*.ckpt.tmp"))
    except FileNotFoundError:  # just renamed
        return False


# ------------------------------------------------------------------ background writes only


def kill_writes(folder: Path, kills: int, broken: str, seed: int) -> dict[str, Any]:
    """SIGKILL a process that changes its state and saves it in the background, each time while a file is half written.
    What it leaves must be intact, and the state of a single step: that of the last save that had returned, or at most
    two earlier. The next process continues from there."""
    chance, counts = random.Random(seed), Counter[str]()
    wrong: list[str] = []
    run, began = folder / "writes", time.monotonic()
    run.mkdir(parents=True)
    for number in track(range(kills), description="killing writes", disable=not sys.stdout.isatty()):
        log, born = folder / f"saved{number}.txt", time.time()
        child = fork_saver(run, log, broken)
        saves, until = chance.randint(2, 5), time.monotonic() + 60
        while (len(lines_of(log)) < saves or not writing(run, born)) and time.monotonic() < until:
            time.sleep(0.0002)
        # Somewhere in this write or the next one.
        time.sleep(chance.uniform(0.0, 0.03))
        counts["of them, while a file is half written"] += writing(run, born)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts["SIGKILL"] += 1
        damaged: list[str] = []
        saved, steps = int(lines_of(log)[-1]), steps_in(run, damaged)
        behind = saved - max(steps, default=-1)
        counts[f"steps behind: {behind}"] += 1
        if damaged or len(steps) != 1 or behind > SNAPSHOTS:
            wrong.append(f"kill {number}: step {saved} was saved, the file holds {sorted(steps)} {damaged}")
    return {"counts": dict(counts), "wrong": wrong, "seconds": round(time.monotonic() - began)}


def fork_saver(run: Path, log: Path, broken: str) -> int:
    """Start a process that continues from the newest intact checkpoint and logs each step whose save has returned."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        step = max(steps_in(run, []), default=0)
        state = {str(part): torch.full((100_000,), step) for part in range(8)}
        io = SafeCheckpointIO()
        io.begin()
        with breaking(broken), log.open("w", buffering=1) as file:
            while True:
                step += 1
                for tensor in state.values():
                    tensor.fill_(step)
                io.save_checkpoint({"state_dict": state}, run / "last.ckpt", run / "previous.ckpt")
                file.write(f"{step}\n")
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    os._exit(1)


def lines_of(log: Path) -> list[str]:
    """The complete lines of a log."""
    text = log.read_text() if log.exists() else ""
    return text[: text.rfind("\n") + 1].split()


def steps_in(run: Path, damaged: list[str]) -> set[int]:
    """The steps of the tensors in the newest intact checkpoint; empty if there is none. damaged: collects messages on
    newer ones that are not intact."""
    newest = newest_valid(run, damaged.append)
    tensors = [] if newest is None else load(newest)["state_dict"].values()
    return {step for tensor in tensors for step in tensor.unique().tolist()}


# ------------------------------------------------------------------ two processes


def term_pairs(folder: Path, trials: int, seed: int) -> dict[str, Any]:
    """Two processes, with SIGTERM to both, to both with a gap, to the first, or to the second: both must exit with 75
    and leave a checkpoint."""
    chance, counts = random.Random(seed), Counter[str]()
    wrong: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    slowest = 0.0
    for number in range(trials):
        whom = ("both", "gap", "first", "second")[number % 4]
        run, port = folder / f"pair{number}", free_port()
        more = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.steps=9999", "--trainer.val_check_interval=24")
        logs = [folder / f"pair{number}-{rank}.txt" for rank in (0, 1)]
        children = [fork(command(run, 0, more), env=elastic(rank, port), log=logs[rank]) for rank in (0, 1)]
        # The first checkpoint shows that both are training; one written after the signal is checked below.
        until = time.monotonic() + 120
        while not (run / "last.ckpt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        (run / "last.ckpt").unlink(missing_ok=True)
        time.sleep(chance.uniform(0.0, 1.5))
        began = time.monotonic()
        for child in {"first": children[:1], "second": children[1:]}.get(whom, children):
            os.kill(child, signal.SIGTERM)
            time.sleep(0.2 if whom == "gap" else 0.0)
        try:
            codes = [wait(child, 60) for child in children]
        except TimeoutError as error:
            codes = [str(error)]  # type: ignore[list-item]
            for child in children:
                _end(child)
        slowest = max(slowest, time.monotonic() - began)
        counts[f"{whom}: exits {codes}"] += 1
        if codes != [75, 75] or not (run / "last.ckpt").exists():
            wrong.append(f"pair{number} ({whom}): exits {codes}, checkpoint {(run / 'last.ckpt').exists()}")
    return {"counts": dict(counts), "wrong": wrong, "slowest end, seconds": round(slowest, 2)}


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def elastic(rank: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets for its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "kills"}
    return {name: str(value) for name, value in names.items()} | more


def free_port() -> int:
    with socket.socket() as probe:
        # While the socket is open the port is reserved; afterwards, another process could briefly take it.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------ command line


def report(summary: dict[str, Any]) -> int:
    print(yaml.safe_dump(summary, sort_keys=False, width=200), end="")
    print(f"{len(summary['wrong'])} wrong")
    return int(bool(summary["wrong"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0, help="trials of two processes")
    parser.add_argument("--writes", type=int, default=0, help="kills in the middle of background writes")
    parser.add_argument("--workers", type=int, default=0, help="data workers")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs lie; by default a temporary folder")
    parser.add_argument("--break", dest="broken", default="", choices=("position", "random", "evaluation", "snapshot"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start(options: argparse.Namespace) -> int:
    """Run the requested jobs; returns the exit status."""
    jobs: list[Callable[[Path], dict[str, Any]]] = []
    if options.kills:
        jobs.append(lambda at: kill_runs(at, options.kills, options.workers, options.broken, options.seed))
    if options.pairs:
        jobs.append(lambda at: term_pairs(at, options.pairs, options.seed))
    if options.writes:
        jobs.append(lambda at: kill_writes(at, options.writes, options.broken, options.seed))
    with tempfile.TemporaryDirectory() as scratch:
        return max(report(job(options.folder or Path(scratch))) for job in jobs)


if __name__ == "__main__":
    sys.exit(start(parse()))
