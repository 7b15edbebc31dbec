"""The first twenty steps of the bundled model's recipe: whatever changes what training computes changes these."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskvlm.cli.lightning import LightningCommand, run_command

GOLDEN = Path(__file__).parents[1] / "golden_losses.json"
LOSSES = ("itc", "itm", "mlm", "mim", "words", "spread")
RECIPE = ("-c", "docs/results/scenes/bundled.yaml")
SHORT = {
    "data.steps": 20,
    "data.batch_size": 16,
    "trainer.limit_val_batches": 0,
    "trainer.log_every_n_steps": 1,
}


def test_the_first_twenty_steps_are_the_golden_ones(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a thousandth: processors round differently, and twenty steps multiply that. A wanted change of the recipe
    is recorded by deleting the file and running this test twice."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    torch.set_num_threads(1)
    run_command(
        LightningCommand,
        [
            "fit",
            "--run",
            str(tmp_path / "run"),
            *stack(WHERE="cpu"),
            *RECIPE,
            *(f"--{k}={v}" for k, v in SHORT.items()),
        ],
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/itc"]]
    losses = {loss: [round(float(row[f"train/{loss}"]), 6) for row in rows] for loss in LOSSES}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN.name}: run again")
    golden = json.loads(GOLDEN.read_text())
    assert [len(losses[loss]) for loss in LOSSES] == [20] * len(LOSSES)
    for loss in LOSSES:
        assert losses[loss] == pytest.approx(golden[loss], rel=1e-3), loss
