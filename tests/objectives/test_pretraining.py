"""One training step against separate passes for every pair, and what must not change its losses."""

import itertools
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from slow_step import Slow, build, each_token_a_word, eventful_batch, gradients
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from toys import LENGTH, PATCH, VOCAB, take, tokens, toy_backbone, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.features import FrozenBlocks
from maskvlm.model.heads import patchify
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.cross_batch import Contrast, first_and_all_captions, gather_contrast, pad_text
from maskvlm.objectives.masking import ChosenPhrases
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.pretraining_losses import Need, PretrainingLoss, Step, WordsPresent
from maskvlm.utils.distributed import Draw, without_gradient
from maskvlm.utils.errors import UserError

TERMS = ("itc", "itm", "mlm", "mim")
EVERY = ("itc", "itm", "words", "spread", "mlm", "mim")


class Table:
    """Draws that belong to rows and columns: the same for a row wherever it stands, however many there are.

    The first two draws of a step are masks, the others [rows, columns] of negatives.
    """

    def __init__(self, order: list[int] | None = None) -> None:
        self.order, self.calls = order, 0

    def __call__(self, rows: int, *shape: int) -> Tensor:
        table = torch.rand(8, 16, generator=torch.Generator().manual_seed(self.calls))
        self.calls += 1
        if self.order is not None:
            table = table[self.order]
            table = table[:, self.order] if self.calls > 2 else table
        return table[:rows, : shape[-1]]


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "weighted": {"weight_itc": 0.5, "weight_itm": 2.0, "weight_mlm": 3.0, "weight_mim": 0.25},
    "both masked": {"mask_both": True},
    "pixels": {"pixel_loss": "squared", "pixel_norm": True, "image_mask_ratio": 0.3},
    "words": {"whole_word": True, "keep_and_swap": True, "text_mask_ratio": 0.6},
    "a decoder that knows places": {"decoder_positions": True},
    "no contrast": {"weight_itc": 0.0},
    "all five": {"weight_words": 0.5},
    "all six": {"weight_words": 0.5, "weight_spread": 2.0},
    "spread from masked words": {"weight_spread": 1.0, "mask_both": True, "weight_mim": 0.0},
    "words present alone": {f"weight_{name}": float(name == "words") for name in ("itc", "itm", "mlm", "mim", "words")},
    "texts masked three times": {"masks_per_text": 3},
    "texts masked of any share": {"text_mask_most": 0.9},
    "texts masked twice, of any share": {"masks_per_text": 2, "text_mask_most": 1.0},
    "words as their embeddings": {"tokens_from_words": True},
    "both masked, texts twice": {"mask_both": True, "masks_per_text": 2},
    "words from masked image": {"mask_both": True, "weight_mim": 0.0},
    "image from masked words": {"mask_both": True, "weight_mlm": 0.0, "weight_itm": 0.0},
}


def total(task: MaskedPretraining, terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([task.weights[name] * term for name, term in terms.items()]).sum()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_one_pass_over_everything_equals_a_pass_for_each_pair(variant: str) -> None:
    batch = eventful_batch()
    backbone, task = build(**VARIANTS[variant])
    terms = task(backbone, batch)
    total(task, terms).backward()
    fast = gradients(backbone, task)
    backbone.zero_grad()
    task.zero_grad()

    slow = Slow(task, backbone, batch)
    expected = {name: getattr(slow, name)() for name in EVERY if task.weights[name]}
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], atol=1e-6, rtol=1e-5)
    total(task, expected).backward()
    for name, grad in gradients(backbone, task).items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(fast[name], grad, atol=2e-5 * scale + 1e-6, rtol=1e-4)


def test_the_eventful_batch_is_eventful() -> None:
    """The negatives of the rows above are what the comparison needs: drawn, never a duplicate or the hole."""
    backbone, task = build()
    task(backbone, eventful_batch())
    assert task.last_negatives is not None
    for index_B, weight_B in task.last_negatives:
        assert weight_B.all()
        assert 4 not in index_B.tolist()
        assert all(i != j and {i, j} not in ({0, 1}, {2, 3}) for i, j in enumerate(index_B.tolist()))


def test_maskings_of_a_text_are_independent_and_evaluation_has_one() -> None:
    backbone, task = build(masks_per_text=3)
    batch = eventful_batch()
    task(backbone, batch)
    assert task.masks.token is not None
    first, *others = task.masks.token.mask_CT.unflatten(0, (8, 3)).unbind(1)
    assert all((first != other).any(1).sum() > 2 and torch.equal(first.sum(1), other.sum(1)) for other in others)
    one = task.mask(backbone, batch, task.uniform)
    assert one.token is not None
    assert len(one.token.token_CT) == 8


def test_a_single_masking_masks_any_share_and_evaluation_the_fixed_one() -> None:
    backbone, task = build(text_mask_ratio=0.3, text_mask_most=1.0)
    batch = eventful_batch()
    words_C = (~batch.special_CT).sum(1)
    shares = []
    for _ in range(60):
        token = task.mask(backbone, batch, task.uniform, True).token
        assert token is not None
        shares.append((token.mask_CT.sum(1) / words_C)[batch.valid_B])
    share_XC = torch.stack(shares)
    # Uniform from .3 to 1, rounded to whole words of texts of four words or so.
    assert (share_XC.mean() - 0.65).abs() < 0.06
    assert share_XC.max() == 1
    assert share_XC.min() < 0.4
    token_mask, plain = (
        task.mask(backbone, batch, task.uniform).token,
        build()[1].mask(backbone, batch, task.uniform).token,
    )
    assert token_mask is not None
    assert plain is not None
    assert torch.equal(token_mask.mask_CT.sum(1), plain.mask_CT.sum(1))


def test_further_maskings_mask_any_share_and_the_first_and_evaluation_the_fixed_one() -> None:
    backbone, task = build(masks_per_text=40, text_mask_most=1.0)
    batch, plain = eventful_batch(), build()[1]
    task(backbone, batch)
    assert task.masks.token is not None
    first, *others = task.masks.token.mask_CT.sum(1).unflatten(0, (8, 40)).unbind(1)
    expected, words = plain.mask(backbone, batch, plain.uniform).token, (~batch.special_CT).sum(1)
    assert expected is not None
    assert torch.equal(first, expected.mask_CT.sum(1))
    counts = torch.stack(others, 1)
    assert torch.equal(counts.amin(1), first)
    assert torch.equal(counts.amax(1), words)
    one = task.mask(backbone, batch, task.uniform)
    assert one.token is not None
    assert torch.equal(one.token.mask_CT.sum(1), first)


