"""Rows 30 to 33 of the fault matrix and what is around them: wrong keys, values, YAML, files and words."""

import configparser
import os
import re
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from guards import Build
from jsonargparse import ArgumentParser

from maskvlm.cli.lightning import LightningCommand, Parsed, run_command
from maskvlm.cli.main import main
from maskvlm.config.given_options import fill_environment, read_config_file
from maskvlm.config.parse_errors import explain_message
from maskvlm.config.safe_yaml import MOST_LEVELS, NotPlain, read_yaml
from maskvlm.training.failure import REQUIRED, user_line
from maskvlm.training.resume import newest_of
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def fails(stack: Callable[..., list[str]], tmp_path: Path) -> Callable[..., UserError]:
    """Parse `fit` with the tiny configuration and a file or options more; returns what is told."""

    def call(*more: str, text: str | None = None) -> UserError:
        words = ["fit", "--run", str(tmp_path / "run"), *stack(WHERE="cpu")]
        if text is not None:
            (tmp_path / "mine.yaml").write_text(text)
            words += ["-c", str(tmp_path / "mine.yaml")]
        with pytest.raises(UserError) as caught:
            run_command(Parsed, [*words, *more])
        assert len(str(caught.value)) < 1500
        return caught.value

    return call


# Row 30: an unknown key.
@pytest.mark.guard("maskvlm.config.parse_errors:_unknown", gives="UserError('x', 'unknown key', 'y')")
def test_an_unknown_key_has_its_place_and_the_nearest_key(
    build: Build, fails: Callable[..., UserError], tmp_path: Path
) -> None:
    error = fails(text="model:\n  task:\n    init_args:\n      image_mask_ratoi: 0.5\n")
    assert error.where == f"{tmp_path}/mine.yaml:4: model.task.image_mask_ratoi"
    assert error.what == "unknown key (did you mean model.task.image_mask_ratio?)"
    assert error.code == ExitCode.USAGE


# Row 31: a wrong type, a number out of range.
@pytest.mark.guard("maskvlm.config.parse_errors:_wrong_value", gives="UserError('x', 'y', 'z')")
def test_a_wrong_type_has_its_place_and_the_right_type(build: Build, fails: Callable[..., UserError]) -> None:
    error = fails(text="data:\n  init_args:\n    source:\n      init_args:\n        train: fast\n")
    assert error.where.endswith("mine.yaml:5: data.source.train")
    assert (error.what, error.todo, error.code) == ("fast does not fit", "Give a whole number", ExitCode.USAGE)


@pytest.mark.parametrize(
    ("kind", "todo"),
    [
        (Literal["float", "int"], "Give one of float, int"),
        (float | Literal["a.b", "list"] | None, "Give a number, one of a.b, list, null"),
        (int | bool, "Give a whole number, true or false"),
    ],
)
def test_the_values_of_a_choice_are_told_as_they_are_typed(kind: Any, todo: str) -> None:
    """Only the names of types are said in words."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(["--x", "zz"])
    assert explain_message(str(caught.value), [], [], ["--x", "zz"]).todo == todo


@pytest.mark.guard("maskvlm.config.parser:check_written_numbers")
@pytest.mark.parametrize("text", ["'1" + "0" * 30 + "'", "'-9" + "0" * 4000 + "'"], ids=["31 digits", "4001 digits"])
def test_a_whole_number_fits_64_bits(build: Build, fails: Callable[..., UserError], text: str) -> None:
    error = fails(text=f"data: {{init_args: {{batch_size: {text}}}}}")
    assert (error.where, error.what) == ("data.batch_size", "a number is out of range")


@pytest.mark.guard("maskvlm.config.parser:check_seed")
def test_a_seed_is_one_that_numpy_takes(build: Build, fails: Callable[..., UserError]) -> None:
    assert fails("--seed_everything", "4294967296").where == "seed_everything"
    assert fails("--seed_everything", "-1").what == "-1 is out of range"


class Built(LightningCommand):
    """Builds model, data and trainer, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing is claimed."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


@pytest.mark.guard("maskvlm.cli.lightning:wrong_trainer", gives="ValueError(str(args[0]))")
def test_a_value_that_lightning_refuses_is_one_line(build: Build, stack: Callable[..., list[str]]) -> None:
    words = ["fit", "--run", "x", *stack(WHERE="cpu")]
    for more in (["--trainer.accelerator", "xyz"], ["--trainer.devices", "-3"], ["--trainer.strategy", "xyz"]):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            run_command(Built, [*words, *more])
        line = user_line(caught.value)
        assert line is not None
        assert line.text.startswith("trainer: ")
        assert line.code == ExitCode.USAGE


