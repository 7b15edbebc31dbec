"""Writes checkpoints while the training goes on, each from a snapshot of the state in host memory.

Lightning's `AsyncCheckpointIO` copies on the device, lets any number of copies wait, and tells of a failure at the next
save or at the end. Here two snapshots are all there are, and a failure is told when the caller asks.
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

SNAPSHOTS = 2  # one is written, one waits


class Room(NamedTuple):
    """What the copy of a storage needs. bytes: of host memory. pinned: as the storage lies on a GPU."""

    bytes: int
    pinned: bool

    @classmethod
    def of(cls, value: Tensor) -> "Room":
        return cls(value.untyped_storage().nbytes(), value.is_cuda)

    def buffer(self) -> Tensor:
        """Bytes that mean nothing yet."""
        return torch.empty(self.bytes, dtype=torch.uint8, pin_memory=self.pinned)


class Snapshot:
    """Host memory for a copy of a run's state; pinned where the state lies on a GPU.

    It is kept for the next copy, as getting it from the system takes several times as long as filling it.

    Attributes:
        buffers: one for each storage of the state.
    """

    def __init__(self) -> None:
        self.buffers: dict[Room, list[Tensor]] = {}

    def reserve(self, rooms: Iterable[Room]) -> None:
        """Get memory from the system before there is anything to copy."""
        for room in rooms:
            # Written to: until then the system has only promised it.
            self.buffers.setdefault(room, []).append(room.buffer().zero_())

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a state.

        Args:
            content: tensors and plain types.

        Returns:
            An equal one that later changes of the state do not reach, valid until the next call. Tensors that share
            memory share it there as well, so that the file does not grow.
        """
        # What this copy has no use for is given up at its end.
        spare, self.buffers = self.buffers, defaultdict(list)
        buffers: dict[int, Tensor] = {}  # by the address of what they are a copy of
        copies: dict[int, Any] = {}  # by the `id` of a tensor: what `deepcopy` takes in its place
        for _, value in leaves_of(content):
            if isinstance(value, Tensor):
                address = value.untyped_storage().data_ptr()
                if address not in buffers:
                    buffers[address] = self._copied(value, spare.get(Room.of(value), []))
                # The same view of the buffer as the tensor is of its storage.
                view = torch.empty(0, dtype=value.dtype)
                view.set_(buffers[address].untyped_storage(), value.storage_offset(), value.shape, value.stride())
                copies[id(value)] = view
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies to pinned memory are under way
        return copy.deepcopy(dict(content), copies)

    def _copied(self, value: Tensor, spare: list[Tensor]) -> Tensor:
        """All bytes of the tensor's storage, in one of the spare buffers, or in one that is made."""
        room = Room.of(value)
        buffer = spare.pop() if spare else room.buffer()
        self.buffers[room].append(buffer)
        whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
        return buffer.copy_(whole, non_blocking=value.is_cuda)


class BackgroundWriter:
    """Does what it is told beside the caller, in order. Errors are raised by `check` and `finish`, in the caller.

    Each action has a thread of its own, which ends with it. A thread that has computed keeps OpenMP threads of its own;
    while there are more of them than cores, those of the training sleep between two operations instead of waiting for
    the next one, which doubles the time of a step that has thousands (libgomp's throttled spin count).
    """

    def __init__(self) -> None:
        # The last one that was given back comes first: the second gets its memory when two are needed at once.
        self.free: LifoQueue[Snapshot] = LifoQueue()
        for _ in range(SNAPSHOTS):
            self.free.put(Snapshot())
        self.pending: deque[Future[None]] = deque()
        self.failed = False

    def reserve(self, values: Iterable[Tensor]) -> None:
        """Have the memory of a first snapshot of these, and what they share it with, made in the background."""
        rooms = {value.untyped_storage().data_ptr(): Room.of(value) for value in values}
        self.run(self._reserve, list(rooms.values()))

    def _reserve(self, rooms: list[Room]) -> None:
        try:
            # Not one that is waited for: this thread alone gives them back.
            snapshot = self.free.get_nowait()
        except Empty:
            return
        try:
            snapshot.reserve(rooms)
        finally:
            self.free.put(snapshot)

    def save(self, write: Callable[[dict[str, Any]], None], content: Mapping[str, Any]) -> None:
        """Have a snapshot of the content written; waits for the first of two that are not written yet.

        Raises: what an earlier write has failed with.
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
        """Have something done after what was told before."""
        before = [self.pending[-1]] if self.pending else []

        def in_turn() -> None:
            wait(before)
            action(*args)

        with_own_thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending.append(with_own_thread.submit(in_turn))
        # Takes nothing more; what it was given is done.
        with_own_thread.shutdown(wait=False)

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
        wait(self.pending)
