"""The retrieval task: its step against pairs one by one, its metrics against matrices, and what it passes on."""

import math
from typing import Any

import pytest
import slow_step
import torch
from slow_retrieval import Slow, build, eventful_batch
from slow_step import gradients
from torch import Tensor
from toys import WIDTH, take, toy_backbone, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.loss_functions import ContrastTargets
from maskvlm.objectives.rerank import gather_gallery, score_gallery
from maskvlm.objectives.retrieval_metrics import ranking, recall_of
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError
from tasks.retrieval.task import Retrieval, contrast_targets, sweep_ks

IMAGES = 7


def measured(task: Retrieval, backbone: MaskVLM, batch: Batch, *sizes: int) -> dict[str, float]:
    """Metrics of the batch in parts of these sizes, in evaluation mode."""
    task.eval()
    backbone.eval()
    for rows in torch.arange(len(batch.image_BCHW)).split(list(sizes)):
        part = take(batch, rows)
        captions = [c for row in rows.tolist() for c, b in enumerate(batch.owner_C.tolist()) if b == row]
        task.update(backbone, part._replace(texts=tuple(batch.texts[c] for c in captions) if batch.texts else ()))
    return task.compute(backbone)


def several() -> Batch:
    """Seven images with two captions each, from the tenth of the split on."""
    texts = tuple(f"the {n}th" for n in range(2 * IMAGES))
    return toy_batch(IMAGES, captions=2)._replace(index_B=torch.arange(IMAGES) + 10, texts=texts)


VARIANTS: dict[str, dict[str, Any]] = {
    "weighted": {"weight_itc": 0.5, "weight_itm": 2.0},
    "no contrast": {"weight_itc": 0.0},
    "contrast alone": {"weight_itm": 0.0},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_one_pass_over_everything_equals_a_pass_for_each_pair(variant: str) -> None:
    batch = eventful_batch()
    backbone, task = build(**VARIANTS[variant])
    terms = task(backbone, batch)
    sum(terms.values()).backward()
    parameters = [*backbone.named_parameters(), *task.named_parameters()]  # DDP waits for ever for one without
    assert [name for name, p in parameters if p.requires_grad != (p.grad is not None)] == []
    fast = gradients(backbone, task)
    backbone.zero_grad()
    task.zero_grad()

    slow = Slow(task, backbone, batch)
    expected = {name: getattr(slow, name)() for name in ("itc", "itm") if task.weights[name]}
    assert list(terms) == list(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], atol=1e-6, rtol=1e-5)
    torch.stack(list(expected.values())).sum().backward()
    for name, grad in gradients(backbone, task).items():
        torch.testing.assert_close(fast[name], grad, atol=2e-5 * grad.abs().max().item() + 1e-6, rtol=1e-4)


def test_negatives_are_never_the_same_image_nor_the_same_words_nor_a_hole() -> None:
    backbone, task = build()
    batch = eventful_batch()
    slow = Slow(task, backbone, batch)
    drawn: set[tuple[int, int]] = set()
    for step in range(12):
        task.set_uniform(Draw(1, step, "cpu"))
        with torch.no_grad():
            task(backbone, batch)
        for c in slow.captions:
            drawn.add((int(task.hard.image.index_B[c]), c))
        for b in slow.images:
            drawn.add((b, int(task.hard.text.index_B[b])))
    assert all(slow.negative(b, c) and b != 4 and slow.owner[c] != 4 for b, c in drawn)
    assert len(drawn) > 25


def test_columns_written_out() -> None:
    """Images 0 and 1 are one; caption 3 (of 1) says what caption 4 (of 2) says; image 3 could not be read."""
    batch = toy_batch(4, captions=2)
    text_id_C = torch.tensor([1, 2, 3, 4, 4, 5, 6, 7])
    batch = batch._replace(
        image_id_B=torch.tensor([7, 7, 8, 9]), text_id_C=text_id_C, valid_B=torch.tensor([True, True, True, False])
    )
    image, text = contrast_targets(batch)
    flags = {name: [[int(x) for x in row] for row in getattr(image, name)] for name in ContrastTargets._fields}
    assert flags["positive_BG"][:3] == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
    assert flags["excluded_BG"][:3] == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1, 1]]
    flags = {name: [[int(x) for x in row] for row in getattr(text, name)] for name in ContrastTargets._fields}
    assert flags["positive_BG"][:6] == [[1, 1, 0, 0]] * 4 + [[0, 0, 1, 0]] * 2
    assert flags["excluded_BG"][:6] == [[0, 0, 0, 1]] * 3 + [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


def test_chance_levels_written_out() -> None:
    """With two captions an image: 4 positives and 6 negatives of two images."""
    _, task = build()
    task.captions_per_image = 2.0
    itm = -0.4 * math.log(0.4) - 0.6 * math.log(0.6)
    assert task.chance_levels(6) == pytest.approx({"itc": math.log(6) + math.log(2) / 2, "itm": itm})
    one = {"itc": math.log(8), "itm": math.log(3) - 2 / 3 * math.log(2)}
    assert Retrieval().chance_levels(8) == pytest.approx(one)
    assert Retrieval(weight_itm=0.0).chance_levels(8).keys() == {"itc"}


def trained(batch: Batch, steps: int) -> tuple[MaskVLM, Retrieval]:
    """A model that has seen nothing but this batch."""
    backbone = toy_backbone()
    task = Retrieval(contrast_dim=8, rerank_k=3)
    task.build(backbone)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *task.parameters()], lr=3e-3)
    for step in range(steps):
        task.set_uniform(Draw(0, step, "cpu"))
        optimizer.zero_grad()
        sum(task(backbone, batch).values()).backward()
        optimizer.step()
    return backbone, task


