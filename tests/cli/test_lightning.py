"""The command line: every wrong input is one line with its place and what to do, and its exit status."""

import os
import random
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch
from jsonargparse import Namespace
from torch.utils.data import DataLoader, Dataset

from maskvlm.cli import commands
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.cli.main import main
from maskvlm.cli.run_length import check_interval, explain_interval_error, set_length
from maskvlm.config.compose import task_folder
from maskvlm.config.parser import option_names
from maskvlm.config.safe_yaml import check_yaml
from maskvlm.data.images import BadImage
from maskvlm.training.failure import FIRST, failed_first, report, user_line
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def fails(stack: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `fit` with the tiny stack and more; returns its one line on stderr, after checking the status."""

    def call(*more: str, code: ExitCode = ExitCode.USAGE, yaml: str | None = None) -> str:
        extra = []
        if yaml is not None:
            (tmp_path / "mine.yaml").write_text(yaml)
            extra = ["-c", str(tmp_path / "mine.yaml")]
        status = main(["fit", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), *extra, *more])
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert len(error.splitlines()) == 1, error
        assert "Traceback" not in error
        assert status == code
        return error.removeprefix("error: ").rstrip()

    return call


def test_what_a_data_set_says_of_its_arguments_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A source may be of two kinds, and the parser keeps the complaint of the first."""
    for task, option, message in (
        ("nlvr", "test 6", "SceneComparisons.test: 6 examples. Use a multiple of 4"),
        ("entailment", "val -1", "SceneHypotheses.val: -1 is too small"),
    ):
        words = ["finetune", task, "from=random", "where=cpu", f"run=never-{task}", *f"--data.source.{option}".split()]
        assert main(words) != 0
        assert f"error: {message}" in capsys.readouterr().err
        assert not Path("checkpoints", f"never-{task}").exists()


def test_a_warm_up_longer_than_what_it_warms_is_told(fails: Callable[..., str]) -> None:
    message = fails("--data.steps=6", "--trainer.val_check_interval=6", "--model.warmup=7")
    assert message == "model.warmup: 7, but the run has 6 steps. Give at most 6, or a share."
    words = ["--data.steps=6", "--trainer.val_check_interval=6", "--model.task.contrast_first=0.5"]
    message = fails(*words, "--model.warmup=4")
    what = "4, but the run has 6 steps, of which 3 are left for the losses that start after contrast_first"
    assert message == f"model.warmup: {what}. Give at most 3, or a share."


def test_a_pass_that_is_typed_is_a_pass() -> None:
    """One is also what Lightning is always given, so only what was typed tells them apart."""
    for typed, steps, epochs in (({"trainer.max_epochs"}, None, 1.0), (set(), 100, None)):
        settings = Namespace(
            trainer=Namespace(max_steps=-1, max_epochs=1, fast_dev_run=False),
            data=Namespace(init_args=Namespace(steps=100, epochs=None)),
        )
        set_length(settings, typed)
        assert (settings.data.init_args.steps, settings.data.init_args.epochs) == (steps, epochs)


def test_an_evaluation_after_the_end_is_told(fails: Callable[..., str]) -> None:
    message = fails("--data.steps=6", "--trainer.val_check_interval=7")
    assert message == "trainer.val_check_interval: 7, but the run has 6 batches. Give at most 6, or 1.0: at the end."
    settings = SimpleNamespace(
        data={"init_args": {"steps": 3}},
        trainer=SimpleNamespace(
            val_check_interval=7, accumulate_grad_batches=2, limit_val_batches=None, check_val_every_n_epoch=1,
            fast_dev_run=False,
        ),
    )  # fmt: skip
    with pytest.raises(UserError, match="7, but the run has 6 batches"):
        check_interval(settings)  # type: ignore[arg-type]
    # Lightning takes these: nothing is evaluated, or not by batches of an epoch, or the whole is a trial.
    for key, value in (
        ("val_check_interval", 6),
        ("val_check_interval", 1.0),
        ("limit_val_batches", 0),
        ("check_val_every_n_epoch", None),
        ("fast_dev_run", True),
    ):
        trainer = SimpleNamespace(**{**vars(settings.trainer), key: value})
        check_interval(SimpleNamespace(data=settings.data, trainer=trainer))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="9, but the run has 8 batches"), explain_interval_error():
        raise ValueError(
            " `val_check_interval` (9) must be less than or equal to the number of the training batches (8)."
        )
    with pytest.raises(ValueError, match="other"), explain_interval_error():
        raise ValueError("other")


