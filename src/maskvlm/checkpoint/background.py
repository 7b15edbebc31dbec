"""Writes checkpoints while training continues, each from a snapshot of the state in host memory.

Lightning's `AsyncCheckpointIO` copies on the device, queues any number of copies, and reports a failure at the next
save or at the end. Here there are at most two snapshots, and a failure is reported when the caller asks.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, LifoQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskvlm.checkpoint.content import leaves_of

SNAPSHOTS = 2  # one being written, one waiting


class Room(NamedTuple):
    """Memory that a copy of a storage needs. bytes: size in host memory. pinned: whether the storage is on a GPU."""

    bytes: int
    pinned: bool

    @classmethod
    def of(cls, value: Tensor) -> "Room":
        return cls(value.untyped_storage().nbytes(), value.is_cuda)

    def buffer(self) -> Tensor:
        """An uninitialised buffer of this size."""
        return torch.empty(self.bytes, dtype=torch.uint8, pin_memory=self.pinned)


class Snapshot:
    """Host memory for a copy of a run's state; pinned where the state is on a GPU.

    It is reused for the next copy, as allocating it takes several times as long as filling it.

    Attributes:
        buffers: one for each storage of the state.
    """

    def __init__(self) -> None:
        self.buffers: dict[Room, list[Tensor]] = {}

    def reserve(self, rooms: Iterable[Room]) -> None:
        """Allocate memory before there is anything to copy."""
        for room in rooms:
            # Written to, as the system allocates pages only on first use.
            self.buffers.setdefault(room, []).append(room.buffer().zero_())

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a state.

        Args:
            content: tensors and plain types.

        Returns:
            An equal state that later changes do not affect, valid until the next call. Tensors that share memory share
            it in the copy as well, so that the file does not grow.
        """
        # Buffers that this copy does not use are freed at its end.
        spare, self.buffers = self.buffers, defaultdict(list)
        buffers: dict[int, Tensor] = {}  # by the address of the storage that they copy
        copies: dict[int, Any] = {}  # by the `id` of a tensor: what `deepcopy` uses in its place
        for _, value in leaves_of(content):
            if isinstance(value, Tensor):
                address = value.untyped_storage().data_ptr()
                if address not in buffers:
                    buffers[address] = self._copied(value, spare.get(Room.of(value), []))
                # The buffer viewed in the same way as the tensor views its storage.
                view = torch.empty(0, dtype=value.dtype)
                view.set_(buffers[address].untyped_storage(), value.storage_offset(), value.shape, value.stride())
                copies[id(value)] = view
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # wait for copies to pinned memory
        return copy.deepcopy(dict(content), copies)

    def _copied(self, value: Tensor, spare: list[Tensor]) -> Tensor:
        """A copy of the tensor's whole storage, in a spare buffer or in a new one."""
        room = Room.of(value)
        buffer = spare.pop() if spare else room.buffer()
        self.buffers[room].append(buffer)
        whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
        return buffer.copy_(whole, non_blocking=value.is_cuda)


class BackgroundWriter:
    """Runs actions in the background, in order. `check` and `finish` raise their errors in the caller.

    Each action has its own thread, which ends with it. A thread that has computed keeps its own OpenMP threads. While
    there are more of those than cores, the training's threads sleep between two operations instead of spinning, which
    doubles the time of a step with thousands of operations (libgomp's throttled spin count).
    """

    def __init__(self) -> None:
        # Last in, first out: the second snapshot allocates its memory only when two are needed at once.
        self.free: LifoQueue[Snapshot] = LifoQueue()
        for _ in range(SNAPSHOTS):
            self.free.put(Snapshot())
        self.pending: deque[Future[None]] = deque()
        self.failed = False

    def reserve(self, values: Iterable[Tensor]) -> None:
        """Allocate the memory of a first snapshot of these tensors, with the storages they share, in the background."""
        rooms = {value.untyped_storage().data_ptr(): Room.of(value) for value in values}
        self.run(self._reserve, list(rooms.values()))

    def _reserve(self, rooms: list[Room]) -> None:
        try:
            # Does not wait for one: only this thread returns them.
            snapshot = self.free.get_nowait()
        except Empty:
            return
        try:
            snapshot.reserve(rooms)
        finally:
            self.free.put(snapshot)

    def save(self, write: Callable[[dict[str, Any]], None], content: Mapping[str, Any]) -> None:
        """Write a snapshot of the content in the background; waits if two snapshots are still unwritten.

        Raises: the error of an earlier write that failed.
        """
        self.check()
        snapshot = self.free.get()
        try:
            content_copy = snapshot.take(content)
        except BaseException:
            self.free.put(snapshot)
            raise
        self.run(self._write, write, content_copy, snapshot)

    def _write(self, write: Callable[[dict[str, Any]], None], content_copy: dict[str, Any], snapshot: Snapshot) -> None:
        try:
            write(content_copy)
        finally:
            self.free.put(snapshot)

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Run an action in the background, after those that were queued before."""
        before = [self.pending[-1]] if self.pending else []

        def in_turn() -> None:
            wait(before)
            action(*args)

        with_own_thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending.append(with_own_thread.submit(in_turn))
        # Accepts no more actions; the one submitted still runs.
        with_own_thread.shutdown(wait=False)

    def check(self) -> None:
        """Raise the error of an action that has failed since the last call. As a full disk makes all of them fail, only
        the first failure is ever raised."""
        while self.pending and self.pending[0].done():
            error = self.pending.popleft().exception()
            if error is not None and not self.failed:
                self.failed = True
                raise error

    def finish(self) -> None:
        """Wait for all actions; raises as `check`."""
        wait(self.pending)
        self.check()

    def close(self) -> None:
        """Wait for all actions, and raise nothing. The last call to make."""
        wait(self.pending)
