"""Looks for what must not be there: anything about the answer in the text alone, or in the image alone."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

import numpy as np
import torch

from maskvlm.data.scenes.examples import View

SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart"]
COLOURS = ["red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink"]
GROUNDS = ["white", "mint", "grey", "maroon", "navy", "black"]
CELLS = {
    "top left": (0, 0), "top": (0, 1), "top right": (0, 2),
    "left": (1, 0), "middle": (1, 1), "right": (1, 2),
    "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2),
}  # fmt: skip
NOUN = (
    rf"(?:an? )?(?:(large|small) )?(?:(plain|striped|dotted) )?(?:({'|'.join(COLOURS)}) )?"
    rf"({'|'.join(SHAPES)}|thing)(?:s|es)?"
)
PLACE = rf"(?:at|in|on) the ({'|'.join(sorted(CELLS, key=len, reverse=True))})"

Thing = dict[str, object]
"""A thing of a scene in plain types, with row and column."""


def things_of(view: View) -> list[Thing]:
    """The things in plain types: the readers of texts below share nothing with their writers."""
    return [thing | {"at": divmod(thing["cell"], 3)} for thing in view.scene.to_dict()["things"]]


def is_noun(text: str, thing: Thing) -> bool:
    """Whether the words of a noun are all true of a thing."""
    match = re.fullmatch(NOUN, text)
    assert match, text
    traits = dict(zip(("size", "pattern", "colour", "shape"), match.groups(), strict=True))
    return all(word in (None, "thing", thing[name]) for name, word in traits.items())


# ---- leaks -------------------------------------------------------------------------------------------------
def words_of(text: str) -> list[str]:
    """Words and pairs of neighbours."""
    words = text.split()
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


def features_of(views: Sequence[View]) -> list[str]:
    """What images show, text unseen: attributes and cells, numbers, and what the things have in common."""
    features = [f"{number} views" for number in (len(views),)]
    for side, view in enumerate(views):
        things = things_of(view)
        features += [
            f"{side} curtain {view.curtain}",
            f"{side} ground {view.scene.background}",
            f"{side} n {len(things)}",
        ]
        features += [
            f"{side} {name} {thing[name]}"
            for thing in things
            for name in ("shape", "colour", "size", "pattern", "cell")
        ]
        features += [
            f"{side} {w}" for w in common(((a, b) for i, a in enumerate(things) for b in things[:i]), view.curtain)
        ]
    if len(views) == 2:
        left, right = (things_of(view) for view in views)
        features += [
            f"total {len(left) + len(right)}",
            f"grounds {views[0].scene.background == views[1].scene.background}",
        ]
        features += [f"across {word}" for word in common(product(left, right), None)]
    return features


def common(pairs: Iterable[tuple[Thing, Thing]], curtain: str | None) -> list[str]:
    """How often two things share what, counted over the pairs."""
    shared: Counter[str] = Counter()
    for one, other in pairs:
        same = [name for name in ("shape", "colour", "size", "pattern") if one[name] == other[name]]
        across = "row" if str(curtain).endswith("row") else "column"
        rows, columns = (one["at"][i] == other["at"][i] for i in (0, 1))  # type: ignore[index]
        lines = {"row": (rows, columns), "column": (columns, rows)}[across]
        shared.update([*same, "+".join(same[:2]), f"lines {lines}"])
        shared["same noun"] += {"shape", "colour"} <= set(same)
    return [f"share {name} {count}" for name, count in shared.items()]


def worst_lean(features: Sequence[Sequence[str]], labels: Sequence[str]) -> tuple[float, str]:
    """The feature and label that go together most unlike chance: z, and their names.

    z is the excess of a count over what independence expects, in standard deviations of the hypergeometric
    distribution; counts below 20 expected are left out, for which z is no normal deviate.
    """
    total, of_label = len(labels), Counter(labels)
    of_feature: Counter[str] = Counter()
    both: dict[str, Counter[str]] = defaultdict(Counter)
    for names, label in zip(features, labels, strict=True):
        for name in set(names):
            of_feature[name] += 1
            both[name][label] += 1
    worst = (0.0, "")
    for name, count in of_feature.items():
        for label, size in of_label.items():
            expected = count * size / total
            spread = (expected * (1 - count / total) * (1 - size / total) * total / (total - 1)) ** 0.5
            if expected >= 20 and spread > 0:
                worst = max(worst, (abs(both[name][label] - expected) / spread, f"{name} -> {label}"))
    return worst


def blind_accuracy(
    train: tuple[Sequence[Sequence[str]], Sequence[str]], val: tuple[Sequence[Sequence[str]], Sequence[str]]
) -> float:
    """Share of `val` that a logistic regression on the features, fitted to `train`, gets right."""
    counts = Counter(name for names in train[0] for name in set(names))
    column = {name: i for i, name in enumerate(name for name, count in counts.items() if count >= 5)}
    answers = sorted(set(train[1]))

    def tensors(features: Sequence[Sequence[str]], labels: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        feature_NF = torch.zeros(len(features), len(column))
        for row, names in enumerate(features):
            feature_NF[row, [column[name] for name in names if name in column]] = 1
        return feature_NF, torch.tensor([answers.index(label) for label in labels])

    (feature_NF, label_N), (val_MF, label_M) = tensors(*train), tensors(*val)
    weight_FK = torch.zeros(len(column), len(answers), requires_grad=True)
    bias_K = torch.zeros(len(answers), requires_grad=True)
    optimizer = torch.optim.Adam([weight_FK, bias_K], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(feature_NF @ weight_FK + bias_K, label_N)
        (loss + 1e-3 * weight_FK.square().sum()).backward()
        optimizer.step()
    return float((((val_MF @ weight_FK + bias_K).argmax(1)) == label_M).float().mean())


def noise_bound(chance: float, count: int, deviations: float = 4.0) -> float:
    """An accuracy that guessing right with probability `chance` does not pass, but once in 30,000."""
    return chance + deviations * float(np.sqrt(chance * (1 - chance) / count))
