"""Tars to their true end: every member is read, or it is told that something is not."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.raw.archive import members


def archive(*names: str, sizes: tuple[int, ...] = ()) -> bytes:
    """Members that are named by what they hold."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as writer:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = sizes[number] if sizes else len(name)
            writer.addfile(info, io.BytesIO((name * info.size).encode()[: info.size]))
    return buffer.getvalue()


def read(content: bytes) -> tuple[list[str], list[str]]:
    """Names of the members read, and what is told."""
    entries = [*members(io.BytesIO(content))]
    return [each.name for each in entries if not each.problem], [each.problem[0] for each in entries if each.problem]


ONE, TWO = archive("a1", "a2", "a3"), archive("b1", "b2")
BARE = ONE[: 6 * 512]  # without an end marker


def test_archives_that_were_joined_are_read_one_after_the_other() -> None:
    """`cat a.tar b.tar > 0.tar` lost all that follows the first end marker, without a word."""
    assert read(ONE + TWO) == (["a1", "a2", "a3", "b1", "b2"], [])
    assert read(BARE + bytes(512) + TWO + bytes(7000)) == (["a1", "a2", "a3", "b1", "b2"], [])
    assert read(ONE + b"x" * 1300) == (["a1", "a2", "a3"], ["data after the end marker"])


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_archives_that_were_joined_too(pack: Callable[[bytes], bytes]) -> None:
    for content in (pack(ONE) + pack(TWO), pack(ONE + TWO), pack(ONE) + bytes(512) + pack(TWO)):
        assert read(content) == (["a1", "a2", "a3", "b1", "b2"], [])
    assert read(pack(ONE) + b"junk" * 9) == (["a1", "a2", "a3"], ["damaged archive"])
    assert read(pack(ONE)[:-7])[1] == ["truncated archive"]


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


def test_zeros_without_end_are_not_read_to_their_end(tmp_path: Path) -> None:
    """A file of a terabyte of zeros takes no place on the disk, and would take an hour to read."""
    file = tmp_path / "0.tar"
    file.write_bytes(ONE)
    with file.open("r+b") as stream:
        stream.truncate(10**12)
    *_, last = members(file)
    assert last.problem is not None
    assert "zeros after the end marker" in last.problem[1]
