"""VQA v2 (Goyal et al. 2017, visualqa.org) and the questions of Visual Genome, as distributed.

Shapes: N rows of a table.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskvlm.data.examples import Example, ExampleSource
from maskvlm.data.files import Pictures, digest_of, get, load_json, opened, picture_folder, picture_names
from maskvlm.data.table import (
    EXAMPLE_COLUMNS,
    EXAMPLE_VERSION,
    Made,
    Origin,
    Rows,
    Table,
    TableExamples,
    cached_table,
    choose,
)
from maskvlm.errors import ExitCode, UserError
from tasks.vqa.vocabulary import Annotation, build_vocabulary, get_text, read_annotations, read_vocabulary, soft_targets

VERSION = 1
"""Raise it when the same files give another table or vocabulary, also where answers are normalised otherwise."""

LAYOUT = "VQA v2"
DIGITS = 12  # how wide the number in the name of a COCO picture is
TODO = "Set data.source.root to the folder of the files as distributed"


class VqaV2(ExampleSource):
    """Questions about COCO pictures, with the answers of ten people each.

    A part such as `mscoco_train2014` is `v2_OpenEnded_mscoco_train2014_questions.json` with
    `v2_mscoco_train2014_annotations.json`; its pictures are found by the number that ends their names. `labels` are
    the answers of the vocabulary.

    Args:
        root: folder of the files.
        train: parts to train on; with val's the model trains on all answers that are published.
        val, test: parts to evaluate on; None where there is none. Without annotations, `test` has no answers.
        images: folder of the pictures; by default `images/` in the root, else the root.
        visual_genome: a `question_answers.json` whose questions are added to training, `<id>.jpg` somewhere beside it.
        answers: file with the vocabulary; by default that of the training parts' annotations.
        min_count: questions that must share an answer for it to be in the vocabulary.
        cache: where the tables are kept; by default with those of Hugging Face datasets.
        max_missing: the share of a training part's questions that may lack their picture; they are skipped and listed.
    """

    def __init__(
        self,
        root: str,
        train: Sequence[str] = ("mscoco_train2014",),
        val: str | None = "mscoco_val2014",
        test: str | None = "mscoco_test2015",
        images: str | None = None,
        visual_genome: str | None = None,
        answers: str | None = None,
        min_count: int = 9,
        cache: str | None = None,
        max_missing: float = 0.01,
    ) -> None:
        self.root, self.images, self.answers = Path(root).expanduser(), images, answers
        listed = [train] if isinstance(train, str) else [*train]
        self.parts = {"train": listed, "val": [val] if val else [], "test": [test] if test else []}
        self.visual_genome = Path(visual_genome).expanduser() if visual_genome else None
        self.min_count, self.cache, self.max_missing = min_count, cache, max_missing

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The vocabulary: given, or made of the training parts' annotations and kept."""
        if self.answers is not None:
            return read_vocabulary(self.answers)
        tables = [self._table(part, answered=True) for part in self.parts["train"]]
        key = hashed("vqa-answers", self.min_count, *(table.name for table in tables))
        kept = cached_table(key, self.cache, {"answer": "string"}, lambda: self._vocabulary(tables))
        return tuple(kept.rows.data.column("answer").to_pylist())

    @cached_property
    def _inside(self) -> frozenset[str]:
        return frozenset(self.labels)

    def targets(self, answers: list[str]) -> dict[str, float]:
        """Answers of the vocabulary with what the official accuracy gives for them."""
        return {answer: weight for answer, weight in soft_targets(answers).items() if answer in self._inside}

    def split(self, name: str) -> "Joined":
        """The questions of `train`, `val` or `test`.

        Training skips questions none of whose answers is in the vocabulary, and lists them.

        Raises:
            UserError: files or pictures are missing, a file is malformed, questions and annotations do not fit
                together, or a question_id stands there twice.
        """
        if not (parts := self.parts.get(name)):
            raise UserError(f"data.source.{name}", "no part is named for this split", "Name one")
        folder = picture_folder(self.images, self.root)
        names = picture_names(folder)
        chosen = []
        for part in parts:
            pictures = Pictures(folder, numbered(names, part))
            chosen.append(self._choose(self._table(part, answered=name != "test"), self._origin(part), name, pictures))
        if name == "train" and self.visual_genome:
            chosen.append(self._genome(self.visual_genome))
        return Joined(chosen, self.root)

    def _choose(self, table: Table, origin: Origin, split: str, pictures: Pictures) -> TableExamples:
        drop = {"answer outside the vocabulary": ~self._known(table)} if split == "train" else {}
        return choose(table, origin, split, pictures, self.max_missing, drop)

    # -------------------------------------------------------------- tables

    def _origin(self, part: str) -> Origin:
        return Origin(self.root / f"v2_OpenEnded_{part}_questions.json", "{file} questions[{place}]")

    def _table(self, part: str, answered: bool) -> Table:
        origin, annotations = self._origin(part), self.root / f"v2_{part}_annotations.json"
        files = [origin.file, annotations] if answered or annotations.is_file() else [origin.file]
        key = f"vqa-{EXAMPLE_VERSION}.{VERSION}-{part.split('_')[0]}-{digest_of(*files, todo=TODO)[:32]}"
        columns = {**EXAMPLE_COLUMNS, "majority": "string"}
        return cached_table(key, self.cache, columns, lambda: parse(origin, part, files[1] if files[1:] else None))

    def _genome(self, file: Path) -> TableExamples:
        origin = Origin(file, "{file} question {place}")
        key = f"vqa-genome-{EXAMPLE_VERSION}.{VERSION}-{digest_of(file, todo='Correct data.source.visual_genome')[:32]}"
        table = cached_table(key, self.cache, EXAMPLE_COLUMNS, lambda: parse_genome(origin))
        stems = {f"vg {PurePosixPath(name).stem}": name for name in reversed(picture_names(file.parent))}
        return self._choose(table, origin, "train", Pictures(file.parent, stems))

    # -------------------------------------------------------------- vocabulary

    def _vocabulary(self, tables: list[Table]) -> Made:
        majorities = chain.from_iterable(table.rows.data.column("majority").to_pylist() for table in tables)
        answers = [*build_vocabulary(filter(None, majorities), self.min_count)]
        if not answers:
            what = f"no multiple_choice_answer of the training parts is shared by {self.min_count} questions"
            raise UserError(self.root, what, "Lower data.source.min_count, or set data.source.answers")
        return Made({"answer": answers}, {})

    def _known(self, table: Table) -> np.ndarray:
        """Whether an answer of the row is in the vocabulary (N), kept beside the table."""
        key = hashed("vqa-known", table.name, *self.labels)
        kept = cached_table(key, self.cache, {"known": "bool"}, lambda: Made({"known": self._look_up(table)}, {}))
        return np.asarray(kept.rows.data.column("known").to_numpy())

    def _look_up(self, table: Table) -> list[bool]:
        """Each different answer is looked up once: ten people to a question give few different ones."""
        answers_N = table.rows.data.column("answers").combine_chunks()
        flat = pc.list_flatten(answers_N)
        different = pc.unique(flat)
        inside = pa.array([bool(self.targets([answer])) for answer in different.to_pylist()], pa.bool_())
        hit = pc.take(inside, pc.index_in(flat, value_set=different))
        known_N = np.zeros(len(answers_N), bool)
        known_N[pc.list_parent_indices(answers_N).filter(hit).to_numpy()] = True
        return known_N.tolist()


