r"""The cost of the step guard, measured in one training run of the built-in recipe (`make pretrain`) on a CPU. The
guard checks every second step, and the medians of steps with and without it are compared.

    PYTHONPATH=src:. OMP_NUM_THREADS=1 python bench/guard.py --steps 200

Also prints the time per step spent in the guard's own code, which is more reliable if the machine is busy.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from bench.kills import STACK
from maskvlm.cli.lightning import LightningCommand, run_command
from maskvlm.training.step_guard import StepGuard

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 6  # first steps, not measured, as they fill caches and the window


class Alternating(StepGuard):
    """Checks every second step, and records the time of each."""

    def __init__(self, stop_after: int = 10) -> None:
        super().__init__(stop_after)
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.own: list[float] = []
        self.began = self.spent = 0.0

    def clocked(self, name: str, *args: Any) -> None:
        began = time.perf_counter()
        getattr(super(), name)(*args)
        self.spent += time.perf_counter() - began

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.began, self.spent = time.perf_counter(), 0.0
        module.guard = self if index % 2 else None  # type: ignore[assignment]
        # Left there by the guard in the step before.
        trainer.optimizers[0].found_inf = None  # type: ignore[attr-defined]
        if index % 2:
            self.clocked("on_train_batch_start", trainer, module, batch, index)

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Any) -> None:
        if module.guard is not None:
            self.clocked("on_before_backward", trainer, module, loss)

    def judge(self, *args: Any) -> None:
        self.clocked("judge", *args)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if module.guard is not None:
            self.clocked("on_train_batch_end", trainer, module, outputs, batch, index)
            self.own.append(self.spent)
        if index >= SKIPPED:
            self.times[module.guard is not None].append(time.perf_counter() - self.began)


class Timed(LightningCommand):
    """The built-in recipe with the alternating guard."""

    guard: Alternating

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        # Replaces the recipe's own guard.
        others = [each for each in trainer.callbacks if not isinstance(each, StepGuard)]  # type: ignore[attr-defined]
        type(self).guard = Alternating()
        trainer.callbacks = [type(self).guard, *others]  # type: ignore[attr-defined]
        return trainer


def main() -> int:
    """Print the medians; returns 1 if the guard costs more than 1 % of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    stack = [word for name in STACK for word in ("-c", str(ROOT / "conf" / f"{name}.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        more = [f"--data.steps={options.steps}", "--data.epochs=null", "--trainer.limit_val_batches=0"]
        run_command(Timed, ["fit", "--run", folder, *stack, *more])
    with_it, without = (statistics.median(Timed.guard.times[kind]) for kind in (True, False))
    own = statistics.median(Timed.guard.own[SKIPPED:])
    print(f"step with the guard {1e3 * with_it:.1f} ms, without {1e3 * without:.1f} ms: {with_it / without - 1:+.2%}")
    print(f"in the guard's own code {1e3 * own:.3f} ms, {own / without:.3%} of a step (median of {options.steps // 2})")
    return int(own > 0.01 * without)


if __name__ == "__main__":
    sys.exit(main())
