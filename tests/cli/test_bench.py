"""`make bench`: a few steps, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from maskvlm.cli import bench
from maskvlm.cli.main import main


def test_a_configuration_is_timed_and_nothing_is_kept(
    stack: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails where a bench counts as a run, whose folder was never claimed."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(bench, "STEPS", 3)
    monkeypatch.setattr(bench, "WARMUP", 1)
    assert main(["bench", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), "--data.batch_size=8"]) == 0
    assert " pairs/s, " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
