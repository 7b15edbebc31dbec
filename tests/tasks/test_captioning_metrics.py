"""CIDEr-D and BLEU of captions against the formulas written out, and the words that both read."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from maskvlm.utils.errors import ExitCode, UserError
from tasks.captioning.metrics import bare_words, caption_metrics, cider_function, cider_of_images, usual_caption

WRITTEN = ["a red star on the left", "two blue rings, one above", "a star", "a red red red red cross on white"]
REFERENCES = [
    ["A red star on the left.", "there is a red star left of nothing"],
    ["two blue rings one above the other", "one blue ring above another", "rings"],
    ["a small green star", "a star, on white"],
    ["a red cross on white"],
]


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = bare_words(text).split()
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def slow_cider_d(written: list[str], references: list[list[str]]) -> float:
    """Vedantam et al. 2015, with CIDEr-D's clipping and length penalty; idf over images, lengths in 2-grams."""
    total = []
    for text, texts in zip(written, references, strict=True):
        for n in (1, 2, 3, 4):
            frequency = Counter(gram for each in references for gram in {g for one in each for g in grams(one, n)})
            gram_names = sorted({*grams(text, n), *(g for one in texts for g in grams(one, n))})
            idf = np.array([math.log(len(references) / max(1, frequency[g])) for g in gram_names])
            one = np.array([grams(text, n)[g] for g in gram_names]) * idf
            for truth in texts:
                other = np.array([grams(truth, n)[g] for g in gram_names]) * idf
                length = sum(grams(text, 2).values()) - sum(grams(truth, 2).values())
                norm = np.linalg.norm(one) * np.linalg.norm(other)
                cosine = np.minimum(one, other) @ other / norm if norm else 0.0
                total.append(10 * cosine * math.exp(-(length**2) / 72) / 4 / len(texts))
    return sum(total) / len(written)


def slow_bleu(written: list[str], references: list[list[str]], most: int) -> float:
    """Papineni et al. 2002, over all texts together."""
    logs = []
    for n in range(1, most + 1):
        clipped = total = 0
        for text, texts in zip(written, references, strict=True):
            own, allowed = grams(text, n), Counter[tuple[str, ...]]()
            for truth in texts:
                allowed |= grams(truth, n)
            clipped += sum((own & allowed).values())
            total += sum(own.values())
        logs.append(math.log(clipped / total))
    lengths = [len(bare_words(text).split()) for text in written]
    nearest = [
        min((len(bare_words(one).split()) for one in texts), key=lambda size: (abs(size - length), size))
        for length, texts in zip(lengths, references, strict=True)
    ]
    brevity = min(0.0, 1 - sum(nearest) / sum(lengths))
    return math.exp(brevity + sum(logs) / most)


def test_they_are_the_formulas() -> None:
    metrics = caption_metrics(WRITTEN, REFERENCES)
    assert metrics.keys() == {"cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    assert metrics["cider"] == pytest.approx(100 * slow_cider_d(WRITTEN, REFERENCES), rel=1e-6)
    each = cider_of_images([*WRITTEN, "a cat"], [*REFERENCES, ["?"]])
    assert sum(each[:4]) / 4 == pytest.approx(metrics["cider"])  # an image without a reference has none
    assert len({round(value) for value in each[:4]}) == 4
    assert math.isnan(each[4])
    for n in (1, 2, 3, 4):
        assert metrics[f"bleu_{n}"] == pytest.approx(100 * slow_bleu(WRITTEN, REFERENCES, n), rel=1e-5)
    short = [text.split()[0] + " " + text.split()[1] for text in WRITTEN]  # shorter than any reference
    assert caption_metrics(short, REFERENCES)["bleu_1"] == pytest.approx(100 * slow_bleu(short, REFERENCES, 1))


def test_bleu_by_hand() -> None:
    """Of "the the cat" the one "the" of the reference and "cat" count: 2 of 3 words; 1 of 2 pairs, "the cat".

    Of five words, references of four and of six are equally far: no penalty for being too short, in any order.
    """
    metrics = caption_metrics(["the the cat", "x"], [["the cat sat"], ["x"]])
    assert metrics["bleu_1"] == pytest.approx(100 * 3 / 4)
    assert metrics["bleu_2"] == pytest.approx(100 * math.sqrt(3 / 4 * 1 / 2))
    assert metrics["bleu_3"] == metrics["bleu_4"] == 0.0
    references = ["a b c d", "a b c d e f"]
    for order in (references, references[::-1]):
        assert caption_metrics(["a b c d e", "x"], [order, ["x"]])["bleu_4"] == pytest.approx(100)


def test_the_most_and_the_least_there_is() -> None:
    texts = ["one two three four five", "six seven eight nine ten"]
    assert caption_metrics(texts, [[text] for text in texts]) == pytest.approx(
        {"cider": 1000.0, "bleu_1": 100.0, "bleu_2": 100.0, "bleu_3": 100.0, "bleu_4": 100.0}
    )
    assert caption_metrics(["", ""], [["a"], ["b"]])["cider"] == 0.0
    assert math.isnan(caption_metrics(["a"], [["a"]])["cider"])
    # References without words are left out.
    metrics = caption_metrics([*WRITTEN, "a cat"], [*([*each, "!"] for each in REFERENCES), ["?"]])
    assert metrics == pytest.approx(caption_metrics(WRITTEN, REFERENCES))
    assert all(math.isnan(value) for value in caption_metrics(["a cat"], [["?"]]).values())


def test_words_and_the_most_frequent_caption_by_them() -> None:
    assert bare_words("A man's T-shirt, (red)!") == "a man s t shirt red"
    assert bare_words("Über_all  2 Dogs\n") == "über all 2 dogs"
    assert usual_caption([["A dog.", "a cat"], ["a bird", "A Cat!"]]) == "a cat"
    assert usual_caption([["x"], ["y"]]) == "x"
    assert usual_caption([["!!!", "a dog"], ["!!!", "a dog"], ["...", "a cat"]]) == "a dog"
    assert usual_caption([["!!!"]]) == ""


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aac_metrics.functional", None)
    with pytest.raises(UserError, match="aac-metrics") as caught:
        cider_function()
    assert caught.value.code == ExitCode.UNAVAILABLE
