"""The only use of torch.distributed in the core: gathering with gradients, counts averaged over processes, and random
draws that are the same for any number of processes. Without a process group every function is the identity."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(x_B: Tensor) -> Tensor:
    """Rows of all processes in rank order, [world * B, ...]; gradients flow back to their owners.

    Every process must hold the same shape.
    """
    if world_size() == 1:
        return x_B
    # Integers have no gradient.
    if not x_B.is_floating_point():
        parts = [torch.empty_like(x_B) for _ in range(world_size())]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)  # world x [B, ...] -> [world * B, ...]
    from torch.distributed.nn.functional import all_gather

    # In the backward pass each process gets the sum over all processes of the gradients for its rows.
    return torch.cat(all_gather(x_B.contiguous()))


class RowExchange:
    """Exchanges rows of the global batch, with gradients: each process gets the rows it requests, none gets all.

    No host waits: the number of rows sent from one process to another is fixed in advance, slightly above an even share
    (`most_rows`). Requests to one process beyond that are not served. Where `arrived_M` is False the row is a different
    one and must not be used.

    Args:
        index_M: int64 indices of the requested rows, counted over all processes in rank order. An index beyond all
            rows requests nothing.
        own: number of rows held by this process; it is the same in every process, as is the number of requests.
    """

    def __init__(self, index_M: Tensor, own: int) -> None:
        world = world_size()
        self.slots = most_rows(len(index_M), world)
        peer_M = index_M // own
        # (M, W): the rows requested from each process take its slots in order.
        of_peer_MW = peer_M[:, None] == torch.arange(world, device=index_M.device)
        slot_M = (of_peer_MW.cumsum(0) * of_peer_MW).sum(1) - 1
        self.arrived_M = (slot_M >= 0) & (slot_M < self.slots)
        self.place_M = torch.where(self.arrived_M, peer_M * self.slots + slot_M, 0)
        # One extra slot for rows that do not arrive; unused slots request row 0.
        requests = index_M.new_zeros(world * self.slots + 1)
        requests = requests.scatter(0, torch.where(self.arrived_M, self.place_M, world * self.slots), index_M % own)
        # The requests of the others to this process, in rank order.
        self.peer_requests: Tensor = _Swap.apply(requests[:-1].contiguous())

    def __call__(self, rows_BLD: Tensor) -> Tensor:
        """The requested rows of `rows_BLD` over all processes, [M, ...]; floats are sent in autocast's dtype."""
        sent = rows_BLD.index_select(0, self.peer_requests)
        kind, device = sent.dtype, sent.device.type
        if kind == torch.bool:
            sent = sent.to(torch.uint8)
        elif kind == torch.float32 and torch.is_autocast_enabled(device):
            sent = sent.to(torch.get_autocast_dtype(device))
        received: Tensor = _Swap.apply(sent.contiguous())
        return received.index_select(0, self.place_M).to(kind)


def most_rows(wanted: int, world: int) -> int:
    """Maximum number of rows that one process gets from another: the even share of `wanted`, plus two standard
    deviations of a fair draw, plus one row."""
    share = wanted / world
    return min(wanted, math.ceil(share + 2 * math.sqrt(share) + 1))


class _Swap(torch.autograd.Function):
    """Sends the n-th of W equal parts to process n; its gradient comes back in the backward pass."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        swapped = torch.empty_like(parts)
        dist.all_to_all_single(swapped, parts)
        return swapped

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        returned: Tensor = _Swap.apply(gradient[0].contiguous())
        return returned


def shared_count(count: Tensor) -> Tensor:
    """Mean of a count over processes.

    A sum of losses divided by it and averaged over processes (as DDP averages gradients) is the mean over the
    whole global batch, even if processes have different numbers of masked tokens.
    """
    if world_size() == 1:
        return count
    # all_reduce works in place, and the count belongs to the caller.
    total = count.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def without_gradient(compute: Callable[[], Tensor], *parts: nn.Module) -> Tensor:
    """Compute a value without gradient or saved activations. With several processes, each parameter of `parts`, which
    `compute` uses, still gets a gradient of zeros, because DDP waits for one. (Sharded parameters do not, as FSDP does
    not wait.)"""
    with torch.no_grad():
        value = compute()
    learning = [each for part in parts for each in part.parameters() if each.requires_grad]
    whole = [] if world_size() == 1 else [each for each in learning if not isinstance(each, DTensor)]
    # An empty sum: 0, with a gradient of zeros for every tensor in it.
    return value + torch.cat([each.flatten()[:0] for each in whole]).sum() if whole else value


def gather_objects(value: object) -> list[object]:
    """Any picklable value from every process, in rank order; for evaluation, where shards differ in size."""
    if world_size() == 1:
        return [value]
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class Draw:
    """Uniform random numbers of one step, float32: drawn for the global batch, cut to this process's rows.

    Masks and negatives depend on (seed, step) alone, not on how many processes share the batch.

    Args:
        seed: of the run.
        step: number of the step.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, step: int, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(mix(seed, step))

    def __call__(self, rows: int, *shape: int) -> Tensor:
        # Every process draws for all, so that the generators stay in step. [world * B, ...] -> [B, ...]
        return self.local(rows * world_size(), *shape)[rank() * rows : (rank() + 1) * rows]

    def local(self, rows: int, *shape: int) -> Tensor:
        """Random numbers for this process only; for evaluations, where processes have different numbers of rows."""
        # In pure bfloat16 Lightning changes the default dtype: its 8 bits cause ties, and the first of a tie is taken.
        return torch.rand(rows, *shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)


def same_everywhere(uniform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Draws the same numbers in every process, as many as one process would, if `uniform` is a `Draw`; any other source
    is returned as is."""
    return uniform.local if isinstance(uniform, Draw) else uniform


def mix(*values: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps: nearby seeds give unrelated streams)."""
    # Python's integers are unbounded: the mask keeps each product within 64 bits.
    state, mask = 0, 2**64 - 1
    for value in values:
        state = ((state ^ (value & mask)) + 0x9E3779B97F4A7C15) & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
