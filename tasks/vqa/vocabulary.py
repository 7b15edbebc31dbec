"""The answer vocabulary of a VQA head, the weight of each answer in training, and the reader of annotations.

The usual list of 3,129 answers follows the rule of github.com/hengyuan-hu/bottom-up-attention-vqa,
tools/compute_softscore.py: the `multiple_choice_answer` of each question in train and val is normalised, and kept if
at least nine questions have it. As a command, this module writes such a list.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.config.arguments import OptionParser
from maskvlm.data.files import get, load_json, opened
from maskvlm.data.prepared.manifest import write_set_json
from maskvlm.data.raw.lines import text_lines
from maskvlm.data.strict_json import json_kind
from maskvlm.utils.errors import ExitCode, UserError, check_counts
from maskvlm.utils.paths import expand_user
from tasks.vqa.metric import credit, normalise

LAYOUT = "VQA v2"
BROKEN = re.compile("[\ud800-\udfff]")  # JSON can contain unpaired surrogates, which no file or terminal accepts
SAME_PART = "Use questions and annotations of the same part"
OPTIONAL = ("multiple_choice_answer", "question_type", "answer_type")


class Annotation(NamedTuple):
    """The human answers to one question.

    Attributes:
        origin: file and position, for messages.
        majority: `multiple_choice_answer`; like the types, "" if the file has none.
        image_id: as in the file, None if it has none; compared with the question's.
    """

    question_id: int
    answers: list[str]
    origin: str
    majority: str
    question_type: str
    answer_type: str
    image_id: Any = None


def build_vocabulary(answers: Iterable[str], min_count: int = 9) -> tuple[str, ...]:
    """Normalised answers, most frequent first, equally frequent ones in alphabetical order.

    Like the usual list, this one includes "", the normalised form of answers such as "a".

    Args:
        answers: one per question, its `multiple_choice_answer`.
        min_count: number of questions that must share an answer.
    """
    check_counts(1, {"min_count": min_count})
    counts = Counter(map(normalise, answers))
    frequent = [answer for answer, count in counts.items() if count >= min_count]
    return tuple(sorted(frequent, key=lambda answer: (-counts[answer], answer)))


def soft_targets(answers: Sequence[str]) -> dict[str, float]:
    """Each normalised answer with its official accuracy: 0.3, 0.6, 0.9, and 1 from four of ten people.

    The usual code counts answers as written, so that "two" does not count towards "2", although the metric compares
    normalised answers; here both count. A single answer, as in Visual Genome, is worth 1 (see `metric.credit`).
    """
    counts = Counter(map(normalise, answers))
    return {answer: credit(count, len(answers)) for answer, count in counts.items()}


def answer_shares(answers: Sequence[str]) -> dict[str, float]:
    """Each normalised answer with the share of people who gave it: the weights for a generative head.

    ALBEF weights its decoder's loss this way (dataset/vqa_dataset.py of salesforce/ALBEF; Visual Genome's answers get
    0.5).
    """
    counts = Counter(map(normalise, answers))
    return {answer: count / len(answers) for answer, count in counts.items()}


def read_vocabulary(path: str | Path) -> tuple[str, ...]:
    """Read an answer list: `.json` with a list or `{answer: index}`, or any other file with one answer per line.

    Answers are used as they are; `soft_targets` never returns one that is not in normalised form.

    Raises:
        UserError: missing or unreadable, not a list of texts, a duplicate answer, or indices that are not 0, 1, 2, ...
    """
    path = expand_user(path)
    if path.suffix.lower() != ".json":
        # Lines are counted from 1 as in editors, positions in JSON from 0.
        return _unique(enumerate(_lines(path), 1), path, ":")
    entries = read_json_file(path)
    if isinstance(entries, dict):
        entries = _by_index(entries, path)
    if not isinstance(entries, list):
        what = f"{json_kind(entries)} instead of a list of answers or {{answer: index}}"
        raise UserError(path, what, "Give the list of answers", ExitCode.BAD_DATA)
    return _unique(enumerate(entries), path, " answer ")


def _lines(path: Path) -> list[str]:
    lines = []
    for number, text, problem in text_lines(path):
        if problem:
            raise UserError(f"{path}:{number}", f"{problem[0]} ({problem[1]})", "Write it as UTF-8", ExitCode.BAD_DATA)
        lines.append(text)
    return lines


def _by_index(entries: dict[str, Any], path: Path) -> list[str]:
    """Answers in the order of their indices, which are the outputs of a trained head."""
    answers: dict[int, str] = {}
    for answer, index in entries.items():
        # bool is an int to Python. A branch without `continue` ends in the error below.
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(entries):
            what = f"index {index!r} of {answer!r} is not one of 0 to {len(entries) - 1}"
        elif index in answers:
            what = f"{answers[index]!r} and {answer!r} have the same index {index}"
        else:
            answers[index] = answer
            continue
        raise UserError(path, what, "Number the answers from 0 without gaps", ExitCode.BAD_DATA)
    return [answers[index] for index in range(len(entries))]


def _unique(entries: Iterable[tuple[int, Any]], path: Path, sign: str) -> tuple[str, ...]:
    """The answers, numbered by line or position; only JSON can express an empty answer."""
    number_of: dict[str, int] = {}
    for number, answer in entries:
        if not isinstance(answer, str):
            what = f"{type(answer).__name__} instead of an answer"
        elif BROKEN.search(answer):
            what = f"{answer!r} has half a surrogate pair"
        elif answer in number_of:
            what = f"'{answer}' appears twice, first at {number_of[answer]}"
        elif sign == ":" and not answer.strip():
            what = "an empty line; the empty answer needs a .json file"
        else:
            number_of[answer] = number
            continue
        raise UserError(f"{path}{sign}{number}", what, "Correct the list of answers", ExitCode.BAD_DATA)
    if not number_of:
        raise UserError(path, "no answers", "Give a list with at least one", ExitCode.BAD_DATA)
    return tuple(number_of)


# ------------------------------------------------------------------ annotations


def read_annotations(path: Path) -> Iterator[Annotation]:
    """The answers to each question, from a file in VQA v2's layout (`v2_mscoco_val2014_annotations.json`).

    Raises:
        UserError: names the file and the position of what is missing, of the wrong type, empty, or duplicated.
    """
    positions: dict[int, int] = {}
    for position, entry in enumerate(get(read_json_file(path), "annotations", list, str(path), LAYOUT)):
        where = f"{path} annotations[{position}]"
        answers = [
            get_text(answer, "answer", f"{where}.answers[{number}]")
            for number, answer in enumerate(get(entry, "answers", list, where, LAYOUT))
        ]
        if not answers:
            what = "a question without answers"
            raise UserError(where, what, "Use annotations with people's answers (train or val)", ExitCode.BAD_DATA)
        question_id = number_once(entry, where, position, positions)
        optional = (get_text(entry, key, where) if key in entry else "" for key in OPTIONAL)
        yield Annotation(question_id, answers, where, *optional)._replace(image_id=entry.get("image_id"))


def check_majorities(ids: Sequence[str], majorities: Sequence[str], file: Path) -> None:
    """Raise UserError if a question has no `multiple_choice_answer`: the vocabulary would silently lack it."""
    without = [number for number, majority in zip(ids, majorities, strict=True) if not majority]
    if without:
        have = "1 question has" if len(without) == 1 else f"{len(without)} questions have"
        what = f"{have} no multiple_choice_answer, which the vocabulary is built from; the first is {without[0]}"
        todo = "Take the annotations as distributed, or set data.source.answers"
        raise UserError(file, what, todo, ExitCode.BAD_DATA)


def check_image(annotation: Annotation, image: int, where: str) -> None:
    """Raise UserError if an annotation names another image than its question, which is at `where`."""
    if annotation.image_id not in (None, image):
        named = repr(annotation.image_id)[:80]
        what = f"image_id of question {annotation.question_id} is {named} here and {image} in {where}"
        raise UserError(annotation.origin, what, SAME_PART, ExitCode.BAD_DATA)


def number_once(entry: Any, where: str, position: int, positions: dict[int, int]) -> int:
    """The `question_id` of an entry, which must be unique; `positions`: id -> position, updated here."""
    question_id = get(entry, "question_id", int, where, LAYOUT)
    if question_id in positions:
        what = f"question_id {question_id} is also that of position {positions[question_id]}"
        raise UserError(where, what, "Keep one of them", ExitCode.BAD_DATA)
    positions[question_id] = position
    return question_id


def get_text(record: Any, key: str, where: str) -> str:
    """A text of a JSON object, which can be printed and written to files."""
    text = get(record, key, str, where, LAYOUT)
    if BROKEN.search(text):
        what = f"'{key}' is {text[:80]!r}, with half a surrogate pair"
        raise UserError(where, what, "Correct the text", ExitCode.BAD_DATA)
    return text


def read_json_file(path: Path) -> Any:
    """The content of a JSON file; raises UserError if it does not exist."""
    with opened(path) as stream:
        return load_json(stream.read(), path)


# ------------------------------------------------------------------ the command


def main(arguments: list[str]) -> int:
    """Write the answer list of annotation files as JSON. arguments: what follows the command's name."""
    parser = OptionParser("maskvlm vqa.vocabulary", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("annotations", type=Path, nargs="+", help="v2_..._annotations.json; the usual list: train, val")
    parser.add_argument("--min-count", type=int, default=9, help="questions that must share an answer (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the list, a .json file")
    options = parser.parse_args(arguments)
    if options.out.suffix.lower() != ".json":
        raise UserError("--out", f"'{options.out}' does not end in .json", "Name a .json file")
    # A generator: only one annotation file is in memory at a time.
    answers = build_vocabulary(_majorities(options.annotations), options.min_count)
    if not answers:
        what = f"no answer is shared by {options.min_count} questions"
        raise UserError(options.annotations[0], what, "Lower --min-count or give more files", ExitCode.BAD_DATA)
    write_set_json(options.out, answers, indent=0)
    print(f"{options.out}: {len(answers)} answers")
    return 0


def _majorities(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        for annotation in read_annotations(path):
            if not annotation.majority:
                what = "no multiple_choice_answer, which the list is built from"
                raise UserError(annotation.origin, what, "Take the annotations as distributed", ExitCode.BAD_DATA)
            yield annotation.majority
