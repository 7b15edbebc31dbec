"""The built-in world: the same everywhere, its splits apart, and its images show what its scenes say."""

import itertools
import pickle
import random
import re
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskvlm.data.scenes.drawing import COLOUR_RGB, draw_scene, ink_of
from maskvlm.data.scenes.source import Scene, ScenePairs, Scenes, Thing, describes, vocabulary
from maskvlm.data.scenes.world import COLOURS, SHAPES, random_scene
from maskvlm.utils.errors import ExitCode, UserError

TOY = Scene(
    "navy",
    (Thing("circle", "red", "large", "plain", 0), Thing("star", "blue", "small", "dotted", 5, dx=2, dy=-1)),
)


@pytest.fixture(scope="module")
def world() -> ScenePairs:
    return Scenes(train=1000).split("train")


# ---- scenes ------------------------------------------------------------------------------------------------
@given(st.integers(0, 10**6), st.sampled_from(["train", "val", "test"]))
@settings(max_examples=60, deadline=None)
def test_a_scene_belongs_to_one_split_whatever_the_seed(seed: int, name: str) -> None:
    """The split is a function of what the scene shows; jitter does not make it another scene."""
    scene = Scenes(1, 1, 1, seed=seed).split(name).scene(0)
    assert scene.split == name
    still = Scene(scene.background, tuple(replace(thing, dx=0, dy=0) for thing in scene.things))
    assert (still.key, still.split) == (scene.key, name)


def test_every_row_of_every_split_is_of_that_split() -> None:
    source = Scenes(train=300, val=100, test=100, seed=3)
    keys = {
        name: {pairs.scene(i).key for i in range(len(pairs))} for name in source.counts if (pairs := source.split(name))
    }
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]
    assert all(source.split(name).scene(i).split == name for name in keys for i in range(100))


def test_attributes_are_uniform_and_independent(world: ScenePairs) -> None:
    """Nothing about one thing follows from another: two things share an attribute as often as chance says."""
    scenes = [world.scene(index) for index in range(len(world))]
    things = [thing for scene in scenes for thing in scene.things]
    for attribute, options in {"shape": 8, "colour": 8, "size": 2, "pattern": 3, "cell": 9}.items():
        shares = np.array(list(Counter(getattr(thing, attribute) for thing in things).values())) / len(things)
        assert shares == pytest.approx(np.full(options, 1 / options), rel=0.25)
    for attribute, options in {"shape": 8, "colour": 8, "size": 2, "pattern": 3}.items():
        pairs = [scene.things[:2] for scene in scenes if len(scene.things) > 1]
        same = [getattr(first, attribute) == getattr(second, attribute) for first, second in pairs]
        assert np.mean(same) == pytest.approx(1 / options, abs=0.05)
    assert all(len({thing.cell for thing in scene.things}) == len(scene.things) for scene in scenes)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_a_scene_survives_plain_types(world: ScenePairs) -> None:
    scene = world.scene(4)
    assert Scene.from_dict(scene.to_dict()) == scene
    assert TOY.to_dict() == {
        "background": "navy",
        "things": [
            {
                "shape": "circle",
                "colour": "red",
                "size": "large",
                "pattern": "plain",
                "cell": 0,
                "dx": 0,
                "dy": 0,
            },
            {
                "shape": "star",
                "colour": "blue",
                "size": "small",
                "pattern": "dotted",
                "cell": 5,
                "dx": 2,
                "dy": -1,
            },
        ],
    }


# ---- images ----------------------------------------------------------------------------------------------
def random_scenes(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng) for _ in range(count)]


def shares_of(image: np.ndarray, cell: int, size: int) -> dict[str, float]:
    """For each colour name, the share of a cell's pixels that have it exactly."""
    edges = [round(size * step / 3) for step in range(4)]
    row, column = divmod(cell, 3)
    pixels = image[edges[row] : edges[row + 1], edges[column] : edges[column + 1]].reshape(-1, 3)
    return {name: float((pixels == rgb).all(1).mean()) for name, rgb in COLOUR_RGB.items()}


@pytest.mark.parametrize("size", [48, 96, 100])
def test_the_image_shows_what_the_scene_says_and_nothing_else(size: int) -> None:
    for scene in random_scenes(60):
        image = np.asarray(draw_scene(scene, size))
        assert image.shape == (size, size, 3)
        for cell in range(9):
            shares = shares_of(image, cell, size)
            thing = next((thing for thing in scene.things if thing.cell == cell), None)
            for name, share in shares.items():
                assert (share > 0.025) is (thing is not None and thing.colour == name), (thing, name, share)


