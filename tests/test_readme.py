"""What README and the documentation say of using a model works as it is printed: here with toy checkpoints in the place
of real ones."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toy_pretrained import saved

from maskvlm.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("## Use a model") : README.index("### A page to try it in")]
HOW_TO = ROOT / "docs" / "how-to"
PAGE = "".join((HOW_TO / name).read_text(encoding="utf-8") for name in ("use-a-model.md", "search.md"))
TEXTS = {"README.md": SECTION, "docs/how-to": PAGE[: PAGE.index("## Vectors alone")]}


def run(line: str) -> None:
    """A line of a shell block: python's, maskvlm's, or make's, which is maskvlm's."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        name, value = words[2].split("=")
        assert main([words[1], f"{name.lower()}={value}", "--data.source.val", "12"]) == 0
    elif words[0] == "maskvlm":
        assert main(words[1:]) == 0
    else:
        assert words[0] == ".venv/bin/python"
        subprocess.run([sys.executable, *words[1:]], check=True)


@pytest.mark.parametrize("place", TEXTS)
def test_it_works_as_printed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "checkpoints" / "RUN" / "best.ckpt")
    saved(tmp_path / "checkpoints" / "FINETUNED" / "best.ckpt", "vqa")
    monkeypatch.chdir(tmp_path)
    blocks: list[tuple[str, str]] = re.findall(r"```(bash|python)\n(.*?)```", TEXTS[place], re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "bash"]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, place, "exec"), {})
        else:
            for line in text.strip().splitlines():
                run(line)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"scene.png", "filled.png", "folder", "out.png", "model", "checkpoints"}
