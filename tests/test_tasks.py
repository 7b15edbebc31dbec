"""Every plug-in found, whoever wrote it; and plug-ins that appear in a copy of the tree and in another package."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from maskvlm.cli.lightning import LightningCommand, Parsed, run_command
from maskvlm.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted(path.parent.name for path in (ROOT / "tasks").glob("*/task.py"))
SETTINGS = sorted(path.relative_to(ROOT) for path in (ROOT / "tasks").glob("*/*.yaml"))
SMALL = ["--data.batch_size", "8", "--data.eval_batch_size", "8", "--data.workers", "0", "--data.epochs", "null"]


class Gradients(L.Callback):
    """Names of the task's parameters that had a gradient in some step."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.task.named_parameters()
        self.names |= {name for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


class Watched(LightningCommand):
    """A command whose gradients are looked at."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        self.moved = Gradients()
        trainer.callbacks.append(self.moved)  # type: ignore[attr-defined]
        return trainer


def stack(settings: Path | str) -> list[str]:
    files = ("conf/model/tiny.yaml", "conf/base.yaml", "conf/finetune.yaml", settings, "conf/where/cpu.yaml")
    return [word for file in files for word in ("-c", str(file))]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_four_are_there() -> None:
    assert {"retrieval", "vqa", "nlvr", "entailment"} <= set(TASKS)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_its_configurations_parse(settings: Path) -> None:
    parsed = run_command(Parsed, ["fit", *stack(settings)]).settings
    assert parsed.model.task.class_path.startswith(f"tasks.{settings.parent.name}.")
    assert (parsed.data.init_args.steps is None) != (parsed.data.init_args.epochs is None)


@pytest.mark.parametrize("task", TASKS)
def test_it_trains_two_steps_on_its_own_sample(task: str, tmp_path: Path) -> None:
    options = [*SMALL, "--data.steps", "2", "--trainer.fast_dev_run", "2", "--run", str(tmp_path)]
    options += ["--model.random_init", "true"]
    done = run_command(Watched, ["fit", *stack(f"tasks/{task}/conf.yaml"), *options])
    model, data = done.model, done.datamodule
    assert data.spec[:5] == model.backbone.input_spec[:5]  # the tokenizer came after it
    assert data.labels is None or tuple(model.task.labels) == tuple(data.labels)
    assert {name for name, _ in model.task.named_parameters()} - done.moved.names == set(), "no gradient"
    metrics = {name: float(value) for name, value in model.metrics.items()}
    assert "score" in metrics
    assert any(name.startswith(f"{task}/") for name in metrics)
    # Of a class or kind (`nlvr/accuracy/left`) that none of the sixteen examples belongs to there is no number.
    assert [name for name, value in metrics.items() if not math.isfinite(value) and name.count("/") < 2] == []


# ------------------------------------------------------------------ somebody else's


def blocks(package: str) -> dict[str, str]:
    """The files of the example in tasks/README.md, as that page gives them, for a package of any name."""
    text = (ROOT / "tasks" / "README.md").read_text()
    files = re.findall(r"```(?:python|yaml)\n# tasks/counting/(\S+)\n(.*?)```", text, re.DOTALL)
    assert sorted(name for name, _ in files) == ["conf.yaml", "data.py", "task.py"]
    return {name: content.replace("tasks.counting", package) for name, content in files}


def write(folder: Path, package: str) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for name, content in blocks(package).items():
        (folder / name).write_text(content)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as somebody has it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("src", "tasks", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", folder)
    return folder


def make(folder: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = ["make", *words, f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


TINY = "--data.steps 2 --data.batch_size 8 --data.source.train 40 --data.source.val 12"


def check_run(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["counting/accuracy"] <= 100
    assert metrics["counting/mean_error"] >= 0
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 12
    assert (folder / "examples.png").stat().st_size > 1000
    assert json.loads((folder / "card.json").read_text())["images of the split seen in training"] == 0


def test_a_folder_is_all_it_takes(copy: Path) -> None:
    """The example of tasks/README.md, word by word: found, listed, trained, measured; no other file is touched."""
    write(copy / "tasks" / "counting", "tasks.counting")
    assert "counting" in make(copy, "help").stdout
    done = make(copy, "finetune", "TASK=counting", "FROM=random", "RUN=r", "WHERE=cpu", f"ARGS={TINY}")
    assert done.returncode == 0, done.stderr
    check_run(copy / "checkpoints" / "r")
    start = "FROM=checkpoints/r/best.ckpt"
    again = make(copy, "evaluate", "TASK=counting", start, "RUN=e", "WHERE=cpu", f"ARGS={TINY}")
    assert again.returncode == 0, again.stderr
    check_run(copy / "checkpoints" / "e")
    both = [json.loads((copy / "checkpoints" / name / "metrics.json").read_text()) for name in ("r", "e")]
    assert both[0]["counting/accuracy"] == both[1]["counting/accuracy"]


def test_a_task_of_an_installed_package(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is found where Python finds packages."""
    write(tmp_path / "emca" / "counting", "emca.counting")
    (tmp_path / "emca" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(copy)
    assert main(["finetune", "emca.counting", "from=random", "run=a", "where=cpu", *TINY.split()]) == 0
    check_run(copy / "checkpoints" / "a")


def test_a_package_that_is_not_there(copy: Path) -> None:
    done = make(copy, "finetune", "TASK=acme.nothing", "FROM=random")
    assert done.returncode == 2
    assert "error: task acme.nothing: no such task" in done.stderr
