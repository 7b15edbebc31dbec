"""Faults of checkpoints, data and evaluation that no other file of tests holds. Real files, all of them tiny."""

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from raw_toys import IMAGES, write

from maskvlm.checkpoint.io import load, save
from maskvlm.cli.lightning import LightningCommand, run_command
from maskvlm.data.prepare.rows import screened
from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.streaming.remote import read_shards
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.utils.errors import ExitCode, UserError

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "89274c0"


# ---------------------------------------------------------------------- checkpoints


def test_a_run_does_not_go_on_with_another_tokenizer_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two words have changed places: every tensor fits, and every caption would mean something else."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    content = load("run/last.ckpt")
    record = json.loads(content["tokenizer"])
    words = record["tokenizer"]["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    save(content | {"tokenizer": json.dumps(record)}, "run/last.ckpt")
    with pytest.raises(UserError) as caught:
        run_command(LightningCommand, ["fit", "-c", "run/config-fit.yaml", "--run", "run"])
    assert "differs from the model's" in caught.value.what
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize("version", ["9.9.9", "not a version", None])
def test_the_state_of_a_later_lightning_is_refused(tmp_path: Path, version: str | None) -> None:
    """Its weights are taken all the same: they do not depend on Lightning."""
    content = load(OLD / "run" / "last.ckpt")
    content.pop("pytorch-lightning_version")
    path = tmp_path / "x.ckpt"
    save(content | ({} if version is None else {"pytorch-lightning_version": version}), path)
    with pytest.raises(UserError, match="Lightning") as caught:
        SafeCheckpointIO().load_checkpoint(path)
    assert caught.value.code == ExitCode.BAD_DATA
    assert load(path)["global_step"] == 3


# ---------------------------------------------------------------------- data


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_a_shard_is_passed_over(tmp_path: Path) -> None:
    """Prepared and streamed; the sample that it lies in is used without it."""
    evil = pickle.dumps(Mark(tmp_path / "mark"))
    files = {"0.jpg": IMAGES[0], "0.pkl": evil, "0.pyd": evil, "0.pth": evil, "0.txt": b"a red square", "1.pyd": evil}
    members, raw = write(tmp_path / "members", files | {"1.txt": b"no image"}), tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "0.tar", "w") as archive:
        for path in sorted(members.iterdir()):
            archive.add(path, path.name)
    rows = [*open_raw("webdataset", str(raw)).rows()]
    assert [row.reason if isinstance(row, BadRow) else row.captions for row in rows] == [("a red square",), "no image"]
    streamed = [*read_shards([str(raw / "0.tar")], "toy")]
    assert [row["problem"] and row["problem"][0] for row in streamed] == [None, "no image"]
    assert not (tmp_path / "mark").exists()


def test_an_id_in_two_shards_is_counted_and_named(tmp_path: Path) -> None:
    """The same photo by its address: the second one is a bad row, which names id and place."""
    facts = json.dumps({"url": "https://farm1.staticflickr.com/2/77_a.jpg", "key": "0"}).encode()
    (tmp_path / "raw").mkdir()
    for number in (0, 1):
        files = {"0.jpg": IMAGES[0], "0.txt": b"a square", "0.json": facts}
        folder = write(tmp_path / str(number), files)
        with tarfile.open(tmp_path / "raw" / f"{number}.tar", "w") as archive:
            for name in files:
                archive.add(folder / name, name)
    good, bad = screened(open_raw("webdataset", str(tmp_path / "raw")).rows())
    assert isinstance(good, RawRow)
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.origin) == ("duplicate image id", "1.tar!0.jpg")
    assert "flickr 77" in bad.message
