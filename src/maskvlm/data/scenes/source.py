"""The built-in world as a data set: images and captions made on demand, the same on every machine."""

import random
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from maskvlm.data.batch import Row, Source
from maskvlm.data.scenes.captions import Caption, captions_of, describes, tell_short, vocabulary
from maskvlm.data.scenes.drawing import draw_object_mask, draw_scene
from maskvlm.data.scenes.world import SPLITS, Scene, Thing, scene_of_split
from maskvlm.utils.errors import UserError, check_least

__all__ = ["Caption", "Scene", "ScenePairs", "Scenes", "Thing", "captions_of", "describes", "vocabulary"]

VERSION = 3  # raise it when the same seed gives other images or captions
SHORT = 2  # raise it when the same seed gives other short captions; no evaluation has these
MOST_CACHED = 20_000
"""Scenes whose texts are kept once they were made, 30 MB or so: of what a row costs they are nine tenths."""
SMALLEST = 12  # pixels: below, shapes cannot be told apart


class ScenePairs:
    """One split of the built-in world.

    Args:
        name: `train`, `val` or `test`.
        count: number of images.
        size: width and height of the images in pixels.
        seed: another seed gives other scenes; a scene's split is the same under every seed.
        short, relations: captions of few words, added to the five, and what `tell_short` is told.
    """

    def __init__(self, name: str, count: int, size: int, seed: int, short: int = 0, relations: int = 0) -> None:
        self.name, self.count, self.size, self.seed = name, count, size, seed
        self.short, self.relations = short, relations
        self.cache: dict[int, tuple[Scene, list[str]]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Row:
        if index in self.cache:
            scene, texts = self.cache[index]
        else:
            scene, rng = self._scene(index)
            texts = [caption.text for caption in self._captions(scene, rng)]
            if len(self.cache) < MOST_CACHED:
                self.cache[index] = scene, texts
        return Row(
            image=draw_scene(scene, self.size),
            captions=list(texts),
            image_id=scene.id,
            origin=f"scenes (seed {self.seed}) {self.name} image {index}",
        )

    def image_ids(self) -> Iterator[str]:
        """Ids of all images, without drawing them; images of which the same can be said share an id."""
        return (self.scene(index).id for index in range(self.count))

    def scene(self, index: int) -> Scene:
        """What image `index` shows. Raises IndexError outside 0 to the length - 1."""
        return self._scene(index)[0]

    def captions(self, index: int) -> list[Caption]:
        """The captions of image `index` with what each claims."""
        return self._captions(*self._scene(index))

    def _captions(self, scene: Scene, rng: random.Random) -> list[Caption]:
        return [*captions_of(scene, rng), *(tell_short(scene, rng, self.relations) for _ in range(self.short))]

    def object_mask(self, index: int, size: int | None = None) -> NDArray[np.bool_]:
        """True on the pixels that show a thing, (size, size); `size` defaults to the images' own."""
        return draw_object_mask(self.scene(index), size or self.size)

    def _scene(self, index: int) -> tuple[Scene, random.Random]:
        """The scene, and the generator in the state that its captions go on from."""
        if not 0 <= index < self.count:
            raise IndexError(f"scenes {self.name}: no image {index}, there are {self.count}")
        # A generator for each image, seeded by a text: Python hashes it by SHA-512,
        # so row n is the same in every process and needs none of the rows before it.
        rng = random.Random(f"scenes-{VERSION}-{self.seed}-{self.name}-{index}")
        return scene_of_split(rng, self.name), rng

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the parameters and of the first images and captions."""
        # Settings that are off stay out, so that fingerprints without them stay the same.
        facts = (VERSION, self.name, self.count, self.size, self.seed, *([SHORT, self.short] if self.short else []))
        facts = (*facts, self.relations) if self.short and self.relations else facts
        digest = sha256(repr(facts).encode())
        # the content, too: another version of Pillow may draw other pixels
        for index in range(min(4, self.count)):
            row = self[index]
            digest.update(repr(row["captions"]).encode())
            digest.update(draw_scene(self.scene(index), self.size).tobytes())
        return digest.hexdigest()[:16]


class Scenes(Source):
    """The built-in world (a `Source`): small scenes with five captions each, nothing to download.

    Args:
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        size: width and height of the images in pixels, at least 12.
        seed: draws other scenes; train, val and test share no scene under any pair of seeds.
        short: captions of few words, added to the five of every training image; evaluation has the five.
        relations: of several things' short captions, how many tell how they stand to each other, for one of names and
            one of places.
    """

    def __init__(
        self,
        train: int = 20000,
        val: int = 500,
        test: int = 500,
        size: int = 48,
        seed: int = 0,
        short: int = 0,
        relations: int = 0,
    ) -> None:
        self.counts = {"train": train, "val": val, "test": test}
        self.size, self.seed, self.short, self.relations = size, seed, short, relations
        check_least(0, {"data.source.short": short, "data.source.relations": relations})
        for name, count in self.counts.items():
            if count < 1:
                raise UserError(f"scenes.{name}", f"{count} images", "Use at least one")
        if size < SMALLEST:
            raise UserError("scenes.size", f"{size} pixels", f"Use at least {SMALLEST}")

    def split(self, name: str) -> ScenePairs:
        """The pairs of `train`, `val` or `test`; another name is a UserError."""
        if name not in self.counts:
            raise UserError("scenes", f"no split '{name}'", f"Available: {', '.join(SPLITS)}")
        # evaluation has no short captions: numbers stay comparable whatever training is shown
        return ScenePairs(
            name, self.counts[name], self.size, self.seed, *((self.short, self.relations) if name == "train" else ())
        )
