"""`data-check`: a set that is as it was passes, every change is a line.

How to break the code so that these fail: leave a comparison out of `check_shard` or `check_rows`.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from toy_raw import Toy, plan, row

from maskvlm.data.prepare.command import verify_set
from maskvlm.data.prepare.prepare import prepare
from maskvlm.data.prepared.check import check_set, report_kills
from maskvlm.data.prepared.manifest import SCHEMA
from maskvlm.data.prepared.source import Prepared
from maskvlm.utils.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set of two splits and three shards."""
    folder = tmp_path_factory.mktemp("check")
    raw = Toy([*(row(number) for number in range(6)), row(7, "val")])
    (folder / "train.json").write_text("{}")
    raw.annotations = [folder / "train.json"]
    prepare(raw, plan(), folder / "toy", 1, lambda line: None)
    files = (file for file in (folder / "toy").rglob("*") if file.is_file())
    return {str(file.relative_to(folder / "toy")): file.read_bytes() for file in files}


def test_a_killed_process_of_the_check_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a process of the check was killed") as caught, report_kills(tmp_path):
        raise BrokenProcessPool
    assert caught.value.code == ExitCode.IO_ERROR


@pytest.fixture
def toy(whole: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


SHARD = "train/data-00000.arrow"


@pytest.mark.parametrize(("every", "workers"), [(False, 1), (True, 2)])
def test_a_whole_set_passes(toy: Path, every: bool, workers: int) -> None:
    lines: list[str] = []
    assert check_set(toy, every, workers, lines.append) == []
    assert lines == [f"{toy}: as its manifest says (train 6, val 1 images, 14 captions; 7 images decoded)"]


def flip(root: Path) -> None:
    """A bit within an image."""
    data = bytearray((root / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (root / SHARD).write_bytes(data)


def shorten(root: Path) -> None:
    (root / SHARD).write_bytes((root / SHARD).read_bytes()[:-8])


def exchange(root: Path) -> None:
    """A caption, with hash and size of the shard in the manifest as if it had always been so."""
    rewrite(root, lambda rows: rows[1]["captions"].__setitem__(0, "another"))


def spoil(root: Path) -> None:
    """An image, as before."""
    rewrite(root, lambda rows: rows[1].__setitem__("image", rows[1]["image"][:300]))


def drop(root: Path) -> None:
    """A row, as before."""
    rewrite(root, lambda rows: rows.pop())


def rewrite(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    with pa.ipc.open_stream(root / SHARD) as stream:
        rows = stream.read_all().to_pylist()
    change(rows)
    with pa.ipc.new_stream(root / SHARD, SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(rows, SCHEMA))
    manifest = json.loads((root / "manifest.json").read_text())
    content = (root / SHARD).read_bytes()
    shard = manifest["splits"]["train"]["shards"][0]
    shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))


def other_columns(root: Path) -> None:
    table = pa.table({"image": [b"x"]})
    with pa.ipc.new_stream(root / SHARD, table.schema) as stream:
        stream.write_table(table)
    manifest = json.loads((root / "manifest.json").read_text())
    shard, content = manifest["splits"]["train"]["shards"][0], (root / SHARD).read_bytes()
    shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "faults"),
    [
        (flip, [f"{SHARD}: sha256 is "]),
        (shorten, [f"{SHARD}: has "]),
        (lambda root: (root / SHARD).unlink(), [f"{SHARD}: is missing"]),
        (exchange, ["train: the rows' hash is "]),
        (spoil, [f"{SHARD} row 1 (toy.csv:1): bad image, truncated", "train: the rows' hash is "]),
        (drop, [f"{SHARD}: 3 rows, the manifest says 4", "train: 5 images, the manifest says 6", "train: 10 capt"]),
        (other_columns, [f"{SHARD}: cannot be read (columns ['image'] instead of ['image', 'captions'"]),
        (lambda root: (root / "train.json").write_text("[]"), ["train.json: sha256 is "]),
        (lambda root: (root / "skipped.jsonl").unlink(), ["skipped.jsonl: no such file"]),
        (lambda root: (root / "val" / "state.json").write_text("{}"), ["val/state.json: cannot be read (KeyError)"]),
        (
            lambda root: (root / "val" / "state.json").write_text('{"_data_files": []}'),
            ["val/state.json: does not list the shards"],
        ),
        (lambda root: (root / "val" / "dataset_info.json").unlink(), ["val/dataset_info.json: is missing"]),
        (lambda root: (root / "dataset_dict.json").unlink(), ["dataset_dict.json: is missing"]),
    ],
    ids=[
        *("bit", "short", "shard gone", "caption", "image", "row", "columns", "annotations", "skipped", "state"),
        *("shards listed", "info", "dict"),
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
    assert lines[-1] == f"delete {toy} and prepare it again with `maskvlm data`"
    assert len(lines) <= len(faults) + 2
    assert capsys.readouterr().out == ""


def test_any_flipped_byte_is_one_line_or_an_image(toy: Path, whole: dict[str, bytes]) -> None:
    """Of the check, and of reading for training, which knows sizes and structure alone."""
    content = whole[SHARD]
    for place in range(8, len(content), max(1, len(content) // 60)):
        data = bytearray(content)
        data[place] ^= 0x81
        (toy / SHARD).write_bytes(data)
        (fault,) = check_set(toy)
        assert f"{SHARD}: sha256 is " in fault
        with suppress(UserError):
            pairs = Prepared(str(toy)).split("train")
            assert all(isinstance(pairs[index]["captions"], list) for index in range(len(pairs)))


def test_without_a_manifest_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared set here"):
        check_set(tmp_path)
