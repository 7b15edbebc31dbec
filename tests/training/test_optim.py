"""Which parameter learns how fast and decays, and the learning rate of each step."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_step import build
from torch import nn

from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.training.optim import blocks_above, build_adamw, first_step, parameter_groups, schedule, warmup_cosine
from maskvlm.utils.errors import UserError

# ------------------------------------------------------------------ groups


def test_every_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    backbone, task = build()
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 3e-4, 1e-5, 0.05)
    names = {id(p): n for n, p in itertools.chain(backbone.named_parameters(), task.named_parameters())}
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(names)  # complete, and none twice
    assert {group["name"] for group in groups} == {f"{x}{y}" for x in ("encoders", "rest") for y in ("", " (no decay)")}
    for group in groups:
        decays = group["weight_decay"] == 0.05
        assert group["weight_decay"] in (0.05, 0.0)
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (1e-5 if name.startswith(("image.vit", "image.mask", "text.")) else 3e-4), name
            plain = (
                name.endswith(("bias", "token", "pos_embed", "embeddings.weight", "log_scale"))
                or "norm" in name.lower()
            )
            assert decays == (not plain), name


def rates_of(decay: float) -> dict[str, float]:
    """Rate of each parameter of encoders three (ViT) and two (BERT) blocks deep."""
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = ImageEncoder("vit_tiny_patch16_224", 32, random_init=True, config=vit)
    backbone = MaskVLM(image, TextEncoder("bert", 10, random_init=True, vocab_size=40, config=bert), 1, 2, width=8)
    groups = parameter_groups(
        backbone, (backbone.image, backbone.text), nn.Linear(2, 2), 1.0, 0.1, 0.05, layer_decay=decay
    )
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"] if id(p) in names}
    assert rates.keys() == dict(backbone.named_parameters()).keys()
    assert len({group["name"] for group in groups}) == len(groups)
    return rates


def test_lower_layers_learn_slower() -> None:
    rates = rates_of(0.5)
    expected = {
        "image.vit.norm.bias": 0.1, "image.vit.blocks.2.mlp.fc1.weight": 0.1, "image.vit.blocks.1.norm1.bias": 0.05,
        "image.vit.blocks.0.attn.qkv.weight": 0.025, "image.vit.patch_embed.proj.weight": 0.0125,
        "image.vit.pos_embed": 0.0125, "image.mask_token": 0.0125, "text.model.encoder.layer.1.output.dense.bias": 0.1,
        "text.model.encoder.layer.0.output.dense.bias": 0.05, "text.model.embeddings.word_embeddings.weight": 0.025,
        "image.adapter.weight": 1.0, "text.adapter.bias": 1.0, "cross_text.blocks.0.norms.1.weight": 1.0,
    }  # fmt: skip
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    alike = rates_of(1.0)
    assert {rate for name, rate in alike.items() if name.startswith(("image.vit", "image.mask", "text.model"))} == {0.1}


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "albert"])
def test_other_kinds_of_text_encoders_have_blocks(kind: str) -> None:
    """Or, as ALBERT, one that is run several times, whose layers cannot learn at different rates."""
    config = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "distilbert":
        config = {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32}
    text = TextEncoder(kind, 10, random_init=True, vocab_size=40, config=config)
    if kind == "albert":
        with pytest.raises(UserError, match=r"model\.layer_decay: the blocks of AlbertModel are not numbered"):
            parameter_groups(text, (text,), nn.Linear(2, 2), 1.0, 0.1, 0.05, layer_decay=0.5)
        assert parameter_groups(text, (text,), nn.Linear(2, 2), 1.0, 0.1, 0.05)
        return
    numbers = {id(parameter): number for parameter, number in blocks_above(text)}
    assert {*numbers.values()} == {0, 1, 2}
    assert numbers[id(text.word_embeddings)] == 2


def test_what_gets_no_gradient_is_in_no_group() -> None:
    backbone, task = build(weight_itm=0.0, weight_mlm=0.0)
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 1.0, 1.0, 0.05)
    members = {id(parameter) for group in groups for parameter in group["params"]}
    assert members.isdisjoint(map(id, backbone.cross_text.parameters()))
    assert members >= set(map(id, backbone.cross_image.parameters()))


@pytest.mark.parametrize(("lr_cross", "expected"), [(2e-5, 2e-5), (0.0, 0.0), (None, 3e-4)])
def test_cross_encoders_may_have_a_rate_of_their_own(lr_cross: float | None, expected: float) -> None:
    """Heads keep `lr`, though pre-training's hold cross blocks, too."""
    backbone, task = build()
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 3e-4, 1e-5, 0.05, lr_cross)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in backbone.named_parameters():
        assert rate.pop(id(parameter)) == (expected if name.startswith("cross_") else 1e-5), name
    assert rate == {id(parameter): 3e-4 for parameter in task.parameters()}


