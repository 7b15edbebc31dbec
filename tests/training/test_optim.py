"""Which parameter learns how fast and decays, and the learning rate of each step."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_step import build
from torch import nn

from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.training.lit import LitModel
from maskvlm.training.optim import blocks_above, build_adamw, first_step, parameter_groups, schedule, warmup_cosine
from maskvlm.utils.errors import UserError


def test_every_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    backbone, task = build()
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 3e-4, 1e-5, 0.05)
    names = {id(p): n for n, p in itertools.chain(backbone.named_parameters(), task.named_parameters())}
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(names)  # complete, and none twice
    assert len(groups) == 4
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


@pytest.mark.parametrize(
    "name",
    [
        "image.mask_token",
        "image.vit.cls_token",
        "image.vit.pos_embed",
        "image.vit.norm.weight",
        "cross_image.blocks.0.norms.1.weight",
    ],
)
def test_no_decay(name: str) -> None:
    backbone, task = build()
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 1.0, 1.0, 0.05)
    free = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert id(dict(backbone.named_parameters())[name]) in free
    assert id(task.projection.log_scale) in free
    assert {id(task.matching.classify.weight), id(backbone.image.vit.patch_embed.proj.weight)}.isdisjoint(free)


def rates_of(decay: float, **more: float) -> dict[str, float]:
    """Rate of each parameter of encoders three (ViT) and two (BERT) blocks deep."""
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = ImageEncoder("vit_tiny_patch16_224", 32, random_init=True, config=vit)
    backbone = MaskVLM(image, TextEncoder("bert", 10, random_init=True, vocab_size=40, config=bert), 1, 2, width=8)
    groups = parameter_groups(
        backbone, (backbone.image, backbone.text), nn.Linear(2, 2), 1.0, 0.1, 0.05, layer_decay=decay, **more
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


def test_without_a_decay_all_layers_learn_alike() -> None:
    rates = rates_of(1.0)
    assert {rate for name, rate in rates.items() if name.startswith(("image.vit", "image.mask", "text.model"))} == {0.1}


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_every_kind_of_text_encoder_has_blocks(kind: str) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "distilbert":
        config = {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32}
    text = TextEncoder(kind, 10, random_init=True, vocab_size=40, config=config)
    numbers = {number for _, number in blocks_above(text)}
    assert numbers == {0, 1, 2}
    table = text.word_embeddings
    assert [number for parameter, number in blocks_above(text) if parameter is table] == [2]


def test_blocks_without_numbers_cannot_learn_at_different_rates() -> None:
    """ALBERT has one block that is run several times. Fails where the full rate is used for all, silently."""
    config = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    text = TextEncoder("albert", 10, random_init=True, vocab_size=40, config=config)
    with pytest.raises(UserError, match=r"model\.layer_decay: the blocks of AlbertModel are not numbered"):
        parameter_groups(text, (text,), nn.Linear(2, 2), 1.0, 0.1, 0.05, layer_decay=0.5)
    assert parameter_groups(text, (text,), nn.Linear(2, 2), 1.0, 0.1, 0.05)


def test_what_gets_no_gradient_is_in_no_group() -> None:
    backbone, task = build(weight_itm=0.0, weight_mlm=0.0)
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 1.0, 1.0, 0.05)
    members = {id(parameter) for group in groups for parameter in group["params"]}
    assert members.isdisjoint(map(id, backbone.cross_text.parameters()))
    assert members >= set(map(id, backbone.cross_image.parameters()))


def test_rate_at_written_out_steps() -> None:
    factor = warmup_cosine(total=12, warmup=4, floor=0.1)
    expected = [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        *(0.55 + 0.45 * math.cos(math.pi * n / 8) for n in range(1, 9)),
        0.1,
    ]
    assert [factor(step) for step in range(14)] == pytest.approx(expected)
    assert factor(8) == pytest.approx(0.55)  # half way down
    assert factor(1000) == pytest.approx(0.1)


def test_runs_without_warm_up_and_runs_that_only_warm_up() -> None:
    assert [warmup_cosine(2, 0, 0.0)(step) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert [warmup_cosine(2, 4, 0.0)(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_stable_rate_stays_at_its_peak_and_then_falls() -> None:
    """Two steps of rise, four at the peak, a cosine over the last four."""
    down = [0.55 + 0.45 * math.cos(math.pi * n / 4) for n in range(5)]
    factor = warmup_cosine(total=10, warmup=2, floor=0.1, stable=4)
    assert [factor(step) for step in range(12)] == pytest.approx([0.5, *[1.0] * 5, *down, 0.1])


def test_the_stable_share_is_one_of_the_steps_of_each_group_after_its_rise() -> None:
    """Of 12 steps 2 rise, half of the other ten are stable; of the last four of late ones 2 rise and 1 is stable."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "late": late} for late in (False, True)]
    optimizer = build_adamw(groups, (0.9, 0.98), fused=False)
    early, late = schedule(optimizer, 12, 2, 0.0, start=8, stable=0.5).lr_lambdas
    assert [early(step) for step in (1, 2, 7)] == pytest.approx([1.0] * 3)
    assert early(8) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 5))
    assert [late(step) for step in range(7, 13)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.0])
    with pytest.raises(UserError, match=r"model\.stable: 1\.0 is out of range"):
        LitModel(*build(), stable=1.0)


