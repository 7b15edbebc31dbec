"""In which precision a run on a CPU trains, and that it keeps it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from timm.models.vision_transformer import Block
from torch import nn

from maskvlm.cli.lightning import LightningCommand
from maskvlm.training import precision
from maskvlm.training.precision import alone, cpu_precision, trial


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the two trials take, in this order: single precision, bfloat16."""
    times = {"single": 3.0, "half": 1.0}
    order = iter(("single", "half"))
    monkeypatch.setattr(precision, "fastest", lambda run: times[next(order)])
    monkeypatch.setattr(precision, "in_hardware", lambda: True)
    return times


@pytest.mark.parametrize(("half", "choice"), [(1.0, "bf16-mixed"), (2.5, "bf16-mixed"), (2.6, None), (9.0, None)])
def test_bfloat16_must_be_faster_by_a_fifth(
    seconds: dict[str, float], tmp_path: Path, half: float, choice: str
) -> None:
    seconds["half"] = half
    assert cpu_precision(nn.Linear(256, 256), 10, 256, tmp_path) == choice


def test_narrow_models_and_processors_without_it_are_not_tried(
    seconds: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_precision(nn.Linear(128, 128), 10, 128, tmp_path) is None
    monkeypatch.setattr(precision, "in_hardware", lambda: False)
    assert cpu_precision(nn.Linear(256, 256), 10, 256, tmp_path) is None


@pytest.mark.parametrize(("began", "choice"), [("bf16-mixed", "bf16-mixed"), ("32-true", None)])
def test_a_run_keeps_what_it_began_with(
    seconds: dict[str, float], tmp_path: Path, began: str, choice: str | None
) -> None:
    (tmp_path / "versions.json").write_text(json.dumps({"precision": began}))
    seconds["half"] = 9.0 if choice else 0.1
    assert cpu_precision(nn.Linear(256, 256), 10, 256, tmp_path) == choice


def test_a_trial_leaves_the_block_as_it_was() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    block[0].requires_grad_(False)
    before = [parameter.clone() for parameter in block.parameters()]
    with torch.no_grad():
        trial(block, torch.randn(2, 3, 8), torch.bfloat16)
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, block.parameters(), strict=True))


def test_each_trial_has_the_attention_of_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products in bfloat16, torch's kernel in single precision, as the block itself keeps it."""
    fused = dict[torch.dtype | None, bool]()
    monkeypatch.setattr(precision, "in_hardware", lambda: True)
    monkeypatch.setattr(precision, "trial", lambda block, _, kind: fused.update({kind: block.attn.fused_attn}))
    block = Block(256, 4)
    cpu_precision(block, 10, 256, tmp_path)
    assert fused == {None: True, torch.bfloat16: False}
    assert block.attn.fused_attn


def test_of_several_processes_none_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert alone()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert alone()
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not alone()


def test_a_run_that_goes_on_elsewhere_keeps_its_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails where a card, or a second process, decides anew in the middle of a run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    settings = Namespace(run=str(tmp_path), ckpt_path="last.ckpt")
    command: Any = SimpleNamespace(subcommand="fit", settings=settings)
    card = Namespace(accelerator="auto", devices="auto", num_nodes=1)
    (tmp_path / "versions.json").write_text('{"precision": "32-true"}')
    assert LightningCommand._precision(command, card) is None
    (tmp_path / "versions.json").write_text('{"precision": "bf16-mixed"}')
    two = Namespace(accelerator="cpu", devices=2, num_nodes=1)
    assert LightningCommand._precision(command, two) == "bf16-mixed"
    settings.ckpt_path = None
    assert LightningCommand._precision(command, two) is None