class Joined:
    """Several lists of examples as one, in their order (an `Examples`)."""

    def __init__(self, lists: list[TableExamples], where: Path) -> None:
        self.lists = lists
        self._end = [*accumulate(map(len, lists))]
        self.fingerprint = hashlib.sha256(" ".join(each.fingerprint for each in lists).encode()).hexdigest()[:16]
        self.skipped: dict[str, list[str]] = {}
        for each in lists:
            for reason, places in each.skipped.items():
                self.skipped.setdefault(reason, []).extend(places)
        ids = pa.chunked_array([chunk for each in lists for chunk in each.column("id").chunks])
        if len(lists) > 1 and (twice := len(ids) - pc.count_distinct(ids).as_py()):
            what = f"{twice} question_ids stand in more than one of the training parts"
            raise UserError(where, what, "Name each part once in data.source.train", ExitCode.BAD_DATA)

    def __len__(self) -> int:
        return self._end[-1]

    def __getitem__(self, index: int, /) -> Example:
        position = range(len(self))[index]
        number = bisect_right(self._end, position)
        return self.lists[number][position - self._end[number]]  # counted from its end

    def image_ids(self) -> Iterator[str]:
        """Of all its pictures, each once a list."""
        return chain.from_iterable(each.image_ids() for each in self.lists)


