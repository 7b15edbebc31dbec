"""A preview of a data set: images with captions, caption lengths, repetitions, and rows that are left out."""

import os
import random
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvlm.data.batch import Row
from maskvlm.data.caption_text import stable_id
from maskvlm.data.images import BadImage
from maskvlm.data.prepare.rows import (
    Reasons,
    RowMaker,
    RowNote,
    Settings,
    Unusable,
    first_example,
    place_of_image,
    prepare_image,
    screened,
)
from maskvlm.data.prepared.manifest import IMAGES, LOOK, cannot_write_set, whole_set_file
from maskvlm.data.prepared.shards import PreparedShards
from maskvlm.data.preview import fill_sheet, lay_out, png_of, print_text, read_row
from maskvlm.data.raw.base import BadRow, RawRow, RawSet, checked_rows
from maskvlm.data.raw.lines import one_line
from maskvlm.utils.errors import ExitCode, UserError

SHEET_IMAGES = 24  # images on the sheet
MOST_ROWS, SAMPLE = 50_000, 300
"""Limits for a set that is not prepared: number of rows to read, and number of their images to open."""

TOP_INCHES, LONGEST_BAR = 3.6, 60


class Captions:
    """Running statistics of captions."""

    def __init__(self) -> None:
        self.words: Counter[int] = Counter()
        self._ids: list[np.ndarray] = []

    def add(self, captions: Iterable[str]) -> None:
        """Add cleaned captions."""
        texts = [*captions]
        self.words.update(len(caption.split()) for caption in texts)
        # 8 bytes per caption instead of its text
        self._ids.append(np.fromiter((stable_id(caption.lower()) for caption in texts), np.int64, len(texts)))

    def __len__(self) -> int:
        return self.words.total()

    def repeated(self) -> int:
        """Number of captions that repeat an earlier one, ignoring case."""
        ids = np.concatenate(self._ids) if self._ids else np.zeros(0, np.int64)
        return len(ids) - len(np.unique(ids))

    def card(self) -> dict[str, Any]:
        """Entry in the manifest; lengths in words."""
        low, middle, high = self.percentiles(5, 50, 95)
        return {"repeated_captions": self.repeated(), "caption_words": {"5 %": low, "50 %": middle, "95 %": high}}

    def percentiles(self, *shares: float) -> list[int]:
        """Percentiles of the number of words per caption; 0 if there are no captions."""
        lengths = sorted(self.words)
        # cumulative number of captions by length
        upto = np.cumsum([self.words[length] for length in lengths])
        return [lengths[int(np.searchsorted(upto, share / 100 * upto[-1]))] if lengths else 0 for share in shares]

    def line(self) -> str:
        """Summary line of the captions."""
        if not len(self):
            return "no captions"
        low, middle, high = self.percentiles(5, 50, 95)
        share = 100 * self.repeated() / len(self)
        lengths = f"captions have {middle} {'word' if middle == 1 else 'words'} ({low} to {high} for nine of ten)"
        return f"{lengths}; {share:.1f} % repeat another one"


class LookReport(NamedTuple):
    """Lines to show, and the content of the image."""

    lines: list[str]
    rows: list[Row | UserError]
    words: Counter[int]


# ------------------------------------------------------------------ a prepared set


