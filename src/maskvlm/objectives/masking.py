"""Masking of patches and words: pure functions that are passed their random numbers, and the classes that configs
name. To add your own masking, subclass `ImageMasking` or `TextMasking` and name it in the YAML.

Shapes: B images, C captions, N patches, T tokens, K maximum number of masked positions per row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskvlm.utils.errors import UserError, check_shares

Uniform = Callable[..., Tensor]
"""`uniform(rows, ...)`: float32 in [0, 1) of that shape, on the device of the batch. It draws for the global batch
and returns the rows of this process (`distributed.Draw`)."""


class PatchMask(NamedTuple):
    """mask_BN: bool, True where a patch is masked. index_BK: int64 patch indices, row by row from the top left.
    weight_BK: 1.0 for a masked patch; 0.0 for a visible one that pads the row, so that the shape is known without
    a device sync. visible: upper bound on the visible patches of a masked row; None: unknown."""

    mask_BN: Tensor
    index_BK: Tensor
    weight_BK: Tensor
    visible: int | None = None


class TokenMask(NamedTuple):
    """token_CT: int64 ids with the masked ones replaced. mask_CT: bool, True where the loss is computed. index_CK,
    weight_CK: as in `PatchMask`; the weight of a masked token may be any number above 0."""

    token_CT: Tensor
    mask_CT: Tensor
    index_CK: Tensor
    weight_CK: Tensor


def count_masked(units: int, ratio: float) -> int:
    """How many of `units` are masked: rounded half up, at least one if the ratio is above 0."""
    share = np.float32(units) * np.float32(ratio)  # in single precision, as on the device
    return 0 if ratio == 0 else min(units, max(1, int(share + np.float32(0.5))))


def count_each(units: Tensor | int, share_C1: Tensor) -> Tensor:
    """`count_masked` for each row, computed on the device: [C, 1], whole numbers as floats."""
    return torch.maximum((units * share_C1 + 0.5).floor(), (share_C1 > 0).float())


class Ratio(NamedTuple):
    """Mask ratio of each caption or image. share_C1: [C, 1], 0 to 1. most, least: the largest and the smallest share
    that can be drawn."""

    share_C1: Tensor
    most: float
    least: float = 0.0

    @classmethod
    def drawn(cls, low: float, high: float, uniform_C: Tensor) -> "Ratio":
        """A share for each row, uniform between `low` and `high`."""
        return cls((low + (high - low) * uniform_C)[:, None], high, low)


def mask_patches(
    valid_B: Tensor,
    grid: tuple[int, int],
    block: int,
    ratio: float | Ratio,
    uniform: Uniform,
    fully_masked: float = 0.0,
) -> PatchMask:
    """Mask a share of square blocks of patches, uniform over blocks, drawn anew for each image (paper sec. 3, P).

    Args:
        valid_B: False rows get no mask.
        grid: rows and columns of patches.
        block: side of a block in patches (paper: 32 px of 16-px patches, so 2); blocks at the right and bottom
            edge are cut if the grid is not divisible.
        ratio: share of blocks, 0 to 1, one for all images or one per image; the count is exact in every image.
        uniform: source of random numbers.
        fully_masked: probability that an image is masked completely instead of by that share.
    """
    # Rounded up: blocks of the last row and column may be cut.
    block_rows, block_cols = -(-grid[0] // block), -(-grid[1] // block)
    units = block_rows * block_cols
    least, most = (ratio.least, ratio.most) if isinstance(ratio, Ratio) else (ratio, ratio)
    count = count_masked(units, most)
    # Computed before fully masked images, which only lower it. An upper bound, since edge blocks may be cut.
    visible = min((units - count_masked(units, least)) * block**2, grid[0] * grid[1])
    noise = uniform(valid_B.shape[0], units)
    # argsort twice: each block's rank in a random order. The first `count` ranks are exactly `count` blocks.
    rank = noise.argsort(dim=1).argsort(dim=1)
    if isinstance(ratio, Ratio):
        chosen_BU = rank < count_each(units, ratio.share_C1)
    else:
        chosen_BU = rank < count
    # Drawn only if needed, so that all other draws stay the same without it.
    if fully_masked:
        chosen_BU, count = chosen_BU | (uniform(valid_B.shape[0])[:, None] < fully_masked), units
    block_mask = chosen_BU.unflatten(1, (block_rows, block_cols))
    # (B, block rows, block columns) -> (B, rows, columns) of patches
    mask = block_mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : grid[0], : grid[1]]
    mask_BN = mask.flatten(1) & valid_B[:, None]
    return PatchMask(mask_BN, *positions(mask_BN, min(count * block**2, mask_BN.shape[1])), visible)


def mask_tokens(
    token_CT: Tensor,
    special_CT: Tensor,
    word_CT: Tensor,
    ratio: float | Ratio,
    uniform: Uniform,
    mask_id: int,
    vocab_size: int,
    text_length: int,
    whole_word: bool = False,
    keep_and_swap: bool = False,
) -> TokenMask:
    """Mask a share of the real tokens, never special tokens or padding (paper sec. 3: 30 %, always [MASK]).

    Args:
        token_CT, special_CT, word_CT: as in `Batch`.
        ratio: share of tokens (of words with `whole_word`), 0 to 1, one for all captions or one per caption;
            rounded to the nearest whole number, at least one unless the share is 0.
        uniform: source of random numbers; always drawn for `text_length` positions, so that the draw does not depend
            on the longest caption of the batch.
        mask_id: the id of [MASK].
        vocab_size: exclusive upper bound of the random replacements.
        text_length: the maximum T.
        whole_word: mask all pieces of a word together.
        keep_and_swap: BERT's 80/10/10 rule ([MASK], a random token, unchanged) instead of always [MASK].
    """
    # Units are drawn: words, or single tokens. unit_CT has the index of each token's unit.
    rows, length = token_CT.shape
    unit_CT = word_CT if whole_word else torch.arange(length, device=token_CT.device).expand(rows, length)
    unit_CT = torch.where(special_CT, length, unit_CT)  # special tokens share one unit, which is cut off later
    exists_CU = torch.zeros(rows, length + 1, dtype=torch.bool, device=token_CT.device)
    # (C, T) -> (C, U), U = T: which units a text has, without the column of the special tokens.
    exists_CU = exists_CU.scatter(1, unit_CT, True)[:, :length]
    # 2.0 sorts missing units after every draw in [0, 1).
    noise_CU = uniform(rows, text_length)[:, :length].masked_fill(~exists_CU, 2.0)
    # As for patches: each unit's rank in a random order.
    rank_CU = noise_CU.argsort(dim=1).argsort(dim=1)
    units_C1 = exists_CU.sum(1, keepdim=True)
    if not isinstance(ratio, Ratio):
        ratio = Ratio(torch.full_like(units_C1, ratio, dtype=torch.float), ratio)
    # How many units of each text are masked, and which.
    masked_CU = (rank_CU < count_each(units_C1, ratio.share_C1)) & exists_CU
    # (C, U) -> (C, T): units back to tokens; the column of the special tokens is never masked.
    mask_CT = torch.cat([masked_CU, torch.zeros_like(masked_CU[:, :1])], 1).gather(1, unit_CT)
    replacement_CT = torch.full_like(token_CT, mask_id)
    if keep_and_swap:
        # Of the masked tokens, 80 % become [MASK], 10 % a random token, and 10 % stay unchanged.
        choice_CT, other_CT = uniform(rows, 2, text_length)[:, :, :length].unbind(1)
        replacement_CT = torch.where(choice_CT < 0.9, replacement_CT, token_CT)
        replacement_CT = torch.where(
            (choice_CT >= 0.8) & (choice_CT < 0.9), (other_CT * vocab_size).long(), replacement_CT
        )
    # A word of many pieces can exceed the share of tokens, so whole-word masking may mask any number.
    most = length if whole_word else count_masked(length, ratio.most)
    return TokenMask(torch.where(mask_CT, replacement_CT, token_CT), mask_CT, *positions(mask_CT, most))


def positions(mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Convert a mask [B, N] to the index and weight of `PatchMask` and `TokenMask`, both [B, most]: the positions of
    each row's True entries, padded with other positions, and 1.0 where the mask is True."""
    # (B, N) -> (B, most): a shape that does not depend on values on the device.
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, mask.gather(1, index).float()


