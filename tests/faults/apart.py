"""Whole commands that meet faults: each a process forked from this one, which has everything imported.

    python apart.py FOLDER

runs all of SCENARIOS and prints what they found as JSON. In a file of its own: a process that has computed gradients
cannot be forked. Those that mount need root, and run in a mount namespace of this process alone.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from bench.kills import ROOT, SMALL, STACK, elastic, fork, free_port, wait
from maskvlm.checkpoint.io import load
from maskvlm.training.csv_log import rows_in
from maskvlm.training.lit import LitModel
from maskvlm.utils.distributed import rank

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18
LIBC = ctypes.CDLL(None, use_errno=True)
Outcomes = dict[str, Any]


def words(run: Path, steps: int, *more: str) -> list[str]:
    """A small training with everything that conf/base.yaml has, a checkpoint every four steps."""
    callbacks = yaml.safe_load((ROOT / "conf" / "base.yaml").read_text())["trainer"]["callbacks"]
    next(each for each in callbacks if "KeepState" in each["class_path"])["init_args"]["steps"] = 4
    keep = run.parent / "keep.yaml"
    keep.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    stack = [word for name in STACK for word in ("-c", str(ROOT / "conf" / f"{name}.yaml"))]
    settings = {**SMALL, "data.steps": steps, "trainer.limit_val_batches": 0}
    return ["fit", "--run", str(run), *stack, "-c", str(keep), *(f"--{k}={v}" for k, v in settings.items()), *more]


def start(run: Path, steps: int, *more: str, env: dict[str, str] | None = None) -> int:
    """The number of a process that runs it; its output is in RUN.txt."""
    return fork(words(run, steps, *more), env=env, log=log_of(run))


def log_of(run: Path) -> Path:
    return run.parent / f"{run.name}.txt"


def take_messages(run: Path) -> list[str]:
    """The lines of the latest command that are no table."""
    text = log_of(run).read_text()
    log_of(run).unlink()
    return [
        line
        for line in text.splitlines()
        if line.startswith(("error", "warning", "resuming", "SIG", "Traceback", "Exc"))
    ]


def trained(run: Path) -> list[int]:
    """Steps in metrics.csv that have a loss."""
    rows = rows_in((run / "metrics.csv").read_bytes())
    return [int(row["step"]) for row in rows if "train/loss" in row and row.get("step", "").isdigit()]


def after(run: Path, step: int, do: Callable[[], object]) -> None:
    """Do it once the training has logged this step."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (run / "metrics.csv").is_file() and max(trained(run), default=-1) >= step:
            do()
            return
        time.sleep(0.01)
    raise TimeoutError(f"{run}: {log_of(run).read_text()}")


def mount(source: str, target: Path, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    arguments = [part.encode() if part else None for part in (source, str(target), kind)]
    if LIBC.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data else None):
        raise OSError(ctypes.get_errno(), "mount")


