"""What an evaluation leaves: predictions line by line, a page, and the card that says what was measured on what."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from toy_examples import LABELS, Questions, bare_backbone, data_for, fit, trainer_in

from maskvlm.checkpoint.integrity import stated
from maskvlm.data.text import tokenizer_hash
from maskvlm.objectives.task import Prediction
from maskvlm.reporting.predictions import (
    Predictions,
    share_measured,
    spread,
    with_ids,
)
from maskvlm.training.lit import LitModel
from tasks.nlvr.task import Nlvr

ROOT = Path(__file__).resolve().parents[2]


def line(number: int, right: float | None = 1.0) -> Prediction:
    return Prediction(id=str(number), text="?", truth="yes", prediction="yes", right=right, index=[number], kind="")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps on sixteen questions, in a folder of its own."""
    path = tmp_path_factory.mktemp("tuned") / "last.ckpt"
    backbone = bare_backbone()
    fit(LitModel(backbone, Nlvr(LABELS, images_per_example=2)), data_for(backbone, Questions(images=2)), path)
    return path


def measure(start: Path, folder: Path, source: Any, test: bool = False, **settings: Any) -> LitModel:
    """Measured from a checkpoint, with the callback."""
    backbone = bare_backbone(start)
    model = LitModel(backbone, Nlvr(LABELS, images_per_example=2))
    trainer = trainer_in(folder, Predictions(count=4), **settings)
    run = trainer.test if test else trainer.validate
    run(model, data_for(backbone, source), verbose=False)
    return model


class Sieved(Questions):
    """A reader that left rows of every split out; one reason met none."""

    def split(self, name: str) -> Any:
        rows = super().split(name)
        rows.skipped = {"no gold label": [f"{name}:1", f"{name}:4"], "empty text": []}
        return rows


@pytest.fixture(scope="module")
def measured(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitModel]:
    folder = tmp_path_factory.mktemp("measured")
    unknown = {"val": {2: {"answers": [], "text": 'こ\u2028れ "quoted"'}}}
    return folder, measure(tuned, folder, Sieved(2, changes=unknown))


def test_predictions_are_lines_of_json_in_the_order_of_the_split(measured: tuple[Path, LitModel]) -> None:
    folder, model = measured
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    rows = [json.loads(one) for one in text.removesuffix("\n").split("\n")]
    assert [row["id"] for row in rows] == [str(1012 + n) for n in range(7)]
    assert [row["index"] for row in rows] == [[n] for n in range(7)]
    assert rows == model.task.predictions
    assert rows[2]["right"] is None
    assert rows[2]["truth"] == ""
    assert rows[2]["text"] == 'こ\u2028れ "quoted"'
    known = [row["right"] for row in rows if row["right"] is not None]
    assert 100 * sum(known) / len(known) == pytest.approx(model.metrics["nlvr/accuracy"])
    for row in rows:
        assert row["prediction"] in LABELS
        assert set(row) == {"id", "text", "truth", "prediction", "right", "index", "kind", "images"}


def test_the_page_is_drawn(measured: tuple[Path, LitModel]) -> None:
    page = Image.open(measured[0] / "examples.png")
    assert page.size == (int((2 * (2 * 1.37 + 2.6) + 0.4) * 100), int((2 * 1.49 + 0.7) * 100))  # four cells


def test_the_card_says_what_a_reader_must_know(measured: tuple[Path, LitModel], tuned: Path) -> None:
    folder, model = measured
    card = json.loads((folder / "card.json").read_text())
    assert set(card) == {
        "task", "data", "checkpoint", "lineage", "images of the split seen in training", "resolution", "text length",
        "tokenizer", "settings", "precision", "processes", "metrics", "versions",
    }  # fmt: skip
    assert card["task"] == "tasks.nlvr.task.Nlvr"
    assert card["data"] == {
        "source": "test_predictions.Sieved", "settings": None, "split": "val", "sha": "toy val", "rows of the split": 7,
        "images of the split": 14, "left out or mended": {"no gold label": 2}, "share measured": 1.0,
    }  # fmt: skip
    assert card["checkpoint"] == {
        "file": f"{tuned.parent.name}/last.ckpt", "sha256": stated(tuned)[-1].sha256, "steps trained here": 0,
    }  # fmt: skip
    (trained,) = card["lineage"]
    assert (trained["source"], trained["sha"], trained["steps"]) == ("toy_examples.Questions", "toy train", 2)
    assert card["images of the split seen in training"] == 8  # numbers 12 to 15, two images each
    assert (card["resolution"], card["text length"]) == (32, 24)
    assert card["tokenizer"] == tokenizer_hash(model.backbone.text.tokenizer)
    assert card["settings"] == {"labels": 3, "pictures": 2, "blind": False, "reads": "fused"}
    assert card["metrics"]["nlvr/accuracy"] == model.metrics["nlvr/accuracy"]
    assert (card["precision"], card["processes"]) == ("32-true", 1)
    assert card["versions"]["packages"]["torch"]


def test_the_test_split_and_a_part_of_it(tuned: Path, tmp_path: Path) -> None:
    measure(tuned, tmp_path, Questions(2), test=True)
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["data"]["split"], card["data"]["rows of the split"]) == ("test", 5)
    assert card["images of the split seen in training"] == 0
    measure(tuned, tmp_path, Questions(2), limit_val_batches=1)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["data"]["share measured"] == 0.4286  # three of seven
    assert card["images of the split seen in training"] == 8  # as the key says, not of the three rows measured
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 3


# ---------------------------------------------------------------------- the parts


def test_shown_ones_stand_at_even_distances() -> None:
    for total, count, rows in ((3, 5, [0, 1, 2]), (9, 3, [0, 3, 6]), (10, 4, [0, 2, 5, 7]), (0, 3, [])):
        assert [one["index"] for one in spread([line(n) for n in range(total)], count)] == [[row] for row in rows]


PAIRS: list[dict[str, Any]] = [{"image": "a", "image_id": "flickr 1"}, {"image": "d", "image_id": "flickr 23"}]


def test_an_image_of_pairs_is_called_by_its_id() -> None:
    one = Prediction(id="7", text="an image 1", truth="image 0", prediction="image 1", right=0.0, index=[1, 0], kind="")
    (entry,) = with_ids([one], PAIRS)
    changes = {"truth": "image 0, flickr 1", "prediction": "image 1, flickr 23", "images": ["flickr 23", "flickr 1"]}
    assert entry == {**one, **changes}


def test_share_measured() -> None:
    """1.0 is everything and 1 is one batch."""
    for limit, batches, share in ((1.0, 3, 1.0), (1, 1, 0.3333), (0.5, 1, 0.3333), (3, 3, 1.0)):
        trainer: Any = SimpleNamespace(
            limit_val_batches=limit, num_val_batches=[batches], val_dataloaders=[1, 2, 3],
            limit_test_batches=1.0, num_test_batches=[9], test_dataloaders=None,
        )  # fmt: skip
        assert share_measured(trainer, "val") == share
        assert share_measured(trainer, "test") == 1.0
        trainer.datamodule = SimpleNamespace(share_looked_at=0.5)
        assert share_measured(trainer, "val") == pytest.approx(share / 2, abs=1e-4)
