"""`data-check`: a set that is as it was passes, every change is a line.

How to break the code so that these fail: leave a comparison out of `check_shard` or `check_rows`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prepared_sets import in_process
from toy_raw import Toy, plan, row

from maskvlm.data.prepare.command import verify_set
from maskvlm.data.prepare.prepare import prepare
from maskvlm.data.prepared.check import check_set
from maskvlm.data.prepared.manifest import SCHEMA
from maskvlm.utils.errors import ExitCode

SHARD = "train/data-00000.arrow"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two splits, three shards and a file of annotations."""
    folder = tmp_path_factory.mktemp("check")
    raw = Toy([*(row(number) for number in range(6)), row(7, "val")])
    (folder / "train.json").write_bytes(b"{}\r\n")
    raw.annotations = [folder / "train.json"]
    with in_process():
        manifest = prepare(raw, plan(), folder / "toy", 1, lambda line: None)
    assert (folder / "toy" / "train.json").read_bytes() == b"{}\r\n"
    assert "train.json" in manifest["files"]
    return folder / "toy"


@pytest.fixture
def toy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "toy"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_whole_set_passes(whole: Path, workers: int) -> None:
    lines: list[str] = []
    assert check_set(whole, workers == 2, workers, lines.append) == []
    assert lines == [f"{whole}: as its manifest says (train 6, val 1 images, 14 captions; 7 images decoded)"]


def flip(root: Path) -> None:
    """A bit within an image."""
    data = bytearray((root / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (root / SHARD).write_bytes(data)


def rewrite(change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema = SCHEMA) -> Callable[[Path], None]:
    """Other rows, with hash and size of the shard in the manifest as if it had always been so."""

    def harm(root: Path) -> None:
        with pa.ipc.open_stream(root / SHARD) as stream:
            rows = stream.read_all().to_pylist()
        change(rows)
        with pa.ipc.new_stream(root / SHARD, schema) as stream:
            stream.write_table(pa.Table.from_pylist(rows, schema))
        manifest, content = json.loads((root / "manifest.json").read_text()), (root / SHARD).read_bytes()
        shard = manifest["splits"]["train"]["shards"][0]
        shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        (root / "manifest.json").write_text(json.dumps(manifest))

    return harm


def rewritten(name: str, content: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(content)


def gone(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
    ("harm", "faults"),
    [
        (flip, [f"{SHARD}: sha256 is "]),
        (gone(SHARD), [f"{SHARD}: is missing"]),
        (rewrite(lambda rows: rows[1]["captions"].__setitem__(0, "another")), ["train: the rows' hash is "]),
        (
            rewrite(lambda rows: rows[1].__setitem__("image", rows[1]["image"][:300])),
            [f"{SHARD} row 1 (toy.csv:1): bad image, truncated", "train: the rows' hash is "],
        ),
        (
            rewrite(lambda rows: rows.pop()),
            [f"{SHARD}: 3 rows, the manifest says 4", "train: 5 images, the manifest says 6", "train: 10 capt"],
        ),
        (rewrite(lambda rows: None, pa.schema({"image": pa.binary()})), [f"{SHARD}: cannot be read (columns"]),
        (rewritten("train.json", "[]"), ["train.json: sha256 is "]),
        (gone("skipped.jsonl"), ["skipped.jsonl: no such file"]),
        (rewritten("val/state.json", '{"_data_files": []}'), ["val/state.json: does not list the shards"]),
        (gone("dataset_dict.json"), ["dataset_dict.json: is missing"]),
    ],
)
def test_every_change_is_told(
    toy: Path, harm: Callable[[Path], Any], faults: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(toy)
    assert verify_set([str(toy), "--all", "--workers", "1"], []) == ExitCode.BAD_DATA
    lines = capsys.readouterr().err.splitlines()
    for fault in faults:
        assert any(line.startswith(f"error: {toy}/{fault}") for line in lines), (fault, lines)
    assert len(lines) <= len(faults) + 2