class Vocabulary(NamedTuple):
    """What a masking needs to know about the text encoder: the id of [MASK], the vocabulary size, the maximum text
    length in tokens, and a function from words to ids, without start and end (empty if it does not know them all)."""

    mask_id: int
    size: int
    length: int
    encode: Callable[[str], list[int]]


class Texts(NamedTuple):
    """Texts to mask, as in `Batch`; each is repeated `masks_per_text` times in adjacent rows, once for each masking.
    training: False in evaluation, where every checkpoint gets the same masks."""

    token_CT: Tensor
    special_CT: Tensor
    word_CT: Tensor
    masks_per_text: int = 1
    training: bool = False


class ImageMasking(ABC):
    """Base class: chooses which patches of an image are masked."""

    def check(self, patch_size: int) -> None:
        """Raises UserError if it does not fit patches of this size, in pixels."""
        return

    @abstractmethod
    def __call__(
        self, valid_B: Tensor, grid: tuple[int, int], patch_size: int, uniform: Uniform, training: bool
    ) -> PatchMask:
        """Draw a mask for each image.

        Args:
            valid_B: False rows get no mask.
            grid: rows and columns of patches.
            patch_size: side of a patch in pixels.
            uniform: the only source of random numbers; each call draws for the global batch, so that masks do not
                depend on the number of processes.
            training: False in evaluation, where every checkpoint gets the same masks.
        """


