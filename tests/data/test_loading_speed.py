"""What makes loading faster changes no image, or by as much as is said; and the benchmark that measures it runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prepared_sets import jpeg, make, raw, toy_image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from toy_pairs import Rows, row
from transformers import PreTrainedTokenizerFast

from bench import loader
from maskvlm.data.batch import InputSpec
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.module import PairData
from maskvlm.data.pairs import Collate, TrainPairs
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import RandAugment, RandomResizedCrop, ToTensor, TrainTransform
from maskvlm.utils.distributed import mix

SPEC = InputSpec(48, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), text_length=12, vocab_size=120)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def test_augmentation_gives_torchvisions_pixels(noise: Image.Image) -> None:
    """Fails where shears or rotations, which do interpolate, are made without."""
    for magnitude in (3, 7, 30):
        settings: dict[str, Any] = {"num_ops": 3, "magnitude": magnitude, "fill": [120, 115, 103]}
        settings["interpolation"] = v2.InterpolationMode.BILINEAR
        for seed in range(80):
            torch.manual_seed(seed)
            ours = RandAugment(**settings)(noise)
            torch.manual_seed(seed)
            assert np.array_equal(np.asarray(ours), np.asarray(v2.RandAugment(**settings)(noise))), (magnitude, seed)


def test_tensors_are_torchvisions_bit_by_bit(noise: Image.Image) -> None:
    steps = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([*SPEC.mean], [*SPEC.std])]
    ours = ToTensor(SPEC)(noise)
    assert torch.equal(ours, v2.Compose(steps)(noise))
    assert ours.is_contiguous()


@pytest.mark.parametrize("size", [16, 48, 100])
def test_crops_are_torchvisions_within_two_levels(size: int) -> None:
    """And what is drawn after a crop is the same, too."""
    pillow = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    for seed in range(30):
        torch.manual_seed(seed)
        ours, after = np.asarray(RandomResizedCrop(size, (0.2, 1.0))(toy_image(seed))), torch.rand(1)
        torch.manual_seed(seed)
        theirs = np.asarray(pillow(toy_image(seed)))
        assert torch.equal(after, torch.rand(1))
        assert ours.shape == theirs.shape == (size, size, 3)
        assert np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_holds_what_the_transform_gives(trained: PreTrainedTokenizerFast, workers: int) -> None:
    """Bytes, or floats; a hole among them is blank."""
    rows = [row(0, image=b"no"), row(1), row(2)]
    for transform, dtype in ((TrainTransform(SPEC, normalise=False), torch.uint8), (TrainTransform(SPEC), torch.float)):
        data = TrainPairs(Rows(rows), transform, 5, 48)
        samples = [data[Pick(number, 1)] for number in range(3)]
        collate = Collate(Captioner(trained, 12))
        batch = next(iter(DataLoader(samples, 3, collate_fn=collate, num_workers=workers)))  # type: ignore[arg-type]
        assert batch.image_BCHW.dtype == dtype
        # in channels-last memory, convolutions would round otherwise
        assert batch.image_BCHW.is_contiguous()
        for number in (1, 2):
            torch.manual_seed(mix(5, 1, number))
            expected = transform(safe_open(rows[number]["image"], "x"), samples[number]["captions"][0])
            assert torch.equal(batch.image_BCHW[number], expected)
        assert not batch.image_BCHW[0].any()


# ---------------------------------------------------------------------- decoding at a reduced scale


def test_what_suffices_leaves_every_crop_as_large_as_the_tensor() -> None:
    for scale, aspect in ((0.2, 1.0), (0.5, 0.6), (1.0, 2.5)):
        transform = TrainTransform(SPEC, (scale, 1.0))
        short = transform.least
        image = Image.new("RGB", (round(short * max(1, aspect)), round(short * max(1, 1 / aspect))))
        torch.manual_seed(0)
        for _ in range(300):
            drawn = transform._crop.make_params([image])
            assert min(drawn["width"], drawn["height"]) >= SPEC.image_size - 1, (scale, aspect)  # whole pixels


def test_a_large_jpeg_is_decoded_smaller_for_training_and_looks_the_same() -> None:
    big = toy_image(3).resize((600, 450), Image.Resampling.BICUBIC)
    images: list[Image.Image] = []
    transform = TrainTransform(SPEC)

    def spy(image: Image.Image, caption: str) -> torch.Tensor:
        images.append(image)
        return transform(image, caption)

    spy.least = transform.least  # type: ignore[attr-defined]
    TrainPairs(Rows([row(0, image=jpeg(big))]), spy, 0, 48)[Pick(0, 0)]
    assert images[0].size == (300, 225)
    small = np.asarray(big.resize((300, 225), Image.Resampling.BOX), int)
    assert np.abs(np.asarray(images[0], int) - small).mean() < 2


def test_a_damaged_jpeg_is_found_at_a_reduced_scale_too() -> None:
    data = jpeg(toy_image(0).resize((400, 400)))
    assert safe_open(data, "x", 100).size == (100, 100)
    with pytest.raises(BadImage, match="truncated"):
        safe_open(data[: len(data) // 2], "x", 100)
    with pytest.raises(BadImage, match="too narrow"):
        safe_open(jpeg(Image.new("RGB", (4000, 10))), "x", 8)


def test_an_image_that_is_given_stays_as_it_is() -> None:
    image = toy_image(0)
    image.info["comment"] = b"mine"
    opened = safe_open(image, "x")
    opened.paste("red", (0, 0, 9, 9))
    assert image.getpixel((0, 0)) != (255, 0, 0)
    assert image.info == {"comment": b"mine"}
    assert opened.info == {}


# ---------------------------------------------------------------------- memory and the benchmark


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """2,400 samples of a memory-mapped set; the benchmark does it with 20,000. A kilobyte kept of each would show."""
    make(tmp_path, "toy", [raw(number, "train" if number < 40 else "val") for number in range(44)], shard=50)
    data = PairData(Prepared(str(tmp_path / "toy")), SPEC, batch_size=40, steps=60, workers=0, augment=False)
    data.setup("fit")
    sizes = [anonymous() for _ in data.train_dataloader()]
    assert sizes[-1] - sizes[19] < 1_000_000


@pytest.mark.slow
def test_the_benchmark_measures_every_loader(tmp_path: Path) -> None:
    loaders = ["memory-mapped", "streamed tars"]
    if importlib.util.find_spec("webdataset"):
        loaders.append("webdataset")
    few = ["--count", "80", "--size", "32", "--batch", "4", "--batches", "1", "--rounds", "1", "--workers", "1"]
    command = [sys.executable, "bench/loader.py", *few, "--json", str(tmp_path / "rows.json"), "--loaders", *loaders]
    environment = os.environ | {"PYTHONPATH": "src"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [entry["loader"] for entry in rows] == loaders
    assert all(entry["images_per_second"] > 0 for entry in rows)


def test_the_parts_of_an_image_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loader.py", "--parts", "--count", "41", "--size", "32", "--rounds", "1"])
    loader.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [" ".join(row.split()[:-1]) for row in rows] == [
        "decode", "crop and resize", "with mirror and RandAugment"
    ]  # fmt: skip
    assert all(float(row.split()[-1]) > 0 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_needs_ten_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of fewer there is no tenth."""
    monkeypatch.setattr(loader, "make", lambda *_: None)
    monkeypatch.setattr(loader, "loader", lambda *arguments: iter(range(arguments[-1])))
    for batches in (1, 5, 6, 9):
        monkeypatch.setattr(sys, "argv", ["loader.py", "--batch", "4", "--memory", str(4 * batches)])
        with pytest.raises(SystemExit) as caught:
            loader.main()
        assert caught.value.code == 2
        assert "--memory: give 40 samples or more" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["loader.py", "--batch", "4", "--memory", "40", "--loaders", "folder"])
    loader.main()
    assert "Pss_Anon" in capsys.readouterr().out
