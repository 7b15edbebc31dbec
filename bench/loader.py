"""How fast images are loaded: read, decoded, augmented, batched. Compares this project's memory-mapped and streamed
loaders with webdataset (`pip install webdataset`) and a plain folder, on the same JPEGs in the same run.

    python bench/loader.py --images FOLDER            images of any folder; without it those of the built-in world
    python bench/loader.py --memory 20000             memory in use after loading that many samples
    python bench/loader.py --parts                    what decoding costs of an image, and what augmenting

All use the same tokenizer and collation, and this project's augmentation; those with "+ torchvision" use torchvision's
own transforms with the same settings, written in the usual way. Each library reads and decodes in its own way
(webdataset's "pilrgb", torchvision's `default_loader`). Images are resized as by `make data` (shorter side 288, quality
90). Rounds are interleaved, and medians are reported. If other work shares the cores, `cpu ms` (per image, of all
processes) is more meaningful than images per second.
"""

import argparse
import gc
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from maskvlm.data.batch import InputSpec
from maskvlm.data.images import safe_open
from maskvlm.data.module import PairData
from maskvlm.data.pairs import Collate, Sample
from maskvlm.data.prepare.prepare import Plan, prepare
from maskvlm.data.prepare.shards import Settings
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw.base import Facts, RawRow, RawSet
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.streaming.source import Stream
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import TrainTransform, train_transform

SIDE, SHARDS = 288, 4
CAPTIONS = (
    "A dog runs through the grass with a ball in its mouth .",
    "Two people sit on a bench beside the water and talk .",
    "A man in a red shirt climbs up the left side of a large rock .",
    "Children play with a toy in front of a house while a woman watches them .",
    "A boy jumps off a low wall .",
)
TENTHS = 10  # memory is measured after each
SEEDS = count()
TICKS = os.sysconf("SC_CLK_TCK")
Loader = DataLoader[Any]


# ------------------------------------------------------------------ the same images in four forms


def jpegs(folder: str | None, count: int) -> Iterator[bytes]:
    """`count` images with a shorter side of 288 pixels; those of a small folder are repeated."""
    paths = (
        sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if folder
        else []
    )
    scenes = Scenes(count, 1, 1, size=SIDE).split("train")
    for number in range(count):
        image = (
            Image.open(paths[number % len(paths)]).convert("RGB") if paths else Image.fromarray(scene(scenes, number))
        )
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def scene(scenes: Any, number: int) -> np.ndarray:
    """An image of the built-in world with the grain of a photo, as flat colours decode too fast."""
    pixels = np.asarray(scenes[number]["image"].convert("RGB"), np.int16)
    grain = np.random.default_rng(number).normal(0, 12, pixels.shape)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)


class JpegFolder(RawSet):
    """The JPEGs of a folder; every fortieth is also in the validation split."""

    facts = Facts("bench", None, None, "")

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.jpg"))

    def rows(self) -> Iterator[RawRow]:
        for number, file in enumerate(self.files):
            # Every fortieth image is in both splits, as an evaluation split is needed, too.
            for split in ("train", "val")[: 1 + (number % 40 == 0)]:
                yield RawRow(str(file), (caption(number),), f"{split} {number}", split, file.name)


def caption(number: int) -> str:
    return CAPTIONS[number % len(CAPTIONS)]


