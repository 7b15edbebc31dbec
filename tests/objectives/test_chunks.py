"""A batch in chunks gives the losses and gradients of the whole batch."""

from typing import Any, ClassVar

import pytest
import slow_retrieval
import torch
import toy_examples
from slow_step import build, each_token_a_word, eventful_batch, gradients
from torch import Tensor
from toys import toy_batch

from maskvlm.objectives import chunks
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.pretraining_losses import Need, PretrainingLoss, Step
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import UserError

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "both masked": {"mask_both": True, "whole_word": True},
    "all six": {"weight_words": 0.5, "weight_spread": 2.0},
    "no contrast": {"weight_itc": 0.0},
    "contrast alone": {"weight_itm": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0},
    "some images masked": {"masked_image_share": 0.4},
    "texts masked twice": {"masks_per_text": 2, "masked_image_share": 0.6},
    "matching apart": {"matching_trains_encoders": False},
    "captions with words exchanged": {"exchanged_share": 0.7},
    "contrast first": {"contrast_first": 0.5},
    "encoders stand still": {"contrast_first": 0.5, "freeze_aligned": True},
    "images stand still": {"contrast_first": 0.5, "freeze_aligned": "image"},
    "images have been learned": {"image_learns": 0.5},
}


def one_step(size: int | None, settings: dict[str, Any], progress: float = 1.0, captions: int = 1) -> Any:
    """Terms and gradients, in double precision."""
    backbone, task = build(**settings)
    batch = each_token_a_word(eventful_batch()) if captions == 1 else toy_batch(8, captions=captions)
    backbone.double(), task.double()
    if size is not None:
        task.compute_in_chunks(size)
    task.run_progress = progress
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)  # the losses too, so that any difference is an error
        terms = task(backbone, batch._replace(image_BCHW=batch.image_BCHW.double()))
        sum(terms.values()).backward()
    return {name: term.detach() for name, term in terms.items()}, gradients(backbone, task), task


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_losses_and_gradients_are_those_of_the_whole_batch(variant: str, size: int) -> None:
    """Of eight pairs with a hole, the same image twice and a caption of two images."""
    terms, grads, whole = one_step(None, VARIANTS[variant])
    chunk_terms, chunk_grads, task = one_step(size, VARIANTS[variant])
    assert list(chunk_terms) == list(terms)
    torch.testing.assert_close(chunk_terms, terms, atol=1e-10, rtol=1e-10, check_dtype=False)
    assert chunk_grads.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    torch.testing.assert_close(chunk_grads, grads, atol=1e-10 * largest, rtol=1e-10)
    levels = task.chance_levels(8)
    assert levels == pytest.approx(whole.chance_levels(8))


@pytest.mark.parametrize("progress", [0.2, 0.8])
@pytest.mark.parametrize("captions", [1, 2])
def test_the_phase_of_contrast_and_several_captions_too(progress: float, captions: int) -> None:
    settings = {"contrast_first": 0.5, "contrast_patches": 0.5}
    terms, grads, _ = one_step(None, settings, progress, captions)
    chunk_terms, chunk_grads, _ = one_step(3, settings, progress, captions)
    torch.testing.assert_close(chunk_terms, terms, atol=1e-10, rtol=1e-10, check_dtype=False)
    torch.testing.assert_close(chunk_grads, grads, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"weight_itc": 0.0}, {"weight_itm": 0.0}], ids=str)
