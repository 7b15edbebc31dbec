"""Hard negatives out of earlier steps: what is kept, what may be drawn, and what they are fused with."""

from typing import Any

import pytest
import torch
from slow_step import build, eventful_batch
from toys import LENGTH, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.objectives.cross_batch import Contrast, Encoded, cross_all, matching_rows, pad_text
from maskvlm.objectives.hard_negatives import Negatives
from maskvlm.objectives.negative_queue import NegativeQueue
from maskvlm.training.resume_check import restore
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import ExitCode, UserError


def encoded_of(batch: Batch, seed: int) -> tuple[Encoded, Contrast]:
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.token_CT.shape

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator, requires_grad=True)

    image, text = random(5, 16), random(length, 16)
    excluded = torch.eye(rows, dtype=torch.bool)
    vectors = random(4), random(4)
    return Encoded(image, text, None, None), Contrast(
        *vectors, *vectors, torch.tensor(9.0), torch.arange(rows), excluded, batch.text_id_C[:, None]
    )


def whole(seed: int, rows: int = 8) -> Batch:
    return pad_text(toy_batch(rows, seed=seed), LENGTH, 1)


@pytest.mark.parametrize("size", [1, 11, 40])
def test_the_latest_pairs_are_kept_without_gradient(size: int) -> None:
    queue, pushes = NegativeQueue(size), []
    for step in range(4):
        batch = whole(step)
        encoded, contrast = encoded_of(batch, step)
        queue.push(batch, encoded, contrast)
        pushes.append((encoded.image_BLD, encoded.text_BTD, batch.attention_CT, contrast.image_BE, contrast.text_BE))
    for queued, parts in zip(queue.pairs, zip(*pushes, strict=True), strict=False):
        assert torch.equal(queued, torch.cat(parts)[-size:])
        assert not queued.requires_grad


def test_the_same_image_the_same_words_and_what_could_not_be_read_are_no_negatives() -> None:
    queue, before, now = NegativeQueue(20), pad_text(eventful_batch(), LENGTH, 1), whole(3)
    now = now._replace(image_id_B=now.image_id_B.clone(), text_id_C=now.text_id_C.clone())
    now.image_id_B[2], now.text_id_C[5] = before.image_id_B[6], before.text_id_C[2]
    assert queue.append_to(encoded_of(now, 1)[1], now).excluded_BG.shape == (8, 8)  # nothing is kept yet
    queue.push(before, *encoded_of(before, 0))
    contrast = encoded_of(now, 1)[1]
    wide = queue.append_to(contrast, now)
    assert torch.equal(wide.text_GE, torch.cat([contrast.text_GE, queue.pairs.text_QE]))
    assert torch.equal(wide.image_GE, torch.cat([contrast.image_GE, queue.pairs.image_QE]))
    for row in range(8):
        for earlier in range(8):
            same = now.image_id_B[row] == before.image_id_B[earlier] or now.text_id_C[row] == before.text_id_C[earlier]
            assert wide.excluded_BG[row, 8 + earlier] == (same or not before.valid_B[earlier]), (row, earlier)
    assert torch.equal(wide.excluded_BG[:, :8], contrast.excluded_BG)
    assert wide.excluded_BG[2, 14]
    assert wide.excluded_BG[5, 10:12].all()  # a caption of two images
    assert wide.excluded_BG[:, 12].all()  # the hole


