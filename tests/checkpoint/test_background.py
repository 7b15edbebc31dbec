"""Checkpoints in the background: what is written is the state of the moment it was saved, in order, and no failure is
lost. That a kill in the middle loses nothing: `bench/kills.py --writes 100`."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.background import Snapshot
from maskvlm.checkpoint.io import load, save
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.utils.errors import ExitCode, UserError


def state(fill: float = 1.0) -> dict[str, Any]:
    """With two names for the same memory, and a view of a part of it."""
    weights = OrderedDict(a=torch.full((20, 10), fill), b=torch.arange(7))
    weights["tied"], weights["view"] = weights["a"], weights["a"][3:5, 1:]
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return {"state_dict": weights, "epoch": 3, "callbacks": {"k": [1, ("x", torch.zeros(0))]}}


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator["Writes"]:
    gated_writes = Writes(checkpoint._write)
    monkeypatch.setattr(checkpoint, "_write", gated_writes)
    yield gated_writes
    gated_writes.gate.release(100)


class Writes:
    """Each write waits to be let through; there is no space for a step below 0."""

    def __init__(self, write: Any) -> None:
        self.write, self.gate = write, threading.Semaphore(0)

    def __call__(self, content: dict[str, Any], path: Path) -> Any:
        assert self.gate.acquire(timeout=30)
        if content.get("global_step", 0) < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(content, path)


@pytest.fixture
def plugin() -> Iterator[SafeCheckpointIO]:
    checkpoint_io = SafeCheckpointIO()
    checkpoint_io.begin()
    yield checkpoint_io
    if checkpoint_io.writer is not None:
        checkpoint_io.writer.close()


def test_what_changes_after_a_save_is_not_in_the_file(tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO) -> None:
    """To the byte the file that a save in the foreground would have written."""
    before = state()
    plugin.save_checkpoint(before, tmp_path / "x.ckpt")
    before["state_dict"]["a"].zero_()
    before["state_dict"]["c"] = torch.ones(1)
    before["callbacks"]["k"].append(2)
    writes.gate.release(2)
    plugin.end()
    save(state(), tmp_path / "y" / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == (tmp_path / "y" / "x.ckpt").read_bytes()
    assert torch.equal(load(tmp_path / "x.ckpt")["state_dict"]["view"], torch.ones(2, 9))


def test_host_memory_is_used_again() -> None:
    snapshot = Snapshot()
    first = snapshot.take(state(1.0))["state_dict"]
    places = [value.data_ptr() for value in first.values()]
    second = snapshot.take(state(2.0))["state_dict"]
    assert [value.data_ptr() for value in second.values()] == places
    assert second["a"].unique().tolist() == [2.0]
    larger = snapshot.take({"state_dict": {"a": torch.ones(30, 10)}})["state_dict"]["a"]
    assert torch.equal(larger, torch.ones(30, 10))


@pytest.mark.gpu
def test_a_state_on_a_card_is_copied_to_pinned_memory() -> None:
    content = {"a": torch.rand(1000, 1000, device="cuda"), "step": torch.tensor(3.0)}
    snapshot = Snapshot().take(content)
    expected = content["a"].cpu()
    content["a"].zero_()
    assert snapshot["a"].is_pinned()
    assert torch.equal(snapshot["a"], expected)
    assert snapshot["step"] == 3.0


def test_two_wait_at_most_and_all_are_written_in_order(
    tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in (1, 2):
        plugin.save_checkpoint({"state_dict": {}, "global_step": step}, last, previous)
    third = threading.Thread(
        target=lambda: plugin.save_checkpoint({"state_dict": {}, "global_step": 3}, last, previous)
    )
    third.start()
    third.join(0.3)
    assert third.is_alive()  # the first is not on the disk yet
    assert not last.exists()
    writes.gate.release()
    third.join(30)
    assert not third.is_alive()
    assert load(last)["global_step"] == 1
    writes.gate.release(2)
    plugin.end()
    assert (load(last)["global_step"], load(previous)["global_step"]) == (3, 2)


def test_a_failed_write_is_told_once_and_what_was_there_stays(
    tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    writes.gate.release(100)
    for step in (1, 2, -1, -2):
        if step == -1:
            plugin.finish()
            writes.gate = threading.Semaphore(0)  # both are on their way before the first fails
        plugin.save_checkpoint({"state_dict": {}, "global_step": step}, last, previous)
    writes.gate.release(100)
    with pytest.raises(UserError, match=r"last\.ckpt: no space left: disk full") as caught:
        plugin.finish()
    assert caught.value.code == ExitCode.IO_ERROR
    plugin.end()  # nothing more is told
    assert (load(last)["global_step"], load(previous)["global_step"]) == (2, 1)


def test_who_reads_waits_and_what_is_removed_was_written_before(
    tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
) -> None:
    content = state() | {"pytorch-lightning_version": "2.6.6"}
    plugin.save_checkpoint(content, tmp_path / "old.ckpt")
    plugin.remove_checkpoint(tmp_path / "old.ckpt")
    plugin.save_checkpoint(content, tmp_path / "new.ckpt")
    threading.Timer(0.1, writes.gate.release, (2,)).start()
    assert plugin.load_checkpoint(tmp_path / "new.ckpt")["epoch"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.ckpt", "new.ckpt.sha256"]
    plugin.end()
    writes.gate.release()
    plugin.save_checkpoint(content, tmp_path / "third.ckpt")
    assert (
        plugin.load_checkpoint(tmp_path / "third.ckpt")["epoch"] == 3
    )  # after the end a save returns when it is there
    plugin.remove_checkpoint(tmp_path / "third.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.ckpt", "new.ckpt.sha256"]
