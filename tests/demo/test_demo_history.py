"""Which pre-trained run the page starts with, what it says of it, and which examples it gets."""

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_pretrained import content_of, toy_model

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.demo.history import Trained, is_drawn, photographs, run_order, trained_run
from maskvlm.demo.models import Models, find_models, task_on_card

TASK, SCENES, PREPARED = (
    "maskvlm.objectives.pretraining.MaskedPretraining",
    "maskvlm.data.scenes.source.Scenes",
    "maskvlm.data.prepared.source.Prepared",
)
DRAWN = LineageEntry(TASK, SCENES, "drawn", 20_000, 5, torch.arange(20_000))
PHOTOGRAPHS = LineageEntry(TASK, PREPARED, "photos", 6000, 9, torch.arange(6000))


def run(
    folder: Path, lineage: list[LineageEntry], score: float | None = None, name: str = "", age: float = 0, **more: Any
) -> Path:
    """A run's folder with a checkpoint of pre-training; age: seconds."""
    folder.mkdir(parents=True)
    content = content_of(*toy_model("pretrain"))
    checkpoint.save(content | {"lineage": [each.plain() for each in lineage]}, folder / "best.ckpt")
    os.utime(folder / "best.ckpt", (10_000 - age, 10_000 - age))
    if score is not None:
        (folder / "metrics.json").write_text(json.dumps({"score": score, "retrieval/pictures": 1000} | more))
    if name:
        source = {"class_path": lineage[-1].source, "init_args": {"root": f"/somewhere/secret/{name}"}}
        (folder / "config-fit.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"source": source}}}))
    return folder / "best.ckpt"


def entry(photographs: float, sha: str, score: float, time: float, measured: float = 1000) -> Trained:
    return Trained("", photographs, sha, measured, score, time)


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ([entry(0, "a", 91, 9), entry(6000, "b", 2, 1)], 1),  # photographs before scenes, whatever the score
        ([entry(math.inf, "s", 1, 0), entry(29000, "c", 9, 1)], 0),  # a stream counts nothing and is large
        ([entry(0, "a", 91, 1), entry(0, "a", 90, 9)], 0),  # on the same data the score, not the time
        ([entry(0, "a", 91, 1), entry(0, "b", 50, 9)], 1),  # on other data it says nothing: the newest
        ([entry(5, "a", 7, 9, measured=256), entry(5, "a", 3, 1)], 1),  # few images are easily told apart
        ([entry(5, "a", 7, 9)._replace(whole=False), entry(0, "b", 3, 1)], 1),  # half of the tabs cannot ask it
        ([entry(5, "a", -math.inf, 9, measured=0), entry(5, "a", -4, 1)], 1),  # one that was never measured
    ],
)
def test_the_rule(runs: list[Trained], chosen: int) -> None:
    assert run_order(runs)[0] == chosen
    assert run_order(runs[::-1])[0] == len(runs) - 1 - chosen
    assert sorted(run_order(runs)) == [*range(len(runs))]


def test_the_page_starts_with_photographs_and_not_with_the_newest(tmp_path: Path) -> None:
    run(tmp_path / "scenes", [DRAWN], 91.2)
    run(tmp_path / "worse", [PHOTOGRAPHS], 1.9, age=50)
    run(tmp_path / "better", [DRAWN, PHOTOGRAPHS], 2.3, name="flickr8k", age=100)
    models = Models(find_models(tmp_path))
    assert models.listing.pretrained is not None
    assert models.listing.pretrained.short_path == "better/best.ckpt"
    assert [each.choice for each in models.listing.runs] == [
        "better: step 9, score 2.3, flickr8k (6,000 images), after drawn scenes of the built-in world (20,000 images)",
        "worse: step 9, score 1.9, prepared (6,000 images)",
        "scenes: step 5, score 91.2, drawn scenes of the built-in world (20,000 images)",
    ]
    named = find_models(tmp_path, [str(tmp_path / name / "best.ckpt") for name in ("better", "scenes")])
    # The last that was named, then the other one, then those that were not.
    assert [run.short_path.split("/")[0] for run in named.runs] == ["scenes", "better", "worse"]


