"""Tars to their true end: every member is read, or it is told that something is not."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from guards import Build
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvlm.data.raw import BadRow, open_raw
from maskvlm.data.raw.archive import Member, members
from maskvlm.data.streaming.remote import read_shards


def archive(*names: str, sizes: tuple[int, ...] = ()) -> bytes:
    """Members that are named by what they hold."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as writer:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = sizes[number] if sizes else len(name)
            writer.addfile(info, io.BytesIO((name * info.size).encode()[: info.size]))
    return buffer.getvalue()


def read(content: bytes) -> tuple[list[str], list[Member]]:
    """Names of the members read, and what is told."""
    entries = [*members(io.BytesIO(content))]
    return [each.name for each in entries if not each.problem], [each for each in entries if each.problem]


ONE, TWO = archive("a1", "a2", "a3"), archive("b1", "b2")
BARE = ONE[: 6 * 512]  # without an end marker
PACKERS: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, lzma.compress]


@pytest.mark.guard("maskvlm.data.raw.archive:Forward.rest", gives="(0, b'')")
def test_archives_that_were_joined_are_read_one_after_the_other(build: Build) -> None:
    """`cat a.tar b.tar > 0.tar` lost all that follows the first end marker, without a word."""
    assert read(ONE + TWO) == (["a1", "a2", "a3", "b1", "b2"], [])
    assert read(BARE + bytes(512) + TWO + bytes(7000)) == (["a1", "a2", "a3", "b1", "b2"], [])


@pytest.mark.parametrize("pack", PACKERS)
def test_packed_archives_that_were_joined_too(pack: Callable[[bytes], bytes]) -> None:
    for content in (pack(ONE) + pack(TWO), pack(ONE + TWO), pack(ONE) + bytes(512) + pack(TWO)):
        assert read(content) == (["a1", "a2", "a3", "b1", "b2"], [])
    names, problems = read(pack(ONE) + b"junk" * 9)
    assert (names, [each.problem[0] for each in problems if each.problem]) == (["a1", "a2", "a3"], ["damaged archive"])
    names, problems = read(pack(ONE)[:-7])
    assert [each.problem[0] for each in problems if each.problem] == ["truncated archive"]


@pytest.mark.guard("maskvlm.data.raw.archive:Forward.rest", gives="(0, b'')")
def test_what_follows_the_end_marker_and_is_no_archive_is_told_with_its_size(build: Build) -> None:
    names, (entry,) = read(ONE + b"x" * 1300)
    what = f"1,300 bytes that are not an archive follow its end, from byte {len(ONE):,} on; what is before it was read"
    assert (names, entry.problem) == (["a1", "a2", "a3"], ("data after the end marker", what))


def test_a_shifted_archive_is_told() -> None:
    """Three bytes put in at any place lead tarfile to a block of zeros, which it takes for the end."""
    whole = archive("a1", "a2", "a3", sizes=(2000, 10, 700))
    for place in range(0, len(whole), 100):
        names, problems = read(whole[:place] + b"xyz" + whole[place:])
        assert problems or len(names) == 3, place


PARTS = [ONE, TWO, BARE, archive(), archive("c", sizes=(5000,)), b"junk", bytes(1024)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([ONE, TWO, BARE, archive(), archive("c", sizes=(5000,)), b"junk", bytes(1024)]), max_size=4
    ),
    st.integers(0, 40_000),
    st.binary(max_size=3),
)
def test_what_is_read_and_what_is_told_is_everything(parts: list[bytes], place: int, put_in: bytes) -> None:
    """Joined, and shifted from one place on. Not cut: a cut between members that is then joined leaves no trace."""
    whole = b"".join(parts)
    expected = [name for part in parts for name in read(part)[0]]
    place = min(place, len(whole))
    names, problems = read(whole[:place] + put_in + whole[place:])
    assert problems or names == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(ONE + TWO)))
def test_a_cut_anywhere_is_told(length: int) -> None:
    names, problems = read((ONE + TWO)[:length])
    assert problems or names == ["a1", "a2", "a3", "b1", "b2"] or length in range(7 * 512, len(ONE) + 1)
    if length in range(len(ONE) + 1, len(ONE + TWO) - 1024 - 8192):
        assert problems


def test_zeros_without_end_are_not_read_to_their_end(tmp_path: Path) -> None:
    """A file of a terabyte of zeros takes no place on the disk, and would take an hour to read."""
    file = tmp_path / "0.tar"
    file.write_bytes(ONE)
    with file.open("r+b") as stream:
        stream.truncate(10**12)
    *_, last = members(file)
    assert last.problem is not None
    assert "zeros after the end marker" in last.problem[1]


def test_make_data_and_streams_read_and_tell_the_same(tmp_path: Path) -> None:
    first, second = archive("0.jpg", "0.txt"), archive("1.jpg", "1.txt")
    (tmp_path / "0.tar").write_bytes(first + second + b"rest")
    rows = [*open_raw("webdataset", str(tmp_path)).rows()]
    contents = [(row.reason, row.origin) if isinstance(row, BadRow) else row.captions for row in rows]
    assert contents == [("0.txt",), ("1.txt",), ("data after the end marker", "0.tar")]
    streamed = [*read_shards([str(tmp_path / "0.tar")], "x")]
    assert [row["problem"][0] if row["problem"] else row["row"].captions for row in streamed] == [
        ("0.txt",),
        ("1.txt",),
        "data after the end marker",
    ]
