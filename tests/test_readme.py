"""What README and the documentation say of using a model works as it is printed: README with the model that comes along
and with the output that stands there, the pages with toy checkpoints in the place of real ones."""

import doctest
import io
import os
import re
import resource
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
MOST_WORDS, LONGEST_SENTENCE = 1500, 30


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


def processor_seconds(command: list[str], folder: Path) -> tuple[float, str]:
    """Of a processor, not of the clock: other tests run beside it. And what the command prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=one_thread)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_the_first_answer_costs_little_more_than_its_libraries(tmp_path: Path) -> None:
    """Most of the time of an answer is the import of torch and transformers. A bound in seconds would test the machine:
    the same answer takes 5 s on one and 12 s on another."""
    libraries = "import torch, transformers.modeling_utils, transformers.image_processing_utils, timm"
    maskvlm = [sys.executable, "-m", "maskvlm"]
    subprocess.run([*maskvlm, "scene", "6"], cwd=tmp_path, check=True, capture_output=True)
    imports, _ = processor_seconds([sys.executable, "-c", libraries], tmp_path)
    answer, printed = processor_seconds([*maskvlm, "caption", "scene.png"], tmp_path)
    assert printed == "big dotted blue star over big striped pink heart\n"
    assert answer <= 1.6 * imports


def test_an_answer_needs_nothing_of_training(tmp_path: Path) -> None:
    """Lightning takes a second or two to import, matplotlib half of one."""
    code = "import sys; from maskvlm.cli.main import main; main(['scene', '6']); main(['caption', 'scene.png']); "
    code += "print({'lightning', 'matplotlib', 'gradio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_readme_is_one_screen_that_is_read_once() -> None:
    assert len(README.split()) <= MOST_WORDS
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)  # where a link leads
    for line in re.split(r"\n\s*\n|^[|#].*$|^- ", prose, flags=re.MULTILINE):
        for sentence in re.split(r"(?<=[.?!])\s", line):
            assert len(sentence.split()) <= LONGEST_SENTENCE, sentence


def test_readme_s_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z-]+)", "\n".join(text for _, text in blocks(README, "bash")), re.MULTILINE)
    assert len(targets) >= 6
    help_of_make = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in targets:
        assert re.search(rf"^  {target} ", help_of_make, re.MULTILINE), target
        assert target in makefile
    # A path to be copied names a folder that exists, or one that a command of the page makes.
    assert "RUN/" not in README


def test_make_says_that_a_target_is_not_there() -> None:
    done = subprocess.run(["make", "pretain"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: there is no target 'pretain'. make alone lists all targets" in done.stderr


@pytest.mark.parametrize("word", ["task=vqa", "TAKS=vqa", "DATE=flickr8k"])
def test_make_refuses_a_variable_that_it_does_not_know(word: str) -> None:
    done = subprocess.run(["make", "finetune", word], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{word.partition('=')[0]}=.. is no variable here. There are MODEL RECIPE DATA WHERE RUN FROM" in done.stderr
    assert done.stdout == ""


def test_make_hands_on_variables_of_the_environment() -> None:
    words = ["make", "-n", "finetune", "TASK=vqa", "CUDA_VISIBLE_DEVICES=0", "ARGS=--model.lr 1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("maskvlm finetune 'vqa' --model.lr 1")


@pytest.mark.parametrize(("target", "ends"), [("study", "maskvlm study claims"), ("pretrain", "maskvlm pretrain")])
def test_a_stray_variable_of_the_environment_chooses_nothing(target: str, ends: str) -> None:
    stray = {**os.environ, "STUDY": "recipe", "MODEL": "large", "ARGS": "--jobs 9"}
    words = ["make", "-n", target, f"PYTHON={sys.executable}"]
    done = subprocess.run(words, cwd=ROOT, env=stray, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith(ends)


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
