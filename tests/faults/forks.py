"""Runs the command in forks of one process that has everything imported: a real process in tenths of a second.

    with Forks() as forks:
        child = forks.start(words, log, env={"RANK": "1"}, build=build, settings={"maskvlm.data.workers:PATIENCE": 2})
        child.wait(30)  # its exit status, negative for a signal

A fork ends as a process of its own does: through the interpreter's end, with what libraries do there.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from guards import Build, without

ROOT = Path(__file__).resolve().parents[2]
STACK = ("base", "model/tiny", "pretrain", "pretrain-tiny", "data/scenes", "where/cpu")
SMALL: dict[str, Any] = {
    "data.batch_size": 8,
    "data.source.train": 60,
    "data.source.val": 6,
    "data.source.test": 6,
    "model.task.rerank_k": 4,
    "model.task.weight_words": 0,
    "model.task.decoder_layers": 1,
    "model.backbone.cross_layers": 1,
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
    "trainer.log_every_n_steps": 1,
}
TRAINER_CONFIG = """
trainer:
  logger: [{class_path: maskvlm.training.csv_log.RunLog, init_args: {save_dir: "{run}", name: "", version: ""}}]
  callbacks:
  - {class_path: maskvlm.training.run_record.RunRecord}
  - {class_path: maskvlm.training.checkpointing.KeepState, init_args: {folder: "{run}", steps: 4, minutes: 10}}
"""
PAIR = ("--trainer.devices=2", "--trainer.strategy=ddp")


def small(folder: Path, *more: str, fault: str = "", at: int = 33) -> list[str]:
    """`fit` of a model that needs milliseconds a step; with a `fault` in a data worker at sample `at`."""
    config = folder.parent / "kept.yaml"
    config.write_text(TRAINER_CONFIG)
    stack = [word for name in STACK for word in ("-c", str(ROOT / "conf" / f"{name}.yaml"))]
    own = {key: value for key, value in SMALL.items() if not (fault and key.startswith("data.source"))}
    settings = [f"--{key}={value}" for key, value in own.items()]
    if fault:
        settings += ["--data.source=faulty.Faulty", f"--data.source.fault={fault}", f"--data.source.at={at}"]
    return ["fit", "--folder", str(folder), *stack, "-c", str(config), *settings, *more]


def environment() -> dict[str, str]:
    """Of processes that tests start: they find the program, the tests' guards and the faults."""
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests", Path(__file__).parent)))
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


class Forks:
    """The process that forks."""

    def __init__(self, *front: str) -> None:
        """front: the words of a command that starts it."""
        command = [*front, sys.executable, __file__]
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
        build: Build | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Child:
        build = build or Build()
        guard = [build.guard, build.gives]
        answer = self.ask(words=words, log=str(log), env=env or {}, guard=guard, settings=settings or {})
        return Child(self, answer["pid"], log)


def elastic(rank: int, port: int, world: int = 2) -> dict[str, str]:
    """The environment that torchrun gives to its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    return {name: str(value) for name, value in names.items()} | more


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
    guard, gives = question["guard"]
    if guard is None:
        sys.exit(main(question["words"]))
    with without(guard, gives):
        sys.exit(main(question["words"]))


def wait(pid: int, seconds: float) -> int | str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def serve() -> None:
    import maskvlm.cli.lightning
    import maskvlm.data.scenes.source
    import maskvlm.objectives.pretraining
    import maskvlm.training.step_guard  # noqa: F401

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
