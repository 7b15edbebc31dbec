"""A prepared set as a source: rows, what it costs, and the one line for every set that cannot be read.

How to break the code so that these fail: drop `__getstate__` of Shards (pickles grow by the tables), read shards with
`pa.OSFile` instead of a memory map, take `split` without asking the manifest, hold out by position instead of by id.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from toy_raw import make, photo, row

from maskvlm.data.phash import phash
from maskvlm.data.prepare.example_images import PreparedImages, open_album
from maskvlm.data.prepare.rows import Settings, prepare_image
from maskvlm.data.prepared.manifest import MAKING
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw.base import BadRow
from maskvlm.utils.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven training images in three shards, two for validation; two rows left out."""
    root = tmp_path_factory.mktemp("prepared") / "toy"
    rows = [*(row(number) for number in range(11)), row(20, "val"), row(21, "val"), row(22, image=b"no")]
    make(root, [*rows, BadRow("gone", "x:1", "x:1 is gone", "val")])
    return root


def stored(number: int) -> bytes:
    return prepare_image(row(number).image, "x", Settings("toy", 48)).data


def test_rows_come_back(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any pickle."""
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    pairs = Prepared(str(toy)).split("train")
    assert len(pairs) == 11
    for index in (0, 4, 10, -1):
        number = range(11)[index]
        assert pairs[index] == {
            "image": stored(number),
            "captions": [f"image number {number}", "a second caption"],
            "image_id": f"toy {number}",
            "origin": f"{toy}/train row {number} (toy.csv:{number})",
        }
    assert pairs.captions(3) == ["image number 3", "a second caption"]
    assert [*pairs.image_ids()] == [f"toy {number}" for number in range(11)]
    assert pairs.column("source").unique().to_pylist() == ["toy"]
    hashes = pairs.column("phash").to_numpy()
    assert hashes.dtype == np.uint64
    assert int(hashes[1] ^ np.uint64(phash(photo(1)))).bit_count() <= 4
    for index in (11, -12):
        with pytest.raises(IndexError):
            pairs[index]


def test_data_workers_get_names_not_images(toy: Path) -> None:
    """And opening reads nothing into memory."""
    before = pa.total_allocated_bytes()
    pairs = Prepared(str(toy)).split("train")
    assert len(pairs._shards.parts()) == 3
    assert pa.total_allocated_bytes() == before
    rows = [pairs[index] for index in range(11)]
    pickled = pickle.dumps(pairs)
    assert len(pickled) < 3000
    assert [pickle.loads(pickled)[index] for index in range(11)] == rows


# ------------------------------------------------------------------ what cannot be read


def error_of(root: Path, split: str = "train") -> UserError:
    with pytest.raises(UserError) as caught:
        Prepared(str(root)).split(split)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_set_or_split_that_is_not_there_says_what_to_do(toy: Path, tmp_path: Path) -> None:
    make(tmp_path / "tested", [row(number, split="test") for number in range(3)])  # as a table called test.csv makes
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / MAKING).mkdir(parents=True)
    for root, split, message in (
        (tmp_path / "coco", "train", "no such folder of a prepared set"),
        (tmp_path / "empty", "train", "no prepared set here"),
        (tmp_path / "begun", "train", "is unfinished"),
        (toy, "test", "available: train with 11 images, val with 2 images"),
        (tmp_path / "tested", "val", "prepare it again with a split train"),
    ):
        error = error_of(root, split)
        assert message in str(error)
        assert error.code == ExitCode.MISSING_INPUT


def manifest(images: object, shards: str) -> str:
    fields = f'"pictures": {images}, "sha256": "{"0" * 64}", "shards": {shards}'
    return f'{{"format": 1, "splits": {{"train": {{{fields}}}}}}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"format": 2}', "is of format 2, not of 1"),
        ('{"format": 1}', "key 'splits' is missing"),
        (manifest('"3"', "[]"), "splits.train.pictures is '3' instead of a number from 0 to 2^53"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert message in str(error_of(tmp_path))


SHARD = "train/data-00000.arrow"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "has .* bytes instead of"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"x" * file.stat().st_size), "cannot be read"),
    ],
)
def test_a_changed_shard_is_named(tmp_path: Path, harm: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "toy", [row(number) for number in range(3)])
    harm(tmp_path / "toy" / SHARD)
    with pytest.raises(UserError, match=rf"data-00000\.arrow: {message}") as caught:
        Prepared(str(tmp_path / "toy")).split("train")[0]
    assert caught.value.code in (ExitCode.BAD_DATA, ExitCode.MISSING_INPUT)


# ------------------------------------------------------------------ held out


def test_a_set_without_validation_holds_a_part_out(toy: Path, tmp_path: Path) -> None:
    """Chosen by id; and a photo that is there twice, under two names, is not trained on and measured."""
    assert [len(Prepared(str(toy), hold_out=5).split(name)) for name in ("train", "val")] == [11, 2]  # it has one
    root, rows = tmp_path / "toy", [row(number) for number in range(40)]
    make(root, [*rows, BadRow("gone", "x:1", "x:1 is gone", "train")])
    assert "set data.source.hold_out" in str(error_of(root, "val"))
    source = Prepared(str(root), hold_out=1000)
    train, val = source.split("train"), source.split("val")
    assert (len(train), len(val)) == (38, 2)  # a twentieth
    assert (train.unprepared, val.unprepared) == ({"gone": ["x:1"]}, {})
    ids = [*train.image_ids(), *val.image_ids()]
    assert sorted(ids) == sorted(f"toy {number}" for number in range(40))
    assert [val[index]["image_id"] for index in range(2)] == [*val.image_ids()]
    assert pickle.loads(pickle.dumps(val))[1] == val[1]
    assert len({train.fingerprint, val.fingerprint, Prepared(str(root)).split("train").fingerprint}) == 3
    with pytest.raises(UserError, match="use val, which is held out of train"):
        source.split("test")
    make(tmp_path / "more", [*rows[::-1], *(each._replace(image_id=f"copy {each.image_id}") for each in rows)])
    source = Prepared(str(tmp_path / "more"), hold_out=1000)
    hashes = [{*source.split(name).column("phash").to_pylist()} for name in ("train", "val")]
    assert not hashes[0] & hashes[1]
    assert len(source.split("val")) == 4


# ------------------------------------------------------------------ images of annotated sets


def test_images_are_found_by_name_and_handed_out_as_bytes(toy: Path, tmp_path: Path) -> None:
    root = tmp_path / "toy"
    make(root, [row(number, "pictures", captions=(), name=f"in/{number}.png") for number in range(6)])
    album = open_album(None, root)
    assert album.names == [f"in/{number}.png" for number in range(6)]
    images = album.images({"a": "in/5.png", "b": "in/0.png"})
    assert isinstance(images, PreparedImages)
    assert images.find(pa.array(["b", "c", "a"])).tolist() == [1, -1, 0]
    for each in (images, pickle.loads(pickle.dumps(images))):
        assert [each.image(number) for number in (0, 1)] == [stored(5), stored(0)]
    album = open_album(str(toy), tmp_path)  # a set of pairs serves as images by its ids
    assert (len(album.names), album.names[0]) == (13, "toy/0")
    assert album.images({"v": "toy/21"}).image(0) == Prepared(str(toy)).split("val")[1]["image"]
    (tmp_path / "images").mkdir()  # and a folder of files
    (tmp_path / "images" / "a.png").touch()
    assert open_album(None, tmp_path).images({"a": "a.png"}).image(0) == str(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="no such folder of images"):
        open_album(str(tmp_path / "no"), tmp_path)
