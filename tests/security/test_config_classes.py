"""A configuration file names classes from a list; nothing else in it is imported, called or built."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml
from guards import Build
from jsonargparse import _common

from maskvlm.cli.lightning import LightningCommand, Parsed, built_source, run_command
from maskvlm.config.allowed_classes import LISTED, Verdicts, typed_names
from maskvlm.config.parser import GROUPS, MODE, CommandParser, set_up_parsing
from maskvlm.data.scenes.source import Scenes
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


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
    touch = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    (folder / "__init__.py").write_text(touch)
    (folder / "inner.py").write_text("from lightning.pytorch import Callback\nclass Hello(Callback): pass\n")
    (folder / "more.py").write_text(f"from {name}.inner import Hello\nclass Other(Hello): pass\ndef go(): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return SimpleNamespace(name=name, mark=mark)


def callback(path: str, **args: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks+": [{"class_path": path, "init_args": args}]}}


HOOK = "torch.utils.collect_env.run"


def hook(spec: Any) -> dict[str, Any]:
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": spec}}
    return {"trainer": {"strategy": strategy}}


@pytest.mark.guard("maskvlm.config.allowed_classes:may_name", gives="True")
def test_a_callable_in_a_file_does_not_run(build: Build, fit: Callable[..., Any], tmp_path: Path) -> None:
    """D3: the file of the attack on commit 89274c0, as it was."""
    spec = {"class_path": HOOK, "init_args": {"command": f"touch {tmp_path / 'mark'}"}}
    try:
        fit(hook(spec), command=Built)
        refused = False
    except UserError as error:
        refused = error.code == ExitCode.REFUSED
    assert not (tmp_path / "mark").exists()
    assert refused


@pytest.mark.parametrize(
    "content",
    [
        callback("lightning.pytorch.callbacks.LambdaCallback"),
        callback("lightning.pytorch.callbacks.lambda_function.LambdaCallback"),
        callback("LambdaCallback"),
        {"trainer": {"callbacks": "LambdaCallback"}},
        callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn="torch.hub.load"),
        {"trainer": {"logger": "WandbLogger"}},
        {"trainer": {"plugins": ["lightning.pytorch.plugins.TorchCheckpointIO"]}},
        hook("os.system"),
        hook({"class_path": "functools.partial"}),
        hook("maskvlm.utils.whole_files.write_text"),
        hook(HOOK),
        {"model": {"task": {"class_path": "maskvlm.cli.lightning.warn"}}},
        {"model": {"task": {"class_path": "maskvlm.cli.lightning.LightningCommand"}}},
        {"model": {"task": {"class_path": "maskvlm.objectives.pretraining.MaskedPretraining.forward"}}},
        {"model": {"task": {"class_path": "maskvlm.config.given_options.os.system"}}},
        {"model": {"task": {"class_path": "maskvlm.config.parser.LightningArgumentParser"}}},
        {"model": {"task": "tasks.vqa.score.main"}},
        {"model": {"task": {"class_path": "torch.nn.Identity"}}},
        {"data": {"init_args": {"source": {"class_path": "jsonargparse.set_parsing_settings"}}}},
        "model: {task: '{class_path: os.system}'}",
    ],
    ids=str,
)
def test_what_is_not_on_the_list_is_refused(fit: Callable[..., Any], content: Any) -> None:
    with pytest.raises(UserError, match=r"is not one that a file may name\. Add --allow-import") as caught:
        fit(content)
    assert caught.value.code == ExitCode.REFUSED


def test_what_is_on_the_list_is_there_and_can_be_named(fit: Callable[..., Any]) -> None:
    verdicts = Verdicts(["fit"])
    for path in LISTED:
        assert verdicts[path], path
        module, _, name = path.rpartition(".")
        member = getattr(sys.modules[module], name)
        assert verdicts[f"{member.__module__}.{member.__qualname__}"], path  # where it is defined
        assert not verdicts[f"{path}.__init__"], path
    content = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="loss")
    content["trainer"] |= {
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "{run}"}},
        "profiler": "simple",
    }
    trainer = fit(content).settings.trainer
    assert trainer.logger.class_path == "lightning.pytorch.loggers.CSVLogger"
    assert trainer.callbacks[-1].init_args.monitor == "loss"


PLACES: list[Callable[[str], Any]] = [
    lambda path: callback(path),
    lambda path: {"trainer": {"callbacks": path}},
    lambda path: {"trainer": {"logger": [{"class_path": path}]}},
    lambda path: {"trainer": {"strategy": {"class_path": path}}},
    lambda path: hook(path),
    lambda path: hook({"class_path": path}),
    lambda path: {"data": {"class_path": path}},
    lambda path: {"data": {"init_args": {"source": {"class_path": path}}}},
    lambda path: {"model": {"task": path}},
    lambda path: {"model": {"backbone": {"init_args": {"image": {"class_path": path}}}}},
    lambda path: {"model": {"backbone": {"init_args": {"text": {"init_args": {"config": {"class_path": path}}}}}}},
    lambda path: {"model": {"task": {"dict_kwargs": {"x": {"class_path": path}}}}},
    lambda path: {
        "trainer": {"profiler": {"class_path": "PyTorchProfiler", "dict_kwargs": {"x": {"class_path": path}}}}
    },
    lambda path: f"model: {{lr: '{{class_path: {path}}}'}}",
]


@pytest.mark.guard("maskvlm.config.allowed_classes:may_name", gives="True")
def test_nothing_is_imported_before_it_is_allowed(
    build: Build, fit: Callable[..., Any], foreign: SimpleNamespace
) -> None:
    paths = (f"{foreign.name}.inner.Hello", f"{foreign.name}.more.go")
    codes = set()
    for number, place in enumerate(PLACES):
        try:
            fit(place(paths[number % 2]))
        except UserError as error:
            codes.add(error.code)
        assert not foreign.mark.exists(), place("")
        assert foreign.name not in sys.modules
    assert codes <= {ExitCode.USAGE, ExitCode.REFUSED}


def test_a_typed_path_allows_itself_and_not_its_package(fit: Callable[..., Any], foreign: SimpleNamespace) -> None:
    typed, other = f"{foreign.name}.more.Hello", f"{foreign.name}.more.Other"
    with pytest.raises(UserError, match=f"class {other} is not one that a file may name"):
        fit(callback(other), "--trainer.callbacks+", typed)
    for words in (
        ["--trainer.callbacks+", typed],  # it is passed on by the module that is named, and defined in another
        [f"--trainer.callbacks+={typed}"],
        ["--trainer.callbacks+", f'{{"class_path": "{typed}"}}'],
        ["--trainer.callbacks", f"[{{class_path: {typed}, init_args: {{}}}}, Timer]"],
        ["--trainer.callbacks+", "LambdaCallback"],
        ["--trainer.logger", "false", "--trainer.callbacks", "lightning.pytorch.callbacks.LambdaCallback"],
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
    assert not verdicts[HOOK]  # a bare word allows a class of a known kind, no function
    assert not verdicts["os.system"]
    assert not Verdicts([], ["jsonargparse"])["jsonargparse.set_parsing_settings"]
    assert not Verdicts([], ["acme"])["acmes.X"]


def test_a_new_folder_of_a_task_needs_nothing_else(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of tasks/README.md: its classes may be named, its functions and other classes may not."""
    import tasks

    name = f"counting{uuid4().hex}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "task.py").write_text(
        "from maskvlm.objectives.pretraining import MaskedPretraining\n"
        "class Counting(MaskedPretraining): pass\nclass Tool: pass\ndef make() -> MaskedPretraining: ...\n"
    )
    (tmp_path / name / "data.py").write_text(
        "from maskvlm.data.scenes.source import Scenes\nclass Counted(Scenes): pass\n"
    )
    (tmp_path / name / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    new = {"class_path": f"tasks.{name}.data.Counted", "init_args": {"train": 8, "size": 48}}
    content = {"model": {"task": {"class_path": f"tasks.{name}.task.Counting"}}, "data": {"init_args": {"source": new}}}
    settings = fit(content).settings
    assert settings.model.task.class_path == f"tasks.{name}.task.Counting"
    assert len(built_source(settings).split("train")) == 8
    for wrong in ("Tool", "make"):
        with pytest.raises(UserError, match=rf"task\.{wrong} is not one that a file may name"):
            fit({"model": {"task": f"tasks.{name}.task.{wrong}"}})
    with pytest.raises(UserError, match=r"cannot be used .*no attribute 'Cuonting'"):
        fit({"model": {"task": f"tasks.{name}.task.Cuonting"}})
    with pytest.raises(UserError, match=r"broken\.X: cannot be imported .SyntaxError"):
        fit({"model": {"task": f"tasks.{name}.broken.X"}})
    # The line to mend is the file's own, not that of the library in which it went wrong.
    (tmp_path / name / "wrong.py").write_text("from fractions import Fraction\n\nHALF = Fraction('half')\n")
    with pytest.raises(UserError, match=r"wrong\.X: cannot be imported .ValueError.*Fix .*/wrong\.py:3"):
        fit({"model": {"task": f"tasks.{name}.wrong.X"}})


@pytest.mark.guard("maskvlm.config.parser:build_typed_values_alone")
def test_a_spec_where_any_value_fits_is_not_built(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_common.parsing_settings, "instantiate_subclass_spec_in_any", None)  # as in a new process
    set_up_parsing([])
    parser = CommandParser(parser_mode=MODE)
    parser.add_argument("--config_of_bert", type=dict[str, Any])
    spec = {"class_path": "maskvlm.data.scenes.source.Scenes", "init_args": {"train": 8}}  # one that a file may name
    config = parser.instantiate(parser.parse_object({"config_of_bert": {"x": spec, "y": [spec]}})).config_of_bert
    assert not isinstance(config["x"], Scenes)
    assert not isinstance(config["y"][0], Scenes)


def test_the_keys_that_hold_keys_are_known(fit: Callable[..., Any]) -> None:
    """Else a text in their place would be read as a file."""
    parser = fit({})._subcommand_parsers["fit"]
    assert {action.dest for action in parser._actions if type(action).__name__ == "_ActionConfigLoad"} == set(GROUPS)


OPENED: list[str] = []
sys.addaudithook(lambda name, args: OPENED.append(str(args[0])) if name == "open" else None)


@pytest.fixture
def opens(fit: Callable[..., Any], tmp_path: Path) -> Callable[[str], bool]:
    """Whether the file that a value names is opened."""

    def call(content: str) -> bool:
        other = tmp_path / "other.yaml"
        other.write_text("max_steps: 3\n")
        OPENED.clear()
        with pytest.raises(UserError):
            fit(content.replace("FILE", str(other)))
        return str(other) in OPENED

    return call


@pytest.mark.guard("maskvlm.config.parser:without_files", gives="args[0]")
def test_the_value_of_an_argument_is_no_file_to_read(build: Build, opens: Callable[[str], bool]) -> None:
    assert not opens("data: {init_args: {source: FILE}}")
    assert not opens("model: {backbone: {init_args: {text: FILE}}}")
    assert not opens("trainer: {logger: FILE}")
    assert not opens("trainer: {callbacks: FILE}")
    assert not opens("model: {task: FILE}")


@pytest.mark.guard("maskvlm.config.parser:forget_files")
def test_nor_is_that_of_the_data(build: Build, opens: Callable[[str], bool]) -> None:
    assert not opens("data: FILE")


@pytest.mark.guard("maskvlm.config.parser:check_group")
def test_nor_is_what_stands_for_a_group_of_keys(build: Build, opens: Callable[[str], bool]) -> None:
    assert not opens("trainer: FILE")
    assert not opens("config: FILE")


def test_the_command_itself_refuses_with_77_and_one_line(build: Build, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(callback("LambdaCallback", setup=HOOK)))
    words = build.command("fit", "--run", tmp_path / "run", "-c", tmp_path / "mine.yaml")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == ExitCode.REFUSED
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def logger(settings: Any) -> dict[str, Any]:
    return {"trainer": {"logger": {"class_path": "CSVLogger", "init_args": settings}}}


BEST = {"dirpath": "memory://x", "monitor": "score"}
ADDRESSES: dict[str, Any] = {
    "run": {"run": "http://127.0.0.1:9/x"},
    "root": {"trainer": {"default_root_dir": "http://127.0.0.1:9/x"}},
    "logger": logger({"save_dir": "memory://x"}),
    "callback": {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": BEST}]}},
    "default": logger({"save_dir": "${oc.env:NO_SUCH,memory:}//x"}),
    "text": {"trainer": {"logger": "{class_path: CSVLogger, init_args: {save_dir: memory://x}}"}},
    "escape": {"trainer": {"logger": '{class_path: CSVLogger, init_args: {save_dir: "memory:\\x2f/x"}}'}},
    "name": logger({"save_dir": "", "name": "memory://x"}),
    "chain": logger({"save_dir": "memory::x"}),
    "of the run": {"run": "//x", **logger({"save_dir": "memory:{run}"})},
    "scheme": {"run": "memory:/", **logger({"save_dir": "{run}/x"})},
}


@pytest.mark.guard("maskvlm.config.parser:check_outputs")
@pytest.mark.parametrize("way", ADDRESSES)
def test_a_file_sends_nothing_to_an_address(build: Build, fit: Callable[..., Any], way: str) -> None:
    with pytest.raises(UserError, match="is an address") as caught:
        fit(ADDRESSES[way])
    assert caught.value.code == ExitCode.REFUSED


def test_nor_does_the_file_of_a_study(fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options become words of the runs' commands. What the user types is his own word."""
    option = ("--trainer.default_root_dir", "memory://x")
    assert fit({}, *option).settings.trainer.default_root_dir == "memory://x"
    monkeypatch.setenv("MASKVLM_STUDY", "1")
    with pytest.raises(UserError, match="is an address") as caught:
        fit({}, *option)
    assert caught.value.code == ExitCode.REFUSED


def test_what_is_typed_is_for_its_own_key(fit: Callable[..., Any]) -> None:
    fit(logger({"save_dir": "x"}), "--trainer.logger.save_dir", "memory://x")
    fit({}, "--trainer.logger", "{class_path: CSVLogger, init_args: {save_dir: 'memory://x'}}")
    with pytest.raises(UserError, match="is an address"):
        fit(logger({"save_dir": "memory://x"}), "--trainer.default_root_dir", "memory://x")
