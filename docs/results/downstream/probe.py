"""What can be read from a model that is not trained any further: kernel ridge regression on its features.

    DATA_ROOT=/data PYTHONPATH=. .venv/bin/python docs/results/downstream/probe.py checkpoints/RUN/best.ckpt daquar

Three columns: the text alone; text and photo, so that what a photo says depends on the text (the product of both
kernels); text and scores, that is contrast's cosine and matching's log-odds. Penalty and width of the kernel are chosen
by five folds of the training rows, whose photos are apart. The difference from the text alone stands with its 95 %
interval (1.96 standard errors over the examples).
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskvlm import MaskVLM
from maskvlm.data.examples import Example, ExampleSource
from maskvlm.inference.embeddings import encode, image_features, log_odds, text_features
from tasks.entailment.data import SnliVe
from tasks.nlvr.data import Nlvr2
from tasks.vqa.data import VqaV2

ROOT = os.environ.get("DATA_ROOT", "data")
SOURCES: dict[str, Callable[[], ExampleSource]] = {
    "daquar": lambda: VqaV2(f"{ROOT}/daquar", ["daquar_train"], "daquar_val", None, min_count=3),
    "nlvr_pairs": lambda: Nlvr2(f"{ROOT}/nlvr_pairs", test=None),
    "snli_ve": lambda: SnliVe(f"{ROOT}/snli_ve"),
}
PENALTIES, WIDTHS, FOLDS, CHUNK = (0.1, 0.3, 1.0, 3.0), (0.5, 2.0, 4.0), 5, 256


class Rows(NamedTuple):
    """A split, N examples: their vectors, their answers, and which photo each is about."""

    text_NF: Tensor
    image_NF: Tensor
    score_NS: Tensor
    answers: list[str]
    photo_N: np.ndarray


def read(model: Any, examples: list[Example]) -> Rows:
    """Vectors of all examples; each photo is encoded once."""
    photos = {name: data for each in examples for name, data in zip(each["image_ids"], each["images"], strict=True)}
    place = {name: number for number, name in enumerate(photos)}
    every, parts = list(photos.values()), []
    for first in range(0, len(every), CHUNK):
        features_MLD = torch.stack(image_features(model, every[first : first + CHUNK]))
        parts.append((features_MLD.half(), model.head("projection", "probe").embed_image(features_MLD)))
        print(f"\r{first + len(features_MLD)} of {len(every)} photos", end="", file=sys.stderr, flush=True)
    image_MLD, image_ME = (torch.cat(part) for part in zip(*parts, strict=True))
    where_NP = torch.tensor([[place[name] for name in each["image_ids"]] for each in examples])
    texts = [each["text"] for each in examples]
    text_NTD, text_NE = text_features(model, texts), encode(model, texts, images=False).vector_XE
    text_NF = torch.stack([torch.cat([text_TD[0], text_TD.mean(0)]) for text_TD in text_NTD])
    cosine_NP = ((image_ME - image_ME.mean(0))[where_NP] * text_NE[:, None]).sum(2)  # beyond the usual photo's
    odds = []
    for photo_N in where_NP.T:
        for first in range(0, len(examples), CHUNK):
            features = [image_MLD[number].float() for number in photo_N[first : first + CHUNK].tolist()]
            odds.append(log_odds(model, features, text_NTD[first : first + CHUNK]))
    summary_MF = torch.cat([image_MLD[:, 0], image_MLD[:, 1:].float().mean(1).half()], 1).float()
    score_NS = torch.cat([cosine_NP, torch.cat(odds).view(-1, len(examples)).T], 1)
    answers = [Counter(each["answers"]).most_common(1)[0][0] for each in examples]
    return Rows(text_NF, summary_MF[where_NP].flatten(1), score_NS, answers, where_NP[:, 0].numpy())


def kernel(a_NF: Tensor, b_MF: Tensor, like_KF: Tensor, width: float) -> Tensor:
    """exp(-squared distance / (width x dimensions)), of vectors that are standardised like the training rows'."""
    a_NF, b_MF = ((x_XF - like_KF.mean(0)) / (like_KF.std(0) + 1e-6) for x_XF in (a_NF, b_MF))
    return torch.exp(-(torch.cdist(a_NF.double(), b_MF.double()) ** 2) / (width * a_NF.shape[1]))


def grams(way: str, rows: Rows, train: Rows) -> dict[float, Tensor]:
    """The kernel of `rows` with the training rows, by the width of the second factor."""
    text_NK = kernel(rows.text_NF, train.text_NF, train.text_NF, 4.0)
    if way == "text":
        return {0.0: text_NK}
    own, like = (each.image_NF if way == "text and photo" else each.score_NS for each in (rows, train))
    return {width: text_NK * (1 + kernel(own, like, like, width)) for width in WIDTHS}


def right(gram_NK: Tensor, gram_KK: Tensor, penalty: float, truth: list[str], answers: list[str]) -> np.ndarray:
    """Whether each example is answered right, after ridge regression on one-hot answers."""
    names = sorted(set(answers))
    target_KA = torch.zeros(len(answers), len(names), dtype=torch.double)
    target_KA[torch.arange(len(answers)), torch.tensor([names.index(answer) for answer in answers])] = 1
    level_A = target_KA.mean(0)
    weight_KA = torch.linalg.solve(gram_KK + penalty * torch.eye(len(gram_KK)), target_KA - level_A)
    best_N = (gram_NK @ weight_KA + level_A).argmax(1).tolist()
    return np.array([names[best] == answer for best, answer in zip(best_N, truth, strict=True)])


def choose(grams_KK: dict[float, Tensor], train: Rows) -> tuple[float, float]:
    """Width and penalty that answer most training rows of photos left out."""
    fold_N = train.photo_N % FOLDS
    hits = {}
    for width, penalty in product(grams_KK, PENALTIES):
        count = 0
        for fold in range(FOLDS):
            inside, outside = (torch.from_numpy(np.flatnonzero(where)) for where in (fold_N != fold, fold_N == fold))
            gram_KK = grams_KK[width]
            truth, answers = ([train.answers[n] for n in part.tolist()] for part in (outside, inside))
            count += right(gram_KK[outside][:, inside], gram_KK[inside][:, inside], penalty, truth, answers).sum()
        hits[width, penalty] = count
    return max(hits, key=lambda key: hits[key])


def main(checkpoint: str, sets: list[str]) -> None:
    """Print the table."""
    model: Any = MaskVLM.from_pretrained(checkpoint)
    print("| | text alone | text and photo | text and scores |\n|---|---|---|---|", flush=True)
    for name in sets:
        source, cells = SOURCES[name](), []
        splits = [source.split(each) for each in ("train", "val")]
        with torch.no_grad():
            train, val = (read(model, [split[number] for number in range(len(split))]) for split in splits)
        alone = None
        for way in ("text", "text and photo", "text and scores"):
            grams_KK, grams_NK = grams(way, train, train), grams(way, val, train)
            width, penalty = choose(grams_KK, train)
            scores = 100.0 * right(grams_NK[width], grams_KK[width], penalty, val.answers, train.answers)
            cell = f"{scores.mean():.1f}"
            if alone is not None:
                difference = scores - alone
                half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
                cell += (
                    f", {difference.mean():+.1f} ({difference.mean() - half:+.1f} to {difference.mean() + half:+.1f})"
                )
            alone = scores if alone is None else alone
            cells.append(cell)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
