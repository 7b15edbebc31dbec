"""Re-ranking against every pair scored by itself, and what it holds at once."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from slow_step import build
from torch import Tensor, nn
from toys import slow_cross, take, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.heads import Matching, Projection
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.rerank import (
    EncodedBatch,
    Gallery,
    gather_gallery,
    in_rounds,
    match_pairs,
    offload,
    score_gallery,
)
from maskvlm.objectives.retrieval_metrics import Rankings, best_items, candidates, ranking, rankings

IMAGES, CAPTIONS = 5, 3
OWNER = torch.arange(IMAGES).repeat_interleave(CAPTIONS)


class World(NamedTuple):
    backbone: MaskVLM
    head: Matching
    gallery: Gallery
    odds_BC: Tensor


@torch.no_grad()
def encoded_batch(backbone: MaskVLM, projection: Projection, batch: Batch, matched: bool = True) -> EncodedBatch:
    text_CTD = backbone.text(batch.token_CT, batch.attention_CT)
    return offload(projection, batch, backbone.image(batch.image_BCHW), text_CTD, matched)


def gallery_of(backbone: MaskVLM, projection: Projection, batch: Batch, *sizes: int) -> Gallery:
    """The batch in tiles of these sizes."""
    rows = torch.arange(len(batch.image_BCHW)).split(list(sizes))
    gallery = gather_gallery([encoded_batch(backbone, projection, take(batch, part)) for part in rows])
    assert gallery is not None
    return gallery


@torch.no_grad()
def slow_odds(backbone: MaskVLM, head: Matching, batch: Batch) -> Tensor:
    """Log-odds of a match of every image with every caption, one pair at a time."""
    odds_BC = torch.zeros(len(batch.image_BCHW), len(batch.owner_C))
    image = [backbone.image(one_CHW[None])[0] for one_CHW in batch.image_BCHW]
    for c, attention_T in enumerate(batch.attention_CT):
        token_1T = batch.token_CT[c, attention_T][None]
        words_TD = backbone.text(token_1T, torch.ones_like(token_1T, dtype=torch.bool))[0]
        for b, image_LD in enumerate(image):
            image_D = slow_cross(backbone.cross_image, image_LD, words_TD)[0]
            text_D = slow_cross(backbone.cross_text, words_TD, image_LD)[0]
            no, yes = head.classify(image_D * text_D)
            odds_BC[b, c] = yes - no
    return odds_BC


@pytest.fixture(scope="module")
def world() -> World:
    backbone, task = build()
    backbone.eval()
    batch = toy_batch(IMAGES, captions=CAPTIONS)
    gallery = gallery_of(backbone, task.projection, batch, 2, 3)
    return World(backbone, task.matching, gallery, slow_odds(backbone, task.matching, batch))


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_log_odds_are_those_of_single_pairs(world: World, chunk: int) -> None:
    """In tiles of two and three images; what is not wanted is no number."""
    wanted_BC = torch.rand(IMAGES, len(OWNER), generator=torch.Generator().manual_seed(1)) < 0.5
    wanted_BC[:2, 4] = wanted_BC[3] = False  # a caption without pair in the first tile, an image without any
    match_BC = match_pairs(world.backbone, world.head, world.gallery, wanted_BC, chunk)
    torch.testing.assert_close(match_BC[wanted_BC], world.odds_BC[wanted_BC], atol=1e-5, rtol=1e-5)
    assert match_BC[~wanted_BC].isnan().all()
    assert match_pairs(world.backbone, world.head, world.gallery, wanted_BC & False, chunk).isnan().all()


@pytest.mark.parametrize("k", [1, 3, None])
def test_scores_hold_each_querys_best(world: World, k: int | None) -> None:
    scores = score_gallery(world.backbone, world.head, world.gallery, k, chunk=7)
    cosine_BC = world.gallery.image_BE @ world.gallery.text_CE.T
    torch.testing.assert_close(scores.contrast_BC, cosine_BC)
    assert torch.equal(scores.owner_C, OWNER)
    wanted_BC = candidates(best_items(cosine_BC, k or 100))
    assert scores.match_BC is not None
    assert torch.equal(~scores.match_BC.isnan(), wanted_BC)
    torch.testing.assert_close(scores.match_BC[wanted_BC], world.odds_BC[wanted_BC], atol=1e-5, rtol=1e-5)
    assert score_gallery(world.backbone, None, world.gallery, k).match_BC is None


@pytest.mark.parametrize("contrast", [0.5, 20.0])
def test_contrast_is_added_to_the_log_odds(world: World, contrast: float) -> None:
    scores = score_gallery(world.backbone, world.head, world.gallery, None, contrast=contrast)
    cosine_BC = world.gallery.image_BE @ world.gallery.text_CE.T
    assert scores.match_BC is not None
    torch.testing.assert_close(scores.match_BC, world.odds_BC + contrast * cosine_BC, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.contrast_BC, cosine_BC)


def test_metrics_follow_matching_where_everything_is_matched(world: World) -> None:
    scores = score_gallery(world.backbone, world.head, world.gallery, 1000)
    both_ranks = rankings(scores, [1000])[1000]
    relevant_BC = torch.arange(IMAGES)[:, None] == OWNER
    expected = Rankings(ranking(world.odds_BC, relevant_BC), ranking(world.odds_BC.T, relevant_BC.T))
    assert [ours.rank_Q.tolist() for ours in both_ranks] == [one.rank_Q.tolist() for one in expected]


# ---------------------------------------------------------------------- the gallery


def test_batches_join_by_their_place_in_the_split() -> None:
    """Whatever the order in which they come; captions of different widths are padded."""
    backbone, task = build()
    batch = toy_batch(6, captions=2)
    index_B = torch.arange(6) + 10
    texts = tuple(f"caption of {10 + n // 2}" for n in range(12))
    parts = [
        take(batch._replace(index_B=index_B), rows)._replace(texts=texts[2 * rows[0] : 2 * rows[-1] + 2])
        for rows in (torch.tensor([4, 5]), torch.tensor([0, 1, 2]), torch.tensor([3]))
    ]
    gallery = gather_gallery([encoded_batch(backbone, task.projection, part) for part in parts])
    whole = encoded_batch(backbone, task.projection, batch)
    assert gallery is not None
    assert gallery.index_B.tolist() == list(range(10, 16))
    assert gallery.owner_C.tolist() == [n // 2 for n in range(12)]
    assert gallery.texts == list(texts)
    assert {first: len(tile) for first, tile in gallery.tiles.items()} == {0: 3, 3: 1, 4: 2}
    torch.testing.assert_close(gallery.image_BE, whole.public.image_BE)
    torch.testing.assert_close(gallery.text_CE, whole.public.text_CE)
    assert torch.equal(gallery.attention_CT, batch.attention_CT)
    mask = batch.attention_CT
    torch.testing.assert_close(gallery.text_CTD[mask], whole.public.text_CTD[mask])
    for first, tile in gallery.tiles.items():
        torch.testing.assert_close(tile, whole.image_BLD[first : first + len(tile)])
    assert gather_gallery([]) is None


def test_features_are_kept_in_the_precision_of_the_run_and_vectors_in_single() -> None:
    backbone, task = build()
    batch = toy_batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoded_batch(backbone, task.projection, batch)
    single, alone = (
        encoded_batch(backbone, task.projection, batch),
        encoded_batch(backbone, task.projection, batch, matched=False),
    )
    for part, dtype in ((half, torch.bfloat16), (single, torch.float32)):
        assert (part.image_BLD.dtype, part.public.text_CTD.dtype) == (dtype, dtype)
        assert (part.public.image_BE.dtype, part.public.text_CE.dtype) == (torch.float32, torch.float32)
    assert (alone.image_BLD.numel(), alone.public.text_CTD.numel()) == (0, 0)
    assert alone.image_BLD.untyped_storage().nbytes() == 0  # a view would hold what it is a part of
    assert torch.equal(alone.public.text_CE, single.public.text_CE)


@pytest.mark.parametrize("inside", [True, False])
def test_half_precision_features_are_matched_with_autocast_and_without(world: World, inside: bool) -> None:
    backbone, task = build()
    with torch.autocast("cpu", torch.bfloat16):
        gallery = gather_gallery([encoded_batch(backbone, task.projection, toy_batch(IMAGES, captions=CAPTIONS))])
    assert gallery is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        odds_BC = match_pairs(backbone.eval(), task.matching, gallery, torch.ones(IMAGES, len(OWNER), dtype=torch.bool))
    assert odds_BC.dtype == torch.float32
    assert torch.corrcoef(torch.stack([odds_BC.flatten(), world.odds_BC.flatten()]))[0, 1] > 0.99


class Largest(nn.Module):
    """Stands before a cross encoder and notes the most numbers that came in at once."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.most = encoder, 0

    def context(self, other: Tensor, *rest: Any) -> Any:
        self.most = max(self.most, other.numel())
        return self.encoder.context(other, *rest)

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        pairs = len(named.get("row_B", x))
        self.most = max(self.most, pairs * x[0].numel())
        return self.encoder(x, *rest, **named)


