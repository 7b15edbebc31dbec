"""Preparing beside a bare loop that decodes, resizes and encodes the same photos, in as many processes; as a table.

    OMP_NUM_THREADS=1 python bench/prepare.py [PHOTOS] [--count 20000] [--size 640] [--workers 2]

PHOTOS is a folder of images; 1,000 of them are resized to `--size` pixels of the longer side in a temporary folder,
and those are prepared again and again until there are `--count`. Without it the photos are noise over colours.
`images/s` is of the whole command but for Python's imports; `cpu ms` is what an image took of the cores, by all
processes; `busy` the share of the cores that was used while shards were made, `ready` for how many processes there was
work, as a share of `--workers`. Where other work shares the cores, compare `cpu ms`, which does not depend on who else
computes (but for caches), and `ready`, which is what `busy` would be on idle cores.
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
    """The same photos under new ids until there are `count` rows."""

    facts = Facts("bench", None, None, "none")

    def __init__(self, paths: list[str], count: int) -> None:
        self.paths, self.count = paths, count

    def rows(self) -> Iterator[RawRow | BadRow]:
        captions = ("a photo of something", "five words tell of it", "one more", "and a fourth", "the last of them")
        for number in range(self.count):
            yield RawRow(self.paths[number % len(self.paths)], captions, f"bench {number}", "train", f"bench:{number}")


def bare(paths: list[str]) -> int:
    """No checks, no hash, no captions, nothing written."""
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = min(1.0, SIDE / min(image.size))
        size = round(image.width * scale), round(image.height * scale)
        image.resize(size, Image.Resampling.BICUBIC).save(BytesIO(), "JPEG", quality=QUALITY)
    return len(paths)


class Used(NamedTuple):
    """Seconds on the clock and of all cores; in the middle 80 % of the time the share of the cores that was used, and
    the mean number of processes that ran or would have, by the number of workers."""

    wall: float
    cpu: float
    busy: float
    ready: float


def measured(run: Callable[[], object], workers: int) -> Used:
    """What a call took, children and their children included (those of this process group)."""
    before, ticks = Clock.now(), Clock()
    start = time.perf_counter()
    ticks.start()
    run()
    wall = time.perf_counter() - start
    ticks.stop()
    return Used(wall, ticks.total() - sum(before.values()), *ticks.busy(wall, workers))


class Clock(threading.Thread):
    """Looks at the processor time of every process of the group five times a second; processes that end are kept."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: dict[int, float] = {}
        self.past: list[tuple[float, float, int]] = []
        self.over = threading.Event()

    @staticmethod
    def now(ready: list[int] | None = None) -> dict[int, float]:
        # A group number finds the workers' own children, too.
        seconds, group = {}, os.getpgid(0)
        for place in Path("/proc").iterdir():
            if place.name.isdigit():
                try:
                    # Behind the name: state, then among others group (5), utime and stime (14 and 15).
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
            running = len({*ready} - {os.getpid()})  # this process is running as it looks
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
        # Processes come and go at both ends: the middle 80 % are the steady part.
        inside = times[(times[:, 0] > start + 0.1 * wall) & (times[:, 0] < start + 0.9 * wall)]
        (first, before, _), (last, after, _) = inside[0], inside[-1]
        return float((after - before) / (last - first) / workers), float(inside[:, 2].mean() / workers)


def photos(folder: str | None, target: Path, size: int) -> list[str]:
    """A thousand of that size, written to `target`."""
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
            # Spawned processes import everything anew: a first call is made before the clock starts.
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