# Row 32: hostile YAML.
@pytest.mark.guard("maskvlm.config.safe_yaml:_unfold", gives="None")
def test_aliases_that_multiply_are_refused_at_once(build: Build) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 5 if build.guard else 40)
    )
    started = time.process_time()
    with pytest.raises(UserError, match=r"x\.yaml:\d: aliases that multiply") as caught:
        read_yaml(text, "x.yaml")
    assert caught.value.code == ExitCode.REFUSED
    assert time.process_time() - started < 1


@pytest.mark.guard("maskvlm.config.safe_yaml:_check_tag")
@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [x]",
        "!!python/name:os.system x",
        "!!binary aGVsbG8=",
        "!!timestamp foo",
        "!x y",
    ],
)
def test_a_tag_that_asks_for_more_than_plain_values_is_refused(build: Build, text: str) -> None:
    for where in (f"a: {text}", f"[{text}]", f"? {text}\n: 1"):
        with pytest.raises(UserError, match=r"x\.yaml:1: the tag \S+ is not allowed") as caught:
            read_yaml(where, "x.yaml")
        assert caught.value.code == ExitCode.REFUSED


@pytest.mark.guard("maskvlm.config.safe_yaml:_check_keys")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "the key a is given twice"),
        ("1: a\n0x1: b", "the key 1 is given twice"),
        ("b: [0.9, 0.9:]", "the key 0.9 is not text"),
        ("[a]: 1", "the key that is a sequence is not text"),
        ("true: 1", "the key true is not text"),
    ],
)
def test_a_key_is_a_text_given_once(build: Build, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"x.yaml:1: {message}"):
        read_yaml(text, "x.yaml")


# D14: what is checked is what is built.
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!int abc", "abc is not what its tag int says"),
        ("a: !!bool maybe", "maybe is not what its tag bool says"),
        ("a: !!null x", "x is not what its tag null says"),
        ("a: !!seq {b: 1}", "does not fit its value"),
        ("a: 0b_", "0b_ is not a number"),
        ("a: 1e999", "the number 1e999 is out of range"),
        ("a: " + "9" * 5000, r"the number 9{60}\.\.\. \(5000 characters\) is out of range"),
        ("a: " + ":".join(["1"] * 5000), "is out of range"),
        ("a: 9223372036854775809", "is out of range"),
        ('a: "\\ud800"', "holds a control character"),
        ('a: "\\e[2J"', "holds a control character"),
        ("a: \x00", "not YAML"),
        ("a: *b", "found undefined alias"),
        ("a: b: c", "mapping values are not allowed here"),
        ('a: "\\UFFFFFFFF"', "a number in it is out of range"),
        ("%YAML " + "9" * 5000 + ".1\n--- a", "a number in it is out of range"),
        ("--- a\n--- b", "another document"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_no_value_can_be_made_of_is_one_line(text: str, message: str) -> None:
    with pytest.raises(NotPlain, match=message) as caught:
        read_yaml(text, "x.yaml")
    assert caught.value.where.startswith("x.yaml")
    assert len(str(caught.value)) < 300


def test_plain_values_are_read() -> None:
    text = "a: [1, -2.5, 1e-3, 1.0e+3, .inf, ~, yes, 'no', 0x1f, 1_000]\nb: 2026-01-31\n3: {c: ''}\nd: &d [1]\ne: *d\n"
    read = read_yaml(text, "x")
    assert read == {
        "a": [1, -2.5, 0.001, 1000.0, float("inf"), None, True, "no", 31, 1000],
        "b": "2026-01-31",
        3: {"c": ""},
        "d": [1],
        "e": [1],
    }
    assert read["d"] is not read["e"]
    assert read_yaml("", "x") is None
    assert read_yaml("\ufeffa: 1", "x") == {"a": 1}


def test_nesting_has_an_end_with_and_without_aliases() -> None:
    deep: Any = 1
    for _ in range(MOST_LEVELS - 1):
        deep = [deep]
    assert read_yaml(yaml.safe_dump(deep), "x") == deep
    chain = "- &a0 [1]\n" + "".join(f"- &a{n} [*a{n - 1}]\n" for n in range(1, 150))
    for more in (yaml.safe_dump([deep]), "[" * 5_000, chain):
        with pytest.raises(UserError) as caught:
            read_yaml(more, "x")
        assert caught.value.code == ExitCode.REFUSED


def test_every_configuration_of_the_project_reads_as_the_parsers_own_reader_did(root: Path) -> None:
    from jsonargparse import get_loader

    files = [*root.glob("conf/**/*.yaml"), *root.glob("tasks/*/*.yaml")]
    assert len(files) > 20
    for file in files:
        assert read_yaml(file.read_text(), str(file)) == get_loader("yaml")(file.read_text())


def test_an_option_that_is_no_yaml_is_a_text(stack: Callable[..., list[str]]) -> None:
    words = ["fit", "--run", "*x: [", *stack(DATA="flickr8k"), "--data.source.root", "@{a: b: c}"]
    settings = run_command(Parsed, words).settings
    assert (settings.run, settings.data.init_args.source.init_args.root) == ("*x: [", "@{a: b: c}")


@pytest.mark.guard("maskvlm.config.parse_errors:short_message", gives="args[0]")
def test_a_long_value_is_told_shortly_and_soon(build: Build, fails: Callable[..., UserError]) -> None:
    started = time.process_time()
    error = fails("--model.task.pixel_loss", "y" * 30000)
    assert error.what == f"{'y' * 60}... (30000 characters) does not fit"
    assert time.process_time() - started < 2


def test_a_word_of_a_megabyte_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prevexpvmblfi" * 100_000]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: prevexpvmblfi")
    assert len(error) < 600


