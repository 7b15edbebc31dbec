"""Every stack of configuration files that a command can name, and the Makefile."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Optional, Union

import pytest

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import LightningCommand, Parsed, run_command
from maskvlm.config.parser import CommandParser, set_up_parsing

ROOT = Path(__file__).resolve().parents[2]
Stack = Callable[..., list[str]]


def choices(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / folder).glob("*.yaml"))


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


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
    settings = run_command(Parsed, ["fit", *stack(MODEL=model, DATA=data, WHERE=where)]).settings
    assert settings.model.task.init_args.image_mask_ratio == (0.9 if model == "compact" else 0.6)
    assert (settings.data.init_args.steps is None) != (settings.data.init_args.epochs is None)


class Shortened:
    def __init__(self, limit: Optional[Union[float, int]] = None) -> None:  # noqa: UP007, UP045 (as the library has it)
        self.limit = limit


@pytest.mark.parametrize(("text", "limit"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)])
def test_one_batch_is_not_read_as_all(text: str, limit: float | None) -> None:
    """Lightning takes 1 for one batch and 1.0 for all of them. pandas, imported first, turns the order of its types."""
    set_up_parsing([])
    parser = CommandParser()
    parser.add_class_arguments(Shortened, "trainer")
    read = parser.parse_args(["--trainer.limit", text]).trainer.limit
    assert (type(read), read) == (type(limit), limit)


def test_every_where_is_met() -> None:
    assert {where for _, _, where in STACKS} == set(WHERE)


def test_base_keeps_the_recipe_of_the_paper(stack: Stack) -> None:
    settings = run_command(Parsed, ["fit", *stack(MODEL="base", DATA="coco", WHERE="cpu")]).settings
    model, task = settings.model, settings.model.task.init_args
    assert (model.lr, model.lr_encoders, model.weight_decay, model.min_lr) == (3e-4, 1e-5, 0.05, 3e-5)
    assert (task.image_mask_ratio, task.text_mask_ratio, task.pixel_loss) == (0.6, 0.3, "l1")
    assert (task.weight_itc, task.weight_itm, task.weight_mlm, task.weight_mim) == (1, 1, 1, 1)
    assert (settings.data.init_args.batch_size, settings.data.init_args.epochs) == (512, 50)
    backbone = model.backbone.init_args
    assert (backbone.cross_layers, backbone.cross_heads) == (3, 12)
    assert backbone.image.init_args.name == "vit_base_patch16_224"


def test_our_recipe_keeps_the_rates_the_batch_and_the_losses_of_the_paper() -> None:
    ours = run_command(Parsed, COMMANDS["pretrain"].full(["model=base", "recipe=ours", "data=coco", "run=x"])).settings
    paper = run_command(Parsed, COMMANDS["pretrain"].full(["model=base", "data=coco", "run=x"])).settings
    for key in ("lr", "lr_encoders", "weight_decay", "betas", "warmup", "min_lr"):
        assert ours.model[key] == paper.model[key]
    assert ours.data == paper.data
    before, after = (vars(settings.model.task.init_args) for settings in (paper, ours))
    weights = [key for key in before if key.startswith("weight_")]
    assert len(weights) >= 4
    assert {key: after[key] for key in weights} == {key: before[key] for key in weights}
    assert after["contrast_first"] == 0.6
    assert ours.model.backbone.init_args.image.init_args.masked_patches == "left_out"


def test_later_files_win_and_options_win_over_files(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {lr: 0.5, weight_decay: 0.25}\n")
    files = [*stack(), "-c", str(tmp_path / "mine.yaml")]
    settings = run_command(Parsed, ["fit", *files, "--model.lr", "0.75"]).settings
    assert (settings.model.lr, settings.model.weight_decay) == (0.75, 0.25)
    assert settings.model.task.init_args.text_mask_ratio == 0.3


def test_what_goes_on_from_a_checkpoint_trains_all_of_it_to_the_end() -> None:
    """The phases of a recipe from nothing are off: its image encoder would stand still after a part of the run."""
    shares = []
    for words in ([], ["from=scenes-tiny"]):
        settings = run_command(Parsed, COMMANDS["pretrain"].full([*words, "run=x"])).settings
        shares.append(settings.model.task.init_args.image_learns)
    assert shares == [0.45, 1.0]


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [("", 4500, None), ("--trainer.max_steps 7", 7, None), ("--trainer.max_epochs 3", None, 3.0),
     ("--data.epochs 3", None, 3.0), ("--data.steps 7", 7, None)],
)  # fmt: skip
def test_the_trainers_length_is_the_datas(stack: Stack, words: str, steps: int | None, epochs: float | None) -> None:
    """Which the sample order and the learning rate follow."""
    settings = run_command(Parsed, ["fit", *stack(), *words.split()]).settings
    assert (settings.data.init_args.steps, settings.data.init_args.epochs) == (steps, epochs)
    assert (settings.trainer.max_steps, settings.trainer.max_epochs) == (-1, 1)


def test_the_environment_names_the_folder_of_data(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/somewhere")
    settings = run_command(Parsed, ["fit", *stack(DATA="flickr8k")]).settings
    assert settings.data.init_args.source.init_args.root == "/somewhere/flickr8k"


class Built(LightningCommand):
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
    built = run_command(Built, ["fit", *stack(WHERE="cpu"), *options])
    data, model = built.datamodule, built.model
    assert data.spec == model.backbone.input_spec
    assert data.spec.image_size == 48
    assert (model.seed, data.seed, data.accumulate) == (7, 7, 2)
    assert model.backbone.image.random_init
    assert model.backbone.text.random_init
    assert built.trainer.default_root_dir == "checkpoints/never"
    assert {str(logger.save_dir) for logger in built.trainer.loggers} == {"checkpoints/never"}
    assert not Path("checkpoints/never").exists()


def test_compact_is_two_pretrained_encoders_of_one_width(stack: Stack) -> None:
    settings = run_command(Parsed, ["fit", *stack(MODEL="compact", DATA="flickr8k", WHERE="cpu")]).settings
    image, text = (getattr(settings.model.backbone.init_args, name).init_args for name in ("image", "text"))
    assert (image.name, text.name) == ("vit_small_patch14_dinov2.lvd142m", "sentence-transformers/all-MiniLM-L6-v2")
    assert settings.model.random_init is not True
    assert settings.model.task.init_args.mask_block % 14 == image.image_size % 14 == 0


# ------------------------------------------------------------------ make


def test_make_alone_lists_targets_and_choices() -> None:
    text = make().stdout
    for word in ("setup", "pretrain", "finetune", "evaluate", "config", "preview", "test", "check"):
        assert f"  {word}" in text
    for folder in ("model", "data", "where"):
        assert " ".join(choices(folder)) in text


@pytest.fixture
def handed(tmp_path: Path) -> Callable[..., list[str]]:
    """What make hands to Python: a script in its place writes its words down."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/words\n')
    python.chmod(0o755)

    def run_make(*words: str, **environment: str) -> list[str]:
        command = ["make", *words, f"PYTHON={python}"]
        subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, check=True, timeout=60, stdout=subprocess.DEVNULL
        )
        return (tmp_path / "words").read_text().split("\0")[:-1]

    return run_make


