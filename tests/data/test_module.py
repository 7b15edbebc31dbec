"""The data module: length of a run, who reads what, the tokenizer, and the share of rows that may be bad."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from toy_pairs import SPEC, Rows, Squares, row
from transformers import PreTrainedTokenizerFast

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
    for steps, epochs in ((None, None), (3, 3)):
        with pytest.raises(UserError, match="exactly one"):
            PairData(Squares(), SPEC, steps=steps, epochs=epochs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "data.crop_scale: "),
        ({"crop_scale": (-0.2, 1.0)}, "data.crop_scale: "),
        ({"crop_scale": (0.9, 0.2)}, "data.crop_scale: "),
        ({"crop_scale": (0.5, 1.2)}, "data.crop_scale: "),
        ({"randaugment": (2, 31)}, "data.randaugment: "),
        ({"randaugment": (-1, 7)}, "data.randaugment: "),
        ({"augment": "mirror", "flip": False}, "data.flip: "),
        ({"augment": "flip"}, "data.augment: 'flip' is none of its values. Give true, false or mirror"),
        ({"augment": None}, "data.augment: None is none"),
    ],
)
def test_augmentation_that_no_image_can_have_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(**settings)
    assert ready(randaugment=None, crop_scale=(1.0, 1.0)).total_steps == 6


def test_an_evaluation_split_of_few_images_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = "warning: the {} images: its numbers mean little; hold out hundreds to compare models"
    data = ready()
    assert few.format("val split has only 7") in capsys.readouterr().out.splitlines()
    data.setup("validate")  # the evaluation that ends the run
    assert "warning" not in capsys.readouterr().out
    ready(stage="test")
    assert few.format("test split has only 5") in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(module, "FEW", 7)
    ready()
    as_process(monkeypatch, 1, 2)
    ready(stage="test")
    assert "warning" not in capsys.readouterr().out
    as_process(monkeypatch, 0, 1)
    monkeypatch.setattr(module, "FEW", 20)
    unmeasured = ready()
    capsys.readouterr()
    unmeasured.splits = {}
    unmeasured.trainer = SimpleNamespace(limit_val_batches=0)  # type: ignore[assignment]
    unmeasured.setup("fit")
    assert "warning" not in capsys.readouterr().out


# ---------------------------------------------------------------------- training


def test_one_epoch_of_batches_shows_every_image_once() -> None:
    batches = list(ready(steps=4).train_dataloader())
    assert [len(batch.image_BCHW) for batch in batches] == [4] * 4
    assert sorted(torch.cat([batch.index_B for batch in batches]).tolist()) == list(range(16))


@pytest.mark.parametrize("settings", [{}, {"augment": False}, {"seed": 7}, {"augment": "mirror"}])
def test_the_number_of_workers_changes_nothing(settings: dict[str, Any]) -> None:
    source = Squares(train=[5])
    here = list(ready(source, **settings).train_dataloader())
    there = list(ready(source, workers=2, **settings).train_dataloader())
    assert len(here) == len(there) == 6
    for one, other in zip(here, there, strict=True):
        assert_equal(one, other)


def test_another_seed_gives_another_order() -> None:
    orders = [[batch.index_B.tolist() for batch in ready(seed=seed).train_dataloader()] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_augmentation_settings_reach_the_images() -> None:
    plain, augmented = (next(iter(ready(augment=augment).train_dataloader())) for augment in (False, True))
    assert torch.equal(plain.index_B, augmented.index_B)
    assert not torch.equal(plain.image_BCHW, augmented.image_BCHW)
    still = next(iter(ready(crop_scale=(1.0, 1.0), randaugment=None, flip=False).train_dataloader()))
    torch.testing.assert_close(still.image_BCHW, plain.image_BCHW)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    whole = list(ready().train_dataloader())
    shares = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        shares.append(list(ready().train_dataloader()))
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat([part.image_BCHW for part in parts]), batch.image_BCHW)
        assert torch.equal(torch.cat([part.text_id_C for part in parts]), batch.text_id_C)


def test_accumulated_passes_join_to_the_batches_of_a_run_without() -> None:
    whole, passes = list(ready().train_dataloader()), list(ready(accumulate=2).train_dataloader())
    assert (len(whole), len(passes)) == (6, 12)
    joined = [
        torch.cat([first.index_B, second.index_B]) for first, second in zip(passes[::2], passes[1::2], strict=True)
    ]
    assert [part.tolist() for part in joined] == [batch.index_B.tolist() for batch in whole]


@pytest.mark.parametrize(("batch_size", "world", "accumulate"), [(6, 4, 1), (4, 1, 3), (8, 4, 4)])
def test_a_batch_that_cannot_be_shared_is_refused(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, world: int, accumulate: int
) -> None:
    as_process(monkeypatch, 0, world)
    data = ready(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UserError, match=rf"data.batch_size: {batch_size} pairs .* {world} processes x {accumulate}"):
        data.train_dataloader()


# ---------------------------------------------------------------------- evaluation


def test_evaluation_reads_every_image_once_with_all_captions() -> None:
    batches = list(ready().val_dataloader())
    # The last image would be alone, without a wrong one to compare with.
    assert [batch.index_B.tolist() for batch in batches] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [batch.owner_C.tolist() for batch in batches] == [[0, 0, 0, 1, 1, 1, 2, 2, 2], *[[0, 0, 0, 1, 1, 1]] * 2]
    assert sum(len(batch.index_B) for batch in ready(stage="test").test_dataloader()) == 5


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_whole_batches_of_evaluation(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    batches_by_rank = {}
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        batches_by_rank[rank] = [batch.index_B.tolist() for batch in ready().val_dataloader()]
    each = [[0, 1, 2], [3, 4], [5, 6]] if world == 2 else [[0, 1], [2, 3], [4, 5], [6]]
    assert sorted(batch for batches in batches_by_rank.values() for batch in batches) == each
    assert [len(batches) for batches in batches_by_rank.values()] == ([2, 1] if world == 2 else [1, 1, 1, 1])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_limit_in_batches_is_of_all_processes_together(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Fails where each process has as many: recall among more images is lower, and a run that goes on with more
    processes would never find a better score."""
    measured: list[int] = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        data = ready()
        monkeypatch.setattr(
            data, "trainer", SimpleNamespace(limit_val_batches=2, limit_test_batches=1.0), raising=False
        )
        measured += [image for batch in data.val_dataloader() for image in batch.index_B.tolist()]
        assert data.share_looked_at == 6 / 7
    assert sorted(measured) == [0, 1, 2, 3, 4, 5]


