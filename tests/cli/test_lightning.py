"""The command line: every wrong input is one line with its place and what to do, and its exit status."""

import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from torch.utils.data import DataLoader, Dataset

from maskvlm.cli import commands
from maskvlm.cli.main import main
from maskvlm.data.images import BadImage
from maskvlm.training.failure import FIRST, failed_first, report, user_line
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def fails(stack: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `fit` with the tiny stack and more; returns its one line on stderr, after checking the status and that no
    folder is left."""

    def call(*more: str, code: ExitCode = ExitCode.USAGE, yaml: str | None = None) -> str:
        extra = []
        if yaml is not None:
            (tmp_path / "mine.yaml").write_text(yaml)
            extra = ["-c", str(tmp_path / "mine.yaml")]
        status = main(["fit", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), *extra, *more])
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert len(error.splitlines()) == 1, error
        assert status == code
        assert not (tmp_path / "run" / "config-fit.yaml").exists()
        return error.removeprefix("error: ").rstrip()

    return call


# Options: the key itself is the place.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.task.image_mask_ratioo=3", "(did you mean model.task.image_mask_ratio?)"),
        ("--model.backbone.start scenes-tiny", "--model.backbone.start: has no effect"),
        ("--model.task.image_masking DrawnBlocks --model.task.image_mask_ratio 0.5", "image_mask_ratio: has no effect"),
        ("--trainer.max_epochs 0", "trainer.max_epochs: 0"),
        ("--trainer.check_val_every_n_epoch 2", "trainer.check_val_every_n_epoch: 2"),
        ("--trainer.limit_val_batches 0.5", "trainer.limit_val_batches: 0.5"),
        ("--trainer.max_steps 3 --data.steps 5", "--trainer.max_steps: beside --data.steps"),
        ("--data.steps=6 --trainer.val_check_interval=6 --model.warmup=7", "model.warmup: 7"),
        ("--data.steps=6 --trainer.val_check_interval=7", "trainer.val_check_interval: 7"),
        ("--model.lr fast", "--model.lr: fast does not fit"),
        ("--model.task nope.X", "class nope.X cannot be used"),
        ("--model.task.decoder_layers 0", "model.task.decoder_layers: 0"),
        ("--model.backbone.cross_heads 5", "model.backbone.cross_heads: 5 does not divide width 96"),
        ("--data.workers 99999", "data.workers: 99999 are too many"),
        ("--model.backbone.image.weights a.pth", "weights a.pth are given"),
        ("--trainer.strategy ddp_spawn", "trainer.strategy=ddp_spawn"),
        ("--data lightning.pytorch.LightningDataModule", "LightningDataModule does not fit"),
        ("--model.task tasks.nlvr.task.Nlvr", "data.source: it has no labels"),
        ("--data.source tasks.vqa.scenes.SceneQuestions", "data.source: SceneQuestions gives examples"),
    ],
)
def test_a_wrong_option_is_one_line(fails: Callable[..., str], words: str, message: str) -> None:
    assert message in fails(*words.split())


# Files: file and line are the place.
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a\nmodle:\n  lr: 1\n", "mine.yaml:3: modle.lr: unknown key (did you mean model.lr?)"),
        ("model:\n  lr: fast\n", "mine.yaml:2: model.lr: fast does not fit"),
        ("model:\n  lr: 1e-3\n  task: [1,\n  2\n", "mine.yaml:3: not YAML ("),
        ("model:\n  lr: 1\n  lr: 2\n", "mine.yaml:2: the key lr is given twice"),
        ("model:\n  lr: ${oc.env:NO_SUCH_VARIABLE}\n", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_wrong_line_of_a_file_is_named(fails: Callable[..., str], text: str, message: str) -> None:
    assert message in fails(yaml=text)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases that multiply"),
        ("model:\n  lr: ${nope}\n", "${nope} uses more than an environment variable"),
        ("a: &a [*a]\n", "an alias to the value it is in"),
        ("model: !!python/object/apply:os.system ['touch MARK']\n", "python/object/apply:os.system is not allowed"),
        ("x: " + "[" * 20_000, "nested too deeply"),
        ("x: " + "y" * 300_000, "are too many for a configuration file"),
    ],
    ids=["bomb", "interpolation", "loop", "apply", "deep", "huge"],
)
def test_hostile_yaml_is_refused_at_once(
    fails: Callable[..., str], text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert message in fails(yaml=text.replace("MARK", str(tmp_path / "mark")), code=ExitCode.REFUSED)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert not (tmp_path / "mark").exists()


PLUGIN = """
from pathlib import Path
from lightning.pytorch import Callback
Path({mark!r}).touch()
class Hello(Callback):
    def __init__(self, word: str = "hello"): self.word = word
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A package of somebody else's, under a new name, and the mark that importing it leaves."""
    name, mark = f"acme{uuid4().hex}", tmp_path / "mark"
    (tmp_path / "site" / name).mkdir(parents=True)
    (tmp_path / "site" / name / "__init__.py").write_text("")
    (tmp_path / "site" / name / "hello.py").write_text(PLUGIN.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return f"{name}.hello.Hello", mark


def test_a_file_may_not_name_foreign_code(fails: Callable[..., str], plugin: tuple[str, Path]) -> None:
    path, mark = plugin
    text = f"trainer:\n  callbacks:\n  - class_path: {path}\n"
    message = fails(yaml=text, code=ExitCode.REFUSED)
    assert f"mine.yaml:3: trainer.callbacks.class_path: class {path} is not one that a file may name" in message
    assert f"Add --allow-import {path.split('.')[0]}" in message
    assert not mark.exists()  # refused before it was imported


@pytest.mark.parametrize("how", ["file", "environment", "typed"])
def test_plug_ins_of_others_work(
    how: str, plugin: tuple[str, Path], stack: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, mark = plugin
    package = path.split(".")[0]
    file = tmp_path / "mine.yaml"
    file.write_text(f"trainer:\n  callbacks+:\n  - class_path: {path}\n")
    words = {
        "file": ["-c", str(file), "--allow-import", package],
        "environment": ["-c", str(file)],
        "typed": ["--trainer.callbacks+", path],
    }
    if how == "environment":
        monkeypatch.setenv("MASKVLM_ALLOW_IMPORT", f"other,{package}")
    assert main(["fit", *stack(), *words[how], "--print_config"]) == 0
    assert mark.exists()


def test_the_standard_library_is_nobodys_plug_in(fails: Callable[..., str]) -> None:
    assert "os.system" in fails("--model.task", "os.system", code=ExitCode.REFUSED)
    assert "torch.hub.load" in fails(yaml="model: {task: {class_path: torch.hub.load}}", code=ExitCode.REFUSED)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["fitt"], "fitt: no such command (did you mean fit?)", ExitCode.USAGE),
        (["vqa.scoer"], "vqa.scoer: no such tool (did you mean vqa.score?)", ExitCode.USAGE),
        (["os.path"], "os.path: no such tool", ExitCode.USAGE),
    ],
)
def test_files_and_commands_that_are_not_there(
    words: list[str], message: str, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    assert message in capsys.readouterr().err


def test_a_tasks_own_tool_has_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("tasks.vqa.score.main", lambda words: calls.append(words) or 3)
    monkeypatch.chdir(tmp_path)  # it is found from anywhere
    assert main(["vqa.score", "r.json", "a.json", "--run", "x", "--debug"]) == 3
    assert calls == [["r.json", "a.json", "--run", "x"]]


def test_a_failed_start_removes_nothing_of_a_folder_that_was_there(
    stack: Callable[..., list[str]], tmp_path: Path
) -> None:
    for name in ("config-fit.yaml", "notes.txt"):  # one of a run's own files, and one that is none
        (tmp_path / name).write_text("# mine\ndata: {}\n")
    words = ["fit", "--run", str(tmp_path), *stack(WHERE="cpu"), "--model.task.image_mask_ratio", "2"]
    assert main(words) == ExitCode.USAGE
    assert {path.name for path in tmp_path.iterdir()} >= {"config-fit.yaml", "notes.txt"}


def raising(error: BaseException) -> Callable[..., int]:
    def dispatch(*_: Any) -> int:
        raise error

    return dispatch


def test_a_bug_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.Command, "run", raising(ZeroDivisionError("division\nby zero")))
    assert main(["fit", "--run", str(tmp_path / "run")]) == ExitCode.OUR_BUG
    error = capsys.readouterr().err  # it was raised by this file, which is none of the project's code
    assert re.match(r"error: .*test_lightning\.py:\d+: ZeroDivisionError: division by zero\. Fix it there; ", error)
    assert "Traceback" in (tmp_path / "run" / "crash.txt").read_text()
    assert report(ZeroDivisionError("by zero"), tmp_path / "run") == ExitCode.OUR_BUG
    assert "by zero. This is a bug; " in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands.Command, "run", raising(UserError("here", "wrong", "Mend it")))
    assert main(["fit", "--debug"]) == ExitCode.USAGE
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(commands.Command, "run", raising(KeyboardInterrupt()))
    for words, told in (([], "interrupted\n"), (["--run", str(tmp_path)], "before the first checkpoint")):
        assert main(["fit", *words]) == 130
        assert told in capsys.readouterr().err
    (tmp_path / "last.ckpt").touch()
    assert main(["fit", "--run", str(tmp_path)]) == 130
    assert "the same command resumes" in capsys.readouterr().err


