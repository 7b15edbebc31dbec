"""Examples of downstream tasks as batches: images, targets, answers, and what cannot be read."""

import pickle
import re
from collections import UserDict, deque
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_examples import LABELS, Nameless, Questions, ToySplit, example
from toy_pairs import SPEC, Squares
from transformers import PreTrainedTokenizerFast

from maskvlm.data import module
from maskvlm.data.caption_text import stable_id
from maskvlm.data.example_sets import CollateExamples, EvalExamples, TrainExamples, opened_images
from maskvlm.data.examples import ExampleSource, read_example
from maskvlm.data.images import BadImage
from maskvlm.data.module import PairData, some_texts
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


def test_augmentation_follows_from_seed_epoch_and_index_alone() -> None:
    data = training({}, {}, images=2)
    first = data[Pick(0, 3)]["image_PCHW"]
    assert first.shape == (2, 3, 24, 24)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(data[Pick(0, 3)]["image_PCHW"], first)
    assert torch.equal(torch.rand(3), expected)  # the global numbers are left alone
    assert not torch.equal(data[Pick(0, 4)]["image_PCHW"], first)
    assert not torch.equal(training({}, images=2, seed=1)[Pick(0, 3)]["image_PCHW"], first)


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    sample = training({}, images=3, augment=False)[Pick(0, 0)]
    assert torch.equal(sample["image_PCHW"], evaluation({}, images=3)[0]["image_PCHW"])
    assert (sample["valid"], sample["problem"], sample["index"]) == (True, None, 0)


def test_all_images_of_an_example_are_mirrored_or_none(collate: CollateExamples) -> None:
    half_white = Image.new("RGB", (24, 24))
    half_white.paste("white", (0, 0, 12, 24))
    rows = [
        example(at, 2, images=[half_white, half_white], answers=[], text=text) for at, text in enumerate(["x", "left"])
    ]
    data = TrainExamples(ToySplit(rows), eval_transform(SPEC), 0, SPEC.image_size, Mirroring())
    plain = eval_transform(SPEC)(half_white)
    samples = [data[Pick(0, epoch)] for epoch in range(20)]
    assert {sample["mirrored"] for sample in samples} == {False, True}
    for sample in samples:
        for image_CHW in sample["image_PCHW"]:
            assert torch.equal(image_CHW, plain.flip(-1) if sample["mirrored"] else plain)
    assert not any(data[Pick(1, epoch)]["mirrored"] for epoch in range(20))
    mirrored = next(sample for sample in samples if sample["mirrored"])
    assert collate([data[Pick(1, 0)], mirrored]).feature_row_B.tolist() == [2, 1]


def test_an_answer_that_names_a_side_keeps_the_image_as_it_is() -> None:
    """Fails where the question alone is asked: half of the images would be mirrored under "left"."""
    transform, looks = train_transform(SPEC, crop_scale=(1.0, 1.0), randaugment=None), {}
    half_white = Image.new("RGB", (24, 24))
    half_white.paste("white", (0, 0, 12, 24))
    for answer in ("left", "yes"):
        examples = ToySplit([example(0, images=[half_white], text="which way does he look", answers=[answer])])
        data = TrainExamples(examples, transform, 0, SPEC.image_size)
        looks[answer] = {data[Pick(0, epoch)]["image_PCHW"].numpy().tobytes() for epoch in range(20)}
    assert {answer: len(each) for answer, each in looks.items()} == {"left": 1, "yes": 2}


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


def test_a_mended_text_is_used_and_reported() -> None:
    sample = training({"text": "is it \ud800 red"})[Pick(0, 0)]
    assert sample["valid"]
    assert sample["problem"] == ("caption surrogate", "toy.json:0")


HTML = b"<!doctype html><html>not found</html>"


def test_the_file_of_a_bad_image_is_named(tmp_path: Path) -> None:
    """Of the two images of a row the second one; the reason, by which it is counted, stays as it is."""
    bad = tmp_path / "11.jpg"
    bad.write_bytes(HTML)
    images = [example(0)["images"][0], str(bad)]
    message = f"toy.json:0 ({bad}): bad image, not an image (text/html). Replace it or drop its row."
    assert training({"images": images}, images=2)[Pick(0, 0)]["problem"] == ("not an image (text/html)", message)
    with pytest.raises(BadImage) as caught:
        evaluation({"images": images}, images=2)[0]
    assert str(caught.value) == message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # as a data worker sends it
    assert (caught.value.reason, caught.value.code) == ("not an image (text/html)", ExitCode.BAD_DATA)