@pytest.mark.parametrize("pattern", ["plain", "striped", "dotted"])
@pytest.mark.parametrize("size", ["large", "small"])
def test_patterns_can_be_seen_at_48_pixels(pattern: str, size: str) -> None:
    """A patterned shape has four pixels or more that look like its ink, not its colour or the ground."""
    for shape in SHAPES:
        for colour in COLOURS:
            image = np.asarray(draw_scene(Scene("grey", (Thing(shape, colour, size, pattern, 4),)), 48)).astype(int)
            candidates = np.array([COLOUR_RGB[colour], (140, 140, 140), ink_of(colour)])
            nearest = ((image[:, :, None] - candidates) ** 2).sum(-1).argmin(-1)
            inked = int((nearest == 2).sum())
            assert (inked >= 4) if pattern != "plain" else (inked <= 4), (shape, colour, inked)


def test_object_mask_is_true_on_things_only() -> None:
    pairs = Scenes(train=40).split("train")
    for index in range(40):
        image, mask = np.asarray(pairs[index]["image"]), pairs.object_mask(index, 48)
        ground = image[~mask]
        assert mask.shape == (48, 48)
        assert mask.dtype == bool
        lone = np.asarray(draw_scene(Scene(pairs.scene(index).background, ()), 48))
        assert (image[mask] != lone[mask]).any(-1).all()
        assert (ground == lone[~mask]).all(-1).mean() > 0.85  # the rest is the soft edge
    assert pairs.object_mask(0).shape == (48, 48)
    assert pairs.object_mask(0, 30).shape == (30, 30)


def test_large_things_fill_their_cell_and_stay_inside() -> None:
    areas = {}
    for size, reach in {"large": 1, "small": 2}.items():
        for dx, dy in [(-reach, reach), (reach, -reach), (0, 0)]:
            scene = Scene("white", (Thing("square", "red", size, "plain", 4, dx, dy),))
            changed = (np.asarray(draw_scene(scene, 48)) != 248).any(-1)
            assert not changed[:16].any()
            assert not changed[32:].any()
            assert not changed[:, :16].any()
            assert not changed[:, 32:].any()
            areas[size] = int(changed.sum())
    assert areas["large"] >= 0.7 * 16 * 16
    assert areas["small"] < 0.6 * areas["large"]


# ---- the data set ------------------------------------------------------------------------------------------
GOLDEN_CAPTIONS = [
    "little dotted green heart top left, big striped yellow triangle top, big plain green diamond top right, "
    "maroon background",
    "striped yellow triangle right of dotted green heart, left of plain green diamond",
    "maroon background, yellow triangle top, green diamond top right, green heart top left",
    "top right big green diamond, top big yellow triangle, top left little green heart",
    "big striped yellow triangle top, little dotted green heart top left",
]
GOLDEN_PIXELS = {
    (1, 46): (80, 20, 30),
    (46, 1): (80, 20, 30),
    (24, 24): (80, 20, 30),
    (8, 8): (20, 150, 50),
    (10, 24): (250, 230, 30),
    (8, 24): (75, 69, 9),
    (9, 40): (20, 150, 50),
}


def test_the_same_on_every_machine() -> None:
    """Captions and pixels written out; no pixel of an edge, which another Pillow may round otherwise."""
    row = Scenes().split("test")[0]
    assert row["captions"] == GOLDEN_CAPTIONS
    image = np.asarray(row["image"])
    assert {point: tuple(image[point].tolist()) for point in GOLDEN_PIXELS} == GOLDEN_PIXELS
    assert row["image_id"] == "scene f9c7ea5de05901f0"


def test_a_row_is_a_function_of_seed_split_and_index_alone() -> None:
    one, other = Scenes().split("train"), Scenes(train=50, val=3).split("train")
    rows = [other[index] for index in (7, 3, 7)]
    again = pickle.loads(pickle.dumps(one))[7]
    for row in (rows[0], rows[2], again):
        assert row["captions"] == one[7]["captions"]
        assert (np.asarray(row["image"]) == np.asarray(one[7]["image"])).all()
    assert one[7]["captions"] != one[8]["captions"]
    assert one[7]["captions"] != Scenes(seed=1).split("train")[7]["captions"]


