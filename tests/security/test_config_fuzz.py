"""Whatever a configuration file or a command line holds: success or one line, soon, and nothing of it runs."""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_mutators import FOREIGN, mutate, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.parser import option_names
from maskvlm.training.failure import user_line

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "shutil.rmtree")
MOST_SECONDS = 10
fuzzed = settings(
    deadline=None, max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


class Watch:
    """What this process does while it is looked at: programs started, addresses called, files written."""

    def __init__(self) -> None:
        self.on, self.events = False, list[str]()
        sys.addaudithook(self.event)

    def event(self, name: str, args: tuple[Any, ...]) -> None:
        own = name == "shutil.rmtree" and Path(args[0]).parent == Path(tempfile.gettempdir())  # what it made itself
        if (
            self.on
            and not own
            and (name in RUNS or (name == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")))
        ):
            self.events.append(f"{name} {args}")


WATCH = Watch()


@pytest.fixture(scope="module")
def toy(
    tmp_path_factory: pytest.TempPathFactory, stack: Callable[..., list[str]]
) -> Iterator[tuple[str, list[str], Path]]:
    """A whole configuration as one text, its keys, and a folder with a module that leaves a file if it is imported."""
    folder = tmp_path_factory.mktemp("fuzz")
    mark = f"from pathlib import Path\nPath({str(folder / 'imported')!r}).touch()\nclass Run: pass\n"
    (folder / f"{FOREIGN}.py").write_text(mark)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(folder)
        parsed = run_command(Parsed, ["fit", "--run", "x", *stack(WHERE="cpu")])
        whole = yaml.safe_load(parsed._parser("fit").dump(parsed.settings, skip_none=False))
        config = {key: whole[key] for key in ("seed_everything", "model", "data", "run")}
        names = (
            "max_steps",
            "accelerator",
            "devices",
            "precision",
            "logger",
            "callbacks",
            "plugins",
            "log_every_n_steps",
        )
        config["trainer"] = {key: whole["trainer"][key] for key in names}
        patch.chdir(folder)
        yield yaml.safe_dump(config, sort_keys=False), sorted(option_names(parsed._subcommand_parsers["fit"])), folder


def outcome(arguments: list[str], folder: Path) -> str:
    """What parsing them comes to, checked: success or one line, in time, without any deed."""
    WATCH.events.clear()
    started = time.process_time()
    WATCH.on = True
    message: str = "done"
    status: Any = 0
    try:
        run_command(Parsed, arguments)
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        message = line.text
    except SystemExit as end:
        status = end.code
    finally:
        WATCH.on = False
    assert time.process_time() - started < MOST_SECONDS
    assert status in (0, None)  # --help and --print_config end the command
    assert WATCH.events == []
    assert message.isprintable(), repr(message)
    assert len(message) < 2000
    assert not (folder / "imported").exists()
    assert FOREIGN not in sys.modules
    assert {path.name for path in folder.iterdir()} <= {f"{FOREIGN}.py", "mutant.yaml", "__pycache__"}
    return message


def test_the_toy_configuration_parses(toy: tuple[str, list[str], Path]) -> None:
    text, _, folder = toy
    (folder / "mutant.yaml").write_text(text)
    assert outcome(["fit", "-c", "mutant.yaml"], folder) == "done"


@given(seed=st.integers(0, 2**32))
@fuzzed
def test_an_edited_file_is_read_or_refused_in_one_line(toy: tuple[str, list[str], Path], seed: int) -> None:
    text, _, folder = toy
    (folder / "mutant.yaml").write_bytes(mutate(text, random.Random(seed)))
    outcome(["fit", "-c", "mutant.yaml"], folder)


@given(seed=st.integers(0, 2**32))
@fuzzed
def test_an_odd_command_line_is_read_or_refused_in_one_line(
    toy: tuple[str, list[str], Path], capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    text, keys, folder = toy
    (folder / "mutant.yaml").write_text(text)
    outcome(["fit", "-c", "mutant.yaml", *words(keys, random.Random(seed))], folder)
    capsys.readouterr()
