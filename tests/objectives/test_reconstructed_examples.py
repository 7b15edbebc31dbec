"""Filling in: pasted patches, un-normalised pixels, and guesses that are those of the evaluation."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import PATCH, SIZE, toy_backbone, toy_batch

from maskvlm.model.cross_attention import gather_positions
from maskvlm.model.heads import patchify
from maskvlm.model.init import init_xavier
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.evaluation import EVAL_SEED
from maskvlm.objectives.masking import mask_patches
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.reconstructed_examples import denormalise, paste, reconstruct, subsample, to_rgb
from maskvlm.utils.distributed import Draw


def toy(**settings: Any) -> tuple[MaskVLM, MaskedPretraining]:
    backbone = toy_backbone()
    task = MaskedPretraining(mask_block=PATCH, decoder_layers=1, contrast_dim=8, **settings)
    task.build(backbone)
    for part in (backbone.cross_image, backbone.cross_text, task):
        init_xavier(part)  # a fresh model hardly looks at its partner
    return backbone.eval(), task.eval()


def by_pixel(mask_BN: torch.Tensor, side: int) -> torch.Tensor:
    """The mask of patches as a mask of pixels, [B, 1, H, W]."""
    grid = mask_BN.unflatten(1, (side, side))[:, None]
    return grid.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


# ---------------------------------------------------------------------- pasting


@given(st.integers(0, 100), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_pixels_outside_the_mask_are_exactly_the_image(seed: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    image_BCHW = torch.randn(3, 3, 32, 32, generator=generator)
    valid_B = torch.tensor([True, False, True])
    patch = mask_patches(valid_B, (4, 4), 1, ratio, Draw(seed, 0, "cpu").local)
    new_BKP = torch.randn(3, patch.index_BK.shape[1], 3 * PATCH**2, generator=generator)
    pasted_BCHW = paste(image_BCHW, new_BKP, patch.index_BK, patch.weight_BK, PATCH)
    masked_B1HW = by_pixel(patch.mask_BN, 4)
    assert torch.equal(torch.where(masked_B1HW, image_BCHW, pasted_BCHW), image_BCHW)
    picked_BKP = gather_positions(patchify(pasted_BCHW, PATCH), patch.index_BK)
    masked_BK = patch.weight_BK > 0
    assert torch.equal(picked_BKP[masked_BK], new_BKP[masked_BK])


def test_one_patch_is_replaced_where_it_stands() -> None:
    image_BCHW = torch.zeros(1, 3, 4, 4)
    values = torch.arange(12.0).view(1, 1, 12)  # two by two pixels, channel last
    pasted = paste(image_BCHW, values, torch.tensor([[1]]), torch.ones(1, 1), 2)
    assert pasted[0, :, 0, 2].tolist() == [0, 1, 2]
    assert pasted[0, :, 1, 3].tolist() == [9, 10, 11]
    assert pasted[..., 2:, :].sum() == pasted[..., :2].sum() == 0


def test_normalised_patches_are_brought_back_by_their_own_statistics() -> None:
    _, task = toy(pixel_norm=True)
    image_BCHW = torch.randn(2, 3, SIZE, SIZE) * 3 + 1
    index_BK = torch.tensor([[0, 5], [3, 15]])
    target_BKP = task.pixel_target(image_BCHW, index_BK)
    true_BKP = gather_positions(patchify(image_BCHW, PATCH), index_BK)
    torch.testing.assert_close(denormalise(target_BKP, true_BKP), true_BKP)


def test_rgb_undoes_the_normalisation_and_cuts() -> None:
    backbone = toy_backbone()
    mean, std = (torch.tensor(x)[:, None, None] for x in (backbone.image.mean, backbone.image.std))
    rgb_BCHW = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(to_rgb(backbone, (rgb_BCHW - mean) / std), rgb_BCHW)
    assert to_rgb(backbone, torch.full((1, 3, 2, 2), 1e3)).max() == 1
    assert to_rgb(backbone, torch.full((1, 3, 2, 2), -1e3)).min() == 0


# ---------------------------------------------------------------------- choosing


def test_few_are_spread_over_the_batch_with_one_caption_each() -> None:
    batch = toy_batch(10, captions=3)
    chosen = subsample(batch, 4)
    assert chosen.index_B.tolist() == [0, 2, 5, 7]
    assert torch.equal(chosen.image_BCHW, batch.image_BCHW[[0, 2, 5, 7]])
    rows = [0, 3 * 2 + 2, 3 * 5 + 2, 3 * 7 + 1]  # caption (index mod 3)
    longest = chosen.token_CT.shape[1]
    assert torch.equal(chosen.token_CT, batch.token_CT[rows, :longest])
    assert not batch.attention_CT[rows, longest:].any()
    assert chosen.attention_CT[:, -1].any()
    assert chosen.owner_C.tolist() == [0, 1, 2, 3]
    assert torch.equal(chosen.text_id_C, batch.text_id_C[rows])


def test_few_takes_all_where_there_are_not_enough() -> None:
    assert subsample(toy_batch(3), 12).index_B.tolist() == [0, 1, 2]


# ---------------------------------------------------------------------- filling in


def test_errors_are_those_of_the_evaluation() -> None:
    backbone, task = toy()
    batch = toy_batch(5)
    images = reconstruct(backbone, task, batch).images
    assert images is not None
    task.update(backbone, batch)
    metrics = task.compute(backbone)
    assert abs(metrics["mim/mse"] / metrics["mim/mse_wrong_text"] - 1) > 1e-3
    assert images.error_B.mean().item() == pytest.approx(metrics["mim/mse"], rel=1e-5)
    assert images.error_wrong_B.mean().item() == pytest.approx(metrics["mim/mse_wrong_text"], rel=1e-5)


def test_guesses_are_those_of_the_evaluation() -> None:
    backbone, task = toy()
    batch = toy_batch(5)
    words = reconstruct(backbone, task, batch, guesses=3).words
    assert words is not None
    task.update(backbone, batch)
    metrics = task.compute(backbone)
    target_BK = batch.token_CT.gather(1, words.index_BK)
    for guesses, key in ((words.with_image, "mlm/accuracy"), (words.without_image, "mlm/accuracy_no_image")):
        right_BK = guesses.token_BKG[..., 0] == target_BK
        assert 100 * right_BK[words.masked_BK].float().mean().item() == pytest.approx(metrics[key])
        assert guesses.token_BKG.shape[2] == 3
        assert (guesses.probability_BKG.diff(dim=-1) <= 0).all()
    assert not torch.equal(words.with_image.probability_BKG, words.without_image.probability_BKG)


def test_without_an_image_means_the_mean_colour() -> None:
    backbone, task = toy()
    batch = toy_batch(4)
    words = reconstruct(backbone, task, batch).words
    blank = reconstruct(backbone, task, batch._replace(image_BCHW=torch.zeros_like(batch.image_BCHW))).words
    assert words is not None
    assert blank is not None
    torch.testing.assert_close(words.without_image.probability_BKG, blank.with_image.probability_BKG)
    assert torch.equal(words.without_image.token_BKG, blank.with_image.token_BKG)


def test_what_is_seen_stays_and_what_is_masked_is_grey_or_filled() -> None:
    backbone, task = toy()
    batch = toy_batch(4)
    result = reconstruct(backbone, task, batch)
    assert result.images is not None
    masked = task.mask(backbone, batch, Draw(EVAL_SEED, int(batch.index_B[0]), "cpu").local)
    assert masked.patch is not None
    mask_B1HW = by_pixel(masked.patch.mask_BN, SIZE // PATCH).expand(-1, 3, -1, -1)
    for part in result.images[:3]:
        assert torch.equal(part[~mask_B1HW], result.image_BCHW[~mask_B1HW])
    assert (result.images.masked_BCHW[mask_B1HW] == 0.5).all()
    assert not torch.equal(result.images.filled_BCHW, result.images.filled_wrong_BCHW)


def test_normalised_predictions_are_pasted_as_pixels() -> None:
    backbone, task = toy(pixel_norm=True)
    batch = toy_batch(2)._replace(image_BCHW=torch.full((2, 3, SIZE, SIZE), 0.7))
    result = reconstruct(backbone, task, batch)
    assert result.images is not None  # a patch of one value has no deviation: any prediction is its mean
    torch.testing.assert_close(result.images.filled_BCHW, result.image_BCHW, atol=3e-3, rtol=0)


def test_a_loss_that_is_off_leaves_its_half_out() -> None:
    backbone, task = toy(weight_mim=0.0, mask_both=True)
    assert reconstruct(backbone, task, toy_batch(3)).images is None
    backbone, task = toy(weight_mlm=0.0)
    assert reconstruct(backbone, task, toy_batch(3)).words is None
