"""Models bundled with the package, by name; each is a folder in the hub's format.

`maskvlm convert CHECKPOINT FOLDER --dtype float16` creates such a folder from any run.
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "models"
DEFAULT = "scenes-tiny"
"""The model used if no checkpoint is named."""


def bundled_models() -> list[str]:
    """Names of the bundled models."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def bundled_folder(name: str) -> Path | None:
    """Folder of the bundled model with this name; None if there is none. Write `./name` for a folder of that name."""
    return FOLDER / name if name in bundled_models() else None


def default_model(purpose: str) -> str:
    """Name of the model used if no checkpoint is named; prints a line on stderr that says so.

    Args:
        purpose: what is done with it, as a participle: "asked", "fine-tuned".
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    if set(ranks) == {"0"}:  # only one of several processes prints
        line = f"no checkpoint named: the bundled model {DEFAULT} is {purpose}; it was trained on drawn scenes only"
        print(line, file=sys.stderr, flush=True)
    return DEFAULT
