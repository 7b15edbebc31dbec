"""Small runs by the command line, which most tests here make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.small_runs import SMALL, as_words

from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import LightningCommand, run_command


@pytest.fixture
def words(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> Callable[..., list[str]]:
    """(folder's name, *more words, command="fit", **more settings) -> the words of a small run's command."""
    monkeypatch.chdir(root)

    def compose(name: str, *more: str, command: str = "fit", **settings: Any) -> list[str]:
        place = ["--folder", str(tmp_path / name)]
        return [command, *place, *stack(WHERE="cpu"), *as_words(SMALL), *more, *as_words(settings)]

    return compose


@pytest.fixture
def fit(words: Callable[..., list[str]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The same; trains, and returns the last checkpoint."""

    def run(name: str, *more: str, **settings: Any) -> dict[str, Any]:
        run_command(LightningCommand, words(name, *more, **settings))
        return load(tmp_path / name / "last.ckpt")

    return run
