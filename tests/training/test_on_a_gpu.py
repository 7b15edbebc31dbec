"""What a run does on a GPU: each test has the same body on the CPU, where it runs everywhere."""

import csv
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from slow_step import build, eventful_batch, gradients
from torch import nn

from maskvlm.checkpoint.io import load
from maskvlm.cli.main import main
from maskvlm.training.lit import LitModel
from maskvlm.utils.distributed import Draw, RowExchange
from maskvlm.utils.whole_files import read_json

DEVICES = ("cpu", pytest.param("gpu", marks=pytest.mark.gpu))
SMALL: dict[str, Any] = {
    "data.steps": 4,
    "data.batch_size": 8,
    "data.workers": 0,
    "data.source.train": 60,
    "data.source.val": 6,
    "model.task.rerank_k": 4,
    "model.task.decoder_layers": 1,
    "model.backbone.cross_layers": 1,
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
    "trainer.devices": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.precision": "32-true",
}
LOSSES = ("itc", "itm", "mlm", "mim", "spread")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def run(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> Callable[..., int]:
    """Runs a subcommand in the folder of that name; returns the exit status."""
    monkeypatch.chdir(root)

    def call(command: str, name: str, device: str, **settings: Any) -> int:
        words = [f"--{key}={value}" for key, value in (SMALL | settings).items()]
        place = ["--folder", str(tmp_path / name), f"--trainer.accelerator={device}"]
        return main([command, *stack(WHERE="cpu"), *words, *place])

    return call


def losses_in(folder: Path) -> list[list[float]]:
    """Of each step, those of `LOSSES`."""
    with (folder / "metrics.csv").open() as file:
        return [[float(row[f"train/{name}"]) for name in LOSSES] for row in csv.DictReader(file) if row["train/itc"]]


def test_a_fit_in_bfloat16_begins_as_one_in_float32_and_keeps_float32_weights(
    device: str, run: Callable[..., int], tmp_path: Path
) -> None:
    for precision in ("32-true", "bf16-mixed"):
        assert run("fit", precision, device, **{"trainer.precision": precision, "trainer.limit_val_batches": 0}) == 0
    exact, rounded = (losses_in(tmp_path / precision) for precision in ("32-true", "bf16-mixed"))
    assert exact != rounded
    # Hard negatives, and so matching, are drawn by similarities: rounded, another one may win.
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)
    assert torch.tensor(rounded).shape == (4, len(LOSSES))
    assert torch.tensor(rounded).isfinite().all()
    state = load(tmp_path / "bf16-mixed" / "last.ckpt")["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def test_an_evaluation_gives_what_the_cpu_gives(device: str, run: Callable[..., int], tmp_path: Path) -> None:
    """Retrieval in both stages; masks are drawn on the device, whose random numbers are others."""
    assert run("fit", "trained", "cpu", **{"trainer.limit_val_batches": 0}) == 0
    for name, where in (("there", device), ("here", "cpu")):
        assert run("validate", name, where, ckpt_path=tmp_path / "trained" / "last.ckpt") == 0
    metrics, expected = (read_json(tmp_path / name / "metrics.json") for name in ("there", "here"))
    assert metrics.keys() == expected.keys()
    ranks = [name for name in expected if name.startswith("retrieval/")]
    assert "retrieval/ir_r1" in ranks
    assert [metrics[name] for name in ranks] == pytest.approx([expected[name] for name in ranks], abs=1e-3)


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(
    device: str, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit on a CPU; kernels of a GPU add in any order."""
    whole = {"trainer.limit_val_batches": 0}
    assert run("fit", "whole", device, **whole) == 0
    step = LitModel.training_step

    def struck(self: LitModel, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and not self.trainer.ckpt_path:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitModel, "training_step", struck)
    assert run("fit", "twice", device, **whole) == 75
    assert load(tmp_path / "twice" / "last.ckpt")["global_step"] == 2
    assert run("fit", "twice", device, **whole) == 0
    losses, expected = losses_in(tmp_path / "twice"), losses_in(tmp_path / "whole")
    assert len(losses) == 4
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected), rtol=0 if device == "cpu" else 1e-3, atol=0
    )


# ------------------------------------------------------------------ one process that speaks with itself


@pytest.fixture
def group(device: str, tmp_path: Path) -> Iterator[torch.device]:
    """A process group of one: NCCL on a GPU, Gloo on a CPU."""
    place = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("gloo" if device == "cpu" else "nccl", place, rank=0, world_size=1)
    try:
        yield torch.device("cpu" if device == "cpu" else "cuda")
    finally:
        dist.destroy_process_group()


def test_rows_are_exchanged_with_gradient(group: torch.device) -> None:
    """What fetches hard negatives from other processes."""
    own_BD = torch.arange(4.0, device=group)[:, None].expand(-1, 3).clone().requires_grad_()
    exchange = RowExchange(torch.tensor([2, 0, 2], device=group), 4)
    rows_MD = exchange(own_BD)
    (rows_MD.sum(1) * torch.tensor([1.0, 2.0, 4.0], device=group)).sum().backward()
    assert rows_MD[:, 0].tolist() == [2, 0, 2]
    assert exchange.arrived_M.tolist() == [True] * 3
    assert own_BD.grad is not None
    assert own_BD.grad[:, 0].tolist() == [2, 0, 5, 0]


class Step(nn.Module):
    """One module around backbone and task."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.backbone, self.task = build()
        self.to(device)
        self.task.set_uniform(Draw(0, 0, device))

    def forward(self, batch: Any) -> Any:
        return self.task(self.backbone, batch)


def test_wrapped_for_several_processes_a_step_has_the_same_gradients(group: torch.device) -> None:
    batch = eventful_batch()
    batch = type(batch)(*(part.to(group) if isinstance(part, torch.Tensor) else part for part in batch))
    alone, wrapped = Step(group), Step(group)
    sum(alone(batch).values()).backward()
    sum(nn.parallel.DistributedDataParallel(wrapped)(batch).values()).backward()
    expected, grads = gradients(alone), gradients(wrapped)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
