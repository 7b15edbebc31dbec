"""Streaming: each row once a pass over all processes and workers, full batches for ever, resumes that are exact."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prepared_sets import make, raw
from toy_pairs import COLOURS, SPEC, png, square

from maskvlm.data import module
from maskvlm.data.caption_text import stable_id
from maskvlm.data.module import PairData
from maskvlm.data.pairs import ProcessShare
from maskvlm.data.streaming.remote import list_shards, read_shards
from maskvlm.data.streaming.source import Stream
from maskvlm.utils.errors import UserError

BAD = b"no image"


def tar(names: range, bad: tuple[int, ...] = ()) -> bytes:
    """As img2dataset writes them: a key's image, caption and facts one after the other."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in names:
            image = BAD if number in bad else png(square(COLOURS[number % 8]))
            facts = json.dumps({"key": f"{number:05}", "url": "http://example.com/x", "status": "success"}).encode()
            for ending, content in (("png", image), ("txt", f"number {number}".encode()), ("json", facts)):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tars(folder: Path, shards: int = 4, each: int = 6, **settings: Any) -> str:
    """So many shards of so many images, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        (folder / f"{shard:05}.tar").write_bytes(tar(range(shard * each, (shard + 1) * each), **settings))
    return str(folder / "*.tar")


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(module, "rank", lambda: rank)
    monkeypatch.setattr(module, "world_size", lambda: world)


def numbers(data: PairData) -> list[list[int]]:
    """What each batch shows, by the captions ("number 7"); -1 for holes."""
    return [[int(text.removeprefix("number ") or -1) for text in batch.texts] for batch in data.train_dataloader()]


def ready(
    root: Any, start: int = 0, buffer: int = 8, replay: bool = True, held_out: str = "nowhere", **settings: Any
) -> PairData:
    source = Stream(root, held_out, buffer=buffer, replay=replay)
    data = PairData(source, SPEC, **{"batch_size": 4, "steps": 6, "augment": False, **settings})
    data.splits["train"] = source.split("train")
    data.tokenizer = module.train_tokenizer(module.some_captions(data.splits["train"]), 120)
    data.start = start
    return data


def every(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


# ---------------------------------------------------------------------- what is read


def test_shards_at_any_address_give_the_same_rows(tmp_path: Path) -> None:
    root = tars(tmp_path, shards=1)
    with fsspec.open("memory://set/00000.tar", "wb") as stream:
        stream.write(tar(range(6)))
    there, here = list_shards("memory://set/*.tar"), list_shards([root, f"file://{tmp_path}/00000.tar"])
    assert ([*there], [*here]) == (["memory:///set/00000.tar"], [f"file://{tmp_path}/00000.tar"])
    images = [{"bytes": png(square(COLOURS[number])), "path": None} for number in range(6)]
    columns = {"image": images, "caption": [f"number {n}" for n in range(6)], "key": [f"{n:05}" for n in range(6)]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    every_shard = (*there, *here, f"file://{tmp_path}/b.parquet")
    shards = [[record["row"] for record in read_shards([one], "toy")] for one in every_shard]
    for rows in shards:
        assert [(row.captions, row.image_id) for row in rows] == [((f"number {n}",), f"toy {n:05}") for n in range(6)]
        assert rows[3].image == png(square(COLOURS[3]))


def test_shards_of_other_splits_in_a_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("train-0", "val-0", "test-0", "more"):
        (tmp_path / f"{name}.tar").write_bytes(tar(range(2)))
    assert [each.rpartition("/")[2] for each in list_shards(str(tmp_path))] == ["more.tar", "train-0.tar"]
    assert len(list_shards(f"{tmp_path}/val-*.tar")) == 1  # asked for by name
    (tmp_path / "train-0.tar").unlink()
    (tmp_path / "more.tar").unlink()
    with pytest.raises(UserError, match="no training shards"):
        list_shards(str(tmp_path))


def test_shards_are_told_apart_by_their_folders_and_sizes(tmp_path: Path) -> None:
    """Fails where two images would count as the same one: neither is then a negative of the other."""
    roots = [tars(tmp_path / name / "a", shards=1, each=2) for name in ("cc3m", "cc12m")]
    pairs = Stream(roots, "x").split("train")
    rows = [*pairs.epoch(0, ProcessShare(0, 1, 2))]
    ids = {record["row"].image_id for record in rows}
    assert len(ids) == len({record["origin"] for record in rows}) == 4
    assert {image_id.partition("/")[0] for image_id in ids} == {"stream cc3m", "stream cc12m"}
    alone = Stream(roots[0], "x").split("train")
    assert all("cc3m" not in record["origin"] for record in alone.epoch(0, ProcessShare(0, 1, 2)))
    assert alone.fingerprint != pairs.fingerprint


def test_a_prepared_set_is_streamed_or_memory_mapped_by_one_setting(tmp_path: Path) -> None:
    """The same images by the same ids."""
    rows_of_val = [raw(number, "val") for number in range(20, 24)]
    root = str(make(tmp_path, "toy", [*(raw(number) for number in range(20)), *rows_of_val], shard=5))
    data = PairData(Stream(root, root), SPEC, batch_size=4, steps=1)
    data.setup("fit")
    assert [len(data.splits[name]) for name in ("train", "val")] == [0, 4]
    mapped = Stream(root, "x", streaming=False).split("train")
    rows = [record["row"] for record in read_shards(Stream(root, "x").split("train").shards, "toy")]
    assert [row.image_id for row in rows] == [mapped[index]["image_id"] for index in range(20)]
    assert [row.image for row in rows] == [mapped[index]["image"] for index in range(20)]
    assert sorted(every(numbers(ready(f"file://{root}", steps=5)))) == [*range(20)]


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize(("buffer", "workers"), [(0, 0), (8, 0), (8, 2)])
def test_a_pass_shows_every_image_once_and_the_next_in_another_order(tmp_path: Path, buffer: int, workers: int) -> None:
    """Fails where a worker reads the shards of another (no split), or where passes share their seed."""
    # Workers take turns in making batches: 12 rows each are three batches of four.
    settings: dict[str, Any] = {"buffer": buffer, "workers": workers, "steps": 12}
    batches = numbers(ready(tars(tmp_path), **settings))
    assert {len(batch) for batch in batches} == {4}
    first, second = every(batches[:6]), every(batches[6:])
    assert sorted(first) == sorted(second) == [*range(24)]
    assert len({tuple(order) for order in (first, second, range(24))}) == 3
    assert numbers(ready(tars(tmp_path), **settings)) == batches
    assert numbers(ready(tars(tmp_path), **settings, seed=1)) != batches


@pytest.mark.parametrize(("shards", "workers", "world"), [(4, 0, 2), (4, 2, 2), (3, 0, 2), (3, 0, 3)])
def test_processes_see_parts_that_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, workers: int, world: int
) -> None:
    """Fails without split_dataset_by_node: all would see the same. Three shards are shared row by row by two."""
    root, each = tars(tmp_path, shards=shards, each=24 // shards), []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        each.append(every(numbers(ready(root, workers=workers, batch_size=2 * world, steps=12 // world))))
    assert [len(part) for part in each] == [24 // world] * world
    assert sorted(every(each)) == [*range(24)]
    tars(tmp_path, shards=1, each=3)  # smaller than the others: no process runs dry
    assert [len(batch) for batch in numbers(ready(root, batch_size=2 * world, steps=30))] == [2] * 30


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("buffer", "workers"), [(8, 0), (0, 2), (8, 3)])
def test_a_run_that_goes_on_sees_what_the_other_would_have(tmp_path: Path, buffer: int, workers: int) -> None:
    """From every batch on, also where workers are in the middle of their turns (fails where the loader begins with
    worker 0 whatever was consumed), with augmentation, and in a later pass."""
    root = tars(tmp_path)
    settings: dict[str, Any] = {"buffer": buffer, "workers": workers, "steps": 9, "augment": "mirror"}
    batches = list(ready(root, **settings).train_dataloader())
    assert len(set(torch.cat([batch.mirrored_B for batch in batches]).tolist())) == 2
    whole = [batch.image_BCHW for batch in batches]
    for start in (1, 5, 8):
        loader = ready(root, start, **settings).train_dataloader()
        rest = [batch.image_BCHW for batch in loader]
        assert (len(loader), len(rest)) == (9, 9 - start)  # Lightning counts the batches of the whole run
        assert all(torch.equal(one, other) for one, other in zip(rest, whole[start:], strict=True))
    other = list(ready(root, 5, **settings, replay=False).train_dataloader())
    assert len(other) == 4
    assert not all(torch.equal(batch.image_BCHW, then) for batch, then in zip(other, whole[5:], strict=True))


def test_a_stream_that_is_read_over_goes_on_with_as_many_workers(tmp_path: Path) -> None:
    """With another number each would read other shards: samples would come twice, and others never."""
    root = tars(tmp_path)
    for replay in (True, False):
        state = ready(root, workers=2, replay=replay).state_dict()
        ready(root, workers=2, replay=replay).load_state_dict(state)
        other = ready(root, workers=1, replay=replay)
        if replay:
            with pytest.raises(UserError, match=r"data\.workers"):
                other.load_state_dict(state)
            del state["dealt"]  # of an older version
        other.load_state_dict(state)


# ---------------------------------------------------------------------- bad rows


def test_bad_rows_are_holes_that_keep_their_place(tmp_path: Path) -> None:
    good, bad = tars(tmp_path / "good"), tars(tmp_path / "bad", bad=(5,))
    whole, holed = numbers(ready(good)), numbers(ready(bad))
    assert holed == [[-1 if number == 5 else number for number in batch] for batch in whole]
    batch = next(b for b in ready(bad).train_dataloader() if b.problems)
    assert [reason for reason, _ in batch.problems] == ["not an image (unknown)"]
    assert "00000.tar!00005.png" in batch.problems[0][1]
    numbered = [int(text.removeprefix("number ") or 5) for text in batch.texts]
    assert batch.valid_B.tolist() == [number != 5 for number in numbered]
    places = [stable_id(f"{number // 6:05}.tar!{number:05}.png") for number in numbered]
    assert batch.index_B.tolist() == places  # seeds of augmentation come from the place


def test_a_broken_shard_costs_its_rest_and_is_counted(tmp_path: Path) -> None:
    tars(tmp_path)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    (tmp_path / "00002.tar").write_bytes(b"no archive at all" * 100)
    (tmp_path / "00003.parquet").write_bytes(b"no parquet")
    data = ready(str(tmp_path), steps=6)
    reasons: Counter[str] = Counter()
    read_numbers: set[int] = set()
    for batch in data.train_dataloader():
        reasons.update(reason for reason, _ in batch.problems)
        read_numbers |= {int(text.removeprefix("number ")) for text in batch.texts if text}
    assert {*range(8), *range(18, 24)} <= read_numbers
    assert not read_numbers & {*range(10, 18)}
    assert set(reasons) == {"truncated archive", "damaged archive"}

    (gone,) = read_shards([str(tmp_path / "gone.tar")], "toy")
    assert gone["problem"][0] == "unreadable shard"


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too few shards a worker without one would wait for ever, and the other processes for it."""
    root, empty = tars(tmp_path / "a", shards=1), tmp_path / "empty"
    empty.mkdir()
    (empty / "a.tar").write_bytes(tar(range(0)))
    stream = Stream(root, "x").split("train")

    def without_rows() -> PairData:
        data = ready(root)
        data.splits["train"] = Stream(str(empty / "a.tar"), "x").split("train")
        return data

    def known(**setting: Any) -> None:
        data = PairData(Stream(root, "x"), SPEC, batch_size=4, steps=1, **setting)
        monkeypatch.setattr(data.source, "split", lambda name: stream)
        data.setup("fit")

    card = ready(root)
    assert (card.fingerprint()["train"]["pictures"], card.hashed_image_ids("train")) == (None, None)
    reads: list[tuple[Callable[[], object], str]] = [
        (lambda: list_shards(str(tmp_path / "gone")), "gone"),
        (lambda: Stream("a/*.tar", "x", streaming=False).split("train"), "not a prepared set"),
        (lambda: numbers(without_rows()), "no training samples"),
        (lambda: ready(root, steps=None, epochs=2).train_dataloader(), r"data\.epochs"),
        (lambda: known(held_out=["data/coco/test"]), "image ids"),
    ]
    for read, name in reads:
        with pytest.raises(UserError, match=name):
            read()
    as_process(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="1 shards for 2 processes"):
        ready(root).train_dataloader()
