"""`docs/results/inference/measure.py`, which counts how often a caption is true."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

from maskvlm.data.scenes.captions import captions_of, tell_names
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import Scene, Thing

SCENE = Scene("navy", (Thing("star", "red", "small", "dotted", 0), Thing("ring", "blue", "large", "plain", 8)))


@pytest.fixture(scope="module")
def measure(root: Path) -> ModuleType:
    file = root / "docs" / "results" / "inference" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_caption_of_a_scene_is_read_as_it_was_meant(measure: ModuleType) -> None:
    pairs = Scenes().split("val")
    for index in range(200):
        scene, rng = pairs.scene(index), random.Random(index)
        for caption in (*captions_of(scene, rng), tell_names(scene, rng)):
            claim = measure.claims(caption.text)
            assert claim.mentions == caption.statement.mentions, caption.text
            assert claim.background == caption.statement.background, caption.text
            assert measure.judged(caption.text, scene)[1:] == (True, True, True, True)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a small dotted red star at the top left on a navy background", (True, True, True, True)),
        ("a red star to the left of a large ring", (True, True, True, True)),
        ("a red star at the bottom", (True, True, True, False)),
        ("bottom right a big plain blue ring, white", (True, True, True, False)),
        ("a large red star", (True, True, False, False)),
        ("a red star and a red ring", (True, False, False, False)),
        ("a red star, red star", (True, True, False, False)),  # there is only one
        ("a striped ring", (False, False, False, False)),
        ("a thing on navy", (False, False, False, False)),
    ],
)
def test_what_of_a_caption_is_right(measure: ModuleType, text: str, right: tuple[bool, ...]) -> None:
    assert measure.judged(text, SCENE)[1:] == right
