"""Every stack of configuration files that the Makefile can build, and the Makefile itself."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from maskvlm.cli.lightning import Command, Parsed, run

ROOT = Path(__file__).resolve().parents[1]
Stack = Callable[..., list[str]]


def choices(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / folder).glob("*.yaml"))


def make(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PATH": path} if path else {})
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# WHERE meets each model and each data set once: it sets devices and workers, which no other file touches.
WHERE = choices("where")
STACKS = [
    (model, data, WHERE[(row + column) % len(WHERE)])
    for row, model in enumerate(choices("model"))
    for column, data in enumerate(choices("data"))
]


@pytest.mark.parametrize(("model", "data", "where"), STACKS)
def test_every_stack_parses(model: str, data: str, where: str, stack: Stack) -> None:
    settings = run(Parsed, ["fit", *stack(MODEL=model, DATA=data, WHERE=where)]).settings
    assert settings.model.task.init_args.image_mask_ratio == (0.9 if model == "compact" else 0.6)
    assert (settings.data.init_args.steps is None) != (settings.data.init_args.epochs is None)


def test_every_where_is_met() -> None:
    assert {where for _, _, where in STACKS} == set(WHERE)


def test_base_keeps_the_recipe_of_the_paper(stack: Stack) -> None:
    settings = run(Parsed, ["fit", *stack(MODEL="base", DATA="coco", WHERE="cpu")]).settings
    model, task = settings.model, settings.model.task.init_args
    assert (model.lr, model.lr_encoders, model.weight_decay, model.min_lr) == (3e-4, 1e-5, 0.05, 3e-5)
    assert (task.image_mask_ratio, task.text_mask_ratio, task.pixel_loss) == (0.6, 0.3, "l1")
    assert (task.weight_itc, task.weight_itm, task.weight_mlm, task.weight_mim) == (1, 1, 1, 1)
    assert (settings.data.init_args.batch_size, settings.data.init_args.epochs) == (512, 50)
    backbone = model.backbone.init_args
    assert (backbone.cross_layers, backbone.cross_heads) == (3, 12)
    assert backbone.image.init_args.name == "vit_base_patch16_224"


def test_later_files_win_and_options_win_over_files(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {lr: 0.5, weight_decay: 0.25}\n")
    files = [*stack(), "-c", str(tmp_path / "mine.yaml")]
    settings = run(Parsed, ["fit", *files, "--model.lr", "0.75"]).settings
    assert (settings.model.lr, settings.model.weight_decay) == (0.75, 0.25)
    assert settings.model.task.init_args.text_mask_ratio == 0.3


def test_the_environment_names_the_folder_of_data(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/somewhere")
    settings = run(Parsed, ["fit", *stack(DATA="flickr8k")]).settings
    assert settings.data.init_args.source.init_args.root == "/somewhere/flickr8k"


class Built(Command):
    """Builds model, data and trainer, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing is claimed."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def test_the_links_carry_what_they_should(stack: Stack) -> None:
    """Lightning drops a link to a name that is not there without a word."""
    options = [
        "--seed_everything",
        "7",
        "--trainer.accumulate_grad_batches",
        "2",
        "--run",
        "checkpoints/never",
    ]
    built = run(Built, ["fit", *stack(WHERE="cpu"), *options])
    data, model = built.datamodule, built.model
    assert data.spec == model.backbone.input_spec
    assert data.spec.image_size == 48
    assert (model.seed, data.seed, data.accumulate) == (7, 7, 2)
    assert model.backbone.image.random_init
    assert model.backbone.text.random_init
    assert built.trainer.default_root_dir == "checkpoints/never"
    assert {str(logger.save_dir) for logger in built.trainer.loggers} == {"checkpoints/never"}
    assert not Path("checkpoints/never").exists()


def test_make_alone_lists_targets_and_choices() -> None:
    text = make().stdout
    for word in ("setup", "pretrain", "finetune", "evaluate", "config", "preview", "test", "check"):
        assert f"  {word}" in text
    for folder in ("model", "data", "where"):
        assert " ".join(choices(folder)) in text


