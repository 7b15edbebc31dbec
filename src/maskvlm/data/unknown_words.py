"""Samples texts of a split: to train a vocabulary, and to measure how many words a tokenizer does not know.

To a tokenizer of another language, all words are unknown: the run would in effect learn from empty texts.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from maskvlm.data.batch import check_row
from maskvlm.data.caption_text import clean_caption
from maskvlm.data.examples import check_example, read_example
from maskvlm.data.subset import Chosen
from maskvlm.data.text import Captioner
from maskvlm.utils.distributed import rank
from maskvlm.utils.errors import ExitCode, UserError

MOST_WORDS, LONGEST = 5, 40  # number of the most frequent unknown words to report, and of letters of each
SPELT = 0.2
"""Share of words that are only spelled letter by letter above which the user is told."""
CUT = 0.02
"""Share of texts longer than the model reads above which the user is told."""
MOST_ROWS = 300
"""Number of rows to check, evenly spread: a share of one half is then known to within 3 %."""


def some_captions(pairs: Any, most: int = 6_000) -> Iterator[str]:
    """The captions of at most `most` images evenly spread over a split: enough to train a vocabulary."""
    if hasattr(pairs, "first_captions"):  # a streamed split has no order to spread over
        yield from pairs.first_captions(most)
        return
    step = math.ceil(len(pairs) / most)
    for index in range(0, len(pairs), step):
        yield from check_row(pairs[index], index)["captions"]


def some_texts(examples: Any, most: int = 6_000) -> Iterator[str]:
    """Texts and answers of some examples, chosen as in `some_captions`."""
    for index in range(0, len(examples), math.ceil(len(examples) / most)):
        example = read_example(examples, index)
        yield example["text"]
        yield from example["answers"]


def by_source(split: Any) -> Iterator[tuple[str, list[str]]]:
    """Some texts of a split's rows, each with the name of its set; "" if there is only one."""
    if hasattr(split, "first_captions"):
        yield "", [*islice(split.first_captions(MOST_ROWS), 10 * MOST_ROWS)]
        return
    for index in range(0, len(split), max(1, math.ceil(len(split) / MOST_ROWS))):
        # down to the stored split, which knows its sets and has captions without opening images
        pairs, row = split, index
        while isinstance(pairs, Chosen):
            pairs, row = pairs.pairs, int(pairs.row_N[row])
        name = pairs.source(row) if hasattr(pairs, "source") else ""
        if hasattr(pairs, "captions"):  # without opening the image
            yield name, [str(getattr(caption, "text", caption)) for caption in pairs.captions(row)]
        else:
            record = pairs[row]
            is_example = "captions" not in record and ("text" in record or "image_ids" in record)
            yield name, [check_example(record, row)["text"]] if is_example else list(check_row(record, row)["captions"])


def spelt_shares(split: Any, captioner: Captioner, unknown: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Source -> share of its words that the tokenizer only spells letter by letter, 0 to 1: little can be learned about
    them from a few texts.

    Args:
        unknown: result of `unknown_shares` for the same split; unknown words do not count here.
    """
    strange: Counter[str] = Counter()  # both kinds
    for name, texts in by_source(split):
        strange[name] += sum(len(captioner.unknown_words(text)) for text in texts)
    return {name: max(0.0, strange[name] / count - share) for name, (share, count) in unknown.items()}


def unknown_shares(split: Any, captioner: Captioner) -> dict[str, tuple[float, int]]:
    """Source -> share of its words with a part unknown to the tokenizer, 0 to 1, and number of words checked; words
    beyond the text length are not checked."""
    words: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for name, texts in by_source(split):
        tokens = captioner(texts)
        # (C, T)
        unknown_CT = (tokens.token_CT == captioner.unknown) & ~tokens.special_CT
        for word_T, missing_T in zip(tokens.word_CT, unknown_CT, strict=True):
            # words, not tokens, as an unknown word may be one token or several
            words[name] += len(word_T[word_T >= 0].unique())
            unknown[name] += len(word_T[missing_T].unique())
    return {name: (unknown[name] / count, count) for name, count in words.items() if count}


def cut_shares(split: Any, captioner: Captioner) -> dict[str, float]:
    """Source -> share of its texts, 0 to 1, that are longer than the model reads."""
    long: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, texts in by_source(split):
        count[name] += len(texts)
        long[name] += sum(captioner.count(clean_caption(text)[0]) > captioner.text_length - 2 for text in texts)
    return {name: long[name] / count[name] for name in count if count[name]}


def check_unknown(split: Any, captioner: Captioner, most: float, texts_of: str = "training") -> None:
    """Report, in the first process, how many words of a split the tokenizer does not know, and how many texts are cut.

    Args:
        most: the largest share allowed, 0 to 1.
        texts_of: name of the split in messages.

    Raises:
        UserError: a source has more.
    """
    shares = unknown_shares(split, captioner)
    some = [(name, share) for name, (share, _) in shares.items() if share > 0]
    if rank() == 0 and some:
        figures = ", ".join(f"{f'{name} ' if name else ''}{100 * share:.1f} %" for name, share in some)
        often = Counter(
            word for _, texts in by_source(split) for text in texts for word in captioner.unknown_words(text)
        )
        # without spelled words, which are reported below
        lost = (word for word, _ in often.most_common() if captioner.unknown in captioner([word]).token_CT)
        words = ", ".join(f"{word[:LONGEST]}..." if len(word) > LONGEST else word for word in islice(lost, MOST_WORDS))
        stay = "; they remain unknown, because the tokenizer comes from the model"
        print(f"unknown words in the {texts_of} texts: {figures}{f' ({words})' if words else ''}{stay}", flush=True)
    spelt = [(name, share) for name, share in spelt_shares(split, captioner, shares).items() if share > SPELT]
    if rank() == 0 and spelt:
        figures = ", ".join(f"{f'{name} ' if name else ''}{100 * share:.0f} %" for name, share in spelt)
        print(f"words of the {texts_of} texts that the tokenizer splits into single letters: {figures}", flush=True)
    long = [(name, share) for name, share in cut_shares(split, captioner).items() if share > CUT]
    if rank() == 0 and long:
        figures = ", ".join(f"{f'{name} ' if name else ''}{100 * share:.0f} %" for name, share in long)
        read = f"the {captioner.text_length - 2} tokens that the model reads (model.backbone.text.text_length)"
        print(f"{texts_of} texts that are longer than {read}, and are cut: {figures}", flush=True)
    for name, (share, count) in shares.items():
        if share > most:
            what = f"the tokenizer does not know {100 * share:.0f} % of {count:,} words of the {texts_of} texts"
            todo = "Use a tokenizer for their language (model.backbone.text.name), or raise data.max_unknown"
            raise UserError(f"data.source ({name})" if name else "data.source", what, todo, ExitCode.BAD_DATA)