# Options: the key itself is the place.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.lrr 3", "--model.lrr: unknown key (did you mean model.lr?)"),
        ("--model.task.image_mask_ratioo=3", "(did you mean model.task.image_mask_ratio?)"),
        ("--model.backbone.image.nam x", "(did you mean model.backbone.image.name?)"),
        ("--data.batch_siz 3", "(did you mean data.batch_size?)"),
        ("--data.source.trian 3", "(did you mean data.source.train?)"),
        ("--lr 3", "(did you mean model.lr?)"),
        ("--image_mask_ratio 0.7", "(did you mean model.task.image_mask_ratio?)"),
        ("--trainer.max_step 3", "(did you mean trainer.max_steps?)"),
        ("--optimizer AdamW", "--optimizer: not a key of this command. AdamW is the model's own: set model.lr"),
        ("--lr_scheduler.init_args.T_max 3", "Warm-up and cosine are the model's own"),
        ("--model.backbone.start scenes-tiny", "--model.backbone.start: has no effect: another option sets"),
        ("--model.backbone.init_args.image.init_args.random_init=false", "Give --model.random_init"),
        (
            "--model.task.image_masking DrawnBlocks --model.task.image_mask_ratio 0.5",
            "--model.task.image_mask_ratio: has no effect: image_masking is DrawnBlocks",
        ),
        (
            "--model.task.text_masking DrawnTokens --model.task.init_args.whole_word=true",
            "--model.task.whole_word: has no effect: text_masking is DrawnTokens",
        ),
        ("--data.seed 3", "Give --seed_everything"),
        ("--data.init_args.accumulate=3", "Give --trainer.accumulate_grad_batches"),
        ("--trainer.max_epochs 0", "trainer.max_epochs: 0 passes over the data"),
        ("--trainer.max_epochs -1", "trainer.max_epochs: -1 passes over the data"),
        ("--trainer.max_steps 0", "trainer.max_steps: 0 steps. Give 1 or more"),
        ("--trainer.check_val_every_n_epoch 2", "trainer.check_val_every_n_epoch: 2, but a run is one epoch"),
        ("--trainer.limit_val_batches 0.5", "trainer.limit_val_batches: 0.5 is a share"),
        ("--trainer.use_distributed_sampler true", "trainer.use_distributed_sampler: the data already distribute"),
        ("--trainer.max_epochs 2 --trainer.max_steps 3", "trainer.max_steps: beside 2 trainer.max_epochs"),
        ("--trainer.max_steps 3 --data.steps 5", "--trainer.max_steps: beside --data.steps. Give one of the two"),
        ("--trainer.max_epochs 3 --data.epochs 5", "--trainer.max_epochs: beside --data.epochs"),
        ("--data.steps 3 --data.epochs=5", "--data.epochs: beside --data.steps"),
        ("--data.steps 3 --data.epochs 5 --print_config", "--data.epochs: beside --data.steps"),
        ("--xyzzy 3", "--xyzzy: unknown key. Keys there: "),
        ("--model.lr fast", "--model.lr: fast does not fit. Give a number."),
        ("--data.batch_size 1.5", "--data.batch_size: 1.5 does not fit. Give a whole number."),
        (
            "--model.task.image_masking maskvlm.objectives.masking.ImageMasking",
            "is an abstract class. Define in it: __call__.",
        ),
        ("--model.task.pixel_loss l3", "l3 does not fit. Give one of l1, squared, smooth_l1."),
        ("--model.task.losses 3", "--model.task.losses: 3 does not fit. Give a list."),
        ("--data.augment flip", "--data.augment: flip does not fit. Give true, false or mirror."),
        ("--model.task nope.X", "--model.task: class nope.X cannot be used (No module named 'nope')"),
        (
            "--model.task maskvlm.objectives.pretraining.X",
            "module 'maskvlm.objectives.pretraining' has no attribute 'X'",
        ),
        ("--model.task torch.nn.Linear", "does not correspond to a subclass of Task"),
        ("--model.lr", "--model.lr: expected one argument"),
        ("--allow-import", "--allow-import: expected one argument"),
        ("stray", "stray: neither an option nor its value"),
        ("--model.task.image_mask_ratio 1.5", "model.task.image_mask_ratio: 1.5 is out of range"),
        ("--model.task.rerank_k -1", "model.task.rerank_k: -1 is too small. Give 1 or more."),
        ("--model.task.temperature 0", "model.task.temperature: 0.0 is beyond what training keeps it in"),
        ("--model.task.decoder_layers 0", "model.task.decoder_layers: 0 is too small"),
        ("--model.backbone.cross_layers 0", "model.backbone.cross_layers: 0 is too small"),
        ("--model.backbone.cross_heads 5", "model.backbone.cross_heads: 5 does not divide width 96"),
        ("--data.eval_batch_size 0", "data.eval_batch_size: 0 is too small"),
        ("--data.workers -1", "data.workers: -1 is too small. Give 0 or more."),
        ("--data.workers 99999", "data.workers: 99999 are too many for "),
        ("--model.lr -1", "model.lr: -1.0 is too small"),
        ("--model.betas [2,3]", "model.betas: [2.0, 3.0] are not decay rates"),
        ("--model.backbone.image.weights a.pth", "weights a.pth are given, and random_init is true"),
        ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val: -1 is too small. Give 0 or more."),
        ("--trainer.strategy ddp_spawn", "trainer.strategy=ddp_spawn: spawns or forks its processes, which"),
        (
            "--trainer.callbacks+ maskvlm.training.checkpointing.KeepState --trainer.callbacks.folder x",
            "trainer: Found more than one stateful callback of type `KeepState`",
        ),
        (
            "--trainer.callbacks+ lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor score "
            "--trainer.callbacks.mode best",
            "EarlyStopping: `mode` can be min, max, got best. Correct it in trainer",
        ),
        ("--data lightning.pytorch.LightningDataModule", "--data: lightning.pytorch.LightningDataModule does not fit"),
    ],
)
def test_a_wrong_option_is_one_line(fails: Callable[..., str], words: str, message: str) -> None:
    assert message in fails(*words.split())