def test_no_file_is_named_twice_and_an_image_that_is_none_by_its_id(tmp_path: Path) -> None:
    absent = str(tmp_path / "no.jpg")
    for image, message in (
        (absent, f"toy.json:0: bad image, missing (no file {absent}). "),
        (HTML, "toy.json:0 (toy 0 0): bad image, not an image (text/html). "),
    ):
        with pytest.raises(BadImage) as caught:
            evaluation({"images": [image]})[0]
        assert str(caught.value).startswith(message)
    deep = tmp_path / ("d" * 120) / ("e" * 120) / "11.jpg"  # longer than a detail may be
    with pytest.raises(BadImage, match=r"toy\.json:0 \(.*/11\.jpg\): bad image, missing"):
        evaluation({"images": [str(deep)]})[0]


def test_evaluation_never_skips() -> None:
    data = evaluation({"images": [b"no image"]}, {"text": "\n"})
    with pytest.raises(BadImage, match=r"toy\.json:0"):
        data[0]
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
    """Several answers with weights, as VQA v2 has them."""

    labels = LABELS

    def split(self, name: str) -> ToySplit:
        return ToySplit([])

    def targets(self, answers: list[str]) -> dict[str, float]:
        return {label: min(1.0, 0.3 * answers.count(label)) for label in dict.fromkeys(answers)}


class Shared(Soft):
    """With other weights for a head that writes them."""

    def shares(self, answers: list[str]) -> dict[str, float]:
        return {label: answers.count(label) / len(answers) for label in dict.fromkeys(answers)}


def test_answers_that_are_written_may_have_weights_of_their_own(trained: PreTrainedTokenizerFast) -> None:
    data = evaluation({"answers": ["blue"] * 3 + ["red"]})
    batch = CollateExamples(Captioner(trained, 12), Shared())([data[0]])
    torch.testing.assert_close(batch.target_BK, torch.tensor([[0.3, 0, 0.9]]))
    torch.testing.assert_close(batch.answers.weight_A, torch.tensor([0.75, 0.25]))


class Measured(Questions):
    """A regression: numbers, and no classes."""

    @property
    def labels(self) -> tuple[str, ...]:
        return ()


def test_a_source_without_classes_has_no_targets(trained: PreTrainedTokenizerFast) -> None:
    """A task reads the answers themselves."""
    data = evaluation({"answers": ["0.565"]}, {"answers": ["12"]})
    batch = CollateExamples(Captioner(trained, 12), Measured())([data[0], data[1]])
    assert batch.target_BK.shape == (2, 0)
    assert [each["answers"] for each in batch.examples] == [["0.565"], ["12"]]


def test_soft_targets_reach_both_heads(trained: PreTrainedTokenizerFast) -> None:
    captioner = Captioner(trained, 12)
    people = [["blue"] * 3 + ["red"], [], ["green"] * 9]
    data = evaluation(*({"answers": answers} for answers in people))
    batch = CollateExamples(captioner, Soft())([data[index] for index in range(3)])
    expected = torch.tensor([[0.3, 0, 0.9], [0, 0, 0], [0, 1.0, 0]])
    torch.testing.assert_close(batch.target_BK, expected)
    assert batch.answers.owner_A.tolist() == [0, 0, 2]
    torch.testing.assert_close(batch.answers.weight_A, torch.tensor([0.9, 0.3, 1.0]))
    alone = captioner(["blue", "red", "green"])
    assert torch.equal(batch.answers.token_AT, alone.token_CT)
    assert torch.equal(batch.answers.attention_AT, alone.attention_CT)


def test_a_batch_without_any_answer(collate: CollateExamples) -> None:
    """A test split whose answers nobody has published."""
    data = evaluation({"answers": []}, {"answers": []})
    batch = collate([data[0], data[1]])
    assert not batch.target_BK.any()
    assert batch.answers.owner_A.shape == batch.answers.weight_A.shape == (0,)
    assert batch.answers.token_AT.shape[0] == 0
    assert batch.answers.owner_A.dtype == torch.long


