"""One training step against separate passes for every pair, and what must not change its losses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from slow_step import Slow, build, eventful_batch, gradients
from torch import Tensor, nn
from torch.nn import functional as F
from toys import LENGTH, VOCAB, take, tokens, toy_backbone, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.cross_batch import Contrast, first_and_all_captions, gather_contrast, pad_text
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.pretraining_losses import WordsPresent
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError

TERMS = ("itc", "itm", "mlm", "mim")
EVERY = ("itc", "itm", "words", "spread", "mlm", "mim")
ALONE = {"weight_itm": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0}


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


# Each against the pair-by-pair formulas in `slow_step`.
VARIANTS: dict[str, dict[str, Any]] = {
    "weighted": {"weight_itc": 0.5, "weight_itm": 2.0, "weight_mlm": 3.0, "weight_mim": 0.25},
    "pixels": {"pixel_loss": "squared", "pixel_norm": True, "image_mask_ratio": 0.3, "decoder_positions": True},
    "words": {"whole_word": True, "keep_and_swap": True, "text_mask_ratio": 0.6, "weight_itc": 0.0},
    "all six": {"weight_words": 0.5, "weight_spread": 2.0, "tokens_from_words": True},
    "texts masked twice, of any share": {"masks_per_text": 2, "text_mask_most": 1.0},
    "both masked, texts twice": {"mask_both": True, "masks_per_text": 2},
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
    for index_B, weight_B in task.last_negatives:
        assert weight_B.all()
        assert 4 not in index_B.tolist()
        assert all(i != j and {i, j} not in ({0, 1}, {2, 3}) for i, j in enumerate(index_B.tolist()))


def test_maskings_of_a_text_are_independent_and_evaluation_has_one_of_the_fixed_share() -> None:
    """The first masks the fixed share, too, and the further ones any from it to all words."""
    backbone, task = build(masks_per_text=40, text_mask_most=1.0)
    batch, plain = eventful_batch(), build()[1]
    task(backbone, batch)
    mask_CXT = task.masks.token.mask_CT.unflatten(0, (8, 40))
    counts, words = mask_CXT.sum(2), (~batch.special_CT).sum(1)
    expected = plain.mask(backbone, batch, plain.uniform).token
    assert torch.equal(counts[:, 0], expected.mask_CT.sum(1))
    assert torch.equal(counts[:, 1:].amin(1), counts[:, 0])
    assert torch.equal(counts[:, 1:].amax(1), words)
    assert all((mask_CXT[:, at] != mask_CXT[:, at + 1]).any(1).sum() > 2 for at in range(10))
    one = task.mask(backbone, batch, task.uniform).token
    assert torch.equal(one.mask_CT.sum(1), counts[:, 0])


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


def test_neither_order_nor_a_hole_nor_the_longest_caption_matters() -> None:
    order = [3, 0, 6, 2, 5, 7, 1, 4]
    batch = eventful_batch()
    assert losses_of(take(batch, torch.tensor(order)), order) == pytest.approx(losses_of(batch), rel=1e-5)
    with_hole = toy_batch(6, holes=(5,))
    with_hole.image_BCHW[5] = 100.0
    assert losses_of(with_hole) == pytest.approx(losses_of(take(with_hole, torch.arange(5))), rel=1e-5)
    short = batch._replace(**tokens([[5, 6]] * 8))
    assert losses_of(pad_text(short, LENGTH, 0)) == pytest.approx(losses_of(short), rel=1e-5)
    padded = pad_text(short, LENGTH, pad_id=1)
    assert (padded.token_CT[:, 4:] == 1).all()
    assert not padded.attention_CT[:, 4:].any()
    assert padded.special_CT[:, 4:].all()
    assert (padded.word_CT[:, 4:] == -1).all()


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
    term = task(backbone, batch)["itc"]
    assert term.item() == pytest.approx(slow_positives(task, backbone, batch), rel=1e-5)
    term.backward()
    table = backbone.text.word_embeddings.grad
    there = batch.token_CT[batch.attention_CT & batch.valid_B[batch.owner_C][:, None]].unique()
    assert table[there].abs().sum(1).gt(0).all()  # the gradient reaches every caption


def test_the_first_caption_alone_is_masked_and_matched() -> None:
    batch = with_captions()
    first, every = first_and_all_captions(batch)
    assert first.owner_C.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(first.token_CT, batch.token_CT[::3])
    assert every.owner_C.tolist() == [0, 1, 2, 3, 4] * 3
    of_all, of_first = losses_of(batch), losses_of(first)
    assert of_all[1:] == pytest.approx(of_first[1:], rel=1e-5)
    assert of_all[0] != pytest.approx(of_first[0], rel=1e-3)


@pytest.mark.parametrize("captions", [1, 3])
def test_the_level_of_contrast_is_what_equal_cosines_cost(captions: int) -> None:
    backbone, task = build(**ALONE)
    for part in (task.projection.image, task.projection.text):
        nn.init.zeros_(part.weight)
        nn.init.ones_(part.bias)
    loss = task(backbone, toy_batch(6, captions=captions))["itc"].item()
    assert task.chance_levels(6) == {"itc": pytest.approx(loss, rel=1e-5)}


def test_the_temperature_is_kept_in_its_range_in_training_alone() -> None:
    backbone, task = build(**ALONE)
    nn.init.constant_(task.projection.log_scale, 20.0)
    for training in (False, True):
        task.train(training)(backbone, toy_batch(3))
        assert (task.projection.log_scale.item() < 7) == training


# ---------------------------------------------------------------------- contrast first


@pytest.mark.parametrize(
    "settings",
    [{"freeze_aligned": True}, {"mask_both": True}, {"masks_per_text": 2, "masked_image_share": 0.5}],
    ids=str,
)
def test_at_first_contrast_alone_counts_and_every_parameter_has_a_gradient(settings: dict[str, Any]) -> None:
    batch = eventful_batch()
    backbone, task = build(contrast_first=0.5, **settings)
    alone, only = build(**ALONE)
    task.run_progress = 0.49
    terms = task(backbone, batch)
    assert list(terms) == ["itc"]
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


def test_what_waits_for_contrast_and_what_stops_where_it_ends() -> None:
    for freeze, names in ((False, ()), (True, ("image", "text", "projection")), ("image", ("image",))):
        backbone, task = build(contrast_first=0.25, freeze_aligned=freeze)
        share, late, stopping = task.training_phases(backbone)
        assert share == 0.25
        modules = (backbone.cross_image, backbone.cross_text, task.matching, task.tokens, task.pixels)
        late_ids = {id(p) for p in late}
        assert late_ids == {id(p) for module in modules for p in module.parameters()}
        first = {"image": backbone.image, "text": backbone.text, "projection": task.projection}
        assert {id(p) for p in stopping} == {id(p) for name in names for p in first[name].parameters()}
        backbone.image.left_out = True  # a mask token behind the encoder waits, too
        later_ids = {id(p) for p in task.training_phases(backbone).late}
        assert later_ids - late_ids == {id(backbone.image.mask_token)}
    assert build()[1].training_phases(backbone) == (0.0, (), ())
    backbone, task = build(image_learns=0.25)
    share, late, stopping = task.training_phases(backbone)
    assert (share, late, {id(p) for p in stopping}) == (0.25, (), {id(p) for p in backbone.image.parameters()})


@pytest.mark.parametrize(
    ("option", "captions", "settings"),
    [
        ({"freeze_aligned": True}, 1, {"contrast_first": 0.5, "mask_both": True}),
        ({"freeze_aligned": True}, 2, {"contrast_first": 0.5, "negative_queue": 8}),
        ({"freeze_aligned": "image"}, 2, {"contrast_first": 0.5}),
        (
            {"freeze_aligned": "image"}, 1,
            {"contrast_first": 0.5, "matching_trains_encoders": False, "negative_queue": 8},
        ),
        ({"image_learns": 0.5}, 1, {}),
        ({"image_learns": 0.5}, 1, {"weight_itc": 0.0, "left_out": True}),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_been_learned_may_stand_still(option: dict[str, Any], captions: int, settings: dict[str, Any]) -> None:
    """Each loss's value as without, and the gradients of what learns then; what stands still gets none."""
    for progress in (0.49, 0.5):
        results = []
        for more in ({}, option):
            left_out = settings.get("left_out", False)
            backbone, task = build(**{name: value for name, value in settings.items() if name != "left_out"}, **more)
            backbone.image.left_out, task.run_progress = left_out, progress
            terms = task(backbone, pad_text(toy_batch(8, captions=captions), LENGTH, 1))
            total(task, terms).backward()
            results.append(({name: term.detach() for name, term in terms.items()}, gradients(backbone, task)))
        (terms, grads), (still_terms, still_grads) = results
        torch.testing.assert_close(still_terms, terms)
        stopped = {id(p) for p in task.training_phases(backbone).stopping} if progress == 0.5 else set()
        parts = enumerate((backbone, task))
        still = {f"{at}.{name}" for at, part in parts for name, p in part.named_parameters() if id(p) in stopped}
        assert bool(still & set(grads)) == (progress == 0.5)
        assert set(still_grads) == set(grads) - still
        for name, gradient in still_grads.items():
            torch.testing.assert_close(gradient, grads[name], atol=1e-6, rtol=1e-5)


