"""The words of a command as the stack of files that they stand for."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from maskvlm.cli.commands import COMMANDS
from maskvlm.config import compose
from maskvlm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(compose.RUN_NAME, "when")


def composed(command: str) -> list[str]:
    name, *words = command.split()
    return COMMANDS[name].full(words)


def files(argv: list[str]) -> list[str]:
    """The YAML files of a command in their order, by their places without the ending."""
    return [file.removeprefix("conf/").removesuffix(".yaml") for flag, file in pairwise(argv) if flag == "-c"]


def value(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


# ---------------------------------------------------------------------- files and their order


@pytest.mark.parametrize(
    ("command", "first", "stack"),
    [
        ("pretrain model=compact data=flickr8k where=cpu run=x", ["fit", "--folder", "checkpoints/x"],
         "base model/compact pretrain pretrain-compact data/flickr8k where/cpu"),
        ("pretrain model=compact recipe=ours where=cpu run=x", ["fit", "--folder", "checkpoints/x"],
         "base model/compact pretrain recipe/ours data/scenes where/cpu"),
        ("pretrain", ["fit", "--folder"], "base model/tiny pretrain pretrain-tiny data/scenes where/auto"),
        ("pretrain model=compact where=cpu from=a/b.ckpt run=x", ["fit", "--folder", "checkpoints/x", "--from"],
         "base pretrain pretrain-compact data/scenes where/cpu continue continue-compact"),
        ("pretrain model=small where=cpu -c mine.yaml", ["fit"],
         "base model/small pretrain pretrain-small data/scenes where/cpu mine"),
        ("evaluate nlvr from=a/b.ckpt where=cpu run=x split=val", ["validate", "--folder", "checkpoints/x", "--from"],
         "base finetune tasks/nlvr/conf where/cpu"),
        ("finetune vqa data=daquar from=random model=small where=cpu", ["fit"],
         "model/small base finetune tasks/vqa/daquar where/cpu"),
        ("finetune vqa --from=a.ckpt", ["fit"], "base finetune tasks/vqa/conf where/auto"),
        ("index --from a.ckpt -c conf/base.yaml", ["index", "--from", "a.ckpt"], "base"),
    ],
)  # fmt: skip
def test_words_are_a_stack_of_files(command: str, first: list[str], stack: str) -> None:
    argv = composed(command)
    assert argv[: len(first)] == first
    assert files(argv) == stack.split()
    assert composed(f"{command} --model.lr 2") == [*argv, "--model.lr", "2"]  # options come last
    if "from=" in command:
        named = "--model.random_init" if "from=random" in command else "--from"
        assert value(argv, named) in ("a/b.ckpt", "a.ckpt", "true")


def test_a_set_is_a_folder_of_the_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/d")
    assert composed("data csv a/b.csv name=mine --look") == ["data", "csv", "a/b.csv", "--out", "/d/mine", "--look"]
    assert composed("data coco raw=/x") == ["data", "coco", "/x", "--out", "/d/coco"]
    assert composed("data-check coco --all") == ["data-check", "/d/coco", "--all"]
    assert composed("data-check some/folder") == ["data-check", "some/folder"]


def test_a_prepared_set_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pre-training, and for a task on images with captions; a set with settings of its own keeps them."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    for name in ("mine", "flickr8k"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    for command, file in (
        ("pretrain", "data/prepared"),
        ("finetune captioning from=x", "tasks/captioning/prepared"),
        ("finetune retrieval from=x", "tasks/retrieval/prepared"),
    ):
        argv = composed(f"{command} data=mine")
        assert file in files(argv)
        assert value(argv, "--data.source.root") == str(tmp_path / "mine")
        assert "--data.source.root" not in composed(f"{command} data=flickr8k")
    with pytest.raises(UserError, match="data=mine: is a prepared set"):
        composed("finetune vqa from=x data=mine")


# ---------------------------------------------------------------------- names of folders


def test_a_run_is_called_after_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of a run share its folder: those that it starts repeat its command at another time of day."""
    for command, name in (
        ("pretrain model=base data=coco recipe=ours", "pretrain-coco-base-ours"),
        ("finetune vqa data=daquar from=x", "finetune-vqa-daquar"),
        ("evaluate from=x", "evaluate-pretraining-scenes"),
    ):
        monkeypatch.delenv(compose.RUN_NAME, raising=False)
        folder = value(composed(command), "--folder")
        assert folder.startswith(f"checkpoints/{name}-")
        monkeypatch.setattr(compose, "moment", lambda: "later")
        assert value(composed(command), "--folder") == folder
        monkeypatch.undo()
        monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    for command, of_the_job in (("pretrain", True), ("evaluate from=x", False)):  # else results would be written over
        monkeypatch.delenv(compose.RUN_NAME, raising=False)
        assert value(composed(command), "--folder").endswith("-17") is of_the_job
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert value(composed("pretrain run=x"), "--folder") == "checkpoints/x"
    with pytest.raises(UserError, match="run=: torchrun"):
        composed("pretrain")


def test_code_of_the_working_directory_is_found_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks where a project is trained, packages where the command names one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(ROOT))])
    for folder in ("conf", "tasks", "acme"):
        (tmp_path / folder).mkdir()
    (tmp_path / "conf" / "base.yaml").touch()
    compose.find_tasks()
    compose.find_packages(["other.x.Y", ""])
    assert (sys.path[0], sys.path.count(str(tmp_path))) == (str(ROOT), 0)
    compose.find_packages(["acme.x.Y"])
    assert sys.path.pop() == str(tmp_path)
    compose.find_tasks(here=True)
    assert sys.path[:2] == [str(tmp_path), str(ROOT)]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("pretrain model=nope", "model=nope"),
        ("pretrain model=../base", "model=../base"),
        ("pretrain data=a/../coco", "data=a/../coco"),
        ("pretrain data=scenez", "did you mean scenes"),
        ("pretrain data=photos/pairs.csv", "maskvlm data csv raw=photos/pairs.csv"),
        ("pretrain modle=tiny", "modle=tiny"),
        ("pretrain model=tiny model=base", "given twice"),
        ("finetune", "no task"),
        ("evaluate vqa from=x split=train", "split=train"),
        ("finetune vqa from=x data=coco", "data=coco"),
        ("finetune vqa from=a.ckpt --from=b.ckpt", "from is given twice"),
        ("pretrain run=x --folder=y", "run=x"),
        ("pretrain run=../x", "run=../x"),
        ("pretrain encoders=nowhere", "encoders=nowhere"),
        ("index data=flickr8k from=x.ckpt --split train", "--split"),
        ("data coco", "raw="),
        ("data csv x name=..", r"name=.."),
    ],
)
def test_a_wrong_word_is_one_line(command: str, name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name)) as error:
        composed(command)
    assert "\n" not in str(error.value)
