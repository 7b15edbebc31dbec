"""The house rules that no linter knows: which way imports point, what a name means."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ORDER = (
    "utils", "config", "data", "checkpoint", "model", "objectives", "training", "reporting", "study", "inference",
    "suites", "cli", "demo",
)  # fmt: skip
"""Each package may import those before it."""


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it is run; what stands under TYPE_CHECKING does not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    modules: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            modules.add(node.module or "")
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def part(module: str) -> str:
    """`maskvlm.data.text` -> `data`."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    return {module_of(path): {m for m in imports(path) if m.startswith("maskvlm.")} for path in SOURCES}


def test_the_core_knows_no_task_and_no_test() -> None:
    guilty = {path.name for path in SOURCES if {m.split(".")[0] for m in imports(path)} & {"tasks", "tests"}}
    assert guilty == set()


def test_imports_point_one_way(graph: dict[str, set[str]]) -> None:
    """No module leads back to itself: nothing is left when those without imports are taken away in turn."""
    remaining = {name: targets & graph.keys() for name, targets in graph.items()}
    while free := {name for name, targets in remaining.items() if not targets}:
        remaining = {name: targets - free for name, targets in remaining.items() if name not in free}
    assert remaining == {}, "these import each other"


def test_packages_import_those_before_them_alone(graph: dict[str, set[str]]) -> None:
    against = {
        f"{name} imports {m}"
        for name, targets in graph.items()
        for m in targets
        if part(name + ".") in ORDER and part(m) in ORDER and ORDER.index(part(m)) > ORDER.index(part(name + "."))
    }
    assert against == set()
    folders = {path.name for path in (ROOT / "src" / "maskvlm").iterdir() if path.is_dir()}
    assert folders - {"__pycache__", "models"} == {*ORDER}  # models: files of those that come along, no code
    assert not [*(ROOT / "src" / "maskvlm" / "models").rglob("*.py")]


def test_the_command_refuses_before_it_imports_torch() -> None:
    """What finds a wrong file or word must not cost seconds."""
    code = "import sys; from maskvlm.cli.main import end_of; end_of(['fit', '-c', 'nope.yaml']); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": "src"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    modules = {*done.stdout.splitlines()[-1].split()}
    assert "maskvlm.cli.main" in modules
    assert not {"torch", "lightning", "transformers", "timm", "numpy"} & modules


def test_one_name_means_one_thing() -> None:
    """No public function or class is called as one of another module is; `main` is what a command calls."""
    homes: dict[str, list[str]] = {}
    for path in [*SOURCES, *(ROOT / "tasks").rglob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1 and name != "main"} == {}