def test_a_label_outside_the_classes_names_its_row(collate: CollateExamples) -> None:
    data = evaluation({}, {"answers": ["pink"]})
    with pytest.raises(UserError) as caught:
        collate([data[0], data[1]])
    assert str(caught.value) == (
        "toy.json:1: label 'pink' is none of the 3 classes (red, green, blue). Fix or remove the row."
    )
    assert caught.value.code == ExitCode.BAD_DATA
    many = CollateExamples(collate.captioner, Questions(names=tuple(f"l{n}" for n in range(20))))
    with pytest.raises(UserError, match=r"none of the 20 classes \(l0, l1, l2, l3, l4, l5, l6, l7, \.\.\.\)"):
        many([data[0]])


@pytest.mark.parametrize("method", ["targets", "shares"])
@pytest.mark.parametrize("given", [[0.5, 0.5], None, "red", {"red": "half"}])
def test_weights_of_labels_are_a_dict_of_numbers(method: str, given: Any, collate: CollateExamples) -> None:
    source = Questions()
    setattr(source, method, lambda answers: given)
    sample = evaluation({"answers": ["red"]})[0]
    with pytest.raises(UserError, match=rf"Questions\.{method}: gave .* for the answers \['red'\]\. Return a dict"):
        CollateExamples(collate.captioner, source)([sample])


# ---------------------------------------------------------------------- the data module


def ready(source: Any, stage: str = "fit", **settings: Any) -> PairData:
    data = PairData(source, SPEC, **{"batch_size": 4, "steps": 6, "eval_batch_size": 3, **settings})
    data.setup(stage)
    return data


def test_the_module_deals_out_examples_as_it_does_pairs() -> None:
    data = ready(Questions(images=2), steps=4)
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch.index_B for batch in batches]).tolist()) == list(range(16))
    assert {tuple(batch.image_BPCHW.shape) for batch in batches} == {(4, 2, 3, 24, 24)}
    assert [batch.index_B.tolist() for batch in data.val_dataloader()] == [[0, 1, 2], [3, 4], [5, 6]]
    tested = list(ready(Questions(), "test").test_dataloader())
    assert [one["id"] for batch in tested for one in batch.examples] == [f"{1100 + n}" for n in range(5)]


def test_bytes_are_loaded_and_normalised_to_what_inference_sees() -> None:
    data = ready(Questions(images=2, changes={"train": {3: {"images": [b"no", b"no"]}}}), augment=False, steps=4)
    for batch in data.train_dataloader():
        assert batch.image_BPCHW.dtype == torch.uint8
        for image_PCHW, index in zip(data.normalised(batch).image_BPCHW, batch.index_B.tolist(), strict=True):
            opened = [] if index == 3 else opened_images(data.splits["train"][index])
            expected = [eval_transform(SPEC)(image) for image in opened] or [torch.zeros(3, 24, 24)] * 2
            assert torch.equal(image_PCHW, torch.stack(expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int) -> None:
    here = list(ready(Questions(), workers=0).train_dataloader())
    there = list(ready(Questions(), workers=workers).train_dataloader())
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.image_BPCHW, other.image_BPCHW)
        assert torch.equal(one.answers.token_AT, other.answers.token_AT)
        assert one.examples == other.examples


def test_shared_memory_is_asked_for_all_images_of_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_bytes: list[int] = []
    monkeypatch.setattr(module, "check_shared", lambda batch, *_: asked_bytes.append(batch))
    data = ready(Questions(2), workers=1)
    data.val_dataloader()
    size = min(data.eval_batch_size, len(data.splits["val"]))
    assert asked_bytes == [2 * 3 * SPEC.image_size**2 * size]


def test_labels_are_known_before_a_split_is() -> None:
    assert PairData(Questions(), SPEC, steps=1).labels == LABELS
    assert PairData(Squares(), SPEC, steps=1).labels is None


def test_the_tokenizer_learns_texts_and_answers() -> None:
    data = ready(Questions())
    assert list(some_texts(data.splits["train"], most=8)) == [
        text for number in range(0, 16, 2) for text in (example(number)["text"], *example(number)["answers"])
    ]
    assert data.tokenizer is not None
    assert len(data.tokenizer.tokenize("red green number")) == 3


def test_image_ids_are_each_once_and_sorted() -> None:
    data = ready(Questions(images=2, changes={"val": {1: {"image_ids": ["toy 12 0", "x"]}}}))
    ids = data.hashed_image_ids("val")
    assert ids is not None
    names = {f"toy {number} {place}" for number in (12, *range(14, 19)) for place in (0, 1)} | {"x"}
    assert ids.tolist() == sorted(stable_id(name) for name in names)
    assert ready(Nameless()).hashed_image_ids("val") is None
    assert ready(Squares()).hashed_image_ids("val") is None


