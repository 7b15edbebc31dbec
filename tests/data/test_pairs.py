"""From rows to batches: captions in turn, augmentation by seed, epoch and index, holes in place."""

import math
import random
import re
from collections import UserDict, deque
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from toy_pairs import SPEC, Outlined, Rows, png, row, square
from transformers import PreTrainedTokenizerFast

from maskvlm.data.batch import feature_rows
from maskvlm.data.images import BadImage
from maskvlm.data.pairs import Collate, EvalPairs, TrainPairs, first_caption
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import Mirroring, eval_transform, train_transform
from maskvlm.data.unknown_words import by_source, some_captions
from maskvlm.utils.errors import ExitCode, UserError


def training(*rows: dict[str, object], seed: int = 0, augment: bool = True) -> TrainPairs:
    pairs = Rows([row(number, **changes) for number, changes in enumerate(rows)])
    return TrainPairs(pairs, train_transform(SPEC, augment=augment), seed, SPEC.image_size)


def evaluation(*rows: dict[str, object], kind: type[Rows] = Rows) -> EvalPairs:
    pairs = kind([row(number, **changes) for number, changes in enumerate(rows)])
    return EvalPairs(pairs, eval_transform(SPEC), SPEC.image_size)


# ---------------------------------------------------------------------- training


def test_captions_take_turns_over_the_epochs() -> None:
    data = training({}, {})
    for index in range(2):
        captions_by_epoch = [data[Pick(index, epoch)]["captions"] for epoch in range(6)]
        assert all(len(captions) == 1 for captions in captions_by_epoch)
        assert sorted(captions[0] for captions in captions_by_epoch[:3]) == sorted(row(index)["captions"])
        assert captions_by_epoch[3:] == captions_by_epoch[:3]
    assert data[Pick(0, 0)]["captions"] == ["a red square"]
    assert data[Pick(1, 0)]["captions"] == ["this one is green"]  # not everybody's first caption at once


def test_several_captions_an_image_take_turns_together() -> None:
    """Two of three: every epoch begins where the last one ended."""
    pairs = Rows([row(0), row(1, captions=["only one"]), row(2, captions=["", "word"])])
    data = TrainPairs(pairs, train_transform(SPEC, augment=False), 0, SPEC.image_size, captions=2)
    first, second, third = row(0)["captions"]
    assert [data[Pick(0, epoch)]["captions"] for epoch in range(3)] == [
        [first, second], [third, first], [second, third],
    ]  # fmt: skip
    assert data[Pick(1, 0)]["captions"] == ["only one", "only one"]
    hole = data[Pick(2, 0)]
    assert (hole["valid"], hole["captions"]) == (False, ["", ""])
    assert hole["problem"] is not None
    assert hole["problem"][0] == "empty caption"


@given(count=st.integers(1, 12), shown=st.integers(1, 12), row=st.integers(0, 99))
def test_each_caption_comes_first_once_in_as_many_epochs(count: int, shown: int, row: int) -> None:
    """Masked words and matching read the first one alone: 2 of 4 captions, or 5 of 5, must not leave out the others."""
    firsts = [first_caption(Pick(row, epoch), count, shown) for epoch in range(count)]
    assert sorted(firsts) == list(range(count))
    if math.gcd(count, shown) == 1:  # each epoch goes on where the last one ended
        assert firsts == [(epoch * shown + row) % count for epoch in range(count)]


def test_augmentation_follows_from_seed_epoch_and_index_alone() -> None:
    data = training({}, {})
    first = data[Pick(0, 3)]["image_CHW"]
    torch.manual_seed(123)
    torch.rand(7)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(data[Pick(0, 3)]["image_CHW"], first)
    assert torch.equal(training({}, {})[Pick(0, 3)]["image_CHW"], first)
    same_image = training({"captions": ["x"]}, {"image": square("red"), "captions": ["x"]})
    views = [same_image[Pick(index, epoch)]["image_CHW"] for index in (0, 1) for epoch in (0, 1)]
    views.append(training({"captions": ["x"]}, seed=1)[Pick(0, 0)]["image_CHW"])
    assert not any(torch.equal(a, b) for n, a in enumerate(views) for b in views[:n])


