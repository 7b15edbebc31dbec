"""How a model scores texts with an image, using its public methods."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console

from maskvlm.data.inputs import open_image
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.status_bar import StatusBar

if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM
    from maskvlm.suites.suite import SuiteItem


def _contrast(model: "PretrainedMaskVLM", image: Image.Image, texts: list[str]) -> list[float]:
    cosines: list[float] = (model.encode_text(texts) @ model.encode_image(image)).tolist()
    return cosines


def _match(model: "PretrainedMaskVLM", image: Image.Image, texts: list[str]) -> Any:
    return model.match(image, texts)


def _score(model: "PretrainedMaskVLM", image: Image.Image | None, texts: list[str]) -> Any:
    return model.score(image, texts)


def _score_per_word(model: "PretrainedMaskVLM", image: Image.Image, texts: list[str]) -> list[float]:
    # If a text is longer than the model reads, only the words that are read count, as in `score`.
    word_CT = model.words.captioner(texts).word_CT
    counts = [len({*words} - {-1}) for words in word_CT.tolist()]
    return [nats / count for nats, count in zip(_score(model, image, texts), counts, strict=True)]


def _score_no_image(model: "PretrainedMaskVLM", image: Image.Image, texts: list[str]) -> Any:
    return _score(model, None, texts)


_SCORERS: dict[str, Callable[["PretrainedMaskVLM", Image.Image, list[str]], Any]] = {
    "contrast": _contrast,
    "match": _match,
    "score": _score,
    "score_per_word": _score_per_word,
    "score_no_image": _score_no_image,
}
WAYS = tuple(_SCORERS)
"""contrast: cosine (ITC). match: probability of a match (ITM). score: pseudo-log-likelihood of the text given the
image, in nats (MLM). score_per_word: the same divided by the number of words that are read, including punctuation
marks. score_no_image: without the image, a control for what the text alone gives away."""


def pair_scores(model: "PretrainedMaskVLM", items: Sequence["SuiteItem"], way: str) -> list[list[float]]:
    """A score for each text of an item with the item's image, or with the part of it in the item's box. The texts of
    all items of an image (or part) are scored at once.

    Raises:
        UserError: the checkpoint lacks the head, or there is no such way.
    """
    if way not in _SCORERS:
        raise UserError("--by", f"there is no {way}", f"Available: {', '.join(_SCORERS)}")
    rows_of: dict[tuple[str | bytes, tuple[int, int, int, int] | None], list[int]] = {}
    for row, item in enumerate(items):
        rows_of.setdefault((item.images[0], item.box), []).append(row)
    item_scores: list[list[float]] = [[] for _ in items]
    bar = StatusBar(way, len(rows_of), Console(stderr=True))
    for done, ((file, box), rows) in enumerate(rows_of.items()):
        image = open_image(file)
        if box is not None:
            image = image.crop(within(box, image.size))
        bar.show(done, f"{done:,} of {len(rows_of):,} images")
        # Each text once, whichever items share it.
        texts = list(dict.fromkeys(text for row in rows for text in items[row].texts))
        scores = dict(zip(texts, _SCORERS[way](model, image, texts), strict=True))
        for row in rows:
            item_scores[row] = [scores[text] for text in items[row].texts]
    bar.close()
    return item_scores


def within(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a box (left, top, right, bottom in pixels) that lies in an image of this width and height.

    Raises:
        UserError: the box lies outside of the image.
    """
    left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(size[0], box[2]), min(size[1], box[3])
    if left >= right or top >= bottom:
        what = f"the box {box} lies outside of the image of {size[0]} by {size[1]} pixels"
        raise UserError("box", what, "Fix or remove the row", ExitCode.BAD_DATA)
    return left, top, right, bottom
