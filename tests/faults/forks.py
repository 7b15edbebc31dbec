"""Runs the command in forks of one process that has everything imported: a real process in tenths of a second.

    with Forks() as forks:
        child = forks.start(words, log, env={"RANK": "1"}, settings={"maskvlm.data.workers:PATIENCE": 2})
        child.wait(30)  # its exit status, negative for a signal

A fork ends as a process of its own does: through the interpreter's end, with what libraries do there.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAIR = ("--trainer.devices=2", "--trainer.strategy=ddp")


def small(folder: Path, *more: str) -> list[str]:
    """`fit` of a model that needs milliseconds a step."""
    from bench.kills import command

    simple = ("--data.augment=false", "--model.task.negative_queue=0", "--trainer.val_check_interval=1.0")
    words = command(folder, 0, simple)
    words[words.index("--run")] = "--folder"  # torchrun would take `--run` for an option of its own
    return [*words, *more]


def environment() -> dict[str, str]:
    """Of processes that tests start: they find the program and the faults."""
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT, Path(__file__).parent)))
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return os.environ | more


class Child(NamedTuple):
    """A process that a `Forks` has started."""

    forks: "Forks"
    pid: int
    log: Path

    def wait(self, seconds: float) -> int | str:
        """Its exit status, negative for a signal; `hangs` where it did not end, and was killed."""
        return self.forks.ask(wait=self.pid, seconds=seconds)["code"]  # type: ignore[no-any-return]

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def output_lines(self, *starts: str) -> list[str]:
        """The lines of its output that begin so."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith(starts)]


Pair = tuple[Child, Child]


def ends(children: Iterable[Child], seconds: float) -> list[int | str]:
    """Exit statuses; `hangs` of one that lives for longer."""
    until = time.monotonic() + seconds
    return [child.wait(max(0.1, until - time.monotonic())) for child in children]


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment(), text=True, cwd=ROOT, **pipes)  # type: ignore[call-overload]

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def ask(self, **question: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(
        self,
        words: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        spoil: dict[str, Any] | None = None,
    ) -> Child:
        """Start the command. settings: attributes of modules, by `module:name`; spoil: see `faulty.spoil`."""
        answer = self.ask(words=words, log=str(log), env=env or {}, settings=settings or {}, spoil=spoil or {})
        return Child(self, answer["pid"], log)

    def start_two(self, words: list[str], folder: Path, port: int = 0, spoil: dict[str, Any] | None = None) -> Pair:
        """Two processes of one run, as torchrun starts them; their output is in `folder`."""
        from bench.kills import elastic, free_port

        port = port or free_port()
        first, second = (self.start(words, folder / f"rank{n}.txt", elastic(n, port), spoil=spoil) for n in (0, 1))
        return first, second


# ---------------------------------------------------------------------- the process that forks


def child(question: dict[str, Any]) -> None:
    """Ends as the command does."""
    import torch

    from maskvlm.cli.main import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(question["env"])
    torch.set_num_threads(1)
    for name, value in question["settings"].items():
        module, _, attribute = name.partition(":")
        setattr(importlib.import_module(module), attribute, value)
    importlib.import_module("faulty").spoil(**question["spoil"])
    sys.exit(main(question["words"]))


def wait(pid: int, seconds: float) -> int | str:
    from bench.kills import wait

    try:
        return wait(pid, seconds)
    except TimeoutError:
        return "hangs"


def serve() -> None:
    importlib.import_module("bench.kills")  # and with it what a run imports
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer: dict[str, Any] = {"code": wait(question["wait"], question["seconds"])}
        else:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                child(question)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