def test_negatives_are_the_most_alike_where_contrast_is_sure() -> None:
    """For an image the caption most like it, for a caption the image most like it."""
    _, task = build()
    image, text = (F.normalize(torch.randn(8, 6), dim=1) for _ in range(2))
    excluded = torch.eye(8, dtype=torch.bool)
    excluded[0, 1] = excluded[1, 0] = True
    sure = Contrast(image, text, image, text, torch.tensor(1e4), torch.arange(8), excluded, torch.arange(8)[:, None])
    captions, images = task.negatives(sure, 8)
    similar = (image @ text.T).masked_fill(excluded, -2.0)
    assert captions.index_B.tolist() == similar.argmax(1).tolist()
    assert images.index_B.tolist() == (text @ image.T).masked_fill(excluded, -2.0).argmax(1).tolist()
    assert captions.index_B.tolist() != images.index_B.tolist()


# ---------------------------------------------------------------------- what does not matter


def losses_of(batch: Batch, order: list[int] | None = None, **settings: Any) -> list[float]:
    backbone, task = build(**settings)
    task.set_uniform(Table(order))
    with torch.no_grad():
        return [float(term) for term in task(backbone, batch).values()]


def test_the_order_of_pairs_does_not_matter() -> None:
    order = [3, 0, 6, 2, 5, 7, 1, 4]
    batch = eventful_batch()
    assert losses_of(take(batch, torch.tensor(order)), order) == pytest.approx(losses_of(batch), rel=1e-5)


def test_a_hole_changes_nothing_for_the_other_rows() -> None:
    with_hole = toy_batch(6, holes=(5,))
    without = take(with_hole, torch.arange(5))
    assert losses_of(with_hole) == pytest.approx(losses_of(without), rel=1e-5)
    noise = with_hole.image_BCHW.clone()
    noise[5] = 100.0
    assert losses_of(with_hole._replace(image_BCHW=noise)) == pytest.approx(losses_of(without), rel=1e-5)


def test_the_longest_caption_does_not_matter() -> None:
    short = eventful_batch()._replace(**tokens([[5, 6]] * 8))
    padded = pad_text(short, LENGTH, 0)
    assert losses_of(padded) == pytest.approx(losses_of(short), rel=1e-5)
    assert [part.shape for part in padded[1:5]] == [(8, LENGTH)] * 4
    padded = pad_text(short, LENGTH, pad_id=1)
    assert (padded.token_CT[:, 4:] == 1).all()
    assert not padded.attention_CT[:, 4:].any()
    assert padded.special_CT[:, 4:].all()
    assert (padded.word_CT[:, 4:] == -1).all()


def test_terms_come_without_their_weights() -> None:
    weights = {f"weight_{name}": weight for name, weight in zip(TERMS, [0.5, 2.0, 3.0, 0.25], strict=True)}
    assert losses_of(toy_batch(), **weights) == pytest.approx(losses_of(toy_batch()))


# ---------------------------------------------------------------------- several captions an image


def with_captions(captions: int = 3) -> Batch:
    """Five images, of which the last one is a hole; the second and third have a caption in common, and the fourth shows
    the first again."""
    batch = toy_batch(5, captions=captions, holes=(4,))
    image_id_B, text_id_C = batch.image_id_B.clone(), batch.text_id_C.clone()
    image_id_B[3], text_id_C[2 * captions + 1] = image_id_B[0], text_id_C[captions]
    return batch._replace(image_id_B=image_id_B, text_id_C=text_id_C)


def slow_positives(task: MaskedPretraining, backbone: MaskVLM, batch: Batch) -> float:
    """Contrast where all captions of an image are to be found, one query at a time in NumPy."""
    with torch.no_grad():
        image = task.projection.embed_image(backbone.image(batch.image_BCHW)).double().numpy()
        text_CTD = backbone.text(batch.token_CT, batch.attention_CT)
        text = task.projection.embed_text(text_CTD, batch.attention_CT).double().numpy()
        scale = float(task.projection.logit_scale)
    owner, words = batch.owner_C.tolist(), batch.text_id_C.tolist()
    shows, valid = [batch.image_id_B[b].item() for b in range(len(image))], batch.valid_B.tolist()

    def loss(logits: list[float], positive: list[bool], counted: list[bool]) -> float:
        each = np.array(logits)[np.array(counted)]
        log_p = each - np.log(np.exp(each).sum())
        return float(-log_p[np.array(positive)[np.array(counted)]].mean())

    images, texts = [], []
    for b in (b for b, there in enumerate(valid) if there):
        own = [shows[owner[c]] == shows[b] for c in range(len(text))]
        own_words = {words[c] for c in range(len(text)) if owner[c] == b}
        counted = [valid[owner[c]] and (own[c] or words[c] not in own_words) for c in range(len(text))]
        images.append(loss((scale * text @ image[b]).tolist(), own, counted))
    for c in (c for c in range(len(text)) if valid[owner[c]]):
        own = [shows[b] == shows[owner[c]] for b in range(len(image))]
        says = [
            any(words[other] == words[c] for other in range(len(text)) if owner[other] == b) for b in range(len(image))
        ]
        counted = [valid[b] and (own[b] or not says[b]) for b in range(len(image))]
        texts.append(loss((scale * image @ text[c]).tolist(), own, counted))
    return (float(np.mean(images)) + float(np.mean(texts))) / 2


@pytest.mark.parametrize("reads", ["class", "class_and_mean"])
def test_all_captions_of_an_image_are_to_be_found(reads: str) -> None:
    batch = with_captions()
    backbone, task = build(contrast_reads=reads)
    assert float(task(backbone, batch)["itc"]) == pytest.approx(slow_positives(task, backbone, batch), rel=1e-5)
    assert float(task(backbone, with_captions(2))["itc"]) != pytest.approx(
        float(task(backbone, batch)["itc"]), rel=1e-3
    )


def test_a_checkpoint_whose_contrast_has_another_width_is_refused() -> None:
    """Its projections would be dropped, and its temperature kept."""
    with pytest.raises(UserError, match=r"model\.task\.contrast_dim: 12, .* of width 8\. Set it to 8"):
        build(contrast_dim=12)[1].warm_start(build()[1].state_dict())


class Paired(PretrainingLoss):
    """Reads fused pairs, without being matching."""

    name, needs = "paired", frozenset({Need.PAIRS})

    def __call__(self, heads: Any, step: Step) -> Tensor:
        assert step.negatives is not None
        assert len(step.crossed.fused_M.product_MD) == 3 * len(step.batch.valid_B)
        return step.crossed.fused_M.product_MD.square().mean()


@pytest.mark.parametrize("weight_itm", [0.0, 1.0])
def test_a_loss_that_needs_pairs_has_them_whether_matching_is_trained_or_not(weight_itm: float) -> None:
    backbone, task = build(weight_itm=weight_itm, losses=[Paired()])
    assert float(task(backbone, toy_batch(4))["paired"]) > 0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_what_is_no_weight_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match=r"model\.task\.weight_itc: .* is not a valid weight"):
        build(weight_itc=weight)


@pytest.mark.parametrize(("temperature", "right"), [(0.0005, False), (0.001, True), (0.5, True), (2.0, False)])
def test_a_temperature_is_within_what_training_keeps_it_in(temperature: float, right: bool) -> None:
    with nullcontext() if right else pytest.raises(UserError, match=r"model\.task\.temperature"):
        build(temperature=temperature)


