"""Raw rows to a prepared set: what is written, gone on with after a kill, and refused.

How to break the code so that these fail: write a shard without the temporary file (`whole_set_file` -> open), leave the
hash out of `there_already`, hand jobs out by worker, hash a split shard by shard, write the manifest first, clean the
folder before asking what is in it, drop `screened` from `cut`.
"""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from toy_raw import Toy, encoded, files_of, make, many, photo, plan, row

from bench import prepare as benchmark
from maskvlm.data.prepare.prepare import claim_set, cut_jobs, locked, make_room, prepare
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.prepare.shards import HashingSink, Job, make_shard, note_file
from maskvlm.data.prepared import manifest as manifests
from maskvlm.data.prepared.manifest import FEATURES, MAKING, SCHEMA, amount, coverage, read_manifest, whole_set_file
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
    assert [Path(file["filename"]).name for file in splits["train"].cache_files] == [
        f"data-0000{number}.arrow" for number in range(3)
    ]
    assert isinstance(splits["train"].data.blocks[0][0], datasets.table.MemoryMappedTable)


def test_the_schema_is_the_one_that_datasets_would_write() -> None:
    import datasets

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
    assert {"maskvlm", "pillow", "numpy", "datasets", "pyarrow", "python", "libjpeg"} <= manifest["versions"].keys()
    assert not (tmp_path / "toy" / MAKING).exists()