def test_a_logger_without_its_package_is_no_bug(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one of Lightning's own whose package may be there."""

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("Requirement 'comet' not met")

    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger.__init__", missing)
    message = fails("--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir", "x")
    assert message.startswith("TensorBoardLogger: Requirement 'comet' not met")


# Files: file and line are the place.
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  hiden: 3\n", "mine.yaml:2: model.hiden: unknown key. Keys there: model.backbone, "),
        ("# a\nmodle:\n  lr: 1\n", "mine.yaml:3: modle.lr: unknown key (did you mean model.lr?)"),
        (
            "model:\n  task:\n    init_args:\n      text_mask_rati: 1\n",
            "mine.yaml:4: model.task.text_mask_rati: ",
        ),
        ("model:\n  lr: fast\n", "mine.yaml:2: model.lr: fast does not fit. Give a number."),
        (
            "model:\n  task:\n    losses:\n      class_path: acme.Length\n",
            "does not fit. Give a list: in a file, a dash before class_path; on the command line, [ ] around it.",
        ),
        ("model: {a: [1\n", "mine.yaml:1: not YAML ("),
        ("model:\n  lr: 1e-3\n  task: [1,\n  2\n", "mine.yaml:3: not YAML ("),
        ("model:\n  lr\n  seed: 1\n", "mine.yaml:3: not YAML ("),
        ('model:\n  lr: "1e-3\n  seed: 1\n', "mine.yaml:2: not YAML ("),
        ("model:\n  lr:1e-3\n", "model: lr:1e-3 does not fit. Write a space behind the colon: lr: 1e-3."),
        ("# nothing yet\n", "mine.yaml: is empty. Write keys into it"),
        ("- 1\n- 2\n", "mine.yaml:1: holds no `key: value` lines"),
        ("model:\n  lr: 1\n  lr: 2\n", "mine.yaml:2: the key lr is given twice"),
        ("model:\n  lr: ${oc.env:NO_SUCH_VARIABLE}\n", "Environment variable 'NO_SUCH_VARIABLE' not found"),
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
        (
            "model: !!python/object/apply:os.system ['touch MARK']\n",
            "python/object/apply:os.system is not allowed",
        ),
        ("model: !!python/name:os.system\n", "is not allowed"),
        ("model: !!binary aGVsbG8=\n", "is not allowed"),
        ("x: " + "[" * 20_000, "nested too deeply"),
        ("x: " + "y" * 300_000, "are too many for a configuration file"),
    ],
    ids=["bomb", "interpolation", "loop", "apply", "name", "binary", "deep", "huge"],
)
def test_hostile_yaml_is_refused_at_once(
    fails: Callable[..., str], text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert message in fails(yaml=text.replace("MARK", str(tmp_path / "mark")), code=ExitCode.REFUSED)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert not (tmp_path / "mark").exists()


def test_yaml_of_an_option_is_checked_too(fails: Callable[..., str]) -> None:
    loop = "&a [*a]"
    assert "an alias to the value" in fails("--model.betas", loop, code=ExitCode.REFUSED)


def test_plain_yaml_with_aliases_is_fine() -> None:
    assert check_yaml("a: &a {b: 1, c: [1.5, null, true]}\nd: *a\ne: *a\n", "x") is not None


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


@pytest.mark.parametrize("how", ["file and --allow-import", "file and environment", "typed"])
def test_plug_ins_of_others_work(
    how: str,
    plugin: tuple[str, Path],
    stack: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, mark = plugin
    (tmp_path / "mine.yaml").write_text(f"trainer:\n  callbacks+:\n  - class_path: {path}\n")
    words = ["-c", str(tmp_path / "mine.yaml")] if "file" in how else ["--trainer.callbacks+", path]
    if how == "file and --allow-import":
        words += ["--allow-import", path.split(".")[0]]
    elif how == "file and environment":
        monkeypatch.setenv("MASKVLM_ALLOW_IMPORT", f"other,{path.split('.')[0]}")
    assert main(["fit", *stack(), *words, "--print_config"]) == 0
    assert mark.exists()


def test_the_standard_library_is_nobodys_plug_in(fails: Callable[..., str]) -> None:
    assert "os.system is not one that a file may name" in fails("--model.task", "os.system", code=ExitCode.REFUSED)
    assert "torch.hub.load is not one" in fails(
        yaml="model: {task: {class_path: torch.hub.load}}", code=ExitCode.REFUSED
    )


def test_files_and_commands_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "conf/bse.yaml"]) == ExitCode.MISSING_INPUT
    assert "conf/bse.yaml: no such configuration file (did you mean conf/base.yaml?)" in capsys.readouterr().err
    assert main(["fitt"]) == ExitCode.USAGE
    assert "fitt: no such command (did you mean fit?)" in capsys.readouterr().err
    assert main(["fit"]) == ExitCode.USAGE
    assert "nothing sets model.backbone, model.task, data. Give the files with -c" in capsys.readouterr().err
    assert main([]) == 0
    assert "fit " in capsys.readouterr().out


