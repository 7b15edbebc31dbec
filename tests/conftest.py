"""What every test shares: an offline, single-threaded process, and the skips that name their reason."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch or transformers. Tests run side by side, so each keeps to one thread.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
# `make test` must not speak through the makes that tests start: it would announce folders and pass on its ARGS.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

# On a machine that others share, inputs take their time to be made; that says nothing of the code.
PROFILES = {"shared": 15, "many": 200}  # examples of each property
for name, most in PROFILES.items():
    checks = [HealthCheck.too_slow]
    settings.register_profile(name, deadline=None, max_examples=most, suppress_health_check=checks)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "shared"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data, which is not part of the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data beside the repository (real photos and captions, not distributed)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What the imports made stays to the end, and looking through it for garbage takes 7 % of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take a third of a run of a few steps: those of this process are drawn where they are tested alone."""
    if "reporting" not in request.path.parts and "maskvlm.reporting.callbacks" in sys.modules:
        monkeypatch.setattr("maskvlm.reporting.callbacks.Report.draw", lambda *_: None)


@pytest.fixture(autouse=True)
def card_to_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test on a card finds none of what another one left there: memory is measured."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def stack() -> Callable[..., list[str]]:
    """The `-c FILE` arguments that `maskvlm pretrain model=.. data=..` stands for."""
    from maskvlm.cli.commands import COMMANDS

    def compose(**choices: str) -> list[str]:
        words = [f"{name.lower()}={value}" for name, value in choices.items()]
        command, folder, name, *files = COMMANDS["pretrain"].full([*words, "run=x"])
        assert (command, folder, name) == ("fit", "--folder", "checkpoints/x")
        return files

    return compose
