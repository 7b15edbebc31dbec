"""What the three sources of scene examples share: repeatable, splits apart, readable texts, curtains."""

import hashlib
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskvlm.data.scenes.drawing import FOLD_RGB, curtain_of, draw_behind, draw_scene
from maskvlm.data.scenes.world import LINES, random_scene
from maskvlm.utils.errors import UserError
from tasks.entailment.scenes import SceneHypotheses
from tasks.nlvr.scenes import SceneComparisons
from tasks.vqa.scenes import ANSWERS, SceneQuestions

SOURCES = [SceneQuestions, SceneComparisons, SceneHypotheses]
IMAGES = {SceneQuestions: 1, SceneComparisons: 2, SceneHypotheses: 1}
FIFTH = {
    SceneQuestions: ("how large is the striped red star", "large"),
    SceneComparisons: ("a striped turquoise triangle is in the left picture", "False"),
    SceneHypotheses: ("a large pink square is on the left", "contradiction"),
}
CONTENT = {
    SceneQuestions: "5c4254224cf7bba0", SceneComparisons: "d77a6d381311f21a", SceneHypotheses: "b703e20d86962ac9",
}  # fmt: skip
each_source = pytest.mark.parametrize("source", SOURCES)


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
    assert source().split("val")[0]["images"][0].size == (48, 48)
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
    splits = [source(), source(seed=1), source(size=64), source(train=1200)]
    prints = [one.split("train").fingerprint for one in splits] + [source().split("val").fingerprint]
    assert len(set(prints)) == 5  # it changes with the content, and with nothing else
    assert prints[0] == source(val=400).split("train").fingerprint


@each_source
def test_what_cannot_be_served_is_refused(source: type) -> None:
    for arguments, name in (({"train": 0}, "train"), ({"test": -4}, "test"), ({"size": 11}, "size")):
        with pytest.raises(UserError, match=rf"{source.__name__}\.{name}"):
            source(**arguments)
    with pytest.raises(UserError, match="'dev'"):
        source().split("dev")
    for index in (-1, 2000):
        with pytest.raises(IndexError):
            source().split("val")[index]
    if source is SceneComparisons:
        with pytest.raises(UserError, match=r"SceneComparisons\.val: 10"):
            source(val=10)


@each_source
def test_the_same_examples_on_every_machine(source: type) -> None:
    """Other ones from the same seed need another VERSION in `scenes/examples.py`. The labels are their answers."""
    split = source().split("train")
    assert (split.plan(4).text, split.plan(4).answer) == FIFTH[source]
    content = [(plan.text, plan.answer, [view.scene.id for view in plan.views]) for plan in map(split.plan, range(400))]
    assert hashlib.sha256(repr(content).encode()).hexdigest()[:16] == CONTENT[source]
    answers = sorted({answer for answers in ANSWERS.values() for answer in answers})
    labels = {SceneQuestions: answers, SceneComparisons: ["False", "True"]}
    assert [*source().labels] == labels.get(source, ["entailment", "neutral", "contradiction"])


@each_source
def test_no_scene_is_in_two_splits_under_any_pair_of_seeds(source: type) -> None:
    ids = {}
    for name, seed in (("train", 0), ("train", 5), ("val", 0), ("test", 1)):
        split = source(400, 200, 200, seed=seed).split(name)
        assert all(view.scene.split == name for index in range(len(split)) for view in split.plan(index).views)
        ids[name] = ids.get(name, set()) | set(split.image_ids())
    assert not ids["train"] & ids["val"]
    assert not ids["train"] & ids["test"]
    assert not ids["val"] & ids["test"]


@pytest.mark.parametrize("size", [12, 50])
@pytest.mark.parametrize("line", LINES)
def test_a_curtain_covers_its_line_and_nothing_else(size: int, line: str) -> None:
    edges = [round(size * step / 3) for step in range(4)]
    covered = np.zeros((size, size), bool)
    for cell in LINES[line]:
        row, column = divmod(cell, 3)
        covered[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
    rng = random.Random(size)
    for scene in [random_scene(rng) for _ in range(8)]:
        visible_scene = replace(scene, things=tuple(thing for thing in scene.things if thing.cell not in LINES[line]))
        image = np.asarray(draw_behind(scene, size, line))
        assert (image == np.asarray(draw_behind(visible_scene, size, line))).all(), "what stands behind is seen"
        assert (image[~covered] == np.asarray(draw_scene(visible_scene, size))[~covered]).all()
        assert {tuple(rgb) for rgb in image[covered].tolist()} <= set(FOLD_RGB)
    assert (np.asarray(curtain_of(size, line))[..., 3] == 255 * covered).all()
