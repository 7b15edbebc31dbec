"""What the three sources of scene examples share: repeatable, splits apart, readable texts, curtains, fast."""

import pickle
import random
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskvlm.data.scenes.drawing import BACKGROUND_RGB, FOLD_RGB, curtain_of, draw_behind, draw_scene
from maskvlm.data.scenes.examples import ATTRIBUTES, fits, names_by_lot, near_miss, thing_like, traits_by_lot, traits_of
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import JITTER, LINES, random_scene
from maskvlm.data.text import train_tokenizer
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.scenes import SceneHypotheses
from tasks.nlvr.scenes import SceneComparisons
from tasks.vqa.scenes import SceneQuestions

SOURCES = [SceneQuestions, SceneComparisons, SceneHypotheses]
IMAGES = {SceneQuestions: 1, SceneComparisons: 2, SceneHypotheses: 1}
each_source = pytest.mark.parametrize("source", SOURCES)


# ---- the contract ------------------------------------------------------------------------------------------
@each_source
def test_an_example_is_a_function_of_seed_split_and_index_alone(source: type) -> None:
    one, other = source().split("val"), source(train=40, val=40, test=40).split("val")
    again = pickle.loads(pickle.dumps(one))
    for index in (7, 3, 7):
        rows = [split[index] for split in (one, other, again)]
        pixels = [[np.asarray(image).tobytes() for image in row.pop("images")] for row in rows]
        assert rows[0] == rows[1] == rows[2]
        assert pixels[0] == pixels[1] == pixels[2]
    assert one.plan(7) != one.plan(3)
    assert one.plan(7) != source(seed=1).split("val").plan(7)
    assert one.plan(7).views != source().split("test").plan(7).views


@each_source
def test_an_example_has_what_the_contract_asks_for(source: type) -> None:
    split = source(size=60, val=20).split("val")
    row, plan = split[11], split.plan(11)
    assert [image.size for image in row["images"]] == [(60, 60)] * IMAGES[source]
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in row["images"])
    assert row["image_ids"] == [view.scene.id for view in plan.views]
    assert row["answers"] == [plan.answer]
    assert plan.answer in source().labels
    assert row["origin"] == f"{source.__name__} (seed 0) val example 11"
    assert (len(split), split.skipped) == (20, {})
    assert list(split.image_ids()) == [name for index in range(20) for name in split[index]["image_ids"]]


@each_source
def test_no_scene_is_in_two_splits_under_any_pair_of_seeds(source: type) -> None:
    ids = {}
    for name, seed in (("train", 0), ("train", 5), ("val", 0), ("test", 1)):
        split = source(1200, 400, 400, seed=seed).split(name)
        assert all(view.scene.split == name for index in range(len(split)) for view in split.plan(index).views)
        ids[name] = ids.get(name, set()) | set(split.image_ids())
    assert not ids["train"] & ids["val"]
    assert not ids["train"] & ids["test"]
    assert not ids["val"] & ids["test"]


def test_a_scene_has_the_same_id_in_all_tasks() -> None:
    """16 hex digits of what it shows; jitter makes no other scene."""
    scene = Scenes().split("train").scene(0)
    still = replace(scene, things=tuple(replace(thing, dx=0, dy=0) for thing in scene.things))
    assert scene.id == still.id == "scene b856e33181958af6"


@each_source
def test_fingerprint_changes_with_the_content(source: type) -> None:
    splits = [source(), source(seed=1), source(size=64), source(train=1200)]
    prints = [one.split("train").fingerprint for one in splits] + [source().split("val").fingerprint]
    assert len(set(prints)) == 5
    assert prints[0] == source(val=400).split("train").fingerprint


@each_source
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 0}, r"\.train: 0 is too small\. Give 1 or more"),
        ({"test": -4}, r"\.test: -4 is too small"),
        ({"size": 11}, r"\.size: 11 is too small\. Give 12 or more"),
    ],
)
def test_what_cannot_be_served_is_refused(source: type, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=source.__name__ + message) as caught:
        source(**arguments)
    assert caught.value.code == ExitCode.USAGE


