"""Watches over the processes of a run: a thread in each notices when another is lost, frozen or stuck.

Its process then ends with one error line, even if its main thread waits for the lost one in a collective operation,
which no signal or exception can interrupt. The stacks of all threads are written to the run's folder.
"""

import faulthandler
import importlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.strategies import Strategy

from maskvlm.training import peers
from maskvlm.training.failure import EARLIER, failed_first, report
from maskvlm.training.peers import BEAT, CURRENT, GRACE, LostProcess, Peers
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import open_no_link

PART_OF_TIMEOUT = 0.9  # of the process group's timeout, at which torch would end the run without naming a process


class Watcher(threading.Thread):
    """Renews this process's record and checks the others': the first process checks all, the others only the first.

    Args:
        own: this process and its view of the others.
    """

    def __init__(self, own: Peers) -> None:
        super().__init__(daemon=True, name="watch")
        self.own = own
        # Not all pairs: N processes read some 2 N records a second.
        self.ranks = own.everyone() if own.rank == 0 else range(1)

    def run(self) -> None:
        while not self.own.has_left.wait(BEAT):
            self.own.write()
            if self.own.leaving.is_set():
                continue  # the main thread is about to report why it ends; the process is alive until then
            self.own.look(self.ranks)
            lost = self.own.judge(self.own.silent, self.own.still)
            if lost is not None and not self.own.leaving.wait(lost.grace):
                end(self.own, lost)


def end(own: Peers, lost: LostProcess) -> None:
    """End this process, whatever its main thread is waiting for."""
    dump_stacks(own.folder / f"stacks-rank{own.rank}.txt")
    own.verdict = lost
    # Reported before any process is ended: the first process to fail reports the cause.
    code = report(lost, own.folder)
    if lost.rank is not None:
        peers.end_frozen(own.read(lost.rank))
    peers.leave(code)
    # `sys.exit` would only end this thread.
    os._exit(code)


def dump_stacks(path: Path) -> None:
    """Write the stack of each thread of this process."""
    try:
        with open(path, "w", opener=open_no_link) as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except (OSError, UserError):
        pass  # the reason is reported anyway


class Marks(L.Callback):
    """Tells the watch where the main thread is: a position that grows and is the same for all processes there."""

    def _at(self, trainer: L.Trainer, phase: int, doing: str) -> None:
        if CURRENT:
            step = trainer.fit_loop.epoch_loop.total_batch_idx
            CURRENT[0].move(step, phase, f"{doing} batch {step + 1}" if trainer.training else doing)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 1, "forward in")

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 2, "backward in")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 3, "after")

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 4, "evaluating")

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 5, "at the end of an evaluation")

    def on_test_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 4, "evaluating")

    def on_test_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 5, "at the end of an evaluation")


def watch(trainer: L.Trainer, folder: Path, silent: float | None) -> None:
    """Watch over the processes of a trainer from their rendezvous on; does nothing for a single process.

    Args:
        trainer: the trainer whose processes to watch.
        folder: the run's folder, visible to all processes.
        silent: seconds without a sign of life before a process is considered frozen; None: 120.
    """
    strategy: Strategy = trainer.strategy
    meet = strategy.setup_environment
    trainer.callbacks.append(Marks())  # type: ignore[attr-defined]

    def meet_and_watch() -> None:
        meeting = threading.Event()
        if trainer.world_size > 1:
            threading.Thread(target=wait_for_others, args=(folder, meeting), daemon=True).start()
        try:
            with new_store():
                meet()
        except RuntimeError as error:
            raise port_error(error) or error from None
        finally:
            meeting.set()
        # Once: a trainer may evaluate after training, with another rendezvous.
        if trainer.world_size > 1 and not CURRENT:
            begin(trainer, folder, silent or peers.SILENT)

    # The rendezvous happens in this call; Lightning has no hook around it.
    strategy.setup_environment = meet_and_watch  # type: ignore[method-assign]
    subprocess_script._ChildProcessObserver._terminate_all = child_ended  # type: ignore[assignment, method-assign]


@contextmanager
def new_store() -> Iterator[None]:
    """After torchrun has restarted all processes, use a separate prefix in its store for the rendezvous.

    torchrun keeps its store, and with it the addresses of the previous processes: an early process would wait for one
    of those. With several machines each counts its own restarts, so there the prefix is not changed.
    """
    names = ("TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    count, here, world = (os.environ.get(name) for name in names)
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # a function hides it
    make = rendezvous._create_c10d_store
    if count is not None and here == world:
        rendezvous._create_c10d_store = lambda *args, **more: dist.PrefixStore(f"start {count}", make(*args, **more))
    try:
        yield
    finally:
        rendezvous._create_c10d_store = make


def begin(trainer: L.Trainer, folder: Path, silent: float) -> None:
    """Start this process's watch; called after the rendezvous."""
    token = trainer.strategy.broadcast(uuid.uuid4().hex)
    timeout = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
    still = PART_OF_TIMEOUT * timeout.total_seconds()
    own = Peers(folder, token, trainer.global_rank, trainer.world_size, silent, still)
    if own.rank == 0:
        # Others may have written by now: records with this token stay.
        own.clear()
    own.write()
    CURRENT[:] = [own]
    Watcher(own).start()


def wait_for_others(folder: Path, met: threading.Event) -> None:
    """Before the rendezvous: do not wait for a process that has failed since this one started."""
    while not met.wait(BEAT):
        now = failed_first(folder)
        # Text and time: an earlier job may have ended with the same words.
        if now[0] and now not in EARLIER:
            _, _, code = now[0].partition(" ")
            lost = LostProcess(
                None, "processes", "another process failed", "See its line", int(code or ExitCode.UNAVAILABLE)
            )
            os._exit(report(lost, folder))


def port_error(error: Exception) -> UserError | None:
    """One error line (69) if another program uses the port for the rendezvous."""
    if "EADDRINUSE" not in str(error):
        return None
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "?")
    todo = "Choose another (MASTER_PORT, torchrun --master-port), or let torchrun find one (--standalone)"
    return UserError(f"port {port}", f"is taken on {address} by another program", todo, ExitCode.UNAVAILABLE)


def child_ended(observer: subprocess_script._ChildProcessObserver) -> None:
    """A process started by Lightning has failed: give this one time to say why, as Lightning would kill it at once."""
    time.sleep(peers.WITHIN + GRACE)
    # A negative code is the signal that ended a process.
    codes = [child.returncode for child in observer._child_processes if child.returncode]
    for child in observer._child_processes:
        child.send_signal(observer._termination_signal)
    os._exit(codes[0] if 0 < codes[0] < 128 else int(ExitCode.UNAVAILABLE))