@pytest.fixture(scope="module")
def halfway() -> tuple[MaskVLM, dict[str, Tensor]]:
    """A backbone and heads that know three of the seven images, so that some answers are right and some wrong."""
    backbone, task = trained(take(several(), torch.arange(3)), steps=40)
    return backbone, task.state_dict()


def task_of(halfway: tuple[MaskVLM, dict[str, Tensor]], **settings: Any) -> tuple[MaskVLM, Retrieval]:
    task = Retrieval(**{"contrast_dim": 8, "rerank_k": 4, **settings})
    task.build(halfway[0])
    task.warm_start(halfway[1])
    return halfway[0], task


STAGES = [f"retrieval/{stage}{way}_r{k}" for stage in ("itc_", "") for way in ("tr", "ir") for k in (1, 5, 10)]
OTHERS = {"retrieval/pictures", "retrieval/captions", "retrieval/itc_rsum", "retrieval/rsum", "score"}
CHANCE = {f"retrieval/{way}_r{k}_chance" for way in ("tr", "ir") for k in (1, 5, 10)}


def test_metrics_are_those_of_the_score_matrices(halfway: tuple[MaskVLM, dict[str, Tensor]]) -> None:
    backbone, task = task_of(halfway, rerank_k=100, chunk=5)
    batch = several()
    metrics = measured(task, backbone, batch, 4, 3)
    assert metrics.keys() == {*STAGES, *OTHERS, *CHANCE}
    assert task.card()["rerank_k"] == len(batch.owner_C)  # there are no 100
    assert task.card()["captions_a_picture"] == 2.0
    assert measured(task, backbone, batch, 4, 3) == metrics  # nothing is left over
    assert task.compute(backbone) == {}
    assert task.predictions == []
    task.update(backbone, batch)
    gallery = gather_gallery(task.encodings)
    assert gallery is not None
    scores = score_gallery(backbone, task.matching, gallery, None)
    relevant_BC = batch.owner_C == torch.arange(IMAGES)[:, None]
    assert scores.match_BC is not None
    for name, matrix in (("itc_", scores.contrast_BC), ("", scores.match_BC)):
        for way, ranked in (("tr", ranking(matrix, relevant_BC)), ("ir", ranking(matrix.T, relevant_BC.T))):
            for k, value in recall_of(ranked).items():
                assert metrics[f"retrieval/{name}{way}_r{k}"] == pytest.approx(value)
        six = [metrics[f"retrieval/{name}{way}_r{k}"] for way in ("tr", "ir") for k in (1, 5, 10)]
        assert metrics[f"retrieval/{name}rsum"] == pytest.approx(sum(six))
    assert metrics["score"] == (metrics["retrieval/tr_r1"] + metrics["retrieval/ir_r1"]) / 2
    assert (metrics["retrieval/pictures"], metrics["retrieval/captions"]) == (7, 14)


def test_a_sweep_gives_every_k_that_could_be_chosen(halfway: tuple[MaskVLM, dict[str, Tensor]]) -> None:
    names = ["k0", "k1", "k2", "k4", "k8", "k_all"]
    assert sweep_ks(14) == dict(zip(names, [0, 1, 2, 4, 8, 14], strict=True))
    assert sweep_ks(8) == {"k0": 0, "k1": 1, "k2": 2, "k4": 4, "k_all": 8}
    assert sweep_ks(1) == {"k0": 0, "k_all": 1}
    key = "matching.classify.weight"  # turned round, so that the more is matched the less is found
    halfway = (halfway[0], halfway[1] | {key: -halfway[1][key]})
    backbone, task = task_of(halfway, sweep=True)
    metrics = measured(task, backbone, several(), 4, 3)
    swept = {f"retrieval/{name}_{way}_r1" for name in names for way in ("tr", "ir")}
    assert metrics.keys() == {*STAGES, *OTHERS, *CHANCE, *swept}
    for k in (1, 2, 4, 8, 14):
        alone = measured(task_of(halfway, rerank_k=k)[1], backbone, several(), 4, 3)
        for way in ("tr_r1", "ir_r1"):
            assert metrics[f"retrieval/{'k_all' if k == 14 else f'k{k}'}_{way}"] == alone[f"retrieval/{way}"]
            assert metrics[f"retrieval/k0_{way}"] == alone[f"retrieval/itc_{way}"]
            assert k != 4 or metrics[f"retrieval/{way}"] == alone[f"retrieval/{way}"]
    levels = [metrics[f"retrieval/{name}_ir_r1"] for name in names]
    assert levels[0] == levels[1] > levels[2] > levels[-1]


