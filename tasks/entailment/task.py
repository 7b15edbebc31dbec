"""Visual entailment: does the image show that the hypothesis is true, that it is false, or neither (SNLI-VE)?"""

from types import MappingProxyType

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from maskvlm.objectives.answers import ScoredExample
from maskvlm.objectives.classification import Classification, predict_labels
from maskvlm.objectives.methods import Method


class Entailment(Classification):
    """The fused vector through two linear layers, three classes (paper sec. 4; R)."""

    name = "entailment"
    methods = MappingProxyType(
        {
            "entail": Method(
                predict_labels, 1, "hypothesis", "whether an image shows that a hypothesis is true, false, or neither"
            )
        }
    )

    def extra_metrics(self, scored: list[ScoredExample]) -> dict[str, float]:
        """`recall/<class>`: recall of a class in percent; `confusion/<truth>_as_<prediction>`: number of examples."""
        known = [one for one in scored if one.truth]
        if not known:
            return {}
        column = {label: number for number, label in enumerate(self.labels)}
        truth_N = torch.tensor([column[one.truth] for one in known])
        predicted_N = torch.tensor([column[one.prediction] for one in known])
        # Rows are truths, columns predictions.
        count_KK = multiclass_confusion_matrix(predicted_N, truth_N, len(self.labels))
        metrics: dict[str, float] = {}
        for row, label in zip(count_KK.tolist(), self.labels, strict=True):
            metrics[f"recall/{label}"] = 100 * row[column[label]] / sum(row) if sum(row) else float("nan")
            metrics[f"recall/{label}_chance"] = 100 / len(self.labels)
        for row, label in zip(count_KK.tolist(), self.labels, strict=True):
            metrics |= {f"confusion/{label}_as_{answer}": float(n) for n, answer in zip(row, self.labels, strict=True)}
        return metrics
