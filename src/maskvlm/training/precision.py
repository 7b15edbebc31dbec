"""Chooses the precision for training on a CPU: bfloat16 if the processor supports it and is faster with it."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from maskvlm.model.attention_kernel import attend_by_products
from maskvlm.utils.whole_files import read_json

WORTH = 1.2  # minimum speed-up; for less the rounding is not worth it
NARROW = 256  # below this width conversions cost more than faster products gain (measured at 96 and 128)
POSITIONS, TIMES = 1024, 3  # of all images in a trial; repetitions, of which the fastest counts


def in_hardware() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, by AMX or AVX-512's instructions for it."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def alone() -> bool:
    """Whether no launcher (torchrun, SLURM) has started several processes; `trainer.devices` is not checked."""
    return all(os.environ.get(name, "1") in ("", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def cpu_precision(block: nn.Module, positions: int, width: int, folder: Path) -> str | None:
    """`bf16-mixed` if a block of the image encoder trains at least `WORTH` times as fast in it, else None.

    A resumed run keeps the precision it started with, on any processor.

    Args:
        block: a transformer block, [B, L, D] -> [B, L, D]; it is not changed.
        positions: L. width: D.
        folder: the run's folder.
    """
    # Recorded by RunRecord. Different rounding from the middle of a run on would change its losses.
    began = read_json(folder / "versions.json").get("precision")
    if began is not None:
        return "bf16-mixed" if began == "bf16-mixed" else None
    if width < NARROW or not in_hardware():
        return None
    # As many images as make the trial the same size at any resolution: [rows, L, D].
    rows = max(2, POSITIONS // positions)
    x_BLD = torch.randn(rows, positions, width, generator=torch.Generator().manual_seed(0))
    single = fastest(lambda: trial(block, x_BLD, None))
    # As in a bfloat16 run.
    block = copy.deepcopy(block)
    attend_by_products(block)
    half = fastest(lambda: trial(block, x_BLD, torch.bfloat16))
    return "bf16-mixed" if single >= WORTH * half else None


def trial(block: nn.Module, x_BLD: Tensor, kind: torch.dtype | None) -> None:
    """One forward and backward pass; leaves no gradients behind."""
    parameters = list(block.parameters())
    with torch.enable_grad():
        with torch.autocast("cpu", kind, enabled=kind is not None):
            y_BLD = block(x_BLD.requires_grad_())
        torch.autograd.grad(y_BLD.float().square().mean(), [x_BLD, *(p for p in parameters if p.requires_grad)])


def fastest(run: Callable[[], None]) -> float:
    """Time of the fastest of `TIMES` runs in seconds, after a warm-up run."""
    seconds = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