def test_without_matching_there_is_contrast_alone() -> None:
    backbone, task = build(weight_itm=0.0, sweep=True)
    metrics = measured(task, backbone, several(), 4, 3)
    assert metrics.keys() == {*STAGES[:6], *CHANCE, *OTHERS} - {"retrieval/rsum"}
    assert metrics["score"] == (metrics["retrieval/itc_tr_r1"] + metrics["retrieval/itc_ir_r1"]) / 2
    assert len(task.predictions) == 21
    assert task.card()["rerank_k"] == 0


def test_predictions_say_what_was_found(halfway: tuple[MaskVLM, dict[str, Tensor]]) -> None:
    backbone, task = task_of(halfway)
    metrics = measured(task, backbone, several(), 4, 3)
    image = [line for line in task.predictions if line["kind"] == "image retrieval"]
    text = [line for line in task.predictions if line["kind"] == "text retrieval"]
    assert (len(image), len(text), len(task.predictions)) == (14, 7, 21)
    for n, line in enumerate(image):
        assert (line["id"], line["text"], line["truth"]) == (f"caption {n}", f"the {n}th", f"image {10 + n // 2}")
        assert line["prediction"] == f"image {line['index'][0]}"
        assert line["index"][1] == 10 + n // 2
        assert line["right"] == float(line["index"][0] == line["index"][1])
    for b, line in enumerate(text):
        assert (line["id"], line["text"], line["index"]) == (f"image {10 + b}", f"image {10 + b}", [10 + b])
        own = (f"the {2 * b}th", f"the {2 * b + 1}th")
        assert line["right"] == float(line["prediction"] in own)
        assert line["truth"] == (line["prediction"] if line["right"] else own[0])  # all are true, one is shown
    assert any(line["truth"] != f"the {2 * b}th" for b, line in enumerate(text))
    for lines, way in ((image, "ir"), (text, "tr")):
        assert 100 * sum(line["right"] or 0 for line in lines) / len(lines) == pytest.approx(
            metrics[f"retrieval/{way}_r1"]
        )
        assert len({line["right"] for line in lines}) == 2


def test_the_blind_control_does_not_see_the_images() -> None:
    batch = several()
    other = batch._replace(image_BCHW=batch.image_BCHW.flip(0))
    for blind in (True, False):
        backbone, task = build(image_ablation=blind)
        assert task.card()["blind"] is blind
        task.train()
        terms: list[Tensor] = []
        for one in (batch, other):
            task.set_uniform(Draw(7, 0, "cpu"))
            terms.append(torch.stack(list(task(backbone, one).values())))
        assert torch.allclose(terms[0], terms[1], rtol=1e-3) == blind  # statistics of the same images, summed twice
        before = measured(task, backbone, batch, 4, 3)
        assert (measured(task, backbone, other, 4, 3) == before) == blind
        torch.manual_seed(3)
        task.set_uniform(Draw(9, 9, "cpu"))
        assert measured(task, backbone, batch, 4, 3) == before  # evaluation asks every checkpoint the same


def test_heads_are_those_of_pre_training() -> None:
    _, before = slow_step.build()
    _, task = build()
    names = {name for name, _ in task.named_parameters()}
    assert task.warm_start(before.state_dict()) == names
    for name in names:
        assert torch.equal(task.state_dict()[name], before.state_dict()[name])
    # Projections of another width are the checkpoint's, unless another one is asked for.
    wide = {f"projection.{side}.weight": torch.ones(12, WIDTH) for side in ("image", "text")}
    wider = before.state_dict() | wide | {f"projection.{side}.bias": torch.ones(12) for side in ("image", "text")}
    backbone, own = toy_backbone(), Retrieval()
    own.build(backbone)
    own.warm_start(wider)
    assert own.projection.image.out_features == 12
    with pytest.raises(UserError, match="contrast_dim"):
        task.warm_start(wider)
    without = {name: value for name, value in before.state_dict().items() if "projection" not in name}
    matching = Retrieval(weight_itc=0.0)
    matching.build(backbone)
    with pytest.raises(UserError, match="weight_itc"):
        matching.warm_start(without)


def test_wrong_settings_are_named() -> None:
    wrong = {"weight_itc": -1.0, "rerank_k": 0, "chunk": 0, "rerank_contrast": -1.0, "temperature": 0.0}
    for settings in (*({name: value} for name, value in wrong.items()), {"weight_itc": 0.0, "weight_itm": 0.0}):
        with pytest.raises(UserError, match=r"model\.task"):
            Retrieval(**settings)  # type: ignore[arg-type]