def read_only(folder: Path) -> None:
    """From now on the folder's path leads to a read-only view of it."""
    mount(str(folder), folder, flags=MS_BIND)
    mount(str(folder), folder, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


# ------------------------------------------------------------------ two at once


def two(at: Path) -> Outcomes:
    """The second as soon as the first holds the folder."""
    first = start(at / "run", 60)
    until = time.monotonic() + 60
    while not (at / "run" / "run.lock").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    second = fork(words(at / "run", 60), log=at / "second.txt")
    codes = [wait(first), wait(second)]
    return {"codes": codes, "said": (at / "second.txt").read_text(), "first": first, "steps": trained(at / "run")}


def killed(at: Path) -> Outcomes:
    """SIGKILL while it has two data workers; a copy of the folder, taken while it runs, and the folder itself go on."""
    run, copy = at / "run", at / "copy"
    child = start(run, 400, "--data.workers=2")
    after(run, 8, lambda: shutil.copytree(run, copy))
    of_copy = start(copy, 400, "--data.workers=0")
    after(copy, 14, lambda: os.kill(of_copy, signal.SIGTERM))
    alive, codes = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, [wait(of_copy)]
    os.kill(child, signal.SIGKILL)
    wait(child)
    again = start(run, 400, "--data.workers=0")
    before = max(trained(run))
    after(run, before + 4, lambda: os.kill(again, signal.SIGTERM))
    return {"codes": [*codes, wait(again)], "alive": alive}


# ------------------------------------------------------------------ steps that go wrong


def poisoned(factor: float, where: int, of_rank: int = 0) -> Any:
    """One step's loss is multiplied, in one process."""
    step = LitModel.training_step

    def bad(self: LitModel, batch: Any, batch_idx: int) -> Any:
        return step(self, batch, batch_idx) * (factor if batch_idx == where and rank() == of_rank else 1.0)

    return mock.patch.object(LitModel, "training_step", bad)


def one_bad_batch(at: Path) -> Outcomes:
    with poisoned(float("nan"), 9):
        code = wait(start(at / "run", 12))
    messages = take_messages(at / "run")
    state = load(at / "run" / "last.ckpt")["state_dict"]
    listed = json.loads((at / "run" / "bad_samples.json").read_text())["skipped_steps"]
    return {
        "code": code,
        "said": messages,
        "finite": all(bool(v.isfinite().all()) for v in state.values()),
        "listed": listed,
    }


def in_one_process_of_two(at: Path) -> Outcomes:
    """The loss of the second process alone is not a number, in another run it shoots up."""
    outcomes = {}
    for name, factor in (("nan", float("nan")), ("spike", 1e9)):
        port, run = free_port(), at / name
        more = ("--trainer.devices=2", "--trainer.strategy=ddp")
        with poisoned(factor, 9, of_rank=1):
            children = [start(run, 12, *more, env=elastic(number, port)) for number in (0, 1)]
        codes = [wait(child) for child in children]
        listed = json.loads((run / "bad_samples.json").read_text())["skipped_steps"]
        state = load(run / "last.ckpt")["state_dict"]
        outcomes[name] = {
            "codes": codes,
            "listed": listed,
            "finite": all(bool(v.isfinite().all()) for v in state.values()),
        }
    return outcomes


def dying(spared: str) -> Any:
    """A training step that dies at the eleventh, unless the run goes on from that file."""
    step = LitModel.training_step

    def dies(self: LitModel, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 10 and not str(self.trainer.ckpt_path).endswith(spared):
            raise RuntimeError("dies")
        return step(self, batch, batch_idx)

    return dies


def crashing(at: Path) -> Outcomes:
    """A step that always dies, the same command five times; then one that dies unless the run goes on from
    previous.ckpt."""
    outcomes: Outcomes = {}
    for name in ("always", "from_last"):
        codes, messages = [], []
        with mock.patch.object(
            LitModel, "training_step", dying(spared="none" if name == "always" else "previous.ckpt")
        ):
            while len(codes) < 5 and 0 not in codes:
                codes.append(wait(start(at / name, 12)))
                messages.append(take_messages(at / name))
        outcomes[name] = {"codes": codes, "said": messages}
    outcomes["from_last"]["steps"] = trained(at / "from_last")
    return outcomes


# ------------------------------------------------------------------ signals


def slow(where: int) -> Any:
    """One step takes a second."""
    step = LitModel.training_step

    def late(self: LitModel, batch: Any, batch_idx: int) -> Any:
        time.sleep(1.0 if batch_idx == where else 0.0)
        return step(self, batch, batch_idx)

    return mock.patch.object(LitModel, "training_step", late)


def signals(at: Path) -> Outcomes:
    """SIGTERM twice, 50 ms apart; SIGTERM until it dies of it."""
    run = at / "run"

    def strike(child: int, times: int) -> None:
        for _ in range(times):
            os.kill(child, signal.SIGTERM)
            time.sleep(0.05)  # sooner, the system would make one of them

    child = start(run, 400)
    after(run, 10, lambda: strike(child, 2))
    code, step = wait(child), load(run / "last.ckpt")["global_step"]
    with slow(step + 6):
        again = start(run, 400)
    after(run, step + 5, lambda: strike(again, 3))
    return {"codes": [code, wait(again)], "step": step, "then": load(run / "last.ckpt")["global_step"]}


# ------------------------------------------------------------------ files


def damaged(at: Path) -> Outcomes:
    """A run that was stopped, and whose records were damaged."""
    run, outcomes = at / "run", {}
    child = start(run, 40)
    after(run, 10, lambda: os.kill(child, signal.SIGTERM))
    outcomes["stopped"] = wait(child)
    take_messages(run)
    record = (run / "config-fit.yaml").read_bytes()
    outcomes["config"] = []
    for content in (b"\xff\x00: [", b"- 1\n", record + b"a: &a [*a]\n"):
        (run / "config-fit.yaml").write_bytes(content)
        outcomes["config"].append((wait(start(run, 40)), take_messages(run)))
    (run / "config-fit.yaml").write_bytes(record)
    whole = {path.name: path.read_bytes() for path in run.glob("*.ckpt")}
    for name in whole:
        (run / name).write_bytes(whole[name][:-100])
    outcomes["all torn"] = (wait(start(run, 40)), take_messages(run))
    for name in whole:
        (run / name).write_bytes(whole[name])
    (run / "last.ckpt").write_bytes(whole["last.ckpt"][:-100])
    os.utime(run / "previous.ckpt", (0, 0))  # the clock has jumped
    for name in ("versions.json", "provenance.json", "metrics.json", "bad_samples.json", "attempts.json", "run.lock"):
        (run / name).write_bytes(b"\xff{[")
    (run / "metrics.csv").write_bytes(b'step,train/loss\nnan,1\n1e400,2\nx,\x00\n"' + b"z" * 200_000 + b"\n2,1.5\n")
    (run / "events.out.tfevents.1.x.1.0").write_bytes(b"\xff" * 50)
    last = start(run, 40)
    after(run, 30, lambda: (run / "versions.json").write_bytes(b"[[["))
    outcomes["records"] = (wait(last), take_messages(run))
    outcomes["finished"] = json.loads((run / "versions.json").read_text())["finished"]["step"]
    return outcomes


def unwritable(at: Path) -> Outcomes:
    """Read-only at the start; read-only in mid-run; full in mid-run, where several files are written."""
    outcomes = {}
    for name in ("from the start", "read-only", "full"):
        run = at / name.replace(" ", "-")
        run.mkdir()
        if name == "full":
            mount("tmpfs", run, "tmpfs", data="size=8m")
        if name == "from the start":
            read_only(run)
        child = start(run, 400)
        if name == "read-only":
            after(run, 10, lambda run=run: read_only(run))  # type: ignore[misc]
        if name == "full":
            after(run, 10, lambda run=run: fill(run / "filler"))  # type: ignore[misc]
        outcomes[name] = {
            "code": wait(child),
            "said": take_messages(run),
            "left": sorted(path.name for path in run.iterdir()),
        }
        if name != "from the start":
            outcomes[name]["step"] = load(run / "last.ckpt")["global_step"]  # whole
    return outcomes


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


SCENARIOS: tuple[Callable[[Path], Outcomes], ...] = (
    two, killed, one_bad_batch, in_one_process_of_two, crashing, signals, damaged, unwritable,
)  # fmt: skip


def main() -> None:
    os.chdir(ROOT)
    torch.set_num_threads(1)
    outcomes: Outcomes = {}
    chosen = [each for each in SCENARIOS if not sys.argv[2:] or each.__name__ in sys.argv[2:]]
    for scenario in chosen:
        at = Path(sys.argv[1]) / scenario.__name__
        at.mkdir(parents=True)
        if scenario is unwritable:
            if os.geteuid() or LIBC.unshare(CLONE_NEWNS):
                continue
            mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)
        began = time.monotonic()
        outcomes[scenario.__name__] = scenario(at)
        print(f"{scenario.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