def largest_input(images: int, chunk: int) -> int:
    backbone, task = build()
    gallery = gallery_of(backbone, task.projection, toy_batch(images, captions=3), *[2] * (images // 2))
    watched = copy.copy(backbone)
    watched._modules = dict(backbone._modules)
    watched.cross_image, watched.cross_text = Largest(backbone.cross_image), Largest(backbone.cross_text)
    score_gallery(watched, task.matching, gallery, None, chunk)
    return max(watched.cross_image.most, watched.cross_text.most)


def test_what_is_on_the_device_at_once_does_not_grow_with_the_gallery() -> None:
    small, large = largest_input(4, chunk=5), largest_input(16, chunk=5)
    assert small == large == 5 * 17 * 16  # pairs, positions, width
    assert largest_input(16, chunk=10) == 2 * small


def test_keys_and_values_of_a_tile_are_projected_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"image": [], "text": []}
    for name, encoder in (("text", world.backbone.cross_image), ("image", world.backbone.cross_text)):
        original: Callable[..., Any] = encoder.context

        def note(other: Tensor, *rest: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            sizes[name].append(len(other))
            return original(other, *rest)

        monkeypatch.setattr(encoder, "context", note)
    score_gallery(world.backbone, world.head, world.gallery, None, chunk=4)
    assert sizes["image"] == [2, 3]
    assert max(sizes["text"]) <= 4
    assert sum(sizes["text"]) < 2 * 2 * len(OWNER)  # a caption again only where a chunk ends within its pairs


def test_what_pairs_share_is_computed_once_a_chunk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first self-attention, of each image and caption that a chunk has."""
    sizes: dict[str, list[int]] = {"image": [], "text": []}
    for name, encoder in (("image", world.backbone.cross_image), ("text", world.backbone.cross_text)):
        block: Any = encoder.blocks[0]
        original = block.attend_self

        def note(x: Tensor, *rest: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            sizes[name].append(len(x))
            return original(x, *rest)

        monkeypatch.setattr(block, "attend_self", note)
        monkeypatch.setattr(encoder, "groups_texts", False)
    score_gallery(world.backbone, world.head, world.gallery, None, chunk=1000)
    assert sizes == {"image": [2, 3], "text": [len(OWNER)] * 2}  # tiles of two and three images, each with all captions


def test_rounds_hand_out_every_item() -> None:
    assert list(in_rounds(iter("abc"), 3)) == ["a", "b", "c"]
    assert list(in_rounds([], 0)) == []


def test_a_caption_of_padding_width_does_not_matter(world: World) -> None:
    pad = torch.nn.functional.pad
    wider = world.gallery._replace(
        text_CTD=pad(world.gallery.text_CTD, (0, 0, 0, 4), value=9.0),
        attention_CT=pad(world.gallery.attention_CT, (0, 4)),
    )
    match_BC, expected = (score_gallery(world.backbone, world.head, g, 3).match_BC for g in (wider, world.gallery))
    assert torch.equal(match_BC.nan_to_num(), expected.nan_to_num())  # type: ignore[union-attr]
