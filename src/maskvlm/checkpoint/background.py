"""Writes checkpoints while the training goes on, each from a snapshot of the state in host memory.

Lightning's `AsyncCheckpointIO` copies on the device, lets any number of copies wait, and tells of a failure at the next
save or at the end. Here two snapshots are all there are, and a failure is told when the caller asks.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import LifoQueue
from typing import Any

import torch
from torch import Tensor

from maskvlm.checkpoint.content import leaves_of

SNAPSHOTS = 2  # one is written, one waits


class Snapshot:
    """Host memory for a copy of a run's state; pinned where the state lies on a GPU.

    It is kept for the next copy, as getting it from the system takes several times as long as filling it.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []  # bytes, one buffer for each storage of the state, in its order

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a state.

        Args:
            content: tensors and plain types.

        Returns:
            An equal one that later changes of the state do not reach, valid until the next call. Tensors that share
            memory share it there as well, so that the file does not grow.
        """
        buffers: dict[int, Tensor] = {}  # by the address of what they are a copy of
        copies: dict[int, Any] = {}  # by the `id` of a tensor: what `deepcopy` takes in its place
        for _, value in leaves_of(content):
            if isinstance(value, Tensor):
                address = value.untyped_storage().data_ptr()
                if address not in buffers:
                    buffers[address] = self._copied(value, len(buffers))
                # The same view of the buffer as the tensor is of its storage.
                view = torch.empty(0, dtype=value.dtype)
                view.set_(buffers[address].untyped_storage(), value.storage_offset(), value.shape, value.stride())
                copies[id(value)] = view
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies to pinned memory are under way
        return copy.deepcopy(dict(content), copies)

    def _copied(self, value: Tensor, place: int) -> Tensor:
        """All bytes of the tensor's storage, in the buffer of that place, which is made where none of the size is."""
        storage = value.untyped_storage()
        if place == len(self.buffers) or self.buffers[place].nbytes != storage.nbytes():
            made = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=value.is_cuda)
            self.buffers[place : place + 1] = [made]
        whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
        return self.buffers[place].copy_(whole, non_blocking=value.is_cuda)


class BackgroundWriter:
    """One thread that does what it is told, in order. Its errors are raised by `check` and `finish`, in the caller."""

    def __init__(self) -> None:
        # The last one that was given back comes first: the second gets its memory when two are needed at once.
        self.free: LifoQueue[Snapshot] = LifoQueue()
        for _ in range(SNAPSHOTS):
            self.free.put(Snapshot())
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: deque[Future[None]] = deque()
        self.failed = False

    def save(self, write: Callable[[dict[str, Any]], None], content: Mapping[str, Any]) -> None:
        """Have a snapshot of the content written; waits for the first of two that are not written yet.

        Raises: what an earlier write has failed with.
        """
        self.check()
        snapshot = self.free.get()
        try:
            taken = snapshot.take(content)
        except BaseException:
            self.free.put(snapshot)
            raise
        self.run(self._write, write, taken, snapshot)

    def _write(self, write: Callable[[dict[str, Any]], None], taken: dict[str, Any], snapshot: Snapshot) -> None:
        try:
            write(taken)
        finally:
            self.free.put(snapshot)

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Have something done after what was told before."""
        self.pending.append(self.thread.submit(action, *args))

    def check(self) -> None:
        """Raise what has failed since the last call. A disk that is full fails all: the first failure alone is told."""
        while self.pending and self.pending[0].done():
            error = self.pending.popleft().exception()
            if error is not None and not self.failed:
                self.failed = True
                raise error

    def finish(self) -> None:
        """Wait until all is done; raises as `check`."""
        wait(self.pending)
        self.check()

    def close(self) -> None:
        """No more after this; waits, and raises nothing."""
        self.thread.shutdown()
