"""From rows to batches: captions in turn, augmentation by seed, epoch and index, holes in place."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_pairs import SPEC, Outlined, Rows, png, row, square
from transformers import PreTrainedTokenizerFast

from maskvlm.data.pairs import Collate, EvalPairs, TrainPairs, first_caption
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import Mirroring, eval_transform, train_transform
from maskvlm.utils.errors import ExitCode, UserError


def training(*rows: dict[str, object], seed: int = 0, augment: bool = True) -> TrainPairs:
    pairs = Rows([row(number, **changes) for number, changes in enumerate(rows)])
    return TrainPairs(pairs, train_transform(SPEC, augment=augment), seed, SPEC.image_size)


def evaluation(*rows: dict[str, object], kind: type[Rows] = Rows) -> EvalPairs:
    pairs = kind([row(number, **changes) for number, changes in enumerate(rows)])
    return EvalPairs(pairs, eval_transform(SPEC), SPEC.image_size)


@pytest.fixture(scope="module")
def collate(trained: PreTrainedTokenizerFast) -> Collate:
    return Collate(Captioner(trained, 12))


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(("count", "shown"), [(3, 1), (3, 2), (4, 2), (5, 5), (2, 7)])
def test_each_caption_comes_first_once_in_as_many_epochs(count: int, shown: int) -> None:
    """Masked words and matching read the first one alone: 2 of 4 captions, or 5 of 5, must not leave out the others."""
    for at in (0, 1, 7):
        firsts = [first_caption(Pick(at, epoch), count, shown) for epoch in range(2 * count)]
        assert sorted(firsts[:count]) == sorted(firsts[count:]) == list(range(count))
        assert firsts[0] == at % count  # not everybody's first caption at once
    assert [first_caption(Pick(0, epoch), 3, 2) for epoch in range(3)] == [0, 2, 1]  # each goes on where one ended


def test_several_captions_of_a_training_image_know_it(collate: Collate) -> None:
    pairs = Rows([row(0), row(1, image=b"no"), row(2, captions=["only one"]), row(3, captions=["", "word"])])
    data = TrainPairs(pairs, train_transform(SPEC, augment=False), 0, SPEC.image_size, captions=2)
    assert torch.equal(data[Pick(0, 0)]["image_CHW"], evaluation({})[0]["image_CHW"])  # without augmentation
    first, second, third = row(0)["captions"]
    turns = [data[Pick(0, epoch)]["captions"] for epoch in range(3)]
    assert turns == [[first, second], [third, first], [second, third]]
    batch = collate([data[Pick(index, 0)] for index in range(4)])
    assert batch.owner_C.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.token_CT.shape[0] == batch.text_id_C.shape[0] == 8
    assert batch.valid_B.tolist() == [True, False, True, False]
    assert batch.texts == (first, second, "", "", "only one", "only one", "", "")


def test_augmentation_follows_from_seed_epoch_and_index_alone() -> None:
    data = training({}, {})
    first = data[Pick(0, 3)]["image_CHW"]
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    assert torch.equal(data[Pick(0, 3)]["image_CHW"], first)
    assert torch.equal(torch.rand(3), expected)  # the global numbers are left alone
    same_image = training({"captions": ["x"]}, {"image": square("red"), "captions": ["x"]})
    views = [same_image[Pick(index, epoch)]["image_CHW"] for index in (0, 1) for epoch in (0, 1)]
    views.append(training({"captions": ["x"]}, seed=1)[Pick(0, 0)]["image_CHW"])
    assert not any(torch.equal(a, b) for n, a in enumerate(views) for b in views[:n])


def test_half_of_the_images_are_mirrored_and_their_version_is_known(collate: Collate) -> None:
    half_white = Image.new("RGB", (24, 24))
    half_white.paste("white", (0, 0, 12, 24))
    texts = ("x", "a ball on his left")
    rows = Rows([*(row(0, image=png(half_white), captions=[text]) for text in texts), row(2, image=b"no")])
    data = TrainPairs(rows, eval_transform(SPEC), 0, SPEC.image_size, mirroring=Mirroring())
    plain = eval_transform(SPEC)(half_white)
    samples = [data[Pick(0, epoch)] for epoch in range(100)]
    assert 30 < sum(bool(sample["mirrored"]) for sample in samples) < 70
    for sample in samples:
        assert torch.equal(sample["image_CHW"], plain.flip(-1) if sample["mirrored"] else plain)
    assert not any(data[Pick(1, epoch)]["mirrored"] for epoch in range(50))  # mirrored, its caption would be untrue
    unaware = TrainPairs(rows, eval_transform(SPEC), 0, SPEC.image_size, mirroring=Mirroring(caption_aware=False))
    assert any(unaware[Pick(1, epoch)]["mirrored"] for epoch in range(50))
    mirrored = next(sample for sample in samples if sample["mirrored"])
    batch = collate([data[Pick(1, 0)], mirrored, data[Pick(2, 0)]])
    assert batch.mirrored_B is not None
    assert (batch.mirrored_B.tolist(), batch.feature_row_B.tolist()) == ([False, True, False], [2, 1, -1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": png(square("red"))[:-40]}, "truncated"),
        ({"image": "nowhere/1.png"}, "missing"),
        ({"captions": [" \t\n"]}, "empty caption"),
        ({"captions": []}, "empty caption"),
    ],
)
def test_what_cannot_be_read_becomes_a_hole_that_keeps_its_place(changes: dict[str, object], reason: str) -> None:
    data = training({}, changes, {})
    samples = [data[Pick(index, 0)] for index in range(3)]
    assert [sample["valid"] for sample in samples] == [True, False, True]
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    hole = samples[1]
    assert hole["problem"] is not None
    assert hole["problem"][0].startswith(reason)
    assert "toy:1" in hole["problem"][1]
    assert not hole["image_CHW"].any()
    assert hole["captions"] == [""]
    assert hole["image_CHW"].shape == samples[0]["image_CHW"].shape
    assert [sample["problem"] for sample in (samples[0], samples[2])] == [None, None]
    mended = training({"captions": ["a dog \ud800"]})[Pick(0, 0)]
    assert (mended["valid"], mended["captions"]) == (True, ["a dog \ufffd"])
    assert mended["problem"] == ("caption surrogate", "toy:0")


# ---------------------------------------------------------------------- evaluation and batches


def test_a_training_batch(collate: Collate) -> None:
    data = training(
        {"captions": ["A red circle"]},
        {"image": b"no"},
        {"captions": ["a  RED circle"], "image_id": "id 0"},
        {"image": b"no"},
    )
    holes = collate([data[Pick(1, 0)], data[Pick(3, 0)]])
    assert holes.image_id_B[0] != holes.image_id_B[1]  # they are not one image
    batch = collate([data[Pick(index, 0)] for index in range(3)])
    assert batch.image_BCHW.shape == (3, 3, 24, 24)
    assert batch.image_BCHW.dtype == torch.float32
    assert batch.token_CT.shape == batch.attention_CT.shape == batch.special_CT.shape == batch.word_CT.shape == (3, 5)
    assert batch.attention_CT.sum(1).tolist() == [5, 2, 5]  # a hole: start and end alone
    assert batch.special_CT[1].all()
    assert batch.owner_C.tolist() == batch.index_B.tolist() == [0, 1, 2]
    assert batch.valid_B.tolist() == [True, False, True]
    assert batch.image_id_B[0] == batch.image_id_B[2] != batch.image_id_B[1]
    assert batch.text_id_C[0] == batch.text_id_C[2] != batch.text_id_C[1]  # whatever the case and the spaces
    assert batch.foreground_BHW is batch.mirrored_B is None
    assert [reason for reason, _ in batch.problems] == ["not an image (unknown)"]


def test_an_evaluation_batch_keeps_each_caption_with_its_image(collate: Collate) -> None:
    """All of them that have words."""
    data = evaluation({"captions": ["a star", " ", "one star"]}, {}, kind=Outlined)
    batch = collate([data[1], data[0]])
    assert batch.owner_C.tolist() == [0, 0, 0, 1, 1]
    assert batch.index_B.tolist() == [1, 0]
    assert batch.token_CT.shape[0] == batch.text_id_C.shape[0] == 5
    ground: Tensor | None = batch.foreground_BHW
    assert ground is not None
    assert ground.dtype == torch.bool
    assert torch.equal(ground[1], batch.image_BCHW[1, 1] < 0)  # red on white
    assert batch.texts == (*row(1)["captions"], "a star", "one star")


def test_evaluation_never_skips() -> None:
    data = evaluation({"image": b"no image"}, {"captions": ["", "\n"]})
    for index in range(2):
        with pytest.raises(UserError, match=f"toy:{index}") as raised:
            data[index]
        assert raised.value.code == ExitCode.BAD_DATA
