"""Checkpoints: written whole or not at all, and read only when whole and harmless."""

import os
import pickle
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.integrity import newest_valid, verify_checkpoint
from maskvlm.checkpoint.io import load, save
from maskvlm.utils.errors import ExitCode, UserError


def content(fill: float = 1.0) -> dict[str, Any]:
    weights = {"a": torch.full((20, 10), fill), "b": torch.arange(7)}
    return {"state_dict": weights, "epoch": 3, "callbacks": {"k": [1, 2.5, None, ("x", True)]}}


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "last.ckpt"
    save(content(), path)
    return path


def test_a_checkpoint_comes_back_as_it_was(saved: Path) -> None:
    back = load(saved)
    assert torch.equal(back["state_dict"]["a"], torch.ones(20, 10))
    assert back["callbacks"] == content()["callbacks"]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_other_types_are_refused_on_saving_with_their_key(tmp_path: Path) -> None:
    for value in (np.float64(1), Path("x"), ExitCode.DONE, {"deep": [np.int64(1)]}, {np.int64(1): 2}):
        with pytest.raises(TypeError, match=r"hparams.*plain types only"):
            save({"state_dict": {}, "hparams": value}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_side", [True, False])
def test_every_truncation_is_found(saved: Path, with_side: bool) -> None:
    whole = saved.read_bytes()
    if not with_side:
        (saved.parent / "last.ckpt.sha256").unlink()
    for size in [0, 1, len(whole) - 1, *range(5, len(whole), 397)]:
        saved.write_bytes(whole[:size])
        error = error_of(lambda: load(saved))
        assert error.code == ExitCode.BAD_DATA
        assert "truncated" in error.what


@pytest.mark.parametrize("with_side", [True, False])
def test_every_flipped_bit_of_the_content_is_found(saved: Path, with_side: bool) -> None:
    """Without the hash a flip in padding or in a duplicate header may pass, but then nothing was changed."""
    whole, draw = bytearray(saved.read_bytes()), random.Random(0)
    if not with_side:
        (saved.parent / "last.ckpt.sha256").unlink()
    for _ in range(60):
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        whole[place] ^= bit
        saved.write_bytes(whole)
        whole[place] ^= bit
        try:
            back = load(saved)
        except UserError:
            continue
        assert not with_side
        assert torch.equal(back["state_dict"]["a"], torch.ones(20, 10))


class Attack:
    """What a hostile file does: leave a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_a_file_is_ever_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": {}, "x": Attack(mark)}, tmp_path / "zip.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Attack(mark)))
    torch.save(Attack(mark), tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    for name in ("zip", "pickle", "legacy"):
        error = error_of(lambda name=name: load(tmp_path / f"{name}.ckpt"))
        assert error.code == ExitCode.REFUSED
    assert not mark.exists()


class Calls:
    """What a hostile file asks for."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, (300_000_000,)


def with_pickle(saved: Path, content: bytes, *first: tuple[str, bytes]) -> Path:
    """The checkpoint with another index, behind other members."""
    path = saved.with_name("hostile.ckpt")
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for name, member in first:
            new.writestr(name, member)
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    return path


@pytest.mark.parametrize("what", [bytearray, torch.Tensor, torch.UntypedStorage], ids=str)
def test_what_takes_the_memory_that_it_is_told_to_is_not_called(saved: Path, what: Any) -> None:
    hostile = pickle.dumps({"state_dict": {"a": Calls(what)}}, protocol=2)
    assert error_of(lambda: load(with_pickle(saved, hostile))).code == ExitCode.REFUSED


@pytest.mark.parametrize("decoy", ["{}/adata.pkl", "{}/data.pkl", "data.pkl"])
def test_a_decoy_hides_no_pickle(saved: Path, decoy: str) -> None:
    """What is looked at is what torch reads."""
    with zipfile.ZipFile(saved) as archive:
        first = archive.namelist()[0].partition("/")[0]
        harmless = archive.read(f"{first}/data.pkl")
    hostile = pickle.dumps({"state_dict": {"a": Calls(bytearray)}}, protocol=2)
    error = error_of(lambda: load(with_pickle(saved, hostile, (decoy.format(first), harmless))))
    assert error.code in (ExitCode.REFUSED, ExitCode.BAD_DATA)


def test_other_kinds_of_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    kinds = {
        "HTML page": b"<!DOCTYPE html><title>404</title>",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "not a checkpoint": b"hello world",
    }
    for kind, raw in kinds.items():
        path.write_bytes(raw)
        assert kind in error_of(lambda: load(path)).what
    torch.save({"a": torch.ones(3)}, path)
    assert "without state_dict" in error_of(lambda: load(path)).what


def test_a_newer_format_is_refused_with_both_numbers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 7)
    save(content(), saved)
    monkeypatch.undo()
    assert "format 7, this version reads up to 1" in error_of(lambda: load(saved)).what


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    messages: list[str] = []
    assert newest_valid(tmp_path, messages.append) is None
    for age, name in enumerate(["new", "middle", "old"]):
        save(content(), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1000 - age, 1000 - age))
    assert newest_valid(tmp_path, messages.append) == tmp_path / "new.ckpt"
    (tmp_path / "new.ckpt").write_bytes(b"")
    assert newest_valid(tmp_path, messages.append) == tmp_path / "middle.ckpt"
    assert len(messages) == 1
    assert "new.ckpt: truncated" in messages[0]
    for name in ("middle", "old"):
        (tmp_path / f"{name}.ckpt").write_bytes(b"")
    assert error_of(lambda: newest_valid(tmp_path, messages.append)).code == ExitCode.REFUSED
    assert (tmp_path / "new.ckpt").exists()  # the evidence stays


