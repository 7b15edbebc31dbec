"""`maskvlm scene`: an image of the built-in world to try a model with."""

import sys
from pathlib import Path

from maskvlm.config.arguments import OptionParser
from maskvlm.data.inputs import open_image
from maskvlm.data.scenes.source import Scenes
from maskvlm.utils.errors import ExitCode, UserError


def scene(arguments: list[str], allowed: list[str]) -> str:
    """Write a scene of the validation split, which no model was trained on; returns its captions, one a line.

    Raises:
        UserError: no such scene, or the file cannot be written (74).
    """
    parser = OptionParser("maskvlm scene", description="write a drawn scene of the built-in world, print its captions")
    parser.add_argument("number", nargs="?", type=int, default=0, help="of the validation split, from 0 on (0)")
    parser.add_argument("--out", type=Path, default=Path("scene.png"), help="where the image is written (scene.png)")
    options = parser.parse_args(arguments)
    split = Scenes().split("val")
    if not 0 <= options.number < len(split):
        raise UserError("scene", f"{options.number} is none of them", f"Give a number from 0 to {len(split) - 1}")
    row, there = split[options.number], options.out.exists()
    try:
        open_image(row["image"]).save(options.out)
    except (OSError, ValueError, KeyError) as error:  # no format has such an ending; one that is read alone
        what, todo = f"cannot be written ({error})", "Give a file such as scene.png in a folder that is there"
        raise UserError(options.out, what, todo, ExitCode.IO_ERROR) from error
    print(f"{'replaced' if there else 'wrote'} {options.out}", file=sys.stderr, flush=True)
    return "\n".join(str(getattr(caption, "text", caption)) for caption in row["captions"])
