"""Every plug-in found, whoever wrote it; and plug-ins that appear in a copy of the tree and in another package."""

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from maskvlm.cli.lightning import LightningCommand, Parsed, run_command
from maskvlm.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted(path.parent.name for path in (ROOT / "tasks").glob("*/task.py"))
QUICK = ("retrieval", "vqa")
EACH = [pytest.param(task, marks=[] if task in QUICK else [pytest.mark.slow]) for task in TASKS]
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


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_its_configurations_parse(settings: Path) -> None:
    assert {"retrieval", "vqa", "nlvr", "entailment", "captioning"} <= set(TASKS)
    parsed = run_command(Parsed, ["fit", *stack(settings)]).settings
    assert parsed.model.task.class_path.startswith(f"tasks.{settings.parent.name}.")
    assert (parsed.data.init_args.steps is None) != (parsed.data.init_args.epochs is None)


@pytest.mark.parametrize("task", EACH)
def test_it_trains_a_step_and_evaluates_on_its_own_sample(task: str, tmp_path: Path) -> None:
    options = [*SMALL, "--data.steps", "1", "--trainer.fast_dev_run", "1", "--run", str(tmp_path)]
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


def write(folder: Path, package: str) -> None:
    """The files of the example in tasks/README.md, as that page gives them, for a package of any name."""
    text = (ROOT / "tasks" / "README.md").read_text()
    files = re.findall(r"```(?:python|yaml)\n# tasks/counting/(\S+)\n(.*?)```", text, re.DOTALL)
    assert sorted(name for name, _ in files) == ["conf.yaml", "data.py", "task.py"]
    folder.mkdir(parents=True)
    for name, content in (("__init__.py", ""), *files):
        (folder / name).write_text(content.replace("tasks.counting", package))


@pytest.mark.slow
def test_a_folder_is_all_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of tasks/README.md, word by word, in a package that Python finds: trained, and measured again."""
    write(tmp_path / "emca" / "counting", "emca.counting")
    (tmp_path / "emca" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["where=cpu", "--data.batch_size", "8", "--data.source.train", "40", "--data.source.val", "12"]
    assert main(["finetune", "emca.counting", "from=random", "run=r", *words, "--data.steps", "2"]) == 0
    assert main(["evaluate", "emca.counting", "from=checkpoints/r/best.ckpt", "run=e", *words]) == 0
    measured = []
    for run in ("r", "e"):
        folder = tmp_path / "checkpoints" / run
        measured.append(json.loads((folder / "metrics.json").read_text()))
        assert 0 <= measured[-1]["counting/accuracy"] <= 100
        assert len((folder / "predictions.jsonl").read_text().splitlines()) == 12
        assert json.loads((folder / "card.json").read_text())["images of the split seen in training"] == 0
    assert measured[0]["counting/mean_error"] == measured[1]["counting/mean_error"]