def test_a_limit_that_is_a_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes it of each process's batches: with more processes other images would be measured."""
    for limit, right in ((0.5, False), (1.0, True), (0.0, True), (2, True), (2.0, True)):
        data = ready()
        monkeypatch.setattr(data, "trainer", SimpleNamespace(limit_val_batches=limit), raising=False)
        with nullcontext() if right else pytest.raises(UserError, match=r"trainer\.limit_val_batches: 0\.5 is a share"):
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


def test_a_tokenizer_that_the_model_has_is_kept(trained: PreTrainedTokenizerFast) -> None:
    data = PairData(Squares(), SPEC._replace(tokenizer=trained), steps=1)
    data.setup("validate")
    assert data.tokenizer is trained
    assert set(data.splits) == {"val"}  # nothing needs the training captions


def test_the_fingerprint_names_each_split_and_the_tokenizer() -> None:
    card = ready().fingerprint()
    assert card["train"] == {"sha": "train", "pictures": 16}
    assert card["val"] == {"sha": "val", "pictures": 7}
    assert ready(seed=3, batch_size=8).fingerprint() == card
    other = ready()
    other.splits["train"] = Rows([row(0)], "other")
    assert other.fingerprint()["sha"] != card["sha"]


def test_a_vocabulary_is_learned_from_images_spread_over_the_split() -> None:
    pairs = Rows([row(number) for number in range(10)])
    assert list(some_captions(pairs)) == [caption for number in range(10) for caption in row(number)["captions"]]
    assert list(some_captions(pairs, 4)) == [caption for number in (0, 3, 6, 9) for caption in row(number)["captions"]]


