"""A configuration file names classes from a list; nothing else in it is imported, called or built."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import attacks
import pytest
import yaml
from attacks import CONFIGS, ROOT, Place, callback, hook
from jsonargparse import _common
from watching import watched

from maskvlm.cli.lightning import LightningCommand, Parsed, built_source, run_command
from maskvlm.config.allowed_classes import LISTED, Verdicts, typed_names
from maskvlm.config.parser import GROUPS, MODE, CommandParser, set_up_parsing
from maskvlm.data.scenes.source import Scenes
from maskvlm.utils.errors import ExitCode, UserError


class Built(LightningCommand):
    """Builds model, data and trainer, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing is claimed."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def fit(stack: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Any]:
    """Parse, or build, `fit` with the tiny configuration, a file with more of it, and options."""

    def call(content: Any, *more: str, command: type[LightningCommand] = Parsed, allowed: tuple[str, ...] = ()) -> Any:
        file = tmp_path / "mine.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return run_command(command, ["fit", "--run", "x", *stack(WHERE="cpu"), "-c", str(file), *more], allowed)

    return call


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package of somebody else's: a callback in a module that it is defined in and one that passes it on."""
    name = f"acme{uuid4().hex}"  # not by `random`, which runs seed: a name that comes again is still imported
    folder, mark = tmp_path / "site" / name, tmp_path / "mark"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    (folder / "inner.py").write_text("from lightning.pytorch import Callback\nclass Hello(Callback): pass\n")
    (folder / "more.py").write_text(f"from {name}.inner import Hello\nclass Other(Hello): pass\ndef go(): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return SimpleNamespace(name=name, mark=mark)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_on_the_list_is_refused(
    fit: Callable[..., Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything of it run, imported or asked, though the program would go on to build all classes."""
    place = Place(tmp_path / "place")
    place.here.mkdir()
    monkeypatch.syspath_prepend(place.prepare())
    with watched() as deeds, pytest.raises(UserError) as caught:
        fit(CONFIGS[name](place), command=Built)
    assert caught.value.code == ExitCode.REFUSED
    assert "\n" not in str(caught.value)
    assert [deed for deed in deeds if deed.startswith("connect") or "touch" in deed] == []
    assert not place.mark.exists()
    assert attacks.EVIL not in sys.modules


def test_what_is_on_the_list_is_there_and_can_be_named(fit: Callable[..., Any]) -> None:
    verdicts = Verdicts(["fit"])
    for path in LISTED:
        assert verdicts[path], path
        module, _, name = path.rpartition(".")
        member = getattr(sys.modules[module], name)
        assert verdicts[f"{member.__module__}.{member.__qualname__}"], path  # where it is defined
        assert not verdicts[f"{path}.__init__"], path
    content = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="loss")
    content["trainer"] |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "{run}"}}}
    trainer = fit(content).settings.trainer
    assert trainer.logger.class_path == "lightning.pytorch.loggers.CSVLogger"
    assert trainer.callbacks[-1].init_args.monitor == "loss"


@pytest.mark.parametrize("place", [
    lambda path: callback(path),
    lambda path: {"trainer": {"callbacks": path}},
    lambda path: hook({"class_path": path}),
    lambda path: {"data": {"class_path": path}},
    lambda path: {"model": {"backbone": {"init_args": {"image": {"class_path": path}}}}},
    lambda path: {"model": {"task": {"dict_kwargs": {"x": {"class_path": path}}}}},
    lambda path: f"model: {{lr: '{{class_path: {path}}}'}}",
])  # fmt: skip
def test_nothing_is_imported_before_it_is_allowed(
    fit: Callable[..., Any], foreign: SimpleNamespace, place: Callable[[str], Any]
) -> None:
    with suppress(UserError):
        fit(place(f"{foreign.name}.inner.Hello"))
    assert not foreign.mark.exists()
    assert foreign.name not in sys.modules


def test_a_typed_path_allows_itself_and_not_its_package(fit: Callable[..., Any], foreign: SimpleNamespace) -> None:
    typed, other = f"{foreign.name}.more.Hello", f"{foreign.name}.more.Other"
    with pytest.raises(UserError, match=f"class {other} is not one that a file may name"):
        fit(callback(other), "--trainer.callbacks+", typed)
    for words in (
        ["--trainer.callbacks+", typed],  # it is passed on by the module that is named, and defined in another
        ["--trainer.callbacks", f"[{{class_path: {typed}, init_args: {{}}}}, Timer]"],
        ["--trainer.callbacks+", "LambdaCallback"],
    ):
        fit({}, *words)
    assert len(fit(callback(other), allowed=(foreign.name,)).settings.trainer.callbacks) > 1
    fit(callback(other), allowed=(f"{foreign.name}.more",))
    with pytest.raises(UserError, match=r"inner\.Hello is not one that a file may name"):
        fit(callback(f"{foreign.name}.inner.Hello"), allowed=(f"{foreign.name}.more",))


def test_what_is_typed_for_a_file_or_a_folder_names_no_class() -> None:
    words = ["--run", "evil.run", "--from=evil.ckpt", "--ckpt_path", "evil.best", "-c", "evil.yaml", "--x.y+", "a.B"]
    assert typed_names(words) == {"a.B"}
    verdicts = Verdicts(["fit", "--trainer.logger", "run", "--model.lr", "os.system"])
    assert not verdicts["torch.utils.collect_env.run"]  # a bare word allows a class of a known kind, no function
    assert not verdicts["os.system"]
    assert not Verdicts([], ["jsonargparse"])["jsonargparse.set_parsing_settings"]
    assert not Verdicts([], ["acme"])["acmes.X"]


def test_a_new_folder_of_a_task_needs_nothing_else(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of tasks/README.md: its classes may be named, its functions and other classes may not."""
    import tasks

    name = f"counting{uuid4().hex}"
    files = {
        "__init__": "",
        "task": "from maskvlm.objectives.pretraining import MaskedPretraining\n"
        "class Counting(MaskedPretraining): pass\nclass Tool: pass\ndef make() -> MaskedPretraining: ...\n",
        "data": "from maskvlm.data.scenes.source import Scenes\nclass Counted(Scenes): pass\n",
        "broken": "def (:\n",
        "wrong": "from fractions import Fraction\n\nHALF = Fraction('half')\n",
    }
    (tmp_path / name).mkdir()
    for module, code in files.items():
        (tmp_path / name / f"{module}.py").write_text(code)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    new = {"class_path": f"tasks.{name}.data.Counted", "init_args": {"train": 8, "size": 48}}
    content = {"model": {"task": {"class_path": f"tasks.{name}.task.Counting"}}, "data": {"init_args": {"source": new}}}
    settings = fit(content).settings
    assert settings.model.task.class_path == f"tasks.{name}.task.Counting"
    assert len(built_source(settings).split("train")) == 8
    wrong = {"task.Tool": "not one that a file may name", "task.make": "not one that a file may name"}
    # The line to mend is the file's own, not that of the library in which it went wrong.
    wrong |= {"task.Cuonting": "no attribute", "broken.X": "SyntaxError", "wrong.X": "Fix .*/wrong.py:3"}
    for path, message in wrong.items():
        with pytest.raises(UserError, match=message):
            fit({"model": {"task": f"tasks.{name}.{path}"}})


def test_a_spec_where_any_value_fits_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_common.parsing_settings, "instantiate_subclass_spec_in_any", None)  # as in a new process
    set_up_parsing([])
    parser = CommandParser(parser_mode=MODE)
    parser.add_argument("--config_of_bert", type=dict[str, Any])
    spec = {"class_path": "maskvlm.data.scenes.source.Scenes", "init_args": {"train": 8}}  # one that a file may name
    config = parser.instantiate(parser.parse_object({"config_of_bert": {"x": spec, "y": [spec]}})).config_of_bert
    assert not isinstance(config["x"], Scenes)
    assert not isinstance(config["y"][0], Scenes)


@pytest.mark.parametrize("content", [
    "data: {init_args: {source: FILE}}", "model: {backbone: {init_args: {text: FILE}}}", "trainer: {callbacks: FILE}",
    "model: {task: FILE}", "data: FILE", "trainer: FILE", "config: FILE",
])  # fmt: skip
def test_the_value_of_an_argument_is_no_file_to_read(fit: Callable[..., Any], tmp_path: Path, content: str) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("max_steps: 3\n")
    with watched() as deeds, pytest.raises(UserError):
        fit(content.replace("FILE", str(other)))
    assert f"read {other}" not in deeds


def test_the_keys_that_hold_keys_are_known(fit: Callable[..., Any]) -> None:
    """Else a text in their place would be read as a file."""
    parser = fit({})._subcommand_parsers["fit"]
    assert {action.dest for action in parser._actions if type(action).__name__ == "_ActionConfigLoad"} == set(GROUPS)


def logger(settings: Any) -> dict[str, Any]:
    return {"trainer": {"logger": {"class_path": "CSVLogger", "init_args": settings}}}


@pytest.mark.parametrize("content", [
    {"run": "http://127.0.0.1:9/x"},
    {"trainer": {"default_root_dir": "http://127.0.0.1:9/x"}},
    {"trainer": {"logger": '{class_path: CSVLogger, init_args: {save_dir: "memory:\\x2f/x"}}'}},
    logger({"save_dir": "${oc.env:NO_SUCH,memory:}//x"}),
    logger({"save_dir": "memory::x"}),
    {"run": "//x", **logger({"save_dir": "memory:{run}"})},
])  # fmt: skip
def test_a_file_sends_nothing_to_an_address(fit: Callable[..., Any], content: Any) -> None:
    with pytest.raises(UserError, match="is an address") as caught:
        fit(content)
    assert caught.value.code == ExitCode.REFUSED


def test_what_is_typed_may_be_an_address_for_its_own_key(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the options of a study become words of the runs' commands: its file may not."""
    option = ("--trainer.default_root_dir", "memory://x")
    assert fit({}, *option).settings.trainer.default_root_dir == "memory://x"
    fit(logger({"save_dir": "x"}), "--trainer.logger.save_dir", "memory://x")
    with pytest.raises(UserError, match="is an address"):
        fit(logger({"save_dir": "memory://x"}), *option)
    monkeypatch.setenv("MASKVLM_STUDY", "1")
    with pytest.raises(UserError, match="is an address"):
        fit({}, *option)
