"""FAISS indexes of unit vectors: their kind, tuning and file. Searched by inner product, which is the cosine.

Shapes: N vectors, Q queries, K results, E contrast width.
"""

import errno
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvlm.checkpoint.integrity import first_line
from maskvlm.inference.vector_files import Facts
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import whole_file

Array = np.ndarray[Any, Any]
FLAT_UP_TO = 50_000  # vectors: exhaustive search takes milliseconds and misses none
RECALL = 0.96  # of the 10 nearest, on average: slightly above the promised 0.95, as other queries differ


class IndexKind(NamedTuple):
    """A kind of index: its `faiss.index_factory` string, and the parameter that trades query time for recall, with its
    values."""

    factory: str
    knob: str | None = None
    values: tuple[int, ...] = ()


def kinds(count: int, width: int) -> dict[str, IndexKind]:
    """The kinds of index for `count` vectors of this width; bench/search.py measures them."""
    # About 2 * sqrt(N) lists, as a power of two; each holds sqrt(N) / 2 vectors on average.
    lists = 2 ** max(0, round(math.log2(2 * math.sqrt(count))))
    # Steps are 2, 3, 4, 6, 8, 12 ...: each 1.3 to 1.5 times the previous one.
    pieces, steps = width // 2 if width % 2 == 0 else width, [n * 2**power for power in range(15) for n in (2, 3)]
    return {
        "flat": IndexKind("Flat"),
        "ivf": IndexKind(f"IVF{lists},Flat", "nprobe", (1, *(step for step in steps if step <= lists // 8))),
        # 4 bits per piece of two dimensions; RFlat re-scores k * k_factor_rf candidates with the full vectors.
        "pq": IndexKind(f"PQ{pieces}x4fs,RFlat", "k_factor_rf", tuple(steps[2:19:2])),  # 4 to 1024
        "hnsw": IndexKind("HNSW32,Flat", "efSearch", tuple(steps[6:17:2])),  # 16 to 512
    }


def faiss_module() -> Any:
    """The faiss module. Raises UserError: it is not installed (69)."""
    try:
        import faiss
    except ImportError:
        todo = "Install it: python -m pip install faiss-cpu"
        raise UserError("search", "faiss is not installed", todo, ExitCode.UNAVAILABLE) from None
    return faiss


def trained_index(kind: IndexKind, vector_NE: Array) -> Any:
    """An empty index that is trained on the distribution of these vectors."""
    faiss, (count, width) = faiss_module(), vector_NE.shape
    index = faiss.index_factory(width, kind.factory, faiss.METRIC_INNER_PRODUCT)
    # 50 vectors per list: FAISS's k-means warns below 39, and more costs time.
    most = 50 * faiss.extract_index_ivf(index).nlist if kind.knob == "nprobe" else 65_536
    try:
        index.train(vector_NE[np.sort(np.random.default_rng(0).choice(count, min(most, count), replace=False))])
    except RuntimeError:  # k-means needs more points than centres
        raise UserError("index", f"{count} vectors are too few for {kind.factory}", "Use --kind flat") from None
    return index


def turn(index: Any, knob: str | None, value: int | None) -> None:
    """Set the parameter that trades speed for recall; flat indexes have none."""
    if knob is not None:
        faiss_module().ParameterSpace().set_index_parameter(index, knob, value)


def tune(index: Any, kind: IndexKind, vector_NE: Array, query_QE: Array, least: float) -> tuple[int | None, float]:
    """Raise the parameter until enough of the 10 nearest neighbours of these queries are found; returns its value and
    the recall. Results as near as the tenth count as found, since vectors may be equal."""
    faiss, k, value, recall = faiss_module(), min(10, len(vector_NE)), None, 0.0
    tenth_Q1 = faiss.knn(query_QE, vector_NE, k, faiss.METRIC_INNER_PRODUCT)[0][:, -1:]  # exact: (Q, 1)
    for value in kind.values or (None,):
        turn(index, kind.knob, value)
        similarity_QK, position_QK = index.search(query_QE, k)
        # 1e-5 allows for rounding: the index and the exact search may sum in a different order.
        recall = float(((similarity_QK >= tenth_Q1 - 1e-5) & (position_QK >= 0)).mean())
        if recall >= least:
            break
    return value, recall


def milliseconds(index: Any, query_QE: Array) -> Array:
    """Search time of each query, run one at a time, in milliseconds, [Q]."""
    times = [time.perf_counter()]
    for query_1E in query_QE[:, None]:
        index.search(query_1E, 10)
        times.append(time.perf_counter())
    return 1000 * np.diff(times)


def build_index(vector_NE: Array, query_QE: Array, name: str = "auto", least: float = RECALL) -> tuple[Any, Facts]:
    """Build an index of unit vectors; returns it with its entries for `index.json`.

    `auto` is flat up to 50,000 vectors and IVF above. If IVF misses too much even when it searches an eighth of its
    lists, as with vectors that do not cluster, PQ with exact re-scoring is also built, and the better one is kept.
    """
    known, auto = kinds(*vector_NE.shape), ["ivf", "pq"] if len(vector_NE) > FLAT_UP_TO else ["flat"]
    indexes: dict[float, tuple[Any, Facts]] = {}
    for each in auto if name == "auto" else [name]:
        start, kind = time.perf_counter(), known[each]
        index = trained_index(kind, vector_NE)
        index.add(vector_NE)
        value, recall = tune(index, kind, vector_NE, query_QE, least)
        about: Facts = {"kind": each, "factory": kind.factory, "knob": kind.knob, "value": value}
        about |= {"share_of_exact_10": round(recall, 4), "build_seconds": round(time.perf_counter() - start, 3)}
        # By recall: if no kind finds enough, the best one is kept.
        indexes[recall] = index, about
        if recall >= least:
            break
    index, about = indexes[max(indexes)]
    about["median_ms"] = round(float(np.median(milliseconds(index, query_QE[:200]))), 3)
    return index, about | {"queries": len(query_QE), "threads": faiss_module().omp_get_max_threads()}


def write_index(index: Any, path: Path) -> None:
    """Write an index file atomically. Raises UserError (73, or 74 for a full disk)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            faiss_module().write_index(index, str(temporary))
    except (RuntimeError, OSError) as error:  # FAISS raises its own, which ends with the system's message
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        reason = "disk full" if full else getattr(error, "strerror", None) or first_line(error)
        todo = "Free some space, or choose another folder; complete files are kept"
        code = ExitCode.IO_ERROR if full else ExitCode.CANNOT_CREATE
        raise UserError(path, f"cannot be written ({reason})", todo, code) from error
