"""`maskvlm scene`: writes a drawn scene to try a model with."""

import sys
from pathlib import Path

from maskvlm.cli.shell_methods import check_ending
from maskvlm.config.arguments import OptionParser
from maskvlm.data.inputs import open_image, save_image
from maskvlm.data.scenes.source import Scenes
from maskvlm.utils.errors import UserError


def scene(arguments: list[str], allowed: list[str]) -> str:
    """Write a scene of the validation split, which no model was trained on; returns its captions, one per line.

    Raises:
        UserError: no such scene or not an image extension (2); the file cannot be written (73); the disk is full (74).
    """
    parser = OptionParser(
        "maskvlm scene", description="write a drawn scene of the built-in world and print its captions"
    )
    parser.add_argument(
        "number", nargs="?", type=int, default=0, help="number of the scene in the validation split (default: 0)"
    )
    parser.add_argument("--out", type=Path, default=Path("scene.png"), help="image file to write (default: scene.png)")
    options = parser.parse_args(arguments)
    check_ending(options.out)
    split = Scenes().split("val")
    if not 0 <= options.number < len(split):
        raise UserError("scene", f"there is no scene {options.number}", f"Give a number from 0 to {len(split) - 1}")
    row, there = split[options.number], options.out.exists()
    save_image(open_image(row["image"]), options.out)
    print(f"{'replaced' if there else 'wrote'} {options.out}", file=sys.stderr, flush=True)
    return "\n".join(str(getattr(caption, "text", caption)) for caption in row["captions"])