class RandomBlocks(ImageMasking):
    """Mask a share of square blocks, uniform over blocks (paper sec. 3), or in training sometimes the whole image.

    Args:
        ratio: share of the blocks, 0 to 1.
        block: side of a block in pixels; a multiple of the patch size.
        whole: in training, the probability that an image is masked completely.

    Raises:
        UserError: a share is outside [0, 1].
    """

    def __init__(self, ratio: float = 0.6, block: int = 32, whole: float = 0.0) -> None:
        check_shares({"model.task.image_masking.ratio": ratio, "model.task.image_masking.whole": whole})
        self.ratio, self.block, self.whole = ratio, block, whole

    def check(self, patch_size: int) -> None:
        """Raises UserError if a block is not a whole number of patches of this size, in pixels."""
        if self.block < patch_size or self.block % patch_size:
            what, todo = (
                f"{self.block} px is not a multiple of the {patch_size}-px patches",
                f"set model.task.mask_block to a multiple of {patch_size}",
            )
            raise UserError("model.task.mask_block", what, todo)

    def __call__(
        self, valid_B: Tensor, grid: tuple[int, int], patch_size: int, uniform: Uniform, training: bool
    ) -> PatchMask:
        whole = self.whole if training else 0.0
        return mask_patches(valid_B, grid, self.block // patch_size, self.ratio, uniform, whole)


class DrawnBlocks(RandomBlocks):
    """In training, draw a separate share for each image (all mask sizes, as in masked diffusion, Austin et al. 2021);
    in evaluation, use the same share for all.

    Args:
        low: smallest share of the blocks, 0 to 1.
        high: largest share of the blocks, 0 to 1.
        measured: the share in evaluation.
        block: side of a block in pixels; a multiple of the patch size.
        whole: in training, the probability that an image is masked completely.

    Raises:
        UserError: a share is outside [0, 1], or `low` exceeds `high`.
    """

    def __init__(
        self, low: float = 0.4, high: float = 0.95, measured: float = 0.6, block: int = 32, whole: float = 0.0
    ) -> None:
        check_range("model.task.image_masking", low, high, measured)
        super().__init__(measured, block, whole)
        self.low, self.high = low, high

    def __call__(
        self, valid_B: Tensor, grid: tuple[int, int], patch_size: int, uniform: Uniform, training: bool
    ) -> PatchMask:
        if not training:
            return super().__call__(valid_B, grid, patch_size, uniform, training)
        ratio = Ratio.drawn(self.low, self.high, uniform(len(valid_B)))
        return mask_patches(valid_B, grid, self.block // patch_size, ratio, uniform, self.whole)


def check_range(where: str, low: float, high: float, measured: float) -> None:
    """Raises UserError if a share is outside [0, 1], or `low` exceeds `high`."""
    if not (0 <= low <= high <= 1 and 0 <= measured <= 1):
        what = f"low {low}, high {high}, measured {measured} are not shares in order"
        raise UserError(where, what, "Give 0 <= low <= high <= 1, and measured from 0 to 1")


class TextMasking(ABC):
    """Base class: chooses which tokens of a text are masked."""

    @abstractmethod
    def __call__(self, texts: Texts, vocabulary: Vocabulary, uniform: Uniform) -> TokenMask:
        """Draw a mask for each row of `texts`.

        Args:
            uniform: as for images; draw for `vocabulary.length` positions, so that masks do not depend on the longest
                text of the batch.
        """


class RandomTokens(TextMasking):
    """Mask a share of the tokens of each text, uniform over tokens (paper sec. 3).

    Args:
        ratio: share of the tokens, 0 to 1.
        most: in training, each masking draws its share between `ratio` and this value (None: `ratio`); with several
            maskings per text, the first keeps `ratio`.
        whole_word: mask all pieces of a word together.
        keep_and_swap: in training, BERT's 80/10/10 replacement instead of always [MASK].

    Raises:
        UserError: a share is outside [0, 1], or `most` is below `ratio`.
    """

    def __init__(
        self, ratio: float = 0.3, most: float | None = None, whole_word: bool = False, keep_and_swap: bool = False
    ) -> None:
        check_shares({"model.task.text_masking.ratio": ratio, "model.task.text_masking.most": most})
        if most is not None and most < ratio:
            raise UserError("model.task.text_masking", f"most {most} is below ratio {ratio}", "Give a larger one")
        self.ratio, self.most = ratio, ratio if most is None else most
        self.whole_word, self.keep_and_swap = whole_word, keep_and_swap

    def __call__(self, texts: Texts, vocabulary: Vocabulary, uniform: Uniform) -> TokenMask:
        # Evaluation measures the same with and without it: a word that is shown could be copied.
        return mask_tokens(
            *texts[:3], self._share(texts, uniform), uniform, vocabulary.mask_id, vocabulary.size, vocabulary.length,
            self.whole_word, self.keep_and_swap and texts.training,
        )  # fmt: skip

    def _share(self, texts: Texts, uniform: Uniform) -> float | Ratio:
        """Share of tokens to mask: in training with `most`, drawn for each row; otherwise the same for all."""
        if not texts.training or self.most == self.ratio:
            return self.ratio
        drawn_C = uniform(len(texts.token_CT))
        if texts.masks_per_text > 1:
            # Drawn for all rows; a draw of 0 gives the lower share.
            first_C = torch.arange(len(drawn_C), device=drawn_C.device) % texts.masks_per_text == 0
            drawn_C = drawn_C.masked_fill(first_C, 0.0)
        return Ratio.drawn(self.ratio, self.most, drawn_C)


class ChosenPhrases(RandomTokens):
    """In training, mask only the given phrases in texts that contain any; other texts, and all texts in evaluation, are
    masked as by `RandomTokens`.

    This is for words that only make sense with all the others present: how two objects relate is learned where both
    are named, and hardly at all where their names are masked too.

    At most K tokens of a text are masked, where K is the width of the index tensor: `most` (or `ratio` if None) of the
    T tokens that the batch is padded to, including start and end, or the length of the longest phrase, whichever is
    more. If a text has more phrase tokens, the last phrases stay unmasked, one of them perhaps in part; which ones
    depends on the longest text of its batch.

    Args:
        phrases: words as they occur in the captions, such as "left of".
        share: share of the texts with a phrase, 0 to 1, in which it is masked this way, drawn anew each time. With
            several maskings per text, this applies to the first only.
        ratio: share of the tokens that are masked in all other texts, 0 to 1.
        most: in training, each of these maskings draws its share between `ratio` and this value; with several maskings
            per text, the first keeps `ratio`.
        weight: loss weight of a token masked this way relative to any other, above 0.

    Raises:
        UserError: no phrases, an empty phrase, an invalid share or weight; in the first step, a phrase with words that
            the tokenizer does not know.
    """

    def __init__(
        self,
        phrases: Sequence[str],
        share: float = 1.0,
        ratio: float = 0.3,
        most: float | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(ratio, most)
        where = "model.task.text_masking"
        if isinstance(phrases, str) or not phrases or not all(phrase.strip() for phrase in phrases):
            raise UserError(
                where, f"phrases {phrases!r} are not a list of words", 'Give some, such as ["left of", "above"]'
            )
        check_shares({f"{where}.share": share})
        if not 0 < weight < math.inf:
            raise UserError(where, f"weight {weight} is not above 0", "Give 1, or a larger number")
        self.phrases, self.share, self.weight = list(phrases), share, weight

    def __call__(self, texts: Texts, vocabulary: Vocabulary, uniform: Uniform) -> TokenMask:
        base = super().__call__(texts, vocabulary, uniform)
        if not texts.training:
            return base
        forms = [ids for phrase in self.phrases for ids in self.forms(phrase, vocabulary.encode)]
        at_CT = self.phrases_in(texts, forms)
        # As many tokens as the index has columns, but at least the longest phrase. If a text has more phrases than fit,
        # the last one may be masked in part.
        room = min(max(base.index_CK.shape[1], *map(len, forms)), at_CT.shape[1])
        at_CT &= at_CT.cumsum(1) <= room
        chosen_C1 = at_CT.any(1, keepdim=True) & (uniform(len(at_CT))[:, None] < self.share)
        if texts.masks_per_text > 1:
            chosen_C1 &= (torch.arange(len(at_CT), device=at_CT.device) % texts.masks_per_text == 0)[:, None]
        mask_CT = torch.where(chosen_C1, at_CT, base.mask_CT)
        token_CT = torch.where(chosen_C1, texts.token_CT.masked_fill(at_CT, vocabulary.mask_id), base.token_CT)
        index_CK, weight_CK = positions(mask_CT, room)
        return TokenMask(token_CT, mask_CT, index_CK, torch.where(chosen_C1, self.weight * weight_CK, weight_CK))

    def forms(self, phrase: str, encode: Callable[[str], list[int]]) -> set[tuple[int, ...]]:
        """Token ids of a phrase. Byte-level BPE (RoBERTa) encodes a word after a space differently from one at the
        beginning. Raises UserError if the tokenizer does not know the phrase."""
        forms = {tuple(encode(phrase)), tuple(encode(f" {phrase}"))}
        if () in forms:
            what, todo = f"the tokenizer does not know all words of '{phrase}'", "Leave it out of phrases"
            raise UserError("model.task.text_masking", what, todo)
        return forms

    def phrases_in(self, texts: Texts, forms: Iterable[tuple[int, ...]]) -> Tensor:
        """True on the tokens of phrases with these ids, [C, T]."""
        at_CT = torch.zeros_like(texts.special_CT)
        word_CT, length = texts.word_CT, at_CT.shape[1]
        # Where a token is the first of its word, and the last: "of" must not match the beginning of "often".
        other_C1 = torch.full_like(word_CT[:, :1], -2)
        first_CT = word_CT != torch.cat([other_C1, word_CT[:, :-1]], 1)
        last_CT = word_CT != torch.cat([word_CT[:, 1:], other_C1], 1)
        for ids in forms:
            if len(ids) > length:  # longer than any text of this batch
                continue
            # Where each token of the phrase is followed by the next: the windows are views, without a copy.
            windows_CWP = texts.token_CT.unfold(1, len(ids), 1)
            starts_CW = torch.stack([windows_CWP[..., place] == token for place, token in enumerate(ids)]).all(0)
            starts_CW &= first_CT[:, : length - len(ids) + 1] & last_CT[:, len(ids) - 1 :]
            for place in range(len(ids)):
                at_CT[:, place : place + starts_CW.shape[1]] |= starts_CW
        return at_CT & ~texts.special_CT


class DrawnTokens(TextMasking):
    """In training, draw a separate share for each masking of a text, like `DrawnBlocks` for images.

    Args:
        low: smallest share of the tokens, 0 to 1.
        high: largest share of the tokens, 0 to 1.
        measured: the share in evaluation.

    Raises:
        UserError: a share is outside [0, 1], or `low` exceeds `high`.
    """

    def __init__(self, low: float = 0.15, high: float = 0.8, measured: float = 0.3) -> None:
        check_range("model.task.text_masking", low, high, measured)
        self.low, self.high, self.measured = low, high, measured

    def __call__(self, texts: Texts, vocabulary: Vocabulary, uniform: Uniform) -> TokenMask:
        ratio: float | Ratio = self.measured
        if texts.training:
            ratio = Ratio.drawn(self.low, self.high, uniform(len(texts.token_CT)))
        return mask_tokens(*texts[:3], ratio, uniform, vocabulary.mask_id, vocabulary.size, vocabulary.length)
