"""What a pre-trained run was trained on, and the order in which the page lists several.

Scores on different data cannot be compared: 90 % on drawn scenes is no better than 3 % on photographs. So the data
decide first, then the score among runs on the same data.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maskvlm.checkpoint.model_spec import read_small
from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.inference.model_card import DRAWN, UNKNOWN
from maskvlm.utils.errors import UserError
from maskvlm.utils.whole_files import check_inside

WORLDS = (r"tasks\.[a-z]\w*\.scenes\.[A-Z]\w*",)
"""Task sources that draw their images."""
LONGEST = 60  # maximum characters of a data set's name on the page


class Trained(NamedTuple):
    """What the weights of a run were trained on.

    Attributes:
        description: for display: "flickr8k (6,000 images), after drawn scenes of the built-in world (20,000 images)".
        photographs: number of distinct photographs, without drawn scenes; infinite if a set was streamed, as a stream
            counts no images.
        sha: fingerprint of the run's own data. measured: number of images that it was evaluated on; 0 if unknown.
        score: score on these, -inf if unknown. time: when the weights were written, in seconds.
        steps: optimiser steps on the run's own data. whole: whether it has the heads for all tabs.
    """

    description: str
    photographs: float
    sha: str
    measured: float
    score: float
    time: float
    steps: int = 0
    whole: bool = True

    @property
    def measures(self) -> str:
        """Step and score for display: "step 1,125, score 30.1"."""
        score = f"score {self.score:.1f}" if math.isfinite(self.score) else "no score"
        return f"step {self.steps:,}, {score}"


def is_drawn(source: str) -> bool:
    """Whether a source's class path belongs to the built-in world."""
    return DRAWN.fullmatch(source) is not None


def trained_run(
    path: str, history: Sequence[LineageEntry], whole: bool = True, metrics: Mapping[str, Any] | None = None
) -> Trained:
    """The training facts of a pre-training checkpoint, from itself and the files beside it.

    Args:
        path: path of the checkpoint.
        history: the data that its weights were trained on, in order.
        whole: whether it has the heads for all tabs.
        metrics: metrics from a Hugging Face folder; None: those in the file beside a checkpoint.
    """
    steps = [describe_data(entry, name_beside(path, entry) if entry is history[-1] else None) for entry in history]
    # Earlier data, the latest first.
    before = [step for step in reversed(steps[:-1]) if step != steps[-1]]
    description = ", after ".join(dict.fromkeys([*steps[-1:], *before])) or "nothing that it tells of"
    measured, score = score_beside(path) if metrics is None else score_of(metrics)
    sha = history[-1].sha if history else ""
    time = Path(path).stat().st_mtime if Path(path).exists() else 0.0
    last = history[-1].steps if history else 0
    return Trained(description, photographs(history), sha, measured, score, time, last, whole)


def photographs(history: Sequence[LineageEntry]) -> float:
    """Number of distinct images in a history that are not drawn scenes. Sets without ids may share images."""
    photos = [entry for entry in history if not is_drawn(entry.source) and entry.source != UNKNOWN]
    # A set of unknown size counts as larger than any other.
    if any(not entry.images for entry in photos):
        return math.inf
    ids = [entry.ids for entry in photos if entry.ids is not None]
    different = len(torch.cat(ids).unique()) if ids else 0
    # Sets without ids may share images: together they have at least as many as the largest.
    return max([different, *(entry.images for entry in photos)])


def describe_data(entry: LineageEntry, name: str | None) -> str:
    """An entry of a training history for display: the data and the number of images."""
    if entry.source == UNKNOWN:
        return "data that it does not name"
    if is_drawn(entry.source):
        name = "drawn scenes of the built-in world"
    count = f"{entry.images:,} images" if entry.images else "streamed"
    return f"{name or entry.source.rpartition('.')[2].lower()[:LONGEST]} ({count})"


def run_order(runs: Sequence[Trained]) -> list[int]:
    """Indices of the runs, best first; the page starts with the best.

    Runs trained without one of the four losses come last, as some tabs cannot use them. Otherwise photographs come
    before drawn scenes, and more photographs before fewer; among data sets with equally many, the one used last comes
    first. Among runs on the same data, the best score comes first, then the newest.
    """
    used = dict[tuple[float, str], float]()
    for run in runs:
        data = (run.photographs, run.sha)
        used[data] = max(run.time, used.get(data, run.time))

    def merit(place: int) -> tuple[float | str, ...]:
        run = runs[place]
        last = used[run.photographs, run.sha]
        # Retrieval among fewer images is easier, so the number comes before the score.
        return run.whole, run.photographs, last, run.sha, run.measured, run.score, run.time

    return sorted(range(len(runs)), key=merit, reverse=True)


# ---------------------------------------------------------------------- the files beside a checkpoint, also untrusted


def name_beside(path: str, entry: LineageEntry) -> str | None:
    """Name of the data, taken from the set's folder in the run's configuration; None if unknown."""
    file = Path(path).parent / "config-fit.yaml"
    if not path.endswith(".ckpt"):  # a Hugging Face folder, or a name: files beside it belong to something else
        return None
    try:
        check_inside(file)
        source = read_yaml(read_small(file), str(file))["data"]["init_args"]["source"]
        settings = source.get("init_args") or {}
        # Ignored if it belongs to another run than the checkpoint's.
        if source["class_path"] != entry.source:
            return None
        return name_of(settings)
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return None


def name_of(settings: Any) -> str | None:
    """The names of a mixture's sets, or the last part of a path that is not a file name."""
    if isinstance(sets := settings.get("sets"), dict) and sets:
        return " + ".join(map(str, sets))[:LONGEST]
    root, file = settings.get("root"), settings.get("file")
    if isinstance(root, list):
        root = root[0] if root else None
    parts = [part for part in re.split(r"[/\\]", str(root or file or "")) if part]
    # For a file, its folder is the name.
    if not root:
        parts = parts[:-1]
    plain = [part for part in parts if "*" not in part]
    return plain[-1][:LONGEST] if plain else None


def score_beside(path: str) -> tuple[float, float]:
    """Number of images evaluated in `metrics.json`, and its score; 0 and -inf if unknown."""
    file = Path(path).parent / "metrics.json"
    try:
        check_inside(file)
        return score_of(json.loads(read_small(file)))
    except (UserError, OSError, ValueError, RecursionError):
        return 0.0, -math.inf


def score_of(metrics: Any) -> tuple[float, float]:
    """The result of `score_beside`, from the content of such a file."""
    try:
        score, count = float(metrics["score"]), float(metrics.get("retrieval/pictures") or 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return 0.0, -math.inf
    return (count, score) if math.isfinite(score) and math.isfinite(count) else (0.0, -math.inf)