def make(work: Path, images: str | None, count: int) -> None:
    """Write the folder, the tars and the prepared set."""
    for name in ("folder", "tars"):
        (work / name).mkdir()
    for number, jpeg in enumerate(jpegs(images, count)):
        (work / "folder" / f"{number:06}.jpg").write_bytes(jpeg)
    each = -(-count // SHARDS)  # rounded up
    for shard in range(SHARDS):
        with tarfile.open(work / "tars" / f"{shard:05}.tar", "w") as archive:
            for number in range(shard * each, min(count, (shard + 1) * each)):
                jpeg = (work / "folder" / f"{number:06}.jpg").read_bytes()
                # An image and its caption share a name, from which webdataset makes a sample.
                for ending, content in (("jpg", jpeg), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    plan = Plan("folder", str(work / "folder"), Settings("bench", SIDE), {}, rows=each)
    prepare(JpegFolder(work / "folder"), plan, work / "prepared", 1, lambda text: None)


# ------------------------------------------------------------------ loaders


def sample(image_CHW: torch.Tensor, text: str, number: int) -> Sample:
    return Sample(
        image_CHW=image_CHW,
        captions=[text],
        image_id=str(number),
        index=number,
        valid=True,
        problem=None,
        foreground=None,
        mirrored=None,
    )


class Folder(Dataset[Sample]):
    """A plain folder, read as in torchvision."""

    def __init__(self, folder: Path, transform: Callable[..., torch.Tensor]) -> None:
        self.files, self.transform = sorted(map(str, folder.glob("*.jpg"))), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return sample(self.transform(default_loader(self.files[index]), caption(index)), caption(index), index)


class Torchvision:
    """The same augmentation from torchvision's parts, which ignore captions."""

    def __init__(self, spec: InputSpec) -> None:
        fill = [round(255 * mean) for mean in spec.mean]
        crop = v2.RandomResizedCrop(spec.image_size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        change = v2.RandAugment(2, 7, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
        # uint8, like the others: normalised on the device of the step
        self.steps = v2.Compose([crop, v2.RandomHorizontalFlip(), change, v2.PILToTensor()])

    def __call__(self, image: Image.Image, caption: str) -> torch.Tensor:
        return self.steps(image)


class ToSample:
    """Converts webdataset's tuples to samples."""

    def __init__(self, transform: Callable[..., torch.Tensor]) -> None:
        self.transform = transform

    def __call__(self, row: tuple[Image.Image, str]) -> Sample:
        image, text = row
        return sample(self.transform(image, text), text, 0)


def own(source: Any, options: argparse.Namespace, workers: int, batches: int) -> PairData:
    spec = InputSpec(options.size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), text_length=30, vocab_size=200)
    seed = next(SEEDS)  # a new one each time, as the cost depends on what is drawn
    data = PairData(source, spec, batch_size=options.batch, steps=batches, workers=workers, seed=seed)
    data.setup("fit")
    return data


def loader(name: str, work: Path, options: argparse.Namespace, workers: int, batches: int) -> Loader:
    """A loader that yields `batches` batches or more."""
    prepared = str(work / "prepared")
    streamed = name == "streamed"
    source = Stream(prepared if streamed else str(work / "tars"), prepared) if "stream" in name else Prepared(prepared)
    data = own(source, options, workers, batches)
    if name == "memory-mapped" or "stream" in name:
        return data.train_dataloader()
    transform = train_transform(data.spec, normalise=False)
    collate = Collate(Captioner(data.tokenizer, data.spec.text_length))
    if "torchvision" in name:
        transform = Torchvision(data.spec)
    settings: dict[str, Any] = {"batch_size": options.batch, "num_workers": workers, "collate_fn": collate}
    if name.startswith("folder"):
        rows: Any = Folder(work / "folder", transform)
        endless = torch.utils.data.RandomSampler(rows, replacement=False, num_samples=batches * options.batch)
        return DataLoader(rows, sampler=endless, **settings)
    import webdataset

    tars = sorted(map(str, (work / "tars").glob("*.tar")))
    rows = webdataset.WebDataset(tars, shardshuffle=100, empty_check=False).shuffle(1000).decode("pilrgb")
    return DataLoader(rows.to_tuple("jpg", "txt").map(ToSample(transform)).repeat(), **settings)


# ------------------------------------------------------------------ measuring


def cpu_seconds(processes: list[int]) -> float:
    """CPU time of other processes so far, in seconds; 0 for a process whose time is not available."""
    total = 0.0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # Fields 14 and 15 of `stat`, utime and stime, counted after the name, which may contain spaces.
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def timed(name: str, work: Path, options: argparse.Namespace, workers: int) -> tuple[float, float]:
    """Images per second, and CPU milliseconds per image of all processes, after the first batches."""
    # Each worker prefetches two batches, which are not timed.
    warm = 2 * workers + 2
    batches = iter(loader(name, work, options, workers, warm + options.batches + 2 * workers))
    for _ in range(warm):
        next(batches)
    pids = [worker.pid for worker in getattr(batches, "_workers", [])]
    start, cpu, ours = time.perf_counter(), cpu_seconds(pids), time.process_time()
    for _ in range(options.batches):
        next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(pids) - cpu + time.process_time() - ours
    images = options.batches * options.batch
    return images / seconds, 1000 * cpu / images


def speed(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    names = options.loaders
    timings: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(options.rounds):
        for workers in options.workers:
            # The order rotates, so that no loader always meets a cold cache.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                timings.setdefault((name, workers), []).append(timed(name, work, options, workers))
    rows = []
    for (name, workers), rounds in sorted(timings.items(), key=lambda item: (item[0][1], names.index(item[0][0]))):
        rates, cpus = zip(*rounds, strict=True)
        rows.append(
            {
                "loader": name, "workers": workers, "images_per_second": round(statistics.median(rates), 1),
                "least": round(min(rates), 1), "most": round(max(rates), 1),
                "cpu_ms_per_image": round(statistics.median(cpus), 3), "rounds": options.rounds,
            }
        )  # fmt: skip
    return rows


def resident(processes: list[int]) -> dict[str, float]:
    """MB used by these processes: RSS (shared pages count in each), PSS, and the part of PSS that is not file pages."""
    sums = {"Rss": 0, "Pss": 0, "Pss_Anon": 0}
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in sums:
                sums[key] += int(rest.split()[0])
    return {key: round(value / 1024, 1) for key, value in sums.items()}


def memory(name: str, work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory after each tenth of `--memory` samples, with two data workers, which end with the last batches."""
    count = options.memory // options.batch
    batches = iter(loader(name, work, options, 2, count))
    pids = [os.getpid(), *(worker.pid for worker in getattr(batches, "_workers", []))]
    rows = []
    for number in range(1, count - 4):
        next(batches)
        if number % (count // TENTHS) == 0:
            rows.append({"loader": name, "samples": number * options.batch, **resident(pids)})
    del batches  # and its workers, which share pages with those of the next
    gc.collect()
    return rows


def parts(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU milliseconds per image of one thread for each part of the augmentation, the median of the rounds."""
    jpeg_files = [path.read_bytes() for path in sorted((work / "folder").glob("*.jpg"))]
    spec = InputSpec(options.size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), text_length=30, vocab_size=200)
    whole = TrainTransform(spec, normalise=False)
    crop = TrainTransform(spec, randaugment=None, flip=False, normalise=False)
    taken: dict[str, list[float]] = {"decode": [], "crop and resize": [], "with mirror and RandAugment": []}
    for _ in range(options.rounds):
        began = time.process_time()
        images = [safe_open(jpeg, "", whole.least) for jpeg in jpeg_files]
        taken["decode"].append(time.process_time() - began)
        for name, transform in (("crop and resize", crop), ("with mirror and RandAugment", whole)):
            began = time.process_time()
            for number, image in enumerate(images):
                transform(image, caption(number))
            taken[name].append(time.process_time() - began)
    return [
        {"part": name, "cpu_ms_per_image": round(1000 * statistics.median(seconds) / len(jpeg_files), 3)}
        for name, seconds in taken.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    heads = [*rows[0]]
    cells = [heads, *[[str(row[head]) for head in heads] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of images; default: those of the built-in world")
    parser.add_argument("--count", type=int, default=2000, help="images in the set")
    parser.add_argument("--size", type=int, default=224, help="pixels that the model sees")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    every = ["memory-mapped", "streamed", "streamed tars"]
    every += ["webdataset", "folder", "webdataset + torchvision", "folder + torchvision"]
    parser.add_argument("--loaders", nargs="+", default=every, choices=every)
    parser.add_argument("--memory", type=int, help="measure what so many samples leave in memory, instead of the speed")
    parser.add_argument("--parts", action="store_true", help="measure the parts of an image's work, instead of loaders")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    if options.memory is not None and options.memory < TENTHS * options.batch:
        parser.error(f"--memory: give {TENTHS * options.batch} samples or more, {TENTHS} batches")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        make(Path(work), options.images, options.count)
        if options.parts:
            rows = parts(Path(work), options)
        elif options.memory:
            rows = [row for name in options.loaders for row in memory(name, Path(work), options)]
        else:
            rows = speed(Path(work), options)
    sizes = f"shorter side {SIDE} -> {options.size} pixels, batches of {options.batch}"
    print(f"{options.count} JPEGs, {sizes}, load now {os.getloadavg()[0]:.1f}")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
