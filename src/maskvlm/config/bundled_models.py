"""Models that come along with the package, each a folder of the hub's format, by name.

`maskvlm convert CHECKPOINT FOLDER --dtype float16` makes such a folder of any run.
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "models"
DEFAULT = "scenes-tiny"
"""What is asked where no checkpoint is named."""


def bundled_models() -> list[str]:
    """Their names."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def bundled_folder(name: str) -> Path | None:
    """Where the model of that name lies; None where none is called so. A folder of the same name is `./name`."""
    return FOLDER / name if name in bundled_models() else None


def default_model(purpose: str) -> str:
    """The name of the model that is taken where no checkpoint is named; a line on stderr says so.

    Args:
        purpose: what it does here: "asked", "fine-tuned".
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    if set(ranks) == {"0"}:  # one of several processes tells
        line = f"no from= given: the bundled model {DEFAULT} is {purpose}; it was trained on drawn scenes only"
        print(line, file=sys.stderr, flush=True)
    return DEFAULT
