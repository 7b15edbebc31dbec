"""`make bench`: a few steps, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from maskvlm.cli import bench
from maskvlm.cli.main import main
from maskvlm.model.feed_forward import FeedForward


def test_a_configuration_is_timed_and_nothing_is_kept(
    stack: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails where a bench counts as a run, whose folder was never claimed."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(bench, "STEPS", 3)
    monkeypatch.setattr(bench, "WARMUP", 1)
    assert main(["bench", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), "--data.batch_size=8"]) == 0
    assert " pairs/s, " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_gpu_is_waited_for_only_where_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("forget"))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(done.append("read") or len(done))))
    monkeypatch.setattr(bench, "measured", lambda *_: SimpleNamespace(_replace=lambda **kinds: kinds))
    watch, batch = bench.Stopwatch(), SimpleNamespace(valid_B=[True] * 8)
    trainer = SimpleNamespace(world_size=1, precision="32-true")
    module = SimpleNamespace(device=torch.device("cuda"), task=SimpleNamespace(image_learns=0.5))
    for step in range(bench.STEPS + 2):
        watch.on_train_batch_start(trainer, module, batch, step)  # type: ignore[arg-type]
        done.append("step")
        watch.on_train_batch_end(trainer, module, None, batch, step)  # type: ignore[arg-type]
    first, timed = ["step"] * bench.WARMUP, ["step"] * (bench.STEPS - bench.WARMUP)
    assert done == [*first, "wait", "forget", "read", *timed, "wait", "read", "step", "step"]
    assert watch.speed == {"contrast_first": 0.0, "image_learns": 0.5}  # of a task that has no contrast first


def test_blocks_are_compiled_after_the_step_whose_operations_are_counted() -> None:
    """Fails where they are called while operations are counted: torch never compiles them then."""
    block, made = FeedForward(2), CompileCounter()
    block.compile(backend=made)
    watch, batch = bench.Stopwatch(), SimpleNamespace(valid_B=[True] * 8)
    trainer, module = SimpleNamespace(world_size=1, precision="32-true"), SimpleNamespace(device=torch.device("cpu"))
    found = list[int]()
    for step in range(3):
        watch.on_train_batch_start(trainer, module, batch, step)  # type: ignore[arg-type]
        block(torch.ones(3, 2))
        watch.on_train_batch_end(trainer, module, None, batch, step)  # type: ignore[arg-type]
        found.append(made.frame_count)
    assert found == [0, 1, 1]
    assert watch.flops == 2 * (2 * 3 * 2 * 8)
