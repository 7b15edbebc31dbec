"""In which precision a run on a CPU trains, and that it keeps it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from maskvlm.training import precision
from maskvlm.training.precision import alone, cpu_precision


@pytest.mark.parametrize(
    ("half", "width", "began", "choice"),
    [
        (2.5, 256, None, "bf16-mixed"),  # single precision takes 3: faster by a fifth
        (2.6, 256, None, None),
        (0.1, 128, None, None),  # too narrow
        (9.0, 256, "bf16-mixed", "bf16-mixed"),  # a run keeps what it began with
        (0.1, 256, "32-true", None),
    ],
)
def test_bfloat16_must_be_worth_it(
    half: float, width: int, began: str | None, choice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter((3.0, half))
    monkeypatch.setattr(precision, "fastest", lambda run: next(seconds))
    monkeypatch.setattr(precision, "in_hardware", lambda: True)
    if began is not None:
        (tmp_path / "versions.json").write_text(json.dumps({"precision": began}))
    assert cpu_precision(nn.Linear(width, width), 10, width, tmp_path) == choice
    monkeypatch.setattr(precision, "in_hardware", lambda: False)
    assert began or cpu_precision(nn.Linear(width, width), 10, width, tmp_path) is None


def test_a_trial_has_the_attention_of_its_run_and_leaves_the_block_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Products in bfloat16, torch's kernel in single precision, as the block itself keeps it."""
    fused = dict[torch.dtype | None, bool]()
    trial = precision.trial

    def noted(block: Any, x_BLD: torch.Tensor, kind: torch.dtype | None) -> None:
        fused[kind] = block.attn.fused_attn
        trial(block, x_BLD, kind)

    monkeypatch.setattr(precision, "in_hardware", lambda: True)
    monkeypatch.setattr(precision, "trial", noted)
    monkeypatch.setattr(precision, "TIMES", 1)
    block = Block(256, 4)
    block.norm1.requires_grad_(False)
    before = [parameter.clone() for parameter in block.parameters()]
    with torch.no_grad():
        cpu_precision(block, 512, 256, tmp_path)
    assert fused == {None: True, torch.bfloat16: False}
    assert block.attn.fused_attn
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, block.parameters(), strict=True))


def test_of_several_processes_none_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert alone()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert alone()
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not alone()
