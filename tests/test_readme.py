"""What README and the documentation say of using a model works as it is printed: README with the model that comes along
and with the output that stands there, the pages with toy checkpoints in the place of real ones."""

import doctest
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from toy_pretrained import saved

from maskvlm.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOW_TO = ROOT / "docs" / "how-to"
PAGE = "".join((HOW_TO / name).read_text(encoding="utf-8") for name in ("use-a-model.md", "search.md"))
PAGE = PAGE[: PAGE.index("## Vectors alone")]
NUMBER = re.compile(r"-?\d+\.\d+")


def blocks(text: str, *kinds: str) -> list[tuple[str, str]]:
    """Kind and content of its code blocks."""
    matches = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(kind, content) for kind, content in matches if kind in kinds]


# ---------------------------------------------------------------------- README


def check_printed(printed: str, expected: str) -> None:
    """The same words; numbers may differ in the last digits, as machines add up in different orders."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    for number, wanted in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert float(number) == pytest.approx(float(wanted), abs=0.02)


def test_readme_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ((_, console),) = blocks(README, "console")
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", console, re.MULTILINE)
    assert len(commands) >= 3
    for command, output in commands:
        first, *words = shlex.split(command, comments=True)
        assert first == "maskvlm"
        assert main(words) == 0
        check_printed(capsys.readouterr().out, output)
    ((_, session),) = blocks(README, "pycon")
    test = doctest.DocTestParser().get_doctest(session, {}, "README.md", None, 0)
    assert len(test.examples) >= 5
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0, capsys.readouterr().out


# ---------------------------------------------------------------------- pages


def run(line: str) -> None:
    """A line of a shell block: python's, maskvlm's, or make's, which is maskvlm's."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        name, value = words[2].split("=")
        assert main([words[1], f"{name.lower()}={value}", "--data.source.val", "12"]) == 0
    elif words[0] == "maskvlm":
        assert main(words[1:]) == 0
    elif words[0] == "cat" and words[2:4] == ["|", "maskvlm"]:
        piped = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(Path(words[1]).read_bytes()))
        with mock.patch("sys.stdin", piped):
            assert main(words[4:]) == 0
    else:
        assert words[0] == ".venv/bin/python"
        subprocess.run([sys.executable, *words[1:]], check=True)


@pytest.mark.slow
def test_pages_on_using_a_model_work_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "checkpoints" / "first" / "best.ckpt")
    saved(tmp_path / "checkpoints" / "vqa" / "best.ckpt", "vqa")
    monkeypatch.chdir(tmp_path)
    code_blocks = blocks(PAGE, "bash", "python")
    assert [kind for kind, _ in code_blocks] == ["bash", "python", "bash", "bash"]
    for kind, text in code_blocks:
        if kind == "python":
            exec(compile(text, "docs/how-to", "exec"), {})
        else:
            for line in text.strip().splitlines():
                run(line)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"scene.png", "filled.png", "folder", "out.png", "model", "checkpoints"}