def hashed(name: str, *parts: object) -> str:
    """The name of what depends on these parts alone."""
    return f"{name}-{VERSION}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"


# ------------------------------------------------------------------ files


def parse(origin: Origin, part: str, annotations: Path | None) -> Made:
    """Questions in their file's order with the answers to them.

    Raises:
        UserError: names file and position of what is malformed or has no partner in the other file.
    """
    answered = {each.question_id: each for each in read_annotations(annotations)} if annotations else {}
    rows = Rows(origin, "question_id", "majority")
    with opened(origin.file, TODO) as stream:
        questions = get(load_json(stream.read(), origin.file), "questions", list, str(origin.file), LAYOUT)
    for place, record in enumerate(questions):
        where = origin.full(place)
        number = get(record, "question_id", int, where, LAYOUT)
        given = answered.get(number) or Annotation(number, [], "", "", "", "")
        if annotations and number not in answered:
            todo = "Take questions and annotations of the same part"
            raise UserError(where, f"question {number} has no annotation in {annotations}", todo, ExitCode.BAD_DATA)
        rows.add(
            place=place,
            id=str(number),
            images=[f"{family(part)} {get(record, 'image_id', int, where, LAYOUT)}"],
            text=get(record, "question", str, where, LAYOUT),
            answers=given.answers,
            kind=given.question_type,
            majority=given.majority,
        )
    for each in answered.values():
        if str(each.question_id) not in rows:
            what = f"question {each.question_id} is not in {origin.file}"
            raise UserError(each.origin, what, "Take questions and annotations of the same part", ExitCode.BAD_DATA)
    return rows.made()


def parse_genome(origin: Origin) -> Made:
    """Visual Genome's questions with their only answer; `vg` marks ids, which VQA v2 also counts from 1."""
    rows, place = Rows(origin, "qa_id"), 0
    with opened(origin.file) as stream:
        document = load_json(stream.read(), origin.file)
    if not isinstance(document, list):
        what = f"{type(document).__name__} where a list of pictures with `qas` belongs"
        raise UserError(origin.file, what, "Take question_answers.json as distributed", ExitCode.BAD_DATA)
    for position, entry in enumerate(document):
        where = f"{origin.file} [{position}]"
        image = get(entry, "id", int, where, "Visual Genome")
        for number, record in enumerate(get(entry, "qas", list, where, "Visual Genome")):
            inside = f"{where}.qas[{number}]"
            rows.add(
                place=place,
                id=f"vg {get(record, 'qa_id', int, inside, 'Visual Genome')}",
                images=[f"vg {image}"],
                text=get(record, "question", str, inside, "Visual Genome"),
                answers=[get_text(record, "answer", inside)],
            )
            place += 1
    return rows.made()


def family(part: str) -> str:
    """The data set that a part's pictures are of: COCO's own ids are shared with other tasks, `daquar 3` with none."""
    name = part.split("_")[0]
    return "coco" if name == "mscoco" else name


def numbered(names: list[str], part: str) -> dict[str, str]:
    """Picture id -> file, by the number that ends its name.

    Where any file has COCO's twelve digits, only those count: Visual Genome's `9.jpg` in the same tree is another
    picture. Of several files with one number the one with most of the part's words in its path is taken.
    """
    found = [(end[0], name) for name in names if (end := re.search(r"\d+$", PurePosixPath(name).stem))]
    padded = [each for each in found if len(each[0]) == DIGITS]
    words = set(part.split("_"))
    best = sorted(padded or found, key=lambda each: (-len(words & set(re.split(r"[\W_]+", each[1]))), each[1]))
    chosen: dict[str, str] = {}
    for number, name in best:
        chosen.setdefault(f"{family(part)} {int(number)}", name)
    return chosen