# Row 33 is held by tests/security/test_config_classes.py. Files that are none:
@pytest.mark.guard("maskvlm.config.given_options:check_plain_file")
def test_a_pipe_a_device_and_a_folder_are_no_configuration(build: Build, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name in (str(tmp_path), "/dev/zero", str(pipe)):
        end = threading.Timer(1, lambda: os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK)))
        end.start()  # lets go whoever waits for the pipe
        with pytest.raises(UserError) as caught:
            read_config_file(name)
        end.cancel()
        assert (caught.value.where, caught.value.code) == (name, ExitCode.MISSING_INPUT)
        assert caught.value.what == "is a folder, pipe or device, not a file"


def test_files_that_are_not_there_too_large_or_no_text(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(10 * 2**30)  # a hole of 10 GB
    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9\n")
    wide = tmp_path / "wide.yaml"
    wide.write_text("run: x\n", encoding="utf-16")
    for name, code in (
        ("", ExitCode.MISSING_INPUT),
        ("x" * 5_000, ExitCode.MISSING_INPUT),
        (f"{'y' * 250}/" * 20, ExitCode.MISSING_INPUT),
        ("a\0b", ExitCode.MISSING_INPUT),
        ("conf/base.yaml/x", ExitCode.MISSING_INPUT),
        (str(large), ExitCode.REFUSED),
        (str(tmp_path / "latin.yaml"), ExitCode.USAGE),
        (str(wide), ExitCode.USAGE),
    ):
        with pytest.raises(UserError) as caught:
            read_config_file(name)
        assert caught.value.code == code
        assert len(str(caught.value)) < 700


@pytest.mark.guard("maskvlm.config.given_options:check_names")
def test_keys_that_the_parser_keeps_for_itself_are_refused(build: Build, tmp_path: Path) -> None:
    for number, text in enumerate(("__path__: x", "a:\n  - {b.__class__: 1}", "model: {class_path: [x]}")):
        (tmp_path / f"{number}.yaml").write_text(text)
        with pytest.raises(UserError, match=r"is not allowed in files|class_path is not text"):
            read_config_file(str(tmp_path / f"{number}.yaml"))


# What the environment brings in.
@pytest.mark.guard("maskvlm.config.given_options:fill_environment", gives="args[0]")
@pytest.mark.parametrize(
    "text",
    [
        "${oc.decode:1}",
        "${oc.create:{a: 1}}",
        "${model.lr}",
        "${oc.env:A,${oc.decode:x}}",
        "${oc.${x}:A}",
        "${",
        "a${b",
    ],
)
def test_only_the_environment_is_filled_in(build: Build, fails: Callable[..., UserError], text: str) -> None:
    error = fails(text=f"ckpt_path: '{text}'\n")
    assert "uses more than an environment variable" in error.what
    assert error.code == ExitCode.REFUSED


def test_what_a_variable_holds_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "a}b, {c: d}")
    monkeypatch.setenv("TWO", "x${oc.env:ONE}")
    monkeypatch.setenv("THREE", "\x1b[2J")
    assert fill_environment({"a": ["${oc.env:ONE}/x", 1]}, "x") == {"a": ["a}b, {c: d}/x", 1]}
    assert fill_environment("${oc.env:NO_SUCH,${oc.env:ONE}/y}z ${oc.env:NO_SUCH,}", "x") == "a}b, {c: d}/yz "
    assert fill_environment("${oc.env:NO_SUCH,{run}/a}", "x") == "{run}/a"
    for text in ("${oc.env:TWO}", "${oc.env:THREE}", "${oc.env:NO_SUCH}", "${oc.env:A," * 3_000 + "}" * 3_000):
        with pytest.raises(UserError):
            fill_environment(text, "x")


