"""The table of metrics: exact lines for known numbers."""

import io
import math

import pytest
from rich.console import Console

from maskvlm.reporting.metric_tables import claim_line, gain, metrics_table, score_line

RECALL = {
    f"retrieval/{name}r{k}": 10.0 * n + k
    for n, name in enumerate(("itc_tr_", "tr_", "itc_ir_", "ir_"))
    for k in (1, 5, 10)
}
WORDS = {
    "mlm/accuracy": 63.1, "mlm/accuracy_wrong_image": 49.2, "mlm/accuracy_no_image": 48.9,
    "mlm/nats": 1.2, "mlm/nats_wrong_image": 1.72, "mlm/nats_no_image": 1.8,
}  # fmt: skip
PIXELS = {
    "mim/mse": 0.0885, "mim/mse_wrong_text": 0.1008, "mim/mse_no_text": 0.1013,
    "mim/object_mse": 0.2, "mim/object_mse_wrong_text": 0.16, "mim/object_mse_no_text": 0.0,
}  # fmt: skip
SIZES = {"retrieval/pictures": 500.0, "retrieval/captions": 2500.0}
CHANCE = {f"retrieval/{side}_r{k}_chance": 0.2 * k for side in ("tr", "ir") for k in (1, 5, 10)}


def lines(metrics: dict[str, float], width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(metrics_table(metrics))
    return [line.strip() for line in out.getvalue().splitlines() if line.strip(" ─")]


def test_every_metric_stands_in_its_group() -> None:
    assert lines(RECALL | WORDS | PIXELS | {"vqa/accuracy": 12.3456, "score": 9.0}) == [
        "Recall in %                             R@1    R@5   R@10",
        "captions of an image, contrast alone    1.0    5.0   10.0",
        "captions of an image, re-ranked        11.0   15.0   20.0",
        "image of a caption, contrast alone     21.0   25.0   30.0",
        "image of a caption, re-ranked          31.0   35.0   40.0",
        "Words, with image   right   wrong    none   vs wrong   vs none",
        "accuracy, %          63.1    49.2    48.9      +13.9     +14.2",
        "loss, nats          1.200   1.720   1.800     +0.520    +0.600",
        "Pixels, with caption    right    wrong     none   vs wrong   vs none",
        "squared error          0.0885   0.1008   0.1013    +12.2 %   +12.6 %",
        "squared, objects       0.2000   0.1600   0.0000    -25.0 %         -",
        "vqa           %",
        "accuracy   12.3",
        "Gain of the right partner over a wrong one: masked words +13.9 points right",
        "(+0.520 nats), masked pixels 12.2 % less squared error",
    ]


def test_chance_levels_stand_beside_what_was_measured() -> None:
    table = lines(RECALL | SIZES | CHANCE | WORDS | PIXELS | {"mlm/accuracy_chance": 9.1, "mim/mse_chance": 0.5})
    assert table[0] == "Recall in % (500 images, 2500 captions)    R@1    R@5   R@10"
    assert table[3] == table[6] == "by chance                                0.2    1.0    2.0"
    assert "accuracy, %          63.1    49.2    48.9      +13.9     +14.2      9.1" in table
    assert "loss, nats          1.200   1.720   1.800     +0.520    +0.600" in table
    assert "squared error          0.0885   0.1008   0.1013    +12.2 %   +12.6 %   0.5000" in table
    assert not any("…" in line for line in table)


def test_what_was_not_measured_is_left_out() -> None:
    assert lines({}) == []
    assert claim_line({"mim/mse": 1.03, "mim/mse_wrong_text": 1.0}).endswith(": masked pixels 3.0 % more squared error")
    assert claim_line({}) == claim_line(RECALL) == ""
    assert lines({"mim/l1": 0.1, "mim/l1_wrong_text": 0.2}) == [
        "Pixels, with caption    right    wrong   none   vs wrong   vs none",
        "absolute error         0.1000   0.2000      -    +50.0 %         -",
    ]


def test_names_are_no_markup() -> None:
    assert lines({"[red]score": 1.0}) == ["Metric       value", "[red]score       1"]


@pytest.mark.parametrize(
    ("kind", "right", "other", "text"),
    [
        ("points", 63.1, 49.2, "+13.9"),
        ("points", 49.2, 63.1, "-13.9"),
        ("nats", 1.2, 1.72, "+0.520"),
        ("%", 0.08, 0.1, "+20.0 %"),
        ("%", 0.1, 0.08, "-25.0 %"),
    ],
)
def test_a_gain_is_positive_where_the_right_partner_is_better(kind: str, right: float, other: float, text: str) -> None:
    assert gain(kind, right, other) == text


def test_a_tasks_accuracy_stands_beside_its_majority_and_above_its_kinds() -> None:
    metrics = {
        "nlvr/accuracy": 71.34, "nlvr/accuracy_majority": 50.2, "nlvr/accuracy/colour [x]": 80.0,
        "nlvr/accuracy/number": 60.0, "nlvr/consistency": 31.2, "nlvr/consistency_chance": 12.5,
        "nlvr/mean_error": 1.25, "nlvr/examples": 500.0, "score": 71.34,
    }  # fmt: skip
    assert lines(metrics) == [
        "nlvr (500 examples)      %      chance level",
        "accuracy              71.3   50.2 (majority)",
        "colour [x]          80.0",
        "number              60.0",
        "consistency           31.2     12.5 (chance)",
        "Metric            value",
        "nlvr/mean_error    1.25",
    ]


def test_a_task_without_an_accuracy_is_told_by_its_number_of_examples() -> None:
    metrics = {
        "captioning/cider": 396.49, "captioning/bleu_4": 78.5, "captioning/cider_majority": 38.08,
        "captioning/bleu_4_majority": 7.84, "captioning/examples": 500.0, "score": 396.49,
    }  # fmt: skip
    assert lines(metrics) == [
        "captioning (500 examples)   x 100      chance level",
        "cider                       396.5   38.1 (majority)",
        "bleu_4                       78.5    7.8 (majority)",
    ]


@pytest.mark.parametrize("label", ["[/x]", "[red]"])
def test_a_label_is_shown_as_it_is(label: str) -> None:
    """rich would take it for markup, and end the evaluation or leave it out."""
    assert "".join(lines({"x/accuracy": 60.0, f"x/confusion/{label}_as_{label}": 3.0})).count(label) == 2


def test_recall_and_confusion_of_classes() -> None:
    metrics = {"entailment/accuracy": 60.0, "entailment/accuracy_prior": 40.0, "entailment/recall/yes": 75.0}
    for truth, answer, count in (("yes", "yes", 3), ("yes", "no", 1), ("no", "yes", 0), ("no", "no", 12)):
        metrics[f"entailment/confusion/{truth}_as_{answer}"] = float(count)
    assert lines(metrics) == [
        "entailment           %",
        "accuracy          60.0",
        "accuracy, prior   40.0",
        "recall, yes       75.0",
        "truth, and what was said   yes   no",
        "yes                          3    1",
        "no                           0   12",
    ]


def test_sums_and_the_sweep_of_retrieval() -> None:
    metrics = dict(RECALL)
    for number, name in enumerate(("k0", "k1", "k16", "k_all")):
        metrics |= {f"retrieval/{name}_tr_r1": 50.0 + number, f"retrieval/{name}_ir_r1": 40.0 + number}
    metrics |= {"retrieval/itc_rsum": 412.34, "retrieval/rsum": 523.0}
    assert lines(metrics)[5:] == [
        "sum of both ways, contrast alone                     412.3",
        "sum of both ways, re-ranked                          523.0",
        "R@1 in %, candidates re-ranked   captions   images",
        "0                                    50.0     40.0",
        "1                                    51.0     41.0",
        "16                                   52.0     42.0",
        "all                                  53.0     43.0",
    ]


def test_unknown_levels_are_left_open() -> None:
    assert lines({"a/accuracy": math.nan, "a/accuracy_majority": math.nan}) == [
        "a            %     chance level", "accuracy   nan   nan (majority)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (
            {"vqa/accuracy": 71.34, "vqa/accuracy/x": 3.0, "vqa/accuracy_majority": 29.7},
            "accuracy 71.3 (majority 29.7)",
        ),
        ({"vqa/accuracy": 71.34, "vqa/accuracy_majority": math.nan}, "accuracy 71.3"),
        ({"retrieval/rsum": 3.0, "score": 42.0}, "score 42.0"),
        ({}, ""),
    ],
)
def test_what_a_task_is_judged_by_in_a_few_words(metrics: dict[str, float], line: str) -> None:
    assert score_line(metrics) == line