@pytest.mark.parametrize(("reads", "theirs"), [("class", "class_and_mean"), ("class_and_mean", "class")])
def test_a_checkpoint_whose_contrast_reads_something_else_is_refused(reads: str, theirs: str) -> None:
    heads = build(contrast_reads=theirs)[1].state_dict()
    task = build(contrast_reads=reads)[1]
    message = (
        rf"model\.task\.contrast_reads: {reads}, but contrast of the checkpoint reads {theirs}\. Set it to {theirs}"
    )
    with pytest.raises(UserError, match=message):
        task.warm_start(heads)
    assert task.warm_start(task.state_dict()) == set(task.state_dict())


def test_the_first_caption_alone_is_masked_and_matched() -> None:
    batch = with_captions()
    first, every = first_and_all_captions(batch)
    assert first.owner_C.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(first.token_CT, batch.token_CT[::3])
    assert every.owner_C.tolist() == [0, 1, 2, 3, 4] * 3
    names = dict(zip(TERMS, losses_of(batch), strict=True)), dict(zip(TERMS, losses_of(first), strict=True))
    assert [names[0][name] for name in TERMS[1:]] == pytest.approx([names[1][name] for name in TERMS[1:]], rel=1e-5)
    assert names[0]["itc"] != pytest.approx(names[1]["itc"], rel=1e-3)


@pytest.mark.parametrize("captions", [1, 3])
def test_the_level_of_contrast_is_what_equal_cosines_cost(captions: int) -> None:
    backbone, task = build(weight_itm=0.0, weight_mlm=0.0, weight_mim=0.0)
    for part in (task.projection.image, task.projection.text):
        nn.init.zeros_(part.weight)
        nn.init.ones_(part.bias)
    with torch.no_grad():
        loss = float(task(backbone, toy_batch(6, captions=captions))["itc"])
    assert task.chance_levels(6)["itc"] == pytest.approx(loss, rel=1e-5)


def test_gradients_reach_every_caption() -> None:
    backbone, task = build(weight_itm=0.0, weight_mlm=0.0, weight_mim=0.0)
    batch = with_captions()
    task(backbone, batch)["itc"].backward()
    table = backbone.text.word_embeddings.grad
    assert table is not None
    there = batch.token_CT[batch.attention_CT & batch.valid_B[batch.owner_C][:, None]].unique()
    assert table[there].abs().sum(1).gt(0).all()


# ---------------------------------------------------------------------- contrast first


@pytest.mark.parametrize(
    "settings", [{}, {"mask_both": True}, {"masks_per_text": 2, "masked_image_share": 0.5}], ids=str
)
def test_at_first_contrast_alone_counts_and_every_parameter_has_a_gradient(settings: dict[str, Any]) -> None:
    batch = eventful_batch()
    backbone, task = build(contrast_first=0.5, **settings)
    alone, only = build(weight_itm=0.0, weight_mlm=0.0, weight_mim=0.0)
    task.run_progress = 0.49
    terms = task(backbone, batch)
    assert list(terms) == ["itc"]
    assert task.masks.patch is not None
    assert task.masks.token is not None
    assert (len(task.masks.patch.mask_BN), len(task.masks.token.token_CT)) == (1, settings.get("masks_per_text", 1))
    only.projection.load_state_dict(task.projection.state_dict())
    alone.load_state_dict(backbone.state_dict())
    expected = only(alone, batch)["itc"]
    torch.testing.assert_close(terms["itc"], expected)
    terms["itc"].backward()
    expected.backward()
    grads, wanted = gradients(backbone, task), gradients(alone, only)
    assert len(grads) == sum(1 for module in (backbone, task) for _ in module.parameters())
    for name, gradient in grads.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, wanted.get(name, torch.zeros_like(gradient)), atol=1e-6, rtol=1e-5)


def test_after_that_all_losses_are_those_of_a_step_without() -> None:
    batch = eventful_batch()
    backbone, task = build(contrast_first=0.5)
    task.set_uniform(Table())
    task.run_progress = 0.5
    with torch.no_grad():
        assert [float(term) for term in task(backbone, batch).values()] == losses_of(batch)


def test_what_waits_for_contrast() -> None:
    backbone, task = build(contrast_first=0.25)
    share, late, _ = task.training_phases(backbone)
    assert share == 0.25
    modules = (backbone.cross_image, backbone.cross_text, task.matching, task.tokens, task.pixels)
    assert {id(p) for p in late} == {id(p) for module in modules for p in module.parameters()}
    assert not task.training_phases(backbone).stopping
    _, task = build()
    assert task.training_phases(backbone) == (0.0, (), ())


