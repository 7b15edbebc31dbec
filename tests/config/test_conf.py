"""Every YAML file of conf/ parses, and what the stacks of them set."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import Parsed, run_command

ROOT = Path(__file__).resolve().parents[2]
Stack = Callable[..., list[str]]


def choices(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / folder).glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parsed(words: str) -> Any:
    name, *rest = words.split()
    return run_command(Parsed, COMMANDS[name].full([*rest, "run=x"])).settings


# Each file once: there are more data sets than models and places.
STACKS = [*zip(choices("data"), cycle(choices("model")), cycle(choices("where")), strict=False)]
MORE = ["recipe=ours model=base", "model=compact from=x", "model=small from=scenes-tiny"]


def test_every_file_is_met() -> None:
    assert [{*each} for each in zip(*STACKS, strict=True)] == [{*choices(kind)} for kind in ("data", "model", "where")]
    assert {f"recipe={name}" for name in choices("recipe")} <= {*" ".join(MORE).split()}


@pytest.mark.parametrize("words", [f"data={data} model={model} where={where}" for data, model, where in STACKS])
def test_every_stack_parses(words: str) -> None:
    settings = parsed(f"pretrain {words}")
    assert settings.model.task.init_args.image_mask_ratio == (0.9 if "model=compact" in words else 0.6)
    assert (settings.data.init_args.steps is None) != (settings.data.init_args.epochs is None)


def test_base_keeps_the_recipe_of_the_paper_and_ours_its_rates_batch_and_losses() -> None:
    paper, ours = parsed("pretrain model=base data=coco"), parsed("pretrain model=base recipe=ours data=coco")
    model, task, backbone = paper.model, paper.model.task.init_args, paper.model.backbone.init_args
    assert (model.lr, model.lr_encoders, model.weight_decay, model.min_lr) == (3e-4, 1e-5, 0.05, 3e-5)
    assert (task.image_mask_ratio, task.text_mask_ratio, task.pixel_loss) == (0.6, 0.3, "l1")
    weights = ("weight_itc", "weight_itm", "weight_mlm", "weight_mim")
    assert [task[key] for key in weights] == [ours.model.task.init_args[key] for key in weights] == [1] * 4
    assert (paper.data.init_args.batch_size, paper.data.init_args.epochs) == (512, 50)
    assert (backbone.cross_layers, backbone.cross_heads) == (3, 12)
    assert backbone.image.init_args.name == "vit_base_patch16_224"
    assert all(ours.model[key] == model[key] for key in ("lr", "lr_encoders", "weight_decay", "betas", "warmup"))
    assert ours.data == paper.data


def test_later_files_win_and_options_win_over_files(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within mappings, too. Lightning takes 1 for one batch and 1.0 for all of them."""
    (tmp_path / "mine.yaml").write_text("model: {lr: 0.5, weight_decay: 0.25}\n")
    monkeypatch.setenv("DATA_ROOT", "/somewhere")
    files = [*stack(DATA="4m"), "-c", str(tmp_path / "mine.yaml")]
    options = "--model.lr 0.75 --data.source.sets.cc3m 0.5 --trainer.limit_val_batches 1"
    settings = run_command(Parsed, ["fit", *files, *options.split()]).settings
    data, limit = settings.data.init_args, settings.trainer.limit_val_batches
    assert (settings.model.lr, settings.model.weight_decay) == (0.75, 0.25)
    assert settings.model.task.init_args.text_mask_ratio == 0.3
    assert data.source.init_args.sets == {"cc3m": 0.5, "sbu": 1.0, "vg": 1.0, "coco": 1.0}
    assert data.held_out == ["/somewhere/coco/val", "/somewhere/coco/test"]
    assert (type(limit), limit) == (int, 1)


@pytest.mark.parametrize(
    ("words", "steps", "epochs"), [("", 2000, None), ("--trainer.max_steps 7", 7, None), ("--data.epochs 3", None, 3.0)]
)
def test_the_trainers_length_is_the_datas(stack: Stack, words: str, steps: int | None, epochs: float | None) -> None:
    """Which the sample order and the learning rate follow."""
    settings = run_command(Parsed, ["fit", *stack(), *words.split()]).settings
    assert (settings.data.init_args.steps, settings.data.init_args.epochs) == (steps, epochs)
    assert (settings.trainer.max_steps, settings.trainer.max_epochs) == (-1, 1)