def test_half_of_the_images_are_mirrored_and_their_version_is_known() -> None:
    half_white = Image.new("RGB", (24, 24))
    half_white.paste("white", (0, 0, 12, 24))
    rows = Rows([row(0, image=png(half_white), captions=[text]) for text in ("x", "a ball on his left")])
    data = TrainPairs(rows, eval_transform(SPEC), 0, SPEC.image_size, mirroring=Mirroring())
    plain = EvalPairs(rows, eval_transform(SPEC), SPEC.image_size)[0]["image_CHW"]
    samples = [data[Pick(0, epoch)] for epoch in range(200)]
    assert 70 < sum(bool(sample["mirrored"]) for sample in samples) < 130
    for sample in samples:
        assert torch.equal(sample["image_CHW"], plain.flip(-1) if sample["mirrored"] else plain)
    assert [sample["mirrored"] for sample in samples[:9]] == [data[Pick(0, epoch)]["mirrored"] for epoch in range(9)]
    assert not any(data[Pick(1, epoch)]["mirrored"] for epoch in range(50))  # mirrored, its caption would be untrue
    unaware = TrainPairs(rows, eval_transform(SPEC), 0, SPEC.image_size, mirroring=Mirroring(caption_aware=False))
    assert any(unaware[Pick(1, epoch)]["mirrored"] for epoch in range(50))
    assert training({}, augment=False)[Pick(0, 0)]["mirrored"] is None


@given(samples=st.lists(st.tuples(st.integers(0, 999), st.booleans(), st.booleans()), min_size=1))
def test_a_row_of_features_shows_one_version_of_one_image(samples: list[tuple[int, bool, bool]]) -> None:
    index_B, mirrored_B, valid_B = (torch.tensor(part) for part in zip(*samples, strict=True))
    rows = feature_rows(index_B, valid_B, mirrored_B).tolist()
    versions = {}
    for (index, mirrored, valid), at in zip(samples, rows, strict=True):
        assert (at == -1) != valid
        if valid:
            assert 0 <= at < 2 * (max(index for index, _, _ in samples) + 1)
            assert versions.setdefault(at, (index, mirrored)) == (index, mirrored)
    assert len(versions) == len({(index, mirrored) for index, mirrored, valid in samples if valid})
    assert feature_rows(index_B, valid_B, None).tolist() == [index if valid else -1 for index, _, valid in samples]