def test_alone_contrast_sees_some_patches() -> None:
    """Half of 16 patches, others in each image."""
    backbone, task = build(contrast_patches=0.5, contrast_first=0.5)
    calls, encode = [], backbone.image.forward
    backbone.image.forward = lambda *args: calls.append(args[4]) or encode(*args)
    for task.run_progress in (0.4, 0.5):
        task(backbone, eventful_batch())
    subset_BV, none = calls
    assert none is None
    drawn = {tuple(sorted(row)) for row in subset_BV.tolist()}
    assert all(len(row) == len(set(row)) == 8 and set(row) <= set(range(16)) for row in drawn)
    assert len(drawn) > 6


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


# ---------------------------------------------------------------------- a share of the images is masked


def test_a_share_of_the_images_is_masked_and_the_rest_as_before() -> None:
    batch = eventful_batch()
    some, all_of_them = losses_of(batch, masked_image_share=0.5), losses_of(batch)
    assert some[:3] == pytest.approx(all_of_them[:3], rel=1e-5)
    of_first = losses_of(take(batch, torch.arange(4)))
    assert some[3] == pytest.approx(of_first[3], rel=1e-5)
    assert some[3] != pytest.approx(all_of_them[3], rel=1e-3)
    backbone, task = build(fully_masked_share=1.0)  # as a whole in training alone
    assert task.mask(backbone, batch, task.uniform, True).patch.mask_BN.all(1).tolist() == batch.valid_B.tolist()
    assert not task.mask(backbone, batch, task.uniform).patch.mask_BN.all(1).any()


