"""Compiled blocks: the run is the one without, and as many graphs are made as there are kinds of block."""

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from test_lit import Watch, make_data, make_trainer
from torch._dynamo.utils import counters
from toys import toy_backbone

from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.compiled import compile_blocks
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import UserError

STEPS, LAYERS = 3, 3  # a first, an inner and a last cross block
KINDS = 14
"""A block of each encoder: 2. Of the cross encoder of images, and of that of texts: the first block in two parts, an
inner one, the last one about all positions and about the first: 5 each. Of the decoder: an inner block, and the last
one about the masked patches: 2."""


class Graphs(Watch):
    """Also how many graphs there are after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        self.counts.append(counters["stats"]["unique_graphs"])


def make_model(compile: bool, layers: int = LAYERS, chunk: int | None = None) -> LitModel:
    backbone = toy_backbone(length=24, vocab=150, depth=layers, cross_layers=layers)
    backbone.text.tokenizer = None
    task = MaskedPretraining(mask_block=16, decoder_layers=layers, contrast_dim=8, rerank_k=3)
    return LitModel(backbone, task, lr=1e-3, lr_encoders=1e-4, warmup=1, compile=compile, chunk=chunk)


def fit(model: LitModel, steps: int = STEPS) -> Graphs:
    watch = Graphs()
    make_trainer(watch).fit(model, make_data(steps, batch_size=16, eval_batch_size=3))
    return watch


@pytest.fixture(scope="module", autouse=True)
def traced_alone() -> Iterator[None]:
    """Blocks are traced as for any compiler, and the graphs run by PyTorch: to the bit what they are made from."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_losses_weights_and_metrics_are_those_of_a_run_without() -> None:
    """As many graphs as kinds of block, also for twice as many layers, and none for an evaluation. Fails where a block
    cannot be traced in one piece. In chunks compiled blocks compute again what they did."""
    plain, compiled = make_model(compile=False), make_model(compile=True)
    expected, watch = fit(plain), fit(compiled)
    assert (expected.counts, watch.counts) == ([0] * STEPS, [KINDS] * STEPS)
    assert not counters["graph_break"]
    assert watch.losses == expected.losses
    assert compiled.metrics == plain.metrics
    assert all(torch.equal(compiled.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert fit(make_model(compile=True, layers=2 * LAYERS), 1).counts == [KINDS]
    losses = [fit(make_model(compile, chunk=8), 2).losses for compile in (False, True)]
    assert losses[0] == losses[1] == pytest.approx(expected.losses[:2], rel=1e-5)


def test_a_copy_computes_with_its_own_weights() -> None:
    """And a compiled block what it is made from. Fails where its parts are functions of the object that is copied."""
    model, plain = make_model(compile=True), make_model(compile=False)
    compile_blocks(model)
    block: Any = model.backbone.cross_text.blocks[0]
    other, same = copy.deepcopy(block), plain.backbone.cross_text.blocks[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x_BLD = torch.randn(2, 3, 16)
    outs = [layer(x_BLD, None, layer.keys_values(x_BLD), None) for layer in (same, block, other)]
    assert torch.equal(outs[0], outs[1])
    assert outs[1].any()
    assert not outs[2].any()


def test_sharded_weights_are_refused() -> None:
    model = make_model(compile=True)
    model._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"model\.compile"):
        model.configure_model()
