"""YAML is read as plain values; names of earlier versions, class paths and options, are read as today's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.old_names import MOVED, current
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def test_yaml_is_plain_values() -> None:
    text = "lr: 1e-3\nday: 2026-01-01\nlist: [1, true, null, '1']\nnested: {a: .5}"
    expected = {"lr": 0.001, "day": "2026-01-01", "list": [1, True, None, "1"], "nested": {"a": 0.5}}
    assert read_yaml(text, "x") == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: !!python/object/apply:os.system [id]", ExitCode.REFUSED),
        ("a: !!python/name:os.system", ExitCode.REFUSED),
        (BOMB, ExitCode.REFUSED),
        ("a: &a [*a]", ExitCode.REFUSED),
        ("[" * 100 + "]" * 100, ExitCode.REFUSED),
        ("a: " + "x" * 200_000, ExitCode.REFUSED),
        ("a: 1\na: 2", ExitCode.USAGE),
        ("a: [1", ExitCode.USAGE),
        ("a: 1e999", ExitCode.USAGE),
    ],
    ids=["object", "name", "bomb", "itself", "deep", "large", "twice", "open", "infinite"],
)
def test_yaml_that_asks_for_more_is_refused(text: str, code: ExitCode) -> None:
    with pytest.raises(UserError, match="file") as caught:
        read_yaml(text, "file")
    assert caught.value.code == code


def test_old_class_paths_and_options_are_todays() -> None:
    task = "{class_path: maskvlm.pretrain.MaskedPretraining, init_args: {text_draws: 2, image_mask_all: 0.25}}"
    whole = read_yaml(f"model: {{task: {task}}}\ndata: {{init_args: {{leaks: drop}}}}\ntext_draws: 1", "x")
    assert whole["model"]["task"] == {
        "class_path": "maskvlm.objectives.pretraining.MaskedPretraining",
        "init_args": {"masks_per_text": 2, "fully_masked_share": 0.25},
    }
    assert (whole["data"], whole["text_draws"]) == ({"init_args": {"contamination": "drop"}}, 1)
    alone = read_yaml("class_path: tasks.vqa.task.Vqa\ninit_args: {blind: true, hidden: 3}", "x")
    assert alone["init_args"] == {"image_ablation": True, "hidden": 3}
    for module in MOVED.values():  # a new name is no old one
        assert current(f"{module}.X").rpartition(".")[0] in MOVED.values()


def test_a_command_and_a_file_may_say_them_and_are_told_so(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.yaml").write_text("model:\n  task:\n    init_args:\n      image_mask_all: 0.25\n")
    words = ["--model.task.text_draws", "3", "-c", str(tmp_path / "mine.yaml")]
    settings = run_command(Parsed, ["fit", *stack(WHERE="cpu"), *words]).settings.model.task.init_args
    assert (settings.masks_per_text, settings.fully_masked_share) == (3, 0.25)
    stderr = capsys.readouterr().err
    assert "masks_per_text" in stderr
    assert f"{tmp_path}/mine.yaml:4" in stderr
