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
from PIL import Image

from maskvlm.cli.commands import COMMANDS, REGISTRY, WORDS, help_of, overview
from maskvlm.cli.lightning import COMMANDS as LIGHTNING_COMMANDS
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


def test_help_of_a_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    output = capsys.readouterr().out
    assert " ".join(tasks()) in output
    assert " ".join(choices("model")) in output
    assert output.strip() == help_of(COMMANDS["finetune"])


def test_help_of_a_task_has_the_data_sets_of_that_task(capsys: pytest.CaptureFixture[str]) -> None:
    """Not those of pre-training, which it would refuse."""
    assert main(["finetune", "vqa", "--help"]) == 0
    output = capsys.readouterr().out
    assert f"of vqa: {' '.join(sets_of('vqa'))}" in output
    assert "of nlvr" not in output
    assert "coco" not in output
    assert "of nlvr" in help_of(COMMANDS["finetune"])
    assert "coco" in help_of(COMMANDS["evaluate"])  # which measures pre-training, too


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("pretrain", "from=     checkpoint file, Hugging Face folder or hub name to start from\n"),
        ("finetune", "random weights, as a control (default: scenes-tiny)"),
        ("finetune", "model=    with from=random"),
        ("evaluate", "with a task also random (default: scenes-tiny)"),
        ("index", "split=    split to read: train val test all (default: val)"),
        ("embed", "from=     checkpoint file, Hugging Face folder or hub name (default: scenes-tiny)"),
    ],
)
def test_help_of_a_word_is_that_of_the_command(command: str, told: str) -> None:
    """`random` is for tasks alone, `train` and `all` for what only reads images."""
    assert told in help_of(COMMANDS[command])
    assert ("random" in help_of(COMMANDS[command])) == (command in ("finetune", "evaluate"))


def test_help_says_where_vectors_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    for command, folder in (("embed", "checkpoints/vectors"), ("index", "checkpoints/index")):
        assert main([command, "--help"]) == 0
        assert f"{folder}-DATA-SPLIT" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_of_lightnings_commands_begins_with_a_whole_sentence(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    usage, about, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith("usage: maskvlm [options] " + command)
    assert about == LIGHTNING_COMMANDS[command]


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
    stderr = capsys.readouterr().err
    assert "needs a model fine-tuned on entailment" in stderr
    assert "maskvlm finetune entailment" in stderr


def test_a_file_where_a_command_belongs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scene.png"]) == ExitCode.USAGE
    assert "no such tool" in capsys.readouterr().err
    Path("scene.png").touch()
    assert main(["scene.png"]) == ExitCode.USAGE
    assert "scene.png: a file, not a command. Write the command first" in capsys.readouterr().err


def complete(*words: str) -> list[str]:
    """What bash offers for the last of these words, as it takes them apart."""
    from maskvlm.cli.completion import main as script

    quoted = " ".join(f"'{word}'" for word in words)
    code = f"{script([], [])}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _maskvlm; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("maskvlm", "pre"), ["pretrain", "preview"]),
        (("maskvlm", "pretrain", "mo"), ["model="]),
        (("maskvlm", "pretrain", "model", "=", "ti"), ["tiny"]),
        (("maskvlm", "evaluate", "split", "="), ["val", "test"]),
        (("maskvlm", "embed", "split", "="), ["train", "val", "test"]),
        (("maskvlm", "study", "cl"), ["claims", "claims-photographs"]),
        (("maskvlm", "pretrain", "data", "=", "pre"), []),
        (("maskvlm", "finetune", "v"), ["vqa"]),
        (("maskvlm", "finetune", "vqa", "data", "=", "d"), ["daquar"]),
        (("maskvlm", "pretrain", "data", "=", "flickr"), ["flickr30k", "flickr8k"]),
        (("maskvlm", "caption", "x"), []),
    ],
)
def test_bash_completes(words: tuple[str, ...], offered: list[str]) -> None:
    assert complete(*words) == offered


