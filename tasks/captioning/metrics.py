"""What written captions are judged by: CIDEr-D (Vedantam et al. 2015, 1411.5726) by aac-metrics, and BLEU-1 to BLEU-4
of the whole split (Papineni et al. 2002) by torchmetrics, each against all references of an image.

Both read words as `bare_words` gives them: letters and digits in lower case, punctuation removed. That is about what
the PTB tokenizer of the official COCO evaluation leaves, a Java program; but it keeps "t-shirt" whole and makes "man's"
"man 's", so that figures of the official script differ slightly.
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
    """The words of a text in lower case with one space between them; what is no letter and no digit separates words."""
    return " ".join(_WORD.findall(text.lower()))


def usual_caption(references: Sequence[Sequence[str]]) -> str:
    """The most frequent of all references by its words, the first of equals: a baseline that looks at no image.
    References without a word do not count; "" where there are no others."""
    counts = Counter(words for texts in references for text in texts if (words := bare_words(text)))
    return next((words for words, _ in counts.most_common(1)), "")


def cider_function() -> Callable[..., Any]:
    """`cider_d` of aac-metrics. Raises UserError (69) where that, or what it needs, is not installed."""
    try:
        from aac_metrics.functional import cider_d  # with it sentence-transformers, which takes seconds
    except ImportError as error:
        what = f"aac-metrics cannot be used ({error})"
        raise UserError("captioning", what, "pip install 'maskvlm[captioning]'", ExitCode.UNAVAILABLE) from error
    function: Callable[..., Any] = cider_d
    return function


def cider_of_images(written: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each image, times 100; their mean is the split's.

    Args:
        written: one caption an image. references: captions of people, one or more an image.

    Returns:
        0 to 1,000, one an image, in order. NaN for an image none of whose references has a letter or digit, as it is
        left out; and for all where fewer than two are left: the idf of all words is then 0.
    """
    captions, truths, rows = _readable(written, references)
    scores = [float("nan")] * len(written)
    if len(rows) > 1:
        _, of_images = cider_function()(captions, truths)
        for row, value in zip(rows, of_images["cider_d"].tolist(), strict=True):
            scores[row] = 100 * value
    return scores


def caption_metrics(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-n of written captions.

    Args:
        written: one caption an image. references: captions of people, one or more an image.

    Returns:
        `cider`: 100 times the mean over images, as papers print it; 1,000 at most. Its idf is computed from these
        references, so that figures of two splits cannot be compared. NaN for fewer than two images: the idf of all
        words is then 0. `bleu_1` ... `bleu_4`: in percent, over all images together; a caption's length is held
        against that of the reference nearest to it.
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
    """The words of captions and references, and the rows that are kept: a reference without a letter or digit says
    nothing, an image without another is left out."""
    truths = [[words for text in each if (words := bare_words(text))] for each in references]
    rows = [row for row, each in enumerate(truths) if each]
    return [bare_words(written[row]) for row in rows], [truths[row] for row in rows], rows
