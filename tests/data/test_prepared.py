"""A prepared set as a source: rows, what it costs, and the one line for every set that cannot be read.

How to break the code so that these fail: drop `__getstate__` of Shards (pickles grow by the tables), read shards with
`pa.OSFile` instead of a memory map, take `split` without asking the manifest, hold out by position instead of by id.
"""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader, Dataset
from toy_raw import Toy, make, photo, plan, row

from maskvlm.data.phash import phash
from maskvlm.data.prepare.example_images import PreparedImages, open_album
from maskvlm.data.prepare.prepare import prepare
from maskvlm.data.prepare.rows import Settings, prepare_image
from maskvlm.data.prepared.manifest import MAKING
from maskvlm.data.prepared.source import Prepared, PreparedPairs, read_skipped
from maskvlm.data.raw.base import BadRow
from maskvlm.data.subset import fraction_of
from maskvlm.training.run_record import rows_left_out
from maskvlm.utils.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven training images in three shards, two for validation; two rows left out."""
    root = tmp_path_factory.mktemp("prepared") / "toy"
    rows = [*(row(number) for number in range(11)), row(20, "val"), row(21, "val"), row(22, image=b"no")]
    make(root, [*rows, BadRow("gone", "x:1", "x:1 is gone", "val")])
    return root


def test_rows_come_back(toy: Path) -> None:
    pairs = Prepared(str(toy)).split("train")
    assert len(pairs) == 11
    for index in (0, 4, 10, -1):
        number = range(11)[index]
        assert pairs[index] == {
            "image": prepare_image(row(number).image, "x", Settings("toy", 48)).data,
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


def test_a_split_tells_what_was_left_out_of_it(toy: Path) -> None:
    train, val = Prepared(str(toy)).split("train"), Prepared(str(toy)).split("val")
    assert train.unprepared == {"not an image (unknown)": ["toy.csv:22"]}
    assert val.unprepared == {"gone": ["x:1"]}
    # told when it was prepared: a run's own list has none of them, its card counts them
    assert rows_left_out(train) == rows_left_out(fraction_of(train, 0.5, 0)) == {}
    assert rows_left_out(fraction_of(train, 0.5, 0), prepared=True) == {"not an image (unknown)": 1}


def test_a_row_left_out_counts_once_where_val_is_held_out_of_train(tmp_path: Path) -> None:
    make(tmp_path / "toy", [*(row(number) for number in range(40)), BadRow("gone", "x:1", "x:1 is gone", "train")])
    source = Prepared(str(tmp_path / "toy"), hold_out=2)
    assert source.split("train").unprepared == {"gone": ["x:1"]}
    assert source.split("val").unprepared == {}


def test_of_many_rows_left_out_the_first_thousand_are_listed(tmp_path: Path) -> None:
    line = json.dumps({"split": "train", "reason": "missing", "origin": "x", "message": "m", "left_out": True})
    (tmp_path / "skipped.jsonl").write_text(f"{line}\n" * 1203)
    listed = read_skipped(tmp_path / "skipped.jsonl", "train")
    assert len(listed["missing"]) == 1001
    assert listed["missing"][-1] == f"and 203 more, in {tmp_path / 'skipped.jsonl'}"


def test_the_fingerprint_is_of_the_rows(toy: Path, tmp_path: Path) -> None:
    rows = [*(row(number) for number in range(11)), row(20, "val"), row(21, "val")]
    prepare(Toy(rows), plan(name="other", rows=5), tmp_path / "other", 1, lambda line: None)
    for name in ("train", "val"):
        own, other = (Prepared(str(root)).split(name).fingerprint for root in (toy, tmp_path / "other"))
        assert own == other
    assert own != Prepared(str(toy)).split("train").fingerprint


class Read(Dataset[Any]):
    def __init__(self, pairs: PreparedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def test_data_workers_get_names_not_images(toy: Path) -> None:
    pairs = Prepared(str(toy)).split("train")
    rows = [pairs[index] for index in range(11)]
    pickled = pickle.dumps(pairs)
    assert len(pickled) < 3000
    assert [pickle.loads(pickled)[index] for index in range(11)] == rows
    loader = DataLoader(Read(pairs), batch_size=None, num_workers=2)
    assert [*loader] == rows


def test_opening_reads_nothing_into_memory(toy: Path) -> None:
    """Images least of all: what stays is where they lie."""
    size = (toy / "train" / "data-00000.arrow").stat().st_size
    before = pa.total_allocated_bytes()
    pairs = Prepared(str(toy)).split("train")
    tracemalloc.start()
    parts = pairs._shards.parts()
    current, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(parts) == 3
    assert pa.total_allocated_bytes() == before
    assert current < 10_000 * len(parts)
    assert most < 3 * size + 50_000


def test_nothing_is_unpickled(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    pairs = Prepared(str(toy)).split("train")
    assert len([pairs[index] for index in range(11)]) == 11


# ------------------------------------------------------------------ what cannot be read


def error_of(root: Path, split: str = "train") -> UserError:
    with pytest.raises(UserError) as caught:
        Prepared(str(root)).split(split)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_set_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    error = error_of(tmp_path / "coco")
    assert str(error).startswith(f"{tmp_path / 'coco'}: no such folder of a prepared set. Make it with `maskvlm data ")
    assert error.code == ExitCode.MISSING_INPUT
    assert "Make it with `maskvlm data SET FOLDER name=mine`; " in str(error_of(tmp_path / "mine"))
    (tmp_path / "coco").mkdir()
    assert "coco/manifest.json: no prepared set here. Make it with `maskvlm data coco FOLDER`" in str(
        error_of(tmp_path / "coco")
    )


def test_an_unfinished_set_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / MAKING).mkdir()
    assert "this prepared set is unfinished. Run the same `maskvlm data` again" in str(error_of(tmp_path))


def test_a_split_that_is_not_there_lists_those_that_are(toy: Path) -> None:
    error = error_of(toy, "test")
    assert f"{toy}: no split 'test' (available: train with 11 images, val with 2 images)" in str(error)
    assert "or name another split" in str(error)
    assert error.code == ExitCode.MISSING_INPUT


def split(images: object, shards: str) -> str:
    """A manifest with one split."""
    fields = f'"pictures": {images}, "sha256": "{"0" * 64}", "shards": {shards}'
    return f'{{"format": 1, "splits": {{"train": {{{fields}}}}}}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest.json:1: not JSON"),
        ("[]", "manifest.json: the document is list instead of an object"),
        ('{"format": 2}', "manifest.json: is of format 2, not of 1. Read it with the version that made it"),
        ('{"format": 1}', "key 'splits' is missing"),
        ('{"format": 1, "splits": {"train": {"pictures": "3"}}}', "key 'splits.train.sha256' is missing"),
        (split('"3"', "[]"), "splits.train.pictures is '3' instead of a number from 0 to 2^53"),
        (split(3, "[{}]"), "key 'splits.train.shards[0].file' is missing"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert message in str(error_of(tmp_path))


def test_a_changed_shard_is_named(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    make(root, [row(number) for number in range(3)])
    shard = root / "train" / "data-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    error = error_of(root)
    assert f"{shard}: has {len(content) - 8:,} bytes instead of {len(content):,}. `maskvlm data-check" in str(error)
    assert error.code == ExitCode.BAD_DATA
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(UserError, match=r"data-00000\.arrow: cannot be read"):
        Prepared(str(root)).split("train")[0]
    shard.unlink()
    assert "data-00000.arrow: is missing, but the manifest lists it" in str(error_of(root))


# ------------------------------------------------------------------ held out


def test_a_set_without_training_has_nothing_to_hold_out(tmp_path: Path) -> None:
    """As a table that is called test.csv makes."""
    make(tmp_path / "toy", [row(number, split="test") for number in range(3)])
    for name in ("train", "val"):
        message = str(error_of(tmp_path / "toy", name))
        assert "available: test with 3 images" in message
        assert "prepare it again with a split train" in message
        assert "hold_out" not in message


def test_a_set_without_validation_holds_a_part_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "toy"
    make(root, [row(number) for number in range(40)])
    assert "set data.source.hold_out to hold out part of train for it" in str(error_of(root, "val"))
    source = Prepared(str(root), hold_out=1000)
    train, val = source.split("train"), source.split("val")
    assert (len(train), len(val)) == (38, 2)  # a twentieth
    assert (
        f"{root} has no val split: 2 of its 40 images are held out of training as its validation split"
        in capsys.readouterr().out
    )
    ids = [*train.image_ids(), *val.image_ids()]
    assert sorted(ids) == sorted(f"toy {number}" for number in range(40))
    assert [val[index]["image_id"] for index in range(2)] == [*val.image_ids()]
    assert len({train.fingerprint, val.fingerprint, Prepared(str(root)).split("train").fingerprint}) == 3
    assert len(Prepared(str(root), hold_out=1).split("val")) == 1
    make(tmp_path / "more", [row(number) for number in range(39, -1, -1)])
    again = Prepared(str(tmp_path / "more"), hold_out=1000).split("val")
    assert {*again.image_ids()} == {*val.image_ids()}
    with pytest.raises(UserError, match=r"no split 'test'.* or use val, which is held out of train"):
        source.split("test")
    assert pickle.loads(pickle.dumps(val))[1] == val[1]


def test_a_photo_that_is_there_twice_is_not_trained_on_and_measured(tmp_path: Path) -> None:
    """Under two names. Fails where looks are not compared."""
    twins = [row(number)._replace(image_id=f"copy {number}", image=row(number).image) for number in range(40)]
    make(tmp_path / "toy", [*(row(number) for number in range(40)), *twins])
    source = Prepared(str(tmp_path / "toy"), hold_out=1000)
    train, val = source.split("train"), source.split("val")
    assert len(val) == 4
    hashes = [{*pairs.column("phash").to_pylist()} for pairs in (train, val)]
    assert not hashes[0] & hashes[1]
    assert len(train) in (72, 74, 76)  # two held-out rows may be the same photo


def test_its_own_validation_is_taken_where_there_is_one(toy: Path) -> None:
    source = Prepared(str(toy), hold_out=5)
    assert (len(source.split("train")), len(source.split("val"))) == (11, 2)


# ------------------------------------------------------------------ images of annotated sets


def test_images_are_found_by_name_and_handed_out_as_bytes(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    make(root, [row(number, "pictures", captions=(), name=f"in/{number}.png") for number in range(6)])
    album = open_album(None, root)
    assert album.names == [f"in/{number}.png" for number in range(6)]
    images = album.images({"a": "in/5.png", "b": "in/0.png"})
    assert isinstance(images, PreparedImages)
    assert images.find(pa.array(["b", "c", "a"])).tolist() == [1, -1, 0]
    wanted = [prepare_image(row(number).image, "x", Settings("toy", 48)).data for number in (5, 0)]
    assert [images.image(number) for number in (0, 1)] == wanted
    assert [pickle.loads(pickle.dumps(images)).image(number) for number in (0, 1)] == wanted


def test_a_set_of_pairs_serves_as_images_by_its_ids(toy: Path, tmp_path: Path) -> None:
    album = open_album(str(toy), tmp_path)
    assert len(album.names) == 13
    assert album.names[0] == "toy/0"
    assert album.images({"v": "toy/21"}).image(0) == Prepared(str(toy)).split("val")[1]["image"]


def test_a_folder_of_files_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    album = open_album(None, tmp_path)
    assert album.names == ["a.png"]
    assert album.images({"a": "a.png"}).image(0) == str(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="no such folder of images"):
        open_album(str(tmp_path / "no"), tmp_path)
