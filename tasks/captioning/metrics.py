"""Captioning metrics: CIDEr-D (Vedantam et al. 2015, 1411.5726) from aac-metrics, and BLEU-1 to BLEU-4 of the whole
split (Papineni et al. 2002) from torchmetrics, each against all references of an image.

Both use the words from `bare_words`: letters and digits in lower case, punctuation removed. That is close to the PTB
tokenizer of the official COCO evaluation, a Java program; but the latter keeps "t-shirt" whole and splits "man's" into
"man 's", so that numbers of the official script differ slightly.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torchmetrics.functional.text import bleu_score

from maskvlm.utils.errors import ExitCode, UserError

NGRAMS = (1, 2, 3, 4)
_WORD = re.compile(r"[^\W_]+")


def bare_words(text: str) -> str:
    """The words of a text in lower case, separated by single spaces; anything but a letter or digit separates words."""
    return " ".join(_WORD.findall(text.lower()))


def usual_caption(references: Sequence[Sequence[str]]) -> str:
    """The most frequent reference by its words, the first in a tie: a baseline that uses no image. References without
    words do not count; "" if there are no others."""
    counts = Counter(words for texts in references for text in texts if (words := bare_words(text)))
    return next((words for words, _ in counts.most_common(1)), "")


def cider_function() -> Callable[..., Any]:
    """`cider_d` of aac-metrics. Raises UserError (69) if it or one of its dependencies is not installed."""
    try:
        from aac_metrics.functional import cider_d  # also imports sentence-transformers, which takes seconds
    except ImportError as error:
        what = f"aac-metrics cannot be used ({error})"
        raise UserError("captioning", what, "pip install 'maskvlm[captioning]'", ExitCode.UNAVAILABLE) from error
    function: Callable[..., Any] = cider_d
    return function


def cider_of_images(written: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each image, times 100; their mean is the split's.

    Args:
        written: one caption per image. references: human captions, one or more per image.

    Returns:
        0 to 1,000, one per image, in order. NaN for an image none of whose references has a letter or digit, which is
        left out; and for all images if fewer than two are left, as the idf of all words is then 0.
    """
    captions, truths, rows = _readable(written, references)
    scores = [float("nan")] * len(written)
    if len(rows) > 1:
        _, of_images = cider_function()(captions, truths)
        for row, value in zip(rows, of_images["cider_d"].tolist(), strict=True):
            scores[row] = 100 * value
    return scores


def caption_metrics(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-n of generated captions.

    Args:
        written: one caption per image. references: human captions, one or more per image.

    Returns:
        `cider`: 100 times the mean over images, as printed in papers; 1,000 at most. Its idf is computed from these
        references, so that numbers of two splits cannot be compared. NaN for fewer than two images, as the idf of all
        words is then 0. `bleu_1` ... `bleu_4`: in percent, over all images together; a caption's length is compared
        with that of the reference closest in length, the shorter of two.
    """
    captions, truths, rows = _readable(written, references)
    if not rows:
        return {"cider": float("nan"), **{f"bleu_{n}": float("nan") for n in NGRAMS}}
    of_images = cider_of_images(written, references)
    bleu = {f"bleu_{n}": 100 * float(bleu_score(captions, truths, n_gram=n)) for n in NGRAMS}
    return {"cider": statistics.fmean(of_images[row] for row in rows), **bleu}


def _readable(
    written: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]], list[int]]:
    """The words of captions and references, and the rows that are kept: references without a letter or digit are
    dropped, and images without any others are left out."""
    # Short ones first: of two references equally close in length, torchmetrics' BLEU takes the first, the official
    # script the shorter.
    truths = [
        sorted((w for text in each if (w := bare_words(text))), key=lambda w: len(w.split())) for each in references
    ]
    rows = [row for row, each in enumerate(truths) if each]
    return [bare_words(written[row]) for row in rows], [truths[row] for row in rows], rows