def test_what_stops_where_contrast_ends() -> None:
    for freeze, names in ((True, ("image", "text", "projection")), ("image", ("image",))):
        backbone, task = build(contrast_first=0.25, freeze_aligned=freeze)
        modules = {"image": backbone.image, "text": backbone.text, "projection": task.projection}
        expected = {id(p) for name in names for p in modules[name].parameters()}
        assert {id(p) for p in task.training_phases(backbone).stopping} == expected


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("contrast", [1.0, 0.0])
def test_the_image_encoder_learns_in_a_share_of_the_run(left_out: bool, contrast: float) -> None:
    """Before it all as without; after it the same losses, no gradient in the encoder, the others' as without. A mask
    token behind the encoder goes on learning."""
    for done in (0.4, 0.5):
        results = {}
        for share in (1.0, 0.5):
            backbone, task = build(image_learns=share, weight_itc=contrast)
            backbone.image.left_out = left_out
            task.run_progress = done
            task.set_uniform(Draw(7, 0, "cpu"))
            terms = task(backbone, pad_text(toy_batch(8), LENGTH, 1))
            total(task, terms).backward()
            results[share] = {name: term.detach() for name, term in terms.items()}, gradients(backbone, task)
        torch.testing.assert_close(results[0.5][0], results[1.0][0])
        still = {f"0.image.{name}" for name, _ in backbone.image.named_parameters()}
        still -= {"0.image.mask_token"} if left_out else set()
        assert still & set(results[1.0][1])
        assert set(results[0.5][1]) == set(results[1.0][1]) - (still if done == 0.5 else set())
        for name in results[0.5][1]:
            torch.testing.assert_close(results[0.5][1][name], results[1.0][1][name], atol=1e-6, rtol=1e-5)
    share, late, stopping = task.training_phases(backbone)
    assert (share, late) == (0.5, ())
    name_of = {id(parameter): f"0.image.{name}" for name, parameter in backbone.image.named_parameters()}
    assert {name_of[id(parameter)] for parameter in stopping} == still


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("freeze", [True, "image"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"negative_queue": 8}, {"mask_both": True}, {"matching_trains_encoders": False, "negative_queue": 8}],
    ids=str,
)
def test_what_is_aligned_may_stand_still(
    settings: dict[str, Any], freeze: bool | Literal["image"], captions: int
) -> None:
    """Each loss's value as without, and the gradients of what learns then; what stands still gets none."""
    results = {}
    for still in (False, freeze):
        backbone, task = build(contrast_first=0.5, freeze_aligned=still, **settings)
        task.run_progress = 0.5
        batch = pad_text(toy_batch(8, captions=captions), LENGTH, 1)
        task.set_uniform(Draw(7, 0, "cpu"))
        terms = task(backbone, batch)
        total(task, terms).backward()
        results[still] = {name: term.detach() for name, term in terms.items()}, gradients(backbone, task)
    torch.testing.assert_close(results[freeze][0], results[False][0])
    still_now = {id(parameter) for parameter in task.training_phases(backbone).stopping}
    modules = enumerate((backbone, task))
    names = {f"{at}.{name}" for at, part in modules for name, p in part.named_parameters() if id(p) not in still_now}
    assert set(results[freeze][1]) == names & set(results[False][1])
    waited = {id(parameter) for parameter in task.training_phases(backbone).late}
    parts = enumerate((backbone, task))
    assert {f"{at}.{n}" for at, part in parts for n, p in part.named_parameters() if id(p) in waited} <= names
    assert waited <= {id(p) for part in (backbone, task) for p in part.parameters() if p.grad is not None}
    for name in results[freeze][1]:
        torch.testing.assert_close(results[freeze][1][name], results[False][1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "done", "patches"),
    [
        ({"contrast_first": 0.5}, 0.4, 8),
        ({"contrast_first": 0.5}, 0.5, None),
        ({}, 0.4, None),
        ({"weight_itm": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0}, 0.4, 8),
    ],
)
def test_alone_contrast_sees_some_patches(settings: dict[str, float], done: float, patches: int | None) -> None:
    """Half of 16 patches, others in each image and in each step."""
    backbone, task = build(contrast_patches=0.5, **settings)
    task.run_progress, calls, encode = done, [], backbone.image.forward
    backbone.image.forward = lambda *args: calls.append(args[4]) or encode(*args)  # type: ignore[method-assign, func-returns-value]
    for step in range(2):
        task.set_uniform(Draw(7, step, "cpu"))
        task(backbone, eventful_batch())
    if patches is None:
        assert calls == [None, None]
        return
    assert [subset_BV.shape for subset_BV in calls] == [(8, patches)] * 2
    drawn = {tuple(sorted(row)) for subset_BV in calls for row in subset_BV.tolist()}
    assert all(len(set(row)) == patches and set(row) <= set(range(16)) for row in drawn)
    assert len(drawn) > 12


@pytest.mark.parametrize("settings", [{}, {"weight_itm": 0.0}, {"mask_both": True}, {"masks_per_text": 2}])
def test_alone_contrast_leaves_the_cross_encoders_one_pair(settings: dict[str, Any]) -> None:
    """With the rows that it meets: they project all that they are given."""
    backbone, task = build(contrast_first=0.5, **settings)
    projected: list[int] = []
    for encoder in (backbone.cross_image, backbone.cross_text):
        original = encoder.context
        encoder.context = lambda rows, *more, original=original: projected.append(len(rows)) or original(rows, *more)  # type: ignore[method-assign, func-returns-value]
    for done in (0.4, 0.5):
        task.run_progress = done
        task.set_uniform(Draw(7, 0, "cpu"))
        task(backbone, eventful_batch())
    assert all(count <= 3 for count in projected[:2])
    assert all(count >= 8 for count in projected[2:])
    assert len(projected) == 4


@pytest.mark.parametrize("left_out", [False, True])
def test_images_that_stand_still_are_projected_once_and_get_no_gradient(left_out: bool) -> None:
    """Although the mask token of the masked ones, which stand in the same pass, learns."""
    rows = {}
    for still in (False, "image"):
        backbone, task = build(contrast_first=0.5, freeze_aligned=still, matching_trains_encoders=False)
        backbone.image.left_out = left_out
        task.run_progress, original = 0.5, backbone.cross_text.context
        contexts: list[Tensor] = []

        def looked_at(x_USD: Tensor, *more: Any, contexts: list[Tensor] = contexts, original: Any = original) -> Any:
            contexts.append(x_USD)
            return original(x_USD, *more)

        backbone.cross_text.context = looked_at  # type: ignore[method-assign]
        sum(task(backbone, pad_text(eventful_batch(), LENGTH, 1)).values()).backward()
        rows[still] = [(len(context_ULD), context_ULD.requires_grad) for context_ULD in contexts]
        assert (backbone.image.mask_token.grad is not None) == (left_out or not still)
    # Eight images; and once more, for masked words, where these give them a gradient that matching does not give.
    assert rows == {False: [(16, True)], "image": [(8, False)]}


