"""Two processes with sharded weights, and two that hold them all: their losses, and checkpoints that go both ways."""

import csv
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from forks import ROOT, Forks, elastic, small

from maskvlm.checkpoint.io import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
SHARDED, WHOLE = ("sharded8", "gpu8")  # of conf/where
EIGHT = ("--data.steps=8", "--trainer.accelerator=cpu", "--trainer.devices=2", "--data.workers=0")
UNMEASURED = ("--trainer.limit_val_batches=0",)


def run(forks: Forks, folder: Path, where: str, *more: str) -> Path:
    """Two processes, where the file of conf/where says, but on the CPU."""
    words = small(folder, "-c", str(ROOT / "conf" / "where" / f"{where}.yaml"), *EIGHT, *more)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [forks.start(words, folder.with_suffix(f".log{n}"), elastic(n, port)) for n in (0, 1)]
    codes = [child.wait(240) for child in children]
    assert codes == [0, 0], [child.log.read_text() for child in children]
    return folder


def losses(folder: Path) -> dict[int, list[float]]:
    """Of each step that was made in this folder."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {
        int(row["step"]): [float(value) for name, value in row.items() if name.startswith("train/")] for row in rows
    }


def test_checkpoints_go_from_sharded_runs_to_others_and_back(forks: Forks, tmp_path: Path) -> None:
    """Both make eight steps; each goes on from the other's checkpoint of step 4, and measures in the end. Six images
    are one batch: in the sharded run the second process has none."""
    whole = run(forks, tmp_path / "whole", WHOLE, *UNMEASURED)
    sharded = run(forks, tmp_path / "sharded", SHARDED, *UNMEASURED)
    to_whole = run(forks, tmp_path / "to-whole", WHOLE, f"--ckpt_path={sharded / 'previous.ckpt'}")
    to_sharded = run(forks, tmp_path / "to-sharded", SHARDED, f"--ckpt_path={whole / 'previous.ckpt'}")
    expected = losses(whole)
    assert list(expected) == list(range(8))
    for folder, first in ((sharded, 0), (to_whole, 4), (to_sharded, 4)):
        run_losses = losses(folder)
        assert list(run_losses) == list(range(first, 8)), folder
        for step, values in run_losses.items():
            torch.testing.assert_close(values, expected[step], atol=2e-5, rtol=2e-5)
    # One format: the same tensors in the same places.
    one, other = (load(folder / "previous.ckpt") for folder in (whole, sharded))
    assert one.keys() == other.keys()
    assert [(name, value.shape, value.dtype) for name, value in one["state_dict"].items()] == [
        (name, value.shape, value.dtype) for name, value in other["state_dict"].items()
    ]
    moments, same = other["optimizer_states"][0], one["optimizer_states"][0]
    assert moments["param_groups"] == same["param_groups"]
    torch.testing.assert_close(moments["state"], same["state"], atol=1e-5, rtol=1e-3)
    measured = [json.loads((folder / "metrics.json").read_text()) for folder in (to_whole, to_sharded)]
    assert measured[0].keys() == measured[1].keys()
    assert measured[0]["step"] == measured[1]["step"] == 8
    for name in ("mim/mse", "mlm/nats"):
        assert measured[1][name] == pytest.approx(measured[0][name], rel=1e-3)
    last = load(to_sharded / "last.ckpt")
    assert (last["global_step"], last["state_dict"].keys()) == (8, one["state_dict"].keys())
