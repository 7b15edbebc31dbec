"""`make bench`: a few steps, and nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
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
    words = ["bench", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), "--data.batch_size=8"]
    assert main([*words, "--model.task.image_learns=1"]) == 0
    output = capsys.readouterr().out
    assert " pairs/s, " in output
    assert " ms per step, " in output  # of one kind
    # Of two kinds the mean counts: the image encoder learns in the first 90 of 100 steps. Of the six that are made
    # none comes that late by itself.
    assert main([*words, "--model.task.image_learns=0.9", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (learns, first_seconds, first_flops), (still, later_seconds, later_flops) = record["phases"]
    assert (learns, still) == pytest.approx((0.9, 0.1))
    assert later_flops < first_flops
    assert record["flops"] == round(learns * first_flops + still * later_flops)
    assert record["milliseconds"] == pytest.approx(900 * first_seconds + 100 * later_seconds)
    assert not (tmp_path / "run").exists()


def test_attention_on_a_cpu_counts_as_operations() -> None:
    """Two products of [4, 10, 16] and [4, 16, 10] for two rows, and two operations a multiplication with a sum."""
    query = torch.randn(2, 4, 10, 16)
    with bench.Stopwatch().counter as counter:
        nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * 2 * (2 * 4 * 10 * 10 * 16)


def test_a_gpu_is_waited_for_only_where_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("forget"))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(done.append("read") or len(done))))
    monkeypatch.setattr(bench, "measured", lambda *arguments: arguments[-1])
    watch, batch = bench.Stopwatch(), SimpleNamespace(valid_B=[True] * 8)
    watch.begins = (0.0, 0.25)
    trainer = SimpleNamespace(world_size=1, precision="32-true", accumulate_grad_batches=1)
    module = SimpleNamespace(device=torch.device("cuda"))
    for step in range(watch.steps + 2):
        watch.on_train_batch_start(trainer, module, batch, step)  # type: ignore[arg-type]
        done.append("step")
        watch.on_train_batch_end(trainer, module, None, batch, step)  # type: ignore[arg-type]
    first, timed = ["step"] * bench.WARMUP, ["step"] * (bench.STEPS - bench.WARMUP)
    later = [*first, "wait", "read", *timed, "wait", "read"]  # the most memory of both phases is told
    assert done == [*first, "wait", "forget", "read", *timed, "wait", "read", *later, "step", "step"]
    assert [phase.share for phase in watch.speed] == [0.25, 0.75]  # type: ignore[union-attr]


@pytest.mark.parametrize(("passes", "warmup", "timed"), [(1, 5, 20), (4, 2, 5), (32, 1, 1)])
def test_whole_steps_are_timed_however_many_passes_they_have(
    passes: int, warmup: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where the optimiser's step lies outside of what is timed: it is in the last pass of each step."""
    clock = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    watch, batch = bench.Stopwatch(passes), SimpleNamespace(valid_B=[True] * 8)
    trainer = SimpleNamespace(world_size=1, precision="32-true", accumulate_grad_batches=passes)
    module = SimpleNamespace(device=torch.device("cpu"))
    assert watch.steps == warmup + timed
    for number in range(watch.steps * passes):
        watch.on_train_batch_start(trainer, module, batch, number)  # type: ignore[arg-type]
        clock[0] += 1.0 + 100.0 * ((number + 1) % passes == 0)
        watch.on_train_batch_end(trainer, module, None, batch, number)  # type: ignore[arg-type]
    assert watch.speed is not None
    assert watch.speed.milliseconds == 1000 * (passes + 100)
    assert watch.speed.pairs_per_second == 8 * passes / (passes + 100)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("16-true", torch.float16),
        ("32-true", torch.float32),
    ],
)
def test_the_peak_is_that_of_the_precision(precision: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
    monkeypatch.setattr(bench, "get_available_flops", lambda _, asked: 1.0 if asked is kind else 2.0)
    speed = bench.measured(torch.device("cuda"), precision, 8, [bench.PhaseSpeed(1.0, 1.0, 1)])
    assert speed.peak_flops == 1.0


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


def test_each_step_is_one_of_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few there are: a run of so many would not come to its second phase."""
    monkeypatch.setattr(bench, "STEPS", 2)
    watch, batch, task = bench.Stopwatch(), SimpleNamespace(valid_B=[True]), nn.Identity()
    watch.begins = (0.0, 0.9)
    module = SimpleNamespace(device=torch.device("cpu"), task=task)
    watch.on_fit_start(None, module)  # type: ignore[arg-type]
    progress = []
    for step in range(watch.steps):
        watch.on_train_batch_start(None, module, batch, step)  # type: ignore[arg-type]
        task(torch.ones(1))
        progress.append(task.run_progress)
        watch.counting.close()
    assert progress == [0.0, 0.0, 0.9, 0.9]


def test_what_a_step_costs_follows_from_its_options_alone(
    stack: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails where features that are kept by now are not counted, or passes are taken for steps: by these operations
    the arms of a study get their steps."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "WARMUP", 1)
    words = ["bench", *stack(WHERE="cpu"), "--data.batch_size=8", "--model.task.image_learns=1", "--json"]

    def counted(*more: str) -> dict[str, float]:
        assert main([*words, *more]) == 0
        record: dict[str, float] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        return record

    kept = [
        "--model.backbone.image.frozen=1",
        f"--model.backbone.image.feature_cache={tmp_path}",
        "--data.augment=false",
    ]
    first = counted(*kept)
    assert counted(*kept)["flops"] == first["flops"]
    assert list(tmp_path.iterdir()) == []
    whole, halves = counted(), counted("--trainer.accumulate_grad_batches=2")
    assert halves["flops"] == pytest.approx(whole["flops"], rel=0.1)
    ratio = halves["pairs_per_second"] * halves["milliseconds"] / (whole["pairs_per_second"] * whole["milliseconds"])
    assert ratio == pytest.approx(1)
