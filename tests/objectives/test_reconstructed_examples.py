"""Filling in: pasted patches, un-normalised pixels, and guesses that are those of the evaluation."""

from typing import Any

import pytest
import torch
from toys import PATCH, SIZE, toy_backbone, toy_batch

from maskvlm.model.cross_attention import gather_positions
from maskvlm.model.heads import patchify
from maskvlm.model.init import init_xavier
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.evaluation import EVAL_SEED
from maskvlm.objectives.masking import mask_patches
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.reconstructed_examples import paste, reconstruct
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


def test_pixels_outside_the_mask_are_exactly_the_image() -> None:
    image_BCHW = torch.randn(3, 3, 32, 32)
    patch = mask_patches(torch.tensor([True, False, True]), (4, 4), 1, 0.4, Draw(5, 0, "cpu").local)
    new_BKP = torch.randn(3, patch.index_BK.shape[1], 3 * PATCH**2)
    pasted_BCHW = paste(image_BCHW, new_BKP, patch.index_BK, patch.weight_BK, PATCH)
    masked_B1HW = by_pixel(patch.mask_BN, 4)
    assert torch.equal(torch.where(masked_B1HW, image_BCHW, pasted_BCHW), image_BCHW)
    picked_BKP = gather_positions(patchify(pasted_BCHW, PATCH), patch.index_BK)
    masked_BK = patch.weight_BK > 0
    assert torch.equal(picked_BKP[masked_BK], new_BKP[masked_BK])
    values = torch.arange(12.0).view(1, 1, 12)  # two by two pixels, channel last
    pasted = paste(torch.zeros(1, 3, 4, 4), values, torch.tensor([[1]]), torch.ones(1, 1), 2)
    assert pasted[0, :, 0, 2].tolist() == [0, 1, 2]
    assert pasted[0, :, 1, 3].tolist() == [9, 10, 11]
    assert pasted[..., 2:, :].sum() == pasted[..., :2].sum() == 0


def test_errors_and_guesses_are_those_of_the_evaluation() -> None:
    backbone, task = toy()
    batch = toy_batch(5)
    _, rgb_BCHW, images, words, _ = reconstruct(backbone, task, batch, guesses=3)
    task.update(backbone, batch)
    metrics = task.compute(backbone)
    assert abs(metrics["mim/mse"] / metrics["mim/mse_wrong_text"] - 1) > 1e-3
    assert images.error_B.mean().item() == pytest.approx(metrics["mim/mse"], rel=1e-5)
    assert images.error_wrong_B.mean().item() == pytest.approx(metrics["mim/mse_wrong_text"], rel=1e-5)
    # What is seen stays, and what is masked is grey or filled.
    masked = task.mask(backbone, batch, Draw(EVAL_SEED, int(batch.index_B[0]), "cpu").local)
    mask_B3HW = by_pixel(masked.patch.mask_BN, SIZE // PATCH).expand(-1, 3, -1, -1)
    for part in images[:3]:
        assert torch.equal(part[~mask_B3HW], rgb_BCHW[~mask_B3HW])
    assert (images.masked_BCHW[mask_B3HW] == 0.5).all()
    assert not torch.equal(images.filled_BCHW, images.filled_wrong_BCHW)
    target_BK = batch.token_CT.gather(1, words.index_BK)
    for guesses, key in ((words.with_image, "mlm/accuracy"), (words.without_image, "mlm/accuracy_no_image")):
        right_BK = guesses.token_BKG[..., 0] == target_BK
        assert 100 * right_BK[words.masked_BK].float().mean().item() == pytest.approx(metrics[key])
        assert guesses.token_BKG.shape[2] == 3
        assert (guesses.probability_BKG.diff(dim=-1) <= 0).all()
    assert not torch.equal(words.with_image.probability_BKG, words.without_image.probability_BKG)
    # Without an image means the mean colour.
    blank = reconstruct(backbone, task, batch._replace(image_BCHW=torch.zeros_like(batch.image_BCHW))).words
    torch.testing.assert_close(words.without_image.probability_BKG, blank.with_image.probability_BKG)
