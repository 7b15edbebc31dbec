"""Webdataset and img2dataset: their three forms, damaged archives, and that no bytes lead astray."""

import gzip
import io
import json
import tarfile
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_raw_table import outcome
from toy_images import SEEDS

from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.raw.archive import members
from maskvlm.data.raw.columnar import parquet_samples
from maskvlm.utils.errors import ExitCode, UserError

JPEG = SEEDS["jpeg"]
FAST = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def meta(key: str, **more: Any) -> dict[str, Any]:
    """What img2dataset notes of an image."""
    status = {"status": "success", "error_message": None, "width": 64, "height": 48, "sha256": "0" * 64}
    return {"caption": f"json {key}", "url": f"http://example.org/{key}.jpg", "key": key, **status, **more}


def tar(*files: tuple[str, bytes], **header: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sample(key: str, text: str = "a dog", **more: Any) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", JPEG),
        (f"{key}.json", json.dumps(meta(key, **more)).encode()),
        (f"{key}.txt", text.encode()),
    ]


def stats(folder: Path, shard: str, count: int, successes: int) -> None:
    content = {"count": count, "successes": successes, "failed_to_download": count - successes, "failed_to_resize": 0}
    (folder / f"{shard}_stats.json").write_text(json.dumps({**content, "status_dict": {}}))


def read(raw: Path, name: str = "webdataset", **columns: str) -> list[RawRow | BadRow]:
    return [*open_raw(name, str(raw), columns or None).rows()]


def reasons(raw: Path) -> list[str]:
    return [row.reason if isinstance(row, BadRow) else "good" for row in read(raw)]


# ------------------------------------------------------------------ forms


def test_tars_in_the_layout_of_img2dataset(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(tar(*sample("000000000", "one"), *sample("000000001", "two")))
    (tmp_path / "00001.tar").write_bytes(tar(*sample("000010000", "three")))
    stats(tmp_path, "00000", 3, 2)
    stats(tmp_path, "00001", 2, 1)
    raw = open_raw("webdataset", str(tmp_path), as_name="cc3m")
    assert [*raw.rows()] == [
        RawRow(JPEG, ("one",), "cc3m 000000000", "train", "00000.tar!000000000.jpg"),
        RawRow(JPEG, ("two",), "cc3m 000000001", "train", "00000.tar!000000001.jpg"),
        RawRow(JPEG, ("three",), "cc3m 000010000", "train", "00001.tar!000010000.jpg"),
    ]
    assert raw.notes == ["img2dataset asked for 5 images and got 3 (60 %)"]


def test_a_count_that_differs_from_the_statistics_is_told(tmp_path: Path) -> None:
    """Fails where `_stats.json` is not compared: an archive that lost its end cleanly would pass for whole."""
    (tmp_path / "00000.tar").write_bytes(tar(*sample("0")))
    stats(tmp_path, "00000", 9, 8)
    row = read(tmp_path)[-1]
    assert row == BadRow(
        "other count than img2dataset's", "00000.tar", "00000_stats.json counts 8 images, 1 are there", "train"
    )
    (tmp_path / "00000_stats.json").write_text("[")
    assert reasons(tmp_path) == ["good", "damaged statistics"]


def test_folders_of_files_in_the_layout_of_img2dataset(tmp_path: Path) -> None:
    for key in ("000000000", "000000001"):
        (tmp_path / "00000").mkdir(exist_ok=True)
        for name, content in sample(key, f"text {key}"):
            (tmp_path / "00000" / name).write_bytes(content)
    pq.write_table(pa.table({"key": ["0"], "url": ["x"]}), tmp_path / "00000.parquet")  # without images: passed over
    stats(tmp_path, "00000", 2, 2)
    raw = open_raw("webdataset", str(tmp_path))
    assert [*raw.rows()] == [
        RawRow(str(tmp_path / f"00000/{key}.jpg"), (f"text {key}",), f"webdataset {key}", "train", f"00000!{key}.jpg")
        for key in ("000000000", "000000001")
    ]
    assert raw.notes == ["img2dataset asked for 2 images and got 2 (100 %)"]


def test_parquet_in_the_layout_of_img2dataset(tmp_path: Path) -> None:
    failed = meta("000000001", status="failed_to_download", error_message="HTTP Error 404")
    rows = [{**meta("000000000"), "jpg": JPEG, "txt": "one"}, {**failed, "jpg": None, "txt": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    stats(tmp_path, "00000", 2, 1)
    assert read(tmp_path) == [
        RawRow(JPEG, ("one",), "webdataset 000000000", "train", "00000.parquet!row 0"),
        BadRow("failed to download", "00000.parquet!row 1", "HTTP Error 404", "train"),
    ]
    (tmp_path / "00000.parquet").write_bytes((tmp_path / "00000.parquet").read_bytes()[:-100])
    assert reasons(tmp_path) == ["damaged archive"]


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.int64())])
def test_an_image_of_a_parquet_file_is_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    """Fails where a text in the place of bytes is taken for a path: it may be that of any file."""
    (tmp_path / "private.jpg").write_bytes(JPEG)
    value = str(tmp_path / "private.jpg") if kind == pa.string() else [1, 2]
    images = pa.array([{"bytes": value, "path": ""}], pa.struct([("bytes", kind), ("path", pa.string())]))
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": images, "caption": ["one"]}), tmp_path / "raw" / "train-0.parquet")
    assert [sample.problem for sample in parquet_samples(tmp_path / "raw" / "train-0.parquet", {})] == [
        ("no image", "no column of images")
    ]
    with pytest.raises(UserError, match="holds no images"):
        reasons(tmp_path / "raw")


