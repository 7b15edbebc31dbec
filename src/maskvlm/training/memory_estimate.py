"""Estimates the GPU memory and compute of a training step before the first one.

A step of the actual model and task is run on fake tensors (torch's FakeTensorMode), which have shapes and types but no
values: it takes seconds, no memory and no GPU. They are fake CPU tensors, as autograd supports no others without a GPU;
at base size autocast's rules there give 2 % more than CUDA's (`tests/gpu_sim`). Not included: the CUDA context,
workspaces of matrix products, and fragmentation of the allocator, for which `SHARE` leaves room.

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

SHARE = 0.9  # of a GPU's memory that a step may take by this estimate
BLOCK = 512  # bytes; CUDA's allocator rounds up to multiples of this
SMALLEST = 8  # pairs; the first chunk size to try
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}
"""Trainer precisions that can be simulated."""
GIB = 2**30
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION = {
    FLASH: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    FLASH_BACKWARD: lambda out, query, key, value, *_, **__: sdpa_backward_flop_count(out, query, key, value),
}
"""FLOP formulas of the CPU kernels, which torch's FLOP counter does not know; it passes them shapes."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive.

    Torch's own `MemTracker` takes a snapshot at each module: it is forty times as slow at base size, for the same peak.

    Attributes:
        now, peak: bytes.
        launched: operations for which a GPU would launch a kernel.
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
        """Count the storage of `x` until it is freed."""
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
    """Backbone and task as one module, which together compute a step."""

    def __init__(self, backbone: MaskVLM, task: Task) -> None:
        super().__init__()
        self.backbone, self.task = backbone, task

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the losses."""
        return torch.stack(list(self.task(self.backbone, batch).values())).sum()


class StepWork(NamedTuple):
    """Work of one process in one pass, in one phase of a run.

    Attributes:
        share: the phase's share of the run's steps, 0 to 1.
        pairs: B.
        flops: floating-point operations of matrix products per pair, forward and backward.
        launched: kernels launched by the whole step.
    """

    share: float
    pairs: int
    flops: float
    launched: int


class StepSimulation:
    """Simulates training steps of a model without changing it; its tensors may be on the meta device.

    Args:
        backbone, task: as in a run; the task takes pairs.
        precision: the trainer's precision, one of AUTOCAST.
        captions: captions per image.
    """

    def __init__(self, backbone: MaskVLM, task: Task, precision: str, captions: int = 1) -> None:
        self.model = Simulated(backbone, task)
        self.kind, self.captions = AUTOCAST[precision], captions
        # ITC alone at first (model.task.contrast_first), or the image encoder trained only at first.
        first = task.training_phases(backbone).share
        # Run progress within a phase -> the phase's share of the steps.
        self.phases = {0.0: first, 1.0: 1 - first} if first else {1.0: 1.0}

    @property
    def gradient_bytes(self) -> int:
        """Memory of the gradients of all trained parameters, in bytes."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    @property
    def state_bytes(self) -> int:
        """Memory that persists between steps, in bytes: parameters, buffers, gradients and AdamW's two moments."""
        own = sum(x.numel() * x.element_size() for x in (*self.model.parameters(), *self.model.buffers()))
        return own + 3 * self.gradient_bytes

    def memory(self, pairs: int, chunk: int | None = None) -> int:
        """Peak memory of a step of B = `pairs`, in bytes.

        Raises:
            UserError: the task does not support chunks.
            Exception: anything that a plug-in's code raises when it needs a tensor's value.
        """
        if chunk is not None and pairs > 3 * chunk:
            # Memory is affine in the number of chunks: only the features of each are kept.
            two, three = self.memory(2 * chunk, chunk), self.memory(3 * chunk, chunk)
            return two + round((pairs / chunk - 2) * (three - two))
        return max(self._peak(pairs, chunk, progress) for progress in self.phases)

    def largest_chunk(self, pairs: int, room: float) -> int | None:
        """The largest chunk of 8, 16, 32, ... pairs, below B, with which a step takes at most `room` bytes; None if
        there is none. Raises like `memory`."""
        # Memory grows with the chunk and, for a given chunk, linearly with the pairs. It is not linear in the chunk:
        # with small chunks the peak comes from the gradients of all parameters.
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
        """Work of a step of B = `pairs` in each phase of a run. Raises like `memory`."""
        return tuple(self._work(pairs, chunk, progress) for progress in self.phases)

    def _work(self, pairs: int, chunk: int | None, progress: float) -> StepWork:
        few = min(pairs, 16 if chunk is None else 2 * chunk)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = self._faked(mode, chunk, progress)
        with mode:
            batch = self._batch(few)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, LiveBytes() as live:
                self._forward(model, batch).backward()
        # The number of kernels does not depend on the number of pairs, except that each chunk launches its own.
        launched = live.launched if chunk is None else round(live.launched * pairs / few)
        return StepWork(self.phases[progress], pairs, counter.get_total_flops() / few, launched)

    def _peak(self, pairs: int, chunk: int | None, progress: float) -> int:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = self._faked(mode, chunk, progress)
        with mode:
            batch = self._batch(pairs)
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            moments = [torch.empty_like(parameter) for parameter in learned for _ in range(2)]
            # The previous step's gradients stay until the forward pass has been made (Lightning's order).
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
        """A copy of the model with fake tensors, in training mode."""
        faked: dict[int, Any] = {}
        with mode:
            for parameter in self.model.parameters():
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                faked[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
            for buffer in self.model.buffers():
                faked[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        # The tokenizer may not be trained yet; a step needs only three ids and the ids of phrases from it.
        text = self.model.backbone.text
        tokens = SimpleNamespace(
            mask_token_id=0, pad_token_id=text.config.pad_token_id or 0, unk_token_id=None, encode=lambda *_, **__: [1]
        )
        if text.tokenizer is not None:
            faked[id(text.tokenizer)] = tokens
        # Outside the mode, in which only parameters and buffers could be copied.
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
    """Memory that a training step takes on one GPU, in bytes.

    Attributes:
        pairs: pairs of one process in one pass.
        needed: peak memory of the step.
        state: the part of `needed` that persists between steps.
        card: memory of the GPU.
        chunk: a chunk that fits if the configured step does not; None: the step fits, or no chunk does.
    """

    pairs: int
    needed: int
    state: int
    card: int
    chunk: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the step fits on the GPU, with room for what the estimate leaves out."""
        return self.needed <= SHARE * self.card

    def __str__(self) -> str:
        sentence = f"a step of {self.pairs:,} pairs needs about {self.needed / GIB:.1f} GiB (simulated), the GPU has"
        return f"{sentence} {self.card / GIB:.1f}"

    @property
    def todo(self) -> str:
        """What to do; "" if the step fits."""
        if self.fits:
            return ""
        if self.chunk is not None:
            return f"add --model.chunk {self.chunk}"
        return "lower data.batch_size, use more GPUs, or recompute activations (checkpointing, see conf/model/large)"

    def check(self) -> None:
        """Raise UserError (69) if the GPU cannot even hold the state that persists between steps."""
        if self.state > self.card:
            what = f"parameters, gradients and AdamW's moments take {self.state / GIB:.1f} GiB"
            what += f", the GPU has {self.card / GIB:.1f}"
            raise UserError("GPU memory", what, "Use a smaller model or a larger GPU", ExitCode.UNAVAILABLE)


def copies_gradients(strategy: Any) -> bool:
    """Whether DDP keeps a copy of the gradients to send; with `gradient_as_bucket_view` it sends them directly.

    Args:
        strategy: Lightning's strategy, its name, or its entry in a configuration.
    """
    arguments = getattr(strategy, "_ddp_kwargs", None) or getattr(strategy, "init_args", None) or {}
    return not arguments.get("gradient_as_bucket_view", False)


def estimate_memory(
    simulation: StepSimulation, pairs: int, chunk: int | None, card: int, copied: bool = False
) -> MemoryEstimate:
    """Estimate the memory that a step needs, and the chunk that makes it fit if it does not.

    Args:
        pairs: pairs of one process in one pass.
        chunk: as configured (`model.chunk`).
        card: memory of the GPU, in bytes.
        copied: whether a second copy of the gradients is kept to send, see `copies_gradients`.

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
    except UserError:  # the task, or one of its losses, does not support chunks
        return estimate
