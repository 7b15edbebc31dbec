"""ARO's order test: an image's caption against the same words in another order, generated from any data set with
captions (Yuksekgonul et al. 2023, github.com/mertyg/vision-language-models-are-bows)."""

import argparse
import importlib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.raw import FACTS, SETS, WITH_IMAGES, BadRow, open_raw
from maskvlm.suites.metrics import first_is_best, percent_right
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.utils.errors import ExitCode, UserError

MAX_WORDS = 30
NOUNS = {"NN", "NNS", "NNP", "NNPS"}
ADJECTIVES = {"JJ", "JJR", "JJS"}
"""Penn Treebank tags."""
TRIES = 20
"""Maximum number of draws to find a different order; some captions have none."""


def plain_words(caption: str) -> list[str]:
    """The words that ARO shuffles: in lower case, without most punctuation (ALBEF's `pre_caption`), at most 30. The
    original's tokenizer also splits off commas and apostrophes; here they stay with their words."""
    return re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:MAX_WORDS]


def all_words(words: list[str], tags: list[str], rng: random.Random) -> list[str]:
    """All words shuffled."""
    return rng.sample(words, len(words))


def nouns_and_adjectives(words: list[str], tags: list[str], rng: random.Random) -> list[str]:
    """Nouns shuffled among themselves, and adjectives among themselves."""
    nouns = [place for place, tag in enumerate(tags) if tag in NOUNS]
    adjectives = [place for place, tag in enumerate(tags) if tag in ADJECTIVES]
    return _exchanged(_exchanged(words, nouns, rng), adjectives, rng)


def all_but_nouns_and_adjectives(words: list[str], tags: list[str], rng: random.Random) -> list[str]:
    """All other words shuffled among themselves."""
    return _exchanged(words, [place for place, tag in enumerate(tags) if tag not in NOUNS | ADJECTIVES], rng)


def _exchanged(words: list[str], places: list[int], rng: random.Random) -> list[str]:
    exchanged = list(words)
    for place, source in zip(places, rng.sample(places, len(places)), strict=True):
        exchanged[place] = words[source]
    return exchanged


def trigrams(words: list[str], tags: list[str], rng: random.Random) -> list[str]:
    """Groups of three words shuffled, each group unchanged."""
    groups = [words[start : start + 3] for start in range(0, len(words), 3)]
    return [word for group in rng.sample(groups, len(groups)) for word in group]


def within_trigrams(words: list[str], tags: list[str], rng: random.Random) -> list[str]:
    """Groups of three words in place, each shuffled within."""
    groups = [words[start : start + 3] for start in range(0, len(words), 3)]
    return [word for group in groups for word in rng.sample(group, len(group))]


Shuffle = Callable[[list[str], list[str], random.Random], list[str]]
"""Puts the words of a caption in another order. Tags, one for each word, are passed for `OF_ARO` only."""

SHUFFLES: dict[str, Shuffle] = {
    "all words": all_words,
    "trigrams": trigrams,
    "within trigrams": within_trigrams,
}
OF_ARO: dict[str, Shuffle] = {
    "nouns and adjectives": nouns_and_adjectives,
    "all but nouns and adjectives": all_but_nouns_and_adjectives,
    "trigrams": trigrams,
    "within trigrams": within_trigrams,
}
"""The four shuffles of the paper's COCO-Order and Flickr30k-Order."""


def other_orders(
    words: list[str], rng: random.Random, tags: list[str] | None = None, shuffles: dict[str, Shuffle] = SHUFFLES
) -> dict[str, str]:
    """Name of a shuffle -> the words in another order. Shuffles that find no new order are left out.

    Args:
        words: words of a caption.
        rng: random number generator of the shuffles.
        tags: part-of-speech tag of each word, for `OF_ARO`.
        shuffles: shuffles by name.
    """
    orders: dict[str, str] = {}
    for name, shuffle in shuffles.items():
        for _ in range(TRIES):
            text = " ".join(shuffle(words, tags or [], rng))
            if text != " ".join(words) and text not in orders.values():
                orders[name] = text
                break
    return orders


def part_of_speech_tagger() -> Callable[[list[str]], list[str]]:
    """NLTK's averaged perceptron tagger: words -> their Penn Treebank tags.

    Raises:
        UserError: NLTK or the weights of its tagger are not installed (69).
    """
    try:
        tagger = importlib.import_module("nltk.tag.perceptron").PerceptronTagger()
    except ImportError as error:
        todo = "pip install 'maskvlm[suites]'"
        raise UserError("--tagged", "nltk is not installed", todo, ExitCode.UNAVAILABLE) from error
    except LookupError as error:
        todo = "python -m nltk.downloader averaged_perceptron_tagger_eng"
        raise UserError("--tagged", "NLTK has no tagger for English", todo, ExitCode.UNAVAILABLE) from error
    # The tagger expects words without the commas that stay attached here.
    return lambda words: [tag for _, tag in tagger.tag([word.strip(",?'") or word for word in words])]