def test_workers_change_nothing_and_shards_not_the_rows(tmp_path: Path) -> None:
    one = make(tmp_path / "one" / "toy", ROWS)
    two = make(tmp_path / "two" / "toy", ROWS, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    other = prepare(Toy(ROWS), plan(rows=3), tmp_path / "cut" / "toy", 1, lambda line: None)
    for name in ("train", "val", "test"):
        assert one["splits"][name]["sha256"] == two["splits"][name]["sha256"] == other["splits"][name]["sha256"]
    assert len(other["splits"]["train"]["shards"]) == 4
    changed = make(tmp_path / "changed" / "toy", [*ROWS[:-1], row(13, "test", captions=("other",))])
    assert changed["splits"]["train"]["sha256"] == one["splits"]["train"]["sha256"]
    assert changed["splits"]["test"]["sha256"] != one["splits"]["test"]["sha256"]


def test_a_split_all_of_whose_rows_are_bad_is_not_there(tmp_path: Path) -> None:
    manifest = make(tmp_path / "toy", [*ROWS[:10], BadRow("gone", "x", "x", "val"), row(20, "test", image=b"no")])
    assert [*manifest["splits"]] == ["train"]
    assert not (tmp_path / "toy" / "val").exists()
    assert json.loads((tmp_path / "toy" / "dataset_dict.json").read_text()) == {"splits": ["train"]}


def test_annotation_files_lie_beside_the_images(tmp_path: Path) -> None:
    raw = Toy([row(number, "pictures", captions=(), name=f"a/{number}.png") for number in range(3)])
    (tmp_path / "train.json").write_bytes(b"{}\r\n")
    raw.annotations = [tmp_path / "train.json"]
    manifest = prepare(raw, plan(), tmp_path / "toy", 1, lambda line: None)
    assert (tmp_path / "toy" / "train.json").read_bytes() == b"{}\r\n"
    assert "train.json" in manifest["files"]
    assert manifest["splits"]["pictures"]["captions"] == 0


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


@pytest.mark.parametrize(
    ("images", "published", "words"),
    [
        (2_013_544, 2_950_000, "2,013,544 images, 68 % of the published 2.95 M"),
        (1, 3, "1 image, 33 % of the published 3"),
        (5, 5, "5 images, 100 % of the published 5"),
        (996, 1_000, "996 images, 99 % of the published 1,000"),
        (99_999, 100_000, "99,999 images, 99 % of the published 100,000"),
        (3, 1000, "3 images, 0.3 % of the published 1,000"),
        (7, None, "7 images"),
    ],
)
def test_coverage_in_words(images: int, published: int | None, words: str) -> None:
    assert coverage(images, published) == words
    assert amount(12_423_374) == "12.4 M"


# ------------------------------------------------------------------ going on

SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toy_raw import Toy, many, plan
from maskvlm.data.prepare.prepare import prepare

class Slow(Toy):
    def rows(self):
        for number, each in enumerate(super().rows()):
            if number >= 20:
                time.sleep(float(sys.argv[3]))
            yield each

if __name__ == "__main__":
    prepare(Slow(many()), plan(rows=5), Path(sys.argv[2]), 2, lambda line: None)
"""


def run(folder: Path, root: Path, pause: float) -> subprocess.Popen[bytes]:
    script = folder / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(root), str(pause)]
    return subprocess.Popen(command, start_new_session=True)


def group(pgid: int) -> list[int]:
    """Processes of a group that are alive."""
    pids = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == pgid and fields[0] != "Z":
                pids.append(int(place.name))
    return pids


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see that no process is left")
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not_killed(tmp_path: Path) -> None:
    """Fails where a shard is written in place, or a note before its shard, or where nothing is found again."""
    root = tmp_path / "killed" / "toy"
    first = run(tmp_path, root, 1.0)
    until = time.monotonic() + 240
    while len([*(root / MAKING).glob("train-*.json")]) < 3:
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while pids := group(first.pid):  # the others end with it
        assert time.monotonic() < until, pids
        time.sleep(0.05)
    there = {file: file.stat().st_mtime_ns for file in (root / "train").glob("*.arrow")}
    assert 3 <= len(there) < 12
    noted = [note for number in range(12) if (note := note_file(root, "train", number)).is_file()]
    assert not (root / "manifest.json").exists()
    (root / "train" / ".data-00099.arrow.1.tmp").write_bytes(b"half")
    assert run(tmp_path, root, 0).wait(300) == 0
    whole = tmp_path / "whole" / "toy"
    prepare(Toy(many()), plan(rows=5), whole, 1, lambda line: None)
    assert files_of(root) == files_of(whole)
    again = [file for file, when in there.items() if file.stat().st_mtime_ns != when]
    assert len(there) - len(again) >= len(noted) >= 3


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toy_raw import row
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.prepare.shards import Job
from maskvlm.data.streaming.pool import Pool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)  # unlike SIG_IGN nothing that is inherited
    root = Path(sys.argv[2])
    for name in (".making", "train"):
        (root / name).mkdir(parents=True)
    with Pool(1, root, Settings("toy", 48)) as pool:
        future = pool.submit(Job("train", 0, [row(0)]))
        for _ in range(10):  # at whatever the server is: its start, its imports
            os.killpg(0, signal.SIGINT)
            time.sleep(0.2)
        print(future.result())
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_ctrl_c_is_left_to_the_first_process(tmp_path: Path) -> None:
    """Fails where the server of processes is started with SIGINT open: it would end within its imports, with a
    traceback."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "toy")]
    ended = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


IN_THE_START = (
    INTERRUPTED[: INTERRUPTED.index("if __name__")]
    + """
import threading

if __name__ == "__main__":
    root = Path(sys.argv[2])
    for name in (".making", "train"):
        (root / name).mkdir(parents=True)
    try:
        with Pool(2, root, Settings("toy", 48)) as pool:
            threading.Timer(0.3, lambda: os.killpg(0, signal.SIGINT)).start()  # the server still imports
            pool.submit(Job("train", 0, [row(0)]))
            time.sleep(20)
    except KeyboardInterrupt:
        print("interrupted")
"""
)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_ctrl_c_while_processes_are_started_leaves_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(IN_THE_START)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "toy")]
    ended = subprocess.run(
        command, start_new_session=True, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")


def shard_of(root: Path, rows: list[RawRow | BadRow], side: int = 48) -> Any:
    for name in (MAKING, "train"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return make_shard(root, Settings("toy", side), Job("train", 0, rows))


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
    when = path.stat().st_mtime_ns
    for other in (rows[:2], [*rows[:2], row(2, captions=("other",))], [*rows[:2], row(2, image=encoded(photo(9)))]):
        assert shard_of(tmp_path, other).key != note.key
        assert path.stat().st_mtime_ns != when
        when = path.stat().st_mtime_ns
    assert shard_of(tmp_path, rows, 32).key != note.key


def test_a_file_that_changed_since_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(photo(1), "PNG"))
    note = shard_of(tmp_path / "toy", [row(1, image=str(file))])
    file.write_bytes(encoded(photo(2), "PNG"))
    assert shard_of(tmp_path / "toy", [row(1, image=str(file))]).sha256 != note.sha256


def test_shards_of_rows_that_are_gone_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    make(root, ROWS)
    (root / "manifest.json").unlink()
    (root / MAKING).mkdir()
    (root / MAKING / "plan.json").write_text(json.dumps(plan().card()))
    make(root, ROWS[:4])
    assert sorted(file.name for file in root.rglob("*.arrow")) == ["data-00000.arrow"]


# ------------------------------------------------------------------ what is refused


def test_a_complete_set_stays_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    manifest = make(root, ROWS)
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    lines: list[str] = []
    assert prepare(Toy(ROWS[:1]), plan(), root, 1, lines.append) == manifest
    assert lines == [f"{root}: already prepared, 14 images"]
    with pytest.raises(UserError, match=r"holds a prepared set made with side 48 instead of 40\. Delete") as caught:
        make(root, ROWS, side=40)
    assert caught.value.code == ExitCode.CANNOT_CREATE
    with pytest.raises(UserError, match=r"made with raw 'toy\.csv' instead of 'new\.csv'"):
        make(root, ROWS, raw="new.csv")
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


def test_any_number_of_reasons_is_a_set_that_can_be_read(tmp_path: Path) -> None:
    """Reasons of a stranger's table: beyond a hundred they are one."""
    bad = [BadRow(f"timeout after {number} ms", f"x:{number}", "no answer", "train") for number in range(150)]
    manifest = make(tmp_path / "toy", [*ROWS, *bad])
    counts = {reason: entry["count"] for reason, entry in manifest["left_out"].items()}
    assert counts["other reasons"] >= 50
    assert sum(count for reason, count in counts.items() if reason.startswith(("timeout", "other"))) == 150
    assert read_manifest(tmp_path / "toy")["left_out"] == manifest["left_out"]


def test_who_is_refused_leaves_the_plan_of_the_one_at_work(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    make_room(root)
    with locked(root):
        claim_set(root, plan())
        with pytest.raises(UserError, match="another process is preparing this set"):
            make(root, ROWS, side=40)
        assert json.loads((root / MAKING / "plan.json").read_text()) == plan().card()


def test_an_unfinished_set_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    (root / MAKING).mkdir(parents=True)
    (root / MAKING / "plan.json").write_text(json.dumps(plan(side=32).card()))
    (root / "train").mkdir()
    (root / "train" / "data-00000.arrow").touch()
    with pytest.raises(UserError, match="holds an unfinished set made with side 32 instead of 48"):
        make(root, ROWS)


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds files that are not part of a prepared set"):
        make(tmp_path, ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").rename(tmp_path / "first-look.png")  # of a first look
    assert make(tmp_path, ROWS)["pictures"] == 14


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("x")
    with pytest.raises(UserError, match="toy: cannot be written") as caught:
        make(tmp_path / "toy", ROWS)
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_nothing_usable_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path / "toy", [row(1, image=b"no"), row(2, image=b"no"), BadRow("gone", "x", "x", "val")])
    assert str(caught.value).startswith("toy.csv: no image can be used (not an image (unknown): 2, gone: 1; first: ")
    assert str(caught.value).endswith("Check RAW and its folder of images.")
    assert caught.value.code == ExitCode.BAD_DATA
    assert not (tmp_path / "toy").exists()
    with pytest.raises(UserError, match=r"no image can be used \(no rows; first: there is no row\)"):
        make(tmp_path / "toy", [])


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / MAKING).mkdir()
    with locked(tmp_path), pytest.raises(UserError, match="another process is preparing this set"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_full_disk_is_one_line_and_older_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = shard_of(tmp_path, ROWS[:3])
    before = files_of(tmp_path)

    def full(self: HashingSink, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(HashingSink, "write", full)
        with pytest.raises(UserError, match=r"data-00001\.arrow: cannot be written \(No space left on device\)\. Free"):
            make_shard(tmp_path, Settings("toy", 48), Job("train", 1, ROWS[3:5]))

    def half() -> None:
        with whole_set_file(tmp_path / "train" / "data-00000.arrow") as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError) as caught:
        half()
    assert caught.value.code == ExitCode.IO_ERROR
    assert files_of(tmp_path) == before
    assert shard_of(tmp_path, ROWS[:3]) == note


def test_what_goes_wrong_in_a_process_arrives_as_the_users_error(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    (root / MAKING).mkdir(parents=True)
    (root / MAKING / "plan.json").write_text(json.dumps(plan().card()))
    (root / "train").mkdir()
    (root / "train" / "data-00000.arrow" / "x").mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(UserError, match=r"data-00000\.arrow: cannot be written \(Is a directory\)"):
        make(root, ROWS)


def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    """As the system does where memory is short."""

    class Killing(Toy):
        def rows(self) -> Iterator[RawRow | BadRow]:
            yield from ROWS[:4]
            until = time.monotonic() + 120
            while not (children := multiprocessing.active_children()) and time.monotonic() < until:
                time.sleep(0.05)
            for child in children:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)
            yield from ROWS[4:]

    with pytest.raises(
        UserError, match="a process of the preparation was killed, perhaps because memory ran out"
    ) as caught:
        prepare(Killing(ROWS), plan(), tmp_path / "toy", 1, lambda line: None)
    assert caught.value.code == ExitCode.IO_ERROR
    assert make(tmp_path / "toy", ROWS)["pictures"] == 14


def test_a_file_is_forced_to_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(manifests.os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(manifests.os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    with whole_set_file(tmp_path / "a") as file:
        file.write(b"1")
    assert done == ["fsync", "rename", "fsync"]
    assert (tmp_path / "a").read_bytes() == b"1"


def test_rows_are_read_in_batches_of_a_hundred(tmp_path: Path) -> None:
    small = encoded(photo(0, 8, 8), "PNG")
    shard_of(tmp_path, [row(number, image=small) for number in range(250)])
    with pa.ipc.open_stream(tmp_path / "train" / "data-00000.arrow") as stream:
        assert [batch.num_rows for batch in stream] == [100, 100, 50]


def test_an_attempt_that_made_nothing_binds_nobody(tmp_path: Path) -> None:
    """A csv whose columns were not found is corrected and prepared. Fails where the left-over plan is compared."""
    root = tmp_path / "toy"
    (root / MAKING).mkdir(parents=True)
    (root / MAKING / "plan.json").write_text(json.dumps(plan(side=32).card()))
    assert make(root, [row(number) for number in range(3)])["pictures"] == 3


def test_a_table_that_cannot_be_read_leaves_no_folder(tmp_path: Path) -> None:
    """Fails where `.making` stays: `data=toy` would be an unfinished set that nobody has begun."""

    class Unreadable(Toy):
        def rows(self) -> Iterator[RawRow | BadRow]:
            yield from self.list
            raise UserError("toy.csv", "no column for the image", "Name it", ExitCode.BAD_DATA)

    for look in (False, True):
        if look:
            (tmp_path / "toy").mkdir()
            (tmp_path / "toy" / "first-look.png").touch()
        with pytest.raises(UserError, match="no column for the image"):
            prepare(Unreadable([]), plan(), tmp_path / "toy", 1, lambda line: None)
        assert [file.name for file in tmp_path.rglob("*")] == (["toy", "first-look.png"] if look else [])
    # shards that are whole are kept, as the same command goes on from them
    with pytest.raises(UserError, match="no column for the image"):
        prepare(Unreadable(ROWS), plan(), tmp_path / "other", 1, lambda line: None)
    assert [*(tmp_path / "other").glob("train/data-*.arrow")]


# ------------------------------------------------------------------ the benchmark


@pytest.mark.parametrize(("size", "expected"), [((40, 100), (26, 64)), ((100, 40), (64, 26)), ((30, 30), (64, 64))])
def test_the_benchmarks_photos_keep_their_shape(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    (tmp_path / "raw").mkdir()
    Image.new("RGB", size).save(tmp_path / "raw" / "a.png")
    (path,) = benchmark.photos(str(tmp_path / "raw"), tmp_path, 64)
    assert Image.open(path).size == expected


def test_the_benchmarks_own_photos_are_of_four_to_three(tmp_path: Path) -> None:
    paths = benchmark.photos(None, tmp_path, 64)
    assert {Image.open(path).size for path in paths} == {(64, 48)}