def rates(lrs: list[float], min_lr: float) -> list[list[float]]:
    """Learning rates of the groups at each of ten steps, the first two of which warm up."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    optimizer = build_adamw(groups, (0.9, 0.98), fused=False)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}
    scheduler = schedule(optimizer, 10, 2, min_lr)
    rows = []
    for _ in range(11):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rows


def test_the_encoders_rate_under_the_floor_of_the_others_stays() -> None:
    """The paper's 1e-5 under a floor of 3e-5: after warm-up it neither falls nor rises."""
    rows = rates([3e-4, 1e-5], 3e-5)
    assert rows[0] == pytest.approx([1.5e-4, 5e-6])
    assert rows[1] == rows[2] == pytest.approx([3e-4, 1e-5])
    assert [encoder for _, encoder in rows[1:]] == pytest.approx([1e-5] * 10)
    assert rows[6] == pytest.approx([(3e-4 + 3e-5) / 2, 1e-5])
    assert rows[10] == pytest.approx([3e-5, 1e-5])
    rest = [rate for rate, _ in rows[2:]]
    assert rest == sorted(rest, reverse=True)


def test_a_rate_of_zero_stays_zero() -> None:
    assert {rate for step in rates([0.0], 3e-5) for rate in step} == {0.0}


@pytest.mark.parametrize(("lr_cross", "expected"), [(2e-5, 2e-5), (0.0, 0.0), (None, 3e-4)])
def test_cross_encoders_may_have_a_rate_of_their_own(lr_cross: float | None, expected: float) -> None:
    """Heads keep `lr`, though pre-training's hold cross blocks, too."""
    backbone, task = build()
    groups = parameter_groups(backbone, (backbone.image, backbone.text), task, 3e-4, 1e-5, 0.05, lr_cross)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    every = [*backbone.named_parameters(), *task.named_parameters()]
    assert sorted(members) == sorted(id(parameter) for _, parameter in every)
    assert {group["name"].removesuffix(" (no decay)") for group in groups} == (
        {"encoders", "rest"} if lr_cross is None else {"encoders", "cross", "rest"}
    )
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in backbone.named_parameters():
        assert rate[id(parameter)] == (expected if name.startswith("cross_") else 1e-5), name
    assert {rate[id(parameter)] for parameter in task.parameters()} == {3e-4}


@given(st.integers(0, 100), st.integers(1, 5_000))
def test_the_first_step_of_a_share_is_the_one_that_the_task_sees(percent: int, total: int) -> None:
    """0.28 of 800 is a little more than 224 to a computer."""
    share = percent / 100
    step = first_step(share, total)
    assert step / total >= share
    assert step == 0 or (step - 1) / total < share


def test_what_is_late_rises_from_its_step_on() -> None:
    """Ten steps, late from the fourth on: 0 until then, two steps of rise, then down to the floor like the others."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "late": late} for late in (False, True)]
    optimizer = build_adamw(groups, (0.9, 0.98), fused=False)
    scheduler = schedule(optimizer, 10, 2, 0.1, start=4)
    rows = []
    for _ in range(11):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    early, late = (list(column) for column in zip(*rows, strict=True))
    assert early == pytest.approx([warmup_cosine(10, 2, 0.1)(step) for step in range(11)])
    assert late == pytest.approx([0.0] * 4 + [warmup_cosine(6, 2, 0.1)(step) for step in range(7)])


def test_a_share_of_warm_up_is_one_of_the_steps_that_a_group_learns() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "late": late} for late in (False, True)]
    scheduler = schedule(build_adamw(groups, (0.9, 0.98), fused=False), 20, 0.5, 0.0, start=12)
    early, late = scheduler.lr_lambdas
    assert [early(step) for step in (0, 9)] == pytest.approx([0.1, 1.0])
    assert [late(step) for step in (11, 12, 15)] == pytest.approx([0.0, 0.25, 1.0])


def test_the_cosine_of_what_stops_ends_at_the_step_that_late_ones_begin_at() -> None:
    marks: list[dict[str, bool]] = [{"stopping": True}, {"late": True}, {}]
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, **mark} for mark in marks]
    optimizer = build_adamw(groups, (0.9, 0.98), fused=False)
    stopping, late, throughout = schedule(optimizer, 10, 2, 0.1, start=4).lr_lambdas
    assert [stopping(step) for step in range(12)] == pytest.approx([0.5, 1.0, 1.0, 0.55, *[0.0] * 8])
    assert [throughout(step) for step in range(11)] == pytest.approx(
        [warmup_cosine(10, 2, 0.1)(step) for step in range(11)]
    )
    assert [late(step) for step in range(11)] == pytest.approx(
        [0.0] * 4 + [warmup_cosine(6, 2, 0.1)(step) for step in range(7)]
    )


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