def test_late_and_stopping_parameters_have_groups_of_their_own() -> None:
    backbone, heads = nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    late, stopping = heads[0].parameters(), heads[1].parameters()
    groups = parameter_groups(backbone, [], heads, 1e-3, 1e-4, 0.05, late=late, stopping=stopping)
    marks = [{mark for mark in ("late", "stopping") if mark in group} for group in groups]
    sizes = [[p.numel() for p in group["params"]] for group in groups]
    assert dict(zip([group["name"] for group in groups], zip(marks, sizes, strict=True), strict=True)) == {
        "rest": (set(), [4]),
        "rest (no decay)": (set(), [2]),
        "rest, late": ({"late"}, [9]),
        "rest, late (no decay)": ({"late"}, [3]),
        "rest, stopping": ({"stopping"}, [16]),
        "rest, stopping (no decay)": ({"stopping"}, [4]),
    }


# ------------------------------------------------------------------ the rate at each step


def falling(steps: int) -> list[float]:
    """A cosine from 1 to a tenth."""
    return [0.55 + 0.45 * math.cos(math.pi * n / steps) for n in range(steps + 1)]


@pytest.mark.parametrize(
    ("total", "warmup", "floor", "stable", "expected"),
    [
        (12, 4, 0.1, 0, [0.25, 0.5, 0.75, 1.0, *falling(8), 0.1]),
        (2, 0, 0.0, 0, [1.0, 0.5, 0.0, 0.0]),
        (2, 4, 0.0, 0, [0.25, 0.5, 0.75, 1.0, 1.0]),  # it only warms up
        (10, 2, 0.1, 4, [0.5, 1.0, *[1.0] * 4, *falling(4), 0.1]),
    ],
)
def test_rates_written_out(total: int, warmup: int, floor: float, stable: int, expected: list[float]) -> None:
    factor = warmup_cosine(total, warmup, floor, stable)
    assert [factor(step) for step in range(len(expected))] == pytest.approx(expected)


def factors(marks: tuple[str, ...], *of_run: Any, **more: Any) -> list[Callable[[int], float]]:
    """Of groups that have these marks, and a peak of 1."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, **({mark: True} if mark else {})} for mark in marks]
    return schedule(build_adamw(groups, (0.9, 0.98), fused=False), *of_run, **more).lr_lambdas


def test_what_is_late_rises_from_its_step_on_and_what_stops_has_fallen_by_then() -> None:
    """Ten steps, the others from the fourth on."""
    throughout, late, stopping = factors(("", "late", "stopping"), 10, 2, 0.1, start=4)
    assert [throughout(step) for step in range(11)] == pytest.approx([0.5, 1.0, *falling(8)])
    assert [late(step) for step in range(11)] == pytest.approx([0.0] * 4 + [0.5, 1.0, *falling(4)])
    assert [stopping(step) for step in range(12)] == pytest.approx([0.5, 1.0, 1.0, 0.55, *[0.0] * 8])


def test_shares_are_of_the_steps_that_a_group_learns() -> None:
    """Of 12 steps 2 rise, half of the other ten are stable; of the last four of late ones 2 rise and 1 is stable."""
    early, late = factors(("", "late"), 12, 2, 0.0, start=8, stable=0.5)
    assert [early(step) for step in (1, 2, 7)] == pytest.approx([1.0] * 3)
    assert early(8) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 5))
    assert [late(step) for step in range(7, 13)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.0])
    early, late = factors(("", "late"), 20, 0.5, 0.0, start=12)
    assert [early(step) for step in (0, 9)] == pytest.approx([0.1, 1.0])
    assert [late(step) for step in (11, 12, 15)] == pytest.approx([0.0, 0.25, 1.0])


def test_the_encoders_rate_under_the_floor_of_the_others_stays() -> None:
    """The paper's 1e-5 under a floor of 3e-5: after warm-up it neither falls nor rises. A rate of 0 stays 0."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (3e-4, 1e-5, 0.0)]
    optimizer = build_adamw(groups, (0.9, 0.98), fused=False)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}
    scheduler = schedule(optimizer, 10, 2, 3e-5)
    rows = []
    for _ in range(11):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    first, second, third = zip(*rows, strict=True)
    assert first == pytest.approx([1.5e-4, *(3e-4 * factor for factor in (1.0, *falling(8)))])
    assert second == pytest.approx([5e-6] + [1e-5] * 10)
    assert {*third} == {0.0}


@given(st.integers(0, 100), st.integers(1, 5_000))
def test_the_first_step_of_a_share_is_the_one_that_the_task_sees(percent: int, total: int) -> None:
    """0.28 of 800 is a little more than 224 to a computer."""
    share = percent / 100
    step = first_step(share, total)
    assert step / total >= share
    assert step == 0 or (step - 1) / total < share
