"""Compares preparing a set with a bare loop that decodes, resizes and encodes the same photos in as many processes.

    OMP_NUM_THREADS=1 python bench/prepare.py [PHOTOS] [--count 20000] [--size 640] [--workers 2]

PHOTOS is a folder of images; 1,000 of them are resized to `--size` pixels on the longer side in a temporary folder, and
are used repeatedly until there are `--count`. Without it the photos are noise over colours.

`images/s` is for the whole command except Python's imports; `cpu ms` is the CPU time per image over all processes;
`busy` is the share of the cores in use while shards were made; `ready` is the number of processes with work to do, as a
share of `--workers`. If other work shares the cores, compare `cpu ms`, which does not depend on it (except through
caches), and `ready`, which is what `busy` would be on idle cores.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskvlm.data.files import image_names
from maskvlm.data.images import safe_open
from maskvlm.data.prepare.finish import Plan
from maskvlm.data.prepare.prepare import prepare
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet

SIDE, QUALITY = 288, 90


class Repeated(RawSet):
    """The same photos, repeated under new ids until there are `count` rows."""

    facts = Facts("bench", None, None, "none")

    def __init__(self, paths: list[str], count: int) -> None:
        self.paths, self.count = paths, count

    def rows(self) -> Iterator[RawRow | BadRow]:
        captions = ("a photo of something", "five words tell of it", "one more", "and a fourth", "the last of them")
        for number in range(self.count):
            yield RawRow(self.paths[number % len(self.paths)], captions, f"bench {number}", "train", f"bench:{number}")


def bare(paths: list[str]) -> int:
    """The bare loop: no checks, no hashes, no captions, nothing written."""
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = min(1.0, SIDE / min(image.size))
        size = round(image.width * scale), round(image.height * scale)
        image.resize(size, Image.Resampling.BICUBIC).save(BytesIO(), "JPEG", quality=QUALITY)
    return len(paths)


class Used(NamedTuple):
    """Wall-clock and CPU seconds. For the middle 80 % of the time: share of the cores in use, and mean number of
    processes that were running or ready to run, divided by the number of workers."""

    wall: float
    cpu: float
    busy: float
    ready: float


def measured(run: Callable[[], object], workers: int) -> Used:
    """Resources used by a call, including its child processes and theirs (those of this process group)."""
    before, ticks = Clock.now(), Clock()
    start = time.perf_counter()
    ticks.start()
    run()
    wall = time.perf_counter() - start
    ticks.stop()
    return Used(wall, ticks.total() - sum(before.values()), *ticks.busy(wall, workers))


class Clock(threading.Thread):
    """Reads the CPU time of every process of the group five times per second, and keeps that of ended processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: dict[int, float] = {}
        self.past: list[tuple[float, float, int]] = []
        self.over = threading.Event()

    @staticmethod
    def now(ready: list[int] | None = None) -> dict[int, float]:
        # The process group includes the workers' own children.
        seconds, group = {}, os.getpgid(0)
        for place in Path("/proc").iterdir():
            if place.name.isdigit():
                try:
                    # After the name: state, then among others group (5), utime and stime (14 and 15).
                    fields = (place / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[2]) == group:
                    if ready is not None and fields[0] == "R":
                        ready.append(int(place.name))
                    seconds[int(place.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seconds

    def run(self) -> None:
        while not self.over.is_set():
            ready: list[int] = []
            self.seconds.update(self.now(ready))
            running = len({*ready} - {os.getpid()})  # this process itself is running while it looks
            self.past.append((time.perf_counter(), self.total(), running))
            self.over.wait(0.2)

    def stop(self) -> None:
        self.over.set()
        self.join()
        self.seconds.update(self.now())

    def total(self) -> float:
        return sum(self.seconds.values())

    def busy(self, wall: float, workers: int) -> tuple[float, float]:
        times = np.array(self.past)
        start = times[0, 0]
        # Processes start and end at both ends: the middle 80 % are steady.
        inside = times[(times[:, 0] > start + 0.1 * wall) & (times[:, 0] < start + 0.9 * wall)]
        (first, before, _), (last, after, _) = inside[0], inside[-1]
        return float((after - before) / (last - first) / workers), float(inside[:, 2].mean() / workers)


def photos(folder: str | None, target: Path, size: int) -> list[str]:
    """Write a thousand photos of that size to `target`; returns their paths."""
    rng = np.random.default_rng(0)
    names = image_names(Path(folder))[:1000] if folder else [str(number) for number in range(1000)]
    paths = []
    for number, name in enumerate(names):
        if folder:
            image = safe_open(Path(folder) / name, name)
        else:
            image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        scale = size / max(image.size)
        large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        path = target / f"{number:06}.jpg"
        large.save(path, quality=90)
        paths.append(str(path))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="preparing beside a bare loop")
    parser.add_argument("photos", nargs="?", help="folder of images")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        target = Path(work) / "photos"
        target.mkdir()
        paths = photos(options.photos, target, options.size)
        every = [paths[number % len(paths)] for number in range(options.count)]
        parts = [every[first : first + 1000] for first in range(0, len(every), 1000)]
        print(f"{options.count:,} images, {options.workers} processes, load {os.getloadavg()[0]:.1f} at the start")
        print("                  wall s  images/s  cpu ms  busy  ready")
        results = {}
        for turn in range(1, options.turns + 1):
            # Spawned processes import everything anew, so make a first call before the clock starts.
            with get_context("spawn").Pool(options.workers) as pool:
                pool.map(bare, [paths[:1]] * options.workers, 1)  # imports

                def loop(pool=pool) -> object:  # type: ignore[no-untyped-def]
                    return pool.map(bare, parts, 1)

                results["bare loop", turn] = measured(loop, options.workers)
            plan = Plan("bench", "bench", Settings("bench", SIDE, QUALITY), {})
            root = Path(work) / f"set{turn}"

            def run_prepare(root=root, plan=plan) -> object:  # type: ignore[no-untyped-def]
                return prepare(Repeated(paths, options.count), plan, root, options.workers)

            results["prepare", turn] = measured(run_prepare, options.workers)
            for name in ("bare loop", "prepare"):
                used = results[name, turn]
                speed, each = options.count / used.wall, 1000 * used.cpu / options.count
                line = f"{name:9} turn {turn}  {used.wall:7.1f}  {speed:10.0f}  {each:6.2f}"
                line += f"  {used.busy:4.0%}  {used.ready:5.0%}"
                print(line, flush=True)
            ratios = [results["prepare", turn][n] / results["bare loop", turn][n] for n in (0, 1)]
            print(f"prepare / bare: wall {ratios[0]:.2f}, cpu {ratios[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
