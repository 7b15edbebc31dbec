"""What a training step takes of a card's memory and how much it computes, known before the first one.

A step of the very model and task is made on fake tensors (torch's FakeTensorMode), which have shapes and types but no
values: it takes seconds and no memory, and no card. They are fake tensors of a CPU, as autograd knows no others without
a card: at base size autocast's rules there give 2 % more than CUDA's (`tests/gpu_sim`). Not in the number: the CUDA
context, workspaces of matrix products, and fragments of the allocator, for which `SHARE` leaves room.

Shapes: B pairs of one process.
"""

import bisect
import copy
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from maskvlm.data.batch import Batch
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import ExitCode, UserError

SHARE = 0.9  # of a card that a step may take by this estimate
BLOCK = 512  # bytes; CUDA's allocator hands out multiples of them
SMALLEST = 8  # pairs; the first chunk that is tried
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}
"""Precisions of a trainer that can be simulated."""
GIB = 2**30
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION = {
    FLASH: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    FLASH_BACKWARD: lambda out, query, key, value, *_, **__: sdpa_backward_flop_count(out, query, key, value),
}
"""A CPU's kernels, which torch's counter of operations does not know; it hands on shapes."""


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive.

    Not torch's own `MemTracker`, which takes a snapshot at each module: forty times as slow at base size, and the same
    peak.

    Attributes:
        now, peak: bytes.
        launched: operations that a card would have a kernel for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.launched += func.namespace == "aten" and not func.is_view
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.count(x)
        return out

    def count(self, x: Tensor) -> None:
        """Count the storage of `x` until nothing holds it any more."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:  # a view
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class Simulated(nn.Module):
    """Backbone and task, which make a step together."""

    def __init__(self, backbone: MaskVLM, task: Task) -> None:
        super().__init__()
        self.backbone, self.task = backbone, task

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the losses."""
        return torch.stack(list(self.task(self.backbone, batch).values())).sum()


class StepWork(NamedTuple):
    """Work of one process in one pass, in one phase of a run.

    Attributes:
        share: of the run's steps, 0 to 1.
        pairs: B.
        flops: floating-point operations of matrix products for each pair, forwards and backwards.
        launched: kernels that the whole step launches.
    """

    share: float
    pairs: int
    flops: float
    launched: int


