"""The documentation: links lead somewhere, commands are understood, layouts and licences are the code's, the notebook
runs. `make docs` executes the tutorials; here nothing is built."""

import ast
import configparser
import importlib
import importlib.util
import inspect
import io
import json
import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml
from raw_toys import TOYS
from rich.console import Console
from toy_pretrained import saved

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.compose import tasks
from maskvlm.data.raw import FACTS, SETS
from maskvlm.objectives.task import Task
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


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def toctree(page: Path) -> Iterator[Path]:
    """The pages below a page."""
    for _, block in re.findall(r"^(```+)\{toctree\}\n(.*?)^\1$", text_of(page), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                yield page.parent / f"{line}.md"


def test_every_page_has_its_place() -> None:
    """Each is in one toctree, and each entry of one is a page."""
    listed = [entry for page in PAGES for entry in toctree(page)]
    assert sorted([DOCS / "index.md", *listed]) == PAGES


MEASURED = sorted(DOCS.glob("results/*/metrics.json"))


@pytest.mark.parametrize("metrics", MEASURED, ids=lambda path: path.parent.name)
def test_a_page_of_results_says_what_its_metrics_say(metrics: Path) -> None:
    """To the digit: every line of the tables that a run prints stands on the page beside its metrics.json."""
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(metrics_table(json.loads(text_of(metrics))))
    printed = {
        line.rstrip() for line in console.file.getvalue().splitlines() if re.search(r"\d \d|\d\.\d.*\d\.\d", line)
    }
    printed = {line for line in printed if "Gain of" not in line}
    lines = {line.rstrip() for line in text_of(metrics.with_name("README.md")).splitlines()}
    assert len(printed) >= 8
    assert printed <= lines


WRITTEN = {
    "index.md": 4, "suites/README.md": 8, "inference/README.md": 2, "downstream/README.md": 4,
    "photographs/README.md": 2,
}  # fmt: skip
"""Pages of results, and how many of their tables are written from files."""


@pytest.mark.parametrize(("name", "count"), WRITTEN.items())
def test_tables_of_results_are_written_from_files(name: str, count: int) -> None:
    tables = runpy.run_path(str(DOCS / "results/tables.py"))
    assert [path.relative_to(DOCS / "results").as_posix() for path in tables["PAGES"]] == list(WRITTEN)
    page = text_of(DOCS / "results" / name)
    assert len(tables["TABLE"].findall(page)) == count
    typed = tables["TABLE"].sub(lambda found: found[0].replace("9", "8"), page)
    assert typed != page
    assert tables["filled"](typed) == page


def test_what_the_tables_of_results_say(tmp_path: Path) -> None:
    """Toys of each kind of file."""
    table_of, file = runpy.run_path(str(DOCS / "results/tables.py"))["table_of"], tmp_path / "found.json"
    (tmp_path / "runs.csv").write_text("cell,seed,study: R@1,step\na,0,1.0,5\na,1,2.0,5\nb,0,0.125,5\n")
    lines = ["|  | seeds | R@1 |", "| --- | --- | --- |", "| a | 2 | 1.50 |", "| b | 1 | 0.12 |"]
    assert table_of(tmp_path / "runs.csv").splitlines() == lines

    def figure(value: float, interval: tuple[float, float] | None) -> dict[str, Any]:
        return {"value": value, "chance": 50.0, "interval": interval}

    ways = {"match": {"top-1": figure(61.04, (50.0, 72.0)), "  dog": figure(1.0, None), "mean": figure(7.0, None)}}
    file.write_text(json.dumps({"suite": "x", "items": 1200, "metrics": ways}))
    *heading, row = table_of(file).splitlines()
    assert heading[0] == "| 1,200 items | top-1 (chance 50.0) | mean (chance 50.0) |"
    assert row == "| `match` | 61.0 (50.0 to 72.0) | 7.0 |"

    shares = [
        {"method": "fill", "question": "colour", "right": 1, "of": 4, "chance": 12.5},
        {"method": "score", "question": "order", "right": 3, "of": 4, "chance": 50.0},
        {"method": "match", "question": "order", "right": 2, "of": 4, "chance": 50.0},
        {"method": "cosine", "question": "order", "right": 1, "of": 4, "chance": 50.0},
    ]
    file.write_text(json.dumps({"shares": shares}))
    assert table_of(file, "methods").splitlines()[2:] == ["| `fill` | colour | 25.0 % of 4 | 12.5 |"]
    assert table_of(file, "wordings").splitlines()[2:] == ["| order, of 4 | 75.0 % | 50.0 % | 25.0 % |"]

    reached = {"full": {"0": 90.0, "1": 92.0, "2": 94.0}, "ablated": {"0": 30.0}}
    kinds = {"size": {"full": [1.0, 2.0]}, "size_majority": {"full": [0.5]}}
    metrics = [{"task": "vqa", "metric": "accuracy", "level": 31.4, "ways": reached, "kinds": kinds}]
    alone = {"full": {"0": 70.0, "1": 72.0}}
    metrics.append({"task": "nlvr", "metric": "consistency", "level": None, "ways": alone, "kinds": {}})
    image = [{"task": "vqa", "points": 61.0, "interval": [59.5, 62.5], "seeds": [60.0, 62.0]}]
    file.write_text(json.dumps({"metrics": metrics, "image": image}))
    assert table_of(file, "metrics").splitlines()[2:] == [
        "| vqa, `accuracy` | 31.4 | 92.0 (90.0 to 94.0) | 30.0 (one seed) |",
        "| nlvr, `consistency` |  | 71.0 (70.0 to 72.0) |  |",
    ]
    assert table_of(file, "image").splitlines()[2:] == ["| vqa | +61.0 (+59.5 to +62.5) | +60.0, +62.0 |"]
    assert table_of(file, "kinds").splitlines()[2:] == ["| vqa | size | 0.5 | 1.5 |  |"]

    recalls = {f"retrieval/{way}_r{k}": 10.0 * k for way in ("itc_tr", "itc_ir", "tr", "ir") for k in (1, 5, 10)}
    learned = {"mlm/accuracy": 30.0, "mlm/accuracy_wrong_image": 20.5, "mim/mse_gain": 5.0}
    (tmp_path / "one.json").write_text(json.dumps(recalls | learned))
    (tmp_path / "two.json").write_text(json.dumps(recalls | learned | {"retrieval/ir_r1": 11.0, "mim/mse_gain": 7.0}))
    (tmp_path / "contrast.json").write_text(json.dumps({key: recalls[key] for key in recalls if "itc" in key}))
    runs = {"runs": {"seed 1": "one.json", "seed 2": "two.json"}, "others": {"contrast": "contrast.json"}}
    file.write_text(json.dumps(runs))
    recall, words = "10.0 / 50.0 / 100.0", "+9.5 (30.0 / 20.5)"
    assert table_of(file).splitlines()[2:] == [
        f"| seed 1 | {recall} | {recall} | {recall} | {recall} | {words} | +5.0 % |",
        f"| seed 2 | {recall} | {recall} | {recall} | 11.0 / 50.0 / 100.0 | {words} | +7.0 % |",
        f"| **mean of 2 seeds** | {recall} | {recall} | {recall} | 10.5 / 50.0 / 100.0 | {words} | +6.0 % |",
        f"| contrast | {recall} | {recall} |  |  |  |  |",
    ]
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"found\.json: no metrics of a run"):
        table_of(file)


