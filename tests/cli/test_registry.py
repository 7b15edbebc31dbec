"""The registry of commands, and what reads it: help, docs, completion, dispatch."""

import importlib
import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskvlm.cli.commands import COMMANDS, REGISTRY, WORDS, help_of, overview
from maskvlm.cli.main import common, main
from maskvlm.config.compose import choices, sets_of, tasks
from maskvlm.objectives.methods import TASK_METHODS
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_has_something_to_call() -> None:
    assert len(COMMANDS) == len(REGISTRY)
    for command in REGISTRY:
        assert command.target or command.compose
        if command.target:
            module, _, function = command.target.partition(":")
            assert callable(getattr(importlib.import_module(module), function))
        assert set(command.words) <= WORDS.keys()


def test_help_and_the_page_have_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert overview() in page
    for command in REGISTRY:
        assert f"  {command.name} " in output
        assert command.compose is None or f"`{command.usage}`" in page


def test_help_of_a_command_lists_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    output = capsys.readouterr().out
    assert " ".join(tasks()) in output
    assert " ".join(choices("model")) in output
    assert output.strip() == help_of(COMMANDS["finetune"])
    assert main(["finetune", "vqa", "--help"]) == 0
    output = capsys.readouterr().out
    assert f"of vqa: {' '.join(sets_of('vqa'))}" in output
    assert "of nlvr" not in output
    assert main(["captoin", "--help"]) == 2


def test_methods_of_tasks_are_those_that_the_tasks_bring(capsys: pytest.CaptureFixture[str]) -> None:
    brought = {
        name: task
        for task in tasks()
        for module in [importlib.import_module(f"tasks.{task}.task")]
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Task) and kind.__module__ == module.__name__
        for name in kind(**({"labels": ["a", "b"]} if "labels" in inspect.signature(kind).parameters else {})).methods
        if name not in COMMANDS
    }
    assert brought == TASK_METHODS
    assert main(["entail", "scene.png", "there is a star"]) == ExitCode.USAGE
    assert "needs a model fine-tuned on entailment" in capsys.readouterr().err


def test_names_and_options_of_a_checkpoint_are_one() -> None:
    """`from=` is `--from` to a method, too; a text that begins so names no checkpoint."""
    asked = ["match", "--from", "a.ckpt", "x.png", "from=home"]
    assert common(asked)[1] == asked
    assert common(["match", "from=a.ckpt", "x.png", "from=home"])[1] == asked


@pytest.mark.slow
@pytest.mark.parametrize("words", ["caption --from x.ckpt a.png", "vqa.score a.json b.json"])
def test_no_code_of_a_strangers_folder_runs_where_a_model_is_asked(words: str, tmp_path: Path) -> None:
    """Not even where it looks like this project, and holds what may not be installed."""
    for name in ("conf/base.yaml", "tasks/__init__.py", "tasks/vqa/__init__.py", "tasks/vqa/score.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("open('marker', 'w')\n\n\ndef main(words): ...\n" if name.endswith(".py") else "")
    (tmp_path / "a.png").touch()  # one that is not there is told before the model is looked at
    for name in ("faiss", "onnx", "torch", "yaml", "x"):
        (tmp_path / f"{name}.py").write_text("open('marker', 'w')\n")
    code = f"import sys; sys.path.remove(''); from maskvlm.cli.main import end_of; sys.exit(end_of({words.split()}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode in (2, 65, 66, 69), done.stderr
    assert not (tmp_path / "marker").exists()


def test_a_printed_configuration_has_one_length(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with two would be refused when it is given back."""
    monkeypatch.chdir(ROOT)
    for words, epochs in (("", None), ("--data.epochs 3", 3.0), ("model=compact data=flickr8k --data.steps 20", None)):
        assert main(["config", *words.split()]) == 0
        data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
        assert data["epochs"] == epochs
        assert (data["steps"] is None) == (epochs is not None)
