"""What single words of the sentence joined to single counts tell of NLVR's drawings, in the manner of Suhr et al. 2017.

    DATA_ROOT=/data PYTHONPATH=. .venv/bin/python docs/results/downstream/words_by_counts.py

A feature is there where a sentence holds a piece of one to three words (seen in at least five training sentences) and a
count of the drawing has one value: "2 yellow blocks" and "two yellow shapes in one box". Counts are those of
`counts.py`: of each colour and of all, shapes, squares, circles, triangles and shapes at the wall; of the three boxes
their sum, largest, smallest, in how many there is one, and whether any box has that many. Logistic regression with a
squared penalty, chosen by five folds of the training sentences. No model is read.

Shapes: N examples, P pieces, V values of counts, C colours and all of them, K kinds of counts.
"""

import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from counts import LEFT_EDGES, SIDE, counted
from probe import SOURCES
from rich.progress import track
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from maskvlm.data.images import safe_open

KINDS, MOST = 5, 7  # the first numbers of `counted`; higher counts count as this
LEAST = 5  # training sentences with a piece
RARE = 0.005  # a value is left out that fewer of the training drawings have
PENALTIES, FOLDS = (10.0, 100.0, 1000.0, 3000.0, 10000.0), 5


def pieces(sentence: str) -> set[str]:
    """All runs of one to three words."""
    words = re.findall("[a-z0-9]+", sentence.lower())
    return {" ".join(words[first : first + length]) for length in (1, 2, 3) for first in range(len(words) - length + 1)}


def values(images: list[Any]) -> Tensor:
    """Which counts have which values, 0 or 1, [V]."""
    pixels = [torch.from_numpy(np.array(safe_open(image, "a drawing"))).long() for image in images]
    boxes = [pixels[place][:SIDE, left : left + SIDE] for place, left in LEFT_EDGES]
    of_colour_3CK = torch.stack([counted(box)[:, :KINDS] for box in boxes])
    box_3CK = torch.cat([of_colour_3CK, of_colour_3CK.sum(1, keepdim=True)], 1)
    among = [box_3CK.sum(0), box_3CK.amax(0), box_3CK.amin(0), (box_3CK > 0).float().sum(0)]
    there = [one_hot(each.clamp(max=MOST).long(), 1 + MOST).flatten() for each in among]
    return torch.cat([*there, one_hot(box_3CK.clamp(max=MOST).long(), 1 + MOST).amax(0).flatten()]).float()


def read(split: Any, name: str) -> tuple[list[str], Tensor, Tensor]:
    """Sentences, values of their drawings [N, V], and whether they are true [N]."""
    examples = [split[number] for number in range(len(split))]
    by_image: dict[str, Tensor] = {}
    for each in track(examples, description=name):
        if each["image_ids"][0] not in by_image:
            by_image[each["image_ids"][0]] = values(each["images"])
    true_N = torch.tensor([float(each["answers"][0].lower() == "true") for each in examples])
    return (
        [each["text"] for each in examples],
        torch.stack([by_image[each["image_ids"][0]] for each in examples]),
        true_N,
    )


def fit(text_NP: Tensor, value_NV: Tensor, true_N: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [P, V] and the level, of least logistic loss and `penalty` x squared weights / 2, for each example."""
    weight_PV = torch.zeros(text_NP.shape[1], value_NV.shape[1], requires_grad=True)
    level = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_PV, level], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(logits(text_NP, value_NV, weight_PV, level), true_N)
        loss = loss + penalty * weight_PV.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
    return weight_PV.detach(), level.detach()


def logits(text_NP: Tensor, value_NV: Tensor, weight_PV: Tensor, level: Tensor) -> Tensor:
    """Of the sentence being true, [N]."""
    return level + ((text_NP @ weight_PV) * value_NV).sum(1)


def main() -> None:
    """Print both accuracies and their difference."""
    source = SOURCES["nlvr_pairs"]()
    (train, value_NV, true_N), (val, val_MV, true_M) = (read(source.split(name), name) for name in ("train", "val"))
    sentences = list(dict.fromkeys(train))
    often = Counter(piece for sentence in sentences for piece in pieces(sentence))
    known = [piece for piece, times in often.items() if times >= LEAST]
    text_NP, text_MP = (
        torch.tensor([[float(piece in held) for piece in known] for held in map(pieces, rows)]) for rows in (train, val)
    )
    place = {sentence: number for number, sentence in enumerate(sentences)}
    fold_N = torch.tensor([place[sentence] % FOLDS for sentence in train])
    frequent_V = value_NV.mean(0) > RARE
    nothing = (torch.ones(len(train), 1), torch.ones(len(val), 1))
    print(f"{len(train)} examples of {len(sentences)} sentences, {len(known)} pieces, {int(frequent_V.sum())} values")
    scores = []
    for way, (x_NV, x_MV) in {
        "words": nothing,
        "words by counts": (value_NV[:, frequent_V], val_MV[:, frequent_V]),
    }.items():
        score = {}
        for penalty in PENALTIES:
            right = 0
            for fold in range(FOLDS):
                inside, outside = fold_N != fold, fold_N == fold
                weights = fit(text_NP[inside], x_NV[inside], true_N[inside], penalty / len(train))
                right += int(((logits(text_NP[outside], x_NV[outside], *weights) > 0) == true_N[outside].bool()).sum())
            score[penalty] = right
        best = max(score, key=lambda penalty: score[penalty])
        weights = fit(text_NP, x_NV, true_N, best / len(train))
        scores.append(100.0 * ((logits(text_MP, x_MV, *weights) > 0) == true_M.bool()).double())
        print(
            f"{way}: {scores[-1].mean():.1f} (penalty {best}; folds {100 * score[best] / len(train):.1f})", flush=True
        )
    difference = scores[1] - scores[0]
    half = 1.96 * difference.std() / len(difference) ** 0.5
    print(f"{difference.mean():+.1f} ({difference.mean() - half:+.1f} to {difference.mean() + half:+.1f})")


if __name__ == "__main__":
    main()
