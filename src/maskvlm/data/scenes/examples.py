"""Downstream examples about the built-in scenes: code shared by the tasks' question generators.

A generator first draws kind and answer at random and then looks for matching scenes, so that no word of a text reveals
its answer. Texts use the captions' words where possible: those are whole tokens of a tokenizer trained on captions,
while other words are split into pieces (x and z cannot even be spelled).
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
from maskvlm.utils.errors import UserError, check_counts

VERSION = 2  # raise it when the same seed gives other examples
SMALLEST = 12  # pixels: below, shapes cannot be told apart
ATTRIBUTES = {"size": SIZES, "pattern": PATTERNS, "colour": COLOURS, "shape": SHAPES}
"""Attributes of an object, in the order used in a text."""
TRIES = 100_000  # one scene in ten is of a small split; a generator whose scenes never are has a bug

Traits = dict[str, str]
"""Description of an object: attribute -> value; attributes not mentioned are missing."""


def fits(traits: Traits, thing: Thing) -> bool:
    """Whether all the traits are true of the object."""
    return all(getattr(thing, name) == value for name, value in traits.items())


def noun(traits: Traits) -> str:
    """ "small striped red circle", or "red thing", depending on the traits; without an article."""
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
    """Attributes to mention: colour and shape, and one time in four also size or pattern."""
    more = choose(rng, ("size", "pattern"))
    return (more, "colour", "shape") if rng.random() < 0.25 else ("colour", "shape")


def lots_of(kinds: Sequence[str], shares: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Split -> kinds to draw from, each once, but in training as often as `shares` says (by default once)."""
    return {
        "train": tuple(kind for kind in kinds for _ in range(shares.get(kind, 1))),
        "val": tuple(kinds),
        "test": tuple(kinds),
    }


def near_miss(rng: random.Random, traits: Traits, taken: Collection[str] = ()) -> Traits:
    """The same traits with one of them changed at random; never to one of the `taken` values."""
    name = choose(rng, tuple(traits))
    # not the value itself
    others = [value for value in ATTRIBUTES[name] if value != traits[name] and value not in taken]
    return {**traits, name: choose(rng, others)}


def strangers(rng: random.Random, names: Collection[str], taken: Collection[str]) -> Traits:
    """Traits whose colour and shape are not among the `taken` values."""
    # drawn until they fit: there are eight colours and shapes each, and few are taken
    while True:
        traits = traits_by_lot(rng, names)
        if traits["colour"] not in taken and traits["shape"] not in taken:
            return traits


def thing_like(rng: random.Random, cell: int, traits: Traits) -> Thing:
    """A random object that fits the traits."""
    # other attributes are random, so that nothing else distinguishes it
    full = traits_by_lot(rng, [name for name in ATTRIBUTES if name not in traits]) | traits
    shifts = range(-JITTER[full["size"]], JITTER[full["size"]] + 1)
    return Thing(cell=cell, dx=choose(rng, shifts), dy=choose(rng, shifts), **full)


def traits_of(thing: Thing, names: Collection[str]) -> Traits:
    """The named attributes of an object."""
    return {name: getattr(thing, name) for name in names}


def scene_of(rng: random.Random, things: Collection[Thing], background: str | None = None) -> Scene:
    """A scene of these objects, given in any order; the background is random unless given."""
    # by cell, as `Scene` requires
    return Scene(background or choose(rng, BACKGROUNDS), tuple(sorted(things, key=lambda thing: thing.cell)))


def scene_like(rng: random.Random, things: Collection[Traits], background: str | None = None) -> Scene:
    """A scene with one object per traits, each at a random place; the background as in `scene_of`."""
    # there are more cells than objects; the rest is not used
    cells = shuffled(rng, range(9))
    placed_things = [thing_like(rng, cell, traits) for cell, traits in zip(cells, things, strict=False)]
    return scene_of(rng, placed_things, background)


def first_of_split(split: str, make: Callable[[], Scene | None]) -> Scene:
    """The first generated scene that belongs to the split; `make` returns None for an unsuitable scene."""
    # a scene's split depends on its content, so scenes are drawn until one falls into this split
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
"""(key, split, index) -> example. All randomness must come from the key, which contains the seed, and the index."""


class SceneExamples:
    """One split of examples about scenes, generated on demand.

    Args:
        task: name of the source in error messages and random seeds.
        tell: generates the examples; a module-level function, so that it can be sent to data workers.
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
        """Example `index` with its scenes. Raises IndexError outside 0 to length - 1."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.task} {self.name}: no example {index}, there are {self.count}")
        # split and seed are in the key, so no two splits draw the same
        return self.tell(f"{self.task}-{VERSION}-{self.seed}-{self.name}", self.name, index)

    def image_ids(self) -> Iterator[str]:
        """The scenes' ids, example by example; the examples are generated for it, but not drawn."""
        for index in range(self.count):
            yield from (view.scene.id for view in self.plan(index).views)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters and of the first examples, images included; 16 hex digits."""
        digest = sha256(repr((VERSION, self.task, self.name, self.count, self.size, self.seed)).encode())
        # the content too, as it changes with the code of `tell`
        for index in range(min(8, self.count)):
            plan = self.plan(index)
            # the plan contains the text, the answer and the scenes
            digest.update(repr(plan).encode())
            for view in plan.views:
                digest.update(view.draw(self.size).tobytes())
        return digest.hexdigest()[:16]


class SceneSplits:
    """The three splits of a task about scenes, and checks of the user's settings.

    Args:
        task, tell: as in `SceneExamples`.
        counts: number of examples of `train`, `val` and `test`.
        size: width and height of the images in pixels, at least 12.
        seed: seed of all three splits.
        multiple: number of which the counts must be a multiple, if examples come in sets.

    Raises:
        UserError: a count or the size is not allowed.
    """

    def __init__(self, task: str, tell: Tell, counts: dict[str, int], size: int, seed: int, multiple: int = 1) -> None:
        self.task, self.tell, self.counts, self.size, self.seed = task, tell, counts, size, seed
        check_counts(1, {f"{task}.{name}": count for name, count in counts.items()})
        check_counts(SMALLEST, {f"{task}.size": size})
        # an incomplete set would not be balanced
        for name, count in counts.items():
            if count % multiple:
                todo = f"Use a multiple of {multiple}: examples come in sets of {multiple}"
                raise UserError(f"{task}.{name}", f"{count} examples", todo)

    def split(self, name: str) -> SceneExamples:
        """The examples of `train`, `val` or `test`. Raises UserError for any other name."""
        if name not in self.counts:
            raise UserError(self.task, f"no split '{name}'", f"Available: {', '.join(SPLITS)}")
        return SceneExamples(self.task, self.tell, name, self.counts[name], self.size, self.seed)
