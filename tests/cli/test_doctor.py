"""`maskvlm doctor`: one line a check, on the built-in world, without a card or a connection."""

from pathlib import Path

import pytest
import torch

from maskvlm.cli import doctor
from maskvlm.cli.main import main
from maskvlm.training.memory_estimate import StepSimulation, StepWork

CHECKS = ["machine", "torch", "disk", "data disk", "weights", "data", "shared memory", "memory", "speed"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver_version", lambda: None)
    # What is simulated has tests of its own, and takes seconds each time.
    monkeypatch.setattr(StepSimulation, "memory", lambda _, pairs, chunk=None: 10**9 + 10**7 * (chunk or pairs))
    monkeypatch.setattr(StepSimulation, "work", lambda _, pairs, chunk=None: (StepWork(1.0, pairs, 4e11, 4000),))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit status, and verdict and text of each check in the order of the lines."""
    code = main(["doctor", *words])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[7:20].strip(): (line[:5].strip(), line[21:]) for line in lines}


@pytest.mark.slow
def test_the_built_in_world_is_well_and_a_missing_set_and_card_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, checks = run(capsys, "where=cpu")
    assert (code, list(checks)) == (0, [*CHECKS, "data workers"])
    assert not any(verdict == "fails" for verdict, _ in checks.values())
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, checks = run(capsys, "data=coco", "where=gpu1")
    assert code == 2
    assert checks["data"][0] == checks["machine"][0] == "fails"
    assert checks["memory"][0] == "ok"  # the rest is still said


@pytest.mark.slow
def test_of_shared_weights_no_memory_is_predicted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where the whole model is taken for what each card holds: it is shared out as it does not fit one."""
    monkeypatch.setattr(doctor, "images_per_second", lambda _: 30.0)
    _, checks = run(capsys, "where=sharded8", "--memory", "0.5")
    assert checks["memory"] == ("look", "not predicted where GPUs share the weights. See docs/gpus.md, When to shard")
    assert "pairs/s per GPU" in checks["speed"][1]
    assert run(capsys, "where=gpu8", "--memory", "0.5")[1]["memory"][0] == "fails"
