"""Captioning: its loss against a loop over tokens, what it takes over, what it writes and how that is measured.

Shapes: B images, C captions, S tokens, V vocabulary.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import slow_step
import torch
from torch import Tensor
from toy_examples import matters
from toy_pretrained import saved, toy_model
from toys import slow_causal_block, take, toy_backbone, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import ExitCode, UserError
from tasks.captioning.metrics import caption_metrics, cider_of_images
from tasks.captioning.task import Captioning, caption_images

TEXTS = ("a red circle", "a blue star on the left", "two things", "a green ring", "a cross", "red", "on white")
METRICS = [f"captioning/{name}" for name in ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4")]


def build(**settings: Any) -> tuple[MaskVLM, Captioning]:
    backbone, task = toy_backbone(), Captioning(**settings)
    task.build(backbone)
    matters(backbone, task)
    task.set_uniform(Draw(7, 0, "cpu"))
    return backbone, task


def writer(**settings: Any) -> tuple[MaskVLM, Captioning]:
    """With a tokenizer, and words of which several are likely."""
    backbone, task, _ = toy_model("captioning", **settings)
    assert isinstance(task, Captioning)
    task.writer.tokens.vocabulary.weight.data *= 0.2
    return backbone, task


def written_about(rows: int = 7, captions: int = 2) -> Batch:
    """Images with captions as an evaluation has them, from the tenth of the split on."""
    texts = tuple(f"{TEXTS[n % 7]} {n}" for n in range(rows * captions))
    return toy_batch(rows, captions=captions)._replace(index_B=torch.arange(rows) + 10, texts=texts)


def measured(task: Captioning, backbone: MaskVLM, batch: Batch, *sizes: int) -> dict[str, float]:
    """Metrics of the batch in parts of these sizes, the last one first."""
    task.eval()
    for rows in reversed(torch.arange(len(batch.image_BCHW)).split(list(sizes))):
        texts = tuple(batch.texts[c] for row in rows.tolist() for c, b in enumerate(batch.owner_C.tolist()) if b == row)
        task.update(backbone, take(batch, rows)._replace(texts=texts))
    return task.compute(backbone)


def slow_nats(backbone: MaskVLM, task: Captioning, batch: Batch, caption: int) -> list[Tensor]:
    """Of each token of a caption, end token included; later tokens do not exist."""
    token_S = batch.token_CT[caption, batch.attention_CT[caption]]
    image_LD = backbone.image(batch.image_BCHW[batch.owner_C[caption]][None])[0]
    nats = []
    for at in range(1, len(token_S)):
        prefix_S = token_S[:at]
        x = task.writer.norm(backbone.text.model.get_input_embeddings()(prefix_S) + task.writer.position_SD[:at])
        for number in range(len(task.writer.decoder.blocks)):
            x = slow_causal_block(task.writer.decoder.blocks[number], x, image_LD)
        nats.append(-task.writer.tokens(x[-1]).log_softmax(0)[token_S[at]])
    return nats


@pytest.mark.parametrize(("captions", "holes"), [(1, ()), (2, (1,))])
def test_the_loss_is_the_mean_over_all_tokens(captions: int, holes: tuple[int, ...]) -> None:
    """What could not be read weighs nothing."""
    backbone, task = build()
    batch = toy_batch(3, captions=captions, holes=holes)
    loss = task(backbone, batch)["captioning"]
    read = [c for c, row in enumerate(batch.owner_C.tolist()) if row not in holes]
    nats = [value for c in read for value in slow_nats(backbone, task, batch, c)]
    assert loss.item() == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)
    loss.backward()
    parameters = [*backbone.named_parameters(), *task.named_parameters()]  # DDP waits for ever for one without
    assert [name for name, p in parameters if p.requires_grad != (p.grad is not None)] == []


def test_it_starts_from_pre_training_or_its_own_checkpoint() -> None:
    _, before = slow_step.build()
    backbone, task = toy_backbone(seed=3), Captioning()
    task.build(backbone)
    names = task.warm_start(before.state_dict())
    own = task.state_dict()
    for end in ("weight", "bias"):
        assert torch.equal(own[f"writer.tokens.vocabulary.{end}"], before.state_dict()[f"tokens.vocabulary.{end}"])
    for name, value in backbone.cross_text.state_dict().items():
        assert torch.equal(own[f"writer.decoder.{name}"], value), name
    new = {"writer.position_SD", "writer.norm.weight", "writer.norm.bias"}
    assert names == own.keys() - new
    _, before = build()
    assert task.warm_start(before.state_dict()) == set(own)
    assert all(torch.equal(task.state_dict()[name], value) for name, value in before.state_dict().items())


def test_metrics_are_those_of_what_was_written() -> None:
    backbone, task = writer()
    batch = written_about()
    metrics = measured(task, backbone, batch, 4, 3)
    assert metrics.keys() == {*METRICS, *(f"{name}_majority" for name in METRICS), "captioning/examples", "score"}
    lines = task.predictions
    references = [list(batch.texts[2 * row : 2 * row + 2]) for row in range(7)]
    for row, line in enumerate(lines):
        assert (line["id"], line["text"], line["index"]) == (f"image {10 + row}", f"image {10 + row}", [10 + row])
        assert (line["truth"], line["right"], line["kind"]) == (references[row][0], None, "")
    written = [line["prediction"] for line in lines]
    assert len(set(written)) > 1
    assert not any("[" in text for text in written)
    for name, value in caption_metrics(written, references).items():
        assert metrics[f"captioning/{name}"] == pytest.approx(value)
    each = cider_of_images(written, references)
    assert [line.get("measured") for line in lines] == [{"cider": pytest.approx(value)} for value in each]
    usual = task.card()["the most frequent caption"]
    assert usual == "a red circle 0"
    for name, value in caption_metrics([usual] * 7, references).items():
        assert metrics[f"captioning/{name}_majority"] == pytest.approx(value)
    assert metrics["score"] == metrics["captioning/cider"]
    assert metrics["captioning/examples"] == 7.0
    assert measured(task, backbone, batch, 7) == pytest.approx(metrics)  # in other batches
    assert task.compute(backbone) == {}
    assert task.predictions == []


def test_the_blind_control_does_not_see_the_images() -> None:
    batch = written_about()
    other = batch._replace(image_BCHW=batch.image_BCHW.flip(0))
    for blind in (True, False):
        backbone, task = writer(image_ablation=blind)
        assert task.card()["blind"] is blind
        measured(task, backbone, batch, 4, 3)
        written = [line["prediction"] for line in task.predictions]
        measured(task, backbone, other, 4, 3)
        assert ([line["prediction"] for line in task.predictions] == written) == blind
        task.train()
        terms = []
        for one in (batch, other):
            task.set_uniform(Draw(7, 0, "cpu"))
            terms.append(task(backbone, one)["captioning"])
        assert torch.allclose(*terms, rtol=1e-3) == blind  # statistics of the same images, summed twice


def test_no_beams_and_no_metrics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        Captioning(beams=0)
    assert caught.value.where == "model.task.beams"
    monkeypatch.setitem(sys.modules, "aac_metrics.functional", None)
    backbone, task = writer()
    for call in (task, task.update):  # before the first step, not after a run of hours
        with pytest.raises(UserError, match="aac-metrics cannot be used") as caught:
            call(backbone, written_about())
        assert caught.value.code == ExitCode.UNAVAILABLE


def test_a_fine_tuned_model_captions_with_its_decoder(tmp_path: Path) -> None:
    saved(tmp_path / "last.ckpt", "captioning", beams=2)
    model: Any = PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt")
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator) for _ in range(3)]
    assert model.task.beams == 2
    model.batch_size = 2
    answers = caption_images(model.task, model, [(image,) for image in images])
    assert all(0 < answer.probability <= 1 for answer in answers)
    assert model.caption(images) == [answer.caption for answer in answers]
    assert model.caption(images[0]) == answers[0].caption
    assert model.caption([]) == []
    with pytest.raises(UserError, match="no head for it"):
        model.match(images[0], "a star")
