"""Downstream examples of the built-in world: what the tasks' question makers share.

A maker decides kind and answer at random first and then looks for scenes that bear them out, so that no word of a text
tells its answer. Texts use the captions' words as far as they go: these are whole tokens of a tokenizer that was
trained on captions, other words are spelt in pieces (x and z not even that).
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

from PIL import Image

from maskvlm.data.examples import Example
from maskvlm.data.scenes.drawing import draw_behind, draw_scene
from maskvlm.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    JITTER,
    PATTERNS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    choose,
    shuffled,
)
from maskvlm.utils.errors import UserError, check_least

VERSION = 2  # raise it when the same seed gives other examples
SMALLEST = 12  # pixels: below, shapes cannot be told apart
ATTRIBUTES = {"size": SIZES, "pattern": PATTERNS, "colour": COLOURS, "shape": SHAPES}
"""What a thing is like, in the order in which a text says it."""
TRIES = 100_000  # one scene in ten is of a small split; a maker whose scenes never are has a mistake

Traits = dict[str, str]
"""What is said of a thing: attribute -> value; silent on the others."""


def fits(traits: Traits, thing: Thing) -> bool:
    """True where nothing said is false of the thing."""
    return all(getattr(thing, name) == value for name, value in traits.items())


def noun(traits: Traits) -> str:
    """ "small striped red circle", or "red thing", as far as the traits go; no article."""
    words = {"shape": "thing"} | traits
    return " ".join(words[name] for name in ATTRIBUTES if name in words)


def a_noun(traits: Traits) -> str:
    """The noun with "a" or "an"."""
    text = noun(traits)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def traits_by_lot(rng: random.Random, names: Collection[str]) -> Traits:
    """A random value for each of the named attributes."""
    return {name: choose(rng, ATTRIBUTES[name]) for name in names}


def names_by_lot(rng: random.Random) -> tuple[str, ...]:
    """What to say of a thing: colour and shape, one time in four size or pattern, too."""
    more = choose(rng, ("size", "pattern"))
    return (more, "colour", "shape") if rng.random() < 0.25 else ("colour", "shape")


def lots_of(kinds: Sequence[str], shares: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Split -> what to draw a kind from: all alike, but in training as often as `shares` says (else once)."""
    return {
        "train": tuple(kind for kind in kinds for _ in range(shares.get(kind, 1))),
        "val": tuple(kinds),
        "test": tuple(kinds),
    }


def near_miss(rng: random.Random, traits: Traits, taken: Collection[str] = ()) -> Traits:
    """The same but for one of the attributes said, at random; never one of the `taken` values."""
    name = choose(rng, tuple(traits))
    # the value itself would be no miss
    others = [value for value in ATTRIBUTES[name] if value != traits[name] and value not in taken]
    return {**traits, name: choose(rng, others)}


def strangers(rng: random.Random, names: Collection[str], taken: Collection[str]) -> Traits:
    """Traits whose colour and shape are none of the `taken` values."""
    # drawn until it fits: colours and shapes are eight each, and few are taken
    while True:
        traits = traits_by_lot(rng, names)
        if traits["colour"] not in taken and traits["shape"] not in taken:
            return traits


def thing_like(rng: random.Random, cell: int, traits: Traits) -> Thing:
    """A random thing that the traits fit."""
    # what is not said of it is random, so that nothing else tells it apart
    full = traits_by_lot(rng, [name for name in ATTRIBUTES if name not in traits]) | traits
    shifts = range(-JITTER[full["size"]], JITTER[full["size"]] + 1)
    return Thing(cell=cell, dx=choose(rng, shifts), dy=choose(rng, shifts), **full)


def traits_of(thing: Thing, names: Collection[str]) -> Traits:
    """The named attributes of a thing."""
    return {name: getattr(thing, name) for name in names}


def scene_of(rng: random.Random, things: Collection[Thing], background: str | None = None) -> Scene:
    """A scene of these things, in any order; the background at random unless it is given."""
    # by cell, as `Scene` wants them
    return Scene(background or choose(rng, BACKGROUNDS), tuple(sorted(things, key=lambda thing: thing.cell)))


def scene_like(rng: random.Random, things: Collection[Traits], background: str | None = None) -> Scene:
    """A scene of as many things as there are traits, each at a random place; the background as in `scene_of`."""
    # nine cells for fewer things: the rest is not used
    cells = shuffled(rng, range(9))
    placed_things = [thing_like(rng, cell, traits) for cell, traits in zip(cells, things, strict=False)]
    return scene_of(rng, placed_things, background)