def test_a_tasks_own_tool_has_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def tool(words: list[str]) -> int:
        calls.append(words)
        return 3

    monkeypatch.setattr("tasks.vqa.score.main", tool)
    assert main(["vqa.score", "r.json", "a.json", "--run", "x", "--debug"]) == 3
    assert calls == [["r.json", "a.json", "--run", "x"]]
    for name, message in (
        ("vqa.scoer", "vqa.scoer: no such tool (did you mean vqa.score?). Available: "),
        ("vqa.task", "vqa.task: no such tool"),  # a module of a task, but no tool
        ("os.path", "os.path: no such tool. Available: "),
    ):
        assert main([name]) == ExitCode.USAGE
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert "vqa.score" in error.split("Available: ")[1]
        assert len(error.splitlines()) == 1
    monkeypatch.chdir(tmp_path)  # they are found from anywhere
    assert main(["vqa.score"]) == 3


def test_the_folder_of_an_installed_package_is_found(plugin: tuple[str, Path], tmp_path: Path) -> None:
    path, mark = plugin
    name = path.partition(".")[0]
    assert task_folder(f"{name}.hello") == tmp_path / "site" / name
    assert not mark.exists()  # looked for, not imported
    for wrong in ("acme.nothing", f"{name}.nothing", "..x"):
        with pytest.raises(UserError, match="no such task") as error:
            task_folder(wrong)
        assert error.value.code == ExitCode.MISSING_INPUT


