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
    "both masked": {"mask_both": True, "whole_word": True},
    "all six": {"weight_words": 0.5, "weight_spread": 2.0},
    "contrast alone": {"weight_itm": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0},
    "texts masked twice": {"masks_per_text": 2, "masked_image_share": 0.6},
    "matching apart": {"matching_trains_encoders": False},
    "captions with words exchanged": {"exchanged_share": 0.7},
    "encoders stand still": {"contrast_first": 0.5, "freeze_aligned": True},
    "images stand still": {"contrast_first": 0.5, "freeze_aligned": "image"},
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


CASES = [*((variant, 3) for variant in VARIANTS), ("all six", 50)]


@pytest.mark.parametrize(("variant", "size"), CASES)
def test_losses_and_gradients_are_those_of_the_whole_batch(variant: str, size: int) -> None:
    """Of eight pairs with a hole, the same image twice and a caption of two images."""
    terms, grads, whole = one_step(None, VARIANTS[variant])
    chunk_terms, chunk_grads, task = one_step(size, VARIANTS[variant])
    assert list(chunk_terms) == list(terms)
    torch.testing.assert_close(chunk_terms, terms, atol=1e-10, rtol=1e-10, check_dtype=False)
    assert chunk_grads.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    torch.testing.assert_close(chunk_grads, grads, atol=1e-10 * largest, rtol=1e-10)
    assert task.chance_levels(8) == pytest.approx(whole.chance_levels(8))


@pytest.mark.parametrize(("progress", "captions"), [(0.2, 1), (0.2, 2), (0.8, 2)])
def test_the_phase_of_contrast_and_several_captions_too(progress: float, captions: int) -> None:
    settings = {"contrast_first": 0.5, "contrast_patches": 0.5}
    terms, grads, _ = one_step(None, settings, progress, captions)
    chunk_terms, chunk_grads, _ = one_step(3, settings, progress, captions)
    torch.testing.assert_close(chunk_terms, terms, atol=1e-10, rtol=1e-10, check_dtype=False)
    torch.testing.assert_close(chunk_grads, grads, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"weight_itc": 0.0}, {"weight_itm": 0.0}], ids=str)
def test_retrieval_in_chunks_is_that_of_the_whole_batch(settings: dict[str, Any]) -> None:
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

    (terms, grads), (chunk_terms, chunk_grads) = step(None), step(3)
    torch.testing.assert_close(chunk_terms, terms, atol=1e-10, rtol=1e-10)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    torch.testing.assert_close(chunk_grads, grads, atol=1e-10 * largest, rtol=1e-10)


class Aligned(PretrainingLoss):
    """Of each pair the distance of its two unit vectors; reads what is compared of the step."""

    name: ClassVar[str] = "aligned"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGE, Need.TEXT})
    adds_up: ClassVar[bool] = True

    def __call__(self, heads: Any, step: Step) -> Tensor:
        own = step.contrast
        assert len(own.own_B) == len(own.excluded_BG) == len(own.text_id_Bm) == len(step.batch.valid_B)
        return (1 - (own.image_BE * own.text_BE).sum(1)).sum() / 8


class Doubtful(Aligned):
    """Does not say that it adds up."""

    name: ClassVar[str] = "doubtful"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MASKED_IMAGE})
    adds_up: ClassVar[bool] = False


def test_a_loss_of_somebody_else_adds_up_or_is_refused() -> None:
    (whole, *_), (parts, *_) = (one_step(chunk, {"losses": [Aligned(2.0)]}) for chunk in (None, 3))
    torch.testing.assert_close(parts["aligned"], whole["aligned"], atol=1e-10, rtol=1e-10)
    doubtful, examples = MaskedPretraining(mask_block=16, losses=[Doubtful()]), toy_examples.build("classes")[1]
    for make, match in (
        (lambda: LitModel(build()[0], doubtful, chunk=2), "doubtful"),
        (lambda: examples.compute_in_chunks(2), "accumulate_grad_batches"),
        (lambda: LitModel(build()[0], MaskedPretraining(mask_block=16), chunk=0), "chunk: 0"),
    ):
        with pytest.raises(UserError, match=match):
            make()


def test_rows_in_chunks() -> None:
    assert [(rows.start, rows.stop) for rows in chunks.slices(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(rows.start, rows.stop) for rows in chunks.slices(7, None)] == [(0, 7)]
    assert list(chunks.slices(0, 3)) == []
    assert LitModel(build()[0], MaskedPretraining(mask_block=16), chunk=5).task.pairs_at_once == 5
