"""Raw rows to a prepared set: what is written, gone on with after a kill, and refused.

How to break the code so that these fail: write a shard without the temporary file (`whole_set_file` -> open), leave the
hash out of `there_already`, hand jobs out by worker, hash a split shard by shard, write the manifest first, clean the
folder before asking what is in it, drop `screened` from `cut`.
"""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image
from prepared_sets import Here, in_process
from toy_raw import Toy, encoded, files_of, make, photo, plan, row

from maskvlm.data.prepare.prepare import claim_set, cut_jobs, locked, make_room, prepare
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.prepare.shards import HashingSink, Job, ShardNote, make_shard, note_file
from maskvlm.data.prepared import manifest as manifests
from maskvlm.data.prepared.manifest import FEATURES, MAKING, SCHEMA, whole_set_file
from maskvlm.data.raw.base import BadRow, RawRow
from maskvlm.utils.errors import ExitCode, UserError

ROWS: list[RawRow | BadRow] = [
    *(row(number) for number in range(10)),
    *(row(number, "val") for number in range(10, 13)),
    row(13, "test"),
]


# ------------------------------------------------------------------ what is written


def test_datasets_reads_what_was_written(tmp_path: Path) -> None:
    import datasets

    make(tmp_path / "toy", ROWS)
    splits = datasets.load_from_disk(str(tmp_path / "toy"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "val": 3, "test": 1}
    assert splits["train"]["image_id"][:] == [f"toy {number}" for number in range(10)]
    assert splits["val"][1]["captions"] == ["image number 11", "a second caption"]
    assert splits["train"].features == datasets.Features.from_dict(FEATURES)
    assert isinstance(splits["train"].data.blocks[0][0], datasets.table.MemoryMappedTable)
    own = datasets.Features.from_dict(FEATURES).arrow_schema
    assert own == SCHEMA
    assert json.loads(own.metadata[b"huggingface"]) == json.loads(SCHEMA.metadata[b"huggingface"])


def test_the_manifest_counts_and_names(tmp_path: Path) -> None:
    rows = [*ROWS, row(1, origin="again"), BadRow("gone", "x:1", "x:1 is gone", "val"), row(14, image=b"no")]
    rows += [row(15, captions=("a\u200bb", "c"))]
    manifest = make(tmp_path / "toy", rows, 40)
    assert manifest == json.loads((tmp_path / "toy" / "manifest.json").read_text())
    assert manifest["coverage"] == "15 images, 38 % of the published 40"
    assert (manifest["pictures"], manifest["captions"], manifest["licence"]) == (15, 30, "free")
    assert {name: split["pictures"] for name, split in manifest["splits"].items()} == {"train": 11, "val": 3, "test": 1}
    assert [shard["rows"] for shard in manifest["splits"]["train"]["shards"]] == [4, 4, 2, 1]
    reasons = {reason: entry["count"] for reason, entry in manifest["left_out"].items()}
    assert reasons == {"duplicate image id": 1, "not an image (unknown)": 1, "gone": 1}
    assert manifest["left_out"]["gone"]["examples"] == [{"origin": "x:1", "message": "x:1 is gone"}]
    assert {reason: entry["count"] for reason, entry in manifest["mended"].items()} == {"caption control": 1}
    lines = [json.loads(line) for line in (tmp_path / "toy" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["split"], line["reason"], line["origin"], line["left_out"]) for line in lines] == [
        ("train", "duplicate image id", "again", True),
        ("train", "not an image (unknown)", "toy.csv:14", True),
        ("train", "caption control", "toy.csv:15", False),
        ("val", "gone", "x:1", True),
    ]
    assert manifest["settings"]["side"] == 48
    assert manifest["phash"] == {"column": "phash", "kind": "dct-8x8-of-32x32", "bits": 64}
    assert not (tmp_path / "toy" / MAKING).exists()


def test_the_manifest_has_the_look_and_its_image_is_drawn(tmp_path: Path) -> None:
    rows = [row(number, image=encoded(photo(number % 3), "PNG")) for number in range(5)]
    raw = Toy([*rows, row(9, captions=("\U0001f600 猫 قطة $x_1$",))])
    with patch("maskvlm.data.prepare.prepare.Pool", Here):
        manifest = prepare(raw, plan(), tmp_path / "toy", 1, lambda line: None)
    words = {"5 %": 3, "50 %": 3, "95 %": 4}
    assert manifest["look"] == {"repeated_captions": 4, "caption_words": words, "repeated_looks": 2}
    with Image.open(tmp_path / "toy" / "first-look.png") as image:
        assert image.size[0] == 1600


def test_the_hash_of_a_split_is_of_its_rows_not_of_its_shards(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", ROWS)["splits"], make(tmp_path / "other", ROWS, rows=3)["splits"]
    assert len(other["train"]["shards"]) == 4
    assert all(one[name]["sha256"] == other[name]["sha256"] for name in ("train", "val", "test"))
    changed = make(tmp_path / "changed", [*ROWS[:-1], row(13, "test", captions=("other",))])["splits"]
    assert changed["train"]["sha256"] == one["train"]["sha256"]
    assert changed["test"]["sha256"] != one["test"]["sha256"]


def test_jobs_hold_rows_of_one_split_in_order_and_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs_of(rows: list[RawRow | BadRow], most: int) -> list[tuple[str, int, list[str]]]:
        return [(job.split, job.number, [each.origin for each in job.rows]) for job in cut_jobs(iter(rows), most)]

    rows: list[RawRow | BadRow] = [row(1), row(2, "val"), row(3), row(4), BadRow("gone", "b", "b", "?"), row(5, "val")]
    assert jobs_of(rows, 2) == [
        ("train", 0, ["toy.csv:1", "toy.csv:3"]),
        ("train", 1, ["toy.csv:4", "b"]),
        ("val", 0, ["toy.csv:2", "toy.csv:5"]),
    ]
    monkeypatch.setattr("maskvlm.data.prepare.prepare.MOST_BYTES", 10)
    assert [len(job[2]) for job in jobs_of([row(n, image=b"12345") for n in range(5)], 100)] == [2, 2, 1]


# ------------------------------------------------------------------ going on


def shard_of(root: Path, rows: list[RawRow | BadRow], side: int = 48, number: int = 0) -> ShardNote:
    for name in (MAKING, "train"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return make_shard(root, Settings("toy", side), Job("train", number, rows))


def test_a_shard_is_found_again_only_if_it_is_whole_and_of_the_same_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "train" / "data-00000.arrow", ROWS[:3]
    note = shard_of(tmp_path, rows)
    content, when = path.read_bytes(), path.stat().st_mtime_ns
    assert shard_of(tmp_path, rows) == note
    assert path.stat().st_mtime_ns == when
    for harm in (content[:-1], content[:-9] + b"X" + content[-8:], b""):
        path.write_bytes(harm)
        assert shard_of(tmp_path, rows) == note
        assert path.read_bytes() == content
    path.unlink()
    assert shard_of(tmp_path, rows) == note
    note_file(tmp_path, "train", 0).write_text('{"key": ')
    assert shard_of(tmp_path, rows) == note
    for other in (rows[:2], [*rows[:2], row(2, captions=("other",))], [*rows[:2], row(2, image=encoded(photo(9)))]):
        when = path.stat().st_mtime_ns
        assert shard_of(tmp_path, other).key != note.key
        assert path.stat().st_mtime_ns != when
    assert shard_of(tmp_path, rows, 32).key != note.key
    file, hashes = tmp_path / "a.png", set()
    for number in (1, 2):  # a file that changed since
        file.write_bytes(encoded(photo(number), "PNG"))
        hashes.add(shard_of(tmp_path, [row(1, image=str(file))]).sha256)
    assert len(hashes) == 2


class Unreadable(Toy):
    """A table that cannot be read to its end."""

    def rows(self) -> Iterator[RawRow | BadRow]:
        yield from super().rows()
        raise UserError("toy.csv", "no column for the image", "Name it", ExitCode.BAD_DATA)


def begin(root: Path, rows: list[RawRow | BadRow]) -> None:
    """Prepare up to an error after these rows."""
    with in_process(), pytest.raises(UserError, match="no column for the image"):
        prepare(Unreadable(rows), plan(), root, 1, lambda line: None)


def test_what_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    """What is whole is made once; a half file of a killed run and shards of rows that are gone are removed."""
    root = tmp_path / "a" / "toy"
    begin(root, ROWS)
    made = {file: file.stat().st_mtime_ns for file in root.glob("*/data-*.arrow")}
    assert sorted(file.name for file in made) == ["data-00000.arrow", "data-00001.arrow"]
    assert not (root / "manifest.json").exists()
    (root / "train" / ".data-00099.arrow.1.tmp").write_bytes(b"half")
    (root / "train" / "data-00007.arrow").write_bytes(b"of a longer table")
    make(root, ROWS)
    make(tmp_path / "b" / "toy", ROWS)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert {file: file.stat().st_mtime_ns for file in made} == made


SLOW = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
from toy_raw import Toy, plan, row
from maskvlm.data.prepare.prepare import prepare

class Slow(Toy):
    def rows(self):
        for number, each in enumerate(super().rows()):
            time.sleep(float(sys.argv[3]) * (number >= 20))
            yield each

if __name__ == "__main__":
    prepare(Slow([row(number) for number in range(60)]), plan(rows=5), Path(sys.argv[2]), 2, lambda line: None)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not_killed(tmp_path: Path) -> None:
    """Fails where a shard is written in place, or a note before its shard, or where nothing is found again."""
    root, here, until = tmp_path / "killed" / "toy", Path(__file__).parent, time.monotonic() + 240
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), f"{here}:{here.parent}", str(root)]
    first = subprocess.Popen([*command, "1"], stdout=subprocess.PIPE)
    while len([*(root / MAKING).glob("train-*.json")]) < 3:
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.communicate(timeout=60)  # to the end of the pipe, which the other processes have: they end with it
    there = {file: file.stat().st_mtime_ns for file in (root / "train").glob("*.arrow")}
    noted = [number for number in range(12) if note_file(root, "train", number).is_file()]
    assert 3 <= len(there) < 12
    assert not (root / "manifest.json").exists()
    subprocess.run([*command, "0"], check=True, timeout=300)
    prepare(Toy([row(number) for number in range(60)]), plan(rows=5), tmp_path / "whole" / "toy", 1, lambda line: None)
    assert files_of(root) == files_of(tmp_path / "whole" / "toy")
    again = [file for file, when in there.items() if file.stat().st_mtime_ns != when]
    assert len(there) - len(again) >= len(noted) >= 3


# ------------------------------------------------------------------ what is refused


def test_a_complete_set_stays_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    manifest = make(root, ROWS)
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    assert make(root, ROWS[:1]) == manifest
    for settings in ({"side": 40}, {"raw": "new.csv"}):
        with pytest.raises(UserError, match="holds a prepared set made with") as caught:
            make(root, ROWS, **settings)
        assert caught.value.code == ExitCode.CANNOT_CREATE
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


def test_an_unfinished_set_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    """But an attempt that made nothing binds nobody: a csv whose columns were not found is corrected and prepared."""
    (tmp_path / "toy" / MAKING).mkdir(parents=True)
    (tmp_path / "toy" / MAKING / "plan.json").write_text(json.dumps(plan(side=32).card()))
    (tmp_path / "toy" / "train").mkdir()
    (tmp_path / "toy" / "train" / "data-00000.arrow").touch()
    with pytest.raises(UserError, match="holds an unfinished set made with side 32 instead of 48"):
        make(tmp_path / "toy", ROWS)
    (tmp_path / "toy" / "train" / "data-00000.arrow").unlink()
    assert make(tmp_path / "toy", ROWS)["pictures"] == 14


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Who is refused leaves the plan of the one at work."""
    pytest.importorskip("fcntl")
    root = tmp_path / "toy"
    make_room(root)
    with locked(root):
        claim_set(root, plan())
        with pytest.raises(UserError, match="another process is preparing this set"):
            make(root, ROWS, side=40)
        assert json.loads((root / MAKING / "plan.json").read_text()) == plan().card()
    with locked(root):
        pass


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for place, message in ((tmp_path, "holds files that are not part"), (tmp_path / "thesis.txt", "cannot be written")):
        with pytest.raises(UserError, match=message) as caught:
            make(place, ROWS)
        assert caught.value.code == ExitCode.CANNOT_CREATE
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_usable_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image can be used \(not an image \(unknown\): 2, gone: 1; ") as caught:
        make(tmp_path / "toy", [row(1, image=b"no"), row(2, image=b"no"), BadRow("gone", "x", "x", "val")])
    assert caught.value.code == ExitCode.BAD_DATA
    assert not (tmp_path / "toy").exists()
    with pytest.raises(UserError, match="no image was opened"):
        make(tmp_path / "toy", [row(1, captions=())])
    with pytest.raises(UserError, match="there is no row"):
        make(tmp_path / "toy", [])


# ------------------------------------------------------------------ the disk


def test_a_full_disk_is_one_line_and_older_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = shard_of(tmp_path, ROWS[:3])
    before = files_of(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half() -> None:
        with whole_set_file(tmp_path / "train" / "data-00000.arrow") as file:
            file.write(b"half")
            full()

    with pytest.raises(UserError) as caught:
        half()
    assert caught.value.code == ExitCode.IO_ERROR
    with monkeypatch.context() as patched:
        patched.setattr(HashingSink, "write", full)
        with pytest.raises(UserError, match=r"data-00001\.arrow: cannot be written \(No space left on device\)"):
            shard_of(tmp_path, ROWS[3:5], number=1)
    assert files_of(tmp_path) == before
    assert shard_of(tmp_path, ROWS[:3]) == note


def test_a_file_is_forced_to_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(manifests.os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(manifests.os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    with whole_set_file(tmp_path / "a") as file:
        file.write(b"1")
        assert [each.name[0] for each in tmp_path.iterdir()] == ["."]  # a temporary name
    assert done == ["fsync", "rename", "fsync"]
    assert (tmp_path / "a").read_bytes() == b"1"
