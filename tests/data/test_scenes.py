"""The built-in world: the same everywhere, its splits apart, and its images show what its scenes say."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest

from maskvlm.data.caption_text import stable_id
from maskvlm.data.scenes.drawing import COLOUR_RGB, draw_scene
from maskvlm.data.scenes.source import Scene, Scenes, describes
from maskvlm.data.scenes.world import random_scene
from maskvlm.utils.errors import UserError

DIGEST = 8632604657622947955


# ---- scenes ------------------------------------------------------------------------------------------------
def test_splits_share_no_scene_whatever_the_seed() -> None:
    """The split is a function of what the scene shows; jitter does not make it another scene."""
    keys: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for seed in (0, 3):
        for name, seen in keys.items():
            pairs = Scenes(train=100, val=100, test=100, seed=seed).split(name)
            for scene in map(pairs.scene, range(100)):
                still = Scene(scene.background, tuple(replace(thing, dx=0, dy=0) for thing in scene.things))
                assert (scene.split, still.key, still.split) == (name, scene.key, name)
                seen.add(scene.key)
    assert not keys["train"] & keys["val"]
    assert not keys["test"] & (keys["train"] | keys["val"])


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


@pytest.mark.parametrize("size", [48, 100])
def test_the_image_shows_what_the_scene_says_and_nothing_else(size: int) -> None:
    for scene in random_scenes(40):
        image = np.asarray(draw_scene(scene, size))
        assert image.shape == (size, size, 3)
        for cell in range(9):
            shares = shares_of(image, cell, size)
            thing = next((thing for thing in scene.things if thing.cell == cell), None)
            for name, share in shares.items():
                assert (share > 0.025) is (thing is not None and thing.colour == name), (thing, name, share)


def test_object_mask_is_true_on_things_only() -> None:
    pairs = Scenes(train=20).split("train")
    for index in range(20):
        image, mask = np.asarray(pairs[index]["image"]), pairs.object_mask(index, 48)
        lone = np.asarray(draw_scene(Scene(pairs.scene(index).background, ()), 48))
        assert (mask.shape, mask.dtype) == ((48, 48), bool)
        assert (image[mask] != lone[mask]).any(-1).all()
        assert (image[~mask] == lone[~mask]).all(-1).mean() > 0.85  # the rest is the soft edge
    assert (pairs.object_mask(0).shape, pairs.object_mask(0, 30).shape) == ((48, 48), (30, 30))


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
    small = Scenes(size=12).split("test")[0]  # of any size, with the same captions
    assert (np.asarray(small["image"]).shape, small["captions"]) == ((12, 12, 3), GOLDEN_CAPTIONS)


def test_every_caption_is_the_one_it_was_and_its_statement_true() -> None:
    """The digest is of captions that a reader of their words alone found true of their images. Of a scene that has
    lost the first thing, or stands on another ground, most statements are not true."""
    plain, more = Scenes(train=300).split("train"), Scenes(train=300, short=3, relations=2).split("train")
    assert stable_id(str([more[index]["captions"] for index in range(300)])) == DIGEST
    false = []
    for index in range(300):
        scene, captions = more.scene(index), more.captions(index)
        assert captions[:5] == plain.captions(index)
        assert all(describes(statement, scene) for _, statement in captions)
        for near in (Scene(scene.background, scene.things[1:]), plain.scene(index - 1 if index else 299)):
            false += [not describes(statement, near) for _, statement in captions]
    assert np.mean(false) > 0.8


def test_a_row_is_a_function_of_seed_split_and_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read again it is the same, whatever was done to it, though its texts are kept, of so many scenes."""
    monkeypatch.setattr("maskvlm.data.scenes.source.MOST_CACHED", 2)
    one, other = (Scenes(train=train, val=3, short=2).split("train") for train in (60, 50))
    again = pickle.loads(pickle.dumps(one))
    before = {index: (list(one[index]["captions"]), np.asarray(one[index]["image"]).copy()) for index in (7, 3, 9)}
    for index, (captions, image) in before.items():
        row = one[index]
        row["captions"].append("more")
        row["image"].paste((0, 0, 0), (0, 0, 48, 48))
        for pairs in (one, other, again):
            assert pairs[index]["captions"] == captions
            assert (np.asarray(pairs[index]["image"]) == image).all()
    assert len(one.cache) == 2
    assert before[7][0] != before[3][0]
    assert before[7][0][:5] != Scenes(seed=1).split("train")[7]["captions"]


def test_what_is_no_scene_is_refused_and_others_are_other_data() -> None:
    pairs = Scenes().split("val")
    assert len(pairs) == 500
    for index in (-1, 500):
        with pytest.raises(IndexError, match=str(index)):
            pairs[index]
    for arguments in ({"train": 0}, {"size": 0}, {"short": -1}):
        with pytest.raises(UserError, match=next(iter(arguments))):
            Scenes(**arguments)
    with pytest.raises(UserError, match="'dev'"):
        Scenes().split("dev")
    changes: list[dict[str, int]] = [{}, {"seed": 1}, {"train": 19999}, {"short": 2}, {"short": 2, "relations": 1}]
    assert len({Scenes(**each).split("train").fingerprint for each in changes}) == 5
    assert Scenes(short=2).split("val").fingerprint == pairs.fingerprint