COMPOSED = ("pretrain", "finetune", "evaluate", "config", "preview", "submit", "bench", "index", "data", "data-check")


@pytest.mark.parametrize("target", COMPOSED)
def test_each_target_is_the_command_of_its_name(target: str, handed: Callable[..., list[str]]) -> None:
    """Whatever is typed goes on as one word, and nothing of the environment does."""
    words = ("TASK=a b", "MODEL=", "DATA=it's", 'RUN="x" $y', "FROM=f", "ENCODERS=e", "SPLIT=s", "RAW=r", "NAME=n")
    expected = ["model=", "data=it's", 'run="x" ', "from=f", "encoders=e", "split=s", "raw=r", "name=n"]
    arguments = handed(target, *words, "WHERE=cpu", 'ARGS=--model.lr 1e-3 --a "b c"')
    expected.insert(2, "where=cpu")
    assert arguments == ["-m", "maskvlm", target, "a b", *expected, "--model.lr", "1e-3", "--a", "b c"]
    assert handed(target, MODEL="x", TASK="y", RUN="z") == ["-m", "maskvlm", target]
    assert COMMANDS[target].compose is not None


def test_a_checkpoint_for_the_page(handed: Callable[..., list[str]]) -> None:
    assert handed("demo", "FROM=a/b.ckpt") == ["-m", "maskvlm", "demo", "from=a/b.ckpt"]


def fake_python(folder: Path, body: str) -> str:
    """A PATH on which every Python is a script with that body."""
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            '[ "$1" = --version ] && echo Python 3.9.1 && exit; exit 1',
            "3.11 or newer is needed, found Python 3.9.1",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac', "cannot make virtual environments"),
    ],
    ids=["too old", "no venv"],
)
def test_setup_names_what_the_python_lacks(body: str, message: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        (copy / name).write_text((ROOT / name).read_text())
    environment = os.environ | {"PATH": fake_python(tmp_path, body)}
    command = ["make", "setup"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=60)
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert all(line.startswith("make: ***") for line in rest)
    assert not (copy / ".venv").exists()