@pytest.mark.parametrize(("name", "folder"), [("MODEL", "model"), ("DATA", "data"), ("WHERE", "where")])
@pytest.mark.parametrize("value", ["nope", "", "tiny small", "../base"])
def test_a_wrong_choice_is_one_line_with_the_choices(name: str, folder: str, value: str) -> None:
    done = make("pretrain", "PYTHON=false", f"{name}={value}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"no {name}={value}; there are: {' '.join(choices(folder))}" in done.stderr


@pytest.mark.parametrize("target", ["pretrain", "finetune", "evaluate", "config", "submit"])
@pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/tmp/x", "a b", "."])
def test_a_run_stays_under_checkpoints(target: str, name: str) -> None:
    words = [] if target == "pretrain" else ["TASK=vqa", "FROM=x.ckpt"]
    done = make(target, "PYTHON=false", f"RUN={name}", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"RUN='{name}' is no folder name; give one word such as RUN=first" in done.stderr


@pytest.mark.parametrize("target", ["finetune", "evaluate"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["TASK=nope"], "no TASK=nope; tasks found under tasks/: entailment nlvr retrieval vqa (or TASK=package.task"),
        (["TASK=vqa nlvr"], "no TASK=vqa nlvr; tasks found under tasks/: "),
        (["TASK=vqa"], "no FROM=; name the checkpoint to start from: FROM=checkpoints/RUN/best.ckpt (there are: "),
        (["TASK=vqa", "FROM=x.ckpt", "DATA=coco"], "no DATA=coco for TASK=vqa; there are: daquar scenes vqav2"),
        (["TASK=nlvr", "FROM=random", "DATA="], "no DATA= for TASK=nlvr; there are: nlvr2 nlvr_pairs scenes"),
        (["TASK=nlvr", "FROM=random", "DATA=conf"], "no DATA=conf for TASK=nlvr; there are: "),
        (["TASK=nlvr", "FROM=random", "MODEL=huge"], "no MODEL=huge; there are: "),
        (["TASK=nlvr", "FROM=random", "WHERE=here"], "no WHERE=here; there are: "),
    ],
)
def test_a_wrong_choice_of_a_task_is_one_line(target: str, words: list[str], said: str) -> None:
    done = make(target, "PYTHON=false", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_without_a_task_nothing_is_fine_tuned() -> None:
    done = make("finetune", "FROM=x.ckpt", "PYTHON=false")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "no TASK=; tasks found under tasks/: " in done.stderr


@pytest.mark.parametrize("start", ["", "random"])
def test_without_a_task_a_checkpoint_is_measured(start: str) -> None:
    done = make("evaluate", f"FROM={start}", "PYTHON=false")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "no FROM=; name the checkpoint to start from" in done.stderr


def test_what_pretraining_is_judged_by_is_measured_without_a_task() -> None:
    words = ("MODEL=compact", "DATA=flickr8k", "FROM=a/b.ckpt", "WHERE=cpu", "PYTHON=python", "RUN=x", "SPLIT=test")
    done = make("-n", "evaluate", *words)
    files = ("base", "pretrain", "pretrain-compact", "data/flickr8k", "where/cpu", "continue", "continue-compact")
    stack = " ".join(f"-c conf/{name}.yaml" for name in files)
    expected = f"python -m maskvlm test --folder checkpoints/x --from a/b.ckpt {stack} --trainer.limit_val_batches 1.0"
    assert done.stdout.split() == expected.split()


def test_without_any_checkpoint_one_is_told_how_to_make_one(tmp_path: Path) -> None:
    for name in ("conf", "tasks", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "finetune", "TASK=vqa", "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "(there are: none; `make pretrain` makes one)" in done.stderr
    (tmp_path / "checkpoints" / "a").mkdir(parents=True)
    (tmp_path / "checkpoints" / "a" / "best.ckpt").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "(there are: checkpoints/a/best.ckpt)" in done.stderr


@pytest.mark.parametrize("split", ["foo", "", "val test", "validate", "train"])
def test_a_wrong_split_is_one_line(split: str) -> None:
    done = make("evaluate", "TASK=vqa", "FROM=x.ckpt", "PYTHON=false", f"SPLIT={split}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"no SPLIT={split}; there are: val test." in done.stderr


@pytest.mark.parametrize(("split", "command"), [("val", "validate"), ("test", "test")])
def test_the_split_chooses_the_command(split: str, command: str) -> None:
    """All of it is measured, whatever the task's settings look at while they train."""
    words = ("TASK=nlvr", "FROM=a/b.ckpt", "WHERE=cpu", "RUN=x", "PYTHON=python", "ARGS=--model.lr 2", f"SPLIT={split}")
    done = make("-n", "evaluate", *words)
    assert (
        done.stdout.split()
        == (
            f"python -m maskvlm {command} --folder checkpoints/x --from a/b.ckpt -c conf/base.yaml "
            "-c conf/finetune.yaml -c tasks/nlvr/conf.yaml -c conf/where/cpu.yaml "
            "--trainer.limit_val_batches 1.0 --model.lr 2"
        ).split()
    )


def test_the_control_begins_with_random_weights_of_the_model() -> None:
    done = make("-n", "finetune", "TASK=vqa", "DATA=daquar", "FROM=random", "MODEL=small", "WHERE=cpu", "PYTHON=python")
    assert "--model.random_init true -c conf/model/small.yaml -c conf/base.yaml" in done.stdout
    assert "-c tasks/vqa/daquar.yaml" in done.stdout
    assert "--from" not in done.stdout


def test_pretraining_goes_on_from_a_checkpoint_whose_model_it_keeps() -> None:
    words = ("MODEL=compact", "DATA=flickr8k", "FROM=a/b.ckpt", "WHERE=cpu", "PYTHON=python", "RUN=x")
    files = ("base", "pretrain", "pretrain-compact", "data/flickr8k", "where/cpu", "continue", "continue-compact")
    stack = " ".join(f"-c conf/{name}.yaml" for name in files)
    expected = f"python -m maskvlm fit --folder checkpoints/x --from a/b.ckpt {stack}"
    assert make("-n", "pretrain", *words).stdout.split() == expected.split()


def test_encoders_out_of_a_folder(tmp_path: Path) -> None:
    """The one with a tokenizer is the text's, whatever their names are."""
    for name in ("a-text/tokenizer.json", "a-text/model.safetensors", "vit/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    done = make("-n", "pretrain", "MODEL=compact", f"ENCODERS={tmp_path}", "PYTHON=python")
    assert f"--model.backbone.image.weights {tmp_path}/vit/model.safetensors" in done.stdout.replace("'", "")
    assert f"--model.backbone.text.name {tmp_path}/a-text" in done.stdout.replace("'", "")


@pytest.mark.parametrize("files", [[], ["text/tokenizer.json"], ["vit/model.safetensors"]])
def test_a_folder_without_both_encoders_is_one_line(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    done = make("pretrain", "MODEL=compact", f"ENCODERS={tmp_path}", "PYTHON=false")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"ENCODERS='{tmp_path}' is no folder with one folder of image weights" in done.stderr


def test_compact_is_two_pretrained_encoders_of_one_width(stack: Stack) -> None:
    settings = run(Parsed, ["fit", *stack(MODEL="compact", DATA="flickr8k", WHERE="cpu")]).settings
    image, text = (getattr(settings.model.backbone.init_args, name).init_args for name in ("image", "text"))
    assert (image.name, text.name) == ("vit_small_patch14_dinov2.lvd142m", "sentence-transformers/all-MiniLM-L6-v2")
    assert settings.model.random_init is not True
    assert settings.model.task.init_args.mask_block % 14 == image.image_size % 14 == 0


def test_arguments_pass_through_with_their_quotes() -> None:
    done = make("-n", "pretrain", "PYTHON=python", "RUN=x", """ARGS=--model.lr 1e-3 --a "b c" """)
    assert done.stdout.strip().endswith('--model.lr 1e-3 --a "b c"')
    assert "--folder checkpoints/x" in done.stdout


def fake_python(folder: Path, body: str) -> str:
    """A PATH on which every Python is a script with that body."""
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            '[ "$1" = --version ] && echo Python 3.9.1 && exit; exit 1',
            "3.11 or newer is needed, found Python 3.9.1",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac', "cannot make virtual environments"),
    ],
    ids=["too old", "no venv"],
)
def test_setup_names_what_the_python_lacks(body: str, said: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        (copy / name).write_text((ROOT / name).read_text())
    environment = os.environ | {"PATH": fake_python(tmp_path, body)}
    command = ["make", "setup"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=60)
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert all(line.startswith("make: ***") for line in rest)
    assert not (copy / ".venv").exists()
