"""A masking of images that masks the middle, and one of texts that masks the last words."""

import torch
from torch import Tensor

from maskvlm.objectives.masking import (
    ImageMasking,
    PatchMask,
    TextMasking,
    Texts,
    TokenMask,
    Uniform,
    Vocabulary,
    positions,
)


class Middle(ImageMasking):
    """All but a margin of so many patches."""

    def __init__(self, margin: int = 1) -> None:
        self.margin = margin

    def __call__(
        self, valid_B: Tensor, grid: tuple[int, int], patch_size: int, uniform: Uniform, training: bool
    ) -> PatchMask:
        mask = torch.zeros(grid, dtype=torch.bool, device=valid_B.device)
        mask[self.margin : grid[0] - self.margin, self.margin : grid[1] - self.margin] = True
        mask_BN = mask.flatten() & valid_B[:, None]
        masked = int(mask.sum())
        return PatchMask(mask_BN, *positions(mask_BN, masked), mask.numel() - masked)


class LastWords(TextMasking):
    """So many words at the end of each text."""

    def __init__(self, count: int = 2) -> None:
        self.count = count

    def __call__(self, texts: Texts, vocabulary: Vocabulary, uniform: Uniform) -> TokenMask:
        from_end_CT = (~texts.special_CT).flip(1).cumsum(1).flip(1)
        mask_CT = ~texts.special_CT & (from_end_CT <= self.count)
        masked_CT = texts.token_CT.masked_fill(mask_CT, vocabulary.mask_id)
        return TokenMask(masked_CT, mask_CT, *positions(mask_CT, self.count))
