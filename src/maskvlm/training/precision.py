"""Which precision a run trains in on a CPU: bfloat16 where this processor computes in it, and is faster for it."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from maskvlm.model.attention_kernel import attend_by_products
from maskvlm.utils.whole_files import read_json

WORTH = 1.2  # times as fast; for less the rounding is not worth it
NARROW = 256  # below that width conversions cost more than products gain (measured at 96 and 128)
POSITIONS, TIMES = 1024, 3  # of all images of a trial; repetitions, of which the fastest counts


def in_hardware() -> bool:
    """Whether this processor multiplies bfloat16: by AMX, or by AVX-512's instructions for it."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def alone() -> bool:
    """Whether no launcher has started further processes of this run."""
    return all(os.environ.get(name, "1") in ("", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def cpu_precision(block: nn.Module, positions: int, width: int, folder: Path) -> str | None:
    """`bf16-mixed` where a block of the image encoder trains at least `WORTH` times as fast in it, else None.

    A run that goes on keeps what it began with, on whatever processor.

    Args:
        block: of a transformer, [B, L, D] -> [B, L, D]; it is left as it is.
        positions: L. width: D.
        folder: of the run.
    """
    # RunRecord notes it there. Another rounding from the middle of a run on would change its losses.
    began = read_json(folder / "versions.json").get("precision")
    if began is not None:
        return "bf16-mixed" if began == "bf16-mixed" else None
    if width < NARROW or not in_hardware():
        return None
    # So many images that the trial is the same size at any resolution: [rows, L, D].
    rows = max(2, POSITIONS // positions)
    x_BLD = torch.randn(rows, positions, width, generator=torch.Generator().manual_seed(0))
    single = fastest(lambda: trial(block, x_BLD, None))
    # As a run in bfloat16 has it.
    block = copy.deepcopy(block)
    attend_by_products(block)
    half = fastest(lambda: trial(block, x_BLD, torch.bfloat16))
    return "bf16-mixed" if single >= WORTH * half else None


def trial(block: nn.Module, x_BLD: Tensor, kind: torch.dtype | None) -> None:
    """One pass forwards and backwards; no gradient is left behind."""
    parameters = list(block.parameters())
    with torch.enable_grad():
        with torch.autocast("cpu", kind, enabled=kind is not None):
            y_BLD = block(x_BLD.requires_grad_())
        torch.autograd.grad(y_BLD.float().square().mean(), [x_BLD, *(p for p in parameters if p.requires_grad)])


def fastest(run: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    seconds = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
