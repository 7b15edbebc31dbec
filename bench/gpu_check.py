r"""`make gpu-check`: runs the tests that need a GPU, then measures the cost of training on it, as a Markdown table.

    make gpu-check                   # on a card: MODEL=base with random weights, nothing is downloaded
    make gpu-check ARGS=--cpu        # tries the script without one: MODEL=tiny, a few steps

Training is `maskvlm bench` on the built-in data, whose images are drawn at the model's size. It reports pairs per
second, use of the card, time waiting for data, and how long a checkpoint blocks training. Single steps use noise and
texts of maximum length: ours, and the plain one of `albef_step.py`, in turn, with the memory of each and the simulated
value (`tests/gpu_sim/table.json`). Exit status: 1 if a test or a measurement failed, 69 without a card.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from bench.albef_step import Trained, built, noise_batch, ratios
from maskvlm.checkpoint.integrity import first_line
from maskvlm.cli import bench
from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import LightningCommand, run_command
from maskvlm.reporting.meters import StepSpeed, ThroughputMeter
from maskvlm.training.checkpointing import KeepState
from maskvlm.training.run_record import machine, versions
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "gpu_sim" / "table.json"
MISSING = "-"


class Case(NamedTuple):
    """A configuration to measure.

    Attributes:
        name: its name in the tables.
        pairs: pairs per step.
        words: words of `maskvlm bench`.
        simulated: its name in `table.json`.
        ways: kinds of single steps to measure, see `albef_step.Trained`.
    """

    name: str
    pairs: int
    words: tuple[str, ...]
    simulated: str | None = None
    ways: tuple[str, ...] = ()


EVERY = ("ours", "plain", "plain, shared")
BASE = ("model=base", "where=gpu1", "--model.random_init=true")
CARD = (
    Case("base, 64 pairs", 64, BASE, "1 x 64", EVERY),
    Case("base, 512 pairs, 64 at a time", 512, (*BASE, "--model.chunk=64"), "1 x 512 in chunks of 64", ("ours",)),
    Case("base, 512 pairs at once", 512, BASE, None, ("plain",)),
)
TINY = ("model=tiny", "where=cpu", "--data.source.train=60", "--data.source.val=6")
TRIAL = (
    Case("tiny, 8 pairs", 8, TINY, None, EVERY),
    Case("tiny, 8 pairs, 4 at a time", 8, (*TINY, "--model.chunk=4"), None, ("ours",)),
)


# ---------------------------------------------------------------------- training


class Watch(bench.Stopwatch):
    """Also measures how long training waits for data, and how long a checkpoint blocks it."""

    def __init__(self, keep: KeepState) -> None:
        super().__init__()
        self.keep, self.clock = keep, ThroughputMeter()
        self.waits: StepSpeed | None = None
        self.saving: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.clock.batch_starts()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.clock.batch_ends(len(batch.valid_B))
        if batch_idx + 1 == bench.WARMUP:
            self.clock.reset()
        elif batch_idx + 1 == bench.STEPS:
            self.waits = self.clock.read()
            # The device is idle here: `Stopwatch` has waited for it.
            started = time.perf_counter()
            self.keep.save(trainer)
            self.saving = time.perf_counter() - started


class Check(bench.Bench):
    """A few steps of `fit`, and a checkpoint, written as in a run."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.settings.trainer.enable_checkpointing = True

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        # It saves when `Watch` tells it to, not by time.
        keep = KeepState(self.settings.run, steps=None, minutes=None)
        self.stopwatch = Watch(keep)
        return LightningCommand.instantiate_trainer(self, callbacks=[self.stopwatch, keep], **kwargs)


def trained(case: Case, folder: Path) -> dict[str, str]:
    """A row of the training table."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        words = [*case.words, f"--data.batch_size={case.pairs}", f"--folder={run}"]
        watch = run_command(Check, ["fit", *COMMANDS["bench"].full(words)[1:]]).stopwatch
        assert isinstance(watch, Watch)
        assert watch.speed is not None
        assert watch.waits is not None
        size = Path(run, "last.ckpt").stat().st_size  # it has been written completely
    speed = watch.speed
    use = f"{100 * speed.flops_per_second / speed.peak_flops:.1f} %" if speed.peak_flops else MISSING
    return {
        "training": f"{case.name}, {speed.precision}",
        "pairs/s": f"{speed.pairs_per_second:.1f}",
        "ms a step": f"{speed.milliseconds:.0f}",
        "TFLOP/s": f"{speed.flops_per_second / 1e12:.3f}",
        "of the peak": use,
        "waits for data": f"{100 * watch.waits.data_wait:.1f} %",
        "a checkpoint holds it": f"{watch.saving:.2f} s of {size / 2**30:.2f} GiB",
        "memory, GiB": in_gib(speed.memory_gib),
    }


# ---------------------------------------------------------------------- a step alone


def steps_alone(case: Case, steps: int, repeats: int) -> list[dict[str, str]]:
    """A row for each way to compute the step."""
    setup = built([*case.words, f"--data.batch_size={case.pairs}"])
    device = torch.device("cuda" if "where=gpu1" in case.words else "cpu")
    batch = move_data_to_device(noise_batch(case.pairs, setup.model.backbone), device)
    one = Trained(setup, device)
    memory = {way: step_memory(one, way, batch) for way in case.ways}
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    for _ in range(repeats):
        for way in case.ways:
            seconds[way].append(one.seconds(way, [batch], steps))
    rows = []
    for way in case.ways:
        faster = f"{statistics.median(ratios(seconds, way)):.2f} times" if "ours" in seconds and way != "ours" else ""
        simulated = simulated_gib(case) if way == "ours" else None
        rows.append({
            "a step alone": f"{case.name}: {way}",
            "pairs/s": f"{case.pairs / statistics.median(seconds[way]):.1f}",
            "GFLOP a pair": f"{one.flops(way, batch) / case.pairs / 1e9:.2f}",
            "ours is faster": faster or MISSING,
            "memory, GiB": in_gib(memory[way]),
            "simulated": in_gib(simulated),
        })  # fmt: skip
    return rows


def step_memory(one: Trained, way: str, batch: Any) -> float | None:
    """Peak memory of tensors in a step, in GiB, including weights and AdamW's moments; None on a CPU."""
    one.step(way, batch)  # allocates the moments
    if one.device.type != "cuda":
        return None
    one.wait()
    torch.cuda.reset_peak_memory_stats(one.device)
    one.step(way, batch)
    return float(torch.cuda.max_memory_allocated(one.device) / 2**30)


