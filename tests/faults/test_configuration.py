"""Hostile YAML, files that are none, words that no file could hold, variables of the environment: one line each."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.given_options import fill_environment, read_config_file
from maskvlm.config.safe_yaml import MOST_LEVELS, read_yaml
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------ hostile YAML


BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases that multiply"),
        ("a: &a {b: *a}", "an alias to the value it is in"),
        ("[" * 5_000, "nested too deeply"),
        ("[" + "1," * 30_000 + "1]", "more than 20000 values"),
        ("x" * 100_001, "characters of YAML"),
        ("a: !!python/object/apply:os.system [x]", "the tag"),
        ("[!!python/name:os.system x]", "the tag"),
    ],
    ids=lambda value: value[:20],
)
def test_what_asks_for_more_than_plain_values_is_refused_at_once(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(text, "x.yaml")
    assert caught.value.code == ExitCode.REFUSED
    assert time.process_time() - started < 2


def test_plain_values_are_read() -> None:
    text = "a: [1, -2.5, 1e-3, 1.0e+3, .inf, ~, yes, 'no', 0x1f, 1_000]\nb: 2026-01-31\nd: &d [1]\ne: *d\n"
    values = [1, -2.5, 0.001, 1000.0, float("inf"), None, True, "no", 31, 1000]
    read = read_yaml(text, "x")
    assert read == {"a": values, "b": "2026-01-31", "d": [1], "e": [1]}
    assert read["d"] is not read["e"]
    deep: Any = 1
    for _ in range(MOST_LEVELS - 1):
        deep = [deep]
    assert read_yaml(yaml.safe_dump(deep), "x") == deep


# ------------------------------------------------------------------ keys and values


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (
            "model:\n  task:\n    init_args:\n      image_mask_ratoi: 0.5\n",
            "mine.yaml:4: model.task.image_mask_ratoi",
            "unknown key (did you mean model.task.image_mask_ratio?)",
        ),
        (
            "data: {init_args: {source: {init_args: {\n train: fast}}}}",
            "mine.yaml:2: data.source.train",
            "fast does not fit",
        ),
        ("data: {init_args: {batch_size: '1" + "0" * 30 + "'}}", "data.batch_size", "a number is out of range"),
    ],
    ids=["key", "type", "range"],
)
def test_a_wrong_key_or_value_has_its_place_and_what_would_fit(
    stack: Callable[..., list[str]], tmp_path: Path, text: str, where: str, what: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        run_command(Parsed, ["fit", "--run", str(tmp_path), *stack(WHERE="cpu"), "-c", str(tmp_path / "mine.yaml")])
    assert caught.value.where.removeprefix(f"{tmp_path}/") == where
    assert (caught.value.what, caught.value.code) == (what, ExitCode.USAGE)


# ------------------------------------------------------------------ files and words


def test_a_pipe_a_device_and_a_folder_are_no_configuration(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name in (str(tmp_path), "/dev/zero", str(pipe)):
        end = threading.Timer(1, lambda: os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK)))
        end.start()  # lets go whoever waits for the pipe
        with pytest.raises(UserError, match="is a folder, pipe or device") as caught:
            read_config_file(name)
        end.cancel()
        assert caught.value.code == ExitCode.MISSING_INPUT


def test_files_that_are_not_there_too_large_or_no_text_or_hold_what_the_parser_keeps_for_itself(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * 2**30)  # a hole of 10 GB
    contents = {"latin": b"run: caf\xe9\n", "path": b"__path__: x", "class": b"a:\n  - {b.__class__: 1}"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    codes = []
    for name in ("x" * 5_000, "a\0b", "conf/base.yaml/x", *(tmp_path / name for name in ("large", *contents))):
        with pytest.raises(UserError) as caught:
            read_config_file(str(name))
        assert len(str(caught.value)) < 700
        codes.append(caught.value.code)
    missing, refused, usage = ExitCode.MISSING_INPUT, ExitCode.REFUSED, ExitCode.USAGE
    assert codes == [missing, missing, missing, refused, usage, refused, refused]


# ------------------------------------------------------------------ the environment


@pytest.mark.parametrize("text", ["${oc.decode:1}", "${model.lr}", "${oc.env:A,${oc.decode:x}}", "${oc.${x}:A}", "${"])
def test_only_the_environment_is_filled_in(text: str) -> None:
    with pytest.raises(UserError, match="uses more than an environment variable") as caught:
        fill_environment({"a": [text]}, "x")
    assert caught.value.code == ExitCode.REFUSED


@pytest.mark.parametrize(
    "text",
    [
        "https://x.example/${oc.env:KEY_OF_THIS_TEST}",
        '{url: "https:\\x2f\\x2fx.example/${oc.env:KEY_OF_THIS_TEST}"}',
    ],
)
def test_a_file_sends_no_variable_to_an_address(
    stack: Callable[..., list[str]], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KEY_OF_THIS_TEST", "secret")
    (tmp_path / "mine.yaml").write_text(f"trainer: {{logger: {{dict_kwargs: {{url: '{text}'}}}}}}\n")
    with pytest.raises(UserError, match="KEY_OF_THIS_TEST to an address") as caught:
        run_command(Parsed, ["fit", *stack(WHERE="cpu"), "-c", str(tmp_path / "mine.yaml")])
    assert caught.value.code == ExitCode.REFUSED
    assert "secret" in fill_environment(text, "command line", typed=True)
