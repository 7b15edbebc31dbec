"""NLVR2: a sentence about two photos, true or false (Suhr et al. 2019, github.com/lil-lab/nlvr, nlvr2/)."""

from pathlib import PurePosixPath

from maskvlm.data.examples import ExampleSource
from maskvlm.data.files import ImagesByKey, digest_of, get, get_label, get_name, json_lines
from maskvlm.data.prepare.example_images import open_album
from maskvlm.data.safe_open import check_below
from maskvlm.data.table import (
    EXAMPLE_COLUMNS,
    EXAMPLE_VERSION,
    ParsedColumns,
    RowOrigin,
    TableExamples,
    TableRows,
    cached_table,
    choose_rows,
)
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

VERSION = 1
"""Increase this when the same file gives a different table."""

LABELS = ("False", "True")
LAYOUT = "NLVR2"
TODO = "Prepare the set (maskvlm data nlvr2 FOLDER), or set data.source.root to the folder of its files"


class Nlvr2(ExampleSource):
    """NLVR2 as distributed: one example per line with `identifier`, `sentence` and `label`.

    The identifier `dev-850-2-1` is split, set of images, pair and sentence; its photos are `dev-850-2-img0.png`
    (left) and `dev-850-2-img1.png`, in any folder. All pairs of a sentence have the same `group`: the identifier
    without the pair, as eval/metrics.py uses for consistency.

    Args:
        root: folder of the files as distributed, or of the set that `maskvlm data` made from them.
        train, val, test: their names; None if there is none.
        images: folder of the images, or of a prepared set; by default the root's own, `images/` in it, or the root.
        cache: folder for cached tables; by default next to those of Hugging Face datasets.
        max_missing: maximum share of training examples that lack an image; these are skipped and listed.
    """

    labels = LABELS

    def __init__(
        self,
        root: str,
        train: str | None = "train.json",
        val: str | None = "dev.json",
        test: str | None = "test1.json",
        images: str | None = None,
        cache: str | None = None,
        max_missing: float = 0.01,
    ) -> None:
        self.root, self.images = expand_user(root), images
        self.files = {"train": train, "val": val, "test": test}
        self.cache, self.max_missing = cache, max_missing

    def split(self, name: str) -> TableExamples:
        """The examples of `train`, `val` or `test`.

        Raises:
            UserError: a file or its images are missing, a line is malformed, or an identifier occurs twice.
        """
        if not (file := self.files.get(name)):
            raise UserError(f"data.source.{name}", "no file was given for this split", "Name one")
        origin = RowOrigin(self.root / file, "{file}:{place}")
        check_below(origin.file, self.root)
        key = f"nlvr2-{EXAMPLE_VERSION}.{VERSION}-{digest_of(origin.file, todo=TODO)[:32]}"
        table = cached_table(key, self.cache, EXAMPLE_COLUMNS, lambda: parse_nlvr(origin))
        return choose_rows(table, origin, name, self._images(), self.max_missing)

    def _images(self) -> ImagesByKey:
        album = open_album(self.images, self.root)
        # Found by name in any folder. Backwards, so that the first of two files with the same name is kept.
        return album.images({f"nlvr2 {PurePosixPath(name).stem}": name for name in reversed(album.names)})


def parse_nlvr(origin: RowOrigin) -> ParsedColumns:
    """The lines of a file as an examples table; a malformed line is an error that names it."""
    rows = TableRows(origin, "identifier")
    for where, number, record in json_lines(origin.file):
        identifier = get_name(record, "identifier", where, LAYOUT)
        parts = identifier.split("-")
        if len(parts) != 4 or not all(parts):
            what = f"identifier '{identifier[:80]}' is not split-set-pair-sentence"
            raise UserError(where, what, f"A file in the {LAYOUT} layout is needed", ExitCode.BAD_DATA)
        split, images, pair, sentence = parts
        rows.add(
            place=number,
            id=identifier,
            # Left, right; image names have no sentence number, as sentences share images.
            images=[f"nlvr2 {split}-{images}-{pair}-img{side}" for side in (0, 1)],
            text=get(record, "sentence", str, where, LAYOUT),
            answers=[get_label(record, "label", LABELS, where, LAYOUT)],
            # All pairs of one sentence.
            group=f"{split}-{images}-{sentence}",
        )
    return rows.finish()
