"""VQA v2 (Goyal et al. 2017, visualqa.org) and the questions of Visual Genome, as distributed.

Shapes: N rows of a table.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskvlm.data.examples import Example, ExampleSource
from maskvlm.data.files import ImagesByKey, digest_of, family_of, get, images_by_number, load_json, opened
from maskvlm.data.prepare.example_images import Album, open_album
from maskvlm.data.raw.genome import IMAGE_DATA, genome_files, read_coco_ids
from maskvlm.data.safe_open import check_below
from maskvlm.data.table import (
    EXAMPLE_COLUMNS,
    EXAMPLE_VERSION,
    ParsedColumns,
    RowOrigin,
    Table,
    TableExamples,
    TableRows,
    cached_table,
    choose_rows,
)
from maskvlm.utils.errors import Absent, ExitCode, UserError
from maskvlm.utils.paths import expand_user
from tasks.vqa.genome import parse_genome
from tasks.vqa.metric import normalise
from tasks.vqa.vocabulary import (
    SAME_PART,
    Annotation,
    answer_shares,
    build_vocabulary,
    check_image,
    check_majorities,
    read_annotations,
    read_vocabulary,
    soft_targets,
)

VERSION = 4
"""Increase this when the same files give a different table or vocabulary, including changes to answer
normalisation."""

LAYOUT = "VQA v2"
TODO = "Prepare the set (maskvlm data vqav2 FOLDER), or set data.source.root to the folder of its files"
VOCABULARY_TODO = "Lower data.source.min_count, or set data.source.answers"


class VqaV2(ExampleSource):
    """Questions about COCO images, with ten human answers each.

    A part such as `mscoco_train2014` is `v2_OpenEnded_mscoco_train2014_questions.json` with
    `v2_mscoco_train2014_annotations.json`; its images are found by the number at the end of their names. `labels` are
    the answers of the vocabulary.

    Args:
        root: folder of the files as distributed, or of the set that `maskvlm data` made from them.
        train: parts to train on; add val's to train on all published answers.
        val, test: parts to evaluate on; None if there is none. Without annotations, `test` has no answers.
        images: folder of the images, or of a prepared set; by default the root's own, `images/` in it, or the root.
        visual_genome: a `question_answers.json` whose questions are added to training, with `<id>.jpg` files next to it
            or below, and `image_data.json`, which lists the photos shared with COCO (including evaluated ones).
        answers: file with the vocabulary; by default, it is built from the training parts' annotations.
        min_count: number of questions that must share an answer for it to be in the vocabulary.
        cache: folder for cached tables; by default next to those of Hugging Face datasets.
        max_missing: maximum share of a training part's questions without their image; these are skipped and listed.
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
        self.root, self.images, self.answers = expand_user(root), images, answers
        # A single name is a list of one, not a sequence of letters.
        listed = [train] if isinstance(train, str) else [*train]
        self.parts = {"train": listed, "val": [val] if val else [], "test": [test] if test else []}
        self.visual_genome = expand_user(visual_genome) if visual_genome else None
        self.min_count, self.cache, self.max_missing = min_count, cache, max_missing

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The vocabulary: given, or built from the training parts' annotations and cached."""
        if self.answers is not None:
            return read_vocabulary(self.answers)
        tables = [self._table(part, answered=True) for part in self.parts["train"]]
        for part, table in zip(self.parts["train"], tables, strict=True):
            # From the table, so that a cached one is also checked.
            ids, majorities = (table.rows.data.column(name).to_pylist() for name in ("id", "majority"))
            check_majorities(ids, majorities, self._annotations(part))
        # Table names depend on file contents: the cached vocabulary is found only for the same files.
        key = hashed("vqa-answers", self.min_count, *(table.name for table in tables))
        vocabulary_table = cached_table(key, self.cache, {"answer": "string"}, lambda: self._vocabulary(tables))
        return tuple(vocabulary_table.rows.data.column("answer").to_pylist())

    @cached_property
    def _inside(self) -> frozenset[str]:
        return frozenset(self.labels)

    def targets(self, answers: list[str]) -> dict[str, float]:
        """Answers in the vocabulary, with their official accuracy."""
        return {answer: weight for answer, weight in soft_targets(answers).items() if answer in self._inside}

    def shares(self, answers: list[str]) -> dict[str, float]:
        """Weights for a generative head."""
        return {answer: share for answer, share in answer_shares(answers).items() if answer in self._inside}

    def split(self, name: str) -> "Joined":
        """The questions of `train`, `val` or `test`.

        Training skips questions without an answer in the vocabulary, and lists them.

        Raises:
            UserError: files or images are missing, a file is malformed, questions and annotations do not belong
                together, or a question_id occurs twice.
        """
        if not (parts := self.parts.get(name)):
            raise UserError(f"data.source.{name}", "no part was given for this split", "Name one")
        tables, absent = [], Absent()
        for part in parts:
            # Missing files of all parts are reported in one error.
            with absent.noted():
                tables.append(self._table(part, answered=name != "test"))
        absent.check()
        # Once for all parts: it lists every image of the folder.
        album = open_album(self.images, self.root)
        chosen = []
        for part, table in zip(parts, tables, strict=True):
            images = album.images(images_by_number(album.names, part))
            chosen.append(self._choose(table, self._origin(part), name, images, self._if_dropped()))
        if name == "train" and self.visual_genome:
            chosen.append(self._genome(self.visual_genome))
        return Joined(chosen, self.root)

    def _if_dropped(self) -> str:
        return VOCABULARY_TODO if self.answers is None else f"Correct data.source.answers ({self.answers})"

    def _choose(
        self, table: Table, origin: RowOrigin, split: str, images: ImagesByKey, if_dropped: str | None
    ) -> TableExamples:
        drop = {"answer outside the vocabulary": ~self._known(table)} if split == "train" else {}
        return choose_rows(table, origin, split, images, self.max_missing, drop, if_dropped)

    # -------------------------------------------------------------- tables

    def _origin(self, part: str) -> RowOrigin:
        return RowOrigin(self.root / f"v2_OpenEnded_{part}_questions.json", "{file} questions[{place}]")

    def _annotations(self, part: str) -> Path:
        return self.root / f"v2_{part}_annotations.json"

    def _table(self, part: str, answered: bool) -> Table:
        origin, annotations = self._origin(part), self._annotations(part)
        for file in (origin.file, annotations):
            check_below(file, self.root)
        files = [origin.file, annotations] if answered or annotations.is_file() else [origin.file]
        # With the part's family, the prefix of its image ids.
        key = f"vqa-{EXAMPLE_VERSION}.{VERSION}-{part.split('_')[0]}-{digest_of(*files, todo=TODO)[:32]}"
        columns = {**EXAMPLE_COLUMNS, "majority": "string"}
        return cached_table(key, self.cache, columns, lambda: parse_vqa(origin, part, files[1] if files[1:] else None))

    def _genome(self, file: Path) -> TableExamples:
        origin = RowOrigin(file, "{file} question {place}")
        digest = digest_of(file, todo="Correct data.source.visual_genome")
        image_data = file.with_name(IMAGE_DATA)
        coco_ids = read_coco_ids(image_data)
        key = hashed("vqa-genome", EXAMPLE_VERSION, digest, digest_of(image_data))
        table = cached_table(key, self.cache, EXAMPLE_COLUMNS, lambda: parse_genome(origin, coco_ids))
        album = Album(file.parent)
        names = genome_files(album.names, coco_ids)
        # A prepared set stores a photo that both have only once, under COCO's name.
        own = {*names.values()}
        others = [name for name in album.names if name not in own]
        for part in chain.from_iterable(self.parts.values()):
            names = images_by_number(others, part) | names
        return self._choose(table, origin, "train", album.images(names), None)  # an addition may be empty

    # -------------------------------------------------------------- vocabulary

    def _vocabulary(self, tables: list[Table]) -> ParsedColumns:
        majorities = chain.from_iterable(table.rows.data.column("majority").to_pylist() for table in tables)
        answers = [*build_vocabulary(majorities, self.min_count)]
        if not answers:
            what = f"no multiple_choice_answer of the training parts is shared by {self.min_count} questions"
            raise UserError("data.source.min_count", what, VOCABULARY_TODO)
        return ParsedColumns({"answer": answers}, {})

    def _known(self, table: Table) -> np.ndarray:
        """Whether an answer of each row is in the vocabulary, [N], cached with the table."""
        key = hashed("vqa-known", table.name, *self.labels)
        known_table = cached_table(
            key, self.cache, {"known": "bool"}, lambda: ParsedColumns({"known": self._look_up(table)}, {})
        )
        return np.asarray(known_table.rows.data.column("known").to_numpy())

    def _look_up(self, table: Table) -> list[bool]:
        """Look up each distinct answer once: ten answers to a question have few distinct ones."""
        answers_N = table.rows.data.column("answers").combine_chunks()
        # All answers in a row, the distinct ones among them, and which of these are in the vocabulary.
        flat = pc.list_flatten(answers_N)
        different = pc.unique(flat)
        inside = pa.array([bool(self.targets([answer])) for answer in different.to_pylist()], pa.bool_())
        # Back to all answers, and then to the rows that they belong to.
        hit = pc.take(inside, pc.index_in(flat, value_set=different))
        known_N = np.zeros(len(answers_N), bool)
        known_N[pc.list_parent_indices(answers_N).filter(hit).to_numpy()] = True
        return known_N.tolist()


