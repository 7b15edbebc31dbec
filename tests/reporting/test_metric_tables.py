"""The table of metrics: exact lines for known numbers."""

import io

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


def test_names_are_no_markup_and_what_was_not_measured_is_left_out() -> None:
    """rich would take a label for markup, and end the evaluation."""
    assert "".join(lines({"x/accuracy": 60.0, "x/confusion/[/x]_as_[/x]": 3.0})).count("[/x]") == 2
    assert lines({}) == []
    assert claim_line(RECALL) == ""
    assert score_line({"vqa/accuracy": 71.34, "vqa/accuracy_majority": 29.7}) == "accuracy 71.3 (majority 29.7)"
    assert score_line({"retrieval/rsum": 3.0, "score": 42.0}) == "score 42.0"


def test_a_gain_is_positive_where_the_right_partner_is_better() -> None:
    assert [gain("points", 63.1, 49.2), gain("nats", 1.2, 1.72), gain("%", 0.1, 0.08)] == ["+13.9", "+0.520", "-25.0 %"]
