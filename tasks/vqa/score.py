"""`maskvlm vqa.score RESULTS.json ANNOTATIONS.json`: the official accuracy of a file of answers.

Results are in the VQA v2 server's format: [{"question_id": 458752000, "answer": "net"}, ...].
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskvlm.config.arguments import OptionParser
from maskvlm.config.safe_yaml import cut
from maskvlm.data.files import get
from maskvlm.data.strict_json import json_kind
from maskvlm.utils.errors import ExitCode, UserError
from tasks.vqa.metric import Mean, VqaAccuracy, vqa_accuracy
from tasks.vqa.vocabulary import LAYOUT, get_text, number_once, read_annotations, read_json_file


def main(arguments: list[str]) -> int:
    """Score a file of answers with the official VQA v2 accuracy. arguments: what follows the command's name."""
    parser = OptionParser("maskvlm vqa.score", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path, help='the answers: [{"question_id": 1, "answer": "yes"}, ...]')
    parser.add_argument("annotations", type=Path, help="people's answers: v2_mscoco_val2014_annotations.json")
    parser.add_argument("--questions", type=Path, help="the questions: each must have its annotation and answer")
    parser.add_argument("--json", action="store_true", help="one line of JSON, not rounded, instead of the table")
    options = parser.parse_args(arguments)
    measured = score_answers(options.results, options.annotations, options.questions)
    if options.json:
        print(json.dumps(as_json(measured)))
    else:
        Console().print(as_table(measured))
    return 0


def score_answers(results: Path, annotations: Path, questions: Path | None = None) -> VqaAccuracy:
    """The accuracy of a file of answers; every question of the annotations counts, and none may be left out.

    Raises:
        UserError: a file is missing, has another format, or covers other questions than the annotations.
    """
    records = list(read_annotations(annotations))
    if not records:
        raise UserError(annotations, "no annotations", "Take the complete file", ExitCode.BAD_DATA)
    # A dict for its order: errors name the first question of the file.
    known = dict.fromkeys(annotation.question_id for annotation in records)
    # All three files must cover the same questions: a missing answer is an error, not a 0.
    if questions is not None:
        compare(read_questions(questions), questions, known, annotations, "annotation")
    answers = read_results(results)
    compare(known, annotations, answers, results, "answer")
    return vqa_accuracy(
        [answers[annotation.question_id] for annotation in records],
        [annotation.answers for annotation in records],
        [annotation.question_type for annotation in records],
        [annotation.answer_type for annotation in records],
    )


def read_results(path: Path) -> dict[int, str]:
    """question_id -> answer.

    Raises:
        UserError: names the file and the position of what does not match the server's format.
    """
    entries = read_json_file(path)
    if not isinstance(entries, list):
        what = f"{json_kind(entries)} instead of a list of answers"
        todo = 'Write [{"question_id": 1, "answer": "yes"}, ...]'
        raise UserError(path, what, todo, ExitCode.BAD_DATA)
    positions: dict[int, int] = {}
    answers: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{path} [{position}]"
        question_id = number_once(entry, where, position, positions)
        answers[question_id] = get_text(entry, "answer", where)
    return answers


def read_questions(path: Path) -> dict[int, int]:
    """question_id -> position in the file of questions."""
    positions: dict[int, int] = {}
    for position, entry in enumerate(get(read_json_file(path), "questions", list, str(path), LAYOUT)):
        number_once(entry, f"{path} questions[{position}]", position, positions)
    return positions


def compare(source_ids: Collection[int], source: Path, path_ids: Collection[int], path: Path, what: str) -> None:
    """Raise UserError if a file lacks questions of the other one, or has more.

    Args:
        source_ids: ids that `source` has.
        path_ids: ids for which `path` has an answer or annotation.
        what: "answer" or "annotation".
    """
    if missing := [number for number in source_ids if number not in path_ids]:
        problem = f"no {what} to {len(missing)} of {len(source_ids)} questions of {source}, the first is {missing[0]}"
    elif unknown := [number for number in path_ids if number not in source_ids]:
        problem = f"{len(unknown)} of {len(path_ids)} question ids are not in {source}, the first is {unknown[0]}"
    else:
        return
    raise UserError(path, problem, "Give two files of the same split", ExitCode.BAD_DATA)


def as_json(measured: VqaAccuracy) -> dict[str, object]:
    """Unrounded accuracies in percent, under the keys of the official code, and the number of questions."""

    def percent(by: Mapping[str, Mean]) -> dict[str, float]:
        return {kind: mean.percent for kind, mean in by.items()}

    return {
        "overall": measured.overall.percent,
        "perAnswerType": percent(measured.by_answer_type),
        "perQuestionType": percent(measured.by_question_type),
        "questions": measured.overall.questions,
    }


def as_table(measured: VqaAccuracy) -> Table:
    """Overall, by answer type, by question type; two decimals as in the original, most frequent types first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("VQA accuracy", no_wrap=True)
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("questions", justify="right", no_wrap=True)
    table.add_row("overall", *cells(measured.overall))
    for name, part in (("by answer type", measured.by_answer_type), ("by question type", measured.by_question_type)):
        if part:
            table.add_section()
            table.add_row(name, style="dim")
        for kind, mean in sorted(part.items(), key=lambda item: (-item[1].questions, item[0])):
            table.add_row(Text(f"  {cut(kind)}"), *cells(mean))
    return table


def cells(mean: Mean) -> tuple[str, str]:
    """Percent with two decimals, as VQA is reported, and the number of questions."""
    return f"{mean.percent:.2f}", f"{mean.questions:,}"
