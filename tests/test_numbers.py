"""Numbers given from Python, where no parser has checked them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from toys import toy_backbone

from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import UserError, check_counts, check_least
from tasks.retrieval.task import Retrieval


def data(**settings: Any) -> PairData:
    return PairData(Scenes(8, 8, 8), toy_backbone().input_spec, **{"batch_size": 2, "steps": 2, **settings})


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda count: data(batch_size=count), "data.batch_size"),
        (lambda count: data(steps=count), "data.steps"),
        (lambda count: data(captions=count), "data.captions"),
        (lambda count: Scenes(train=count), "data.source.train"),
        (lambda count: MaskedPretraining(rerank_k=count), "model.task.rerank_k"),
        (lambda count: MaskedPretraining(masks_per_text=count), "model.task.masks_per_text"),
        (lambda count: Retrieval(rerank_k=count), "model.task.rerank_k"),
        (lambda count: LitModel(toy_backbone(), Retrieval(), chunk=count), "model.chunk"),
    ],
)
@pytest.mark.parametrize("count", [2.5, float("inf"), float("nan"), True, "2", 0, -1])
def test_a_count_is_a_whole_number(build: Callable[[Any], object], key: str, count: Any) -> None:
    """Fails where 2.5 is only compared with the smallest value: it ended in torch, in the middle of a run."""
    with pytest.raises(UserError, match=rf"^{key}: .*Give "):
        build(count)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -0.1, "1e-3"])
def test_a_rate_is_a_finite_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"^model\.lr: "):
        LitModel(toy_backbone(), Retrieval(), lr=value)


def test_numbers_that_are_allowed() -> None:
    check_counts(1, {"a": 1, "b": None, "c": np.int64(3)})
    check_least(0, {"a": 0, "b": None, "c": 1e-9, "d": np.float32(2)})