def first_of_split(split: str, make: Callable[[], Scene | None]) -> Scene:
    """The first scene made that belongs to the split; `make` gives None where the lot fell on an unfit scene."""
    # splits are told by content, so a scene can only be drawn again until it falls into this one
    for _ in range(TRIES):
        scene = make()
        if scene is not None and scene.split == split:
            return scene
    raise AssertionError(f"no fit scene of split {split}")


class View(NamedTuple):
    """One image: a scene, and the line of its grid (a key of LINES) that a curtain covers, or None."""

    scene: Scene
    curtain: str | None = None

    def draw(self, size: int) -> Image.Image:
        """The image, RGB, `size` pixels square."""
        if self.curtain is None:
            return draw_scene(self.scene, size)
        return draw_behind(self.scene, size, self.curtain)


class PlannedExample(NamedTuple):
    """An example before it is drawn. The other names are those of `Example`."""

    views: tuple[View, ...]
    text: str
    answer: str
    kind: str
    id: str
    group: str = ""


Tell = Callable[[str, str, int], PlannedExample]
"""(key, split, index) -> example. All randomness is to follow from the key, which holds the seed, and the index."""


class SceneExamples:
    """One split of examples about scenes, made on demand.

    Args:
        task: names the source in error messages and in the lots.
        tell: makes the examples; a function of a module, so that data workers can be sent it.
        name: `train`, `val` or `test`; all scenes are of this split.
        count: number of examples.
        size: width and height of the images in pixels.
        seed: another seed gives other examples.
    """

    def __init__(self, task: str, tell: Tell, name: str, count: int, size: int, seed: int) -> None:
        self.task, self.tell, self.name, self.count, self.size, self.seed = task, tell, name, count, size, seed
        self.skipped: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Example:
        plan = self.plan(index)
        return Example(
            images=[view.draw(self.size) for view in plan.views],
            image_ids=[view.scene.id for view in plan.views],
            text=plan.text,
            answers=[plan.answer],
            id=plan.id,
            kind=plan.kind,
            group=plan.group,
            origin=f"{self.task} (seed {self.seed}) {self.name} example {index}",
        )

    def plan(self, index: int) -> PlannedExample:
        """Example `index` with its scenes. Raises IndexError outside 0 to the length - 1."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.task} {self.name}: no example {index}, there are {self.count}")
        # split and seed are in the key, so no two splits draw the same
        return self.tell(f"{self.task}-{VERSION}-{self.seed}-{self.name}", self.name, index)

    def image_ids(self) -> Iterator[str]:
        """The scenes' ids, example by example; the examples are made for it, but not drawn."""
        for index in range(self.count):
            yield from (view.scene.id for view in self.plan(index).views)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the parameters and of the first examples, images included."""
        digest = sha256(repr((VERSION, self.task, self.name, self.count, self.size, self.seed)).encode())
        # the content, too: it changes with the code of `tell`
        for index in range(min(8, self.count)):
            plan = self.plan(index)
            # the plan holds the text, the answer and the scenes
            digest.update(repr(plan).encode())
            for view in plan.views:
                digest.update(view.draw(self.size).tobytes())
        return digest.hexdigest()[:16]


class SceneSplits:
    """The three splits of a task about scenes, and the checks of what the user asked for.

    Args:
        task: as in `SceneExamples`, as is `tell`.
        counts: number of examples of `train`, `val` and `test`.
        size: of the images in pixels, at least 12.
        seed: for all three.
        multiple: what the counts must be a multiple of, where examples come in sets.

    Raises:
        UserError: a count or the size cannot be served.
    """

    def __init__(self, task: str, tell: Tell, counts: dict[str, int], size: int, seed: int, multiple: int = 1) -> None:
        self.task, self.tell, self.counts, self.size, self.seed = task, tell, counts, size, seed
        check_least(1, {f"{task}.{name}": count for name, count in counts.items()})
        check_least(SMALLEST, {f"{task}.size": size})
        # a set that is cut through would not be balanced
        for name, count in counts.items():
            if count % multiple:
                todo = f"Use a multiple of {multiple}: examples come in sets of {multiple}"
                raise UserError(f"{task}.{name}", f"{count} examples", todo)

    def split(self, name: str) -> SceneExamples:
        """The examples of `train`, `val` or `test`; another name is a UserError."""
        if name not in self.counts:
            raise UserError(self.task, f"no split '{name}'", f"Available: {', '.join(SPLITS)}")
        return SceneExamples(self.task, self.tell, name, self.counts[name], self.size, self.seed)
