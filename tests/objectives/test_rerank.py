"""Re-ranking against every pair scored by itself, and what it holds at once."""

from typing import NamedTuple

import pytest
import torch
from slow_step import build
from torch import Tensor
from toys import slow_cross, take, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.model.heads import Matching, Projection
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.rerank import EncodedBatch, Gallery, gather_gallery, match_pairs, offload, score_gallery
from maskvlm.objectives.retrieval_metrics import best_items, candidates

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


@pytest.mark.parametrize("chunk", [4, 1024])
def test_log_odds_are_those_of_single_pairs(world: World, chunk: int) -> None:
    """In tiles of two and three images; what is not wanted is no number."""
    wanted_BC = torch.rand(IMAGES, len(OWNER), generator=torch.Generator().manual_seed(1)) < 0.5
    wanted_BC[:2, 4] = wanted_BC[3] = False  # a caption without pair in the first tile, an image without any
    match_BC = match_pairs(world.backbone, world.head, world.gallery, wanted_BC, chunk)
    torch.testing.assert_close(match_BC[wanted_BC], world.odds_BC[wanted_BC], atol=1e-5, rtol=1e-5)
    assert match_BC[~wanted_BC].isnan().all()
    assert match_pairs(world.backbone, world.head, world.gallery, wanted_BC & False, chunk).isnan().all()


@pytest.mark.parametrize("k", [1, None])
def test_scores_hold_each_querys_best(world: World, k: int | None) -> None:
    scores = score_gallery(world.backbone, world.head, world.gallery, k, chunk=7)
    cosine_BC = world.gallery.image_BE @ world.gallery.text_CE.T
    torch.testing.assert_close(scores.contrast_BC, cosine_BC)
    assert torch.equal(scores.owner_C, OWNER)
    wanted_BC = candidates(best_items(cosine_BC, k or 100))
    assert torch.equal(~scores.match_BC.isnan(), wanted_BC)
    torch.testing.assert_close(scores.match_BC[wanted_BC], world.odds_BC[wanted_BC], atol=1e-5, rtol=1e-5)
    assert score_gallery(world.backbone, None, world.gallery, k).match_BC is None
    added = score_gallery(world.backbone, world.head, world.gallery, k, contrast=20.0)
    expected_BC = (world.odds_BC + 20.0 * cosine_BC)[wanted_BC]
    torch.testing.assert_close(added.match_BC[wanted_BC], expected_BC, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added.contrast_BC, cosine_BC)


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
