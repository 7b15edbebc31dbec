"""Whatever a configuration file or a command line holds: success or one line, soon, and nothing of it runs."""

import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_mutators import FOREIGN, mutate, words
from watching import limited, watched

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.parser import option_names
from maskvlm.training.failure import user_line

ROOT = Path(__file__).resolve().parents[2]
SEEDS = pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 16), marks=pytest.mark.slow)])
Toy = tuple[str, list[str], Path]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, stack: Callable[..., list[str]]) -> Iterator[Toy]:
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
        config["trainer"] = {key: whole["trainer"][key] for key in ("max_steps", "devices", "logger", "callbacks")}
        patch.chdir(folder)
        yield yaml.safe_dump(config, sort_keys=False), sorted(option_names(parsed._subcommand_parsers["fit"])), folder


def outcome(toy: Toy, content: bytes, options: list[str]) -> str:
    """What parsing comes to, checked: success or one line, in time, without any deed."""
    folder, message = toy[2], "done"
    (folder / "mutant.yaml").write_bytes(content)
    with watched() as deeds, limited():
        try:
            run_command(Parsed, ["fit", "-c", "mutant.yaml", *options])
        except Exception as error:
            line = user_line(error)
            if line is None:
                raise
            message = line.text
        except SystemExit as end:  # --help and --print_config end the command
            message = "done" if end.code in (0, None) else f"exit\n{end.code}"
    own = f"remove {tempfile.gettempdir()}"  # what the parser itself made
    assert [deed for deed in deeds if not deed.startswith(("read", own))] == []
    assert message.isprintable(), repr(message)
    assert len(message) < 2000
    assert not (folder / "imported").exists()
    assert FOREIGN not in sys.modules
    assert {path.name for path in folder.iterdir()} <= {f"{FOREIGN}.py", "mutant.yaml", "__pycache__"}
    return message


@SEEDS
def test_an_edited_file_is_read_or_refused_in_one_line(toy: Toy, seeds: Any) -> None:
    assert outcome(toy, toy[0].encode(), []) == "done"
    for seed in seeds:
        outcome(toy, mutate(toy[0], random.Random(seed)), [])


@SEEDS
def test_an_odd_command_line_is_read_or_refused_in_one_line(
    toy: Toy, capsys: pytest.CaptureFixture[str], seeds: Any
) -> None:
    for seed in seeds:
        outcome(toy, toy[0].encode(), words(toy[1], random.Random(seed)))
    capsys.readouterr()