def test_in_a_copied_folder_the_runs_own_order_counts(tmp_path: Path) -> None:
    """Times of files do not survive a copy or a backup. Fails where they decide."""
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):  # the newest is written last
        save({"state_dict": {}}, tmp_path / name)
    assert newest_valid(tmp_path) == tmp_path / "last.ckpt"
    (tmp_path / "last.ckpt").unlink()
    assert newest_valid(tmp_path) == tmp_path / "previous.ckpt"


@pytest.mark.parametrize("failing", ["torch.save", "rename", "side"])
def test_a_kill_between_any_two_steps_leaves_a_whole_file(
    saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Unlike an error: no handler runs."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == {"rename": 2, "side": 3}[failing]:
            raise Killed
        real(source, target)

    if failing == "torch.save":
        monkeypatch.setattr(torch, "save", die)
    else:
        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        save(content(2.0), saved)
    monkeypatch.undo()
    value = load(saved)["state_dict"]["a"][0, 0].item()
    assert value == (2.0 if failing == "side" else 1.0)


def test_the_order_of_writing_survives_power_loss(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents reach the disk before their name does, and the name before the save returns."""
    trace: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        trace.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        trace.append("name " + Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(content(), saved)
    side = ["sync .last.ckpt.sha256.tmp", "name last.ckpt.sha256", "sync run"]
    named = ["sync .last.ckpt.tmp", "name last.ckpt", "sync run"]
    assert trace == ["sync .last.ckpt.tmp", *side, *named, *side]
    trace.clear()
    save(content(), saved, saved.with_name("previous.ckpt"))  # the old file keeps a name, and is stated, all the time
    moved = ["name previous.ckpt", "sync run", *(line.replace("last", "previous") for line in side)]
    assert trace == ["sync .last.ckpt.tmp", *side, *moved, *named, *side]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(saved: Path) -> None:
    """A real limit on file size (EFBIG), hit in the middle of the file."""
    before = saved.read_bytes()
    big = {"state_dict": {"a": torch.ones(1_000_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        error = error_of(lambda: save(big, saved))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.code == ExitCode.IO_ERROR
    assert "untouched" in error.todo
    assert saved.read_bytes() == before
    verify_checkpoint(saved)
    assert [p.name for p in saved.parent.glob(".*")] == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert error_of(lambda: save(content(), tmp_path / "file" / "x.ckpt")).code == ExitCode.CANNOT_CREATE