@pytest.mark.parametrize("content", ["[1]", '{"score": "NaN"}', "{" * 100_000, '{"score": 1e999}'])
def test_a_strange_record_counts_as_none(tmp_path: Path, content: str) -> None:
    path = run(tmp_path / "run", [DRAWN], name="x")
    (path.parent / "metrics.json").write_text(content)
    (path.parent / "config-fit.yaml").write_text(content)
    model_run = trained_run(str(path), [PHOTOGRAPHS])
    assert (model_run.measured, model_run.score, model_run.description) == (0, -math.inf, "prepared (6,000 images)")


def test_a_record_elsewhere_is_not_read(tmp_path: Path) -> None:
    path = run(tmp_path / "run", [DRAWN], 99)
    assert trained_run(str(path), [DRAWN]).score == 99
    (path.parent / "metrics.json").rename(tmp_path / "other.json")
    (path.parent / "metrics.json").symlink_to(tmp_path / "other.json")
    assert trained_run(str(path), [DRAWN]).score == -math.inf


@pytest.mark.parametrize(("settings", "name"), [
    ({"root": "data/flickr30k/"}, "flickr30k"), ({"root": "s3://bucket/cc12m/*.tar"}, "cc12m"),
    ({"root": "data", "sets": {"cc3m": 1.0, "coco": 1.0}}, "cc3m + coco"), ({"root": "a" * 1000}, "a" * 60),
])  # fmt: skip
def test_names_of_data(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    path = run(tmp_path / "run", [PHOTOGRAPHS], name="x")
    source = {"class_path": PREPARED, "init_args": settings}
    (path.parent / "config-fit.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"source": source}}}))
    assert trained_run(str(path), [PHOTOGRAPHS]).description == f"{name} (6,000 images)"
    other = PHOTOGRAPHS._replace(source="maskvlm.data.mix.Mix")  # a configuration of other data names nothing
    assert trained_run(str(path), [other]).description == "mix (6,000 images)"


def test_photographs_are_counted_once_and_scenes_not_at_all() -> None:
    more = PHOTOGRAPHS._replace(ids=torch.arange(5000, 8000), images=3000)
    assert [photographs(each) for each in ([DRAWN], [], [PHOTOGRAPHS, more])] == [0, 0, 8000]
    assert photographs([PHOTOGRAPHS, more._replace(ids=None, images=90_000)]) == 90_000
    assert photographs([PHOTOGRAPHS, PHOTOGRAPHS._replace(images=0, ids=None)]) == math.inf
    assert photographs([LineageEntry("unknown", "unknown", "", 0, 7)]) == 0
    assert [is_drawn(each) for each in (SCENES, "tasks.vqa.scenes.Questions", PREPARED)] == [True, True, False]


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (pip install -e .[demo])")
@pytest.mark.parametrize(("lineage", "photos"), [([DRAWN, PHOTOGRAPHS], True), ([DRAWN], False)])
def test_the_page_shows_photographs_where_the_model_knows_some(
    tmp_path: Path, lineage: list[LineageEntry], photos: bool
) -> None:
    from maskvlm.demo.input_limits import Worker
    from maskvlm.demo.page import page

    run(tmp_path / "run", lineage, 2.0, name="flickr<b>8k" if photos else "")
    blocks = page(Models(find_models(tmp_path)), Worker(60), None)
    config = json.dumps(blocks.get_config_file(), default=str)
    assert ("a red cup of coffee stands on a wooden table" in config) is photos
    assert ("the 5 photographs that come with this page" in config) is photos
    assert ("scenes of the built-in world that the model has not seen" in config) is not photos
    line = (
        "trained on flickr&lt;b&gt;8k (6,000 images), after drawn"
        if photos
        else "trained on drawn scenes of the built-in"
    )
    assert line in config
    assert "somewhere" not in config


@pytest.mark.parametrize("kind", ["pipe", "link", "long"])
def test_a_strangers_card_is_no_more_than_data(tmp_path: Path, kind: str) -> None:
    """Not waited for, not followed out of the folder, no title of any length."""
    folder = tmp_path / "run"
    folder.mkdir()
    card = folder / "card.json"
    card_text = json.dumps({"task": "acme.tasks.Task" if kind != "long" else "a." * 3000})
    if kind == "pipe":
        os.mkfifo(card)
    elif kind == "link":
        (tmp_path / "outside.json").write_text(card_text)
        card.symlink_to(tmp_path / "outside.json")
    else:
        card.write_text(card_text)
    assert task_on_card(str(folder / "best.ckpt")) is None
