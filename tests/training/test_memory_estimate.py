"""A step that is simulated without values: what it takes, against exact counts and against a step that is made."""

from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import toy_backbone

from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.memory_estimate import LiveBytes, StepSimulation, copies_gradients, estimate_memory
from maskvlm.utils.errors import UserError


def parts(**settings: Any) -> tuple[Any, MaskedPretraining]:
    backbone = toy_backbone(length=12, vocab=60)
    task = MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=8, **settings)
    task.build(backbone)
    return backbone, task


def test_storages_are_counted_once_and_until_nothing_holds_them() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1000)  # 4,000 bytes are 8 blocks of 512
        y = 2 * x.view(10, 100)
        assert (live.now, live.peak) == (8192, 8192)
        del y
        assert (live.now, live.peak) == (4096, 8192)
    assert live.launched == 2  # a view launches nothing


def test_what_stays_is_counted_exactly() -> None:
    """Weights, gradients and two moments, in float32: 16 bytes for what is learned, 4 for what is not."""
    backbone, task = parts()
    backbone.text.requires_grad_(False)
    every = [*backbone.parameters(), *task.parameters()]
    learned = sum(p.numel() for p in every if p.requires_grad)
    frozen = sum(p.numel() for p in every if not p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in (*backbone.buffers(), *task.buffers()))
    simulation = StepSimulation(backbone, task, "32-true")
    assert frozen
    assert simulation.state_bytes == 16 * learned + 4 * frozen + buffers
    assert simulation.gradient_bytes == 4 * learned


@pytest.mark.slow
def test_the_phases_of_a_run_are_counted_each() -> None:
    """Contrast alone costs less than all losses; an image encoder that stands still less than one that learns."""
    alone, every = StepSimulation(*parts(contrast_first=0.25), "32-true").work(8)
    learning, still = StepSimulation(*parts(image_learns=0.4), "32-true").work(8)
    (whole,) = StepSimulation(*parts(), "32-true").work(8)
    assert [work.share for work in (alone, every, learning, still, whole)] == [0.25, 0.75, 0.4, 0.6, 1.0]
    assert alone.flops < every.flops == whole.flops == learning.flops > still.flops


class Straight(StepSimulation):
    """1,000 bytes that stay, 2 for each pair, 10 for each pair of a chunk; gradients of 100."""

    gradient_bytes, state_bytes = 100, 1000

    def __init__(self) -> None:
        self.model: Any = nn.Identity()

    def memory(self, pairs: int, chunk: int | None = None) -> int:
        return 1000 + 2 * pairs + 10 * (chunk or pairs)


@pytest.mark.parametrize(("card", "chunk"), [(3700, 128), (3600, 64), (2300, None)])
def test_the_largest_chunk_that_fits_is_named(card: int, chunk: int | None) -> None:
    """512 pairs take 2,024 bytes, and 10 for each of a chunk: 3,304 in chunks of 128, 2,104 in chunks of 8. Nine tenths
    of the card count: 3,330 of 3,700, 3,240 of 3,600, 2,070 of 2,300."""
    estimate = estimate_memory(Straight(), 512, None, card)
    assert (estimate.chunk, estimate.fits) == (chunk, False)
    assert str(estimate.chunk if chunk else "batch_size") in estimate.todo
    enough = estimate_memory(Straight(), 512, None, 10**6)
    assert (enough.fits, enough.todo) == (True, "")
    enough.check()
    with pytest.raises(UserError, match="GPU memory"):
        estimate_memory(Straight(), 512, None, 900).check()
    # Processes that share a batch keep another copy of the gradients, unless they are views (conf/where).
    assert estimate_memory(Straight(), 512, None, 10**6, copied=True).needed - enough.needed == 100
    views = {"gradient_as_bucket_view": True}
    ways = DDPStrategy(**views), Namespace(class_path="x", init_args=Namespace(**views)), DDPStrategy(), "ddp"
    assert [copies_gradients(way) for way in ways] == [False, False, True, True]
