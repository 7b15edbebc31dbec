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


def contrast_inputs(rows: int = 6, **changes: Tensor) -> dict[str, Tensor]:
    image_BD, text_BD = F.normalize(noise(rows, 8, seed=1), dim=1), F.normalize(noise(rows, 8, seed=2), dim=1)
    vectors = {"image_BD": image_BD, "text_BD": text_BD, "image_GD": image_BD, "text_GD": text_BD}
    own_B, excluded_BG = torch.arange(rows), torch.zeros(rows, rows, dtype=torch.bool)
    rest = {"own_B": own_B, "excluded_BG": excluded_BG, "weight_B": torch.ones(rows), "count": torch.tensor(rows)}
    return {**vectors, "scale": torch.tensor(1 / 0.07), **rest, **changes}


def test_contrast_is_the_mean_of_both_directions_without_duplicates_and_rows_without_weight() -> None:
    excluded_BG = torch.zeros(6, 6, dtype=torch.bool)
    excluded_BG[0, 3] = excluded_BG[3, 0] = True  # the same image twice
    excluded_BG[:, 5] = True  # a hole
    excluded_BG[5, 5] = False
    weight_B = torch.tensor([1.0, 1, 1, 1, 1, 0])
    inputs = contrast_inputs(excluded_BG=excluded_BG, weight_B=weight_B, count=weight_B.sum())
    image, text = inputs["image_BD"].double().numpy(), inputs["text_BD"].double().numpy()
    total = 0.0
    for row in range(5):
        columns = [c for c in range(5) if {row, c} != {0, 3}]
        for query, keys in ((image[row], text), (text[row], image)):
            total -= log_softmax(keys[columns] @ query / 0.07)[columns.index(row)]
    assert contrastive(**inputs).item() == pytest.approx(total / 10, rel=1e-6)


def test_contrast_keeps_single_precision_under_autocast() -> None:
    """Between 512 and 1024 bfloat16 knows every fourth number only."""
    inputs = {**contrast_inputs(), "scale": torch.tensor(1000.0)}
    for name, seed in (("image", 3), ("text", 4)):
        alike = F.normalize(inputs["image_BD"][:1] + 0.02 * noise(6, 8, seed=seed), dim=1)
        inputs[f"{name}_BD"] = inputs[f"{name}_GD"] = alike
    expected = contrastive(**inputs).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive(**inputs).item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_soft_contrast_spreads_the_target_over_the_captions_of_an_image(images: int, more: int, random: Any) -> None:
    """In any order, in uneven numbers; unread images and their captions are no columns."""
    owner = [*range(images), *(random.randrange(images) for _ in range(more))]
    random.shuffle(owner)
    weight_B = torch.tensor([1.0, *(float(random.random() < 0.7) for _ in range(images - 1))])
    own_BC, weight_C = torch.arange(images)[:, None] == torch.tensor(owner), weight_B[owner]
    image_BD, text_CD = (F.normalize(noise(n, 8, seed=n), dim=1) for n in (images, len(owner)))
    loss = soft_contrastive(
        *(image_BD, text_CD, image_BD, text_CD, torch.tensor(1 / 0.07)),
        ContrastTargets(own_BC, (weight_C == 0).expand_as(own_BC)),
        ContrastTargets(own_BC.T, (weight_B == 0).expand_as(own_BC.T)),
        *(weight_B, weight_C, weight_B.sum(), weight_C.sum()),
    )
    read, read_C = np.flatnonzero(weight_B.numpy()), np.flatnonzero(weight_C.numpy())
    logits = (image_BD.double().numpy() @ text_CD.double().numpy().T)[np.ix_(read, read_C)] / 0.07
    own = own_BC.numpy()[np.ix_(read, read_C)]
    image = -(log_softmax(logits) * own / own.sum(1, keepdims=True)).sum(1).mean()
    text = -(log_softmax(logits.T) * own.T).sum(1).mean()
    assert loss.item() == pytest.approx((image + text) / 2, rel=1e-5)


