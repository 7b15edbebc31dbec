"""The page's own examples and the images that it searches: held-out scenes of the built-in world, drawn when it starts;
for a model trained on photographs, those in `photos/`."""

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from maskvlm.data.inputs import ImageInput, open_image
from maskvlm.data.scenes.source import SMALLEST, ScenePairs
from maskvlm.data.scenes.world import COLOURS, SHAPES
from maskvlm.inference.embeddings import contrast_counts
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import UserError

CHOSEN = (2, 1, 7, 3, 6, 0, 4, 5)
"""Rows of the validation split: scenes with one and with several objects, with all shapes but one."""
PHOTOS = Path(__file__).with_name("photos")
SEARCHED = 200  # number of images of the test split
SCENE_PIXELS = 288  # minimum size of a drawn scene on the page, in pixels
THUMB = 320


class PageSample(NamedTuple):
    """A scene or a photograph: its image, a caption, another caption with the same number of words of which some are
    wrong, and the patches with its first object.

    masked: [rows, columns].
    """

    image: Image.Image
    text: str
    other: str
    masked: list[list[bool]]


class Hit(NamedTuple):
    """An image that was found, its label, and its cosine similarity."""

    image: Image.Image
    label: str
    similarity: float = 0.0


def enlarged(image: Image.Image) -> Image.Image:
    """A small image, enlarged in whole pixels so that scaling it down for the model restores it."""
    times = max(1, -(-SCENE_PIXELS // image.width))  # rounded up
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def otherwise(text: str) -> str:
    """The caption with different colours and shapes."""
    words = []
    for word in text.split():
        plain = word.strip(",.:")
        for known in (COLOURS, SHAPES):
            if plain in known:
                # Half the list further on, so it is never the same word.
                word = word.replace(plain, known[(known.index(plain) + len(known) // 2) % len(known)])
        words.append(word)
    return " ".join(words)


def samples(size: int, grid: tuple[int, int]) -> list[PageSample]:
    """Scenes as a model of this resolution saw them in training."""
    pairs = ScenePairs("val", max(CHOSEN) + 1, max(size, SMALLEST), 0)
    rows, columns = grid
    page_samples = []
    for index in CHOSEN:
        thing = pairs.scene(index).things[0]
        text = pairs[index]["captions"][0]
        down, across = np.arange(rows)[:, None], np.arange(columns)[None]
        row, column = thing.row, thing.column
        # A scene has 3 x 3 places; the patches of one place are masked.
        masked = (down * 3 // rows == row) & (across * 3 // columns == column)
        page_samples.append(PageSample(enlarged(pairs[index]["image"]), text, otherwise(text), masked.tolist()))  # type: ignore[arg-type]
    return page_samples


def photo_rows() -> dict[str, Any]:
    """File -> captions, other, box: see `photos.yaml`."""
    rows: dict[str, Any] = yaml.safe_load((PHOTOS / "photos.yaml").read_text(encoding="utf-8"))
    return rows


def photo(name: str) -> Image.Image:
    """One of the page's own photographs."""
    return open_image(PHOTOS / name, name)


def photo_samples(grid: tuple[int, int]) -> list[PageSample]:
    """The photographs with their first captions; patches whose centre is in the box are masked."""
    rows, columns = grid
    # Centres of patches as fractions of the image: (rows, 1) and (1, columns)
    down, across = (np.arange(rows)[:, None] + 0.5) / rows, (np.arange(columns)[None] + 0.5) / columns
    page_samples = []
    for name, row in photo_rows().items():
        left, top, right, bottom = row["box"]
        masked = (left <= across) & (across <= right) & (top <= down) & (down <= bottom)
        page_samples.append(PageSample(photo(name), row["captions"][0], row["other"], masked.tolist()))
    return page_samples


class Searched:
    """The images that the page searches: the user's index, scenes of the built-in world, or photographs.

    Args:
        model: a pre-training model.
        folder: folder of an index (`maskvlm index`); None for the page's own images.
        images: folder of the index's images, as given by the user.
        photos: without an index, search the photographs instead of the scenes.

    Raises:
        UserError: the index is damaged, or was made with another checkpoint.
    """

    def __init__(
        self, model: PretrainedMaskVLM, folder: Path | None, images: Path | None = None, photos: bool = False
    ) -> None:
        self.model, self.index, self.query = model, None, "a red circle"
        if folder is not None:
            from maskvlm.inference.search import SearchIndex  # imports the command line, which most pages do not need
            from maskvlm.inference.vector_files import identity

            self.index = SearchIndex.load(folder, images)
            # A query embedded with these weights cannot be compared with vectors of other weights.
            if identity(model) != self.index.about["weights"]:
                what = f"was made with another checkpoint ({Path(str(self.index.about['checkpoint'])).name})"
                raise UserError(folder.name, what, "Make it again: maskvlm index")
            self.description = f"{self.index.about['count']:,} images of the index in {folder.name}"
        elif photos:
            self.rows = [{"image": photo(name), "captions": row["captions"]} for name, row in photo_rows().items()]
            self.query = "a cat"
            self.description = f"the {len(self.rows)} photographs that come with this page"
        else:
            pairs = ScenePairs("test", SEARCHED, max(model.image_size, SMALLEST), 0)
            self.rows = [dict(pairs[row]) for row in range(SEARCHED)]
            thing = next(
                things[0] for things in (pairs.scene(row).things for row in range(SEARCHED)) if len(things) == 1
            )
            self.query = f"a {thing.colour} {thing.shape}"
            self.description = f"{SEARCHED} scenes of the built-in world that the model has not seen"
        if self.index is None:
            # Computed now, as it may take longer than an answer may. A run without contrast has none; a search says so.
            with suppress(UserError):
                _ = self.vector_NE

    @cached_property
    def vector_NE(self) -> Tensor:
        """Unit vectors of the page's images, [N, E]. Raises UserError if the run has no head for them."""
        vectors: Tensor = self.model.encode_image([row["image"] for row in self.rows])
        return vectors

    def by_text(self, text: str, k: int = 8) -> list[Hit]:
        """The images nearest to a text, re-ranked by matching. The text is never interpreted as a file name."""
        # Contrast finds three times as many as are shown; matching selects among them.
        near = self.nearest(self.model.encode_text(text), 3 * k)
        likely: Any = self.model.match([hit.image for hit in near], text)
        # Ordered as in `search_index`: log-odds, plus the cosine if it counts; 1e-6 keeps those of 0 and 1 finite.
        cosine_K = torch.tensor([hit.similarity for hit in near])
        score_K = torch.tensor(likely).logit(1e-6) + contrast_counts(self.model) * cosine_K
        order = [(near[at], likely[at]) for at in score_K.argsort(descending=True, stable=True).tolist()[:k]]
        # The match replaces the cosine before the caption.
        return [hit._replace(label=f"{100 * share:.0f} %  {hit.label.partition('  ')[2]}") for hit, share in order]

    def by_image(self, image: ImageInput, k: int = 8) -> list[Hit]:
        """The images nearest to another one."""
        return self.nearest(self.model.encode_image(image), k)

    def nearest(self, vector_E: Tensor, k: int) -> list[Hit]:
        """The k images whose vectors are nearest to a unit vector, [E]."""
        if self.index is None:
            similarity_N = self.vector_NE @ vector_E
            order = similarity_N.argsort(descending=True)[:k].tolist()
            rows = [self.rows[place] for place in order]
            drawn = [(row["image"], row["captions"]) for row in rows]
            return [
                Hit(enlarged(image), f"{similarity_N[place]:.2f}  {captions[0]}", float(similarity_N[place]))
                for place, (image, captions) in zip(order, drawn, strict=True)
            ]
        from maskvlm.inference.search import SearchResult

        (cosine_K,), (position_K,) = self.index.search(vector_E.cpu(), k)
        # If the index found fewer than k, the last positions are -1.
        rows = self.index.ids.take(position_K[position_K >= 0]).to_pylist()
        hits = [SearchResult(**row, similarity=value) for row, value in zip(rows, cosine_K.tolist(), strict=False)]
        return [
            Hit(
                thumbnail(image, each.id),
                f"{each.similarity:.2f}  {each.captions[0] if each.captions else ''}",
                each.similarity,
            )
            for image, each in zip(self.index.open_images(hits), hits, strict=True)
        ]


def thumbnail(source: ImageInput, name: str) -> Image.Image:
    """A thumbnail of an index's image. Raises BadImage."""
    image = open_image(source, name)
    image.thumbnail((THUMB, THUMB))
    return image if image.width >= THUMB // 2 else enlarged(image)