def test_reading_a_sample_leaves_the_global_random_numbers_alone() -> None:
    data = training({})
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert data[Pick(0, 0)]["valid"]
    assert torch.equal(torch.rand(3), expected)


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    sample = training({}, augment=False)[Pick(0, 0)]
    assert torch.equal(sample["image_CHW"], evaluation({})[0]["image_CHW"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": b"no image"}, "not an image"),
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


def test_a_mended_caption_is_used_and_reported() -> None:
    sample = training({"captions": ["a dog \ud800"]})[Pick(0, 0)]
    assert sample["valid"]
    assert sample["captions"] == ["a dog \ufffd"]
    assert sample["problem"] == ("caption surrogate", "toy:0")


# ---------------------------------------------------------------------- evaluation


def test_evaluation_shows_all_captions_that_have_words() -> None:
    data = evaluation({"captions": ["one", " ", "two"]}, {})
    assert data[0]["captions"] == ["one", "two"]
    assert len(data[1]["captions"]) == 3
    assert data[0]["valid"]


def test_evaluation_never_skips() -> None:
    data = evaluation({"image": b"no image"}, {"captions": ["", "\n"]})
    with pytest.raises(BadImage, match="toy:0"):
        data[0]
    with pytest.raises(UserError, match="toy:1: no caption has any words") as raised:
        data[1]
    assert raised.value.code == ExitCode.BAD_DATA


def test_object_pixels_come_at_the_size_of_the_image() -> None:
    sample = evaluation({}, kind=Outlined)[0]
    ground = sample["foreground"]
    assert ground is not None
    assert ground.shape == (24, 24)
    red = sample["image_CHW"][1] < 0  # on white; the bicubic edge is in doubt by half a pixel
    assert (torch.from_numpy(ground) == red).all()
    assert evaluation({})[0]["foreground"] is None


# ---------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def collate(trained: PreTrainedTokenizerFast) -> Callable[..., object]:
    return Collate(Captioner(trained, 12))


def test_a_batch_knows_which_images_are_mirrored(collate: Collate) -> None:
    pairs = Rows([row(0), row(1, image=b"no"), row(2)])
    data = TrainPairs(pairs, eval_transform(SPEC), 0, SPEC.image_size, mirroring=Mirroring())
    samples = [data[Pick(at, 0)] for at in range(3)]
    samples[2]["mirrored"] = True
    batch = collate(samples)
    assert batch.mirrored_B is not None
    assert batch.mirrored_B.tolist() == [samples[0]["mirrored"], False, True]
    assert batch.feature_row_B.tolist() == [int(bool(samples[0]["mirrored"])), -1, 5]
    still = collate([training({}, {})[Pick(at, 0)] for at in range(2)])
    assert still.mirrored_B is None
    assert still.feature_row_B.tolist() == [0, 1]


def test_a_training_batch(collate: Collate) -> None:
    data = training(
        {"captions": ["A red circle"]}, {"image": b"no"}, {"captions": ["a  RED circle"], "image_id": "id 0"}
    )
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
    assert batch.foreground_BHW is None
    assert [reason for reason, _ in batch.problems] == ["not an image (unknown)"]


def test_two_holes_are_not_one_image(collate: Collate) -> None:
    data = training({"image": b"no"}, {"image": b"no"})
    batch = collate([data[Pick(0, 0)], data[Pick(1, 0)]])
    assert batch.image_id_B[0] != batch.image_id_B[1]


def test_an_evaluation_batch_keeps_each_caption_with_its_image(collate: Collate) -> None:
    data = evaluation({"captions": ["a star", "one star"]}, {}, kind=Outlined)
    batch = collate([data[1], data[0]])
    assert batch.owner_C.tolist() == [0, 0, 0, 1, 1]
    assert batch.index_B.tolist() == [1, 0]
    assert batch.token_CT.shape[0] == batch.text_id_C.shape[0] == 5
    ground: Tensor | None = batch.foreground_BHW
    assert ground is not None
    assert ground.shape == (2, 24, 24)
    assert ground.dtype == torch.bool
    assert batch.texts == (*row(1)["captions"], "a star", "one star")


def test_several_captions_of_a_training_image_know_it(collate: Collate) -> None:
    pairs = Rows([row(0), row(1, image=b"no"), row(2)])
    data = TrainPairs(pairs, train_transform(SPEC, augment=False), 0, SPEC.image_size, captions=2)
    batch = collate([data[Pick(index, 0)] for index in range(3)])
    assert batch.owner_C.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.token_CT.shape[0] == batch.text_id_C.shape[0] == len(batch.texts) == 6
    assert batch.valid_B.tolist() == [True, False, True]
    assert batch.texts[:4] == ("a red square", "this one is red", "", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "a red square"}, "toy:0: captions is 'a red square'. Give a list of texts"),
        ({"captions": None}, "toy:0: captions is None"),
        ({"captions": ["red", 3]}, "toy:0: captions is ['red', 3]"),
        ({"image_id": 3}, "toy:0: image_id is 3. Give a text"),
    ],
)
def test_a_row_that_is_none_is_told(changes: dict[str, object], message: str) -> None:
    """One text in the place of a list would be read as a list of letters."""
    pairs = Rows([row(0, **changes)])
    transform = eval_transform(SPEC)
    for read in (
        lambda: TrainPairs(pairs, transform, 0, SPEC.image_size)[Pick(0, 0)],
        lambda: EvalPairs(pairs, transform, SPEC.image_size)[0],
        lambda: next(some_captions(pairs)),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            read()
        assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    "kind",
    [UserDict, MappingProxyType, pd.Series, lambda row: {**row, "text": "of another column"}],
    ids=["UserDict", "MappingProxyType", "Series", "a further column"],
)
@pytest.mark.parametrize("several", [list, tuple, np.array, deque])
def test_rows_and_captions_may_be_of_other_kinds(kind: Any, several: Any) -> None:
    texts = ["a red square", "this one is red"]
    pairs = Rows([kind({**row(0), "captions": several(texts)})])
    data = TrainPairs(pairs, eval_transform(SPEC), 0, SPEC.image_size, captions=2)
    assert sorted(data[Pick(0, 0)]["captions"]) == sorted(texts)
    assert EvalPairs(pairs, eval_transform(SPEC), SPEC.image_size)[0]["captions"] == texts
    assert [*some_captions(pairs)] == texts
    assert [*by_source(pairs)] == [("", texts)]


def test_a_row_without_a_field_is_told() -> None:
    bare: Any = {"image": square("red"), "captions": ["a red square"]}
    with pytest.raises(UserError, match="row 0: the row has no image_id, origin"):
        EvalPairs(Rows([bare]), eval_transform(SPEC), SPEC.image_size)[0]
