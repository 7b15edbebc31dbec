"""Every reader of `make data` on files that were edited at random, structure and bytes: rows, counted bad rows, or one
`UserError`, and nothing else.

How to break the code so that these fail: let `archive._unpacked` or `columnar.parquet_samples` catch fewer exceptions,
read JSON with `json.loads` and `repr` what was found, take the sizes of a shard's frames on trust.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutators import mutate
from raw_toys import TEXTS, TOYS, Files, write

from maskvlm.data.prepare.rows import RowMaker, Settings, screened
from maskvlm.data.raw import open_raw
from maskvlm.utils.errors import UserError

LIMIT = 10.0  # seconds
CACHED: dict[str, Files] = {}


def toy(name: str) -> Files:
    if name not in CACHED:
        CACHED[name] = TOYS[name][1]()
    return CACHED[name]


@contextmanager
def limited() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(name: str, folder: Path) -> tuple[int, int, str]:
    """Rows used, rows left out, and the one line, if any."""
    maker = RowMaker(
        name not in ("vqav2", "daquar", "nlvr2", "nlvr_pairs", "snli_ve"), Settings("x", 16), lambda _: None
    )
    used, message = 0, ""
    with limited():
        try:
            for row in screened(open_raw(name, str(folder)).rows()):
                used += maker.take(row) is not None
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            message.encode("utf-8", "surrogateescape")
    for entry in (*maker.left_out, *maker.mended):
        for text in entry:
            assert text.encode()
            assert text.isprintable()
    return used, len(maker.left_out), message


def damaged(content: Files, seed: int) -> Files:
    chance = random.Random(seed)
    changed = dict(content)
    for _ in range(chance.choice((1, 1, 2))):
        texts = [name for name in content if not name.endswith((".jpg", ".png"))]
        name = chance.choice(texts if texts and chance.randrange(4) else [*content])
        changed[name] = mutate(name, changed[name], chance)
    return changed


IN_PROCESS = [name for name in TOYS if name != "hf"]


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_read_whole(name: str, tmp_path: Path) -> None:
    used, bad, message = read(TOYS[name][0], write(tmp_path, toy(name)))
    missing = name.startswith("nlvr")  # of the second pair, one image
    assert (used, bad, message) == (len(TEXTS), int(missing), "")


@pytest.mark.parametrize("name", IN_PROCESS)
def test_random_edits_are_rows_bad_rows_or_one_line(name: str) -> None:
    @settings(max_examples=40, deadline=None, database=None)
    @given(st.integers(0, 2**32))
    def edits(seed: int) -> None:
        with TemporaryDirectory() as folder:
            read(TOYS[name][0], write(Path(folder), damaged(toy(name), seed)))

    edits()


def test_random_edits_of_what_a_library_maps_into_memory(tmp_path: Path) -> None:
    """In a process of its own: a wrong offset would end it."""
    content = toy("hf")
    process = os.fork()
    if process == 0:
        status = 1
        try:
            for seed in range(60):
                folder = write(tmp_path / str(seed), damaged(content, seed))
                read("hf", folder)
            status = 0
        finally:
            os._exit(status)
    started = time.monotonic()
    assert os.waitpid(process, 0)[1] == 0
    assert time.monotonic() - started < 6 * LIMIT