def test_data_without_labels_for_a_task_that_needs_some(fails: Callable[..., str]) -> None:
    message = fails("--model.task", "tasks.nlvr.task.Nlvr")
    todo = "Choose the task's own data; in a script give labels=data.labels."
    assert message == f"data.source: it has no labels for the task to predict. {todo}"


def test_data_of_another_kind_than_the_task_reads(fails: Callable[..., str]) -> None:
    message = fails("--data.source", "tasks.vqa.scenes.SceneQuestions")
    pairs, examples = "pairs of images and captions", "examples of a downstream task"
    assert (
        message
        == f"data.source: SceneQuestions gives {examples}, MaskedPretraining needs {pairs}. Choose data for the task."
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model.task.image_mask_ratio", "2"],  # while it is built
        ["--data.source", "tasks.vqa.scenes.SceneQuestions"],  # while it is set up
    ],
)
def test_a_failed_start_leaves_no_folder(fails: Callable[..., str], tmp_path: Path, wrong: list[str]) -> None:
    fails(*wrong)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    for name in ("config-fit.yaml", "notes.txt"):  # one of a run's own files, and one that is none
        (tmp_path / "run" / name).write_text("# mine\ndata: {}\n")
        fails(*wrong)
        assert (tmp_path / "run" / name).exists()


def test_a_card_that_is_not_there(fails: Callable[..., str]) -> None:
    devices = torch.cuda.device_count() + 3
    message = fails("--trainer.accelerator", "gpu", "--trainer.devices", str(devices), code=ExitCode.UNAVAILABLE)
    assert f"trainer.devices: found {devices - 3} of {devices} GPUs. Use where=cpu" in message


def typo(name: str, draw: random.Random) -> str:
    """One letter dropped, doubled, replaced, or swapped with its neighbour."""
    at = draw.randrange(1, len(name) - 1)
    return draw.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + draw.choice("abcdefghijklmnopqrstuvwxyz") + name[at + 1 :],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        ]
    )


def test_a_typo_finds_its_key(stack: Callable[..., list[str]]) -> None:
    arguments = ["fit", *stack(WHERE="cpu")]
    parsed = run_command(Parsed, arguments)
    top = {name for name in option_names(parsed._subcommand_parsers["fit"]) if name.startswith("trainer.")}
    task = {f"model.task.{name}" for name in vars(parsed.settings.model.task.init_args)}
    data = {f"data.{name}" for name in vars(parsed.settings.data.init_args)}
    draw, right, tried = random.Random(0), 0, 0
    keys = sorted(top | task | data)
    for key in draw.sample(keys, len(keys)):
        parent, _, last = key.rpartition(".")
        wrong = f"{parent}.{typo(last, draw)}"
        if tried == 20:
            break
        if len(last) < 4 or wrong in top | task | data or "help" in last:
            continue
        tried += 1
        with pytest.raises(UserError) as caught:
            run_command(Parsed, [*arguments, f"--{wrong}", "1"])
        right += f"(did you mean {key}?)" in str(caught.value)
    assert tried == 20
    assert right >= 0.95 * tried


