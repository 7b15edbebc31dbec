"""The documentation: links lead somewhere, commands are understood, numbers are those of their files, and the notebook
runs. `make docs` executes the tutorials; here nothing is built."""

import io
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from toy_pretrained import saved

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.reporting.metric_tables import metrics_table

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
OUTSIDE = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "tasks/README.md")]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
FENCE = re.compile(r"^(```+|~~~+).*?^\1$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# ---------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_internal_links_lead_somewhere() -> None:
    gone = []
    for page in (*PAGES, *OUTSIDE):
        for target in LINK.findall(FENCE.sub("", text_of(page))):
            path, _, anchor = target.partition("#")
            there = (page.parent / path) if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                gone.append(f"{page.relative_to(ROOT)}: {target}")
    assert gone == []


def test_pages_of_results_say_what_their_metrics_say() -> None:
    """To the digit: every line of the tables that a run prints stands on the page beside its metrics.json."""
    for metrics in DOCS.glob("results/*/metrics.json"):
        console = Console(width=200, file=io.StringIO(), force_terminal=False)
        console.print(metrics_table(json.loads(text_of(metrics))))
        page = {line.rstrip() for line in text_of(metrics.with_name("README.md")).splitlines()}
        lines = [
            line.rstrip() for line in console.file.getvalue().splitlines() if re.search(r"\d \d|\d\.\d.*\d\.\d", line)
        ]
        printed = {line for line in lines if "Gain of" not in line}
        assert len(printed) >= 8
        assert printed <= page


def test_tables_of_results_are_written_from_files() -> None:
    """A digit that was typed differs from its file, and is written over."""
    tables, count = runpy.run_path(str(DOCS / "results/tables.py")), 0
    for path in tables["PAGES"]:
        page = text_of(path)
        typed = tables["TABLE"].sub(lambda found: found[0].replace("9", "8"), page)
        assert tables["filled"](typed) == page
        count += len(tables["TABLE"].findall(page))
    assert count >= 20


# ---------------------------------------------------------------------- commands

TRAINED = dict.fromkeys(("first", "mine", "photos", "paper"), "pretrain")
CHECKPOINTS = {**TRAINED, "vqa": "vqa", "captioning": "captioning"}
OWN_SETS = ("mine", "photos", "laion", "birds")


def commands(page: Path) -> Iterator[list[str]]:
    """What `maskvlm` is given by the lines of its shell blocks that begin so."""
    for block in re.findall(r"```(?:bash|\{code-cell\}\n%%bash)\n(.*?)```", text_of(page), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            first, *words = shlex.split(re.split(r" && | \| ", line)[0], comments=True) or [""]
            if first == "maskvlm":
                yield [word for word in words if not word.startswith("run=")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints and prepared sets that the pages name."""
    folder = tmp_path_factory.mktemp("project")
    for name, kind in CHECKPOINTS.items():
        saved(folder / "checkpoints" / name / "best.ckpt", kind)
    for name in ("encoders/vit/model.safetensors", "encoders/text/config.json", "encoders/text/tokenizer.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for name in OWN_SETS:
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "manifest.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_every_command_is_understood(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words compose, its options are parsed; nothing is run. Pages of results say what was run then."""
    monkeypatch.chdir(project)
    (project / "mine.yaml").write_text("data: {init_args: {batch_size: 8}}\n")
    pages = [page for page in (*PAGES, *OUTSIDE) if "results" not in page.parts]
    told = {tuple(words): page.name for page in pages for words in commands(page)}
    composed = {
        words: page for words, page in told.items() if words and words[0] in COMMANDS and "acme" not in str(words)
    }
    assert len(composed) > 40
    wrong = []
    for (name, *rest), page in composed.items():
        try:
            full = [] if "--help" in rest else COMMANDS[name].full(rest)
            if full[:1] in (["fit"], ["validate"], ["test"]) and "--print_config" not in full:
                run_command(Parsed, full)
        except Exception as error:
            wrong.append(f"{page}: {name} {' '.join(rest)}: {error}")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------- the notebook


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, which is a toy on the CPU."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(DOCS / "notebooks" / "pretrain_on_a_gpu.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    last = tmp_path / "checkpoints" / "gpu-model"
    assert {"model.safetensors", "config.json"} <= {path.name for path in last.iterdir()}