def test_a_row_read_again_is_the_same_whatever_was_done_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts are kept, of so many scenes."""
    monkeypatch.setattr("maskvlm.data.scenes.source.MOST_CACHED", 2)
    pairs = Scenes(short=5, relations=4).split("train")
    first = [pairs[index] for index in range(3)]
    before = [(list(row["captions"]), np.asarray(row["image"]).copy(), row["image_id"]) for row in first]
    for row in first:
        row["captions"].append("more")
        row["image"].paste((0, 0, 0), (0, 0, 48, 48))
    assert len(pairs.cache) == 2
    for (captions, image, image_id), row in zip(before, [pairs[index] for index in range(3)], strict=True):
        assert (row["captions"], row["image_id"]) == (captions, image_id)
        assert (np.asarray(row["image"]) == image).all()


@pytest.mark.parametrize("size", [12, 48, 50, 224])
def test_any_size_on_demand(size: int) -> None:
    pairs = Scenes(size=size).split("test")
    image = pairs[0]["image"]
    assert isinstance(image, Image.Image)
    assert (image.size, image.mode) == ((size, size), "RGB")
    assert pairs[0]["captions"] == Scenes().split("test")[0]["captions"]


def test_fingerprint_changes_with_the_content() -> None:
    sources = [Scenes(), Scenes(seed=1), Scenes(size=64), Scenes(train=19999)]
    prints = [source.split("train").fingerprint for source in sources] + [Scenes().split("val").fingerprint]
    assert len(set(prints)) == 5
    assert prints[0] == Scenes(val=7).split("train").fingerprint


@pytest.mark.parametrize("index", [-1, 500, 10**9])
def test_a_row_outside_the_split_is_an_index_error(index: int) -> None:
    pairs = Scenes().split("val")
    assert len(pairs) == 500
    with pytest.raises(IndexError, match=str(index)):
        pairs[index]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"train": 0}, "data.source.train"),
        ({"val": -1}, "data.source.val"),
        ({"test": 0}, "data.source.test"),
        ({"size": 0}, "data.source.size"),
    ],
)
def test_counts_and_sizes_must_be_positive(arguments: dict[str, int], where: str) -> None:
    with pytest.raises(UserError, match=where) as caught:
        Scenes(**arguments)
    assert caught.value.code == ExitCode.USAGE


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no split 'dev'\. Available: train, val, test"):
        Scenes().split("dev")


@pytest.mark.parametrize("relations", [0, 4])
def test_short_captions_are_added_to_training_alone(relations: int) -> None:
    plain, more = Scenes(train=100, val=5), Scenes(train=100, val=5, short=3, relations=relations)
    other = Scenes(train=100, val=5, short=3, relations=1)
    assert more.split("train").fingerprint != other.split("train").fingerprint
    counts: Counter[tuple[str, int]] = Counter()
    assert more.split("val").fingerprint == plain.split("val").fingerprint
    assert more.split("train").fingerprint != plain.split("train").fingerprint
    for index in range(100):
        long, all_of_them = plain.split("train").captions(index), more.split("train").captions(index)
        assert all_of_them[:5] == long
        assert len(all_of_them) == 8
        scene = more.split("train").scene(index)
        for text, statement in all_of_them[5:]:
            assert describes(statement, scene)
            assert len(statement.mentions) == len(scene.things)
            assert set(re.findall("[a-z]+", text)) <= set(vocabulary())
            attributes = [{name for name, value in asdict(mention).items() if value} for mention in statement.mentions]
            spots = len(attributes) > 1 and all("place" in names and len(names) == 2 for names in attributes)
            assert spots or all({"shape", "colour"} <= names and "place" not in names for names in attributes)
            assert len(statement.relations) in (0, len(attributes) - 1)
            counts["spots" if spots else "relations" if statement.relations else "names", len(attributes)] += 1
    lot = {"names": 1, "spots": 1} | ({"relations": relations} if relations else {})
    assert set(counts) == {("names", 1), *itertools.product(lot, (2, 3))}
    for count, kind in itertools.product((2, 3), lot):
        every, share = sum(counts[each, count] for each in lot), lot[kind] / sum(lot.values())
        assert counts[kind, count] / every == pytest.approx(share, abs=4 * (0.25 / every) ** 0.5)
