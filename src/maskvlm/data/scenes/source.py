"""The built-in scenes as a data set: images and captions generated on demand, the same on every machine."""

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
from maskvlm.utils.errors import UserError, check_counts

__all__ = ["Caption", "Scene", "ScenePairs", "Scenes", "Thing", "captions_of", "describes", "vocabulary"]

VERSION = 3  # raise it when the same seed gives other images or captions
SHORT = 2  # raise it when the same seed gives other short captions, which evaluations never have
MOST_CACHED = 20_000
"""Number of scenes whose texts are cached, some 30 MB: texts are nine tenths of the cost of a row."""
SMALLEST = 12  # pixels: below, shapes cannot be told apart


class ScenePairs:
    """One split of the built-in scenes.

    Args:
        name: `train`, `val` or `test`.
        count: number of images.
        size: width and height of the images in pixels.
        seed: another seed gives other scenes; a scene's split is the same for every seed.
        short: number of short captions added to the five.
        relations: weight of captions on relations among these, see `tell_short`.
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
        """Ids of all images, without drawing them; images with the same description share an id."""
        return (self.scene(index).id for index in range(self.count))

    def scene(self, index: int) -> Scene:
        """The scene of image `index`. Raises IndexError outside 0 to length - 1."""
        return self._scene(index)[0]

    def captions(self, index: int) -> list[Caption]:
        """The captions of image `index` with what each claims."""
        return self._captions(*self._scene(index))

    def _captions(self, scene: Scene, rng: random.Random) -> list[Caption]:
        return [*captions_of(scene, rng), *(tell_short(scene, rng, self.relations) for _ in range(self.short))]

    def object_mask(self, index: int, size: int | None = None) -> NDArray[np.bool_]:
        """True for pixels that show an object, [size, size]; `size` defaults to the images' own."""
        return draw_object_mask(self.scene(index), size or self.size)

    def _scene(self, index: int) -> tuple[Scene, random.Random]:
        """The scene, and the generator in the state from which its captions are drawn."""
        if not 0 <= index < self.count:
            raise IndexError(f"scenes {self.name}: no image {index}, there are {self.count}")
        # A generator for each image, seeded with a string, which Python hashes with SHA-512:
        # row n is the same in every process and does not need the rows before it.
        rng = random.Random(f"scenes-{VERSION}-{self.seed}-{self.name}-{index}")
        return scene_of_split(rng, self.name), rng

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters and of the first images and captions; 16 hex digits."""
        # Settings that are off are left out, so that fingerprints without them stay the same.
        facts = (VERSION, self.name, self.count, self.size, self.seed, *([SHORT, self.short] if self.short else []))
        facts = (*facts, self.relations) if self.short and self.relations else facts
        digest = sha256(repr(facts).encode())
        # the content too, as another version of Pillow may draw other pixels
        for index in range(min(4, self.count)):
            row = self[index]
            digest.update(repr(row["captions"]).encode())
            digest.update(draw_scene(self.scene(index), self.size).tobytes())
        return digest.hexdigest()[:16]


class Scenes(Source):
    """The built-in data set (a `Source`): small drawn scenes with five captions each, nothing to download.

    Args:
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        size: width and height of the images in pixels, at least 12.
        seed: another seed gives other scenes; train, val and test share no scene for any pair of seeds.
        short: number of short captions added to the five of every training image; evaluation has only the five.
        relations: for scenes with several objects, number of short captions on relations for each one on names and one
            on places.
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
        check_counts(0, {"data.source.short": short, "data.source.relations": relations})
        check_counts(1, {f"data.source.{name}": count for name, count in self.counts.items()})
        check_counts(SMALLEST, {"data.source.size": size})

    def split(self, name: str) -> ScenePairs:
        """The pairs of `train`, `val` or `test`. Raises UserError for any other name."""
        if name not in self.counts:
            raise UserError("scenes", f"no split '{name}'", f"Available: {', '.join(SPLITS)}")
        # evaluation has no short captions, so that metrics are comparable whatever the training captions
        return ScenePairs(
            name, self.counts[name], self.size, self.seed, *((self.short, self.relations) if name == "train" else ())
        )
