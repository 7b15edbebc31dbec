"""Every reader of `make data` on files that were edited at random, structure and bytes: rows, counted bad rows, or one
`UserError`, and nothing else.

How to break the code so that these fail: let `archive._unpacked` or `columnar.parquet_samples` catch fewer exceptions,
read JSON with `json.loads` and `repr` what was found, take the sizes of a shard's frames on trust.
"""

import os
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from mutators import mutate
from raw_toys import TEXTS, TOYS, Files, write
from watching import limited

from maskvlm.data.prepare.rows import RowMaker, Settings, screened
from maskvlm.data.raw import open_raw
from maskvlm.utils.errors import UserError

IN_PROCESS = [name for name in TOYS if name != "hf"]


@cache
def toy(name: str) -> Files:
    return TOYS[name][1]()


def read(name: str, folder: Path) -> tuple[int, int, str]:
    """Rows used, rows left out, and the one line, if any."""
    pairs = name not in ("vqav2", "daquar", "nlvr2", "nlvr_pairs", "snli_ve")
    maker = RowMaker(pairs, Settings("x", 16), lambda _: None)
    used, message = 0, ""
    with limited():
        try:
            for row in screened(open_raw(name, str(folder)).rows()):
                used += maker.take(row) is not None
        except UserError as error:
            message = str(error)
    assert "\n" not in message
    message.encode("utf-8", "surrogateescape")
    assert all(text.isprintable() and text.encode() for each in (*maker.left_out, *maker.mended) for text in each)
    return used, len(maker.left_out), message


def damaged(content: Files, seed: int) -> Files:
    chance = random.Random(seed)
    texts = [name for name in content if not name.endswith((".jpg", ".png"))]
    changed = dict(content)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(texts if texts and chance.randrange(4) else [*content])
        changed[name] = mutate(name, changed[name], chance)
    return changed


def read_damaged(name: str, seeds: range) -> None:
    for seed in seeds:
        with TemporaryDirectory() as folder:
            read(TOYS[name][0], write(Path(folder), damaged(toy(name), seed)))


@pytest.mark.parametrize("name", IN_PROCESS)
def test_random_edits_are_rows_bad_rows_or_one_line(name: str, tmp_path: Path) -> None:
    missing = name.startswith("nlvr")  # of the second pair, one image
    assert read(TOYS[name][0], write(tmp_path, toy(name))) == (len(TEXTS), int(missing), "")
    read_damaged(name, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESS)
def test_more_of_them(name: str) -> None:
    read_damaged(name, range(4, 34))


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 60), marks=pytest.mark.slow)])
def test_random_edits_of_what_a_library_maps_into_memory(seeds: range) -> None:
    """In a process of its own: a wrong offset would end it."""
    toy("hf")
    process = os.fork()
    if process == 0:
        status = 1
        try:
            read_damaged("hf", seeds)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0
