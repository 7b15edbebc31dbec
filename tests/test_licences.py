"""docs/licences.md has every data set and every weight that this project names, and no image has terms nobody wrote
down."""

import re
from pathlib import Path

import yaml

from maskvlm.data.raw import FACTS, SETS
from maskvlm.data.raw.csv_jsonl_folder import UNKNOWN_LICENCE

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
PHOTOS = ROOT / "src" / "maskvlm" / "demo" / "photos"
OWN = {"csv", "jsonl", "folder", "webdataset", "hf"}
"""Ways in which people keep their own images: nobody can know their terms."""
FREE = r"\| (CC0|public domain\b.*) \|$"


def rows(heading: str) -> dict[str, list[str]]:
    """The tables of a section: each name in backquotes of the first cell -> the cells."""
    section = PAGE[PAGE.index(f"\n## {heading}\n") + 1 :].partition("\n## ")[0]
    table: dict[str, list[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "`SET`":
            table = dict.fromkeys(re.findall("`([^`]+)`", cells[0]), cells) | table  # the first table counts
    return table


def weights_named() -> set[str]:
    """Of the models in conf/model that do not start from random weights."""
    names = set()
    for file in (ROOT / "conf" / "model").glob("*.yaml"):
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        if not model.get("random_init"):
            encoders = model["backbone"]["init_args"]
            names |= {encoders[side]["init_args"]["name"] for side in ("image", "text")}
    return names


def test_every_set_that_make_data_knows_has_its_terms() -> None:
    """A new set fails here until its licence stands in its Facts and on the page."""
    table = rows("Data sets")
    assert SETS.keys() == FACTS.keys() | OWN
    for name in SETS:
        assert name in table, f"docs/licences.md has no row for the set {name}"
        _, terms, stated_at = table[name]
        assert terms == (UNKNOWN_LICENCE if name in OWN else FACTS[name].licence)
        assert stated_at


def test_every_weight_that_a_model_names_has_its_licence() -> None:
    table = rows("Weights")
    assert len(weights_named()) >= 6
    assert weights_named() <= table.keys()


def test_every_photograph_is_free_and_says_whose_it_is() -> None:
    lines = (PHOTOS / "LICENCES.md").read_text(encoding="utf-8").splitlines()
    entries = {match[1]: line for line in lines if (match := re.match(r"\| `([\w.]+)` \|", line))}
    assert {file.name for file in PHOTOS.glob("*.jpg")} == entries.keys()
    assert [line for line in entries.values() if not re.search(FREE, line)] == []


def test_every_image_of_the_repository_has_its_licence() -> None:
    """A new one fails here until somebody has said what it shows and whose it is."""
    kinds = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"}
    there = [file for place in ("docs", "src") for file in (ROOT / place).rglob("*") if file.suffix.lower() in kinds]
    own = {file.relative_to(ROOT).as_posix() for file in there if "_build" not in file.parts}  # `make docs` copies them
    assert own == rows("Images in this repository").keys()
