"""docs/faults.md has every fault, a verdict for each, and names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
EXPECTED = [*(str(number) for number in range(1, 66)), *(f"D{number}" for number in range(1, 16)), "page"]
VERDICT = re.compile(r"held|held in part: \S.*|open: \S.*")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


class Row(NamedTuple):
    """One line of a table of faults."""

    number: str
    fault: str
    happens: str
    verdict: str
    tests: str


def rows() -> list[Row]:
    """Of all tables whose first column is `#`, which no other table of the page has."""
    table_rows, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0] == "#")
        if inside and cells[0] != "#" and set(cells[0]) != {"-"}:
            table_rows.append(Row(*cells))
    return table_rows


@cache
def names_in(file: Path) -> frozenset[str]:
    """The test functions of a file, which is not imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_fault_is_there_once_and_in_order() -> None:
    assert [row.number for row in rows()] == EXPECTED


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.number)
def test_it_has_a_verdict_and_tests_that_exist(row: Row) -> None:
    assert VERDICT.fullmatch(row.verdict)
    assert row.fault
    assert row.happens.endswith(".")
    named = TEST.findall(row.tests)
    assert "<br>".join(f"`{file}::{name}`" for file, name in named) == row.tests
    assert bool(named) != row.verdict.startswith("open")
    absent = [f"{file}::{name}" for file, name in named if not (ROOT / file).is_file()]
    absent += [f"{f}::{name}" for f, name in named if (ROOT / f).is_file() and name not in names_in(ROOT / f)]
    assert absent == []


def test_the_long_versions_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = {*re.findall(r"python ((?:bench|tests)/\S+\.py)", text)}
    assert len(files) == 6
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []
