"""The data module: length of a run, who reads what, the tokenizer, and the share of rows that may be bad."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_pairs import SPEC, Rows, Squares, row

from maskvlm.data import module
from maskvlm.data.batch import Batch
from maskvlm.data.module import PairData, some_captions
from maskvlm.data.text import tokenizer_hash
from maskvlm.data.transforms import eval_transform
from maskvlm.utils.errors import ExitCode, UserError


def ready(source: Squares | None = None, stage: str = "fit", **settings: Any) -> PairData:
    data = PairData(source or Squares(), SPEC, **{"batch_size": 4, "steps": 6, "eval_batch_size": 3, **settings})
    data.setup(stage)
    return data


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(module, "rank", lambda: rank)
    monkeypatch.setattr(module, "world_size", lambda: world)


def assert_equal(first: Batch, second: Batch) -> None:
    for name, one, other in zip(Batch._fields, first, second, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


# ---------------------------------------------------------------------- length


def test_the_length_is_given_in_steps_or_in_epochs() -> None:
    assert ready(steps=6).total_steps == 6
    assert ready(steps=None, epochs=1.5).total_steps == 6  # 16 images
    assert ready(steps=None, epochs=1.6).total_steps == 7
    data = ready(steps=None, epochs=1.1, batch_size=10)
    data.splits["train"] = range(100)
    assert data.total_steps == 11  # 1.1 * 100 is above 110 in floats


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"data\.crop_scale"),
        ({"randaugment": (2, 31)}, r"data\.randaugment"),
        ({"augment": "mirror", "flip": False}, r"data\.flip"),
        ({"epochs": 1}, "exactly one"),
        ({"steps": None}, "exactly one"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        ready(**settings)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("settings", [{}, {"augment": "mirror", "seed": 7}])
def test_the_number_of_workers_changes_nothing(settings: dict[str, Any]) -> None:
    source = Squares(train=[5])
    here = list(ready(source, **settings).train_dataloader())
    there = list(ready(source, workers=2, **settings).train_dataloader())
    assert len(here) == len(there) == 6
    for one, other in zip(here, there, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """No pair is lost or doubled, and none looks otherwise."""
    whole = list(ready(batch_size=6).train_dataloader())
    shares = []
    shown = [index for batch in whole for index in batch.index_B.tolist()]
    assert sorted(shown[:16]) == sorted(shown[16:32]) == [*range(16)] != shown[:16]
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        shares.append(list(ready(batch_size=6).train_dataloader()))
        for settings in ({"batch_size": 7}, {"batch_size": 3 * world, "accumulate": 2 * world}):
            with pytest.raises(UserError, match=r"data\.batch_size"):
                ready(**settings).train_dataloader()
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        for name in ("index_B", "image_BCHW", "text_id_C"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_goes_on_sees_the_batches_that_are_left(accumulate: int) -> None:
    whole = list(ready(accumulate=accumulate).train_dataloader())
    flat = [index for batch in whole for index in batch.index_B.tolist()]
    assert len(whole) == 6 * accumulate
    assert flat == [index for batch in ready().train_dataloader() for index in batch.index_B.tolist()]
    data = ready(accumulate=accumulate)
    state = data.state_dict() | {"batches": 5}
    data.load_state_dict(state)
    for batch, other in zip(data.train_dataloader(), whole[5:], strict=True):
        assert_equal(batch, other)
    rows = {"samples": 8, "problems": {"missing": 1}, "examples": {"missing": ["toy:1"]}, "left_out": None}
    data.load_state_dict(state | {"rows": rows})
    assert data.state_dict()["rows"] == rows
    for key, value in (("data", "other"), ("share", 99)):
        with pytest.raises(UserError, match=str(value)):
            data.load_state_dict(state | {key: value})


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_whole_batches_of_evaluation(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Every image once, with all its captions."""
    # The last image would be alone, without a wrong one to compare with.
    each = [[0, 1, 2], [3, 4], [5, 6]] if world < 4 else [[0, 1], [2, 3], [4, 5], [6]]
    read = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        batches = list(ready().val_dataloader())
        read.append([batch.index_B.tolist() for batch in batches])
        assert batches[0].owner_C.tolist() == [row for row in range(len(read[-1][0])) for _ in range(3)]
    assert sorted(batch for batches in read for batch in batches) == each
    assert [len(batches) for batches in read] == [len(each[rank::world]) for rank in range(world)]
    for processes, sizes in ((1, [4, 3]), (2, [4]), (4, [2]), (7, [1])):  # none is left without one
        as_process(monkeypatch, 0, processes)
        sampler: Any = ready(eval_batch_size=4).val_dataloader().batch_sampler
        assert [len(batch) for batch in sampler] == sizes
    as_process(monkeypatch, 0, 8)
    with pytest.raises(UserError, match="7 rows to evaluate"):
        ready().val_dataloader()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_limit_in_batches_is_of_all_processes_together(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Fails where each process has as many: recall among more images is lower, and a run that goes on with more
    processes would never find a better score."""
    measured: list[int] = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        data = ready()
        limits = SimpleNamespace(limit_val_batches=2, limit_test_batches=1.0)
        monkeypatch.setattr(data, "trainer", limits, raising=False)
        measured += [image for batch in data.val_dataloader() for image in batch.index_B.tolist()]
        assert data.share_looked_at == 6 / 7
    assert sorted(measured) == [0, 1, 2, 3, 4, 5]
    for limit in (1.0, 2.0):
        limits.limit_val_batches = limit
        data.val_dataloader()
    limits.limit_val_batches = 0.5  # Lightning takes it of each process's batches
    with pytest.raises(UserError, match=r"trainer\.limit_val_batches"):
        data.val_dataloader()


# ---------------------------------------------------------------------- tokenizer and fingerprint


def test_the_tokenizer_is_trained_on_training_captions_and_the_same_every_time() -> None:
    data = ready()
    assert data.tokenizer is not None
    assert len(data.tokenizer) <= SPEC.vocab_size
    assert tokenizer_hash(ready(seed=5).tokenizer) == tokenizer_hash(data.tokenizer)
    assert tokenizer_hash(ready(stage="validate").tokenizer) == tokenizer_hash(data.tokenizer)
    batch = next(iter(data.train_dataloader()))
    words = data.tokenizer.decode(batch.token_CT[0], skip_special_tokens=True)
    assert words in row(int(batch.index_B[0]))["captions"]
    texts = " ".join(some_captions(data.splits["train"]))
    tokens = torch.tensor(data.tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert torch.equal(data.token_counts(), torch.bincount(tokens, minlength=len(data.tokenizer)))
    own = PairData(Squares(), SPEC._replace(tokenizer=data.tokenizer), steps=1)  # of the model: it is kept
    own.setup("validate")
    assert own.tokenizer is data.tokenizer
    assert set(own.splits) == {"val"}  # nothing needs the training captions
    card = data.fingerprint()
    assert (card["train"], card["val"]) == ({"sha": "train", "pictures": 16}, {"sha": "val", "pictures": 7})
    assert ready(seed=3, batch_size=8).fingerprint() == card
    data.splits["train"] = Rows([row(0)], "other")
    assert data.fingerprint()["sha"] != card["sha"]


# ---------------------------------------------------------------------- bytes and floats


def test_bytes_are_loaded_and_normalised_to_what_inference_sees() -> None:
    """Bit by bit; a hole becomes zeros, which no byte stands for. Floats are taken as normalised."""
    data = ready(Squares(train=[5]), augment=False)
    holes = 0
    for loader, split in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        for batch in loader:
            assert batch.image_BCHW.dtype == torch.uint8
            assert batch.image_BCHW.is_contiguous()  # in channels-last memory, convolutions would round otherwise
            ready_batch = data.normalised(batch)
            assert_equal(ready_batch._replace(image_BCHW=batch.image_BCHW), batch)
            assert data.normalised(ready_batch) is ready_batch
            for image_CHW, index, valid in zip(ready_batch.image_BCHW, batch.index_B, batch.valid_B, strict=True):
                expected_CHW = torch.zeros(3, 24, 24)
                if valid:
                    expected_CHW = eval_transform(SPEC)(data.splits[split][int(index)]["image"])
                assert torch.equal(image_CHW, expected_CHW)
                holes += not valid
    assert holes == 2  # the run shows 24 of 16 images


# ---------------------------------------------------------------------- bad rows


def take_in(data: PairData, batches: int, *problems: tuple[str, str]) -> None:
    batch = next(iter(data.val_dataloader()))
    batch = batch._replace(image_BCHW=batch.image_BCHW.float())
    hundred = batch._replace(valid_B=torch.ones(100, dtype=torch.bool), problems=problems)
    for _ in range(batches):
        data.on_after_batch_transfer(hundred, 0)


def test_too_many_bad_rows_stop_the_run() -> None:
    """Of a thousand samples or more, mended captions not counted; or all: it would end as finished, having learned
    nothing."""
    data = ready(max_bad_fraction=0.02)
    take_in(data, 12, ("truncated", "toy:7: bad image"), ("caption cut", "toy:8"), ("missing", "toy:8"))
    with pytest.raises(UserError, match=r"27 of 1300 samples could not be read, first: toy:9") as raised:
        take_in(data, 1, ("missing", "toy:9"), ("missing", "toy:10"), ("missing", "toy:11"))
    assert raised.value.code == ExitCode.BAD_DATA
    few = ready(max_bad_fraction=0.01)
    take_in(few, 9, *[("missing", "toy:1")] * 50)
    with pytest.raises(UserError):
        take_in(few, 1, ("missing", "toy:1"))
    with pytest.raises(UserError, match="100 of 100 samples"):
        take_in(ready(max_bad_fraction=0.5), 1, *[("missing", "toy:1")] * 100)
    take_in(ready(max_bad_fraction=1.0), 1, *[("missing", "toy:1")] * 100)


def test_what_was_left_out_is_listed_with_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(Squares(train=[5]), steps=8)
    data.splits["train"].skipped = {"empty caption": 3}  # by the reader
    monkeypatch.setattr(data, "trainer", SimpleNamespace(training=False), raising=False)
    take_in(data, 20)  # samples of evaluation are not counted
    monkeypatch.undo()
    for batch in data.train_dataloader():
        data.on_after_batch_transfer(batch, 0)
    listed = data.bad_rows()
    assert (listed["samples"], listed["left_out"]) == (32, {"val": {}, "train": {"empty caption": 3}})
    assert listed["problems"] == {"not an image (unknown)": 2}  # once an epoch
    assert len(listed["examples"]["not an image (unknown)"]) == 1
    assert "toy:5" in listed["examples"]["not an image (unknown)"][0]
    take_in(data, 1, *[("caption cut", f"toy:{number}") for number in range(1200)])
    assert data.bad_rows()["problems"]["caption cut"] == 1200
    assert data.bad_rows()["examples"]["caption cut"] == [f"toy:{number}" for number in range(1000)]
