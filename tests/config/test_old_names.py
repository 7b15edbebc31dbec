"""Names of earlier versions: class paths and options, in files, in commands and in checkpoints."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.old_names import MOVED, OPTIONS, current, current_key, renamed
from maskvlm.config.safe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]


def test_a_key_is_renamed_where_it_stands_and_nowhere_else() -> None:
    assert current_key("model.task.text_draws") == "model.task.masks_per_text"
    assert current_key("model.task.init_args.text_draws") == "model.task.init_args.masks_per_text"
    assert current_key("data.text_draws") == "data.text_draws"
    assert current_key("text_draws") == "text_draws"
    assert current_key("model.backbone.init_args.image.init_args.kept_features").endswith(
        "image.init_args.feature_cache"
    )


@pytest.mark.parametrize(
    ("old", "now"), [("pictures", "images_per_example"), ("whole_image_share", "fully_masked_share")]
)
def test_options_of_tasks_by_their_earlier_names(old: str, now: str) -> None:
    assert current_key(f"model.task.init_args.{old}") == f"model.task.init_args.{now}"


def test_a_callback_by_its_earlier_module() -> None:
    for old in ("maskvlm.resume.KeepState", "maskvlm.training.resume.KeepState"):
        module, _, name = current(old).rpartition(".")
        assert getattr(importlib.import_module(module), name).__name__ == "KeepState"


def test_a_new_name_is_no_old_one() -> None:
    assert not {current(f"{module}.X").rpartition(".")[0] for module in MOVED.values()} - {*MOVED.values()}
    for names in OPTIONS.values():
        assert not names.keys() & {*names.values()}


WHOLE = """
model:
  backbone:
    init_args:
      image: {init_args: {kept_features: x}}
  task:
    class_path: maskvlm.pretrain.MaskedPretraining
    init_args: {text_draws: 2, image_draws: 0.5, image_mask_all: 0.25}
data: {init_args: {leaks: drop}}
text_draws: 1
"""
ALONE = """
class_path: tasks.vqa.task.Vqa
init_args: {blind: true, hidden: 3}
"""


def test_whole_files_and_single_classes() -> None:
    whole = read_yaml(WHOLE, "x")
    assert whole["model"]["task"] == {
        "class_path": "maskvlm.objectives.pretraining.MaskedPretraining",
        "init_args": {"masks_per_text": 2, "masked_image_share": 0.5, "fully_masked_share": 0.25},
    }
    assert whole["model"]["backbone"]["init_args"]["image"] == {"init_args": {"feature_cache": "x"}}
    assert whole["data"] == {"init_args": {"contamination": "drop"}}
    assert whole["text_draws"] == 1
    assert read_yaml(ALONE, "x")["init_args"] == {"image_ablation": True, "hidden": 3}
    assert renamed([{"a": [1, None]}, "text"]) == [{"a": [1, None]}, "text"]


def test_a_command_and_a_file_may_say_them_and_are_told_so(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.yaml").write_text("model:\n  task:\n    init_args:\n      image_mask_all: 0.25\n")
    words = ["--model.task.text_draws", "3", "--model.task.image_draws=0.5", "-c", str(tmp_path / "mine.yaml")]
    settings = run_command(Parsed, ["fit", *stack(WHERE="cpu"), *words]).settings.model.task.init_args
    assert (settings.masks_per_text, settings.masked_image_share, settings.fully_masked_share) == (3, 0.5, 0.25)
    stderr = capsys.readouterr().err
    assert "--model.task.text_draws: model.task.text_draws is called model.task.masks_per_text now" in stderr
    assert f"{tmp_path}/mine.yaml:4: model.task.image_mask_all is called model.task.fully_masked_share now" in stderr
    assert len(stderr.splitlines()) == 3
