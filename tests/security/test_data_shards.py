"""Shards of prepared sets that are damaged, or change while they are read: one line or one bad row, no dead process.

How to break the code so that these fail: map a shard into memory (`pa.memory_map`), or hand its bytes to
`pa.ipc.open_stream`; take a number of `arrow.py` without comparing it; leave `check_sum` out.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mutators import any_bytes, columns
from PIL import Image

from maskvlm.data.prepare.finish import Plan, finish_set
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.prepare.shards import Job, make_shard
from maskvlm.data.prepared.manifest import MAKING, MANIFEST, SCHEMA, SKIPPED
from maskvlm.data.prepared.shards import read_shard
from maskvlm.data.prepared.source import UNREADABLE, Prepared
from maskvlm.data.raw.base import Facts, RawRow, RawSet
from maskvlm.data.streaming import remote
from maskvlm.data.streaming.remote import read_shards
from maskvlm.data.streaming.source import Stream
from maskvlm.utils.errors import ExitCode, UserError

ROWS = 6
SEEDS = pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 300), marks=pytest.mark.slow)])


class Toy(RawSet):
    facts = Facts("toy", None, None, "free")

    def rows(self) -> Iterator[RawRow]:
        for number in range(ROWS):
            data = BytesIO()
            Image.new("RGB", (24, 16), (40 * number, 9, 9)).save(data, "JPEG")
            yield RawRow(data.getvalue(), (f"number {number}", "ein Fuß"), f"toy {number}", "train", f"toy:{number}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of one shard."""
    root = tmp_path_factory.mktemp("shards") / "toy"
    for name in ("train", MAKING):
        (root / name).mkdir(parents=True)
    plan = Plan("csv", "toy", Settings("toy", 48), {})
    make_shard(root, plan.settings, Job("train", 0, [*Toy("", "toy").rows()]))
    finish_set(root, Toy("", "toy"), plan, Counter(train=1), 0.0)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    remote.sums_in.cache_clear()
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def shard_of(root: Path) -> Path:
    return root / "train" / "data-00000.arrow"


def streamed(shard: Path) -> list[Any]:
    return [entry["problem"] or entry["row"] for entry in read_shards([str(shard)], "toy")]


def mapped(root: Path) -> list[Any]:
    pairs = Prepared(str(root)).split("train")
    return [pairs[index] for index in range(len(pairs))]


@SEEDS
def test_damaged_shards_of_a_prepared_set_are_told_by_their_sum(root: Path, seeds: range) -> None:
    """Streamed: none ends the process, none gives other content without a word."""
    shard = shard_of(root)
    content, good = shard.read_bytes(), streamed(shard)
    assert len(good) == ROWS
    for seed in seeds:
        chance = random.Random(seed)
        shard.write_bytes(chance.choice((columns, any_bytes))(content, chance))
        entries = streamed(shard)
        if entries != good:
            (problem,) = entries
            assert problem[0] == "unreadable shard"
            assert "\n" not in problem[1]


@SEEDS
def test_damaged_shards_alone_are_rows_or_one_line(root: Path, seeds: range) -> None:
    """Without a sum, alone or in a set whose sizes are known: captions and ids are whole or refused, no signal."""
    shard, file = shard_of(root), root / MANIFEST
    content, manifest = shard.read_bytes(), json.loads(file.read_text())
    read = 0
    for seed in seeds:
        chance = random.Random(seed)
        shard.write_bytes(chance.choice((columns, any_bytes))(content, chance))
        manifest["splits"]["train"]["shards"][0]["bytes"] = shard.stat().st_size
        file.write_text(json.dumps(manifest))
        with suppress(UserError):
            assert all(isinstance(row["image"], bytes) for row in mapped(root))
            read += 1
        shutil.copy(shard, root.parent / "alone.arrow")
        streamed(root.parent / "alone.arrow")
    assert 0 < read < len(seeds)


def test_the_reader_finds_what_arrow_itself_finds(root: Path) -> None:
    """Also in a shard of several batches, of empty lists and texts."""

    def row(number: int) -> dict[str, Any]:
        texts = {"image_id": f"{number}", "source": "", "name": "", "origin": "o" * number}
        captions = ["ü" * (number % 3)] * (number % 4)
        return {"image": bytes([number]) * (number % 5), "captions": captions, "phash": 2**64 - 1 - number} | texts

    table = pa.Table.from_pylist([row(number) for number in range(23)], SCHEMA)
    with pa.ipc.new_stream(shard_of(root), SCHEMA) as stream:
        stream.write_table(table, max_chunksize=7)
    shard = read_shard(shard_of(root))
    assert [*shard.rows()] == table.to_pylist()
    for name in SCHEMA.names:
        assert pa.chunked_array([shard.array(batch, name) for batch in shard.batches]) == table.column(name)


@pytest.mark.parametrize("keep", [True, False])
def test_a_shard_that_is_cut_while_it_is_read_is_one_line(root: Path, keep: bool, monkeypatch: Any) -> None:
    """Mapped into memory it was SIGBUS. Real file, cut in place."""
    monkeypatch.setattr("maskvlm.data.prepared.shards.MOST_OPEN", 128 if keep else 0)
    pairs = Prepared(str(root)).split("train")
    first = pairs[0]
    os.truncate(shard_of(root), 1600)
    with pytest.raises(UserError, match="is shorter than before") as raised:
        assert [pairs[index] for index in range(ROWS)]
    assert raised.value.code == ExitCode.BAD_DATA
    assert first["captions"] == ["number 0", "ein Fuß"]


def test_another_size_is_told_before_anything_is_read(root: Path) -> None:
    with shard_of(root).open("ab") as file:
        file.write(b"x" * 8)
    with pytest.raises(UserError, match="bytes instead of"):
        Prepared(str(root)).split("train")


def test_a_stream_knows_the_sums_of_the_manifest_and_a_damaged_manifest_is_a_bad_row(root: Path) -> None:
    shards = Stream(str(root), "x").split("train").shards
    assert len([*read_shards(shards, "toy")]) == ROWS
    remote.sums_in.cache_clear()
    (root / MANIFEST).write_text('{"format": 1, "splits": 5}')
    ((row),) = read_shards(shards, "toy")
    assert row["problem"][0] == "unreadable shard"


def test_a_damaged_list_of_what_was_skipped_stops_nothing(root: Path) -> None:
    """Nor do the other files that are for people alone."""
    good = '{"split": "train", "reason": "gone", "origin": "toy:9", "message": "", "left_out": true}'
    lines = [good, "{", "[]", "5", '{"split": 1}', '{"split": "val", "reason": "x", "origin": "y"}', "\x00", "[" * 9000]
    (root / SKIPPED).write_text("\n".join(lines))
    for name in ("first-look.png", "dataset_dict.json", "train/state.json"):
        (root / name).unlink()
        os.mkfifo(root / name)
    pairs = Prepared(str(root)).split("train")
    assert pairs.unprepared["gone"] == ["toy:9"]
    assert len(pairs.unprepared[UNREADABLE]) == 6
    assert pairs[0]["image_id"] == "toy 0"
    (root / SKIPPED).unlink()
    os.mkfifo(root / SKIPPED)  # nobody waits for it
    assert len(mapped(root)) == ROWS
