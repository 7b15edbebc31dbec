"""Deciding among labels: images run one by one, weights of what could not be read, what is frozen and refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_examples import LABELS, example_batch, matters, take_examples
from toys import WIDTH, toy_backbone

from maskvlm.data.examples import ExampleBatch
from maskvlm.model.features import FrozenBlocks
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.classification import Classification, encode_and_fuse
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError


def build(images: int = 1, **settings: Any) -> tuple[MaskVLM, Classification]:
    """In double precision, with weights that matter."""
    backbone, task = toy_backbone(), Classification(LABELS, images, **settings)
    task.build(backbone)
    matters(backbone, task)
    task.set_uniform(Draw(7, 0, "cpu"))
    return backbone.double(), task.double()


def noise(rows: int = 5, images: int = 1, **settings: Any) -> ExampleBatch:
    batch = example_batch(rows, images, **settings)
    return batch._replace(image_BPCHW=batch.image_BPCHW.double(), target_BK=batch.target_BK.double())


@pytest.mark.parametrize("images", [1, 3])
def test_several_images_are_single_ones_side_by_side(images: int) -> None:
    """Each example and image by itself, its text without padding, through the backbone's own parts."""
    backbone, task = build(images)
    batch = noise(4, images)
    fused_BX = encode_and_fuse(backbone, batch.image_BPCHW, batch.token_BT, batch.attention_BT).fused_BX
    assert fused_BX.shape == (4, images * 3 * WIDTH)
    for row in range(4):
        token_1T = batch.token_BT[row, batch.attention_BT[row]][None]
        there_1T = torch.ones_like(token_1T, dtype=torch.bool)
        text_1TD = backbone.text(token_1T, there_1T)
        parts = []
        for place in range(images):
            image_1LD = backbone.image(batch.image_BPCHW[row, place][None])
            fused = backbone.fuse(image_1LD, text_1TD, there_1T)
            parts += [fused.image_MD[0], fused.text_MD[0], fused.image_MD[0] * fused.text_MD[0]]
        torch.testing.assert_close(fused_BX[row], torch.cat(parts), atol=1e-11, rtol=1e-9)
        logits_K = task.head(torch.cat(parts)[None])[0]
        torch.testing.assert_close(task.logits(backbone, batch, task.uniform)[row], logits_K, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------- the scores of pre-training


def pretrained(seed: int = 3, dim: int = 8, **settings: Any) -> tuple[MaskVLM, MaskedPretraining]:
    """Pre-training's heads, with weights that matter."""
    backbone, task = toy_backbone(), MaskedPretraining(contrast_dim=dim, mask_block=16, decoder_layers=1, **settings)
    task.build(backbone)
    torch.manual_seed(seed)
    matters(backbone, task)
    return backbone, task


@pytest.mark.parametrize(("dim", "reads", "images"), [(256, "class", 1), (8, "class_and_mean", 2)])
def test_a_head_may_read_the_text_and_what_pre_training_says_of_each_image_with_it(
    dim: int, reads: str, images: int
) -> None:
    backbone, before = pretrained(dim=dim, contrast_reads=reads)
    task = Classification(LABELS, images, reads="scores")
    task.build(backbone)
    task.set_uniform(Draw(7, 0, "cpu"))
    warm_started = task.warm_start(before.state_dict())
    assert {name.partition(".")[0] for name in warm_started} == {"projection", "matching"}
    batch = example_batch(4, images)
    read: list[Any] = []
    task.head.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    task.logits(backbone, batch, task.uniform)
    text_BTD = backbone.text(batch.token_BT, batch.attention_BT)
    rows = zip(text_BTD, batch.attention_BT.sum(1).tolist(), strict=True)
    parts = [text_BTD[:, 0], torch.stack([text_TD[:length].mean(0) for text_TD, length in rows])]
    for place in range(images):
        image_BLD = backbone.image(batch.image_BPCHW[:, place])
        fused = backbone.fuse(image_BLD, text_BTD, batch.attention_BT)
        embedded_BE = before.projection.embed_text(text_BTD, batch.attention_BT)
        cosine_B = (before.projection.embed_image(image_BLD) * embedded_BE).sum(1)
        p_B = before.matching(fused.product_MD).softmax(1)[:, 1]
        parts += [torch.stack([cosine_B * before.projection.logit_scale, p_B.logit()], 1)]
    torch.testing.assert_close(read[0], torch.cat(parts, 1), atol=1e-4, rtol=1e-4)
    task(backbone, batch)["classification"].backward()
    trained = {name.partition(".")[0] for name, p in task.named_parameters() if p.grad is not None}
    assert trained == {"head"}
    for part in (backbone.text, backbone.cross_image, backbone.cross_text):
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_kept_features_are_those_of_each_image(tmp_path: Path) -> None:
    """Read from the disk at the second look, for every image of every example; a hole is not kept."""
    images = 2
    backbone, task = toy_backbone().train(), Classification(LABELS, images)
    task.build(backbone)
    task.set_uniform(Draw(7, 0, "cpu"))
    batch = example_batch(4, images, holes=(2,))
    expected_BK = task.logits(backbone, batch, task.uniform)
    backbone.image.frozen_blocks = FrozenBlocks(backbone.image.vit, 1, str(tmp_path))
    backbone.image.frozen_blocks.open_cache("data", 4 * images)
    feature_cache = backbone.image.frozen_blocks.cache
    for _ in range(2):
        torch.testing.assert_close(task.logits(backbone, batch, task.uniform), expected_BK)
    whole = [0, 1, 3]
    assert feature_cache.written_R.reshape(4, images).all(1).nonzero()[0].tolist() == whole
    blank = batch._replace(image_BPCHW=torch.zeros_like(batch.image_BPCHW))
    logit_BK = task.logits(backbone, blank, task.uniform)  # what is kept is read, the images are not looked at
    torch.testing.assert_close(logit_BK[whole], expected_BK[whole])


@pytest.mark.parametrize("holes", [(0, 3), (0, 1, 2, 3, 4)])
def test_what_could_not_be_read_weighs_nothing(holes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    backbone, task = build()
    batch = noise(holes=holes)
    readable = [row for row in range(5) if row not in holes]
    loss = task(backbone, batch)["classification"]
    terms = []
    for row in readable:
        logits_1K = task.logits(backbone, take_examples(batch, row, row + 1), task.uniform)
        terms.append(-logits_1K.log_softmax(1)[0, row % 3].item())
    assert loss.item() == pytest.approx(sum(terms) / len(terms) if terms else 0.0, rel=1e-9)
    loss.backward()
    gradients = [parameter.grad for parameter in task.head.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(task.head.parameters()))
    assert any(gradient.any() for gradient in gradients) == bool(readable)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    named = [*backbone.named_parameters(), *task.named_parameters()]
    assert {name for name, parameter in named if parameter.grad is None} == {"image.mask_token"}


def test_measured_by_hand() -> None:
    backbone, task = build()
    task.eval()
    batch = noise(6)
    unknown = {**batch.examples[5], "answers": []}
    batch = batch._replace(examples=(*batch.examples[:5], unknown))
    predictions = [LABELS[n] for n in task.logits(backbone, batch, task.uniform).argmax(1).tolist()]
    for first, last in ((4, 6), (0, 4)):
        task.update(backbone, take_examples(batch, first, last))
    metrics = task.compute(backbone)
    right = [float(predictions[row] == LABELS[row % 3]) for row in range(5)]
    assert 0 < sum(right) < 5, "choose another seed"
    assert metrics == pytest.approx(
        {
            "classification/accuracy": 100 * sum(right) / 5,
            "classification/accuracy_majority": 100 * 2 / 5,  # even: red, blue, green; odd: green, red
            "classification/accuracy/even": 100 * (right[0] + right[2] + right[4]) / 3,
            "classification/accuracy/odd": 100 * (right[1] + right[3]) / 2,
            "classification/accuracy/even_majority": 100 / 3,
            "classification/accuracy/odd_majority": 100 / 2,
            "classification/examples": 6.0,
            "score": 100 * sum(right) / 5,
        }
    )
    assert [one["prediction"] for one in task.predictions] == predictions
    assert [one["right"] for one in task.predictions] == [*right, None]
    assert task.compute(backbone)["classification/examples"] == 0
    assert task.predictions == []


def test_targets_answers_levels_and_card() -> None:
    task = Classification(LABELS, images_per_example=2, image_ablation=True)
    logits_1K = torch.tensor([[0.5, -1.0, 2.0]])
    log = logits_1K.log_softmax(1)[0]
    soft = task.loss(logits_1K, torch.tensor([[0.25, 0.0, 0.75]]))  # weighs its labels
    assert soft.item() == pytest.approx(-(0.25 * log[0] + 0.75 * log[2]).item())
    assert task.loss(logits_1K, torch.zeros(1, 3)).item() == 0  # nobody published an answer
    cases: list[tuple[str, list[str]]] = [("red", ["red"]), ("red", ["Red"]), ("red", ["blue", "red"]), ("red", [])]
    assert [task.correct(*case) for case in cases] == [1.0, 0.0, 0.0, None]
    assert task.chance_levels(8) == pytest.approx({"classification": math.log(3)})
    assert task.card() == {"labels": 3, "pictures": 2, "blind": True, "reads": "fused"}
    _, task = build(2, hidden=7)
    shapes = [tuple(value.shape) for value in task.head.state_dict().values() if value.ndim == 2]
    assert shapes == [(7, 2 * 3 * WIDTH), (3, 7)]


def scores_without_matching() -> None:
    """`scores` from a checkpoint without the head of matching."""
    backbone, before = pretrained(weight_itm=0.0)
    task = Classification(LABELS, reads="scores")
    task.build(backbone)
    task.warm_start(before.state_dict())


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Classification(None), "data.source: it has no labels"),
    (lambda: Classification([1, 2]), r"labels: \[1, 2\]"),
    (lambda: Classification(["a", "b", "a"]), "labels: 'a' is given 2 times"),
    (lambda: Classification(LABELS, images_per_example=0), "images_per_example: 0"),
    (scores_without_matching, r"reads: scores.* matching\.classify\.weight"),
    (lambda: build(1)[1](toy_backbone().double(), noise(2, 2)), "images_per_example: the data has 2"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_what_cannot_be_is_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()
