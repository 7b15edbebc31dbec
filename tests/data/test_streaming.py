"""Streaming: each row once a pass over all processes and workers, full batches for ever, resumes that are exact."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prepared_sets import make, raw
from toy_pairs import COLOURS, SPEC, png, square

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.data import module
from maskvlm.data.batch import Batch
from maskvlm.data.caption_text import stable_id
from maskvlm.data.module import PairData
from maskvlm.data.pairs import ProcessShare
from maskvlm.data.streaming.remote import list_shards, read_shards
from maskvlm.data.streaming.source import Stream
from maskvlm.utils.errors import ExitCode, UserError

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


def parquet(names: range) -> bytes:
    table = pa.table(
        {
            "image": [{"bytes": png(square(COLOURS[number % 8])), "path": None} for number in names],
            "caption": [f"number {number}" for number in names],
            "key": [f"{number:05}" for number in names],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def tars(folder: Path, shards: int = 4, each: int = 6, **settings: Any) -> str:
    """So many shards of so many images, numbered through."""
    folder.mkdir(exist_ok=True)
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


def memory(name: str, content: bytes) -> str:
    address = f"memory://{name}"
    with fsspec.open(address, "wb") as stream:
        stream.write(content)
    return address


def test_tars_and_parquet_at_any_address_give_the_same_rows(tmp_path: Path) -> None:
    local = Path(tars(tmp_path, shards=1))
    there = list_shards([memory("set/a.tar", tar(range(6))), memory("other/b.parquet", parquet(range(6)))])
    here = list_shards([str(local), f"file://{tmp_path}/00000.tar"])
    assert [*there] == ["memory:///other/b.parquet", "memory:///set/a.tar"]
    assert [*here] == [f"file://{tmp_path}/00000.tar"]
    rows = [[record["row"] for record in read_shards([one], "toy")] for one in (*there, *here)]
    assert [[row.captions for row in shard] for shard in rows] == [[(f"number {n}",) for n in range(6)]] * 3
    assert [[row.image_id for row in shard] for shard in rows] == [[f"toy {n:05}" for n in range(6)]] * 3
    assert rows[0][3].image == rows[1][3].image == png(square(COLOURS[3]))


def test_shards_of_the_same_names_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    """Fails where two images would count as the same one: neither is then a negative of the other."""
    for folder in ("cc3m/a", "cc12m/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "00000.tar").write_bytes(tar(range(2)))
    pairs = Stream([str(tmp_path / "cc3m" / "a"), str(tmp_path / "cc12m" / "a")], "x").split("train")
    (rows,) = [[*pairs.epoch(0, ProcessShare(0, 1, 2))]]
    ids = {record["row"].image_id for record in rows}
    assert len(ids) == len({record["origin"] for record in rows}) == 4
    assert {image_id.partition("/")[0] for image_id in ids} == {"stream cc3m", "stream cc12m"}
    (alone,) = [[*Stream(str(tmp_path / "cc3m" / "a"), "x").split("train").epoch(0, ProcessShare(0, 1, 2))]]
    assert {record["row"].image_id.partition(" ")[0] for record in alone} == {"stream"}
    assert all("cc3m" not in record["origin"] for record in alone)


def test_a_place_without_shards_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no shards here") as raised:
        list_shards(str(tmp_path))
    assert raised.value.code == ExitCode.MISSING_INPUT
    with pytest.raises(UserError, match=r"cannot be listed|needs another package"):
        list_shards("nowhere://bucket/*.tar")


def test_a_stream_too_says_which_images_are_mirrored(tmp_path: Path) -> None:
    batches = list(ready(tars(tmp_path), augment="mirror").train_dataloader())
    mirrored = torch.cat([batch.mirrored_B for batch in batches])
    assert 0 < mirrored.sum() < len(mirrored)


@pytest.mark.parametrize("replay", [True, False])
def test_a_stream_that_is_read_over_goes_on_with_as_many_workers(tmp_path: Path, replay: bool) -> None:
    """With another number each would read other shards: samples would come twice, and others never."""
    root = tars(tmp_path)
    state = ready(root, workers=2, replay=replay).state_dict()
    ready(root, workers=2, replay=replay).load_state_dict(state)
    other = ready(root, workers=1, replay=replay)
    if replay:
        with pytest.raises(
            UserError, match=r"1 processes with 1 data workers each, in the checkpoint among 1 .* 2 data"
        ):
            other.load_state_dict(state)
        del state["dealt"]  # of an older version
    other.load_state_dict(state)


def test_shards_of_other_splits_in_a_folder_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-0", "val-0", "test-0", "more"):
        (tmp_path / f"{name}.tar").write_bytes(tar(range(2)))
    assert [each.rpartition("/")[2] for each in list_shards(str(tmp_path))] == ["more.tar", "train-0.tar"]
    assert "shards of splits other than train are left out: 2" in capsys.readouterr().out
    # Asked for by name.
    assert len(list_shards(f"{tmp_path}/val-*.tar")) == 1
    (tmp_path / "train-0.tar").unlink()
    (tmp_path / "more.tar").unlink()
    with pytest.raises(UserError, match="no training shards here"):
        list_shards(str(tmp_path))


def test_the_fingerprint_changes_with_the_shards(tmp_path: Path) -> None:
    root = tars(tmp_path)
    first = Stream(root, "x").split("train").fingerprint
    assert Stream(f"file://{root}", "x").split("train").fingerprint == first
    (tmp_path / "00003.tar").write_bytes(tar(range(50)))
    assert Stream(root, "x").split("train").fingerprint != first


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize("buffer", [0, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_shows_every_image_once_and_the_next_in_another_order(tmp_path: Path, buffer: int, workers: int) -> None:
    """Fails where a worker reads the shards of another (no split), or where passes share their seed."""
    # Workers take turns in making batches: 12 rows each are three batches of four.
    batches = numbers(ready(tars(tmp_path), buffer=buffer, workers=workers, steps=12))
    assert {len(batch) for batch in batches} == {4}
    first, second = every(batches[:6]), every(batches[6:])
    assert sorted(first) == sorted(second) == [*range(24)]
    assert first != second
    assert first != [*range(24)]
    assert numbers(ready(tars(tmp_path), buffer=buffer, workers=workers, steps=12)) == batches
    assert numbers(ready(tars(tmp_path), buffer=buffer, workers=workers, steps=12, seed=1)) != batches


@pytest.mark.parametrize(("shards", "workers"), [(4, 0), (4, 2), (3, 0)])
def test_processes_see_parts_that_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, workers: int
) -> None:
    """Fails without split_dataset_by_node: both would see the same. Three shards are shared row by row."""
    root, each = tars(tmp_path, shards=shards, each=24 // shards), []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        each.append(every(numbers(ready(root, workers=workers, steps=6))))
    assert [len(part) for part in each] == [12, 12]
    assert sorted(each[0] + each[1]) == [*range(24)]


def test_no_process_runs_dry_where_shards_differ_in_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("a.tar").write_bytes(tar(range(3)))
    tmp_path.joinpath("b.tar").write_bytes(tar(range(10, 31)))
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        batches = numbers(ready(str(tmp_path / "*.tar"), steps=30))
        assert [len(batch) for batch in batches] == [2] * 30


@pytest.mark.parametrize(("shards", "workers", "world"), [(1, 0, 2), (3, 2, 2), (1, 2, 1)])
def test_too_few_shards_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, workers: int, world: int
) -> None:
    """Else a worker without a shard would wait for ever, and the other processes for it."""
    data = ready(tars(tmp_path, shards=shards), workers=workers)
    as_process(monkeypatch, 0, world)
    with pytest.raises(UserError, match=rf"{shards} shards for {world} processes with {max(1, workers)} data workers"):
        data.train_dataloader()


def test_shards_without_rows_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(range(0)))
    data = ready(tars(tmp_path / "b"), workers=0)
    data.splits["train"] = Stream(str(tmp_path / "a.tar"), "x").split("train")
    with pytest.raises(UserError, match="found no training samples"):
        numbers(data)


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("buffer", [0, 8])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_run_that_goes_on_sees_what_the_other_would_have(tmp_path: Path, buffer: int, workers: int) -> None:
    """From every batch on, also where workers are in the middle of their turns (fails where the loader begins with
    worker 0 whatever was consumed), with augmentation, and in a later pass."""
    root = tars(tmp_path)
    settings: dict[str, Any] = {"buffer": buffer, "workers": workers, "steps": 9, "augment": True}
    whole = [batch.image_BCHW for batch in ready(root, **settings).train_dataloader()]
    for start in (1, 2, 5, 8):
        loader = ready(root, start, **settings).train_dataloader()
        rest = [batch.image_BCHW for batch in loader]
        assert len(loader) == 9  # of the whole run, see the next test
        assert len(rest) == 9 - start
        assert all(torch.equal(one, other) for one, other in zip(rest, whole[start:], strict=True))


class Texts(L.LightningModule):
    """Notes what it is trained on, and saves after some steps."""

    def __init__(self, save: Path, after: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.save, self.after, self.batches = save, after, [[""]][:0]

    def training_step(self, batch: Batch, number: int) -> torch.Tensor:
        self.batches.append(list(batch.texts))
        return self.weight.sum()

    def on_train_batch_end(self, outputs: Any, batch: Batch, number: int) -> None:
        if self.trainer.global_step == self.after:
            self.trainer.save_checkpoint(self.save)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("after", [2, 7])
def test_a_run_that_goes_on_ends_where_the_other_would_have(tmp_path: Path, after: int) -> None:
    """Lightning holds the loader's length against the batches of the whole run: with the length of what is left, a run
    that was stopped before its half would end early."""
    root, saved = tars(tmp_path / "shards"), tmp_path / "a.ckpt"
    held_out = str(make(tmp_path, "toy", [raw(number, "val") for number in range(4)]))

    def trained(**more: Any) -> list[list[str]]:
        model = Texts(saved, after)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
        trainer = L.Trainer(
            accelerator="cpu", **quiet, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False
        )
        trainer.fit(model, datamodule=ready(root, steps=9, held_out=held_out), **more)
        return model.batches

    whole = trained()
    assert len(whole) == 9
    assert trained(ckpt_path=saved, weights_only=False) == whole[after:]


def test_without_replay_the_order_is_another_and_that_is_said(tmp_path: Path, capsys: Any) -> None:
    root = tars(tmp_path)
    whole = numbers(ready(root, steps=6))
    rest = numbers(ready(root, start=2, replay=False, steps=6))
    assert len(rest) == 4
    assert rest != whole[2:]
    assert "the order of samples differs after this resume" in capsys.readouterr().out


# ---------------------------------------------------------------------- bad rows


def test_bad_rows_are_holes_that_keep_their_place(tmp_path: Path) -> None:
    good, bad = tars(tmp_path / "good"), tars(tmp_path / "bad", bad=(5, 20))
    whole, holed = numbers(ready(good)), numbers(ready(bad))
    assert holed == [[-1 if number in (5, 20) else number for number in batch] for batch in whole]
    batch = next(b for b in ready(bad).train_dataloader() if b.problems)
    assert batch.problems[0][0] == "not an image (unknown)"
    assert "00000.tar!00005.png" in batch.problems[0][1] or "00003.tar!00020.png" in batch.problems[0][1]
    assert (~batch.valid_B).sum() == len(batch.problems)
    numbered = [
        int(text.removeprefix("number ") or (5 if "00005" in batch.problems[0][1] else 20)) for text in batch.texts
    ]
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


def test_a_reader_that_fails_in_its_own_way_is_a_bad_row(tmp_path: Path) -> None:
    rows = [*read_shards([str(tmp_path / "gone.tar")], "toy")]
    assert [row["problem"][0] for row in rows] == ["unreadable shard"]
    assert "FileNotFoundError" in rows[0]["problem"][1]


# ---------------------------------------------------------------------- the choice


def test_epochs_of_a_stream_are_refused(tmp_path: Path) -> None:
    data = ready(tars(tmp_path), steps=None, epochs=2)
    with pytest.raises(UserError, match=r"data.epochs: .*Set data.steps instead"):
        data.train_dataloader()


@pytest.mark.parametrize("setting", [{"fraction": 0.5}, {"held_out": ["data/coco/test"]}])
def test_what_must_know_the_ids_first_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    data = PairData(Stream(tars(tmp_path), "nowhere"), SPEC, batch_size=4, steps=1, **setting)
    data.splits["val"] = None
    data.source.split = lambda name: Stream(tars(tmp_path), "x").split("train")  # type: ignore[method-assign]
    with pytest.raises(UserError, match="cannot list its image ids"):
        data.setup("fit")


def test_shards_are_not_memory_mapped() -> None:
    with pytest.raises(UserError, match=r"\*.tar is not a prepared set"):
        Stream("a/*.tar", "x", streaming=False).split("train")


def test_the_card_of_a_stream_tells_no_length(tmp_path: Path) -> None:
    data = ready(tars(tmp_path))
    assert data.fingerprint()["train"]["pictures"] is None
    assert data.hashed_image_ids("train") is None


def test_a_prepared_set_is_streamed_or_memory_mapped_by_one_setting(tmp_path: Path, stack: Any) -> None:
    """The same images by the same ids; `make pretrain DATA=stream ARGS="--data.source.streaming false ..."`."""
    root = str(make(tmp_path, "toy", [raw(number) for number in range(20)], shard=5))
    mapped = Stream(root, "x", streaming=False).split("train")
    rows = [record["row"] for record in read_shards(Stream(root, "x").split("train").shards, "toy")]
    assert [row.image_id for row in rows] == [mapped[index]["image_id"] for index in range(20)]
    assert [row.image for row in rows] == [mapped[index]["image"] for index in range(20)]
    assert sorted(every(numbers(ready(f"file://{root}", steps=5)))) == [*range(20)]
    settings = run_command(
        Parsed, ["fit", *stack(DATA="stream", WHERE="cpu"), "--data.source.streaming", "false"]
    ).settings
    assert settings.data.init_args.source.init_args.streaming is False
