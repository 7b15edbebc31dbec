"""Webdataset and img2dataset: their three forms, damaged archives, and that no bytes lead astray.

How to break the code so that these fail: take tarfile's end for the end, its sizes on trust, ids for keys alone; leave
`_stats.json` uncompared; follow a text in the place of an image's bytes.
"""

import gzip
import json
import tarfile
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_toys import IMAGES, archive, write

from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.raw.archive import members
from maskvlm.data.raw.columnar import parquet_samples
from maskvlm.utils.errors import UserError

JPEG = IMAGES[0]


def sample(key: str, text: str = "a dog", **more: Any) -> list[tuple[str, bytes]]:
    """As img2dataset writes it."""
    meta = {"caption": f"json {key}", "url": f"http://example.org/{key}.jpg", "key": key, "status": "success", **more}
    return [(f"{key}.jpg", JPEG), (f"{key}.json", json.dumps(meta).encode()), (f"{key}.txt", text.encode())]


def stats(count: int, successes: int) -> bytes:
    return json.dumps({"count": count, "successes": successes, "failed_to_download": count - successes}).encode()


def read(raw: Path, name: str = "webdataset", **columns: str) -> list[Any]:
    return [*open_raw(name, str(raw), columns or None).rows()]


def reasons(raw: Path) -> list[str]:
    return [row.reason if isinstance(row, BadRow) else "good" for row in read(raw)]


# ------------------------------------------------------------------ forms


def test_tars_in_the_layout_of_img2dataset(tmp_path: Path) -> None:
    shards = {"00000.tar": archive(*sample("0", "one"), *sample("1", "two")), "00001.tar": archive(*sample("2"))}
    write(tmp_path, {**shards, "00000_stats.json": stats(3, 2), "00001_stats.json": stats(2, 1)})
    raw = open_raw("webdataset", str(tmp_path), as_name="cc3m")
    assert [*raw.rows()] == [
        RawRow(JPEG, ("one",), "cc3m 0", "train", "00000.tar!0.jpg"),
        RawRow(JPEG, ("two",), "cc3m 1", "train", "00000.tar!1.jpg"),
        RawRow(JPEG, ("a dog",), "cc3m 2", "train", "00001.tar!2.jpg"),
    ]
    assert raw.notes == ["img2dataset asked for 5 images and got 3 (60 %)"]
    # an archive that lost its end cleanly does not pass for whole
    write(tmp_path, {"00000_stats.json": stats(9, 8), "00001_stats.json": b"["})
    assert reasons(tmp_path) == ["good", "good", "other count than img2dataset's", "good", "damaged statistics"]


def test_folders_of_files_in_the_layout_of_img2dataset(tmp_path: Path) -> None:
    write(tmp_path / "00000", dict(sample("0") + sample("1")))
    pq.write_table(pa.table({"key": ["0"], "url": ["x"]}), tmp_path / "00000.parquet")  # without images: passed over
    assert read(write(tmp_path, {"00000_stats.json": stats(2, 2)})) == [
        RawRow(str(tmp_path / f"00000/{key}.jpg"), ("a dog",), f"webdataset {key}", "train", f"00000!{key}.jpg")
        for key in "01"
    ]