@each_source
def test_an_unknown_split_and_index_are_refused(source: type) -> None:
    with pytest.raises(UserError, match=r"no split 'dev'\. Available: train, val, test"):
        source().split("dev")
    for index in (-1, 2000):
        with pytest.raises(IndexError, match=str(index)):
            source().split("val")[index]


# ---- texts -------------------------------------------------------------------------------------------------
@each_source
def test_texts_are_short_and_readable_with_the_captions_tokenizer(source: type) -> None:
    """28 is what MODEL=tiny reads; answers must be readable, too, for a head that writes them."""
    pairs = Scenes().split("train")
    tokenizer = train_tokenizer((text for index in range(600) for text in pairs[index]["captions"]), 256)
    split = source().split("train")
    texts = {split.plan(index).text for index in range(3000)} | set(source().labels)
    pieces = [tokenizer.tokenize(text) for text in texts]
    assert not [part for part in pieces if "[UNK]" in part]
    assert max(map(len, pieces)) + 2 <= 24


# ---- lots --------------------------------------------------------------------------------------------------
@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_a_near_miss_differs_in_one_attribute(seed: int) -> None:
    rng = random.Random(seed)
    traits = traits_by_lot(rng, names_by_lot(rng))
    near = near_miss(rng, traits, taken=("red", "star"))
    changed = [name for name in traits if traits[name] != near[name]]
    assert near.keys() == traits.keys()
    assert len(changed) == 1
    assert near[changed[0]] not in ("red", "star")
    thing = thing_like(rng, 4, traits)
    assert fits(traits, thing)
    assert not fits(near, thing)
    assert traits_of(thing, tuple(traits)) == traits


@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_a_thing_like_this_is_one_of_the_world(seed: int) -> None:
    rng = random.Random(seed)
    thing = thing_like(rng, 8, {"size": "large"})
    assert all(getattr(thing, name) in options for name, options in ATTRIBUTES.items())
    assert max(abs(thing.dx), abs(thing.dy)) <= JITTER["large"]


# ---- curtains ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [12, 48, 50, 224])
@pytest.mark.parametrize("line", LINES)
def test_a_curtain_covers_its_line_and_nothing_else(size: int, line: str) -> None:
    edges = [round(size * step / 3) for step in range(4)]
    covered = np.zeros((size, size), bool)
    for cell in LINES[line]:
        row, column = divmod(cell, 3)
        covered[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
    rng = random.Random(size)
    for scene in [random_scene(rng) for _ in range(20)]:
        visible_scene = replace(scene, things=tuple(thing for thing in scene.things if thing.cell not in LINES[line]))
        image = np.asarray(draw_behind(scene, size, line))
        assert (image == np.asarray(draw_behind(visible_scene, size, line))).all(), "what stands behind is seen"
        assert (image[~covered] == np.asarray(draw_scene(visible_scene, size))[~covered]).all()
        assert {tuple(rgb) for rgb in image[covered].tolist()} <= set(FOLD_RGB)
    assert (np.asarray(curtain_of(size, line))[..., 3] == 255 * covered).all()


def test_a_curtain_is_unlike_every_background_at_48_pixels() -> None:
    """Both folds in equal parts, two pixels wide, each 50 grey levels or more from the grey background."""
    image = np.asarray(curtain_of(48, "top row"))[:16, :, 0]
    assert (image[0] == np.tile([85, 85, 185, 185], 12)).all()
    assert min(abs(fold[0] - BACKGROUND_RGB["grey"][0]) for fold in FOLD_RGB) >= 45


# ---- speed -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("source", "rate"), [(SceneQuestions, 1500), (SceneComparisons, 700), (SceneHypotheses, 700)])
def test_training_need_not_wait_for_examples(source: type, rate: int) -> None:
    """Examples a second of one core's own time, images included; here measured a multiple of what is asked for."""
    split = source().split("train")
    for index in range(200):
        split[index]
    rates = []
    for start in islice(range(200, 10**6, 400), 3):
        begin = time.process_time()
        for index in range(start, start + 400):
            split[index]
        rates.append(400 / (time.process_time() - begin))
    assert max(rates) > rate