def raising(error: BaseException) -> Callable[..., int]:
    def dispatch(*_: Any) -> int:
        raise error

    return dispatch


def test_a_bug_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.Command, "run", raising(ZeroDivisionError("division\nby zero")))
    assert main(["fit", "--run", str(tmp_path / "run")]) == ExitCode.OUR_BUG
    where = f"{tmp_path}/run/crash.txt"
    stderr = capsys.readouterr().err  # it was raised by this file, which is none of the project's code
    assert re.match(r"error: .*test_lightning\.py:\d+: ZeroDivisionError: division by zero\. Fix it there; ", stderr)
    assert "Traceback" in (tmp_path / "run" / "crash.txt").read_text()
    assert report(ZeroDivisionError("division\nby zero"), tmp_path / "run") == ExitCode.OUR_BUG
    message = f"error: ZeroDivisionError: division by zero. This is a bug; {where} has its traceback.\n"
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands.Command, "run", raising(UserError("here", "wrong", "Mend it")))
    assert main(["fit", "--debug"]) == ExitCode.USAGE
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "maskvlm"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": "src"}, stdout=write, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_is_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(commands.Command, "run", raising(KeyboardInterrupt()))
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert main(["fit", "--run", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"interrupted before the first checkpoint of {tmp_path}\n"
    (tmp_path / "last.ckpt").touch()
    assert main(["fit", "--run", str(tmp_path)]) == 130
    assert f"{tmp_path}/last.ckpt holds its latest checkpoint: the same command resumes" in capsys.readouterr().err


class Simple(UserError):
    """torch can build this one again, from the text of the worker's whole traceback."""

    def __init__(self, where: str) -> None:
        super().__init__(where, "not json", "Mend it", ExitCode.BAD_DATA)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where,)


class Bad(Dataset[int]):
    """Fails in the worker that reads it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            UserError("a.json:3", "no caption", "Mend the row", ExitCode.BAD_DATA),
            "a.json:3: no caption. Mend the row.",
        ),
        (BadImage("x.jpg", "truncated", "half of it is missing"), "x.jpg: "),
        (Simple("y.json"), "y.json: not json. Mend it."),
    ],
    ids=["UserError", "a kind of it", "a kind that takes one argument"],
)
def test_a_mistake_found_in_a_data_worker_is_one_line(error: UserError, message: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        next(iter(DataLoader(Bad(error), num_workers=1)))
    line = user_line(caught.value)
    assert line is not None
    assert line.text.startswith(message)
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


def test_who_failed_first_in_an_earlier_job_says_nothing_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails where all processes of a smaller job name a process that is not there."""
    (tmp_path / FIRST).write_text("7 70\n")
    monkeypatch.setattr("maskvlm.training.failure.EARLIER", [failed_first(tmp_path)])
    monkeypatch.setenv("RANK", "0")
    report(UserError("data", "broken", "Mend it", ExitCode.BAD_DATA), tmp_path)
    assert capsys.readouterr().err == "error: data: broken. Mend it.\n"


def test_who_failed_first_is_known_while_the_file_is_still_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other process has created the file and not yet written its number: this one must not take it for its own."""
    (tmp_path / FIRST).touch()
    monkeypatch.setenv("RANK", "0")
    other = threading.Timer(0.2, (tmp_path / FIRST).write_text, ["1 65\n"])
    other.start()
    report(UserError("data", "broken", "Mend it", ExitCode.BAD_DATA), tmp_path)
    other.join()
    assert capsys.readouterr().err == "[rank 0] see rank 1\n"


def test_an_error_reads_as_one_line_whatever_it_holds() -> None:
    line = user_line(UserError("a\nb", "x\ty", "z"))
    assert line is not None
    assert not re.search(r"[\n\t]", line.text)
