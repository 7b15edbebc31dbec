"""A step that is simulated without values: what it takes, against exact counts and against a step that is made."""

import gc
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import toy_backbone

from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.memory_estimate import (
    GIB,
    LiveBytes,
    MemoryEstimate,
    StepSimulation,
    copies_gradients,
    estimate_memory,
)
from maskvlm.utils.errors import ExitCode, UserError


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


def test_memory_is_what_stays_and_so_much_for_each_pair() -> None:
    backbone, task = parts()
    simulation = StepSimulation(backbone, task, "32-true")
    few, some, many = (simulation.memory(pairs) for pairs in (40, 80, 160))
    assert many - some == pytest.approx(2 * (some - few), rel=0.03)
    # Without a pair weights, gradients and two moments are there, in whole blocks.
    every = [*backbone.parameters(), *task.parameters()]
    assert all(p.requires_grad for p in every)
    blocks = sum(4 * -(-4 * p.numel() // 512) for p in every)
    assert few - (some - few) == pytest.approx(512 * blocks, rel=0.03)


def test_it_is_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step with values, as a GPU makes it, its storages counted as they come and go."""
    for module in ("model.encoders", "model.feed_forward", "model.text_lengths", "objectives.pretraining_losses"):
        monkeypatch.setattr(f"maskvlm.{module}.on_cpu", lambda x: False)
    backbone, task = parts()
    simulation = StepSimulation(backbone, task, "32-true")
    model, batch = simulation.model.train(), simulation._batch(12)
    task.set_uniform(lambda rows, *shape: torch.rand(rows, *shape))
    learned = [p for p in model.parameters() if p.requires_grad]
    live = LiveBytes()
    for p in learned:
        p.grad = torch.zeros_like(p)
        live.count(p.grad)
    for x in (*model.parameters(), *model.buffers(), *(x for x in batch if isinstance(x, torch.Tensor))):
        live.count(x)
    moments = 2 * sum(-(-4 * p.numel() // 512) * 512 for p in learned)
    with live:
        loss = model(batch)
        for p in learned:
            p.grad = None
        loss.backward()
    assert simulation.memory(12) == pytest.approx(live.peak + moments, rel=0.1)


def test_the_model_is_left_as_it_is() -> None:
    backbone, task = parts()
    tokenizer, before = backbone.text.tokenizer, {name: x.clone() for name, x in backbone.state_dict().items()}
    StepSimulation(backbone, task, "bf16-mixed").memory(20, 8)
    assert backbone.text.tokenizer is tokenizer
    assert task.pairs_at_once is None
    assert all(p.grad is None for p in backbone.parameters())
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


def test_many_chunks_are_told_from_few() -> None:
    simulation = StepSimulation(*parts(), "32-true")
    assert simulation.memory(40, 8) == pytest.approx(simulation._peak(40, 8, 1.0), rel=0.02)
    assert simulation.memory(40, 8) < simulation.memory(40)


class Straight(StepSimulation):
    """1,000 bytes that stay, 2 for each pair, 10 for each pair of a chunk; gradients of 100."""

    gradient_bytes, state_bytes = 100, 1000

    def __init__(self) -> None:
        self.model: Any = nn.Identity()

    def memory(self, pairs: int, chunk: int | None = None) -> int:
        return 1000 + 2 * pairs + 10 * (chunk or pairs)


@pytest.mark.parametrize(("card", "chunk"), [(4100, 128), (3700, 128), (3600, 64), (2400, 8), (2300, None)])
def test_the_largest_chunk_that_fits_is_named(card: int, chunk: int | None) -> None:
    """512 pairs take 2,024 bytes, and 10 for each of a chunk: 3,304 in chunks of 128, 2,104 in chunks of 8. Nine tenths
    of the card count: 3,330 of 3,700, 3,240 of 3,600, 2,160 of 2,400, 2,070 of 2,300."""
    estimate = estimate_memory(Straight(), 512, None, card)
    assert estimate.chunk == chunk
    assert not estimate.fits


def test_processes_that_share_a_batch_keep_another_copy_of_the_gradients() -> None:
    alone, shared = (estimate_memory(Straight(), 100, None, 10**6, several) for several in (False, True))
    assert shared.needed - alone.needed == 100
    assert alone.chunk is shared.chunk is None
    views = {"gradient_as_bucket_view": True}  # as the files in conf/where have it
    assert not copies_gradients(DDPStrategy(**views))
    assert not copies_gradients(Namespace(class_path="x", init_args=Namespace(**views)))
    assert copies_gradients(DDPStrategy())
    assert copies_gradients("ddp")


def test_a_task_that_knows_no_chunks_gets_another_advice() -> None:
    class Whole(Straight):
        def largest_chunk(self, pairs: int, room: float) -> int | None:
            raise UserError("model.chunk", "not here", "Leave it out")

    estimate = estimate_memory(Whole(), 512, None, 4100)
    assert estimate.chunk is None
    assert "batch_size" in estimate.todo


def test_the_line_says_what_is_needed_what_is_there_and_what_to_do() -> None:
    estimate = MemoryEstimate(512, 34 * GIB, 5 * GIB, 24 * GIB, 32)
    assert str(estimate) == "a step of 512 pairs needs about 34.0 GiB (simulated), the GPU has 24.0"
    assert estimate.todo == "add --model.chunk 32"
    estimate.check()
    assert estimate._replace(needed=20 * GIB).todo == ""
    with pytest.raises(UserError) as error:
        estimate._replace(state=25 * GIB).check()
    assert error.value.code == ExitCode.UNAVAILABLE


@pytest.mark.gpu
def test_a_card_takes_what_was_simulated() -> None:
    """Two steps of AdamW at a width where activations, not blocks of 512 bytes, are what is measured."""
    backbone, task = parts()
    needed = StepSimulation(backbone, task, "bf16-mixed").memory(256)
    # The first product of a thread, also of the backward pass, takes a workspace for cuBLAS and keeps it: 32 MiB on an
    # H100, where this step takes 50.
    x_XX = torch.ones(64, 64, device="cuda", requires_grad=True)
    for kind in (torch.float32, torch.bfloat16):
        (x_XX.to(kind) @ x_XX.to(kind)).sum().backward()
    del x_XX
    gc.collect()
    workspaces = torch.cuda.memory_allocated()
    simulation = StepSimulation(backbone, task, "bf16-mixed")
    model = simulation.model.cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = simulation._batch(256)
    batch = batch._replace(**{k: x.cuda() for k, x in batch._asdict().items() if isinstance(x, torch.Tensor)})
    task.set_uniform(lambda rows, *shape: torch.rand(rows, *shape, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert needed == pytest.approx(torch.cuda.max_memory_allocated() - workspaces, rel=0.2)


def test_the_phases_of_a_run_are_counted_each() -> None:
    """Contrast alone costs less than all losses; an image encoder that stands still less than one that learns."""
    alone, every = StepSimulation(*parts(contrast_first=0.25), "32-true").work(8)
    assert (alone.share, every.share) == (0.25, 0.75)
    assert alone.flops < every.flops
    learning, still = StepSimulation(*parts(image_learns=0.4), "32-true").work(8)
    assert (learning.share, still.share) == (0.4, 0.6)
    assert still.flops < learning.flops
    (whole,) = StepSimulation(*parts(), "32-true").work(8)
    assert (whole.share, whole.flops) == (1.0, learning.flops)
    assert whole.flops == every.flops
