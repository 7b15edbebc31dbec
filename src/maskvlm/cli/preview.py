"""`maskvlm preview`: shows the data, without a model."""

from collections.abc import Iterable
from pathlib import Path

from maskvlm.cli.lightning import Parsed, built_source, run_command
from maskvlm.config.arguments import OptionParser
from maskvlm.data.preview import contact_sheet


def preview(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Write a contact sheet of training images with their captions (--out); returns a line that says what was done."""
    parser = OptionParser("maskvlm preview", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("checkpoints") / "preview.png")
    # Only this command's own options are taken out; the rest configures the data.
    options, rest = parser.parse_known_args(arguments)
    pairs = built_source(run_command(Parsed, ["fit", *rest], allowed).settings).split("train")
    contact_sheet(pairs, options.out)
    return f"{options.out}: {len(pairs)} training images, some of them shown with their captions"