class AroOrder(Suite):
    """Captions in their own order and in other orders.

    Args:
        set: format of the captions, as in `maskvlm data`.
        split: split whose captions are used.
        name: for your own data, the name of the prepared set, with which the ids of its images start; without it, the
            images that a model was trained on cannot be identified.
        seed: random seed of the shuffles.
        tagged: use ARO's own four shuffles, two of which need NLTK's tagger for nouns and adjectives; otherwise the
            three that need no tagger.
    """

    question = "which order of an image's caption is the true one"
    licence = "generated here; captions and images have the terms of their set (ARO's code: MIT)"
    traps = (
        "The true order is better English than the others: a text model finds it without any image (score_no_image "
        "says how often), so a good figure shows knowledge of language, not of the image.",
        "ARO's own order test has four wrong captions, two of which shuffle nouns and adjectives by a part-of-speech "
        "tagger: `--tagged` makes them (NLTK's tagger in the place of spaCy's). Without it these two are left out and "
        "`all words` is added: the first figure cannot be compared with published ones.",
        "A tie counts against the model; the original's argmax counts it for the model.",
        "Captions are in lower case and without full stops, as in the original.",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--set", default="flickr8k", help=f"format of the captions (default: flickr8k): {' '.join(SETS)}"
        )
        parser.add_argument("--split", default="val", help="split whose captions are used (default: val)")
        hint = "name that your own data was prepared under, to tell which images a model has seen"
        parser.add_argument("--name", help=hint)
        hint = "use ARO's own four shuffles, with NLTK's part-of-speech tagger (default: three that need no tagger)"
        parser.add_argument("--tagged", action="store_true", help=hint)

    def __init__(
        self, set: str = "flickr8k", split: str = "val", seed: int = 0, name: str | None = None, tagged: bool = False
    ) -> None:
        self.set, self.split, self.seed, self.name, self.tagged = set, split, seed, name, tagged
        self.shuffles = OF_ARO if tagged else SHUFFLES

    def read(self, path: Path, images: Path | None) -> ItemRows:
        if images is not None and self.set not in WITH_IMAGES:
            raise UserError("--images", "the set itself tells where its images are", "Leave it out")
        rows, splits = ItemRows(path, None), set[str]()
        tags_of = part_of_speech_tagger() if self.tagged else None
        rows.ids_known = self.name is not None or self.set in FACTS
        for row in open_raw(
            self.set, str(path), None, self.name or self.set, None if images is None else str(images)
        ).rows():
            # The split of a bad row may be unknown.
            if isinstance(row, BadRow):
                rows.skip(row.reason, f"{row.origin}: {row.message}")
                continue
            splits.add(row.split)
            if row.split != self.split:
                continue
            for number, caption in enumerate(row.captions):
                words = plain_words(clean_caption(caption)[0])
                tags = tags_of(words) if tags_of else None
                # Seeded by the caption, so that its shuffles do not depend on the other captions.
                rng = random.Random(f"{self.seed} {row.image_id} {caption}")
                orders = other_orders(words, rng, tags, self.shuffles)
                origin = f"{row.origin} caption {number}"
                if not orders:
                    rows.skip("no other order", f"{origin}: '{' '.join(words)}'")
                    continue
                texts = (" ".join(words), *orders.values())
                rows.items.append(SuiteItem((row.image,), texts, list(orders), "", origin, (row.image_id,)))
        if splits and self.split not in splits:
            what = f"no row of '{self.split}'; there are: {', '.join(sorted(splits))}"
            raise UserError("--split", what, "Name one of these", ExitCode.MISSING_INPUT)
        return rows

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        images = [item.image_ids[0] for item in items]
        chance = sum(100 / len(item.texts) for item in items) / max(1, len(items))
        figures = [
            percent_right("the true order is the best", [first_is_best(each) for each in scores], chance, images)
        ]
        for name in self.shuffles:
            # Index of this shuffle's text after the true one, if the caption has it.
            rows = [(row, 1 + item.truth.index(name)) for row, item in enumerate(items) if name in item.truth]
            right = [scores[row][0] > scores[row][place] for row, place in rows]
            figures.append(percent_right(f"better than {name} shuffled", right, 50.0, [images[row] for row, _ in rows]))
        return figures
