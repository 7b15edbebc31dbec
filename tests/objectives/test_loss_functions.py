"""Each loss to six digits against a few lines of NumPy; hard negatives against their distribution."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.nn import functional as F

from maskvlm.objectives.hard_negatives import draw_hard_negatives
from maskvlm.objectives.loss_functions import (
    ContrastTargets,
    contrastive,
    masked_pixel,
    masked_token,
    matching,
    mean_colour,
    pixel_error,
    soft_contrastive,
    soft_cross_entropy,
    words_present,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---------------------------------------------------------------------- contrast


def contrast_inputs(rows: int = 6, excluded: Tensor | None = None, weight: Tensor | None = None) -> dict[str, Tensor]:
    image_BD, text_BD = F.normalize(noise(rows, 8, seed=1), dim=1), F.normalize(noise(rows, 8, seed=2), dim=1)
    weight_B = torch.ones(rows) if weight is None else weight
    return {
        "image_BD": image_BD,
        "text_BD": text_BD,
        "image_GD": image_BD,
        "text_GD": text_BD,
        "scale": torch.tensor(1 / 0.07),
        "own_B": torch.arange(rows),
        "excluded_BG": torch.zeros(rows, rows, dtype=torch.bool) if excluded is None else excluded,
        "weight_B": weight_B,
        "count": weight_B.sum(),
    }


def test_contrast_is_the_mean_of_both_directions() -> None:
    inputs = contrast_inputs()
    image, text = inputs["image_BD"].double().numpy(), inputs["text_BD"].double().numpy()
    logits = image @ text.T / 0.07
    expected = -(np.diag(log_softmax(logits)).mean() + np.diag(log_softmax(logits.T)).mean()) / 2
    assert contrastive(**inputs).item() == pytest.approx(expected, rel=1e-6)


def test_contrast_leaves_out_duplicates_and_rows_without_weight() -> None:
    excluded_BG = torch.zeros(6, 6, dtype=torch.bool)
    excluded_BG[0, 3] = excluded_BG[3, 0] = True  # the same image twice
    excluded_BG[:, 5] = True  # a hole
    excluded_BG[5, 5] = False
    inputs = contrast_inputs(6, excluded_BG, torch.tensor([1.0, 1, 1, 1, 1, 0]))
    image, text = inputs["image_BD"].double().numpy(), inputs["text_BD"].double().numpy()
    total = 0.0
    for row in range(5):
        columns = [c for c in range(5) if {row, c} != {0, 3}]
        for query, keys in ((image[row], text), (text[row], image)):
            total -= log_softmax(keys[columns] @ query / 0.07)[columns.index(row)]
    assert contrastive(**inputs).item() == pytest.approx(total / 10, rel=1e-6)


def test_contrast_of_a_share_of_the_global_batch() -> None:
    """Two halves with the count of each divided by two average to the whole."""
    whole = contrast_inputs()
    halves = [
        contrastive(
            **{**whole, "image_BD": whole["image_BD"][rows], "text_BD": whole["text_BD"][rows]}
            | {"own_B": whole["own_B"][rows], "excluded_BG": whole["excluded_BG"][rows]}
            | {"weight_B": whole["weight_B"][rows], "count": torch.tensor(3.0)}
        )
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert (sum(halves) / 2).item() == pytest.approx(contrastive(**whole).item(), rel=1e-6)


def test_contrast_keeps_single_precision_under_autocast() -> None:
    """Between 512 and 1024 bfloat16 knows every fourth number only."""
    inputs = {**contrast_inputs(), "scale": torch.tensor(1000.0)}
    for name, seed in (("image", 3), ("text", 4)):
        alike = F.normalize(inputs["image_BD"][:1] + 0.02 * noise(6, 8, seed=seed), dim=1)
        inputs[f"{name}_BD"] = inputs[f"{name}_GD"] = alike
    expected = contrastive(**inputs).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive(**inputs).item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------- contrast with several captions


def soft_inputs(
    owner: list[int], images: int, weight_B: Tensor, **excluded: Tensor
) -> dict[str, Tensor | ContrastTargets]:
    """Captions in the given order; unread images and their captions are no columns."""
    owner_C = torch.tensor(owner)
    image_BD, text_CD = (F.normalize(noise(n, 8, seed=n), dim=1) for n in (images, len(owner)))
    own_BC = torch.arange(images)[:, None] == owner_C
    unread_B, weight_C = weight_B == 0, weight_B[owner_C]
    not_BC = excluded.get("image", torch.zeros_like(own_BC)) | (weight_C == 0)
    not_CB = excluded.get("text", torch.zeros_like(own_BC.T)) | unread_B
    sees = {"image_targets": ContrastTargets(own_BC, not_BC), "text_targets": ContrastTargets(own_BC.T, not_CB)}
    counts = {"count_B": weight_B.sum(), "count_C": weight_C.sum()}
    vectors = {"image_BD": image_BD, "text_CD": text_CD, "image_GD": image_BD, "text_HD": text_CD}
    return {**vectors, "scale": torch.tensor(1 / 0.07), **sees, "weight_B": weight_B, "weight_C": weight_C, **counts}


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_soft_contrast_spreads_the_target_over_the_captions_of_an_image(images: int, more: int, random: Any) -> None:
    """In any order, in uneven numbers, with unread images."""
    owner = [*range(images), *(random.randrange(images) for _ in range(more))]
    random.shuffle(owner)
    weight_B = torch.tensor([1.0, *(float(random.random() < 0.7) for _ in range(images - 1))])
    inputs = soft_inputs(owner, images, weight_B)
    cosine = inputs["image_BD"].double().numpy() @ inputs["text_CD"].double().numpy().T  # type: ignore[union-attr]
    read, read_of = np.flatnonzero(weight_B.numpy()), np.array(owner)
    read_C = np.flatnonzero(weight_B.numpy()[read_of])
    logits = cosine[np.ix_(read, read_C)] / 0.07
    own = read[:, None] == read_of[read_C]
    image = -(log_softmax(logits) * own / own.sum(1, keepdims=True)).sum(1).mean()
    text = -(log_softmax(logits.T) * own.T).sum(1).mean()
    assert soft_contrastive(**inputs).item() == pytest.approx((image + text) / 2, rel=1e-5)  # type: ignore[arg-type]


def test_soft_contrast_is_contrast_where_each_image_has_one_caption() -> None:
    """With duplicates of words, a hole, and as a share of the global batch."""
    excluded_BG = torch.zeros(6, 6, dtype=torch.bool)
    excluded_BG[0, 3] = excluded_BG[3, 0] = excluded_BG[:, 5] = True
    inputs = contrast_inputs(6, excluded_BG & ~torch.eye(6, dtype=torch.bool), torch.tensor([1.0, 1, 1, 1, 1, 0]))
    for rows in (slice(0, 6), slice(2, 6)):
        part = {name: inputs[name][rows] for name in ("image_BD", "text_BD", "own_B", "excluded_BG", "weight_B")}
        expected = contrastive(**{**inputs, **part})
        sees = ContrastTargets(torch.eye(6, dtype=torch.bool)[rows], excluded_BG[rows])
        loss = soft_contrastive(
            part["image_BD"], part["text_BD"], inputs["image_GD"], inputs["text_GD"], inputs["scale"],
            sees, sees, part["weight_B"], part["weight_B"], inputs["count"], inputs["count"],
        )  # fmt: skip
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_soft_cross_entropy_leaves_out_excluded_columns() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 9.0], [5.0, 1.0, 1.0, 1.0]], requires_grad=True)
    positive = torch.tensor([[True, True, False, True], [True, False, False, False]])
    excluded = torch.tensor([[False, False, False, True], [True, True, True, True]])
    loss_B = soft_cross_entropy(logits, ContrastTargets(positive, excluded))
    expected = torch.logsumexp(torch.tensor([1.0, 2.0, 3.0]), 0) - 1.5
    torch.testing.assert_close(loss_B, torch.stack([expected, torch.tensor(0.0)]))  # nothing to find: no loss
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        soft_cross_entropy(logits, ContrastTargets(positive, excluded)).sum().backward()
    assert logits.grad is not None
    share = torch.softmax(torch.tensor([1.0, 2.0, 3.0]), 0) - torch.tensor([0.5, 0.5, 0.0])
    torch.testing.assert_close(logits.grad, torch.stack([F.pad(share, (0, 1)), torch.zeros(4)]))


# ---------------------------------------------------------------------- matching, words, pixels


def test_matching() -> None:
    logits_M2, match_M = noise(6, 2), torch.tensor([True, True, False, False, False, False])
    weight_M = torch.tensor([1.0, 1, 1, 0, 1, 1])
    log_p = log_softmax(logits_M2.double().numpy())
    expected = -(log_p[[0, 1], 1].sum() + log_p[[2, 4, 5], 0].sum()) / 5
    assert matching(logits_M2, match_M, weight_M, weight_M.sum()).item() == pytest.approx(expected, rel=1e-6)


def test_masked_token() -> None:
    logits_CKV, target_CK = noise(2, 3, 7), torch.tensor([[1, 6, 0], [3, 3, 2]])
    weight_CK = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    log_p = log_softmax(logits_CKV.double().numpy())
    expected = -(log_p[0, 0, 1] + log_p[0, 1, 6] + log_p[1, 0, 3]) / 3
    assert masked_token(logits_CKV, target_CK, weight_CK, weight_CK.sum()).item() == pytest.approx(expected, rel=1e-6)


def test_masked_pixel() -> None:
    predicted_BKP, target_BKP = 2 * noise(2, 3, 5), noise(2, 3, 5, seed=1)
    weight_BK = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    d = (predicted_BKP - target_BKP).double().numpy()[weight_BK.bool().numpy()]
    smooth = np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5)
    for kind, error in (("l1", np.abs(d)), ("squared", d**2), ("smooth_l1", smooth)):
        loss = masked_pixel(predicted_BKP, target_BKP, weight_BK, weight_BK.sum(), kind)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(error.mean(), rel=1e-6)
    assert masked_pixel(predicted_BKP, target_BKP, weight_BK, weight_BK.sum()).item() == pytest.approx(np.abs(d).mean())


def test_the_mean_colour_is_that_of_masked_patches() -> None:
    target_BKP = noise(2, 3, 12)
    weight_BK = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    colour = target_BKP[weight_BK.bool()].view(-1, 3).mean(0)  # of each channel over all pixels
    torch.testing.assert_close(mean_colour(target_BKP, weight_BK), colour.repeat(4))
    assert mean_colour(target_BKP, torch.zeros(2, 3)).tolist() == [0.0] * 12


def test_pixel_error_keeps_the_shape() -> None:
    assert pixel_error(noise(2, 3), noise(2, 3, seed=1), "squared").shape == (2, 3)


TERMS = {
    "contrast": lambda x, w: contrastive(
        x, x, x, x, torch.tensor(10.0), torch.arange(4), torch.zeros(4, 4, dtype=torch.bool), w, w.sum()
    ),
    "soft contrast": lambda x, w: soft_contrastive(
        x,
        x,
        x,
        x,
        torch.tensor(10.0),
        *[ContrastTargets(torch.eye(4).bool(), w[None].expand(4, 4) == 0)] * 2,
        w,
        w,
        w.sum(),
        w.sum(),
    ),
    "matching": lambda x, w: matching(x[:, :2], torch.tensor([1, 0, 0, 0]), w, w.sum()),
    "token": lambda x, w: masked_token(x[:, None], torch.zeros(4, 1, dtype=torch.long), w[:, None], w.sum()),
    "pixel": lambda x, w: masked_pixel(x[:, None], torch.zeros_like(x[:, None]), w[:, None], w.sum()),
}


@pytest.mark.parametrize("term", sorted(TERMS))
def test_without_any_weight_the_loss_is_zero_with_a_gradient_of_zero(term: str) -> None:
    x = noise(4, 8).requires_grad_()
    loss = TERMS[term](x, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("term", sorted(TERMS))
def test_a_count_below_one_divides_too(term: str) -> None:
    """The mean over processes of a single row, or light words alone."""
    x, row = noise(4, 8), torch.tensor([0.0, 1, 0, 0])
    assert TERMS[term](x, row / 8).item() == pytest.approx(TERMS[term](x, row).item(), rel=1e-6)


@pytest.mark.parametrize("term", sorted(TERMS))
def test_bfloat16_inputs_are_summed_in_single_precision(term: str) -> None:
    x = noise(4, 8).bfloat16()
    loss = TERMS[term](x, torch.ones(4))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(TERMS[term](x.float(), torch.ones(4)).item(), rel=1e-6)


def test_nothing_masked_at_all() -> None:
    logits = torch.zeros(4, 0, 9, requires_grad=True)
    empty = torch.zeros(4, 0)
    masked_token(logits, empty.long(), empty, empty.sum()).backward()
    loss = masked_pixel(logits, logits.detach(), empty, empty.sum())
    assert loss.item() == 0
    loss.backward()


# ---------------------------------------------------------------------- hard negatives


def test_negatives_are_drawn_in_proportion_to_the_exponent_of_the_logit() -> None:
    logits_G = torch.tensor([1.0, -1.0, 0.5, 9.0, -2.0])
    excluded_G = torch.tensor([False, False, False, True, False])
    index_B, weight_B = draw_hard_negatives(logits_G.expand(40000, 5), excluded_G.expand(40000, 5), uniform(40000, 5))
    expected_G = torch.softmax(logits_G.masked_fill(excluded_G, -torch.inf), 0)
    torch.testing.assert_close(torch.bincount(index_B, minlength=5) / 40000, expected_G, atol=0.008, rtol=0)
    assert weight_B.all()


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float32, (3, 4), elements=st.floats(width=32)),
    arrays(np.bool_, (3, 4)),
    arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_whatever_the_logits_an_excluded_column_is_never_drawn(
    logits: np.ndarray, excluded: np.ndarray, draw: np.ndarray, dtype: torch.dtype
) -> None:
    """NaN and infinite logits, random numbers of exactly 0 and 1, rows without any negative."""
    excluded_BG = torch.from_numpy(excluded)
    index_B, weight_B = draw_hard_negatives(torch.from_numpy(logits).to(dtype), excluded_BG, torch.from_numpy(draw))
    assert torch.equal(weight_B, (~excluded_BG).any(1).float())
    assert ((index_B >= 0) & (index_B < 4)).all()
    assert not excluded_BG[torch.arange(3), index_B][weight_B == 1].any()


def test_a_row_without_negative_gets_index_and_weight_zero() -> None:
    excluded_BG = torch.tensor([[True, True], [True, False]])
    index_B, weight_B = draw_hard_negatives(torch.tensor([[90.0, -90], [90, -90]]), excluded_BG, uniform(2, 2))
    assert (index_B.tolist(), weight_B.tolist()) == ([0, 1], [0.0, 1.0])


def test_nan_counts_as_a_logit_of_zero() -> None:
    logits_G = torch.tensor([torch.nan, 1.0, 0.0])
    index_B, _ = draw_hard_negatives(
        logits_G.expand(20000, 3), torch.zeros(20000, 3, dtype=torch.bool), uniform(20000, 3)
    )
    expected_G = torch.softmax(torch.tensor([0.0, 1.0, 0.0]), 0)
    torch.testing.assert_close(torch.bincount(index_B) / 20000, expected_G, atol=0.01, rtol=0)


def test_rows_are_independent_of_each_other() -> None:
    draw_BG = uniform(50, 6)
    together = draw_hard_negatives(torch.zeros(50, 6), torch.zeros(50, 6, dtype=torch.bool), draw_BG).index_B
    assert torch.equal(together, draw_BG.argmax(1))  # equal logits: the largest random number wins


def test_negatives_are_drawn_without_asking_the_device_and_without_gradient() -> None:
    """A tensor without data cannot be copied to the host."""
    logits_BG = torch.empty(5, 7, device="meta", requires_grad=True)
    index_B, weight_B = draw_hard_negatives(logits_BG, logits_BG > 0, torch.empty_like(logits_BG))
    assert (index_B.shape, weight_B.shape) == ((5,), (5,))
    assert not weight_B.requires_grad


def test_words_present_is_noisy_or() -> None:
    """Written out for two images of two positions and a vocabulary of three, the second image unread."""
    logits = torch.tensor([[[2.0, -1.0, 0.5], [0.0, -3.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
    words = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    p = logits[0].sigmoid().double()
    present = 1 - (1 - p[0]) * (1 - p[1])
    expected = -(present[0].log() + (1 - present[1]).log() + present[2].log()) / 2
    loss = words_present(logits, words, torch.tensor([1.0, 0.0]), torch.tensor(1.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_word_that_is_there_and_denied_has_its_gradient() -> None:
    """However sure the model is: the loss of one word at one position is -log sigmoid, whose slope is -1 there."""
    logits = torch.full((1, 1, 1), -40.0, requires_grad=True)
    loss = words_present(logits, torch.ones(1, 1), torch.ones(1), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == pytest.approx(40.0, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.item() == pytest.approx(-1.0, rel=1e-4)


def test_words_present_stays_finite() -> None:
    logits = torch.tensor([[[200.0, -200.0], [200.0, -200.0]]], requires_grad=True)
    loss = words_present(logits, torch.tensor([[0.0, 1.0]]), torch.ones(1), torch.tensor(1.0))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
