"""The card of a model whose files tell strange things: they may be a stranger's."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.cli.publish import missing
from maskvlm.inference.hf_config import MaskVLMConfig
from maskvlm.inference.model_card import UNNAMED, model_card, run_facts

SPEC: Any = SimpleNamespace(image_size=48, text_length=8, vocab_size=9)
LEAF = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats(allow_nan=False) | st.text(max_size=5)
TREE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["card", "metrics", "versions", "command", "commit", "packages", "step", "a/r1", "data"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(card=TREE, metrics=TREE)
def test_whatever_a_folder_tells_of_its_run_the_card_is_written(card: Any, metrics: Any) -> None:
    config = MaskVLMConfig(evaluation={"card": card, "metrics": metrics})
    assert model_card(config, SPEC, UNNAMED, {}).startswith("---\n")
    assert all(isinstance(line, str) for line in missing(config))


@pytest.mark.parametrize("command", [[1, 2], "pretrain", {"a": 1}, [], None])
def test_a_command_that_is_none_is_not_shown(command: Any) -> None:
    config = MaskVLMConfig(evaluation={"card": {"versions": {"command": command, "commit": "abc"}}, "metrics": {}})
    assert not run_facts(config).versions["command"]
    assert "made by" not in model_card(config, SPEC, UNNAMED, {})


def test_what_a_run_writes_is_shown() -> None:
    versions = {"command": ["pretrain", "run=a"], "commit": "abc", "packages": {"torch": "2.13"}}
    metrics = {"step": 7, "x/r1": 12.5, "x/r1_chance": 0.5, "x/flag": True, "x/text": "high"}
    config = MaskVLMConfig(evaluation={"card": {"versions": versions}, "metrics": metrics}, step=7)
    card = model_card(config, SPEC, UNNAMED, {})
    assert "- made by: `maskvlm pretrain run=a`, commit abc, torch 2.13" in card
    assert "| x/r1 | 12.5 | 0.5 |" in card
    assert "x/flag" not in card
    assert "x/text" not in card