def test_bash_completes_prepared_sets_where_they_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").touch()
    for words in (("pretrain",), ("finetune", "retrieval"), ("finetune", "captioning")):
        assert complete("maskvlm", *words, "data", "=", "mi") == ["mine"]
    assert complete("maskvlm", "finetune", "vqa", "data", "=", "mi") == []


def test_bash_completes_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "best.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    paths = [f"checkpoints/{name}/best.ckpt" for name in ("first", "second")]
    assert sorted(complete("maskvlm", "finetune", "vqa", "from", "=")) == paths


def test_bash_completes_sets_that_were_prepared_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").touch()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert complete("maskvlm", "pretrain", "data", "=", "mi") == ["mine"]
    assert complete("maskvlm", "data-check", "name", "=") == ["mine"]


def test_help_of_a_method_that_tasks_may_bring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answer", "--help"]) == 0
    assert "maskvlm answer [--from CHECKPOINT]" in capsys.readouterr().out
    assert main(["captoin", "--help"]) == 2
    assert "did you mean caption?" in capsys.readouterr().err


def test_names_and_options_of_a_checkpoint_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`from=` is `--from` to a method, too."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")  # told first where it does not open
    for option in (["from=no.ckpt"], ["--from", "no.ckpt"]):
        assert main(["fill", *option, str(tmp_path / "a.png"), "[MASK]"]) == 66
        assert "no.ckpt" in capsys.readouterr().err


def test_a_text_that_begins_so_names_no_checkpoint() -> None:
    assert common(["match", "--from", "a.ckpt", "x.png", "from=home"])[1][-1] == "from=home"
    assert common(["match", "from=a.ckpt", "x.png", "from=home"])[1] == [
        "match",
        "--from",
        "a.ckpt",
        "x.png",
        "from=home",
    ]


@pytest.mark.parametrize(
    "words",
    [
        "caption --from x.ckpt a.png", "answer --from x.ckpt a.png what", "search --index x --from x.ckpt dog",
        "convert x.ckpt y", "export --from x.ckpt y", "embed --from x.ckpt", "vqa.score a.json b.json",
    ],
)  # fmt: skip
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


def test_what_lightning_calls_otherwise_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--from", "x.ckpt"]) == 2
    assert capsys.readouterr().err.startswith("error: predict: no such command. `evaluate` keeps every prediction")


def test_the_version_is_told_installed_or_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "maskvlm 1.2.3\n"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "maskvlm, not installed\n"


def test_a_word_that_is_no_command_needs_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answr", "x.png"]) == 2
    assert capsys.readouterr().err.startswith("error: answr: no such command. Available: pretrain, ")


@pytest.mark.parametrize("words", ["--model.backbone.image.feature_cache null", "--model.backbone.text.tokenizer=null"])
def test_null_is_no_text(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an option of a class within a class, where a text fits, too: a folder called None would be made."""
    assert main(["config", *words.split()]) == 0
    backbone = yaml.safe_load(capsys.readouterr().out)["model"]["backbone"]["init_args"]
    assert backbone["image"]["init_args"]["feature_cache"] is None
    assert backbone["text"]["init_args"]["tokenizer"] is None


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ("", {"steps": 4500, "epochs": None}),
        ("--data.epochs 3", {"steps": None, "epochs": 3.0}),
        ("--data.steps=20", {"steps": 20, "epochs": None}),
        ("model=compact data=flickr8k", {"steps": None, "epochs": 12.8}),
        ("model=compact data=flickr8k --data.steps 20", {"steps": 20, "epochs": None}),
    ],
)
def test_a_printed_configuration_has_one_length(
    words: str, length: dict[str, float | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with two would be refused when it is given back."""
    monkeypatch.chdir(ROOT)
    assert main(["config", *words.split()]) == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert {name: data[name] for name in length} == length