def test_parquet_in_the_layout_of_img2dataset(tmp_path: Path) -> None:
    rows = [
        {"key": "0", "jpg": JPEG, "txt": "one", "status": "success", "error_message": None},
        {"key": "1", "jpg": None, "txt": None, "status": "failed_to_download", "error_message": "HTTP Error 404"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    assert read(tmp_path) == [
        RawRow(JPEG, ("one",), "webdataset 0", "train", "00000.parquet!row 0"),
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
    (found,) = parquet_samples(tmp_path / "raw" / "train-0.parquet", {})
    assert found.problem == ("no image", "no column of images")
    with pytest.raises(UserError, match="holds no images"):
        reasons(tmp_path / "raw")


def test_plain_webdataset_without_json(tmp_path: Path) -> None:
    """Keys go to the first dot and start anew in each shard; other members of a key are passed over."""
    files = [("./a/1.jpg", JPEG), ("a/1.cls", b"3"), ("a/1.txt", b"one"), ("a/2.seg.png", b"x"), ("a/2.txt", b"two")]
    content = archive(*files, ("a/._2.jpg", b"junk"), ("readme", b"x"))
    rows = read(write(tmp_path, {"s-000000.tar": content, "s-000001.tar": content}), image="jpg")
    assert [(row.reason if isinstance(row, BadRow) else row.image_id, row.origin) for row in rows] == [
        ("webdataset s-000000/a/1", "s-000000.tar!a/1.jpg"),
        ("no image", "s-000000.tar!a/2.txt"),
        ("webdataset s-000001/a/1", "s-000001.tar!a/1.jpg"),
        ("no image", "s-000001.tar!a/2.txt"),
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
    assert [row[2] for row in read(write(tmp_path, {"00000.tar": archive(*files)}))] == [*urls.values()]


# ------------------------------------------------------------------ damage

WHOLE = archive(*sample("0")).rstrip(b"\x00")
WHOLE += bytes(-len(WHOLE) % 512)  # one sample without the marker of the end


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = abs(size), kind
    fields = bytearray(info.tobuf())
    if size < 0:
        fields[124:136] = size.to_bytes(12, "big", signed=True)
        fields[148:156] = b"%06o\x00 " % sum(fields[:148] + b" " * 8 + fields[156:])
    return bytes(fields)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WHOLE, ["good", "truncated archive"]),  # tarfile itself takes a missing end marker for the end
        (WHOLE + b"garbage!" * 640, ["good", "damaged archive"]),  # and garbage
        (b"<html>not found</html>", ["damaged archive"]),
        (b"", ["truncated archive"]),
        (archive(("0.jpg", JPEG), ("0.json", b"{"), ("1.jpg", JPEG)), ["not JSON", "no caption"]),
        (
            archive(("0.jpg", JPEG), ("0.txt", b"\xe0"), ("1.jpg", JPEG), ("1.txt", b"\0")),
            ["not UTF-8 text", "null bytes"],
        ),
        # a size that leads backwards: to its own header, or to one before it, for ever
        (WHOLE + header("1.jpg", -512) * 5, ["good", "damaged archive"]),
        (WHOLE + header("1.jpg", -2048) * 5, ["good", "damaged archive"]),
        (archive(("../out.jpg", JPEG), ("/tmp/out.jpg", JPEG), *sample("0")), ["unsafe member name"] * 2 + ["good"]),
        (archive(("a/../../o.jpg", JPEG), ("../notes", b"x"), ("", JPEG)), ["unsafe member name"] * 3),
        (WHOLE + header("1.jpg", 0, tarfile.SYMTYPE) + bytes(1024), ["good", "not a plain file"]),
        (WHOLE + header("1.jpg", 0, tarfile.CHRTYPE) + bytes(1024), ["good", "not a plain file"]),
    ],
)
def test_a_damaged_or_hostile_archive_is_told(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    write(tmp_path, {"in/0.tar": content})
    assert reasons(tmp_path / "in") == expected
    assert len([*islice(members(tmp_path / "in" / "0.tar"), 50)]) < 10
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "0.tar"]  # no member is written anywhere


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_bombs_cost_neither_time_nor_memory(tmp_path: Path, kind: bytes) -> None:
    """Fails where a size is taken on trust: of a member, or of the attributes before it."""
    with gzip.open(tmp_path / "0.tar.gz", "wb", 1) as stream:
        stream.write(WHOLE + header("bomb.jpg", 3_000_000_000, kind))
        for _ in range(60):
            stream.write(bytes(1_000_000))
    start = time.monotonic()
    tracemalloc.start()
    found = reasons(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["good", "too large" if kind == tarfile.REGTYPE else "damaged archive"]
    assert peak < 50_000_000
    assert time.monotonic() - start < 5


def test_a_bomb_in_a_plain_archive_is_stepped_over(tmp_path: Path) -> None:
    with (tmp_path / "0.tar").open("wb") as stream:
        stream.write(header("1.jpg", 300_000_000))
        stream.seek(512 + 300_000_000 - 300_000_000 % 512 + 512)
        stream.write(archive(*sample("2")))
    assert reasons(tmp_path) == ["too large", "good"]


def test_a_key_counts_once(tmp_path: Path) -> None:
    """Fails where the second of two samples of the same key replaces or doubles the first: files of a key may be apart,
    or have dots."""
    files = [*sample("0", "first"), *sample("1"), *sample("0", "second"), *sample("1", "again")]
    dots = [(f"c.{part}", JPEG if part.endswith("jpg") else b"x") for part in ("v1.jpg", "v1.txt", "v2.jpg", "v2.txt")]
    rows = read(write(tmp_path, {"0.tar": archive(*files, *dots)}))
    assert [row.reason if isinstance(row, BadRow) else row.captions for row in rows] == [
        *[("first",), ("a dog",), "duplicate key", "duplicate key", ("x",), "duplicate key"]
    ]
    assert "key 'c' appears twice, first at c.v1.jpg" in rows[-1].message