class StepSimulation:
    """Training steps of a model that is left as it is; its tensors may be on the meta device.

    Args:
        backbone, task: as a run has them; the task takes pairs.
        precision: of the trainer, one of AUTOCAST.
        captions: of an image.
    """

    def __init__(self, backbone: MaskVLM, task: Task, precision: str, captions: int = 1) -> None:
        self.model = Simulated(backbone, task)
        self.kind, self.captions = AUTOCAST[precision], captions
        # Where ITC is alone at first (model.task.contrast_first), or the image encoder learns at first alone.
        first = task.late(backbone).share
        # Progress of a run within a phase -> the phase's share of its steps.
        self.phases = {0.0: first, 1.0: 1 - first} if first else {1.0: 1.0}

    @property
    def gradient_bytes(self) -> int:
        """Memory of the gradients of all trained parameters, in bytes."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    @property
    def state_bytes(self) -> int:
        """What stays from step to step: parameters, buffers, gradients and AdamW's two moments."""
        own = sum(x.numel() * x.element_size() for x in (*self.model.parameters(), *self.model.buffers()))
        return own + 3 * self.gradient_bytes

    def memory(self, pairs: int, chunk: int | None = None) -> int:
        """Bytes at the fullest moment of a step of B = `pairs`.

        Raises:
            UserError: the task does not compute in chunks.
            Exception: whatever a plug-in's code says where it asks for a value.
        """
        if chunk is not None and pairs > 3 * chunk:
            # Memory is affine in the number of chunks: what is kept of each are its features.
            two, three = self.memory(2 * chunk, chunk), self.memory(3 * chunk, chunk)
            return two + round((pairs / chunk - 2) * (three - two))
        return max(self._peak(pairs, chunk, progress) for progress in self.phases)

    def largest_chunk(self, pairs: int, room: float) -> int | None:
        """The largest of 8, 16, 32, ... pairs, below B, in chunks of which a step takes at most `room` bytes."""
        # Memory grows with the chunk, and for a given one by the same with every further pair. It is no straight line
        # in the chunk: in small ones the gradients of all parameters are the fullest moment.
        chunks = list(chunks_below(pairs))
        if not chunks:
            return None
        middle = chunks[len(chunks) // 2]
        each = (self.memory(3 * middle, middle) - self.memory(2 * middle, middle)) / middle
        fitting = bisect.bisect_right(
            chunks, room, key=lambda chunk: self.memory(2 * chunk, chunk) + (pairs - 2 * chunk) * each
        )
        return chunks[fitting - 1] if fitting else None

    def work(self, pairs: int, chunk: int | None = None) -> tuple[StepWork, ...]:
        """What a step of B = `pairs` computes in each phase of a run. Raises as `memory`."""
        return tuple(self._work(pairs, chunk, progress) for progress in self.phases)

    def _work(self, pairs: int, chunk: int | None, progress: float) -> StepWork:
        few = min(pairs, 16 if chunk is None else 2 * chunk)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = self._faked(mode, chunk, progress)
        with mode:
            batch = self._batch(few)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, LiveBytes() as live:
                self._forward(model, batch).backward()
        # As many kernels for any number of pairs, but in chunks for each of them.
        launched = live.launched if chunk is None else round(live.launched * pairs / few)
        return StepWork(self.phases[progress], pairs, counter.get_total_flops() / few, launched)

    def _peak(self, pairs: int, chunk: int | None, progress: float) -> int:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = self._faked(mode, chunk, progress)
        with mode:
            batch = self._batch(pairs)
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            moments = [torch.empty_like(parameter) for parameter in learned for _ in range(2)]
            # Those of the step before are there until the forward pass has been made (Lightning's order).
            for parameter in learned:
                parameter.grad = torch.empty_like(parameter)
            gradients = [parameter.grad for parameter in learned]
            live = LiveBytes()
            for x in (*model.parameters(), *model.buffers(), *moments, *gradients, *batch):
                if isinstance(x, Tensor):
                    live.count(x)
            del gradients, x
            with live:
                loss = self._forward(model, batch)
                for parameter in learned:
                    parameter.grad = None
                loss.backward()
        return live.peak

    def _forward(self, model: Simulated, batch: Batch) -> Tensor:
        with torch.autocast("cpu", self.kind, enabled=self.kind is not None):
            loss: Tensor = model(batch)
        return loss

    def _faked(self, mode: FakeTensorMode, chunk: int | None, progress: float) -> Simulated:
        """A copy of the model with fake tensors, in training."""
        faked: dict[int, Any] = {}
        with mode:
            for parameter in self.model.parameters():
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                faked[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
            for buffer in self.model.buffers():
                faked[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        # The data may have yet to train the tokenizer; a step asks it for three numbers and for the ids of phrases.
        text = self.model.backbone.text
        tokens = SimpleNamespace(
            mask_token_id=0, pad_token_id=text.config.pad_token_id or 0, unk_token_id=None, encode=lambda *_, **__: [1]
        )
        if text.tokenizer is not None:
            faked[id(text.tokenizer)] = tokens
        # Outside of the mode, in which what is no parameter or buffer could not be copied.
        model: Simulated = copy.deepcopy(self.model, faked).train()
        model.backbone.text.tokenizer = tokens  # type: ignore[assignment]
        model.task.set_uniform(lambda rows, *shape: torch.rand(rows, *shape))
        model.task.run_progress = progress
        if chunk is not None:
            model.task.compute_in_chunks(chunk)
        return model

    def _batch(self, pairs: int) -> Batch:
        """Pairs with the longest texts."""
        backbone, texts = self.model.backbone, pairs * self.captions
        length, size = backbone.text.text_length, backbone.image.image_size
        number_B = torch.arange(pairs)
        there_CT = torch.ones(texts, length, dtype=torch.bool)
        token_CT = torch.ones(texts, length, dtype=torch.long)
        return Batch(
            torch.zeros(pairs, 3, size, size), token_CT, there_CT, ~there_CT, torch.zeros_like(token_CT),
            number_B.repeat_interleave(self.captions), number_B, torch.arange(texts),
            torch.ones(pairs, dtype=torch.bool), number_B,
        )  # fmt: skip


def chunks_below(pairs: int) -> Iterator[int]:
    """8, 16, 32, ... below B."""
    chunk = SMALLEST
    while chunk < pairs:
        yield chunk
        chunk *= 2


class MemoryEstimate(NamedTuple):
    """Memory that a training step takes on one card, in bytes.

    Attributes:
        pairs: of one process in one pass.
        needed: memory at the fullest moment of the step.
        state: the part of `needed` that stays from step to step.
        card: GPU memory.
        chunk: a chunk that fits where the configured step does not; None: the step fits, or no chunk does.
    """

    pairs: int
    needed: int
    state: int
    card: int
    chunk: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the step fits the card, with room for what is not in the estimate."""
        return self.needed <= SHARE * self.card

    def __str__(self) -> str:
        sentence = f"a step of {self.pairs:,} pairs needs about {self.needed / GIB:.1f} GiB (simulated), the GPU has"
        return f"{sentence} {self.card / GIB:.1f}"

    @property
    def todo(self) -> str:
        """What to do; "" where it fits."""
        if self.fits:
            return ""
        if self.chunk is not None:
            return f"add --model.chunk {self.chunk}"
        return "lower data.batch_size, use more GPUs, or recompute activations (checkpointing, see conf/model/large)"

    def check(self) -> None:
        """Raises UserError (69) where the card cannot even hold what stays from step to step."""
        if self.state > self.card:
            what = f"parameters, gradients and AdamW's moments take {self.state / GIB:.1f} GiB"
            what += f", the GPU has {self.card / GIB:.1f}"
            raise UserError("GPU memory", what, "Use a smaller model or a larger GPU", ExitCode.UNAVAILABLE)


def copies_gradients(strategy: Any) -> bool:
    """Whether DDP keeps a copy of the gradients to send; with `gradient_as_bucket_view` they are what it sends.

    Args:
        strategy: Lightning's, its name, or how a configuration builds it.
    """
    arguments = getattr(strategy, "_ddp_kwargs", None) or getattr(strategy, "init_args", None) or {}
    return not arguments.get("gradient_as_bucket_view", False)


def estimate_memory(
    simulation: StepSimulation, pairs: int, chunk: int | None, card: int, copied: bool = False
) -> MemoryEstimate:
    """What a step needs, and the chunk that makes it fit where it does not.

    Args:
        pairs: of one process in one pass.
        chunk: as configured (`model.chunk`).
        card: bytes.
        copied: a second copy of the gradients is kept to send, see `copies_gradients`.

    Raises:
        Exception: as `StepSimulation.memory`.
    """
    more = simulation.gradient_bytes if copied else 0
    needed = simulation.memory(pairs, chunk) + more
    estimate = MemoryEstimate(pairs, needed, simulation.state_bytes + more, card)
    if estimate.fits:
        return estimate
    try:
        return estimate._replace(chunk=simulation.largest_chunk(pairs, SHARE * card - more))
    except UserError:  # the task, or one of its losses, does not compute in chunks
        return estimate
