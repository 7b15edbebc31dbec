"""Search over a million vectors: builds, tunes and queries each kind of index of `maskvlm index`, and prints a table.

    OMP_NUM_THREADS=2 python bench/search.py [--count 1000000] [--kinds ivf pq hnsw flat] [--data clustered noise]

`clustered`: 20,000 centres of uneven weight with spread around them, mostly in few directions, as with encoders.
Queries are drawn around the same centres and then all shifted in one direction, as text embeddings are shifted from
those of images. `noise`: uniform over the sphere, a worst case that no encoder produces. Tuned with 500 queries and
evaluated with 1,000 others: recall@10 by position against exact search, and milliseconds of a single query. If other
work shares the cores, look at `cpu s` and `cpu ms`, the CPU time of a build and a query over all threads: two idle
cores would take half of that, or slightly more.

Shapes: N vectors, Q queries, E width.
"""

import argparse
import gc
import os
import time

import numpy as np

from maskvlm.inference.faiss_index import RECALL, Array, faiss_module, kinds, milliseconds, trained_index, tune

PART = 50_000  # vectors added between checks of the clock


def unit(x_NE: Array) -> Array:
    x_NE /= np.linalg.norm(x_NE, axis=1, keepdims=True)
    return x_NE


def vectors(kind: str, count: int, width: int, seed: int, side: float) -> Array:
    """Random unit vectors, [N, E]. `side`: signed distance by which all clustered ones are shifted in one direction."""
    rng = np.random.default_rng(seed)
    x_NE = rng.standard_normal((count, width), dtype=np.float32)
    if kind == "clustered":
        # Variance decreases over the dimensions as 1 / index.
        spread_E = np.arange(1, width + 1, dtype=np.float32) ** -0.5
        spread_E /= np.linalg.norm(spread_E)
        # The centres are the same for vectors and queries, whatever the seed.
        centre_CE = np.random.default_rng(0).standard_normal((20_000, width), dtype=np.float32) * spread_E
        weight_C = np.arange(1, len(centre_CE) + 1) ** -0.7
        x_NE *= 0.7 * spread_E
        x_NE += centre_CE[rng.choice(len(centre_CE), count, p=weight_C / weight_C.sum())]
        x_NE[:, 0] += side
    return unit(x_NE)


def main() -> None:
    parser = argparse.ArgumentParser(description="time and recall of each kind of index")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=["ivf", "pq", "hnsw", "flat"])
    parser.add_argument("--data", nargs="+", default=["clustered", "noise"])
    parser.add_argument("--most", type=float, default=240, help="seconds after which a build is given up")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    faiss = faiss_module()
    faiss.omp_set_num_threads(options.threads)
    print(f"faiss {faiss.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{options.count} vectors of width {options.width}; recall@10 asked for when tuned: {RECALL}")
    print("data       index                  setting           build s   cpu s  tune s  recall@10  ", end="")
    print("median ms  p95 ms  cpu ms    MB  load", flush=True)
    for data in options.data:
        # Vectors are shifted one way and queries the other, as images and texts are apart.
        vector_NE = vectors(data, options.count, options.width, 1, 0.7)
        query_QE = vectors(data, 1_500, options.width, 2, -0.7)
        # Recall is measured on other queries than those that the setting was tuned with.
        tune_QE, ask_QE = query_QE[:500], query_QE[500:]
        exact_QK = faiss.knn(ask_QE, vector_NE, 10, faiss.METRIC_INNER_PRODUCT)[1]
        for name in options.kinds:
            gc.collect()
            kind = kinds(*vector_NE.shape)[name]
            start, cpu = time.perf_counter(), time.process_time()
            index = trained_index(kind, vector_NE)
            for first in range(0, options.count, PART):
                index.add(vector_NE[first : first + PART])
                if time.perf_counter() - start > options.most:
                    break
            built, cpu = time.perf_counter() - start, time.process_time() - cpu
            head = f"{data:9}  {kind.factory:21}"
            if index.ntotal < options.count:
                share = 100 * index.ntotal / options.count
                print(f"{head}  given up after {built:.0f} s ({cpu:.0f} cpu s) with {share:.0f} % in it", flush=True)
                continue
            value, _ = tune(index, kind, vector_NE, tune_QE, RECALL)
            tuned = time.perf_counter() - start - built
            nearest_QK = index.search(ask_QE, 10)[1]
            # By position, as equal vectors hardly occur here.
            both = zip(nearest_QK.tolist(), exact_QK.tolist(), strict=True)
            recall = np.mean([len(set(nearest) & set(exact)) / 10 for nearest, exact in both])
            alone_QE, cpu_then = ask_QE if name != "flat" else ask_QE[:100], time.process_time()
            times = milliseconds(index, alone_QE)
            each = 1000 * (time.process_time() - cpu_then) / len(alone_QE)
            # Written to a counter, as only the size on disk is needed.
            size: list[int] = []
            faiss.write_index(index, faiss.PyCallbackIOWriter(lambda part, size=size: size.append(len(part))))
            setting = f"{kind.knob} {value}" if kind.knob else ""
            print(
                f"{head}  {setting:16}  {built:7.1f}  {cpu:6.1f}  {tuned:6.1f}  {recall:9.3f}  {np.median(times):9.2f}"
                f"  {np.percentile(times, 95):6.2f}  {each:6.2f}  {sum(size) / 1e6:4.0f}  {os.getloadavg()[0]:4.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
