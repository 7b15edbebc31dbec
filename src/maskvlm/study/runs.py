"""The runs of a study: each a separate process with its own folder, several at a time.

A run is an ordinary run: if it was killed, it resumes from its latest checkpoint; if it is finished, it is read and not
repeated.
"""

import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from maskvlm.study.budget import STEPS, budget_in_steps, spent_by
from maskvlm.study.definition import Cell, Study
from maskvlm.training.resume import LAST, asked_for, diverged_at, finished, has_begun
from maskvlm.utils.cores import cores
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import STUDY
from maskvlm.utils.whole_files import open_no_link, read_json, write_json

ABOUT, LOG, METRICS = "study.json", "study.log", "metrics.json"
"""Files in a run's folder: its description, the output of its processes, its metrics."""
ALLOWED = "MASKVLM_ALLOW_IMPORT"
TICK = 30.0  # seconds between updates of a run's time


def without_machine(words: Sequence[str]) -> list[str]:
    """The words of a command without where=, which does not change a run's weights."""
    return [word for word in words if not word.startswith("where=")]


class StudyRun(NamedTuple):
    """A run of a study.

    Attributes:
        folder: its folder.
        command: the command that starts or resumes it.
        start: the run of the study whose last weights it starts from; None: it starts as its command says.
        spent: the cell whose operations it spends (`flops_of`); None if its options set the number of steps.
    """

    cell: Cell
    seed: int
    folder: Path
    command: tuple[str, ...]
    start: "StudyRun | None" = None
    spent: Cell | None = None

    @property
    def name(self) -> str:
        """Name of the run: `all@0.25-s3`."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether it has reached its end and was evaluated."""
        return finished(self.folder) is not None and self.metrics is not None

    @property
    def diverged(self) -> str:
        """`diverged at step 77`, if its command would not get it any further; "" for any other run."""
        step = diverged_at(self.folder)
        return "" if step is None or self.finished else f"diverged at step {step}"

    @property
    def lost(self) -> str:
        """Why it is not made although it is unfinished: it, or the run that it starts from, has diverged; else ""."""
        start = "" if self.start is None else self.start.diverged
        return self.diverged or (f"starts from {self.start.name}, which {start}" if self.start and start else "")

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.finished or bool(self.lost)

    @property
    def waits_for(self) -> str | None:
        """Name of the run that must be finished before this one; None if it can start."""
        return self.start.name if self.start is not None and not self.start.finished else None

    @property
    def last_weights(self) -> Path:
        """Its last checkpoint, which others may start from."""
        return self.folder / LAST

    @property
    def metrics(self) -> dict[str, float] | None:
        """Metrics of its final evaluation; None if it has not reached that, or the file cannot be read."""
        content = read_json(self.folder / METRICS) if finished(self.folder) is not None else {}
        return content or None

    @property
    def remark(self) -> str:
        """A caveat for its numbers: `ended at step 120 of 400`, or that it diverged and has none; else ""."""
        step, steps = finished(self.folder), asked_for(self.folder)
        early = step is not None and steps is not None and step < steps
        return f"ended at step {step} of {steps}" if early else self.diverged

    @property
    def seconds(self) -> float | None:
        """Total time of its processes; None if not all of them were timed."""
        seconds = read_json(self.folder / ABOUT).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def about(self) -> dict[str, object]:
        """What determines its weights, to check whether a folder holds this very run. The machine is not part of it."""
        start = "" if self.start is None else self.start.sha256
        return {"cell": self.cell.name, "seed": self.seed, "command": without_machine(self.command[2:]), "start": start}

    @property
    def sha256(self) -> str:
        """SHA-256 of what determines its weights, independent of its folder. Steps derived from another arm's
        operations are left out, as other versions count operations slightly differently."""
        words = without_machine(self.cell.written or self.cell.run)
        start = self.start.sha256 if self.start is not None else ""
        facts: list[object] = [self.cell.name, self.seed, words, start, sorted(self.cell.options)]
        if self.spent is not None:
            facts += [
                without_machine(self.spent.written or self.spent.run),
                self.spent.fraction,
                sorted(self.spent.options),
            ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def note(self, seconds: float) -> None:
        """Write its description, and the time that its processes took so far: NaN if unknown."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / ABOUT, {**self.about, "sha256": self.sha256, "seconds": seconds})


def root_of(study: Study) -> Path:
    """The folder of a study's runs."""
    return Path("checkpoints") / study.name


def runs_of(study: Study, root: Path, counted: Collection[str] | None = None) -> list[StudyRun]:
    """All runs of a study: first those that others start from, then seed by seed, so that every arm has its first seed
    early.

    Args:
        root: folder of the study.
        counted: cells whose number of steps is computed if it follows from another arm's operations, which takes
            minutes; None: all.

    Raises:
        UserError: see `budget_in_steps`.
    """
    known = [cell for cell in study.cells if counted is None or cell.name in counted]
    steps = {cell.name: budget_in_steps(study, cell, root) for cell in known}
    every = [(seed, cell) for cell in study.cells for seed in cell.seeds]
    order = sorted(every, key=lambda each: each[0])  # stable: cells stay in the order of the file
    first = {seed: _run(study.first, seed, None, root) for seed in study.first.seeds} if study.first else {}
    spent = {cell.name: spent_by(study.cells, cell) if cell.flops_of else None for cell in study.cells}
    return [
        *first.values(),
        *(_run(cell, seed, steps.get(cell.name), root, first.get(seed), spent[cell.name]) for seed, cell in order),
    ]


def _run(
    cell: Cell, seed: int, steps: int | None, root: Path, start: StudyRun | None = None, spent: Cell | None = None
) -> StudyRun:
    folder = root / f"{cell.name}-s{seed}"
    options = {**dict(cell.options), "seed_everything": str(seed)}
    options |= {"data.fraction": str(cell.fraction)} if cell.fraction < 1 else {}
    options |= {STEPS: str(steps)} if steps is not None else {}
    # One word each, so that a value that looks like an option stays a value.
    words = [f"--{key}={value}" for key, value in options.items()]
    begin, run_words = (f"from={start.last_weights}",) if start is not None else (), cell.run
    if start is not None:  # the checkpoint has the encoders
        run_words = tuple(word for word in run_words if not word.startswith("encoders="))
    command = (sys.executable, "-m", "maskvlm", *run_words, *begin, "--folder", str(folder), *words)
    return StudyRun(cell, seed, folder, command, start, spent)


def check_same_run(run: StudyRun) -> None:
    """Check that the folder, if it exists, holds this very run.

    Raises:
        UserError: it was made by another command (73), so a table would mix different runs.
    """
    if holds_another(run):
        todo = "Give the arm another name, or remove that folder"
        raise UserError(run.folder, "holds a run with this name and other options", todo, ExitCode.CANNOT_CREATE)


def holds_another(run: StudyRun) -> bool:
    """Whether its folder holds a run of this name made by another command. Of a folder that the command names by an
    environment variable, another place does not make another run."""
    before, about = read_json(run.folder / ABOUT), run.about
    if not before:
        return False

    def steps(command: object) -> list[str]:  # they may follow from another arm's operations, which `sha256` omits
        return [word for word in command if str(word).startswith(f"--{STEPS}=")] if isinstance(command, list) else []

    filled = bool(run.cell.written) and run.cell.written != run.cell.run
    if filled and before.get("sha256") == run.sha256 and steps(before.get("command")) == steps(about["command"]):
        return False
    # older versions did not note what a run starts from
    there = {"start": about["start"], **before}
    return {key: there.get(key) for key in about} != about


class Ended(NamedTuple):
    """How a run ended: its exit status (negative for a signal), the last line of its output, and its duration."""

    run: StudyRun
    code: int
    last_line: str
    seconds: float

    @property
    def why(self) -> str:
        """Why the run ended early, in words; "" if it reached its end."""
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        if self.code == ExitCode.REQUEUE:
            return "stopped and saved"
        if self.run.diverged:
            return f"{self.run.diverged}; not repeated as long as {self.run.folder} exists: {self.last_line}"
        return f"exit status {self.code}: {self.last_line}" if self.code else ""


class Runner:
    """Makes runs, several at a time, each on its share of the cores.

    Args:
        jobs: number of runs at a time.
        allowed: packages that class paths may come from; those in a study's file do not count as typed.
    """

    def __init__(self, jobs: int, allowed: Sequence[str] = ()) -> None:
        self.jobs, self.allowed = jobs, allowed
        self.stopping = Event()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def make(self, runs: Sequence[StudyRun]) -> Iterator[Ended]:
        """Make the runs that are not over, first those that others start from; yields each as it ends. On Ctrl-C or
        SIGTERM the runs are asked to save and end, and no new one is started."""
        waves = [[run for run in runs if run.start is None], [run for run in runs if run.start is not None]]
        with ThreadPoolExecutor(self.jobs) as pool, on_signals(self.stop):
            for wave in waves:
                pending = {pool.submit(self._one, run) for run in wave if not run.over}
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (ended for each in done if (ended := each.result()) is not None)

    def _one(self, run: StudyRun) -> Ended | None:
        """Make one run; None if the study is being stopped. A folder or file of it that cannot be written is this
        run's failure, and no other's."""
        try:
            return self._make(run)
        except OSError as error:
            return Ended(run, ExitCode.CANNOT_CREATE, f"{run.folder}: {error}", 0.0)
        except UserError as error:
            return Ended(run, error.code, str(error), 0.0)

    def _make(self, run: StudyRun) -> Ended | None:
        if self.stopping.is_set():
            return None
        if run.waits_for is not None:
            return Ended(run, ExitCode.MISSING_INPUT, f"{run.waits_for}, which it starts from, is not finished", 0.0)
        before, start = run.seconds, time.monotonic()
        if before is None:  # made without a study or by an array task, and so not timed
            before = math.nan if has_begun(run.folder) else 0.0
        run.note(before)
        threads = str(max(1, cores() // self.jobs))
        # PASSIVE: waiting threads do not spin, which would take time from the other runs
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads}
        environment |= of_study(self.allowed, os.getpid())
        with open(run.folder / LOG, "ab", opener=open_no_link) as log:
            # its own session: Ctrl-C reaches only this process, which passes it on once
            process = subprocess.Popen(
                run.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            self.processes[run.name] = process
            if self.stopping.is_set():  # stopped between the check and the start
                process.send_signal(signal.SIGTERM)
            while (code := self._wait(process)) is None:
                # So that a killed study has counted nearly all of it. The run goes on where this cannot be written.
                with suppress(OSError, UserError):
                    run.note(before + time.monotonic() - start)
            del self.processes[run.name]
        seconds = time.monotonic() - start
        run.note(before + seconds)
        return Ended(run, code, last_line(run.folder / LOG), seconds)

    @staticmethod
    def _wait(process: "subprocess.Popen[bytes]") -> int | None:
        try:
            return process.wait(TICK)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask all processes to save and end."""
        self.stopping.set()
        for process in [*self.processes.values()]:
            process.send_signal(signal.SIGTERM)


@contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP call `stop`; under nohup, which ignores SIGHUP, it stays ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def of_study(allowed: Sequence[str], process: int) -> dict[str, str]:
    """Environment variables of a run: the packages it may import, and the process that it ends with (0: none)."""
    names = [name for name in os.environ.get(ALLOWED, "").split(",") if name]
    return {ALLOWED: ",".join(dict.fromkeys([*names, *allowed])), STUDY: str(process)}


def last_line(log: Path, most: int = 4096) -> str:
    """The last non-empty line of a log, with unprintable characters replaced."""
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
    with path.open(newline="") as file:  # column names may contain commas: "lr-AdamW/encoders, late"
        steps = [row.get("step") or "" for row in csv.DictReader(file)]
    # A row that is being written may be incomplete.
    return next((int(step) for step in reversed(steps) if step.isdigit()), 0)