def test_holes_of_examples_are_counted_and_too_many_stop_the_run() -> None:
    bad = {"train": {n: {"images": [b"no"]} for n in (3, 5)}}
    data = ready(Questions(changes=bad), steps=8)
    for batch in data.train_dataloader():
        data.on_after_batch_transfer(batch, 0)
    listed = data.bad_rows()
    assert listed["samples"] == 32
    assert listed["problems"] == {"not an image (unknown)": 4}  # two, in two epochs
    assert sorted(listed["examples"]["not an image (unknown)"])[0].startswith("toy.json:3")
    data.samples = 1000
    data.max_bad_fraction = 0.001
    holed = next(batch for batch in data.train_dataloader() if batch.problems)
    with pytest.raises(UserError, match=r"5 of 1004 samples could not be read, first: toy\.json:"):
        data.on_after_batch_transfer(holed, 0)


# ---------------------------------------------------------------------- of another package


@pytest.mark.parametrize("kind", [UserDict, MappingProxyType])
@pytest.mark.parametrize("several", [tuple, np.array, deque])
def test_examples_and_answers_may_be_of_other_kinds(kind: Any, several: Any) -> None:
    plain: Any = example(0)
    read = read_example([kind({**plain, "answers": several(plain["answers"])})], 0)  # type: ignore[arg-type]
    assert list(read["answers"]) == plain["answers"]
    assert read["text"] == plain["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": [3]}, "answers holds a int (3). Give a list of texts, such as ['3']"),
        ({"answers": "red"}, "answers is a str ('red')"),
        ({"answers": None}, "answers is NoneType"),
        ({"text": None}, "text is NoneType"),
        ({"images": "photo.jpg"}, "images is a str ('photo.jpg')"),
        ({"images": []}, "the example has 0 images and 1 image_ids"),
        ({"image_ids": []}, "the example has 1 images and 0 image_ids"),
        ({"image_ids": [7]}, "image_ids holds a int (7)"),
        ({"images": [torch.zeros(3, 8, 8)]}, "images holds Tensor. Give a list of bytes, paths or Pillow images"),
    ],
)
def test_an_example_that_is_none_is_told_with_its_row(changes: dict[str, Any], message: str) -> None:
    for read in (lambda: training(changes)[Pick(0, 0)], lambda: evaluation(changes)[0]):
        with pytest.raises(UserError, match=re.escape(f"toy.json:0: {message}")) as caught:
            read()
        assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize("missing", ["kind", "group", "id", "images"])
def test_a_field_that_is_missing_is_named(missing: str) -> None:
    rows: list[Any] = [{key: value for key, value in example(0).items() if key != missing}]
    with pytest.raises(UserError, match=f"toy.json:0: the example has no {missing}"):
        next(some_texts(ToySplit(rows)))
    rows[0].pop("origin")
    with pytest.raises(UserError, match="example 0: the example has no"):
        EvalExamples(ToySplit(rows), eval_transform(SPEC))[0]


def test_all_examples_have_as_many_images(collate: CollateExamples) -> None:
    pair = example(1, 2)
    samples = [EvalExamples(ToySplit([example(0), pair]), eval_transform(SPEC))[index] for index in range(2)]
    with pytest.raises(UserError, match=r"toy\.json:1: the example has 2 images, but toy\.json:0 has 1"):
        collate(samples)


class Odd(Questions):
    """Gives what it was built with as a split."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def split(self, name: str) -> Any:
        return self.given


class Method(Questions):
    """Forgets that `labels` is a property."""

    def labels(self) -> Any:  # type: ignore[override]
        return LABELS


class Short(Questions):
    """Takes no name of a split."""

    def split(self) -> Any:  # type: ignore[override]
        return ToySplit([example(0)])


class Kept(Questions):
    """Computes its labels once."""

    @cached_property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        return LABELS


def test_labels_may_be_a_cached_property() -> None:
    PairData(Kept(), SPEC, steps=1).setup("fit")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: Odd([example(0)]), "Odd.split('val'): gave a list without fingerprint"),
        (lambda: Odd(None), "Odd.split('val'): gave a NoneType without __getitem__"),
        (lambda: Odd(ToySplit([])), "Odd.split('val'): has no examples"),
        (Method, "Method.labels: is a method. Make it a property"),
        (Short, "Short.split: is called as split(name)"),
    ],
)
def test_what_is_no_split_is_told_before_anything_is_read(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        PairData(source(), SPEC, steps=1).setup("fit")
