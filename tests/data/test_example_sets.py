"""Examples of downstream tasks as batches: images, targets, answers, and what cannot be read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from toy_examples import LABELS, Questions, ToySplit, example
from toy_pairs import SPEC
from transformers import PreTrainedTokenizerFast

from maskvlm.data.caption_text import stable_id
from maskvlm.data.example_sets import CollateExamples, EvalExamples, TrainExamples
from maskvlm.data.examples import ExampleSource
from maskvlm.data.images import BadImage
from maskvlm.data.module import PairData
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import Mirroring, eval_transform, train_transform
from maskvlm.utils.errors import ExitCode, UserError


def training(*rows: dict[str, Any], images: int = 1, augment: bool = True, seed: int = 0) -> TrainExamples:
    examples = ToySplit([example(number, images, **changes) for number, changes in enumerate(rows)])
    return TrainExamples(examples, train_transform(SPEC, augment=augment), seed, SPEC.image_size)


def evaluation(*rows: dict[str, Any], images: int = 1) -> EvalExamples:
    examples = ToySplit([example(number, images, **changes) for number, changes in enumerate(rows)])
    return EvalExamples(examples, eval_transform(SPEC))


@pytest.fixture(scope="module")
def collate(trained: PreTrainedTokenizerFast) -> CollateExamples:
    return CollateExamples(Captioner(trained, 12), Questions())


# ---------------------------------------------------------------------- samples


def test_all_images_of_an_example_are_mirrored_or_none(collate: CollateExamples) -> None:
    half_white = Image.new("RGB", (24, 24))
    half_white.paste("white", (0, 0, 12, 24))
    texts: list[tuple[str, list[str]]] = [("x", []), ("left", []), ("which way does he look", ["left"])]
    rows = [
        example(at, 2, images=[half_white, half_white], answers=answers, text=text)
        for at, (text, answers) in enumerate(texts)
    ]
    data = TrainExamples(ToySplit(rows), eval_transform(SPEC), 0, SPEC.image_size, Mirroring())
    plain = eval_transform(SPEC)(half_white)
    samples = [data[Pick(0, epoch)] for epoch in range(20)]
    assert {sample["mirrored"] for sample in samples} == {False, True}
    for sample in samples:
        for image_CHW in sample["image_PCHW"]:
            assert torch.equal(image_CHW, plain.flip(-1) if sample["mirrored"] else plain)
    assert not any(data[Pick(row, epoch)]["mirrored"] for row in (1, 2) for epoch in range(20))
    mirrored = next(sample for sample in samples if sample["mirrored"])
    assert collate([data[Pick(1, 0)], mirrored]).feature_row_B.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": [example(0)["images"][0], b"no image"]}, "not an image"),
        ({"images": ["nowhere/1.png", example(0)["images"][0]]}, "missing"),
        ({"text": " \t"}, "empty text"),
    ],
)
def test_what_cannot_be_read_keeps_its_place(changes: dict[str, Any], reason: str) -> None:
    """One bad image makes the example a hole: half an example means nothing."""
    data = training({}, changes, {}, images=2)
    samples = [data[Pick(index, 0)] for index in range(3)]
    assert [sample["valid"] for sample in samples] == [True, False, True]
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    hole = samples[1]
    assert hole["problem"] is not None
    assert hole["problem"][0].startswith(reason)
    assert "toy.json:1" in hole["problem"][1]
    assert hole["image_PCHW"].shape == (2, 3, 24, 24)
    assert not hole["image_PCHW"].any()
    mended = training({"text": "is it \ud800 red"})[Pick(0, 0)]
    assert (mended["valid"], mended["problem"]) == (True, ("caption surrogate", "toy.json:0"))


def test_evaluation_never_skips() -> None:
    """The file of a bad image, or else its id, is named besides the row."""
    images = [example(0)["images"][0]]
    for image, name in (("/nowhere/no.jpg", r"toy\.json:0: .*no\.jpg"), (b"no image", r"toy\.json:0 \(b\)")):
        with pytest.raises(BadImage, match=name):
            evaluation({"images": [*images, image], "image_ids": ["a", "b"]})[0]
    data = evaluation({}, {"text": "\n"})
    with pytest.raises(UserError, match=r"toy\.json:1: no words in its text") as caught:
        data[1]
    assert caught.value.code == ExitCode.BAD_DATA


# ---------------------------------------------------------------------- batches


def test_a_batch_of_two_images_each(collate: CollateExamples) -> None:
    data = training({}, {"images": [b"no", b"no"]}, {"answers": []}, images=2, augment=False)
    batch = collate([data[Pick(index, 0)] for index in range(3)])
    assert batch.image_BPCHW.shape == (3, 2, 3, 24, 24)
    assert batch.token_BT.shape == batch.attention_BT.shape == batch.special_BT.shape == batch.word_BT.shape
    assert batch.valid_B.tolist() == [True, False, True]
    assert batch.index_B.tolist() == [0, 1, 2]
    assert batch.image_id_BP.tolist() == [[stable_id(f"toy {row} {place}") for place in (0, 1)] for row in range(3)]
    assert batch.target_BK.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert [one["id"] for one in batch.examples] == ["1000", "1001", "1002"]
    assert {len(one["images"]) for one in batch.examples} == {0}  # images do not travel with the batch
    assert data.examples[0]["images"], "the source keeps its own"
    assert [reason for reason, _ in batch.problems] == ["not an image (unknown)"]
    assert batch.answers.owner_A.tolist() == [0, 1]
    assert batch.answers.weight_A.tolist() == [1.0, 1.0]


class Soft(ExampleSource):
    """Several answers with weights, as VQA v2 has them; `shares`: other weights for a head that writes them."""

    labels = LABELS

    def split(self, name: str) -> ToySplit:
        return ToySplit([])

    def targets(self, answers: list[str]) -> dict[str, float]:
        return {label: min(1.0, 0.3 * answers.count(label)) for label in dict.fromkeys(answers)}

    def shares(self, answers: list[str]) -> dict[str, float]:
        return {label: answers.count(label) / len(answers) for label in dict.fromkeys(answers)}


def test_soft_targets_reach_both_heads(trained: PreTrainedTokenizerFast) -> None:
    captioner = Captioner(trained, 12)
    people = [["blue"] * 3 + ["red"], [], ["green"] * 9]
    data = evaluation(*({"answers": answers} for answers in people))
    batch = CollateExamples(captioner, Soft())([data[index] for index in range(3)])
    torch.testing.assert_close(batch.target_BK, torch.tensor([[0.3, 0, 0.9], [0, 0, 0], [0, 1.0, 0]]))
    assert batch.answers.owner_A.tolist() == [0, 0, 2]
    torch.testing.assert_close(batch.answers.weight_A, torch.tensor([0.75, 0.25, 1.0]))
    alone = captioner(["blue", "red", "green"])
    assert torch.equal(batch.answers.token_AT, alone.token_CT)
    assert torch.equal(batch.answers.attention_AT, alone.attention_CT)


# ---------------------------------------------------------------------- the data module


def ready(source: Any, stage: str = "fit", **settings: Any) -> PairData:
    data = PairData(source, SPEC, **{"batch_size": 4, "steps": 6, "eval_batch_size": 3, **settings})
    data.setup(stage)
    return data


# ---------------------------------------------------------------------- of another package


def source_with(**members: Any) -> Any:
    """A source some of whose members are others."""
    return type("Other", (Questions,), members)()


def collated(source: Questions, *rows: dict[str, Any]) -> Any:
    captioner: Any = lambda texts: ()  # noqa: E731  refused before its tokens matter
    return CollateExamples(captioner, source)([evaluation(*rows)[index] for index in range(len(rows))])


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda: evaluation({"answers": "red"})[0], r"toy\.json:0: answers"),
        (lambda: collated(Questions(), {}, {"answers": ["pink"]}), r"toy\.json:1: label 'pink'"),
        (lambda: collated(source_with(targets=lambda self, answers: [0.5, 0.5]), {}), r"Other\.targets"),
        (lambda: collated(Questions(), {}, example(1, 2)), "the example has 2 images"),
        (lambda: ready(source_with(split=lambda self, name: ToySplit([]))), "has no examples"),
    ],
)
def test_what_another_package_may_give_is_told(read: Callable[[], Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        read()
