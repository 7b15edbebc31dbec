"""Watches over the processes of a run: a thread in each notices when another is lost, frozen or stands still.

Its process then ends with one line, also where its main thread waits for the lost one in a collective operation that no
signal and no exception reaches. Stacks of all threads are left in the run's folder.
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

PART_OF_TIMEOUT = 0.9  # of the process group's own: then torch would end the run, without a name


class Watcher(threading.Thread):
    """Renews this process's record and looks at the others': the first process at all, the others at the first.

    Args:
        own: this process among the others.
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
                continue  # the main thread is about to say why; it lives as long as that takes
            self.own.look(self.ranks)
            lost = self.own.judge(self.own.silent, self.own.still)
            if lost is not None and not self.own.leaving.wait(lost.grace):
                end(self.own, lost)


def end(own: Peers, lost: LostProcess) -> None:
    """End this process, whatever its main thread waits for."""
    dump_stacks(own.folder / f"stacks-rank{own.rank}.txt")
    own.verdict = lost
    # Said before anything is ended: the first process to fail tells the cause.
    code = report(lost, own.folder)
    if lost.rank is not None:
        peers.end_frozen(own.read(lost.rank))
    peers.leave(code)
    # `sys.exit` would end this thread alone.
    os._exit(code)


def dump_stacks(path: Path) -> None:
    """Where each thread of this process is."""
    try:
        with open(path, "w", opener=open_no_link) as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except (OSError, UserError):
        pass  # the reason is told all the same


class Marks(L.Callback):
    """Tells the watch what the main thread is at. The same for all processes at the same point, and growing."""

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
    """Watch over the processes of this trainer from when they have met; nothing where there is one alone.

    Args:
        trainer: whose processes.
        folder: of the run, which all processes see.
        silent: seconds without a sign of life before a process is taken for frozen; None: 120.
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
        # Once: a trainer that has trained may measure afterwards, and meets again.
        if trainer.world_size > 1 and not CURRENT:
            begin(trainer, folder, silent or peers.SILENT)

    # In this call the processes meet; Lightning has no hook around it.
    strategy.setup_environment = meet_and_watch  # type: ignore[method-assign]
    subprocess_script._ChildProcessObserver._terminate_all = child_ended  # type: ignore[assignment, method-assign]


@contextmanager
def new_store() -> Iterator[None]:
    """Where torchrun has started all processes again, meet at a place of its own in the store.

    torchrun keeps its store, and with it the addresses at which the processes before could be reached: who is early
    would wait for one of those. Of several machines each counts its restarts for itself, so there the place stays.
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
    """Start the watch of this process; called when all processes have met."""
    token = trainer.strategy.broadcast(uuid.uuid4().hex)
    timeout = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
    still = PART_OF_TIMEOUT * timeout.total_seconds()
    own = Peers(folder, token, trainer.global_rank, trainer.world_size, silent, still)
    if own.rank == 0:
        # Others may have written by now: those of this token stay.
        own.clear()
    own.write()
    CURRENT[:] = [own]
    Watcher(own).start()


def wait_for_others(folder: Path, met: threading.Event) -> None:
    """Before the processes have met: one that fails, or failed before this one was here, is not waited for."""
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
    """One line (69) where another program has the port at which the processes were to meet."""
    if "EADDRINUSE" not in str(error):
        return None
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "?")
    todo = "Choose another (MASTER_PORT, torchrun --master-port), or let torchrun find one (--standalone)"
    return UserError(f"port {port}", f"is taken on {address} by another program", todo, ExitCode.UNAVAILABLE)


def child_ended(observer: subprocess_script._ChildProcessObserver) -> None:
    """A process that Lightning started has failed: leave this one the time to say why; Lightning kills it at once."""
    time.sleep(peers.WITHIN + GRACE)
    # A negative code is the signal that ended a process.
    codes = [child.returncode for child in observer._child_processes if child.returncode]
    for child in observer._child_processes:
        child.send_signal(observer._termination_signal)
    os._exit(codes[0] if 0 < codes[0] < 128 else int(ExitCode.UNAVAILABLE))