# ---------------------------------------------------------------------- commands

TRAINED = dict.fromkeys(("first", "mine", "photos", "paper"), "pretrain")
CHECKPOINTS = {**TRAINED, "vqa": "vqa", "captioning": "captioning"}
OF_MAKE = ("setup", "test", "check", "docs", "gpu-check")
"""Targets that are no command of maskvlm."""
OTHER_WORDS = ("TASK", "SET", "STUDY", "ARGS", "STREAM", "DATA_ROOT")
OWN_SETS = ("mine", "photos", "laion", "birds")


def shell_lines(page: Path) -> Iterator[str]:
    """Commands of its shell blocks, one a line, without comments."""
    for block in re.findall(r"```(?:bash|\{code-cell\}\n%%bash)\n(.*?)```", text_of(page), re.DOTALL):
        block = block.replace("\\\n", " ")
        if block.startswith("--"):  # a list of options, which are parsed together
            block = " ".join(line.partition(" #")[0] for line in block.splitlines())
        for line in block.splitlines():
            yield from re.split(r" && | \| ", line)


def words_of(line: str) -> list[str] | None:
    """What `maskvlm` is given by a line; None of a line that is another program's."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"] and len(words) > 1:
        target, *rest = words[1:]
        assert re.search(rf"^{target}:|\b{target}\b", text_of(ROOT / "Makefile"), re.MULTILINE), line
        if target in OF_MAKE:
            return None
        variables = [word.partition("=") for word in rest]
        extra = [each for name, _, value in variables if name == "ARGS" for each in shlex.split(value)]
        plain = [value for name, _, value in variables if name in ("TASK", "SET", "STUDY")]
        rest = [f"{name.lower()}={value}" for name, _, value in variables if name not in OTHER_WORDS]
        named = [word.replace("=...", "=checkpoints/first/best.ckpt") for word in rest]
        return [target, *plain, *named, *extra]
    if words and words[0].startswith("--"):  # a list of options
        return ["pretrain", *words]
    if "maskvlm" in words[:6] and not {"pip", "apptainer"} & {words[0]}:
        return words[words.index("maskvlm") + 1 :]
    return None


PAGE_OF_COMMAND = {
    tuple(word for word in words if not word.startswith("run=")): page.relative_to(ROOT).as_posix()
    for page in [*PAGES, *OUTSIDE]
    if "results" not in page.parts
    for line in shell_lines(page)
    if (words := words_of(line))
}
"""Every command of the pages, and a page that shows it; not those of results, which say what was run then."""


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


def test_every_command_is_understood(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words compose, and its options are parsed; nothing is run."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(ROOT / "tests"))  # acme
    (project / "mine.yaml").write_text("data: {init_args: {batch_size: 8}}\n")
    assert len(PAGE_OF_COMMAND) > 80
    wrong = []
    for words, page in PAGE_OF_COMMAND.items():
        name, rest = words[0], [word for word in words[1:] if word not in ("--allow-import", "acme")]
        known = name in COMMANDS or name in ("answer", "compare", "entail", "--help") or "." in name
        assert known or name in ("COMMAND", "first"), f"{page}: {' '.join(words)}"
        if name not in COMMANDS or "--help" in rest or any("acme" in word for word in rest):
            continue
        try:
            full = COMMANDS[name].full(rest)
            if full[0] in ("fit", "validate", "test") and "--print_config" not in full:
                run_command(Parsed, full, ["acme"])
        except Exception as error:
            wrong.append(f"{page}: {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------- what the code says as well


def layouts() -> dict[str, tuple[str, set[str]]]:
    """Of docs/reference/data-sets.md: set -> its section, and the files that its layouts list."""
    parts = re.split(r"^### (\w+)$", text_of(DOCS / "reference" / "data-sets.md"), flags=re.MULTILINE)[1:]
    sections = {}
    for name, section in zip(parts[::2], parts[1::2], strict=True):
        block = section.split("```")[1].removeprefix("text\n")
        sections[name] = section, {line.split()[0] for line in block.splitlines() if line != "or"}
    return sections


SCRIPTS = sorted(path for folder in ("bench", "docs/results") for path in ROOT.joinpath(folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_script_takes_from_the_package_is_there(script: Path) -> None:
    """Scripts of the pages' figures run for minutes to hours; a name that moved would end them at once."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("maskvlm", "tasks"):
            module = importlib.import_module(str(node.module))
            # A submodule is no attribute of its package before something has imported it.
            gone = [name.name for name in node.names if not hasattr(module, name.name)]
            assert [name for name in gone if importlib.util.find_spec(f"{node.module}.{name}") is None] == []


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_to_be_copied_names_real_folders(page: Path) -> None:
    """No command stands for any run: whoever copies it would have to know what to put there."""
    for block in re.findall(r"^```(?:bash|console|sh)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
        assert not re.search(r"checkpoints/RUN|\bRUN/", block), block


@pytest.mark.parametrize("toy", TOYS)
def test_the_layouts_are_those_that_are_read(toy: str) -> None:
    """The files of the toys, which `make data` reads in tests/data, are listed."""
    name, make = TOYS[toy]
    _, files = layouts()[name]
    for file in make():
        if file == "x":  # no list: what fills the toy of sbu
            continue
        assert any(fnmatch(file, pattern) for pattern in files), f"{file} of {toy}"


def test_every_set_has_a_layout_and_its_terms() -> None:
    sections = layouts()
    assert sections.keys() == SETS.keys()
    for name, facts in FACTS.items():
        section = sections[name][0].lower()
        terms = re.split(r"[;,(]", facts.licence.lower())[0].strip()
        assert terms in section or "terms as of cc3m" in section, name
        assert facts.title.partition(",")[0].partition(" (")[0].lower().split(" in ")[0] in section, name


def test_the_reference_has_docstrings() -> None:
    """Of every name on its pages, and of every public member that it shows."""
    directive = re.compile(r"\.\. auto(class|function|data|module):: ([\w.]+)\n((?:   .*\n)*)")
    count = 0
    for page in (DOCS / "reference" / "api").glob("*.md"):
        for kind, path, options in directive.findall(text_of(page)):
            module, _, name = path.rpartition(".")
            thing: Any = importlib.import_module(path if kind == "module" else module)
            thing = thing if kind == "module" else getattr(thing, name)
            members = re.search(r":members: (.*)", options)
            names = members[1].split(", ") if members else []
            if kind == "class" and ":members:\n" in options and ":undoc-members:" not in options:
                names = [each for each, value in vars(thing).items() if callable(value) and not each.startswith("_")]
            for each in [thing, *(getattr(thing, each) for each in names)]:
                assert kind == "data" or inspect.getdoc(each), f"{path} {each}"
                count += 1
    assert count > 60


def documented() -> list[str]:
    """Paths of the classes and functions on the reference's pages."""
    pages = (DOCS / "reference" / "api").glob("*.md")
    return [path for page in pages for path in re.findall(r"\.\. auto(?:class|function):: ([\w.]+)", text_of(page))]


def undescribed(known: type) -> list[str]:
    """Arguments of a class that have no entry of their own, in its docstring or its constructor's."""
    texts = [known.__doc__ or "", known.__init__.__doc__ or ""]
    described = {entry.arg_name for text in texts for entry in docstring_parser.parse(text).params}
    parameters = list(inspect.signature(known.__init__).parameters.values())[1:]
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return [each.name for each in named if each.name not in described]


def test_every_argument_is_described_on_its_own() -> None:
    """`--help` of an option shows its argument's entry, and nothing for `low, high: ...`."""
    modules = {path: importlib.import_module(path.rpartition(".")[0]) for path in documented()}
    classes = [getattr(module, path.rpartition(".")[2]) for path, module in modules.items()]
    for name in tasks():
        module = importlib.import_module(f"tasks.{name}.task")
        classes += [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, Task)]
    classes = [each for each in classes if inspect.isclass(each)]
    classes = [each for each in classes if "__init__" in vars(each) and not issubclass(each, tuple | BaseException)]
    assert len(classes) > 20
    assert {f"{each.__module__}.{each.__name__}": undescribed(each) for each in classes if undescribed(each)} == {}


def raised_by(function: Any) -> bool:
    """Whether its own lines raise a UserError."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return any(getattr(call.func, "id", "") == "UserError" for call in calls)


def test_the_reference_says_which_mistakes_are_refused() -> None:
    """Of every public method and function in it whose own lines raise a UserError."""
    silent = []
    for path in documented():
        module, _, name = path.rpartition(".")
        known = getattr(importlib.import_module(module), name, None)
        members = vars(known).items() if inspect.isclass(known) else [(name, known)]
        for member, function in members:
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            if member.startswith("_") or not inspect.isfunction(function) or not raised_by(function):
                continue
            text = inspect.getdoc(function) or ""
            if "UserError" not in text and "aises" not in text:
                silent.append(f"{path}.{member}")
    assert silent == []


def test_one_version() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    cited = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert cited["version"] == version
    assert version in text_of(ROOT / "CHANGELOG.md")
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= cited.keys()
    assert cited["references"][0]["authors"][0]["family-names"] == "Kwon"


def test_issue_templates_are_forms() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    for form in forms:
        template = yaml.safe_load(text_of(form))
        if form.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= template.keys(), form
        for part in template["body"]:
            assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
            assert part["attributes"].keys() & {"label", "value"}
    assert len(forms) >= 3


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
