"""`maskvlm preview`: a look at the data, without a model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.config.arguments import OptionParser
from maskvlm.config.parser import MODE, CommandParser
from maskvlm.data.batch import Source
from maskvlm.data.examples import ExampleSource
from maskvlm.data.preview import contact_sheet


def preview(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Write a contact sheet of the training images with their captions (--out); returns what was done."""
    parser = OptionParser("maskvlm preview", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("checkpoints") / "preview.png")
    # Only options of its own are taken out; the rest configures the data.
    options, rest = parser.parse_known_args(arguments)
    pairs = source(run_command(Parsed, ["fit", *rest], allowed).settings).split("train")
    contact_sheet(pairs, options.out)
    return f"{options.out}: {len(pairs)} training images, some of them shown with their captions"


def source(settings: Namespace) -> Any:
    """The configured data set's reader, without model or trainer."""
    parser = CommandParser(parser_mode=MODE)
    parser.add_subclass_arguments((Source, ExampleSource), "source")
    return parser.instantiate(parser.parse_object({"source": settings.data.init_args.source})).source
