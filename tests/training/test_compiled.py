"""Compiled blocks: the run is the one without, and as many graphs are made as there are kinds of block."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_lit import Watch, make_data, make_trainer
from torch._dynamo.utils import counters
from toys import toy_backbone

from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.compiled import compile_blocks
from maskvlm.training.failure import user_line
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import ExitCode, UserError

STEPS, LAYERS = 4, 3  # a first, an inner and a last cross block
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
        self.counts.append(graphs())


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def make_model(compile: bool, layers: int = LAYERS, chunk: int | None = None) -> LitModel:
    backbone = toy_backbone(length=24, vocab=150, depth=layers, cross_layers=layers)
    backbone.text.tokenizer = None
    task = MaskedPretraining(mask_block=16, decoder_layers=layers, contrast_dim=8, rerank_k=3)
    return LitModel(backbone, task, lr=1e-3, lr_encoders=1e-4, warmup=1, compile=compile, chunk=chunk)


def fit(model: LitModel, *callbacks: L.Callback, start: Path | None = None, steps: int = STEPS) -> Graphs:
    watch = Graphs()
    data = make_data(steps, batch_size=16, eval_batch_size=3)
    make_trainer(watch, *callbacks).fit(model, data, ckpt_path=start, weights_only=False)
    return watch


@pytest.fixture(scope="module", autouse=True)
def traced_alone() -> Iterator[None]:
    """Blocks are traced as for any compiler, and the graphs run by PyTorch: to the bit what they are made from."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield
    torch._dynamo.reset()


Run = tuple[LitModel, Graphs]


@pytest.fixture(scope="module")
def plain() -> Run:
    model = make_model(compile=False)
    return model, fit(model)


@pytest.fixture(scope="module")
def compiled() -> Run:
    """The first in this process that compiles anything."""
    model = make_model(compile=True)
    return model, fit(model)


def test_losses_weights_and_metrics_are_those_of_a_run_without(plain: Run, compiled: Run) -> None:
    assert compiled[1].losses == plain[1].losses
    assert compiled[0].metrics == plain[0].metrics
    ours, theirs = compiled[0].state_dict(), plain[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_as_many_graphs_as_kinds_of_block_and_none_for_an_evaluation(plain: Run, compiled: Run) -> None:
    """Fails where a block cannot be traced in one piece, or an evaluation runs through compiled blocks."""
    assert compiled[1].counts == [KINDS] * STEPS
    assert graphs() == KINDS
    assert not counters["graph_break"]
    assert plain[1].counts == [0] * STEPS


def test_twice_as_many_layers_need_no_further_graph(compiled: Run) -> None:
    assert fit(make_model(compile=True, layers=2 * LAYERS), steps=2).counts == [KINDS] * 2


class SaveAt(L.Callback):
    """A checkpoint after two steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_compiled_and_not(plain: Run, before: bool, tmp_path: Path) -> None:
    fit(make_model(compile=before), SaveAt(tmp_path / "half.ckpt"))
    other = make_model(compile=not before)
    assert fit(other, start=tmp_path / "half.ckpt").losses == plain[1].losses[2:]
    assert all(torch.equal(value, plain[0].state_dict()[name]) for name, value in other.state_dict().items())


def test_chunks_are_computed_again_by_compiled_blocks(plain: Run) -> None:
    chunked = fit(make_model(compile=True, chunk=8), steps=2)
    assert chunked.losses == fit(make_model(compile=False, chunk=8), steps=2).losses
    assert chunked.losses == pytest.approx(plain[1].losses[:2], rel=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_computes_with_its_own_weights(again: Any) -> None:
    """Fails where the compiled parts are functions of the object that is copied."""
    model = make_model(compile=True)
    compile_blocks(model)
    block: Any = model.backbone.cross_text.blocks[0]
    other = again(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x_BLD = torch.randn(2, 3, 16)
    for layer, zero in ((block, False), (other, True)):
        context = layer.keys_values(x_BLD)
        for out in (
            layer.attend_self(x_BLD, None),
            layer.attend_other(x_BLD, context, None),
            layer(x_BLD, None, context, None),
        ):
            assert not out.any() if zero else out.all()


def test_sharded_weights_are_refused() -> None:
    model = make_model(compile=True)
    model._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"model\.compile: blocks cannot be compiled while weights are sharded"):
        model.configure_model()


def test_a_machine_without_a_compiler_is_told_in_a_line() -> None:
    def lacking(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    model = make_model(compile=True)
    compile_blocks(model)
    with torch.compiler.set_stance("default", force_backend=lacking), pytest.raises(RuntimeError) as caught:
        model.backbone.image.vit.blocks[0](torch.randn(5, 7, 16, requires_grad=True))
    line = user_line(caught.value)
    assert line is not None
    assert line.code == ExitCode.UNAVAILABLE
    assert line.text.startswith("model.compile: a block cannot be compiled (")
    assert "No working C++ compiler found" in line.text