def simulated_gib(case: Case) -> float | None:
    """The value simulated by `tests/gpu_sim`; None if there is none."""
    table: dict[str, dict[str, float]] = json.loads(TABLE.read_text())
    return None if case.simulated is None else table[case.simulated]["peak_gib"]


def in_gib(value: float | None) -> str:
    """A value in GiB for a table."""
    return MISSING if value is None else f"{value:.2f}"


# ---------------------------------------------------------------------- the report


class Report:
    """Runs measurements; records a failure and continues."""

    def __init__(self) -> None:
        self.failed = False

    def rows(
        self, name: str, measure: Callable[[], list[dict[str, str]]], must_fit: bool = True
    ) -> list[dict[str, str]]:
        """The rows of `measure`, or a row with the reason if it fails."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            return measure()
        except torch.OutOfMemoryError:
            self.failed |= must_fit
            return [{"": f"{name}: out of memory"}]
        except Exception as error:
            self.failed = True
            return [{"": f"{name}: {type(error).__name__}: {first_line(error)}"}]
        finally:
            gc.collect()  # a trainer and its model refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table with the columns of the first complete row; a failed row has its reason in the first column."""
    heads = next((list(row) for row in rows if "" not in row), ["failed"])
    lines = [heads, ["---"] * len(heads)]
    lines += [[row[""], *[MISSING] * (len(heads) - 1)] if "" in row else list(row.values()) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpu_tests() -> tuple[bool, str]:
    """Run the tests marked `gpu`; returns whether they passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        last = ""
        for line in running.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip(" =\n") or last
    return running.returncode == 0, last


def driver() -> str:
    """Version of the card's driver, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def title(cpu: bool) -> str:
    """Description of the hardware and versions used."""
    facts = versions()
    origin = f"torch {torch.__version__}, commit {facts['commit']}, {datetime.now(UTC):%Y-%m-%d}"
    if cpu:
        return (
            f"CPU trial of `make gpu-check`, which says nothing of a card: {machine()['processor']}, "
            f"{torch.get_num_threads()} threads, {origin}"
        )
    return f"{torch.cuda.get_device_name()}, driver {driver()}, CUDA {torch.version.cuda}, {origin}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report to stdout, progress to stderr; returns the exit status.

    Raises:
        UserError: there is no card (69).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="try the script without a card: a small model, few steps")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints", help="where a checkpoint is written")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        what = "no GPU was found: pairs/s, use of the card, memory, waiting for data and checkpoints of MODEL=base"
        raise UserError("gpu-check", f"{what} were to be measured", "ARGS=--cpu tries it", ExitCode.UNAVAILABLE)
    options.folder.mkdir(parents=True, exist_ok=True)
    cases, steps, repeats = (TRIAL, 1, 1) if options.cpu else (CARD, 10, 7)
    if options.cpu:
        bench.WARMUP, bench.STEPS = 1, 3
    report, tested = Report(), "not run"
    if not (options.cpu or options.no_tests):
        passed, tested = gpu_tests()
        report.failed |= not passed
    fits = [case for case in cases if "ours" in case.ways]
    if not options.cpu:  # on a CPU, compiling takes minutes
        words = (*fits[0].words, "--model.compile=true")
        fits.insert(1, fits[0]._replace(name=f"{fits[0].name}, compiled", words=words))
    training, alone = [], []
    for case in fits:
        training += report.rows(case.name, lambda: [trained(case, options.folder)])  # noqa: B023 (called at once)
    for case in cases:
        must_fit = "ours" in case.ways  # the plain step is not designed for large batches
        alone += report.rows(f"{case.name}, a step", lambda: steps_alone(case, steps, repeats), must_fit)  # noqa: B023
    print(f"**{title(options.cpu)}.** Tests that need a GPU: {tested}.\n\n{markdown(training)}\n\n{markdown(alone)}")
    return int(report.failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.code))
