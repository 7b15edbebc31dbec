"""What a pre-trained run was trained on, and in which order the page offers several.

Scores on different data cannot be compared: 90 % of drawn scenes is no better than 3 % of photographs. So the data
decide first, and the score among runs on the same data.
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
"""Sources of tasks that draw what they show."""
LONGEST = 60  # characters of a data set's name on the page


class Trained(NamedTuple):
    """What the weights of a run have seen.

    Attributes:
        description: for people: "flickr8k (6,000 images), after drawn scenes of the built-in world (20,000 images)".
        photographs: different ones, drawn scenes not counted; infinite where a set was streamed, which counts nothing.
        sha: of the data of the run itself. measured: images that it was evaluated on; 0 where it does not say.
        score: on these, -inf where it does not say. time: when the weights were written, in seconds.
        steps: of the optimiser, on the data of the run itself. whole: whether it has the heads of all tabs.
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
        """Step and score in words: "step 1,125, score 30.1"."""
        score = f"score {self.score:.1f}" if math.isfinite(self.score) else "no score"
        return f"step {self.steps:,}, {score}"


def is_drawn(source: str) -> bool:
    """Whether the class path of a source is one of the built-in world's."""
    return DRAWN.fullmatch(source) is not None


def trained_run(
    path: str, history: Sequence[LineageEntry], whole: bool = True, metrics: Mapping[str, Any] | None = None
) -> Trained:
    """What a checkpoint of pre-training tells of itself, and the files beside it.

    Args:
        path: of the checkpoint.
        history: the data that its weights have seen, first to last.
        whole: whether it has the heads of all tabs.
        metrics: that a folder of the hub's format tells; None: those in the file beside a checkpoint.
    """
    steps = [describe_data(entry, name_beside(path, entry) if entry is history[-1] else None) for entry in history]
    # What came before, the latest first.
    before = [step for step in reversed(steps[:-1]) if step != steps[-1]]
    description = ", after ".join(dict.fromkeys([*steps[-1:], *before])) or "nothing that it tells of"
    measured, score = score_beside(path) if metrics is None else score_of(metrics)
    sha = history[-1].sha if history else ""
    time = Path(path).stat().st_mtime if Path(path).exists() else 0.0
    last = history[-1].steps if history else 0
    return Trained(description, photographs(history), sha, measured, score, time, last, whole)


def photographs(history: Sequence[LineageEntry]) -> float:
    """How many different images of these are no drawn scenes; those of sets without ids may be the same ones."""
    photos = [entry for entry in history if not is_drawn(entry.source) and entry.source != UNKNOWN]
    # One set of which nobody knows the size counts for more than any other.
    if any(not entry.images for entry in photos):
        return math.inf
    ids = [entry.ids for entry in photos if entry.ids is not None]
    different = len(torch.cat(ids).unique()) if ids else 0
    # Sets without ids may hold the same images: together they are at least as many as the largest.
    return max([different, *(entry.images for entry in photos)])


def describe_data(entry: LineageEntry, name: str | None) -> str:
    """One entry of a training history in words: the data and how many images."""
    if entry.source == UNKNOWN:
        return "data that it does not name"
    if is_drawn(entry.source):
        name = "drawn scenes of the built-in world"
    count = f"{entry.images:,} images" if entry.images else "streamed"
    return f"{name or entry.source.rpartition('.')[2].lower()[:LONGEST]} ({count})"


def run_order(runs: Sequence[Trained]) -> list[int]:
    """The places of the runs, the best first: the page starts with that.

    Those that were trained without one of the four losses come last: some tabs cannot ask them. Then photographs come
    before drawn scenes, more of them before fewer; of data sets with equally many the one that was used last. Among
    runs on the same data the best score counts, and what that leaves open the newest.
    """
    used = dict[tuple[float, str], float]()
    for run in runs:
        data = (run.photographs, run.sha)
        used[data] = max(run.time, used.get(data, run.time))

    def merit(place: int) -> tuple[float | str, ...]:
        run = runs[place]
        last = used[run.photographs, run.sha]
        # Among fewer images the right one is found more easily, so the number comes before the score.
        return run.whole, run.photographs, last, run.sha, run.measured, run.score, run.time

    return sorted(range(len(runs)), key=merit, reverse=True)


# ---------------------------------------------------------------------- the files beside a checkpoint: strangers', too


def name_beside(path: str, entry: LineageEntry) -> str | None:
    """What the data are called: the set's folder, by the configuration of the run; None where it does not say."""
    file = Path(path).parent / "config-fit.yaml"
    if not path.endswith(".ckpt"):  # a folder of the hub's format, or a name: what lies beside is of something else
        return None
    try:
        check_inside(file)
        source = read_yaml(read_small(file), str(file))["data"]["init_args"]["source"]
        settings = source.get("init_args") or {}
        # Of another run than the checkpoint's it is not believed.
        if source["class_path"] != entry.source:
            return None
        return name_of(settings)
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return None


def name_of(settings: Any) -> str | None:
    """The sets of a mix, or the last part of a place that is no file's name."""
    if isinstance(sets := settings.get("sets"), dict) and sets:
        return " + ".join(map(str, sets))[:LONGEST]
    root, file = settings.get("root"), settings.get("file")
    if isinstance(root, list):
        root = root[0] if root else None
    parts = [part for part in re.split(r"[/\\]", str(root or file or "")) if part]
    # Of a file its folder is the name.
    if not root:
        parts = parts[:-1]
    plain = [part for part in parts if "*" not in part]
    return plain[-1][:LONGEST] if plain else None


def score_beside(path: str) -> tuple[float, float]:
    """Images that `metrics.json` was measured on, and its score; 0 and -inf where it does not say."""
    file = Path(path).parent / "metrics.json"
    try:
        check_inside(file)
        return score_of(json.loads(read_small(file)))
    except (UserError, OSError, ValueError, RecursionError):
        return 0.0, -math.inf


def score_of(metrics: Any) -> tuple[float, float]:
    """Score as `score_beside` gives it, from the contents of such a file."""
    try:
        score, count = float(metrics["score"]), float(metrics.get("retrieval/pictures") or 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return 0.0, -math.inf
    return (count, score) if math.isfinite(score) and math.isfinite(count) else (0.0, -math.inf)