# ---------------------------------------------------------------------- edges


BLIND = {
    "one pair": toy_batch(1),
    "one image": toy_batch(4)._replace(image_id_B=torch.zeros(4, dtype=torch.long)),
    "only holes": toy_batch(3, holes=(0, 1, 2)),
}


@pytest.mark.parametrize("name", BLIND)
def test_batches_without_a_valid_negative(name: str) -> None:
    backbone, task = build()
    terms = task(backbone, BLIND[name])
    sum(terms.values()).backward()
    assert all(torch.isfinite(each).all() for each in (*terms.values(), *gradients(backbone, task).values()))
    assert terms["itc"].item() == pytest.approx(0, abs=1e-6)
    if name == "only holes":
        assert not any(each.any() for each in (*terms.values(), *gradients(backbone, task).values()))
    else:  # positives alone
        assert terms["itm"].item() == pytest.approx(Slow(task, backbone, BLIND[name]).itm().item(), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_masked_and_everything_masked(ratio: float) -> None:
    backbone, task = build(image_mask_ratio=ratio, text_mask_ratio=ratio)
    terms = task(backbone, eventful_batch())
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert [bool(terms[name].item()) for name in ("mlm", "mim")] == [bool(ratio)] * 2
    weights = [*backbone.parameters(), *task.parameters()]
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights)


# ---------------------------------------------------------------------- weights of zero

ROWS = 5


WANTED = [*((name,) for name in EVERY), ("mlm", "mim"), ("itc", "itm"), ("words", "spread"), ("itc", "mlm", "mim")]


@pytest.mark.parametrize("mask_both", [False, True])
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_a_weight_of_zero_leaves_no_parameter_without_gradient(wanted: tuple[str, ...], mask_both: bool) -> None:
    """Distributed training waits for the gradient of each parameter that may have one."""
    settings = {f"weight_{name}": float(name in wanted) for name in EVERY}
    backbone, task = build(mask_both=mask_both, **settings)
    terms = task(backbone, toy_batch(ROWS))
    assert set(terms) == set(wanted)
    sum(terms.values()).backward()
    heads = {"itc": "projection", "itm": "matching", "mlm": "tokens", "mim": "pixels", "words": "detector"}
    assert {name for name, _ in task.named_children()} == {heads.get(name, name) for name in wanted}
    for name, parameter in (*backbone.named_parameters(), *task.named_parameters()):
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any() or name.endswith("key.bias"), name
    frozen = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    read = {"cross_image": {"itm", "mim", "spread"}, "cross_text": {"itm", "mlm"}, "text": {*TERMS, "spread"}}
    assert frozen - {"image"} == {part for part, terms in read.items() if not terms & set(wanted)}
    needs_mask_token = {"mim", "spread"} | ({"mlm"} if mask_both else set())
    assert backbone.image.mask_token.requires_grad == bool(needs_mask_token & set(wanted))


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
    # A head that a checkpoint brings keeps what it learned of the words.
    _, task = build(tokens_from_words=True)
    heads = {name: torch.ones_like(value) for name, value in task.state_dict().items()}
    for loaded in (False, True):
        task.warm_start({name: value for name, value in heads.items() if loaded or not name.startswith("tokens.")})
        task.use_token_counts(lambda: count_V)
        assert bool((task.tokens.vocabulary.bias == 1).all()) == loaded


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


