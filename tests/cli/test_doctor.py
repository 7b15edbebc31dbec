"""`maskvlm doctor`: one line a check, on the built-in world, without a card or a connection."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvlm.checkpoint.warm_start import read_start
from maskvlm.cli import doctor
from maskvlm.cli.main import main
from maskvlm.data.text import tokenizer_hash
from maskvlm.training.memory_estimate import MemoryEstimate, StepSimulation, StepWork
from maskvlm.utils.errors import UserError

CHECKS = [
    "machine",
    "torch",
    "disk",
    "data disk",
    "weights",
    "data",
    "shared memory",
    "memory",
    "speed",
    "data workers",
]
ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


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


def test_the_built_in_world_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = run(capsys, "where=cpu")
    assert code == 0
    assert list(checks) == CHECKS
    assert not any(verdict == "fails" for verdict, _ in checks.values())
    assert "20,000 images" in checks["data"][1]
    assert "4,500 steps" in checks["speed"][1]
    assert "assum" in checks["speed"][1]
    assert "(simulated)" in checks["memory"][1]  # not "cannot be simulated"
    assert checks["machine"][0] == "look"
    assert "would use the CPU (measure it with `maskvlm bench`)" in checks["machine"][1]


def test_a_missing_set_and_card_fail_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, checks = run(capsys, "data=coco", "where=gpu1")
    assert code == 2
    assert checks["data"][0] == checks["machine"][0] == "fails"
    assert str(tmp_path / "coco") in checks["data"][1]
    assert "maskvlm data" in checks["data"][1]
    assert "where=cpu" in checks["machine"][1]
    # The rest is still said.
    assert checks["memory"][0] == "ok"


def test_a_full_disk_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    code, checks = run(capsys, "where=cpu")
    assert code == 2
    assert checks["disk"][0] == "fails"
    assert "--folder" in checks["disk"][1]
    assert checks["data disk"][0] == "look"


def test_weights_that_are_nowhere_fail_and_nothing_is_fetched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "is_cached", lambda *_: False)
    monkeypatch.setattr(doctor, "hub_reachable", lambda: False)
    monkeypatch.setattr(doctor, "images_per_second", lambda _: 30.0)
    code, checks = run(capsys, "model=base", "where=cpu")
    assert code == 2
    assert checks["weights"][0] == "fails"
    assert "vit_base_patch16_224 (timm) and roberta-base" in checks["weights"][1]
    assert "--model.random_init true" in checks["weights"][1]


def test_a_card_that_is_too_small_is_told_with_a_chunk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimated(*_: Any) -> MemoryEstimate:
        return MemoryEstimate(512, 34 * 2**30, 2**30, 24 * 2**30, 32)

    monkeypatch.setattr(doctor, "estimate_memory", estimated)
    code, checks = run(capsys, "where=cpu", "--memory", "24", "--peak", "100")
    assert code == 2
    assert checks["memory"][0] == "fails"
    assert "dd --model.chunk 32" in checks["memory"][1]


def test_of_shared_weights_no_memory_is_predicted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where the whole model is taken for what each card holds: it is shared out as it does not fit one."""
    monkeypatch.setattr(doctor, "images_per_second", lambda _: 30.0)
    _, checks = run(capsys, "where=sharded8", "--memory", "0.5")
    assert checks["memory"] == ("look", "not predicted where GPUs share the weights. See docs/gpus.md, When to shard")
    assert "pairs/s per GPU" in checks["speed"][1]
    assert run(capsys, "where=gpu8", "--memory", "0.5")[1]["memory"][0] == "fails"


def test_speed_and_workers_follow_from_the_peak(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 TFLOP/s of 100 through 400 GFLOP a pair: 100 pairs a second; 4,500 steps of 48 in 36 minutes."""
    monkeypatch.setattr(doctor, "images_per_second", lambda _: 30.0)
    monkeypatch.setattr(doctor, "LAUNCH", 1e-6)
    _, checks = run(capsys, "where=cpu", "--peak", "100")
    assert " 100 pairs/s" in checks["speed"][1]
    assert "4,500 steps in 0.60 hours" in checks["speed"][1]
    assert "a GPU needs 4," in checks["data workers"][1]


def test_of_a_run_of_two_phases_each_counts_by_its_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 TFLOP/s through 200 GFLOP a pair in a quarter of the steps and 440 in the others, 380 on average; and where
    launching is what takes time in the first of them."""
    phases = (StepWork(0.25, 48, 2e11, 4000), StepWork(0.75, 48, 4.4e11, 5000))
    monkeypatch.setattr(StepSimulation, "work", lambda *_: phases)
    monkeypatch.setattr(doctor, "images_per_second", lambda _: 30.0)
    monkeypatch.setattr(doctor, "LAUNCH", 1e-9)
    _, checks = run(capsys, "where=cpu", "--peak", "100")
    assert f" {40e12 / 3.8e11:.0f} pairs/s" in checks["speed"][1]
    assert "380.0 (25 % of the steps 200.0, 75 % of the steps 440.0) GFLOP/pair" in checks["speed"][1]
    monkeypatch.setattr(doctor, "LAUNCH", 1e-4)
    _, checks = run(capsys, "where=cpu", "--peak", "100")
    seconds = 0.25 * 0.4 + 0.75 * 48 * 4.4e11 / 40e12
    assert f" {48 / seconds:.0f} pairs/s" in checks["speed"][1]
    assert "up to 5,000 kernels per step" in checks["speed"][1]


def test_of_a_small_model_the_launches_of_kernels_are_what_takes_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 kernels at 10 us: 25 steps a second of 48 pairs, however fast the card is."""
    monkeypatch.setattr(doctor, "images_per_second", lambda _: 30.0)
    _, checks = run(capsys, "where=cpu", "--peak", "10000")
    assert " 1,200 pairs/s" in checks["speed"][1]


def test_images_are_read_by_one_core_and_threads_come_back() -> None:
    from toys import SIZE, toy_backbone

    from maskvlm.data.module import PairData
    from maskvlm.data.scenes.source import Scenes

    backbone = toy_backbone(length=24, vocab=150)
    backbone.text.tokenizer = None
    data = PairData(Scenes(train=200, val=6, test=5, size=SIZE), backbone.input_spec, steps=3, batch_size=6)
    data.setup("fit")
    threads = torch.get_num_threads()
    assert doctor.images_per_second(data) > 0
    assert torch.get_num_threads() == threads


def test_texts_are_counted_with_the_tokenizer_of_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a tokenizer is trained on the captions although the checkpoint has one: other texts are cut then."""
    seen = []
    opened = doctor.opened_data
    monkeypatch.setattr(doctor, "opened_data", lambda *args: seen.append(opened(*args)) or seen[0])
    run(capsys, "from=scenes-tiny", "where=cpu", "--data.source.train", "60")
    wanted = read_start("scenes-tiny").tokenizer
    assert wanted is not None
    assert seen[0].tokenizer is not None
    assert tokenizer_hash(seen[0].tokenizer) == tokenizer_hash(wanted)


def test_what_is_wrong_with_a_strangers_file_cannot_reach_the_terminal() -> None:
    error = UserError("a\x1b[2J.jsonl:3", "no \x9b2J", "Mend it")
    assert str(doctor.failure("data", error)).isprintable()