@pytest.mark.parametrize(
    "text",
    [
        "https://x.example/${oc.env:KEY_OF_THIS_TEST}",
        "${oc.env:NO_SUCH,https:}//${oc.env:KEY_OF_THIS_TEST}",
        "https://${oc.env:NO_SUCH,${oc.env:KEY_OF_THIS_TEST}.x.example}",
        "${oc.env:NO_SUCH,https://x.example/${oc.env:KEY_OF_THIS_TEST}}",
        "{url: https://x.example/${oc.env:KEY_OF_THIS_TEST}}",
        '{url: "https:\\x2f\\x2fx.example/${oc.env:KEY_OF_THIS_TEST}"}',
    ],
)
def test_a_file_sends_no_variable_to_an_address(fails: Callable[..., UserError], text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_THIS_TEST", "secret")
        error = fails(text=f"trainer: {{logger: {{dict_kwargs: {{url: '{text}'}}}}}}\n")
        assert error.what == "sends the environment variable KEY_OF_THIS_TEST to an address"
        assert error.code == ExitCode.REFUSED
        assert "secret" in fill_environment(text, "command line", typed=True)


def test_a_variable_may_hold_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "https://x.example")
    monkeypatch.setenv("TWO", "y")
    assert fill_environment("${oc.env:ONE}/${oc.env:TWO}", "x") == "https://x.example/y"
    assert fill_environment("https://x.example/${oc.env:NO_SUCH,y}", "x") == "https://x.example/y"


@pytest.mark.guard("maskvlm.config.parser:CommandParser._default_env", gives="True")
def test_the_environment_sets_no_key(
    build: Build, stack: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--run", "x", *stack(WHERE="cpu")]
    before = run_command(Parsed, words).settings
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("FIT__CKPT_PATH", "FIT__TRAINER__MAX_STEPS", "TRAINER_MAX_STEPS", "FIT__TRAINER__MAX_EPOCHS"):
        monkeypatch.setenv(f"PL_{name}", "77")
    assert run_command(Parsed, words).settings == before


@pytest.mark.guard("maskvlm.config.given_options:check_words")
def test_words_that_no_file_could_hold_are_refused(build: Build, fails: Callable[..., UserError]) -> None:
    assert fails("--run", "\udcff").what == "is not plain UTF-8 text"
    assert fails("--run", "a\x1b[2J").what == "is not plain UTF-8 text"
    assert fails("--run", "x" * 100_001).code == ExitCode.REFUSED


def test_an_over_long_name_is_one_line(stack: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--run", "x" * 300, *stack(WHERE="cpu")]) == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: {'x' * 60}...: the name is too long. Give another.\n"


def test_help_of_a_class_with_words_behind_it_is_one_line(fails: Callable[..., UserError]) -> None:
    assert fails("--data.help", "--model.seed.help", "x").where == "x"


@pytest.mark.guard("maskvlm.training.failure:_one_line", gives="args[0]")
def test_what_moves_the_cursor_does_not_reach_the_terminal(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "a\u202eb\x1b[2J\nc.yaml"]) == ExitCode.MISSING_INPUT
    assert capsys.readouterr().err == "error: a b [2J c.yaml: no such configuration file. Check the path.\n"


def test_a_damaged_record_of_a_run_is_one_line(tmp_path: Path) -> None:
    for content in (b"\x00\xff" * 50, b"a: [", b"a: !!python/name:os.system x", b"x: " + b"[" * 500):
        (tmp_path / "config-fit.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"--ckpt_path last") as caught:
            newest_of(tmp_path, "a: 1\n", print)
        assert caught.value.where.startswith(str(tmp_path / "config-fit.yaml"))
        assert caught.value.code == ExitCode.BAD_DATA


def test_a_package_that_is_not_installed_is_no_bug() -> None:
    line = user_line(ModuleNotFoundError("No module named 'lightning.pytorch'", name="lightning.pytorch"))
    assert line is not None
    assert line.code == ExitCode.UNAVAILABLE
    assert f"lightning is not installed in {sys.executable}" in line.text
    assert user_line(ModuleNotFoundError("No module named 'nowhere'", name="nowhere")) is None


def test_every_required_package_is_known_by_the_name_it_is_imported_by() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    names = {re.split(r"[ \[><=]", line)[0] for line in lines if line and not line.startswith("#")}
    imported = {"pillow": "PIL", "pyyaml": "yaml"}
    assert {imported.get(name, name) for name in names} == REQUIRED
