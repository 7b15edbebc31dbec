"""Vectors of a data set: the model's own, whole files, the same whoever makes them and however often he is stopped."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_pretrained import saved
from toys import SIZE

from maskvlm.data.batch import Row
from maskvlm.inference import vector_files
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.vector_files import embed, identity
from maskvlm.utils.errors import UserError


class Photos:
    """Files of noise, two captions each; `stop` is a row at which somebody pulls the plug."""

    skipped: dict[str, list[str]] = {}

    def __init__(self, folder: Path, count: int = 10) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.count, self.fingerprint = folder, count, "photos"
        self.stop, self.read = -1, list[int]()
        rng = np.random.default_rng(0)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(self.path(index))

    def path(self, index: int) -> Path:
        return self.folder / f"{index}.png"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Row:
        self.read.append(index)
        if index == self.stop:
            raise KeyboardInterrupt
        captions = [f"a red square {index}", f"circle number {index}"]
        return Row(image=str(self.path(index)), captions=captions, image_id=f"id {index}", origin=f"photos {index}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    saved(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PretrainedMaskVLM:
    pretrained = PretrainedMaskVLM.from_pretrained(checkpoint)
    pretrained.batch_size = 3
    return pretrained


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(tmp_path / "photos")


def start(model: PretrainedMaskVLM, photos: Any, folder: Path, process: tuple[int, int] = (0, 1), **more: Any) -> str:
    return embed(model, photos, folder, {"checkpoint": "c", "split": "val", **more}, shard=4, process=process)


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name, temporary ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(folder: Path, kind: str = "pictures") -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob(f"{kind}-*.parquet"))])


def vector_of(table: pa.Table) -> torch.Tensor:
    return torch.tensor(table["vector"].to_pylist())


# ---------------------------------------------------------------------- what is written


def test_the_files_hold_the_models_own_vectors(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    assert start(model, photos, folder) == f"{folder}: 3 of 3 shards, 10 images in all"
    shards = [f"{kind}-0000{part}-of-00003.parquet" for kind in ("captions", "pictures") for part in range(3)]
    assert sorted(content(folder)) == [*shards, "vectors.json"]
    table = rows_of(folder)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert table["row"].to_pylist() == list(range(10))
    assert table["id"].to_pylist() == [f"id {n}" for n in range(10)]
    assert table["path"].to_pylist() == [str(photos.path(n)) for n in range(10)]
    assert table["captions"].to_pylist()[3] == ["a red square 3", "circle number 3"]
    assert torch.allclose(vector_of(table), model.encode_image([photos.path(n) for n in range(10)]), atol=1e-6)
    texts = rows_of(folder, "captions")
    assert texts["row"].to_pylist() == [n // 2 for n in range(20)]
    assert texts["caption"].to_pylist()[7] == "circle number 3"
    assert torch.allclose(vector_of(texts), model.encode_text(texts["caption"].to_pylist()), atol=1e-6)
    facts = json.loads((folder / "vectors.json").read_text())
    assert facts["weights"] == identity(model)
    assert {name: facts[name] for name in ("data", "split", "pictures", "width", "shards")} == {
        "data": "photos", "split": "val", "pictures": 10, "width": 8, "shards": 3,
    }  # fmt: skip


def test_a_killed_one_goes_on_to_the_same_files(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    start(model, photos, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    photos.stop = 6
    with pytest.raises(KeyboardInterrupt):
        start(model, photos, tmp_path / "killed")
    partial = content(tmp_path / "killed")
    assert set(partial) == {f"{kind}-00000-of-00003.parquet" for kind in ("captions", "pictures")} | {"vectors.json"}
    photos.stop, photos.read = -1, []
    start(model, photos, tmp_path / "killed")
    assert photos.read == [4, 5, 6, 7, 8, 9]  # what is there is not made again
    assert content(tmp_path / "killed") == whole
    photos.read = []
    start(model, photos, tmp_path / "killed")
    assert photos.read == []


def test_a_kill_while_a_file_is_written_leaves_none_of_its_name(
    model: PretrainedMaskVLM, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(model, photos, tmp_path / "whole")
    plain = vector_files.pq.write_table

    def half(table: pa.Table, file: Any, **more: Any) -> None:
        plain(table, file, **more)
        if "row" in table.column_names and table["row"][0].as_py() == 4 and "path" in table.column_names:
            os.truncate(file, 100)
            raise KeyboardInterrupt

    monkeypatch.setattr(vector_files.pq, "write_table", half)
    with pytest.raises(KeyboardInterrupt):
        start(model, photos, tmp_path / "killed")
    assert "pictures-00001-of-00003.parquet" not in content(tmp_path / "killed")
    monkeypatch.setattr(vector_files.pq, "write_table", plain)
    start(model, photos, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_processes_make_what_one_makes(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    photos.path(9).write_bytes(b"nothing")
    start(model, photos, tmp_path / "one")
    report = start(model, photos, tmp_path / "two", (0, 2))
    assert "2 of 3 shards" in report
    assert "the rest belong to other processes" in report
    assert photos.read[10:] == [0, 1, 2, 3, 8, 9]
    assert "3 of 3 shards" in start(model, photos, tmp_path / "two", (1, 2))
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_other_things_are_refused(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    start(model, photos, tmp_path / "v")
    there = content(tmp_path / "v")

    def refused(what: str, *, split: str = "val") -> None:
        with pytest.raises(UserError, match=what):
            start(model, photos, tmp_path / "v", split=split)
        assert content(tmp_path / "v") == there

    refused("another split", split="test")
    photos.fingerprint = "others"
    refused("other data")
    photos.fingerprint = "photos"
    with torch.no_grad():
        model.task.projection.text.weight[0, 0] += 1e-3
        refused("another checkpoint")
        model.task.projection.text.weight[0, 0] -= 1e-3


def test_a_broken_image_is_left_out_counted_and_listed(
    model: PretrainedMaskVLM, photos: Photos, tmp_path: Path
) -> None:
    folder = tmp_path / "vectors"
    whole = photos.path(2).read_bytes()
    photos.path(2).write_bytes(whole[: len(whole) // 2])
    for index in (4, 5, 6, 7):  # a whole shard
        photos.path(index).unlink()
    photos.skipped = {"no caption": ["photos 99"]}
    report = start(model, photos, folder)
    assert "left out or repaired (truncated: 1, missing: 4, no caption: 1): listed in" in report
    assert rows_of(folder)["row"].to_pylist() == [0, 1, 3, 8, 9]
    assert vector_of(rows_of(folder)).shape == (5, 8)
    assert torch.allclose(vector_of(rows_of(folder))[2], model.encode_image(photos.path(3)), atol=1e-6)
    listed = json.loads((folder / "bad_samples.json").read_text())
    assert listed["problems"] == {"truncated": 1, "missing": 4}
    assert listed["left_out"] == {"no caption": ["photos 99"]}