@pytest.mark.parametrize("size", [1, 3, 50])
def test_retrieval_in_chunks_is_that_of_the_whole_batch(settings: dict[str, Any], size: int) -> None:
    def step(size: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        backbone, task = slow_retrieval.build(**settings)
        backbone.double(), task.double()
        if size is not None:
            task.compute_in_chunks(size)
        batch = slow_retrieval.eventful_batch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", Tensor.double)
            terms = task(backbone, batch._replace(image_BCHW=batch.image_BCHW.double()))
            sum(terms.values()).backward()
        return {name: term.detach() for name, term in terms.items()}, gradients(backbone, task)

    (terms, grads), (chunk_terms, chunk_grads) = step(None), step(size)
    torch.testing.assert_close(chunk_terms, terms, atol=1e-10, rtol=1e-10)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    torch.testing.assert_close(chunk_grads, grads, atol=1e-10 * largest, rtol=1e-10)


def test_no_more_than_a_chunk_is_computed_at_once() -> None:
    """Forward, and once more in the backward pass; contrast alone sees all eight pairs."""
    backbone, task = build()
    task.compute_in_chunks(3)
    rows: dict[str, list[int]] = {}
    parts = {"image": backbone.image, "text": backbone.text, "cross": backbone.cross_image, "pixels": task.pixels}
    for name, part in parts.items():
        # Before the pass: a pass that is made again ends as soon as all that is needed is there.
        part.register_forward_pre_hook(lambda _, inputs, name=name: rows.setdefault(name, []).append(len(inputs[0])))
    terms = task(backbone, toy_batch(8))
    # Of each pair a masked row, its own and that of its negative.
    once = {"image": [3, 3, 2] * 2, "text": [3, 3, 3, 3, 3, 1], "cross": [9, 9, 6], "pixels": [3, 3, 2]}
    assert rows == once
    sum(terms.values()).backward()
    assert {name: sorted(counts) for name, counts in rows.items()} == {
        n: sorted(2 * counts) for n, counts in once.items()
    }


def test_what_is_kept_for_the_backward_pass_is_a_part() -> None:
    """Bytes that autograd holds between the two passes."""

    def saved_bytes(size: int | None) -> int:
        backbone, task = build()
        if size is not None:
            task.compute_in_chunks(size)
        held: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            task(backbone, toy_batch(8))
        weights = {x.untyped_storage().data_ptr() for part in (backbone, task) for x in part.parameters()}
        return sum(size for place, size in held.items() if place not in weights)

    assert saved_bytes(2) < 0.4 * saved_bytes(None)


class Doubtful(PretrainingLoss):
    """Does not say that it adds up."""

    name: ClassVar[str] = "doubtful"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MASKED_IMAGE})

    def __call__(self, heads: Any, step: Step) -> Tensor:
        return step.crossed.image_BLD.mean()


class Aligned(PretrainingLoss):
    """Of each pair the distance of its two unit vectors; reads what is compared of the step."""

    name: ClassVar[str] = "aligned"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGE, Need.TEXT})
    adds_up: ClassVar[bool] = True

    def __call__(self, heads: Any, step: Step) -> Tensor:
        own = step.contrast
        assert len(own.own_B) == len(own.excluded_BG) == len(own.text_id_Bm) == len(step.batch.valid_B)
        return (1 - (own.image_BE * own.text_BE).sum(1)).sum() / step.batch.image_BCHW.new_tensor(8.0)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_loss_that_reads_the_contrast_of_its_pairs_adds_up(size: int) -> None:
    (whole, *_), (parts, *_) = (one_step(chunk, {"losses": [Aligned(2.0)]}) for chunk in (None, size))
    torch.testing.assert_close(parts["aligned"], whole["aligned"], atol=1e-10, rtol=1e-10)


def test_a_loss_that_may_not_add_up_is_refused() -> None:
    backbone, _ = build()
    task = MaskedPretraining(mask_block=16, losses=[Doubtful()])
    with pytest.raises(UserError, match=r"model\.chunk: the loss doubtful is not known to add up"):
        LitModel(backbone, task, chunk=2)


def test_a_task_that_judges_examples_by_themselves_names_the_other_way() -> None:
    _, task = toy_examples.build("classes")
    with pytest.raises(UserError, match=r"model\.chunk: .*accumulate_grad_batches"):
        task.compute_in_chunks(2)
    with pytest.raises(UserError, match=r"model\.chunk: 0"):
        LitModel(build()[0], MaskedPretraining(mask_block=16), chunk=0)


def test_rows_in_chunks() -> None:
    assert [(rows.start, rows.stop) for rows in chunks.slices(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(rows.start, rows.stop) for rows in chunks.slices(7, None)] == [(0, 7)]
    assert list(chunks.slices(0, 3)) == []


def test_a_model_that_is_given_chunks_hands_them_on() -> None:
    task = LitModel(build()[0], MaskedPretraining(mask_block=16), chunk=5).task
    assert isinstance(task, MaskedPretraining)
    assert task.pairs_at_once == 5
