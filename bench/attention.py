"""The gain of two optimisations on a CPU: attention by matrix products in bfloat16, and keeping freed memory.

    PYTHONPATH=src:. python bench/attention.py model=compact data=flickr8k encoders=encoders      # rounds of four ways

Each way is `maskvlm bench` in its own process: with both, without one, without the other and without both. The ratios
are medians over the rounds, each relative to the run with both in the same round. `--kernels` times only the attention,
at the sizes of that step, forward and backward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from maskvlm.model.attention_kernel import attend

WAYS = {
    "as it is": "",
    "torch's kernel": "maskvlm.training.lit.attend_by_products = lambda model: None",
    "memory given back": "maskvlm.cli.lightning.keep_freed_memory = contextlib.nullcontext",
}
WAYS["neither"] = "; ".join(way for way in WAYS.values() if way)
RUN = """
import sys
import contextlib
import maskvlm.cli.bench, maskvlm.cli.lightning, maskvlm.training.lit
from maskvlm.cli.main import main
{change}
maskvlm.cli.bench.STEPS, maskvlm.cli.bench.WARMUP = {steps}, 2
sys.exit(main(["bench", *sys.argv[1:], "--json"]))
"""
SIZES = ((192, 6, 122, 122, 64), (256, 6, 122, 30, 64), (64, 6, 122, 122, 64), (128, 12, 17, 17, 32))


def milliseconds(words: list[str], change: str, steps: int) -> float:
    """Milliseconds per step, averaged over a run."""
    command = [sys.executable, "-c", RUN.format(change=change, steps=steps), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["milliseconds"])


def kernel(size: tuple[int, ...], kind: torch.dtype, by_products: bool) -> float:
    """Milliseconds of a forward and backward pass, the best of five."""
    rows, heads, asking, context, width = size
    q, k, v = (torch.randn(rows, n, heads, width, dtype=kind).transpose(1, 2) for n in (asking, context, context))
    inputs, best = [x.requires_grad_() for x in (q, k, v)], float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.autograd.grad(attend(*inputs, None, by_products).sum(), inputs)
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as of `maskvlm bench`: model=.. data=..")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    if options.kernels:
        for size in SIZES:
            for kind in (torch.bfloat16, torch.float32):
                times = [kernel(size, kind, by_products) for by_products in (False, True)]
                print(f"{size} {kind}: torch's kernel {times[0]:.1f} ms, products {times[1]:.1f} ms", flush=True)
        return
    durations: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, change in WAYS.items():
            durations[way].append(milliseconds(options.words, change, options.steps))
            print(f"{way}: {durations[way][-1]:.0f} ms a step", flush=True)
    for way in list(WAYS)[1:]:
        times = [other / own for other, own in zip(durations[way], durations["as it is"], strict=True)]
        print(f"{way}: {statistics.median(times):.2f} times as long ({', '.join(f'{each:.2f}' for each in times)})")


if __name__ == "__main__":
    main()