class Joined:
    """The concatenation of several lists of examples (an `Examples`)."""

    def __init__(self, lists: list[TableExamples], where: Path) -> None:
        self.lists = lists
        self._end = [*accumulate(map(len, lists))]
        self.fingerprint = hashlib.sha256(" ".join(each.fingerprint for each in lists).encode()).hexdigest()[:16]
        self.skipped: dict[str, list[str]] = {}
        for each in lists:
            for reason, places in each.skipped.items():
                self.skipped.setdefault(reason, []).extend(places)
        # Each part was checked separately; here they are combined.
        counted = pc.value_counts(self.column("id"))
        if twice := counted.field("values").filter(pc.greater(counted.field("counts"), 1)).to_pylist():
            ids = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
            number = "1 question_id stands" if len(twice) == 1 else f"{len(twice)} question_ids stand"
            what = f"{number} in more than one of the training parts: {ids}"
            raise UserError(where, what, "Name each part once in data.source.train", ExitCode.BAD_DATA)

    def __len__(self) -> int:
        return self._end[-1]

    def __getitem__(self, index: int, /) -> Example:
        # The range follows list rules: negative indices count from the end, others outside are an IndexError.
        position = range(len(self))[index]
        number = bisect_right(self._end, position)
        return self.lists[number][position - self._end[number]]  # counted from its end

    def column(self, name: str) -> pa.ChunkedArray:
        """Column of all lists, concatenated."""
        return pa.chunked_array([chunk for each in self.lists for chunk in each.column(name).chunks])

    @property
    def image_identity(self) -> str:
        """As `TableExamples.image_identity`, for all lists."""
        return " ".join(each.image_identity for each in self.lists)

    def image_ids(self) -> Iterator[str]:
        """Ids of all images, each once per list."""
        return chain.from_iterable(each.image_ids() for each in self.lists)


