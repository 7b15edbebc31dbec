"""The built-in scenes: their definition, how they are drawn at random, and the split to which each belongs.

A scene is 1 to 3 objects on a coloured background, each in its own cell of a 3x3 grid. All attributes are independent
of each other, so that nothing about a hidden object can be guessed from the rest of the image, and everything can be
expressed in a caption. Our choice; the paper has no such data.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, TypeVar

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
SIZES = ("large", "small")
PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS = ("white", "mint", "grey", "maroon", "navy", "black")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
LINES = {
    "top row": (0, 1, 2), "middle row": (3, 4, 5), "bottom row": (6, 7, 8),
    "left column": (0, 3, 6), "middle column": (1, 4, 7), "right column": (2, 5, 8),
}  # fmt: skip
"""The cells of each row and column of the grid."""
COUNTS = (1, 1, 1, 1, 2, 2, 3)
"""Number of objects per scene, each entry equally likely: single objects teach the meaning of words before it matters
which object is which."""
SPLITS = ("train", "val", "test")

# Maximum distance of an object from the centre of its cell, in sixteenths of the cell: it never leaves the cell.
JITTER = {"large": 1, "small": 2}

Choice = TypeVar("Choice")


def choose(rng: random.Random, options: Sequence[Choice]) -> Choice:
    """One option, uniformly. Uses only `random()`, whose sequence alone Python guarantees for later versions."""
    # random() is below 1, so the index is always valid
    return options[int(rng.random() * len(options))]


def shuffled(rng: random.Random, options: Sequence[Choice]) -> list[Choice]:
    """The options in random order, using only `random()` as in `choose`."""
    # the position breaks ties
    lots = sorted((rng.random(), place) for place in range(len(options)))
    return [options[place] for _, place in lots]


@dataclass(frozen=True)
class Thing:
    """One object. `cell` counts the 3x3 grid row by row from the top left (0 to 8).

    `dx` and `dy` shift it from the cell's centre, in sixteenths of the cell, to the right and downwards.
    """

    shape: str
    colour: str
    size: str
    pattern: str
    cell: int
    dx: int = 0
    dy: int = 0

    @property
    def row(self) -> int:
        """Row in the grid, 0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column in the grid, 0 at the left."""
        return self.cell % 3

    @property
    def place(self) -> str:
        """The cell's name, from "top left" to "bottom right"."""
        return PLACES[self.cell]

    def relates(self, relation: str, other: "Thing") -> bool:
        """Whether this object is `relation` (one of RELATIONS) `other`, judged by rows and columns."""
        return {
            "left of": self.column < other.column,
            "right of": self.column > other.column,
            "above": self.row < other.row,
            "below": self.row > other.row,
        }[relation]


@dataclass(frozen=True)
class Scene:
    """The content of an image: background and objects, ordered by cell."""

    background: str
    things: tuple[Thing, ...]

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain types for JSON; `from_dict` is the inverse."""
        return {"background": self.background, "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Scene":
        """The scene from the output of `to_dict`."""
        return cls(content["background"], tuple(Thing(**thing) for thing in content["things"]))

    @property
    def key(self) -> str:
        """A full description of the scene without the jitter: equal keys mean the same scene."""
        # objects are ordered by cell, so each scene has a single key
        things = (f"{t.cell} {t.size} {t.pattern} {t.colour} {t.shape}" for t in self.things)
        return "; ".join((self.background, *things))

    @property
    def id(self) -> str:
        """The scene's id in all data sets, so that a training scene can be found among another set's test scenes."""
        return f"scene {sha256(self.key.encode()).hexdigest()[:16]}"

    @property
    def split(self) -> str:
        """The only split that may contain this scene, whatever the seed: 8 in 10 train, 1 val, 1 test."""
        # By content, so that no scene is in two splits. As 256 is not a multiple of 10, the shares are only near 8:1:1.
        digit = sha256(self.key.encode()).digest()[0] % 10
        return "val" if digit == 8 else "test" if digit == 9 else "train"


def random_scene(rng: random.Random) -> Scene:
    """A random scene of any split."""
    # the order of the draws determines which scene a seed gives (`VERSION` in source.py)
    cells = sorted(shuffled(rng, range(9))[: choose(rng, COUNTS)])
    return Scene(choose(rng, BACKGROUNDS), tuple(random_thing(rng, cell) for cell in cells))


def random_thing(rng: random.Random, cell: int) -> Thing:
    """A random object in the given cell."""
    size = choose(rng, SIZES)
    shifts = range(-JITTER[size], JITTER[size] + 1)
    return Thing(
        shape=choose(rng, SHAPES),
        colour=choose(rng, COLOURS),
        size=size,
        pattern=choose(rng, PATTERNS),
        cell=cell,
        dx=choose(rng, shifts),
        dy=choose(rng, shifts),
    )


def scene_of_split(rng: random.Random, split: str) -> Scene:
    """The first random scene that belongs to the split."""
    # for val and test, about one try in ten succeeds
    while True:
        scene = random_scene(rng)
        if scene.split == split:
            return scene