# ---------------------------------------------------------------------- what matching trains


@pytest.mark.parametrize(
    ("wanted", "mask_both"),
    [
        ({}, False),
        ({}, True),
        ({"weight_mim": 0.0}, False),
        ({"weight_itc": 0.0, "weight_mlm": 0.0, "weight_mim": 0.0, "weight_spread": 1.0}, False),
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


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"image_mask_ratio": 1.2}, "image_mask_ratio: 1.2"),
    ({"contrast_patches": 0.0}, "contrast_patches: 0.0"),
    ({"masked_image_share": 0.5, "mask_both": True}, "masked_image_share: mask_both"),
    ({"image_learns": 0.5, "contrast_first": 0.5}, "image_learns: contrast_first"),
    ({"contrast_first": 0.5, "weight_itc": 0.0}, "contrast_first: there is no contrast"),
    ({"freeze_aligned": True}, "freeze_aligned: nothing is aligned first"),
    ({"freeze_aligned": True, "contrast_first": 0.5, **ALONE}, "freeze_aligned: contrast is the only loss"),
    ({"matching_trains_encoders": False, **ALONE, "weight_itc": 0.0, "weight_itm": 1.0}, "matching_trains_encoders"),
    ({"weight_mlm": -1.0}, "weight_mlm: -1.0"),
    ({"weight_itc": 0.0, **ALONE}, "all loss weights are 0"),
    ({"mask_block": 12}, "mask_block: 12 px"),
    ({"temperature": 0.0005}, "temperature"),
]


@pytest.mark.parametrize(("settings", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**settings)


def test_what_does_not_fit_is_refused() -> None:
    """A checkpoint's projections would be dropped, and its temperature kept."""
    mean = build(contrast_reads="class_and_mean")[1]
    for task, heads, message in (
        (build(contrast_dim=12)[1], build()[1].state_dict(), "contrast_dim: 12"),
        (build()[1], mean.state_dict(), "contrast_reads: class, .* Set it to class_and_mean"),
        (mean, build()[1].state_dict(), "contrast_reads: class_and_mean, .* Set it to class"),
    ):
        with pytest.raises(UserError, match=message):
            task.warm_start(heads)
    assert mean.warm_start(mean.state_dict()) == set(mean.state_dict())
    wider = MaskVLM(toy_backbone().image, toy_backbone(width=32).text, 2, 2, width=16)
    with pytest.raises(UserError, match="tokens_from_words: words are 32 wide"):
        build(wider, tokens_from_words=True)


def test_the_words_term_asks_the_image_alone_and_changes_no_other() -> None:
    batch = eventful_batch()
    backbone, task = build()
    plain = task(backbone, batch)
    backbone, task = build(weight_words=10.0)
    terms = task(backbone, batch)
    assert all(term.item() == pytest.approx(terms[name].item()) for name, term in plain.items())
    terms["words"].backward()
    moved = {name.split(".")[0] for name, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"image"}
    padded = pad_text(batch, LENGTH, 0)
    for row, words_V in enumerate(WordsPresent.words(padded, VOCAB)):
        assert {*words_V.nonzero().flatten().tolist()} == {*batch.token_CT[row][~batch.special_CT[row]].tolist()}


def test_the_next_task_trains_what_the_last_one_had_no_loss_for() -> None:
    """Aligned first, fused later; fails where a task leaves the backbone frozen."""
    backbone = toy_backbone()
    every = {name for name, _ in backbone.named_parameters()}

    def learned() -> set[str]:
        return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}

    MaskedPretraining(mask_block=16, weight_itm=0.0, weight_mlm=0.0, weight_mim=0.0).build_once(backbone)
    fused = {name for name in every if name.startswith(("cross_", "image.mask_token"))}
    assert learned() == every - fused
    MaskedPretraining(mask_block=16).build_once(backbone)
    assert learned() == every
