"""What a run does on a GPU: each test has the same body on the CPU, where it runs everywhere."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from slow_step import build, eventful_batch, gradients
from torch import nn
from training.small_runs import logged

from maskvlm.checkpoint.io import load
from maskvlm.cli.main import main
from maskvlm.utils.distributed import Draw, RowExchange

RUNS = (pytest.param("cpu", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.gpu))
LOSSES = ("itc", "itm", "mlm", "mim", "spread")


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, words: Callable[..., list[str]]) -> Callable[..., int]:
    """Runs a command in the folder of that name, on the CPU or the GPU; returns the exit status."""

    def call(name: str, device: str = request.param, **settings: Any) -> int:
        usual = {"data__steps": 4, "data__batch_size": 8, "data__source__train": 60, "trainer__devices": 1}
        usual |= {"trainer__precision": "32-true", "trainer__limit_val_batches": 0, "trainer__accelerator": device}
        return main(words(name, **usual | settings))

    return call


def losses_in(folder: Path) -> torch.Tensor:
    """[losses, steps]"""
    rows = [[float(value) for _, value in logged(folder, f"train/{name}")] for name in LOSSES]
    return torch.tensor(rows)


def test_a_fit_in_bfloat16_begins_as_one_in_float32_and_keeps_float32_weights(
    run: Callable[..., int], tmp_path: Path
) -> None:
    for precision in ("32-true", "bf16-mixed"):
        assert run(precision, trainer__precision=precision) == 0
    exact, rounded = (losses_in(tmp_path / precision) for precision in ("32-true", "bf16-mixed"))
    assert not torch.equal(exact, rounded)
    # Hard negatives, and so matching, are drawn by similarities: rounded, another one may win.
    torch.testing.assert_close(rounded[:, 0], exact[:, 0], rtol=0.05, atol=0)
    assert rounded.shape == (len(LOSSES), 4)
    assert rounded.isfinite().all()
    state = load(tmp_path / "bf16-mixed" / "last.ckpt")["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


# ------------------------------------------------------------------ one process that speaks with itself


@pytest.fixture(params=("cpu", pytest.param("gpu", marks=pytest.mark.gpu)))
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[torch.device]:
    """A process group of one: NCCL on a GPU, Gloo on a CPU."""
    place, cpu = f"file://{tmp_path / 'meeting'}", request.param == "cpu"
    dist.init_process_group("gloo" if cpu else "nccl", place, rank=0, world_size=1)
    try:
        yield torch.device("cpu" if cpu else "cuda")
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