@pytest.mark.parametrize("mask_both", [False, True])
def test_a_negative_of_the_queue_is_fused_as_one_of_the_batch(mask_both: bool) -> None:
    backbone, task = build(mask_both=mask_both, masks_per_text=2, negative_queue=8)
    before, now = whole(0), whole(1)
    with torch.no_grad():
        earlier = task.encode(backbone, before, task.mask(backbone, before, task.uniform, True))
        task.queue.push(before, earlier, task.contrast(before, earlier))
        encoded = task.encode(backbone, now, task.mask(backbone, now, task.uniform, True))
        texts, images = torch.tensor([8, 15, 3, 9, 0, 12, 4, 10]), torch.tensor([11, 1, 14, 8, 13, 2, 15, 0])
        negatives = Negatives(texts, torch.ones(8)), Negatives(images, torch.ones(8))
        pairs = task.queue.pairs
        features = (encoded.image_BLD, encoded.text_BTD, now.attention_CT)
        matched, weighted = matching_rows(*features, negatives, pairs)
        assert all(each.weight_B.all() for each in weighted)
        crossed = cross_all(backbone, encoded, now.attention_CT, matched, (True, True), mask_both, 8)
        plain = cross_all(backbone, encoded, now.attention_CT, None, (True, True), mask_both, 8)
        image, text = (torch.cat(x) for x in zip(encoded[:2], earlier[:2], strict=True))
        attention = torch.cat([now.attention_CT, before.attention_CT])
        own = torch.arange(8)
        rows, columns = torch.cat([own, own, images]), torch.cat([own, texts, own])
        fused = backbone.fuse(image[rows], text[columns], attention[columns])
    torch.testing.assert_close(crossed.fused_M.product_MD, fused.product_MD, atol=1e-5, rtol=1e-5)
    there = now.attention_CT.repeat_interleave(2, 0)  # features at padding mean nothing
    torch.testing.assert_close(crossed.text_BTD[there], plain.text_BTD[there], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(crossed.image_BLD, plain.image_BLD, atol=1e-5, rtol=1e-5)


def test_a_step_draws_from_earlier_ones_once_all_losses_count() -> None:
    backbone, task = build(negative_queue=24, contrast_first=0.5)
    task.run_progress = 0.4
    task(backbone, whole(0))
    assert task.queue.pairs is None
    task.run_progress, drawn = 0.6, []
    for step in range(12):
        terms = task(backbone, whole(step))
        assert all(term.isfinite() for term in terms.values())
        drawn += [index for each in task.last_negatives for index in each.index_B.tolist()]
    assert max(drawn) >= 24  # 8 of the batch, up to 24 kept
    assert len(task.queue.pairs.valid_Q) == 24
    sum(terms.values()).backward()
    task.eval()
    last = task.queue.pairs.image_QLD
    task(backbone, whole(20))
    assert torch.equal(task.queue.pairs.image_QLD, last)  # evaluation leaves it alone


@pytest.mark.parametrize("part", ["image_BLD", "text_BTD", "image_BE", "text_BE"])
def test_a_step_that_overflowed_does_not_spoil_those_after_it(part: str) -> None:
    queue, batch = NegativeQueue(8), whole(0)
    encoded, contrast = encoded_of(batch, 0)
    with torch.no_grad():
        getattr(encoded if part in encoded._fields else contrast, part)[3:] = float("nan")
    queue.push(batch, encoded, contrast)
    assert queue.pairs.valid_Q.tolist() == [True] * 3 + [False] * 5


def test_what_is_kept_fits_and_brings_it_back() -> None:
    """Whether contrast is learned or not; copies, as a view would write its whole storage."""
    for weight_itc in (0.0, 1.0):
        backbone, task = build(negative_queue=3, weight_itc=weight_itc)
        assert task.resume_state() == {}
        task(backbone, whole(0))
        state = task.resume_state()
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
        _, again = build(backbone, negative_queue=3, weight_itc=weight_itc)
        again.load_state_dict(task.state_dict())
        again.load_resume_state(state)
        for one in (task, again):
            one.set_uniform(Draw(1, 5, "cpu"))
        expected, terms = task(backbone, whole(4)), again(backbone, whole(4))
        assert all(torch.equal(expected[name], terms[name]) for name in expected)
    build()[1].load_resume_state(state)  # a run without one has no use for it
    assert build(weight_itm=0.0, negative_queue=8)[1].queue is None  # nor has one without matching


def test_a_kept_pair_with_one_of_the_captions_is_no_negative() -> None:
    """Whichever of its captions."""
    queue, batch = NegativeQueue(8), whole(0)
    encoded, contrast = encoded_of(batch, 0)
    own = torch.stack([torch.arange(8), torch.arange(100, 108)], 1)
    queue.push(batch, encoded, contrast._replace(text_id_Bm=own))
    now = whole(1)._replace(image_id_B=torch.arange(1000, 1008))
    other = torch.stack([torch.arange(200, 208), torch.arange(300, 308)], 1)
    other[3, 1] = 105  # the second caption of what is kept in place 5
    wide = queue.append_to(encoded_of(now, 1)[1]._replace(text_id_Bm=other), now)
    assert wide.excluded_BG[:, 8:].nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("valid_Q"),
        lambda s: s.update(valid_Q=s["valid_Q"][:3]),
        lambda s: s.update({name: value.repeat_interleave(2, 0) for name, value in s.items()}),
        lambda s: s.update(image_QE=s["image_QE"].int()),
    ],
)
def test_a_damaged_one_is_refused(change: Any) -> None:
    backbone, task = build(negative_queue=12)
    task(backbone, whole(0))
    state = task.resume_state()
    change(state)
    with pytest.raises(UserError, match=r"last\.ckpt: task_state: ") as error:
        restore(build(negative_queue=12)[1], state, "last.ckpt")
    assert error.value.code == ExitCode.BAD_DATA
    with pytest.raises(UserError, match=r"last\.ckpt"):
        restore(build(negative_queue=12)[1], {"image_QLD": 1}, "last.ckpt")