def look_at_prepared(root: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Draw `first-look.png`; returns the statistics for the manifest."""
    shards = PreparedShards(root, [shard for split in manifest["splits"].values() for shard in split["shards"]])
    captions = Captions()
    # batch by batch, without reading images or keeping captions
    for chunk in shards.chunks("captions"):
        captions.add(chunk.flatten().to_pylist())
    hash_N = shards.column("phash").to_numpy()
    # 0: images of a single colour, which cannot be compared
    known_N = hash_N[hash_N != 0]
    card = {**captions.card(), "repeated_looks": len(known_N) - len(np.unique(known_N))}
    counts = {name: split["pictures"] for name, split in manifest["splits"].items()}
    lines = [f"{manifest['name']}: {manifest['coverage']}", counted(counts, len(captions)), captions.line()]
    # annotated sets have no captions to report
    lines = lines[: 3 if len(captions) else 2]
    again = card["repeated_looks"]
    lines.append(f"{again:,} {'image looks' if again == 1 else 'images look'} exactly like another one before")
    lines += manifest["notes"]
    lines += table("left out", manifest["left_out"]) + table("mended", manifest["mended"])
    number = min(SHEET_IMAGES, len(shards))
    # evenly spread over all splits
    rows = [read_row(Stored(shards), place * len(shards) // number) for place in range(number)]
    draw_look(LookReport(lines, rows, captions.words), root / LOOK)
    return card


class Stored:
    """Rows of shards (`Pairs`)."""

    fingerprint = ""

    def __init__(self, shards: PreparedShards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int, /) -> Row:
        image, captions, image_id, origin = (
            self.shards.value(name, index) for name in ("image", "captions", "image_id", "origin")
        )
        return Row(image=image, captions=captions, image_id=image_id, origin=origin)


def counted(images: dict[str, int], captions: int) -> str:
    """`950 images with 1,400 captions (train 900, val 50)`."""
    parts = ", ".join(f"{name} {count:,}" for name, count in images.items())
    with_captions = f" with {'1 caption' if captions == 1 else f'{captions:,} captions'}" if captions else ""
    number = sum(images.values())
    return f"{'1 image' if number == 1 else f'{number:,} images'}{with_captions} ({parts or 'no split'})"


def table(name: str, reasons: dict[str, Any], examples: bool = False) -> list[str]:
    """A line per reason, the most frequent first; `examples`: with the first row of each, which is too long for the
    image."""
    total = sum(entry["count"] for entry in reasons.values())
    if not total:
        return [f"{name}: nothing"]
    lines = [f"{name}: {total:,}"]
    for reason, entry in reasons.items():
        lines.append(f"  {entry['count']:>9,}  {reason}")
        if examples and (example := first_example(entry)):
            lines[-1] += f"; for example {example}"
    return lines


# ------------------------------------------------------------------ a raw set


def look_at_raw(raw: RawSet, settings: Settings, path: Path) -> list[str]:
    """Read and draw a part of a set that is not prepared; returns lines on what preparing it would give."""
    every = screened(checked_rows(raw))
    captions, reasons, counts = Captions(), Reasons(), Counter[str]()
    sample = DrawnSample()
    rows = 0
    # many rows, without opening images
    for row in islice(every, MOST_ROWS):
        rows += 1
        usable = clean(row)
        if isinstance(usable, RowNote):
            reasons.add(usable)
            continue
        assert isinstance(row, RawRow)
        counts[row.split] += 1
        captions.add(usable)
        sample.add(row)
    # one more row: the set has more than were read
    part = f", the first {rows:,}" if next(every, None) is not None else ""
    # few images, which are opened
    broken = sample.broken(settings)
    begin = [f"{settings.name}{part}: {counted(counts, len(captions))}", captions.line()]
    title = f"unusable among the {len(sample.rows):,} images that were opened"
    drawn, lines = (
        [
            *begin,
            *table("would be left out", reasons.card(), with_examples),
            *table(title, broken.card(), with_examples),
            *raw.notes,
        ]
        for with_examples in (False, True)
    )
    sheet_rows = sample.sheet_rows()
    if not sheet_rows:
        where, todo = settings.name, "Check RAW, and the columns (--columns image=..,caption=..)"
        what = f"no row can be used ({'; '.join(lines[2:])[:600]})"
        raise UserError(where, what, todo, ExitCode.BAD_DATA)
    draw_look(LookReport(drawn, sheet_rows, captions.words), path)
    return lines


def clean(row: RawRow | BadRow) -> list[str] | RowNote:
    """The cleaned captions of a row, or why it cannot be used, as far as known without opening the image."""
    if isinstance(row, BadRow):
        return RowNote(row.reason, row.origin, row.message)
    if isinstance(row.image, str) and not os.path.isfile(row.image):
        return RowNote("missing", row.origin, f"{one_line(row.image)}: there is no such file")
    # only its `clean` is used, which needs no settings
    maker = RowMaker(row.split != IMAGES, Settings(""), lambda used: None)
    try:
        return maker.clean(row)[0]
    except Unusable as problem:
        return RowNote(problem.args[0], row.origin, problem.args[1])


class DrawnSample:
    """A uniform, reproducible sample of SAMPLE of the added rows."""

    def __init__(self) -> None:
        self.rows: list[RawRow] = []
        self._count, self._random = 0, random.Random(0)

    def add(self, row: RawRow) -> None:
        """Add a row, which may replace another."""
        self._count += 1
        if len(self.rows) < SAMPLE:
            self.rows.append(row)
        # reservoir sampling: the n-th row is taken with probability SAMPLE / n
        elif (place := self._random.randrange(self._count)) < SAMPLE:
            self.rows[place] = row

    def broken(self, settings: Settings) -> Reasons:
        """Images that cannot be used, by reason."""
        reasons = Reasons()
        for row in self.rows:
            try:
                prepare_image(row.image, place_of_image(row), settings)
            except BadImage as bad:
                reasons.add(RowNote(bad.reason, row.origin, str(bad)))
        return reasons

    def sheet_rows(self) -> list[Row | UserError]:
        """The opened rows for the sheet; a broken one as its error."""
        number = min(SHEET_IMAGES, len(self.rows))
        return [read_row(self, place * len(self.rows) // number) for place in range(number)]

    fingerprint = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Row:
        row = self.rows[index]
        return Row(image=row.image, captions=[*row.captions], image_id=row.image_id, origin=row.origin)


# ------------------------------------------------------------------ drawing


def draw_look(report: LookReport, path: Path) -> None:
    """Draw text and lengths above, images below. Raises UserError if the file cannot be written."""
    from matplotlib.figure import Figure

    layout = lay_out(report.rows)
    width, height = max(16.0, layout.inches[0]), layout.inches[1]
    top = max(TOP_INCHES if report.words else 0, 0.17 * (len(report.lines) + 3))
    figure = Figure(figsize=(width, top + height), layout="constrained")
    head, sheet = figure.subfigures(2, 1, height_ratios=[top, height], squeeze=False).flat
    words, lengths = head.subplots(1, 2, width_ratios=[3, 2])
    words.set_axis_off()
    print_text(words, "\n".join(report.lines), 11)
    draw_lengths(lengths, report.words)
    fill_sheet(sheet, report.rows, layout)
    image = png_of(figure)  # to memory first, so that the file is then written atomically
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write_set(path, error) from error
    with whole_set_file(path) as file:
        file.write(image)


def draw_lengths(axes: Any, words: Counter[int]) -> None:
    """Draw a histogram of words per caption; captions of LONGEST_BAR words or more are in the last bar."""
    if not words:
        axes.set_axis_off()
        return
    bars: Counter[int] = Counter()
    for length, count in words.items():
        bars[min(length, LONGEST_BAR)] += count
    axes.bar([*bars], [*bars.values()], width=0.9)
    last = f" ({LONGEST_BAR}: or more)" if max(words) >= LONGEST_BAR else ""
    axes.set_xlabel(f"words of a caption{last}")
    axes.set_ylabel("captions")
    axes.spines[["top", "right"]].set_visible(False)