def test_soft_cross_entropy_leaves_out_excluded_columns() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 9.0], [5.0, 1.0, 1.0, 1.0]], requires_grad=True)
    positive = torch.tensor([[True, True, False, True], [True, False, False, False]])
    excluded = torch.tensor([[False, False, False, True], [True, True, True, True]])
    loss_B = soft_cross_entropy(logits, ContrastTargets(positive, excluded))
    expected = torch.logsumexp(torch.tensor([1.0, 2.0, 3.0]), 0) - 1.5
    torch.testing.assert_close(loss_B, torch.stack([expected, torch.tensor(0.0)]))  # nothing to find: no loss
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        soft_cross_entropy(logits, ContrastTargets(positive, excluded)).sum().backward()
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
        loss = masked_pixel(predicted_BKP, target_BKP, weight_BK, weight_BK.sum(), kind)
        assert loss.item() == pytest.approx(error.mean(), rel=1e-6)
    assert masked_pixel(predicted_BKP, target_BKP, weight_BK, weight_BK.sum()).item() == pytest.approx(np.abs(d).mean())


TERMS = {
    "contrast": lambda x, w: contrastive(
        x, x, x, x, torch.tensor(10.0), torch.arange(4), torch.zeros(4, 4, dtype=torch.bool), w, w.sum()
    ),
    "soft contrast": lambda x, w: soft_contrastive(
        *[x] * 4,
        torch.tensor(10.0),
        *[ContrastTargets(torch.eye(4).bool(), w[None].expand(4, 4) == 0)] * 2,
        *(w, w, w.sum(), w.sum()),
    ),
    "matching": lambda x, w: matching(x[:, :2], torch.tensor([1, 0, 0, 0]), w, w.sum()),
    "token": lambda x, w: masked_token(x[:, None], torch.zeros(4, 1, dtype=torch.long), w[:, None], w.sum()),
    "pixel": lambda x, w: masked_pixel(x[:, None], torch.zeros_like(x[:, None]), w[:, None], w.sum()),
}


@pytest.mark.parametrize("term", sorted(TERMS))
def test_counts_and_precision_of_each_loss(term: str) -> None:
    """Without any weight the loss is zero with a gradient of zero. A count below one, the mean over processes of a
    single row or of light words, divides too. bfloat16 is summed in single precision."""
    x, row = noise(4, 8).requires_grad_(), torch.tensor([0.0, 1, 0, 0])
    loss = TERMS[term](x, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert TERMS[term](x, row / 8).item() == pytest.approx(TERMS[term](x, row).item(), rel=1e-6)
    half = x.detach().bfloat16()
    loss = TERMS[term](half, torch.ones(4))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(TERMS[term](half.float(), torch.ones(4)).item(), rel=1e-6)


# ---------------------------------------------------------------------- hard negatives


def test_negatives_are_drawn_in_proportion_to_the_exponent_of_the_logit() -> None:
    logits_G = torch.tensor([1.0, -1.0, 0.5, 9.0, -2.0])
    excluded_G = torch.tensor([False, False, False, True, False])
    index_B, weight_B = draw_hard_negatives(logits_G.expand(40000, 5), excluded_G.expand(40000, 5), uniform(40000, 5))
    expected_G = torch.softmax(logits_G.masked_fill(excluded_G, -torch.inf), 0)
    torch.testing.assert_close(torch.bincount(index_B, minlength=5) / 40000, expected_G, atol=0.008, rtol=0)
    assert weight_B.all()


@settings(max_examples=40, deadline=None)
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


def test_edges_of_the_draw() -> None:
    """A row without negative gets index and weight 0; NaN counts as a logit of zero; of equal logits the largest random
    number wins, row by row."""
    excluded_BG = torch.tensor([[True, True], [True, False]])
    index_B, weight_B = draw_hard_negatives(torch.tensor([[90.0, -90], [90, -90]]), excluded_BG, uniform(2, 2))
    assert (index_B.tolist(), weight_B.tolist()) == ([0, 1], [0.0, 1.0])
    draw_BG, none_BG = uniform(50, 6), torch.zeros(50, 6, dtype=torch.bool)
    for logit in (0.0, torch.nan):
        logits_BG = torch.zeros(50, 6).index_fill(1, torch.tensor([3]), logit)
        assert torch.equal(draw_hard_negatives(logits_BG, none_BG, draw_BG).index_B, draw_BG.argmax(1))


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
    """However sure the model is: the loss of one word at one position is -log sigmoid, whose slope is -1 there. And
    what is surely there gives no infinite one."""
    for logit, present, value, slope in ((-40.0, 1.0, 40.0, -1.0), (200.0, 0.0, 200.0, 1.0)):
        logits = torch.full((1, 1, 1), logit, requires_grad=True)
        loss = words_present(logits, torch.full((1, 1), present), torch.ones(1), torch.tensor(1.0))
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-5)
        assert logits.grad.item() == pytest.approx(slope, rel=1e-4)
