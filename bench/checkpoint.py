r"""How long a save blocks training: in the background and in the foreground, measured in turn.

    PYTHONPATH=src:. python bench/checkpoint.py                  # 4.2 GB: the base model's size with AdamW's moments
    PYTHONPATH=src:. python bench/checkpoint.py --gigabytes 0.5 --folder /dev/shm/checkpoint

Random tensors stand in for weights and moments, and are written by the code that training uses: the check of every
weight (`check_finite`), then `SafeCheckpointIO`. Needs memory for the state and a copy of it, and disk space for two
files.

Prints the median, minimum and maximum seconds of each, and the CPU time of this thread, which is more reliable if the
machine is busy. Then: the first save in the background, whose memory was reserved before; how long that reservation
takes in the background; how long a write takes; and how much longer small steps of work take meanwhile.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.checkpointing import check_finite

WIDTH = 1024  # weights are square matrices of 4 MiB


class Held(NamedTuple):
    """Seconds: wall-clock time, and CPU time of the main thread."""

    clock: float
    processor: float


class State:
    """A model of random weights, with two moments each. size: bytes of all of them."""

    def __init__(self, size: float) -> None:
        count = max(1, round(size / 3 / (4 * WIDTH**2)))
        self.module = nn.ParameterList(torch.rand(WIDTH, WIDTH) for _ in range(count))
        moments = {n: {key: torch.rand(WIDTH, WIDTH) for key in ("exp_avg", "exp_avg_sq")} for n in range(count)}
        self.content = {
            "state_dict": self.module.state_dict(),
            "optimizer_states": [{"state": moments, "param_groups": []}],
            "pytorch-lightning_version": "2.6.6",
        }
        self.trainer: Any = SimpleNamespace(lightning_module=self.module, global_step=0)

    def tensors(self) -> list[torch.Tensor]:
        """Weights and moments."""
        moments = self.content["optimizer_states"][0]["state"].values()
        return [*self.module.parameters(), *(value for pair in moments for value in pair.values())]

    def save(self, io: SafeCheckpointIO, folder: Path) -> Held:
        """Save a checkpoint as KeepState does, and time it."""
        began, used = time.perf_counter(), time.thread_time()
        check_finite(self.trainer, folder)
        io.save_checkpoint(self.content, folder / "last.ckpt")
        return Held(time.perf_counter() - began, time.thread_time() - used)


def step(size: int = 300) -> float:
    """Seconds that a little work in Python and torch takes."""
    began, weights = time.perf_counter(), torch.ones(size, size)
    for _ in range(20):
        weights = weights @ weights / size
        sum(range(5_000))
    return time.perf_counter() - began


def measure(state: State, folder: Path, times: int) -> dict[str, Any]:
    """Measure both ways in turn; the first save of each is reported separately."""
    front, back = SafeCheckpointIO(), SafeCheckpointIO()
    back.begin()
    began = time.perf_counter()
    back.reserve(state.tensors())
    back.finish()
    reserved = time.perf_counter() - began
    held: dict[str, list[Held]] = {"background": [], "foreground": []}
    writes, quiet, meanwhile = [], [], []
    for _ in range(times + 1):
        quiet += [step() for _ in range(20)]
        began = time.perf_counter()
        held["background"].append(state.save(back, folder))
        assert back.writer is not None
        while not back.writer.pending[-1].done():
            meanwhile.append(step())
        back.finish()
        writes.append(time.perf_counter() - began)
        held["foreground"].append(state.save(front, folder))
    back.end()
    slower = statistics.median(meanwhile) / statistics.median(quiet) if meanwhile else 1.0
    return {"held": held, "writes": writes, "slower": slower, "reserved": reserved}


def line(name: str, held: list[Held]) -> str:
    clock, processor = ([getattr(each, kind) for each in held] for kind in Held._fields)
    duration = f"{statistics.median(clock):.2f} s ({min(clock):.2f} to {max(clock):.2f})"
    return f"{name}: holds the training {duration}; processor {statistics.median(processor):.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; by default a temporary folder")
    options = parser.parse_args()
    state = State(options.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(state, Path(folder), options.times)
    held = results["held"]
    for name, each in held.items():
        print(line(name, each[1:]))
    ratio = [back.clock / front.clock for back, front in zip(*(each[1:] for each in held.values()), strict=True)]
    print(f"background / foreground, median of pairs: {statistics.median(ratio):.3f}")
    print(line("the first in the background", held["background"][:1]))
    print(f"its memory is reserved in the background: {results['reserved']:.1f} s")
    print(f"a write in the background: {statistics.median(results['writes'][1:]):.1f} s")
    print(f"a step of work meanwhile: {results['slower']:.2f} times as long")
    return 0


if __name__ == "__main__":
    sys.exit(main())
