"""The official VQA v2 accuracy, in plain Python: answers are normalised, then compared with human answers.

Rules and tables from github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at commit a013f00,
including its mistakes, because published numbers contain them. If its authors' text and code differ, the code counts.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from math import fsum
from typing import NamedTuple

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophe, colon and signs such as % or $ stay
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
# Any word that equals one of these with one apostrophe left out becomes it: `dont`, `couldnt've`, `couldn'tve`.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
MARK = re.compile("'")
# The original's forms of "I" (`Im`, `Ive`) are left out: words are in lower case by then and never match them.
CONTRACTIONS = {
    word[: at.start()] + word[at.end() :]: word for word in CONTRACTED.split() for at in MARK.finditer(word)
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # reversed in the original

# The original intends to keep points between digits but misspells the look-behind: any point before a digit is kept.
POINT = re.compile(r"\.(?!\d)")
MOST_POINTS = 32  # the value of re.UNICODE, which the original passes where the count belongs
DIGIT_COMMA = re.compile(r"\d,\d")
FULL = 3  # an answer is right if this many other people gave it


class Mean(NamedTuple):
    """Mean accuracy in percent, unrounded (the original rounds to two digits), and the number of questions."""

    percent: float
    questions: int


class VqaAccuracy(NamedTuple):
    """Accuracy over all questions and by type; each question counts equally."""

    overall: Mean
    by_question_type: dict[str, Mean]
    by_answer_type: dict[str, Mean]


@lru_cache(2**16)  # the 2.4 million answers of a validation run have few distinct ones
def normalise(answer: str) -> str:
    """The form in which answers are compared: `The dog's toys, 2.` -> `dog's toys 2`.

    Case, articles and most punctuation are removed, number words become digits, missing apostrophes are restored. The
    result may be empty (for `the`).
    """
    return _words(_punctuation(_tidy(answer)))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement of one answer with the human answers, 0 to 1: see `credit`.

    Answers are normalised only if the human answers differ. If they are all the same, the prediction must be exactly
    that text, so that text in an image is not changed (the authors, issue 14 of their repository).

    Args:
        prediction: the model's answer.
        answers: human answers, ten in VQA v2.

    Raises:
        ValueError: there are no answers.
    """
    prediction, texts = _tidy(prediction), [_tidy(answer) for answer in answers]
    if len(set(texts)) > 1:
        prediction, texts = normalise(prediction), [normalise(answer) for answer in texts]
    return credit(texts.count(prediction), len(texts))


def credit(matches: int, people: int) -> float:
    """Accuracy of an answer that `matches` of `people` gave: with ten people, 0 to 4 give 0, 0.3, 0.6, 0.9 and 1.

    Each person is left out in turn, the others score the answer as min(matches among them / 3, 1), and the scores are
    averaged. With fewer than three others, which the original does not foresee, all of them are needed instead of
    three, and a single person decides alone: an answer that everybody gave is always worth 1.

    Raises:
        ValueError: there are no people.
    """
    if people < 1:
        raise ValueError("an accuracy needs at least one answer to compare with")
    if people == 1:
        return float(matches)
    need = min(FULL, people - 1)
    # Leaving out someone who gave the answer leaves one match fewer; leaving out anyone else leaves all.
    total = matches * min(matches - 1, need) + (people - matches) * min(matches, need)
    return total / (people * need)


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    question_types: Sequence[str],
    answer_types: Sequence[str],
) -> VqaAccuracy:
    """Accuracies over many questions; all arguments in the same order. The type "" is not listed.

    Raises:
        ValueError: no questions, a question without answers, or lists of unequal length.
    """
    if not predictions:
        raise ValueError("an accuracy needs at least one question")
    scores = [accuracy(prediction, texts) for prediction, texts in zip(predictions, answers, strict=True)]
    return VqaAccuracy(_mean(scores), _by(question_types, scores), _by(answer_types, scores))


def _by(types: Sequence[str], scores: Sequence[float]) -> dict[str, Mean]:
    lists: dict[str, list[float]] = {}
    for kind, score in zip(types, scores, strict=True):
        lists.setdefault(kind, []).append(score)
    return {kind: _mean(lists[kind]) for kind in sorted(lists) if kind}


def _mean(scores: Sequence[float]) -> Mean:
    return Mean(100 * fsum(scores) / len(scores), len(scores))


def _tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(answer: str) -> str:
    """Replace each mark by a space, or remove it if it is next to a space anywhere or the text has a comma as in
    1,5."""
    close = DIGIT_COMMA.search(answer) is not None
    places = ["" if close or f"{mark} " in answer or f" {mark}" in answer else " " for mark in PUNCTUATION]
    bare = answer.translate(dict(zip(map(ord, PUNCTUATION), places, strict=True)))
    return POINT.sub("", bare, count=MOST_POINTS)


def _words(answer: str) -> str:
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
