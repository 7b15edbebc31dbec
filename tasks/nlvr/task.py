"""NLVR: is the sentence true of the two images? (NLVR2, Suhr et al. 2019)"""

from collections.abc import Sequence

from maskvlm.objectives.answers import ScoredExample
from maskvlm.objectives.classification import Classification, Reads, predict_labels
from maskvlm.objectives.methods import Method


class Nlvr(Classification):
    """Each image is fused with the sentence, and the two fused vectors go through two linear layers (paper sec. 4; R).

    Args:
        labels: the classes; linked from the data, not set by hand.
        images_per_example: any number; 2 in NLVR2.
        hidden: width between the two layers of the head; None: the backbone's width.
        dropout: dropout rate in the head, 0 to 1.
        image_ablation: control experiment: replace every image by noise.
        reads: input of the head: `fused` vectors or `scores`, see `Classification`.
    """

    name = "nlvr"

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        images_per_example: int = 2,
        hidden: int | None = None,
        dropout: float = 0.0,
        image_ablation: bool = False,
        reads: Reads = "fused",
    ) -> None:
        super().__init__(labels, images_per_example, hidden, dropout, image_ablation, reads)
        description = f"whether a sentence is true of {images_per_example} images"
        self.methods = {"compare": Method(predict_labels, images_per_example, "sentence", description)}

    def extra_metrics(self, scored: list[ScoredExample]) -> dict[str, float]:
        return {"consistency": consistency(scored), "consistency_chance": consistency_chance(scored, len(self.labels))}


def groups_of(scored: list[ScoredExample]) -> list[list[ScoredExample]]:
    """Examples with a known truth, grouped by sentence."""
    groups: dict[str, list[ScoredExample]] = {}
    for one in scored:
        if one.correct is not None:
            # An example without a group is its own group.
            groups.setdefault(one.example["group"] or one.example["id"], []).append(one)
    return list(groups.values())


def consistency(scored: list[ScoredExample]) -> float:
    """Percent of sentences that are answered correctly for every one of their image pairs (NLVR2's metric)."""
    correct = [all(one.correct == 1 for one in group) for group in groups_of(scored)]
    return 100 * sum(correct) / len(correct) if correct else float("nan")


def consistency_chance(scored: list[ScoredExample], labels: int = 2) -> float:
    """Consistency of random answers out of this many labels, in percent."""
    level = [labels ** -len(group) for group in groups_of(scored)]
    return 100 * sum(level) / len(level) if level else float("nan")
