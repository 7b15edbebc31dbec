"""`make bench`: a few steps, and nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from maskvlm.cli import bench
from maskvlm.cli.main import main
from maskvlm.model.feed_forward import FeedForward


@pytest.mark.slow
def test_a_configuration_is_timed_and_nothing_is_kept(
    stack: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails where a bench counts as a run, whose folder was never claimed."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(bench, "STEPS", 3)
    monkeypatch.setattr(bench, "WARMUP", 1)
    words = ["bench", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), "--data.batch_size=8"]
    # Of two kinds of steps the mean counts: the image encoder learns in the first 90 of 100. Of the six that are made
    # none comes that late by itself.
    assert main([*words, "--model.task.image_learns=0.9", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (learns, first_seconds, first_flops), (still, later_seconds, later_flops) = record["phases"]
    assert (learns, still) == pytest.approx((0.9, 0.1))
    assert later_flops < first_flops
    assert record["flops"] == round(learns * first_flops + still * later_flops)
    assert record["milliseconds"] == pytest.approx(900 * first_seconds + 100 * later_seconds)
    assert not (tmp_path / "run").exists()


def test_blocks_are_compiled_after_the_step_whose_operations_are_counted() -> None:
    """Fails where they are called while operations are counted: torch never compiles them then."""
    block, counter = FeedForward(2), CompileCounter()
    block.compile(backend=counter)
    watch, batch = bench.Stopwatch(), SimpleNamespace(valid_B=[True] * 8)
    trainer, module = (
        SimpleNamespace(world_size=1, precision="32-true", accumulate_grad_batches=1),
        SimpleNamespace(device=torch.device("cpu")),
    )
    counts = list[int]()
    for step in range(3):
        watch.on_train_batch_start(trainer, module, batch, step)  # type: ignore[arg-type]
        block(torch.ones(3, 2))
        watch.on_train_batch_end(trainer, module, None, batch, step)  # type: ignore[arg-type]
        counts.append(counter.frame_count)
    assert counts == [0, 1, 1]
    assert watch.flops == 2 * (2 * 3 * 2 * 8)
