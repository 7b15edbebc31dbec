"""Predicted and true answers of an evaluation, example by example: the basis of a task's metrics."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from maskvlm.data.examples import Example, ExampleBatch
from maskvlm.objectives.task import Prediction
from maskvlm.utils.distributed import gather_objects


class ScoredExample(NamedTuple):
    """One example with its predicted answer. row: in the split. correct: 0 to 1; None if the truth is not published."""

    row: int
    example: Example
    prediction: str
    correct: float | None

    @property
    def truth(self) -> str:
        """The most frequent answer, the first in a tie; "" if none is published."""
        return Counter(self.example["answers"]).most_common(1)[0][0] if self.example["answers"] else ""

    @property
    def line(self) -> Prediction:
        """The example as stored in predictions.jsonl."""
        example = self.example
        return Prediction(
            id=example["id"], text=example["text"], truth=self.truth, prediction=self.prediction, right=self.correct,
            index=[self.row], kind=example["kind"], images=list(example["image_ids"]),
        )  # fmt: skip


class ScoredExamples:
    """Collects the answers of an evaluation, over all batches and processes."""

    def __init__(self) -> None:
        self.own: list[ScoredExample] = []

    def add(self, batch: ExampleBatch, predictions: list[str], correct: list[float | None]) -> None:
        """Add a batch's answers, in its order."""
        rows = zip(batch.index_B.tolist(), batch.examples, predictions, correct, strict=True)
        self.own += [ScoredExample(*row) for row in rows]

    def all(self) -> list[ScoredExample]:
        """The answers of all processes, in the data set's order; the collection is empty afterwards."""
        shards: list[list[ScoredExample]] = gather_objects(self.own)  # type: ignore[assignment]
        self.own = []
        return sorted((scored for shard in shards for scored in shard), key=lambda scored: scored.row)


def percent(scored: Iterable[ScoredExample]) -> float:
    """Mean of `correct` in percent over the examples whose truth is known; NaN if there are none."""
    known = [one.correct for one in scored if one.correct is not None]
    return 100 * sum(known) / len(known) if known else float("nan")


def by_kind(scored: Iterable[ScoredExample]) -> dict[str, list[ScoredExample]]:
    """The examples of each question type, by name; those without a type are left out."""
    kinds: dict[str, list[ScoredExample]] = {}
    for one in scored:
        if one.example["kind"]:
            kinds.setdefault(one.example["kind"], []).append(one)
    return dict(sorted(kinds.items()))


def majority(scored: Iterable[ScoredExample], correct: Callable[[str, list[str]], float | None]) -> float:
    """Accuracy in percent of always answering the most frequent truth of each question type: a model that knows only
    the question's type. `correct` is the task's: prediction, answers -> 0 to 1."""
    known = [one for one in scored if one.example["answers"]]
    if not known:
        return float("nan")
    # The most frequent truth of each type, among the same examples that are scored.
    counts: dict[str, Counter[str]] = {}
    for one in known:
        counts.setdefault(one.example["kind"], Counter())[one.truth] += 1
    usual = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    return 100 * sum(correct(usual[one.example["kind"]], one.example["answers"]) or 0.0 for one in known) / len(known)