def hashed(name: str, *parts: object) -> str:
    """Cache name of something that depends only on these parts."""
    return f"{name}-{VERSION}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"


# ------------------------------------------------------------------ files


def parse_vqa(origin: RowOrigin, part: str, annotations: Path | None) -> ParsedColumns:
    """Questions in file order, with their answers.

    Raises:
        UserError: names file and position of what is malformed or has no counterpart in the other file.
    """
    answered = {each.question_id: each for each in read_annotations(annotations)} if annotations else {}
    rows = TableRows(origin, "question_id", "majority")
    with opened(origin.file, TODO) as stream:
        questions = get(load_json(stream.read(), origin.file), "questions", list, str(origin.file), LAYOUT)
    for place, record in enumerate(questions):
        where = origin.full(place)
        number = get(record, "question_id", int, where, LAYOUT)
        image = get(record, "image_id", int, where, LAYOUT)
        # Without annotations, a question has no answers; with them, it must have an annotation.
        entry = answered.get(number) or Annotation(number, [], "", "", "", "")
        if annotations and number not in answered:
            what = f"question {number} has no annotation in {annotations}"
            raise UserError(where, what, SAME_PART, ExitCode.BAD_DATA)
        check_image(entry, image, where)
        rows.add(
            place=place,
            id=str(number),
            images=[f"{family_of(part)} {image}"],
            text=get(record, "question", str, where, LAYOUT),
            # For VQA v2, as people wrote them, as the official accuracy requires. For a set with one answer per
            # question, it would compare the raw texts, such as `garbage_bin`, which no head is trained to say.
            answers=entry.answers if family_of(part) == "coco" else [normalise(each) for each in entry.answers],
            kind=entry.question_type,
            majority=entry.majority if family_of(part) == "coco" else normalise(entry.majority),
        )
    # And vice versa: an annotation without a question means that the files are of different parts.
    for each in answered.values():
        if str(each.question_id) not in rows:
            what = f"question {each.question_id} is not in {origin.file}"
            raise UserError(each.origin, what, SAME_PART, ExitCode.BAD_DATA)
    return rows.finish()
