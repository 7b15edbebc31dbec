"""Checkpoints in the background: what is written is the state of the moment it was saved, in order, and no failure is
lost. That a kill in the middle loses nothing: `bench/kills.py --writes 100`, and a few here."""

import errno
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from guards import Build

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.background import Snapshot
from maskvlm.checkpoint.io import load, save
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.guard("maskvlm.checkpoint.background:Snapshot.take", gives="args[1]")
def test_what_changes_after_a_save_is_not_in_the_file(
    build: Build, tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
) -> None:
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
    assert sorted(room.bytes for room in snapshot.buffers) == [0, 56, 800]  # a (tied and view are in it), and b
    larger = snapshot.take({"state_dict": {"a": torch.ones(30, 10)}})["state_dict"]["a"]
    assert torch.equal(larger, torch.ones(30, 10))


def test_memory_is_reserved_before_the_first_save(plugin: SafeCheckpointIO, tmp_path: Path) -> None:
    """Each storage once; what is saved beside it gets memory of its own."""
    content = state()
    assert plugin.writer is not None
    plugin.reserve([*content["state_dict"].values(), torch.zeros(3)])
    plugin.finish()
    reserved = plugin.writer.free.queue[-1]
    addresses = {room.bytes: [buffer.data_ptr() for buffer in buffers] for room, buffers in reserved.buffers.items()}
    assert {size: len(places) for size, places in addresses.items()} == {800: 1, 56: 1, 12: 1}
    plugin.save_checkpoint({**content, "more": torch.ones(5)}, tmp_path / "x.ckpt")
    plugin.finish()
    now = {room.bytes: [buffer.data_ptr() for buffer in buffers] for room, buffers in reserved.buffers.items()}
    assert now.keys() == {800, 56, 0, 20}  # what was not needed is given up
    assert (now[800], now[56]) == (addresses[800], addresses[56])


def test_nobody_waits_for_memory_to_be_reserved(plugin: SafeCheckpointIO, writes: "Writes", tmp_path: Path) -> None:
    """Where both snapshots are in use, a save that came first has made them."""
    for step in range(2):
        plugin.save_checkpoint({**state(), "global_step": step}, tmp_path / "x.ckpt")
    plugin.reserve([torch.ones(3)])
    writes.gate.release(2)
    plugin.finish()


def test_no_thread_stays_behind(plugin: SafeCheckpointIO, tmp_path: Path) -> None:
    """One that has computed would keep OpenMP's threads, beside which the training sleeps between two operations."""
    plugin.reserve([torch.ones(3)])
    plugin.save_checkpoint(state(), tmp_path / "x.ckpt")
    plugin.finish()
    threads = [each for each in threading.enumerate() if each.name.startswith("checkpoint")]
    for each in threads:
        each.join(30)
    assert not any(each.is_alive() for each in threads)


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


@pytest.mark.guard("maskvlm.checkpoint.background:BackgroundWriter.check")
def test_a_failed_write_is_told_once_and_what_was_there_stays(
    build: Build, tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
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


@pytest.mark.guard("maskvlm.checkpoint.background:BackgroundWriter.check")
def test_the_next_save_tells_of_a_failure(
    build: Build, tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
) -> None:
    writes.gate.release(100)
    plugin.save_checkpoint({"state_dict": {}, "global_step": -1}, tmp_path / "x.ckpt")
    assert plugin.writer is not None
    plugin.writer.pending[0].exception(timeout=30)  # it has ended
    with pytest.raises(UserError, match=r"x\.ckpt: no space left"):
        plugin.save_checkpoint(state(), tmp_path / "y.ckpt")


def test_who_reads_waits_and_what_is_removed_was_written_before(
    tmp_path: Path, writes: Writes, plugin: SafeCheckpointIO
) -> None:
    content = state() | {"pytorch-lightning_version": "2.6.6"}
    plugin.save_checkpoint(content, tmp_path / "old.ckpt")
    plugin.remove_checkpoint(tmp_path / "old.ckpt")
    plugin.save_checkpoint(content, tmp_path / "new.ckpt")
    threading.Timer(0.2, writes.gate.release, (2,)).start()
    assert plugin.load_checkpoint(tmp_path / "new.ckpt")["epoch"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.ckpt", "new.ckpt.sha256"]
    plugin.end()
    writes.gate.release()
    plugin.save_checkpoint(content, tmp_path / "third.ckpt")
    assert (tmp_path / "third.ckpt").exists()  # after the end a save returns when the file is there


def test_kills_in_the_middle_of_a_write_lose_nothing(tmp_path: Path) -> None:
    """Fails with `--break snapshot` (tried): what changes while it is written leaves damaged files."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / "kills.py"), "--writes", "5", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = yaml.safe_load(done.stdout.partition("\n0 wrong")[0])["counts"]
    assert counts["SIGKILL"] == 5
    assert counts["of them, while a file is half written"] >= 1
