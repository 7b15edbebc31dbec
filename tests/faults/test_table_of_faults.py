"""docs/faults.md has every fault, a verdict for each, and names files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = [*(str(number) for number in range(1, 66)), *(f"D{number}" for number in range(1, 16)), "page"]


def test_every_fault_is_there_once_with_a_verdict_and_files_that_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\d+|D\d+|page) \|[^|]+\|[^|]+\| (held|held in part: [^|]+|open: [^|]+) \|(.*)\|$", text, re.M
    )
    assert [number for number, *_ in rows] == EXPECTED
    named = {*re.findall(r"\b((?:bench|tests)/[\w/]+\.py)", text)}
    assert sorted(file for file in named if not (ROOT / file).is_file()) == []
