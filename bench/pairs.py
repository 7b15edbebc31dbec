r"""Two processes of one run, with a fault in one of them at a random moment: how, and how soon, each one ends.

    python bench/pairs.py --trials 200                        # all kinds in turn
    python bench/pairs.py --trials 8 --kinds stop killed

Kinds: SIGTERM to one or both; SIGKILL to one; SIGSTOP to one; an exception in one. In each trial no process may hang
beyond the watchdog's time, no process may be left over, every exit status must be correct, and the newest checkpoint
must be intact. Exit status 1 if something was wrong.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from kills import command, elastic, fork, free_port

from maskvlm.checkpoint.integrity import newest_valid
from maskvlm.checkpoint.io import load
from maskvlm.training.lit import LitModel

KINDS = ("term one", "term both", "killed", "stop", "raises")
TORCH = (RuntimeError, "something nobody thought of")
LIMIT = 90.0  # seconds, after which a process counts as hung


class Trial(NamedTuple):
    """Outcome of a trial. codes: exit statuses of both processes, negative for a signal, None if it hung."""

    kind: str
    whom: int
    codes: tuple[int | None, int | None]
    seconds: float
    wrong: list[str]


def raising(flag: Path) -> Any:
    """Context that raises an exception in the training step of the process named in the file `flag`."""
    step = LitModel.training_step

    def struck(self: LitModel, batch: Any, batch_idx: int) -> Any:
        if flag.exists() and flag.read_text() == os.environ["RANK"]:
            raise TORCH[0](TORCH[1])
        return step(self, batch, batch_idx)

    return mock.patch.object(LitModel, "training_step", struck)


def trial(folder: Path, kind: str, patience: float, chance: random.Random, more: tuple[str, ...]) -> Trial:
    """Start two processes, strike at a random moment after their first checkpoint, and see how they end."""
    run, port, whom, flag = folder / "run", free_port(), chance.randrange(2), folder / "flag"
    words = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.steps=9999", "--trainer.val_check_interval=24")
    logs = [folder / f"rank{rank}.txt" for rank in (0, 1)]
    # Patched before the fork, so that both processes have it.
    with raising(flag):
        started = [fork(command(run, 0, (*words, *more)), env=elastic(rank, port), log=logs[rank]) for rank in (0, 1)]
    # The newest checkpoint must be intact only once there is one.
    until = time.monotonic() + LIMIT
    while not (run / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(chance.uniform(0.0, 1.5))
    began = time.monotonic()
    if kind == "raises":
        flag.write_text(str(whom))
    else:
        name = {"killed": signal.SIGKILL, "stop": signal.SIGSTOP}.get(kind, signal.SIGTERM)
        for child in started if kind == "term both" else started[whom : whom + 1]:
            os.kill(child, name)
    codes, seconds = ends(started, began)
    return Trial(kind, whom, codes, seconds, wrong(run, kind, whom, codes, seconds, patience, logs))


def ends(started: list[int], began: float) -> tuple[tuple[int | None, int | None], float]:
    """Exit statuses, and the seconds until the last process ended."""
    codes: dict[int, int | None] = {}
    while len(codes) < len(started) and time.monotonic() - began < LIMIT:
        for child in started:
            done, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    seconds = time.monotonic() - began
    # Hung processes are killed here.
    for child in started:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            codes[child] = None
    first, second = (codes[child] for child in started)
    return (first, second), seconds


def wrong(
    run: Path,
    kind: str,
    whom: int,
    codes: tuple[int | None, int | None],
    seconds: float,
    patience: float,
    logs: list[Path],
) -> list[str]:
    """Everything that is not as expected."""
    # 69: a process was lost; 70: a bug; 75: stopped with a checkpoint.
    expected = {"killed": (-9, 69), "stop": (-9, 69), "raises": (70, 70)}.get(kind, (75, 75))
    problems, output = [], "".join(log.read_text(errors="replace") for log in logs)
    # The process that was struck comes first in `expected`.
    if codes != (expected if whom == 0 else expected[::-1]):
        problems.append(f"exits {codes}")
    most = patience + 5 if kind == "stop" else 15.0
    if seconds > most:
        problems.append(f"{seconds:.1f} s, more than {most:.0f}")
    causes = {"killed": f"rank {whom} (", "stop": f"rank {whom} (", "raises": TORCH[1]}
    # The cause is reported once, by one process; the other refers to it.
    if kind in causes and (output.count("error: ") != 1 or causes[kind] not in output):
        problems.append(f"the cause is told {output.count('error: ')} times")
    # An error is called a bug only if an exception was raised.
    if kind != "raises" and "This is a bug" in output:
        problems.append("it is called a bug")
    try:
        newest = newest_valid(run, lambda _: None)
        step = load(newest)["global_step"] if newest else 0
    except Exception as error:
        problems.append(f"no checkpoint: {error}")
    else:
        if not step:
            problems.append("no checkpoint")
    if problems:
        problems += [line[:300] for line in output.replace("\r", "\n").splitlines() if "rror:" in line][:3]
    return problems


def orphan_pids() -> list[int]:
    """Processes that outlive the two by more than a second: this process adopts orphans."""
    until = time.monotonic() + 1.0
    while True:
        try:
            # Reap adopted processes that have ended; if no child is left, there are no orphans.
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        if time.monotonic() > until:
            return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument(
        "--patience", type=float, default=8.0, help="seconds until a silent process is taken for frozen"
    )
    parser.add_argument("--workers", type=int, default=2, help="data workers of each process, in every other trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where every trial is written")
    parser.add_argument("--before", action="store_true", help="of a build without --patience")
    options = parser.parse_args()
    import ctypes

    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: this process adopts orphans, and so sees them
    chance, trials = random.Random(options.seed), list[Trial]()
    for number in range(options.trials):
        kind = options.kinds[number % len(options.kinds)]
        more = () if options.before else (f"--patience={options.patience}",)
        if number // len(options.kinds) % 2:
            more = (*more, f"--data.workers={options.workers}")
        with tempfile.TemporaryDirectory() as folder:
            done = trial(Path(folder), kind, options.patience, chance, more)
        if orphans := orphan_pids():
            done.wrong.append(f"{len(orphans)} processes left over")
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        trials.append(done)
        if done.wrong:
            print(f"trial {number}, {kind} of {done.whom}: {'; '.join(done.wrong)}", flush=True)
    table(trials)
    if options.json:
        options.json.write_text(json.dumps([each._asdict() for each in trials]))
    return int(any(each.wrong for each in trials))


def table(trials: list[Trial]) -> None:
    """Print a table with one row per kind."""
    rows = defaultdict(list)
    for each in trials:
        rows[each.kind].append(each)
    print(
        f"{'kind':<10} {'trials':>6} {'hangs':>5} {'orphans':>7} {'wrong':>5} {'slowest, s':>10}  exits (struck, other)"
    )
    for kind, those in rows.items():
        codes = sorted({str((each.codes[each.whom], each.codes[1 - each.whom])) for each in those})
        hangs, orphans = (
            sum(None in each.codes for each in those),
            sum("left over" in str(each.wrong) for each in those),
        )
        numbers = f"{len(those):>6} {hangs:>5} {orphans:>7} {sum(bool(each.wrong) for each in those):>5}"
        print(f"{kind:<10} {numbers} {max(each.seconds for each in those):>10.1f}  {', '.join(codes)}")
    print(f"{sum(bool(each.wrong) for each in trials)} of {len(trials)} wrong")


if __name__ == "__main__":
    sys.exit(main())
