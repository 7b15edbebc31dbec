"""ARO's order test: an image's caption against the same words in another order, generated from any captioned set
(Yuksekgonul et al. 2023, github.com/mertyg/vision-language-models-are-bows)."""

import argparse
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.raw import FACTS, SETS, BadRow, open_raw
from maskvlm.suites.metrics import first_is_best, percent_right
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.utils.errors import ExitCode, UserError

MAX_WORDS = 30
TRIES = 20
"""Draws until an order differs; of a caption whose orders are all the same none does."""


def plain_words(caption: str) -> list[str]:
    """The words that ARO shuffles: in lower case, most punctuation taken away (ALBEF's `pre_caption`), 30 at most. The
    original's tokenizer also sets commas and apostrophes apart; here they stay with their words."""
    return re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:MAX_WORDS]


def all_words(words: list[str], rng: random.Random) -> list[str]:
    """Every word anywhere."""
    return rng.sample(words, len(words))


def trigrams(words: list[str], rng: random.Random) -> list[str]:
    """Groups of three words in another order, each as it is."""
    groups = [words[start : start + 3] for start in range(0, len(words), 3)]
    return [word for group in rng.sample(groups, len(groups)) for word in group]


def within_trigrams(words: list[str], rng: random.Random) -> list[str]:
    """Groups of three words where they are, each in another order."""
    groups = [words[start : start + 3] for start in range(0, len(words), 3)]
    return [word for group in groups for word in rng.sample(group, len(group))]


SHUFFLES: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "all words": all_words,
    "trigrams": trigrams,
    "within trigrams": within_trigrams,
}


def other_orders(words: list[str], rng: random.Random) -> dict[str, str]:
    """Shuffle -> the words in another order; one that gives no order that is new is not there."""
    orders: dict[str, str] = {}
    for name, shuffle in SHUFFLES.items():
        for _ in range(TRIES):
            text = " ".join(shuffle(words, rng))
            if text != " ".join(words) and text not in orders.values():
                orders[name] = text
                break
    return orders


class AroOrder(Suite):
    """Captions in their order, and in others.

    Args:
        set: how the captions are kept, as `maskvlm data` knows it.
        split: whose captions.
        name: of people's own data the name of the prepared set, which begins the ids of its images; without it nobody
            can tell which of them a model has seen.
        seed: of the shuffles.
    """

    question = "which order of an image's caption is the true one"
    licence = "generated here; captions and images have the terms of their set (ARO's code: MIT)"
    traps = (
        "The true order is better English than the others: a text model finds it without any image (score_no_image "
        "says how often), so a good figure shows knowledge of language, not of the image.",
        "ARO's own order test has four wrong captions, two of which shuffle nouns and adjectives by a part-of-speech "
        "tagger. Those two are left out here, and `all words` is added: the first figure cannot be compared with "
        "published ones.",
        "A tie counts against the model; the original's argmax counts it for the model.",
        "Captions are in lower case and without full stops, as in the original.",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--set", default="flickr8k", help=f"how the captions are kept (flickr8k): {' '.join(SETS)}")
        parser.add_argument("--split", default="val", help="whose captions (val)")
        hint = "of your own data the name that it was prepared under, to tell which images a model has seen"
        parser.add_argument("--name", help=hint)

    def __init__(self, set: str = "flickr8k", split: str = "val", seed: int = 0, name: str | None = None) -> None:
        self.set, self.split, self.seed, self.name = set, split, seed, name

    def read(self, path: Path, images: Path | None) -> ItemRows:
        if images is not None:
            raise UserError("--images", "the set itself tells where its images are", "Leave it out")
        rows, splits = ItemRows(path, None), set[str]()
        rows.ids_known = self.name is not None or self.set in FACTS
        for row in open_raw(self.set, str(path), None, self.name or self.set).rows():
            # Of a bad row the split may not be known.
            if isinstance(row, BadRow):
                rows.skip(row.reason, f"{row.origin}: {row.message}")
                continue
            splits.add(row.split)
            if row.split != self.split:
                continue
            for number, caption in enumerate(row.captions):
                self._add(rows, row.image, caption, row.image_id, f"{row.origin} caption {number}")
        if splits and self.split not in splits:
            what = f"no row of '{self.split}'; there are: {', '.join(sorted(splits))}"
            raise UserError("--split", what, "Name one of these", ExitCode.MISSING_INPUT)
        return rows

    def _add(self, rows: ItemRows, image: str | bytes, caption: str, image_id: str, origin: str) -> None:
        words = plain_words(clean_caption(caption)[0])
        # Seeded by the caption: the same whatever other captions there are.
        orders = other_orders(words, random.Random(f"{self.seed} {image_id} {caption}"))
        if not orders:
            rows.skip("no other order", f"{origin}: '{' '.join(words)}'")
            return
        texts = (" ".join(words), *orders.values())
        rows.items.append(SuiteItem((image,), texts, list(orders), "", origin, (image_id,)))

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        images = [item.image_ids[0] for item in items]
        chance = sum(100 / len(item.texts) for item in items) / max(1, len(items))
        figures = [
            percent_right("the true order is the best", [first_is_best(each) for each in scores], chance, images)
        ]
        for name in SHUFFLES:
            # The place of this shuffle's text behind the true one, where the caption has it.
            rows = [(row, 1 + item.truth.index(name)) for row, item in enumerate(items) if name in item.truth]
            right = [scores[row][0] > scores[row][place] for row, place in rows]
            figures.append(percent_right(f"better than {name} shuffled", right, 50.0, [images[row] for row, _ in rows]))
        return figures