def test_plain_webdataset_without_json(tmp_path: Path) -> None:
    """Keys go to the first dot and start anew in each shard; other members of a key are passed over."""
    files = [("./a/1.jpg", JPEG), ("a/1.cls", b"3"), ("a/1.txt", b"one"), ("a/2.seg.png", b"x"), ("a/2.txt", b"two")]
    for shard in ("s-000000.tar", "s-000001.tar"):
        (tmp_path / shard).write_bytes(tar(*files, ("a/._2.jpg", b"junk"), ("readme", b"x")))
    rows = read(tmp_path, image="jpg")
    assert [row.origin for row in rows] == [f"s-00000{n}.tar!a/{m}" for n in (0, 1) for m in ("1.jpg", "2.txt")]
    assert [type(row) for row in rows] == [RawRow, BadRow] * 2
    assert [row[2] for row in rows if isinstance(row, RawRow)] == ["webdataset s-000000/a/1", "webdataset s-000001/a/1"]


def test_splits_are_named_by_folders_and_shards(tmp_path: Path) -> None:
    for name in ("train/00000.tar", "val/00000.tar", "coco-test-00000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar(*sample("000000000")))
    assert [(row.split, row[2]) for row in read(tmp_path)] == [
        ("test", "webdataset test 000000000"),
        ("train", "webdataset 000000000"),
        ("val", "webdataset val 000000000"),
    ]


def test_a_photo_known_elsewhere_has_its_id_there(tmp_path: Path) -> None:
    """Fails where ids are keys alone: a leak between sets would not be seen by id."""
    urls = {
        "http://images.cocodataset.org/train2017/000000391895.jpg": "coco 391895",
        "http://static.flickr.com/2723/4385058960_b0f291553e.jpg": "flickr 4385058960",
        "https://farm4.staticflickr.com/3232/2513260012_03d33305cf_z.jpg": "flickr 2513260012",
        "https://cs.stanford.edu/people/rak248/VG_100K_2/2343.jpg": "vg 2343",
        "http://example.org/1.jpg": "webdataset 4",
    }
    files = [file for n, url in enumerate(urls) for file in sample(f"{n}", url=url)]
    (tmp_path / "00000.tar").write_bytes(tar(*files))
    assert [row[2] for row in read(tmp_path)] == [*urls.values()]


def test_captions_of_the_json_and_by_name(tmp_path: Path) -> None:
    content = json.dumps({"captions": ["one", "two"], "alt": "three", "split": "val"}).encode()
    (tmp_path / "0.tar").write_bytes(tar(("1.jpg", JPEG), ("1.json", content)))
    (row,) = read(tmp_path)
    assert isinstance(row, RawRow)
    assert (row.captions, row.split) == (("one", "two"), "train")
    (row,) = read(tmp_path, caption="alt", split="split")
    assert isinstance(row, RawRow)
    assert (row.captions, row.split) == (("three",), "val")


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_what_is_before_a_cut_is_used(tmp_path: Path, packed: bool, share: float) -> None:
    """Fails where the cut is an exception, or no word of it is said."""
    noise = np.random.default_rng(0).bytes(20 * 9000)  # packing makes nothing of it
    files = [
        (f"{n:03d}.{kind}", noise[n * 9000 :][:9000] if kind == "jpg" else b"a dog")
        for n in range(20)
        for kind in ("jpg", "txt")
    ]
    whole = tar(*files)
    data = gzip.compress(whole, 1) if packed else whole
    (tmp_path / ("0.tar.gz" if packed else "0.tar")).write_bytes(data[: int(share * len(data))])
    row_reasons = reasons(tmp_path)
    assert row_reasons[-1] == "truncated archive"
    assert {*row_reasons[:-1]} == {"good"}
    assert abs(len(row_reasons) - 1 - 20 * share) <= 2


def test_a_cut_between_two_members_is_told(tmp_path: Path) -> None:
    """tarfile itself takes a missing end marker for the end."""
    data = tar(*sample("0"), *sample("1"))
    one = len(tar(*sample("0")).rstrip(b"\x00")) // 512 * 512 + 512
    (tmp_path / "0.tar").write_bytes(data[:one])
    assert reasons(tmp_path) == ["good", "truncated archive"]


def test_garbage_for_a_header_is_told(tmp_path: Path) -> None:
    """tarfile itself takes it for the end."""
    start = tar(*sample("0")).rstrip(b"\x00")
    start += bytes(-len(start) % 512)
    (tmp_path / "0.tar").write_bytes(start + b"garbage!" * 640)
    assert reasons(tmp_path) == ["good", "damaged archive"]
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>")
    assert reasons(tmp_path) == ["damaged archive"]
    (tmp_path / "0.tar").write_bytes(b"")
    assert reasons(tmp_path) == ["truncated archive"]


def test_bombs_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    """Fails where a size is taken on trust: of a member, or of the attributes before it."""
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("bomb.jpg")
        info.size, info.type = 3_000_000_000, kind
        with gzip.open(tmp_path / "0.tar.gz", "wb", 1) as stream:
            stream.write(tar(*sample("0")).rstrip(b"\x00"))
            stream.write(bytes(-stream.tell() % 512) + info.tobuf())
            for _ in range(100):
                stream.write(bytes(1_000_000))
        start = time.monotonic()
        tracemalloc.start()
        row_reasons = reasons(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert row_reasons == ["good", "too large" if kind == tarfile.REGTYPE else "damaged archive"]
        assert peak < 50_000_000
        assert time.monotonic() - start < 5


def test_a_bomb_in_a_plain_archive_is_stepped_over(tmp_path: Path) -> None:
    with (tmp_path / "0.tar").open("wb") as stream:
        info = tarfile.TarInfo("1.jpg")
        info.size = 300_000_000
        stream.write(info.tobuf())
        stream.seek(512 + 300_000_000 - 300_000_000 % 512 + 512)
        stream.write(tar(*sample("2")))
    assert reasons(tmp_path) == ["too large", "good"]


def test_no_member_is_written_anywhere(tmp_path: Path) -> None:
    data = tar(("../out.jpg", JPEG), ("/tmp/out.jpg", JPEG), ("a/../../out.jpg", JPEG), *sample("0"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(data)
    assert reasons(tmp_path / "in") == ["unsafe member name"] * 3 + ["good"]
    data = tar(("../notes", b"x"), ("", JPEG), ("a/..", b"x"), *sample("0"))
    (tmp_path / "in" / "0.tar").write_bytes(data)
    assert reasons(tmp_path / "in") == ["unsafe member name"] * 3 + ["good"]
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "0.tar"]


def test_a_key_counts_once(tmp_path: Path) -> None:
    """Fails where the second of two samples of the same key replaces or doubles the first."""
    files = [*sample("0", "first"), *sample("1"), *sample("0", "second"), *sample("2"), *sample("2", "again")]
    (tmp_path / "0.tar").write_bytes(tar(*files))
    rows = read(tmp_path)
    assert [row.reason if isinstance(row, BadRow) else row.captions for row in rows] == [
        *[("first",), ("a dog",), "duplicate key", ("a dog",)],
        "duplicate key",
    ]


def test_files_of_a_key_that_are_apart_or_have_dots_are_told_with_the_first(tmp_path: Path) -> None:
    """Fails where the message on the second part does not name the first, and why there are two."""
    names = ("a.jpg", "b.jpg", "b.txt", "a.txt", "c.v1.jpg", "c.v1.txt", "c.v2.jpg", "c.v2.txt")
    (tmp_path / "0.tar").write_bytes(tar(*((name, JPEG if name.endswith("jpg") else b"x") for name in names)))
    why = "the members of a key must be adjacent, and it ends at the first dot of their names"
    assert [row if isinstance(row, BadRow) else row.origin for row in read(tmp_path)] == [
        BadRow("no caption", "0.tar!a.jpg", "neither a .txt nor a caption in a .json", "train"),
        "0.tar!b.jpg",
        BadRow("duplicate key", "0.tar!a.txt", f"key 'a' appears twice, first at a.jpg; {why}", "train"),
        "0.tar!c.v1.jpg",
        BadRow("duplicate key", "0.tar!c.v2.jpg", f"key 'c' appears twice, first at c.v1.jpg; {why}", "train"),
    ]


def test_parquet_with_columns_of_its_own_lists_them(tmp_path: Path) -> None:
    """Fails where the line says that there is no shard, or that a .txt is missing."""
    pq.write_table(pa.table({"bild": [JPEG], "wort": ["a dog"], "image": ["a.jpg"]}), tmp_path / "x.parquet")
    there = r"\(available: 'bild', 'wort', 'image'\)\. "
    with pytest.raises(UserError, match=rf"column 'image' holds no images \(bytes\) {there}Name the column that does"):
        open_raw("webdataset", str(tmp_path))
    with pytest.raises(UserError, match=rf"no column 'nix' {there}Name the column of images: --columns image=NAME"):
        open_raw("webdataset", str(tmp_path), {"image": "nix"})
    (row,) = open_raw("webdataset", str(tmp_path), {"image": "bild"}).rows()
    assert isinstance(row, BadRow)
    what = "no column for the caption (available: 'wort', 'image'); name it: --columns caption=NAME (make: ARGS=)"
    assert row.message == what
    (row,) = open_raw("webdataset", str(tmp_path), {"image": "bild", "caption": "wort"}).rows()
    assert row[1] == ("a dog",)


def test_a_folder_without_shards_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(JPEG)
    with pytest.raises(UserError, match=r"no shards in this folder\. Looked for \*\.tar, ") as caught:
        open_raw("webdataset", str(tmp_path))
    assert caught.value.code == ExitCode.MISSING_INPUT


# ------------------------------------------------------------------ any bytes

WHOLE = tar(*sample("0"), ("../x.jpg", b"y"), *sample("1"))


@FAST
@given(st.binary(max_size=2000))
def test_any_bytes_as_a_tar(tmp_path: Path, content: bytes) -> None:
    for name in ("0.tar", "0.tar.gz"):
        (tmp_path / name).write_bytes(content)
        outcome(lambda: read(tmp_path))
        (tmp_path / name).unlink()


@FAST
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=12)), max_size=6), st.booleans()
)
def test_a_tar_with_any_bytes_changed(tmp_path: Path, changes: list[tuple[int, bytes]], packed: bool) -> None:
    """Headers, sizes, names and checksums included; a header's checksum is mended so that the change counts."""
    data = bytearray(WHOLE)
    for place, new in changes:
        data[place : place + len(new)] = new
        start = place // 512 * 512
        if start + 512 <= len(data):
            fields = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
            data[start + 148 : start + 156] = b"%06o\x00 " % sum(fields)
    (tmp_path / "0.tar").write_bytes(gzip.compress(data, 1) if packed else data)
    outcome(lambda: read(tmp_path))


@pytest.mark.parametrize("size", [-512, -1024, -2048])
def test_negative_sizes_end(tmp_path: Path, size: int) -> None:
    """Fails (runs for ever) where a header may lead backwards: to itself, or to one before it."""
    header = bytearray(tarfile.TarInfo("0.jpg").tobuf())
    header[124:136] = size.to_bytes(12, "big", signed=True)
    fields = header[:148] + b" " * 8 + header[156:]
    header[148:156] = b"%06o\x00 " % sum(fields)
    start = tar(*sample("1")).rstrip(b"\x00")
    (tmp_path / "0.tar").write_bytes(start + bytes(-len(start) % 512) + bytes(header) * 5)
    entries = [*islice(members(tmp_path / "0.tar"), 50)]
    assert len(entries) < 10
    assert entries[-1].problem