def test_tokens_are_counted_in_the_training_texts() -> None:
    data = ready()
    assert data.tokenizer is not None
    count_V = data.token_counts()
    expected = torch.zeros(len(data.tokenizer), dtype=torch.long)
    for caption in some_captions(data.splits["train"]):
        for token in data.tokenizer(caption, add_special_tokens=False)["input_ids"]:
            expected[token] += 1
    assert torch.equal(count_V, expected)
    assert count_V.sum() > 0


@pytest.mark.parametrize(("processes", "sizes"), [(1, [4, 3]), (2, [4]), (4, [2]), (7, [1])])
def test_no_process_is_left_without_an_evaluation_batch(
    monkeypatch: pytest.MonkeyPatch, processes: int, sizes: list[int]
) -> None:
    """Seven images in batches of at most four, by process 0 of one, two, four, seven."""
    monkeypatch.setattr(module, "world_size", lambda: processes)
    sampler = ready(eval_batch_size=4).val_dataloader().batch_sampler
    assert [len(batch) for batch in sampler] == sizes  # type: ignore[union-attr]


def test_more_processes_than_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "world_size", lambda: 8)
    with pytest.raises(UserError, match="7 rows to evaluate are fewer than the 8 processes"):
        ready().val_dataloader()


class Card:
    """What the module asks a trainer for."""

    training, num_devices = True, 4
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))


