"""The runs of a study: each a process of its own in a folder of its own, several at once.

A run is an ordinary run: killed, it goes on from its latest checkpoint; finished, it is read and not made again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import NamedTuple

from maskvlm.study.budget import STEPS, budget_in_steps
from maskvlm.study.definition import Cell, Study
from maskvlm.training.run_record import write_json
from maskvlm.utils.distributed import cores
from maskvlm.utils.errors import ExitCode, UserError

ABOUT, LOG, CARD = "study.json", "study.log", "card.json"
"""In a run's folder: what it is a run of; what its processes printed; the last file that a finished run writes."""


class StudyRun(NamedTuple):
    """One run of a study.

    Attributes:
        folder: where it lies.
        command: what makes it, or goes on with it.
    """

    cell: Cell
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """`all@0.25-s3`."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether it has come to its end, and was measured."""
        return (self.folder / CARD).is_file()

    @property
    def seconds(self) -> float | None:
        """That its processes took, in all; None where it was not made by a study."""
        told = self.folder / ABOUT
        return json.loads(told.read_text()).get("seconds") if told.is_file() else None

    @property
    def about(self) -> dict[str, object]:
        """What decides its weights, to tell whether a folder holds this very run."""
        return {"cell": self.cell.name, "seed": self.seed, "command": list(self.command[2:])}


def root_of(study: Study) -> Path:
    """Where a study's runs lie."""
    return Path("checkpoints") / study.name


def runs_of(study: Study, root: Path) -> list[StudyRun]:
    """All of a study, seed by seed, so that every arm has its first seed early.

    Args:
        root: folder of the study.

    Raises:
        UserError: see `budget_in_steps`.
    """
    steps = {cell.name: budget_in_steps(study, cell, root) for cell in study.cells}
    every = [(seed, cell) for cell in study.cells for seed in cell.seeds]
    order = sorted(every, key=lambda each: each[0])  # stable: cells stay in the order of the file
    return [_run(study, cell, seed, steps[cell.name], root) for seed, cell in order]


def _run(study: Study, cell: Cell, seed: int, steps: int | None, root: Path) -> StudyRun:
    folder = root / f"{cell.name}-s{seed}"
    options = {**dict(cell.options), "seed_everything": str(seed)}
    options |= {"data.fraction": f"{cell.fraction:g}"} if cell.fraction < 1 else {}
    options |= {STEPS: str(steps)} if steps is not None else {}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    command = (sys.executable, "-m", "maskvlm", *study.run, "--folder", str(folder), *words)
    return StudyRun(cell, seed, folder, command)


def check_same_run(run: StudyRun) -> None:
    """Whether the folder, where there is one, holds this very run.

    Raises:
        UserError: it was made by another command (73): a table would mix two things.
    """
    told = run.folder / ABOUT
    if not told.is_file():
        return
    before = json.loads(told.read_text())
    if {key: before.get(key) for key in run.about} != json.loads(json.dumps(run.about)):
        todo = "Give the arm another name, or remove that folder"
        raise UserError(run.folder, "holds a run of this name with other options", todo, ExitCode.CANNOT_CREATE)


class Ended(NamedTuple):
    """How a run ended: its exit status, and the last line that it said."""

    run: StudyRun
    code: int
    said: str
    seconds: float


class Runner:
    """Makes runs, several at a time, each on its part of the cores.

    Args:
        jobs: how many at once.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.stopping = Event()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def make(self, runs: Sequence[StudyRun]) -> Iterator[Ended]:
        """Make those that are not finished; yields each as it ends. On Ctrl-C or SIGTERM the runs are asked to save and
        to end, and nothing new is begun."""
        with ThreadPoolExecutor(self.jobs) as pool, self._stop_on_signals():
            pending = {pool.submit(self._one, run) for run in runs if not run.finished}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (ended for each in done if (ended := each.result()) is not None)

    def _one(self, run: StudyRun) -> Ended | None:
        if self.stopping.is_set():
            return None
        run.folder.mkdir(parents=True, exist_ok=True)
        before = run.seconds or 0.0
        write_json(run.folder / ABOUT, {**run.about, "seconds": before})
        threads = str(max(1, cores() // self.jobs))
        # PASSIVE: threads that wait do not spin, which would take time from the other runs
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads}
        start = time.monotonic()
        with (run.folder / LOG).open("ab") as log:
            # a session of its own: Ctrl-C reaches this process alone, which passes it on once
            process = subprocess.Popen(
                run.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            self.processes[run.name] = process
            if self.stopping.is_set():  # it was asked for between the check and the start
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            del self.processes[run.name]
        seconds = time.monotonic() - start
        write_json(run.folder / ABOUT, {**run.about, "seconds": before + seconds})
        return Ended(run, code, last_line(run.folder / LOG), seconds)

    def stop(self) -> None:
        """Ask all processes to save and to end."""
        self.stopping.set()
        for process in [*self.processes.values()]:
            process.send_signal(signal.SIGTERM)

    def _stop_on_signals(self) -> "_Signals":
        return _Signals(self.stop)


class _Signals:
    """While inside: SIGINT and SIGTERM call `stop`."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop, self.before = stop, {}  # type: ignore[var-annotated]

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, lambda *_: self.stop())

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def last_line(log: Path, most: int = 4096) -> str:
    """The last line of a log that is not empty, in printable characters."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        lines = file.read().decode("utf-8", "replace").splitlines()
    text = next((line for line in reversed(lines) if line.strip()), "")
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def step_of(run: StudyRun) -> int:
    """The last step that a run has logged; 0 before the first."""
    path = run.folder / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        names = file.readline().rstrip("\r\n").split(",")
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        tail = file.read().splitlines()[-1:]
    cells = dict(zip(names, tail[0].split(","), strict=False)) if tail and "step" in names else {}
    return int(float(cells["step"])) if cells.get("step", "").replace(".", "").isdigit() else 0
