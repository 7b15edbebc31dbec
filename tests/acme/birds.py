"""A data format: a folder of images and `birds.txt`, whose lines are `file<TAB>text`."""

from collections.abc import Iterator

from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet


class Birds(RawSet):
    """One text an image; a line without a tab is a bad row."""

    facts = Facts("Birds of acme", None, None, "CC0")

    def rows(self) -> Iterator[RawRow | BadRow]:
        for number, line in enumerate((self.path / "birds.txt").read_text().splitlines(), 1):
            file, tab, text = line.partition("\t")
            origin = f"birds.txt:{number}"
            if tab:
                yield RawRow(str(self.path / file), (text,), f"{self.name} {number}", "train", origin)
            else:
                yield BadRow("no tab", origin, f"{origin}: expected file<TAB>text", "train")