def test_readers_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready()
    assert data._readers() == 0
    monkeypatch.setattr(module, "cores", lambda: 20)
    monkeypatch.setattr(data, "trainer", Card(), raising=False)
    assert data._readers() == 5
    monkeypatch.setattr(module, "cores", lambda: 200)
    assert data._readers() == 12
    # A task of SLURM has cores of its own: they are not shared out once more, and two are the training's.
    slurm = SimpleNamespace(root_device=torch.device("cuda", 0), cluster_environment=SLURMEnvironment())
    monkeypatch.setattr(Card, "strategy", slurm)
    monkeypatch.setattr(module, "cores", lambda: 12)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert data._readers() == 10
    for own, readers in (("8", 6), ("1", 1), ("64", 12)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", own)
        assert data._readers() == readers
    data.workers = 0
    assert data._readers() == 0


# ---------------------------------------------------------------------- bytes and floats


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_are_loaded_and_normalised_to_what_inference_sees(workers: int) -> None:
    """Bit by bit; a hole becomes zeros, which no byte stands for."""
    data = ready(Squares(train=[5]), augment=False, workers=workers)
    holes = 0
    for loader, split in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        for batch in loader:
            assert batch.image_BCHW.dtype == torch.uint8
            assert batch.image_BCHW.is_contiguous()  # in channels-last memory, convolutions would round otherwise
            ready_batch = data.normalised(batch)
            assert_equal(ready_batch._replace(image_BCHW=batch.image_BCHW), batch)
            for image_CHW, index, valid in zip(ready_batch.image_BCHW, batch.index_B, batch.valid_B, strict=True):
                expected_CHW = torch.zeros(3, 24, 24)
                if valid:
                    expected_CHW = eval_transform(SPEC)(data.splits[split][int(index)]["image"])
                assert torch.equal(image_CHW, expected_CHW)
                holes += not valid
    assert holes == 2  # the run shows 24 of 16 images


def test_images_that_are_floats_are_taken_as_normalised() -> None:
    data = ready(Squares(train=[5]))
    batch = next(iter(data.train_dataloader()))
    batch = batch._replace(image_BCHW=torch.randn(4, 3, 24, 24), valid_B=torch.zeros(4, dtype=torch.bool))
    assert data.normalised(batch) is batch


# ---------------------------------------------------------------------- bad rows


def take_in(data: PairData, batches: int, *problems: tuple[str, str]) -> None:
    batch = next(iter(data.val_dataloader()))
    batch = batch._replace(image_BCHW=batch.image_BCHW.float())
    hundred = batch._replace(valid_B=torch.ones(100, dtype=torch.bool), problems=problems)
    for _ in range(batches):
        data.on_after_batch_transfer(hundred, 0)


def test_too_many_bad_rows_stop_the_run() -> None:
    data = ready(max_bad_fraction=0.02)
    take_in(data, 12, ("truncated", "toy:7: bad image"), ("empty caption", "toy:8: the caption is empty"))
    with pytest.raises(UserError, match=r"27 of 1300 samples could not be read, first: toy:9") as raised:
        take_in(data, 1, ("missing", "toy:9"), ("missing", "toy:10"), ("missing", "toy:11"))
    assert raised.value.code == ExitCode.BAD_DATA
    assert "data.max_bad_fraction" in raised.value.todo


def test_a_few_samples_do_not_judge_a_data_set() -> None:
    data = ready(max_bad_fraction=0.01)
    take_in(data, 9, *[("missing", "toy:1")] * 50)
    with pytest.raises(UserError):
        take_in(data, 1, ("missing", "toy:1"))


def test_where_nothing_can_be_read_the_run_stops_at_once() -> None:
    """A run of a few hundred samples would end as finished, and have learned nothing."""
    data = ready(max_bad_fraction=0.5)
    with pytest.raises(UserError, match="100 of 100 samples could not be read, first: toy:1"):
        take_in(data, 1, *[("missing", "toy:1")] * 100)
    data = ready(max_bad_fraction=1.0)
    take_in(data, 1, *[("missing", "toy:1")] * 100)


def test_a_second_training_begins_with_the_first_sample_and_has_read_none() -> None:
    """Of a script that trains twice with the same data, the first time from a checkpoint."""
    data = ready()
    took = list(data.train_dataloader())
    state = data.state_dict() | {"batches": 4}
    take_in(data, 2, ("missing", "toy:1"))
    data.load_state_dict(state)
    take_in(data, 2, ("missing", "toy:1"))
    assert len(list(data.train_dataloader())) == 2
    data.setup("validate")
    assert (data.bad_rows()["samples"], data.bad_rows()["problems"]) == (200, {"missing": 2})
    data.setup("fit")
    for one, other in zip(data.train_dataloader(), took, strict=True):
        assert_equal(one, other)
    rows = data.bad_rows()
    assert (rows["samples"], rows["problems"], rows["examples"]) == (0, {}, {})


def test_mended_captions_are_counted_and_do_not_stop_the_run() -> None:
    data = ready(max_bad_fraction=0.0)
    take_in(data, 20, ("caption cut", "toy:3"))
    assert data.bad_rows()["problems"] == {"caption cut": 20}


def test_samples_of_evaluation_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Validating:
        training = False

    data = ready()
    monkeypatch.setattr(data, "trainer", Validating(), raising=False)
    take_in(data, 20)
    assert data.bad_rows()["samples"] == 0


def test_what_was_left_out_is_listed_with_examples() -> None:
    data = ready(Squares(train=[5]), steps=8)
    for batch in data.train_dataloader():
        data.on_after_batch_transfer(batch, 0)
    listed = data.bad_rows()
    assert listed["samples"] == 32
    assert listed["problems"] == {"not an image (unknown)": 2}  # once an epoch
    assert len(listed["examples"]["not an image (unknown)"]) == 1
    assert "toy:5" in listed["examples"]["not an image (unknown)"][0]
    take_in(data, 1, *[("caption cut", f"toy:{number}") for number in range(1200)])
    assert data.bad_rows()["problems"]["caption cut"] == 1200
    assert data.bad_rows()["examples"]["caption cut"] == [f"toy:{number}" for number in range(1000)]


def test_what_the_reader_left_out_is_passed_on() -> None:
    data = ready()
    data.splits["train"].skipped = {"empty caption": 3}  # type: ignore[attr-defined]
    assert data.bad_rows()["left_out"] == {"val": {}, "train": {"empty caption": 3}}
