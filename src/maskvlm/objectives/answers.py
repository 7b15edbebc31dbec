"""What a task answered in an evaluation, example by example, and what people answered: the base of its metrics."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from maskvlm.data.examples import Example, ExampleBatch
from maskvlm.objectives.task import Prediction
from maskvlm.utils.distributed import gather_objects


class Judged(NamedTuple):
    """One example with its answer. row: of the split. right: 0 to 1; None where nobody published what is true."""

    row: int
    example: Example
    prediction: str
    right: float | None

    @property
    def truth(self) -> str:
        """The most frequent answer, the first of equals; "" where none is published."""
        return Counter(self.example["answers"]).most_common(1)[0][0] if self.example["answers"] else ""

    @property
    def line(self) -> Prediction:
        """As it is written to predictions.jsonl."""
        example = self.example
        return Prediction(
            id=example["id"], text=example["text"], truth=self.truth, prediction=self.prediction, right=self.right,
            index=[self.row], kind=example["kind"],
        )  # fmt: skip


class Judgements:
    """Collects the answers of an evaluation, over all batches and processes."""

    def __init__(self) -> None:
        self.own: list[Judged] = []

    def add(self, batch: ExampleBatch, predictions: list[str], right: list[float | None]) -> None:
        """Take in a batch's answers, in its order."""
        rows = zip(batch.index_B.tolist(), batch.examples, predictions, right, strict=True)
        self.own += [Judged(*row) for row in rows]

    def all(self) -> list[Judged]:
        """Those of every process, in the data set's order; the collection is empty afterwards."""
        shards: list[list[Judged]] = gather_objects(self.own)  # type: ignore[assignment]
        self.own = []
        return sorted((judged for shard in shards for judged in shard), key=lambda judged: judged.row)


def percent(judged: Iterable[Judged]) -> float:
    """Mean of `right` in percent over the examples whose truth is known; NaN where there is none."""
    known = [one.right for one in judged if one.right is not None]
    return 100 * sum(known) / len(known) if known else float("nan")


def by_kind(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """The examples of each question type, by name; those without one are left out."""
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        if one.example["kind"]:
            kinds.setdefault(one.example["kind"], []).append(one)
    return dict(sorted(kinds.items()))


def majority(judged: Iterable[Judged], right: Callable[[str, list[str]], float | None]) -> float:
    """Percent right of always giving the most frequent truth of the question's type: what a model reaches that reads
    the question's type and nothing else. `right` is the task's: prediction, answers -> 0 to 1."""
    known = [one for one in judged if one.example["answers"]]
    if not known:
        return float("nan")
    counts: dict[str, Counter[str]] = {}
    for one in known:
        counts.setdefault(one.example["kind"], Counter())[one.truth] += 1
    usual = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    return 100 * sum(right(usual[one.example["kind"]], one.example["answers"]) or 0.0 for one in known) / len(known)