class Bad(Dataset[int]):
    """Fails in the worker that reads it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise self.error


def test_a_mistake_found_in_a_data_worker_is_one_line() -> None:
    """Also a kind of it, which torch cannot build again from a text."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        next(iter(DataLoader(Bad(BadImage("x.jpg", "truncated", "half of it is missing")), num_workers=1)))
    line = user_line(caught.value)
    assert line is not None
    assert line.text.startswith("x.jpg: ")
    assert "\n" not in line.text
    assert line.code == ExitCode.BAD_DATA


def test_the_cause_is_told_once_by_whoever_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert report(UserError("data", "broken", "Mend it", ExitCode.BAD_DATA), tmp_path) == ExitCode.BAD_DATA
    assert capsys.readouterr().err == "error: [rank 1] data: broken. Mend it.\n"
    monkeypatch.setenv("RANK", "0")
    assert report(RuntimeError("Connection closed by peer"), tmp_path) == ExitCode.OUR_BUG
    assert capsys.readouterr().err == "[rank 0] see rank 1\n"
    assert (tmp_path / FIRST).exists()


def test_who_failed_first_is_of_this_job_and_known_while_the_file_is_still_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError("data", "broken", "Mend it", ExitCode.BAD_DATA)
    monkeypatch.setenv("RANK", "0")
    # Another process has created the file and not yet written its number.
    (tmp_path / FIRST).touch()
    other = threading.Timer(0.2, (tmp_path / FIRST).write_text, ["1 65\n"])
    other.start()
    report(error, tmp_path)
    other.join()
    assert capsys.readouterr().err == "[rank 0] see rank 1\n"
    # An earlier job had more processes.
    (tmp_path / FIRST).write_text("7 70\n")
    monkeypatch.setattr("maskvlm.training.failure.EARLIER", [failed_first(tmp_path)])
    report(error, tmp_path)
    assert capsys.readouterr().err == "error: data: broken. Mend it.\n"