@pytest.mark.parametrize("settings", [{}, {"weight_mim": 0.0}], ids=str)
def test_of_several_processes_images_that_stand_still_have_gradients_of_zero(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP waits for each parameter. One process here, which takes the way of several."""

    def of_two(compute: Any, *parts: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("maskvlm.utils.distributed.world_size", lambda: 2)
            return without_gradient(compute, *parts)

    monkeypatch.setattr("maskvlm.model.encoders.without_gradient", of_two)
    backbone, task = build(contrast_first=0.5, freeze_aligned="image", **settings)
    backbone.image.left_out = True
    task.run_progress = 0.5
    sum(task(backbone, pad_text(eventful_batch(), LENGTH, 1)).values()).backward()
    used = [p for p in backbone.image.parameters() if p is not backbone.image.mask_token and p.requires_grad]
    assert used
    assert all(p.grad is not None and not p.grad.any() for p in used)


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"contrast_first": 0.5, "freeze_aligned": "image"}, False),
        ({"contrast_first": 0.5, "freeze_aligned": True}, False),
        ({"contrast_first": 0.5}, True),
        ({"image_learns": 0.5}, True),
    ],
    ids=str,
)
def test_a_mask_token_that_never_learns_is_a_patch_of_the_mean_colour(settings: dict[str, Any], learns: bool) -> None:
    """No image is masked before the image encoder stands still."""
    backbone = toy_backbone()
    MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8, **settings).build(backbone)
    image = backbone.image
    blank_1CHW = torch.zeros(1, 3, image.image_size, image.image_size)
    mean_D = image.vit.patch_embed(blank_1CHW).reshape(-1, image.vit.embed_dim)[0]
    assert torch.equal(image.mask_token[0, 0], mean_D) != learns


def test_an_image_with_one_of_the_captions_is_no_negative() -> None:
    """Whichever of its captions it is."""
    batch = toy_batch(4, captions=2)
    text_id_C = torch.arange(8)
    text_id_C[3] = text_id_C[0]  # image 1's second caption is image 0's first
    text_id_C[7] = text_id_C[5]  # image 3's second is image 2's second
    every = first_and_all_captions(pad_text(batch._replace(text_id_C=text_id_C), LENGTH, 1))[1]
    vector = torch.zeros(4, 3)
    excluded = gather_contrast(every, vector, vector, torch.ones(())).excluded_BG
    assert excluded.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_mean_patch_is_one_of_the_patches_that_contrast_sees() -> None:
    """The mask tokens in the places of the others tell nothing: whatever they are, contrast is the same."""
    settings = {"weight_itm": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0}
    losses = []
    for value in (0.0, 5.0):
        backbone, task = build(contrast_patches=0.5, contrast_reads="class_and_mean", **settings)
        nn.init.constant_(backbone.image.mask_token, value)
        losses.append(float(task(backbone, eventful_batch())["itc"]))
    assert losses[0] == losses[1]


def test_patches_are_left_out_of_a_plain_vit_alone() -> None:
    backbone = toy_backbone()
    backbone.image.vit.__class__ = type("Other", (type(backbone.image.vit),), {})
    with pytest.raises(UserError, match=r"model\.task\.contrast_patches: patches can only be left out of a plain ViT"):
        build(backbone, contrast_patches=0.5)


def test_until_then_contrast_learns_as_without() -> None:
    terms, grads = [], []
    for still in (False, True):
        backbone, task = build(contrast_first=0.5, freeze_aligned=still)
        task.run_progress = 0.4
        terms.append(task(backbone, eventful_batch())["itc"])
        terms[-1].backward()
        grads.append(gradients(backbone, task))
    torch.testing.assert_close(terms[0], terms[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_mask_token_behind_the_encoder_waits_for_contrast_too() -> None:
    backbone, task = build(contrast_first=0.25, freeze_aligned=True)
    late = {id(parameter) for parameter in task.training_phases(backbone).late}
    assert id(backbone.image.mask_token) not in late
    backbone.image.left_out = True
    late_now = {id(parameter) for parameter in task.training_phases(backbone).late}
    assert late_now - late == {id(backbone.image.mask_token)}


# ---------------------------------------------------------------------- a share of the images is masked


def test_a_share_of_the_images_is_masked_and_the_rest_as_before() -> None:
    batch = eventful_batch()
    some, all_of_them = losses_of(batch, masked_image_share=0.5), losses_of(batch)
    assert some[:3] == pytest.approx(all_of_them[:3], rel=1e-5)
    backbone, task = build(masked_image_share=0.5)
    task.set_uniform(Table())
    task(backbone, batch)
    assert task.masks.patch is not None
    assert len(task.masks.patch.mask_BN) == 4
    of_first = losses_of(take(batch, torch.arange(4)))
    assert some[3] == pytest.approx(of_first[3], rel=1e-5)
    assert some[3] != pytest.approx(all_of_them[3], rel=1e-3)


def test_some_of_them_as_a_whole_in_training_alone() -> None:
    backbone, task = build(fully_masked_share=1.0)
    task(backbone, eventful_batch())
    assert task.masks.patch is not None
    assert torch.equal(task.masks.patch.mask_BN.all(1), eventful_batch().valid_B)
    task.measure.update(task, backbone, eventful_batch())
    assert not task.masks.patch.mask_BN.all(1).any()


# ---------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("one pair", toy_batch(1)),
        ("one image", toy_batch(4)._replace(image_id_B=torch.zeros(4, dtype=torch.long))),
        ("only holes", toy_batch(3, holes=(0, 1, 2))),
    ],
)
def test_batches_without_a_valid_negative(name: str, batch: Batch) -> None:
    backbone, task = build()
    terms = task(backbone, batch)
    sum(terms.values()).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(backbone, task).values())
    assert terms["itc"].item() == pytest.approx(0, abs=1e-6)
    assert all(torch.isfinite(term) for term in terms.values())
    if name == "only holes":
        assert not any(term.item() for term in terms.values())
        assert not any(grad.any() for grad in gradients(backbone, task).values())
    else:  # positives alone
        assert terms["itm"].item() == pytest.approx(Slow(task, backbone, batch).itm().item(), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_masked_and_everything_masked(ratio: float) -> None:
    backbone, task = build(image_mask_ratio=ratio, text_mask_ratio=ratio)
    terms = task(backbone, eventful_batch())
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert [bool(terms[name].item()) for name in ("mlm", "mim")] == [bool(ratio)] * 2
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in itertools.chain(backbone.parameters(), task.parameters())
    )


def test_bfloat16_gives_nearly_the_same_losses() -> None:
    expected = losses_of(eventful_batch(), weight_itm=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(eventful_batch(), weight_itm=0.0)
    assert losses == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"mask_both": True, "whole_word": True, "keep_and_swap": True}])
def test_a_step_never_asks_the_device(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Tensors without data stand for a device that would be waited for; transformers' own look at the
    padding mask is left aside."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for them
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_, **__: False)
    backbone, task = build(**settings)
    backbone.to("meta")
    task.to("meta")
    task.set_uniform(lambda *shape: torch.empty(shape, device="meta"))
    batch = Batch(*(part.to("meta") if isinstance(part, Tensor) else part for part in eventful_batch()))
    sum(task(backbone, batch).values()).backward()


@pytest.mark.gpu
def test_a_step_on_the_gpu_is_that_of_the_cpu() -> None:
    expected = losses_of(eventful_batch())
    backbone, task = build()
    backbone.cuda()
    task.cuda()
    table = Table()
    task.set_uniform(lambda *shape: table(*shape).cuda())
    batch = Batch(*(part.cuda() if isinstance(part, Tensor) else part for part in eventful_batch()))
    losses = [term.item() for term in task(backbone, batch).values()]
    assert losses == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------- weights of zero

ROWS = 5


NAMES = (*TERMS, "words", "spread")


@pytest.mark.parametrize("wanted", [w for n in range(1, 7) for w in itertools.combinations(NAMES, n)])
@pytest.mark.parametrize("mask_both", [False, True])
def test_a_weight_of_zero_leaves_no_parameter_without_gradient(wanted: tuple[str, ...], mask_both: bool) -> None:
    """Distributed training waits for the gradient of each parameter that may have one."""
    settings = {f"weight_{name}": float(name in wanted) for name in EVERY}
    backbone, task = build(mask_both=mask_both, **settings)
    terms = task(backbone, toy_batch(ROWS))
    assert tuple(terms) == wanted
    sum(terms.values()).backward()
    for name, parameter in itertools.chain(backbone.named_parameters(), task.named_parameters()):
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any() or name.endswith("key.bias"), name
    frozen = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    read = {"cross_image": {"itm", "mim", "spread"}, "cross_text": {"itm", "mlm"}, "text": {*TERMS, "spread"}}
    assert frozen - {"image"} == {part for part, terms in read.items() if not terms & set(wanted)}
    needs_mask_token = {"mim", "spread"} | ({"mlm"} if mask_both else set())
    assert backbone.image.mask_token.requires_grad == bool(needs_mask_token & set(wanted))


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (("itc", "itm", "mlm", "mim"), {"image": 2, "text": 2, "cross_image": 4, "cross_text": 4}),
        (("itc", "itm", "mlm"), {"image": 1, "text": 2, "cross_image": 3, "cross_text": 4}),
        (("itc", "itm", "mim"), {"image": 2, "text": 1, "cross_image": 4, "cross_text": 3}),
        (("itc", "mlm", "mim"), {"image": 2, "text": 2, "cross_image": 1, "cross_text": 1}),
        (("mlm", "mim"), {"image": 2, "text": 2, "cross_image": 1, "cross_text": 1}),
        (("itc", "itm"), {"image": 1, "text": 1, "cross_image": 3, "cross_text": 3}),
        (("itc", "mlm"), {"image": 1, "text": 2, "cross_text": 1}),
        (("itc",), {"image": 1, "text": 1}),
        (("words",), {"image": 1}),
        (("spread",), {"image": 2, "text": 1, "cross_image": 1}),
    ],
)
def test_each_part_makes_one_pass_over_the_rows_it_needs(
    wanted: tuple[str, ...], rows: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. A CPU takes texts in groups of like length, and a row whose pairs are in two of them twice."""
    monkeypatch.setattr("maskvlm.model.cross_attention.worth_grouping", lambda *_: False)
    backbone, task = build(**{f"weight_{name}": float(name in wanted) for name in EVERY})
    passes: list[tuple[str, int]] = []
    for part in ("image", "text", "cross_image", "cross_text"):
        getattr(backbone, part).register_forward_hook(
            lambda module, inputs, output, part=part: passes.append(
                (part, len(getattr(output, "cls_BD", output)) // ROWS)
            )
        )
    task(backbone, toy_batch(ROWS))
    assert sorted(passes) == sorted(rows.items())
    # Before it looks at the other side, a row is the same in each of its pairs: one masked, one whole.
    self_attention = {part: backbone.get_submodule(part).blocks[0].self_attention for part in rows if "cross" in part}
    counts = dict.fromkeys(self_attention, 0)

    def count(part: str) -> Callable[..., None]:
        return lambda module, inputs, output: counts.update({part: len(inputs[0]) // ROWS})

    for part, attention in self_attention.items():
        attention.register_forward_hook(count(part))
    task(backbone, toy_batch(ROWS))
    reads = {"cross_image": {"mim", "spread"}, "cross_text": {"mlm"}}
    assert counts == {part: ("itm" in wanted) + bool(reads[part] & set(wanted)) for part in counts}
    heads = {"itc": "projection", "itm": "matching", "mlm": "tokens", "mim": "pixels"}
    heads |= {"words": "detector", "spread": "spread"}
    assert {name for name, _ in task.named_children()} == {heads[name] for name in wanted}


def test_pixels_and_words_are_predicted_at_masked_positions_only() -> None:
    backbone, task = build()
    shapes = {}
    task.tokens.vocabulary.register_forward_hook(lambda _, inputs, out: shapes.update(words=tuple(out.shape)))
    task.pixels.pixels.register_forward_hook(lambda _, inputs, out: shapes.update(pixels=tuple(out.shape)))
    task.pixels.blocks.blocks[-1].feed_forward.register_forward_hook(
        lambda _, inputs, out: shapes.update(last_block=tuple(out.shape[:2]))
    )
    batch = toy_batch(ROWS)
    task(backbone, batch)
    assert shapes.pop("last_block") == (ROWS, 8)
    hidden = int(task.mask(backbone, batch, task.uniform).token.mask_CT.sum())  # a share: the same in every draw
    assert shapes == {"words": (hidden, 1, VOCAB), "pixels": (ROWS, 8, 3 * PATCH**2)}


def test_the_token_head_starts_from_the_words() -> None:
    backbone = toy_backbone()
    task = MaskedPretraining(mask_block=16, tokens_from_words=True)
    task.build(backbone)
    words_VD = backbone.text.word_embeddings
    torch.testing.assert_close(task.tokens.vocabulary.weight, words_VD - words_VD.mean(0))
    count_V = torch.zeros(VOCAB - 5, dtype=torch.long)
    count_V[7], count_V[9] = 30, 10
    task.use_token_counts(lambda: count_V)
    share_V = task.tokens.vocabulary.bias.exp()
    assert share_V.sum().item() == pytest.approx(1, rel=1e-5)
    assert (share_V[7] / share_V[9]).item() == pytest.approx(31 / 11, rel=1e-5)
    assert (share_V[9] / share_V[VOCAB - 1]).item() == pytest.approx(11, rel=1e-5)
    plain = MaskedPretraining(mask_block=16)
    plain.build(backbone)
    plain.use_token_counts(lambda: pytest.fail("the texts are not read for nothing"))
    assert not plain.tokens.vocabulary.bias.any()
    wider = MaskVLM(toy_backbone().image, toy_backbone(width=32).text, 2, 2, width=16)
    with pytest.raises(UserError, match="tokens_from_words: words are 32 wide, the token head reads 16"):
        MaskedPretraining(mask_block=16, tokens_from_words=True).build(wider)


# ---------------------------------------------------------------------- chance levels


def test_levels_of_a_model_that_has_learned_nothing() -> None:
    backbone, task = build(text_mask_ratio=1.0, image_mask_ratio=1.0, weight_itm=2.0)
    assert task.chance_levels(64) == pytest.approx({"itc": math.log(64), "itm": 0.636514}, rel=1e-6)
    batch = toy_batch(4)._replace(**tokens([[5, 5, 5, 6]] * 4))
    task(backbone, batch)
    levels = task.chance_levels(64)
    assert levels["mlm"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-5)
    mean_C = batch.image_BCHW.mean((0, 2, 3), keepdim=True)
    assert levels["mim"] == pytest.approx((batch.image_BCHW - mean_C).abs().mean().item(), rel=1e-5)
    task.eval()
    task(backbone, toy_batch(4))
    assert task.chance_levels(64) == levels  # evaluation leaves them alone


def test_where_every_text_has_a_phrase_its_weight_cancels() -> None:
    """A weight is relative to other words, of which none is masked here: four words of 0.01 sum to below 1."""

    def step(weight: float) -> tuple[float, float]:
        backbone, task = build(text_masking=ChosenPhrases(["above", "below"], weight=weight))
        backbone.text.ids_of = lambda phrase: [7 if "above" in phrase else 8]  # type: ignore[method-assign]
        batch = each_token_a_word(toy_batch(4)._replace(**tokens([[7, 5], [9, 7], [8, 5], [6, 8]])))
        loss = task(backbone, batch)["mlm"].item()
        return loss, task.chance_levels(4)["mlm"]

    loss, level = step(0.01)
    assert (loss, level) == pytest.approx(step(1.0), rel=1e-4)
    assert level == pytest.approx(math.log(2), rel=1e-4)


def test_the_level_of_pixels_leaves_out_what_is_not_masked() -> None:
    """An image that could not be read, zeros all over, and places that fill up: blocks of 24 px do not divide 32."""
    backbone, task = build(mask_block=24)
    batch = toy_batch(4, holes=(1,))
    batch = batch._replace(image_BCHW=batch.image_BCHW + 2 * batch.valid_B[:, None, None, None])
    task(backbone, batch)
    patch = task.masks.patch
    assert patch is not None
    assert not patch.weight_BK[batch.valid_B].all()
    masked = patchify(batch.image_BCHW, PATCH)[patch.mask_BN].view(-1, 3)
    error = masked - masked.mean(0)
    assert task.chance_levels(64)["mim"] == pytest.approx(error.abs().mean().item(), rel=1e-5)


def test_the_level_of_the_words_present_is_what_their_frequencies_cost() -> None:
    backbone, task = build(weight_words=1.0)
    batch = toy_batch(4)._replace(**tokens([[5, 6], [5, 7], [5, 6], [5, 8]]))
    task(backbone, batch)
    share = {5: 1 - 1e-6, 6: 0.5, 7: 0.25, 8: 0.25}
    rows = ((5, 6), (5, 7), (5, 6), (5, 8))
    nats = [sum(-math.log(p if word in row else 1 - p) for word, p in share.items()) / 2 for row in rows]
    assert task.chance_levels(64)["words"] == pytest.approx(sum(nats) / 4, rel=1e-4, abs=1e-4)


def test_the_level_of_spread_is_its_variance_over_masked_patches() -> None:
    """One image could not be read, and in each of the others patch n varies by n: half of its pixels are n above and
    half n below."""
    backbone, task = build(weight_spread=1.0, mask_block=24)
    batch = toy_batch(4, holes=(1,))
    sign = torch.tensor([1.0, -1.0]).repeat(PATCH * PATCH // 2).view(PATCH, PATCH)
    image_CHW = torch.cat([torch.cat([sign * (4 * r + c) for c in range(4)], 1) for r in range(4)]).expand(3, -1, -1)
    task(backbone, batch._replace(image_BCHW=image_CHW * batch.valid_B[:, None, None, None]))
    patch = task.masks.patch
    assert patch is not None
    numbers = patch.index_BK[patch.weight_BK > 0].double()
    assert task.chance_levels(64)["spread"] == pytest.approx(numbers.var(correction=0).item(), rel=1e-5)


def test_levels_of_weightless_losses_are_left_out() -> None:
    _, task = build(weight_itm=0.0, weight_mlm=0.0, weight_mim=0.0)
    assert task.chance_levels(8) == pytest.approx({"itc": math.log(8)})


# ---------------------------------------------------------------------- what matching trains


@pytest.mark.parametrize("mask_both", [False, True])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"weight_mim": 0.0},
        {"weight_mlm": 0.0},
        {"weight_itc": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0, "weight_spread": 1.0},
    ],
    ids=str,
)
def test_matching_may_leave_the_encoders_to_the_other_losses(wanted: dict[str, float], mask_both: bool) -> None:
    """Each loss's gradient as without the option, but matching's in the encoders, which is none."""
    results = {}
    for trains in (True, False):
        backbone, task = build(matching_trains_encoders=trains, mask_both=mask_both, negative_queue=8, **wanted)
        with torch.no_grad():
            task(backbone, pad_text(eventful_batch(), LENGTH, 1))  # fills the queue
        task.set_uniform(Draw(7, 0, "cpu"))
        terms = task(backbone, pad_text(eventful_batch(), LENGTH, 1))
        for name, term in terms.items():
            backbone.zero_grad()
            task.zero_grad()
            term.backward(retain_graph=True)
            results[trains, name] = term.detach(), gradients(backbone, task)
    for name in terms:
        (term, usual), (same, gradient) = results[True, name], results[False, name]
        torch.testing.assert_close(same, term)
        encoders = {key for key in usual if key.startswith(("0.image.", "0.text."))}
        assert encoders
        for key, value in usual.items():
            none = name == "itm" and key in encoders
            expected = torch.zeros_like(value) if none else value
            torch.testing.assert_close(gradient.get(key, torch.zeros_like(value)), expected, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mask_ratio": 1.2}, "model.task.image_mask_ratio: 1.2"),
        ({"fully_masked_share": -0.1}, "model.task.fully_masked_share: -0.1"),
        ({"contrast_patches": 0.0}, "model.task.contrast_patches: 0.0 is out of range"),
        ({"masks_per_text": 0}, "model.task.masks_per_text: 0"),
        ({"text_mask_most": 0.2}, r"model.task.text_mask_most: 0.2 is not from text_mask_ratio \(0.3\) to 1"),
        ({"text_mask_most": 1.2}, "model.task.text_mask_most: 1.2 is not from"),
        ({"masked_image_share": 0.0}, "model.task.masked_image_share: 0.0 is out of range"),
        ({"masked_image_share": 1.5}, "model.task.masked_image_share: 1.5 is out of range"),
        ({"masked_image_share": 0.5, "mask_both": True}, "model.task.masked_image_share: mask_both masks every image"),
        ({"contrast_first": 1.0}, "model.task.contrast_first: 1.0 is not a share below 1"),
        ({"image_learns": 0.0}, "model.task.image_learns: 0.0 is out of range"),
        ({"image_learns": 0.5, "contrast_first": 0.5}, "model.task.image_learns: contrast_first has phases of its own"),
        ({"contrast_first": 0.5, "weight_itc": 0.0}, "model.task.contrast_first: there is no contrast"),
        ({"freeze_aligned": True}, "model.task.freeze_aligned: nothing is aligned first: contrast_first is 0"),
        (
            {
                "freeze_aligned": True,
                "contrast_first": 0.5,
                "weight_itm": 0.0,
                "weight_mlm": 0.0,
                "weight_mim": 0.0,
            },
            "model.task.freeze_aligned: contrast is the only loss: after contrast_first nothing would learn",
        ),
        (
            {"matching_trains_encoders": False, "weight_itc": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0},
            "model.task.matching_trains_encoders: no other loss trains the encoders",
        ),
        (
            {"exchanged_share": 0.5, "weight_itm": 0.0},
            "model.task.exchanged_share: 0.5, but there is no matching: weight_itm is 0",
        ),
        ({"exchanged_share": 1.5}, "model.task.exchanged_share: 1.5 is out of range"),
        ({"rerank_contrast": -1.0}, "model.task.rerank_contrast: -1.0"),
        ({"text_mask_ratio": -0.1}, "model.task.text_mask_ratio: -0.1"),
        ({"text_mask_ratio": math.nan}, "model.task.text_mask_ratio: nan"),
        ({"weight_mlm": -1.0}, "model.task.weight_mlm: -1.0"),
        ({f"weight_{name}": 0.0 for name in TERMS}, "all loss weights are 0"),
        ({"mask_block": 12}, "model.task.mask_block: 12 px"),
        ({"mask_block": 0}, "model.task.mask_block: 0 px"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**settings)


def test_the_decoder_knows_places_where_it_is_told_to() -> None:
    """Off (the paper's), it paints every patch of the same features alike; no other part starts otherwise with it."""
    tasks = []
    for option in (False, True):
        backbone = toy_backbone()
        torch.manual_seed(3)
        tasks.append(MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8, decoder_positions=option))
        tasks[-1].build(backbone)
    plain, placed = tasks
    assert plain.pixels.blocks.pos_embed is None
    same = {name: torch.equal(part, placed.state_dict()[name]) for name, part in plain.state_dict().items()}
    assert all(same.values()), same
    assert placed.state_dict().keys() - same.keys() == {"pixels.blocks.pos_embed"}
    generator = torch.Generator().manual_seed(0)
    image_BLD = torch.randn(2, 1, 16, generator=generator).expand(2, 17, 16)
    text_BTD = torch.randn(2, 5, 16, generator=generator)
    for task, alike in ((plain, True), (placed, False)):
        painted_BKP = task.pixels(image_BLD, text_BTD, torch.ones(2, 5, dtype=torch.bool), torch.tensor([[0, 7]] * 2))
        assert torch.allclose(painted_BKP[:, 0], painted_BKP[:, 1], atol=1e-6) == alike


def test_the_decoders_places_follow_the_size_of_the_image() -> None:
    """A checkpoint of 32 px taken over at 64: resized as the encoder's are, so that everything is taken over."""
    tasks = []
    for size in (32, 64):
        backbone = toy_backbone(size=size)
        tasks.append(MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8, decoder_positions=True))
        tasks[-1].build(backbone)
    small, large = tasks
    assert large.warm_start(small.state_dict()) == set(large.state_dict())
    theirs, ours = small.pixels.blocks.pos_embed, large.pixels.blocks.pos_embed
    assert theirs is not None
    assert ours is not None
    assert torch.equal(ours, resample_abs_pos_embed(theirs, list(large.pixels.blocks.grid or ())))


# ---------------------------------------------------------------------- it learns


def test_eight_pairs_are_learned_by_heart() -> None:
    backbone = toy_backbone(seed=1, width=32)
    task = MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=16, pixel_loss="squared")
    task.build(backbone)
    batch = toy_batch(8, seed=3)
    coarse = F.interpolate(batch.image_BCHW[:, :, :4, :4], scale_factor=8)  # one colour a patch
    batch = batch._replace(image_BCHW=coarse)
    parameters = [*backbone.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    recent = []
    for step in range(150):
        task.set_uniform(Draw(0, step, "cpu"))
        terms = task(backbone, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append([float(term.detach()) for term in terms.values()])
    last = dict(zip(TERMS, torch.tensor(recent[-20:]).mean(0).tolist(), strict=True))
    chance_levels = task.chance_levels(8)
    learned = {"itc": 0.1, "itm": 0.2, "mlm": 0.2, "mim": 0.65}  # of the chance level
    assert {name for name in TERMS if last[name] > learned[name] * chance_levels[name]} == set(), (last, chance_levels)


def test_the_words_term_asks_the_image_alone_and_changes_no_other() -> None:
    batch = eventful_batch()
    backbone, task = build()
    plain = task(backbone, batch)
    backbone, task = build(weight_words=10.0)
    terms = task(backbone, batch)
    others = {name: term.item() for name, term in terms.items() if name != "words"}
    assert others == pytest.approx({name: term.item() for name, term in plain.items()})
    terms["words"].backward()
    moved = {name.split(".")[0] for name, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"image"}
    other = batch._replace(image_BCHW=batch.image_BCHW.roll(1, 0))
    assert task(backbone, other)["words"].item() != pytest.approx(terms["words"].item())


def test_special_tokens_are_no_words_of_an_image() -> None:
    batch = eventful_batch()
    plain, padded = (WordsPresent.words(each, VOCAB) for each in (batch, pad_text(batch, LENGTH, 0)))
    assert torch.equal(plain, padded)
    for row, words_V in enumerate(plain):
        there = batch.token_CT[row][~batch.special_CT[row]]
        assert set(words_V.nonzero().flatten().tolist()) == {*there.tolist()}


def test_an_image_that_could_not_be_read_is_not_kept(tmp_path: Path) -> None:
    """Its blank would be taken for its features from then on."""
    backbone, task = build()
    backbone.train()
    backbone.image.frozen_blocks = FrozenBlocks(backbone.image.vit, 1, str(tmp_path))
    backbone.image.frozen_blocks.open_cache("data", 8)
    feature_cache = backbone.image.frozen_blocks.cache
    assert feature_cache is not None
    task(backbone, toy_batch(8, holes=(4,))._replace(index_B=torch.arange(8)))
    assert feature_cache.written_R.tolist() == [row != 4 for row in range(8)]


def test_the_next_task_trains_what_the_last_one_had_no_loss_for() -> None:
    """Aligned first, fused later; fails where a task leaves the backbone frozen. What was frozen by hand stays so."""
    backbone = toy_backbone()
    every = {name for name, _ in backbone.named_parameters()}

    def learned() -> set[str]:
        return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}

    MaskedPretraining(mask_block=16, weight_itm=0.0, weight_mlm=0.0, weight_mim=0.0).build_once(backbone)
    fused = {name for name in every if name.startswith(("cross_", "image.mask_token"))}
    assert learned() == every - fused
    by_hand = {"image.vit.patch_embed.proj.bias", "image.vit.patch_embed.proj.weight"}
    backbone.image.vit.patch_embed.requires_grad_(False)
    MaskedPretraining(mask_block=16).build_once(backbone)
    assert learned() == every - by_hand


def test_a_head_that_a_checkpoint_brings_keeps_what_it_learned_of_the_words() -> None:
    """A new one is told how often each comes, also where other parts come from a checkpoint."""
    counts = torch.arange(1, VOCAB + 1)
    _, task = build(tokens_from_words=True)
    heads = {name: torch.ones_like(value) for name, value in task.state_dict().items()}
    for loaded in (False, True):
        task.warm_start({name: value for name, value in heads.items() if loaded or not name.startswith("tokens.")})
        task.use_token_counts(lambda: counts)
        assert bool((task.tokens.vocabulary.bias == 1).all()) == loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_loss": "mse"}, "model.task.pixel_loss: 'mse' is not one of the choices. Give l1, squared, smooth_l1"),
        ({"freeze_aligned": "both", "contrast_first": 0.5}, "model.task.freeze_aligned: 'both' is not one"),
        ({"contrast_reads": "mean"}, "model.task.contrast_reads: 'mean' is not one of the choices"),
    ],
)
def test_choices_are_checked_without_the_command_line_too(options: dict[str, Any], message: str) -> None:
    """Otherwise another one would be trained, and its checkpoint refused."""
    with pytest.raises(UserError, match=re.escape(message)):
        MaskedPretraining(**options)
