"""What an evaluation leaves: predictions line by line, a page, and the card that says what was measured on what."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from PIL import Image
from toy_examples import LABELS, Nameless, Questions, bare_backbone, data_for, fit, trainer_in

from maskvlm.checkpoint.integrity import stated
from maskvlm.checkpoint.io import save
from maskvlm.cli.main import main
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.text import tokenizer_hash
from maskvlm.objectives.task import Prediction
from maskvlm.reporting.predictions import (
    Predictions,
    checkpoint_of,
    example_cell,
    hash_of,
    share_measured,
    spread,
    with_ids,
)
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import ExitCode
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


@pytest.fixture(scope="module")
def measured(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitModel]:
    folder = tmp_path_factory.mktemp("measured")
    unknown = {"val": {2: {"answers": [], "text": 'こ\u2028れ "quoted"'}}}
    return folder, measure(tuned, folder, Questions(2, changes=unknown))


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
    page = Image.open(measured[0] / "examples.png").convert("RGB")
    assert page.size == (int((2 * (2 * 1.37 + 2.6) + 0.4) * 100), int((2 * 1.49 + 0.7) * 100))  # four cells
    colours = {colour for _, colour in page.getcolors(1 << 20) or []}
    assert colours & {(255, 0, 0), (0, 128, 0), (0, 0, 255)}  # the squares


def test_the_card_says_what_a_reader_must_know(measured: tuple[Path, LitModel], tuned: Path) -> None:
    folder, model = measured
    card = json.loads((folder / "card.json").read_text())
    assert set(card) == {
        "task", "data", "checkpoint", "lineage", "images of the split seen in training", "resolution", "text length",
        "tokenizer", "settings", "precision", "processes", "metrics", "versions",
    }  # fmt: skip
    assert card["task"] == "tasks.nlvr.task.Nlvr"
    assert card["data"] == {
        "source": "toy_examples.Questions", "settings": None, "split": "val", "sha": "toy val", "rows of the split": 7,
        "images of the split": 14, "left out or mended": {}, "share measured": 1.0,
    }  # fmt: skip
    assert card["checkpoint"] == {
        "file": f"{tuned.parent.name}/last.ckpt", "sha256": stated(tuned)[-1].sha256, "steps trained here": 0,
    }  # fmt: skip
    assert card["lineage"] == [
        {
            "task": "tasks.nlvr.task.Nlvr",
            "source": "toy_examples.Questions",
            "sha": "toy train",
            "pictures": 32,
            "steps": 2,
        }
    ]
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


def test_images_without_ids_are_unknown(tuned: Path, tmp_path: Path) -> None:
    measure(tuned, tmp_path, Nameless(2))
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["data"]["images of the split"] is None
    assert card["images of the split seen in training"] == "unknown"


class Sieved(Questions):
    """A reader that left rows of every split out; one reason met none."""

    def split(self, name: str) -> Any:
        rows = super().split(name)
        rows.skipped = {"no gold label": [f"{name}:1", f"{name}:4"], "empty text": []}
        return rows


def test_the_card_counts_what_was_left_out_of_the_split(tuned: Path, tmp_path: Path) -> None:
    measure(tuned, tmp_path, Sieved(2))
    assert json.loads((tmp_path / "card.json").read_text())["data"]["left out or mended"] == {"no gold label": 2}


def test_a_checkpoint_without_its_hash_beside_it_is_hashed(tuned: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(tuned, tmp_path / "alone.ckpt"))
    measure(alone, tmp_path / "run", Questions(2))
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    expected = hashlib.sha256(tuned.read_bytes()).hexdigest()
    assert card["checkpoint"]["sha256"] == expected == hash_of(tuned)
    assert hash_of(tmp_path / "gone.ckpt") is None


def test_of_two_stated_hashes_the_one_of_the_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is killed before its rename leaves the old file, and both hashes beside it."""
    path = tmp_path / "last.ckpt"
    save({"state_dict": {}, "epoch": 1}, path)
    old = hash_of(path)
    replace = os.replace

    def dies(start: Path, end: Path) -> None:
        if end == path:
            raise KeyboardInterrupt
        replace(start, end)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        save({"state_dict": {}, "epoch": 2}, path)
    new = stated(path)[-1].sha256
    assert hash_of(path) == old == hashlib.sha256(path.read_bytes()).hexdigest() != new


def test_a_training_says_what_it_started_from_not_that_it_measured_it(tuned: Path) -> None:
    trainer: Any = SimpleNamespace(ckpt_path=None, global_step=5)
    origin = SimpleNamespace(path=str(tuned))
    model = SimpleNamespace(backbone=SimpleNamespace(origin=origin), measured_step=None)
    name, sha = f"{tuned.parent.name}/last.ckpt", hash_of(tuned)
    assert checkpoint_of(trainer, model) == {"started from": name, "sha256 of that": sha, "measured after steps": 5}
    model.backbone.origin = None
    assert checkpoint_of(trainer, model) == {"started from": None, "sha256 of that": None, "measured after steps": 5}
    trainer.ckpt_path = str(tuned)  # measured as it is
    assert checkpoint_of(trainer, model) == {"file": name, "sha256": sha, "steps trained here": 5}
    model.measured_step = 3  # the best weights of a run that ended later
    assert checkpoint_of(trainer, model)["steps trained here"] == 3


def test_a_trial_leaves_nothing(tuned: Path, tmp_path: Path) -> None:
    measure(tuned, tmp_path, Questions(2), fast_dev_run=1)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_drawn_costs_a_warning(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("maskvlm.reporting.predictions.example_page", fails)
    measure(tuned, tmp_path, Questions(2))
    assert (tmp_path / "predictions.jsonl").is_file()
    assert not (tmp_path / "examples.png").exists()


class Unknown(L.Callback):
    """A prediction and a metric that are no numbers."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.task.predictions[0]["right"] = float("nan")
        pl_module.metrics["nlvr/odds"] = float("inf")


def test_what_is_not_known_is_null(tuned: Path, tmp_path: Path) -> None:
    backbone = bare_backbone(tuned)
    trainer = trainer_in(tmp_path, Unknown(), Predictions())
    model = LitModel(backbone, Nlvr(LABELS, images_per_example=2))
    trainer.validate(model, data_for(backbone, Questions(2)), verbose=False)
    first = (tmp_path / "predictions.jsonl").read_text().splitlines()[0]
    card = (tmp_path / "card.json").read_text()
    # `parse_constant` is asked for what is no JSON.
    assert json.loads(first, parse_constant=pytest.fail)["right"] is None
    assert json.loads(card, parse_constant=pytest.fail)["metrics"]["nlvr/odds"] is None


def test_nothing_is_written_during_training(tmp_path: Path) -> None:
    backbone = bare_backbone()
    listings: list[list[str]] = []

    class Look(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            listings.append([path.name for path in tmp_path.iterdir()])

    trainer = trainer_in(tmp_path, Predictions(), Look(), val_check_interval=1)
    trainer.fit(LitModel(backbone, Nlvr(LABELS, images_per_example=2)), data_for(backbone, Questions(2)))
    assert listings == [[]]


def test_a_measured_training_folder_keeps_the_trainings_own(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "config-fit.yaml").touch()
    for name in ("card.json", "predictions.jsonl", "examples.png"):
        (tmp_path / name).write_text("the training's")
    measure(tuned, tmp_path, Questions(2))
    measure(tuned, tmp_path, Questions(2), test=True)
    for name in ("card.json", "predictions.jsonl", "examples.png"):
        assert (tmp_path / name).read_text() == "the training's"
        for split in ("val", "test"):
            assert (tmp_path / name.replace(".", f"-{split}.")).stat().st_size > 100


# ---------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("total", "count", "rows"),
    [(3, 5, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (9, 3, [0, 3, 6]), (10, 4, [0, 2, 5, 7]), (0, 3, [])],
)
def test_shown_ones_stand_at_even_distances(total: int, count: int, rows: list[int]) -> None:
    assert [one["index"] for one in spread([line(n) for n in range(total)], count)] == [[row] for row in rows]


PAIRS: list[dict[str, Any]] = [{"image": "a", "image_id": "flickr 1"}, {"image": "d", "image_id": "flickr 23"}]


def test_images_of_pairs_and_of_examples_and_what_they_are() -> None:
    assert example_cell([{"images": ["b", "c"]}], line(0))[1:] == (["b", "c"], ("left", "right"))
    assert example_cell([{"images": ["b"]}], line(0))[1:] == (["b"], ())
    assert example_cell([{"images": ["b", "c", "d"]}], line(0))[1:] == (["b", "c", "d"], ())
    prediction = Prediction(**{**line(0), "index": [1, 0]})
    assert example_cell(PAIRS, prediction)[1:] == (["d", "a"], ("found", "truth"))
    assert example_cell(PAIRS, line(1))[1:] == (["d"], ())
    assert example_cell(PAIRS, Prediction(**{**line(0), "index": []}))[1:] == ([], ())


def test_an_image_of_pairs_is_called_by_its_id() -> None:
    one = Prediction(id="7", text="an image 1", truth="image 0", prediction="image 1", right=0.0, index=[1, 0], kind="")
    (entry,) = with_ids([one], PAIRS)
    changes = {"truth": "image 0, flickr 1", "prediction": "image 1, flickr 23", "images": ["flickr 23", "flickr 1"]}
    assert entry == {**one, **changes}
    predictions = [Prediction(**{**line(0), "text": "image 0"})]
    assert with_ids(predictions, PAIRS)[0]["text"] == "image 0, flickr 1"
    assert with_ids(predictions, [{"images": ["b"]}]) is predictions  # an example says its own
    nowhere = [Prediction(**{**line(0), "index": []})]
    assert with_ids(nowhere, PAIRS) is nowhere


@pytest.mark.parametrize(
    ("limit", "batches", "share"),
    [(1.0, [3], 1.0), (1, [1], 0.3333), (0.5, [1], 0.3333), (3, [3], 1.0)],  # 1 is one batch
)
def test_share_measured(limit: float, batches: list[int], share: float) -> None:
    """1.0 is everything and 1 is one batch."""
    trainer: Any = SimpleNamespace(
        limit_val_batches=limit, num_val_batches=batches, val_dataloaders=[1, 2, 3],
        limit_test_batches=1.0, num_test_batches=[9], test_dataloaders=None,
    )  # fmt: skip
    assert share_measured(trainer, "val") == share
    assert share_measured(trainer, "test") == 1.0
    trainer.datamodule = SimpleNamespace(share_looked_at=0.5)
    assert share_measured(trainer, "val") == pytest.approx(share / 2, abs=1e-4)


# ---------------------------------------------------------------------- the real command


def stack(task: str) -> list[str]:
    files = ("conf/base.yaml", "conf/finetune.yaml", f"tasks/{task}/conf.yaml", "conf/where/cpu.yaml")
    return [word for file in files for word in ("-c", file)]


SIZES = ["--data.batch_size=4", "--data.eval_batch_size=8", "--data.source.train=40", "--data.source.val=12"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make pretrain`, `make finetune TASK=vqa` with larger images, `make evaluate`: folders p, f and e."""
    folder, before = tmp_path_factory.mktemp("chain"), Path.cwd()
    files = ("conf/base.yaml", "conf/model/tiny.yaml", "conf/pretrain.yaml", "conf/pretrain-tiny.yaml")
    first = [word for file in (*files, "conf/data/scenes.yaml", "conf/where/cpu.yaml") for word in ("-c", file)]
    larger = ["--model.backbone.image.image_size=64"]
    os.chdir(ROOT)
    try:
        short = ["--data.steps=1", "--trainer.limit_val_batches=0"]
        assert main(["fit", "--run", str(folder / "p"), *first, *SIZES, *short]) == 0
        more = ["--data.steps=2", *larger]
        start = ["--from", str(folder / "p" / "last.ckpt")]
        assert main(["fit", "--run", str(folder / "f"), *start, *stack("vqa"), *SIZES, *more]) == 0
        start = ["--from", str(folder / "f" / "last.ckpt")]
        assert main(["validate", "--run", str(folder / "e"), *start, *stack("vqa"), *SIZES]) == 0
    finally:
        os.chdir(before)
    return folder


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_checkpoint_measures_as_its_training_did(chain: Path) -> None:
    trained, measured = load(chain / "f" / "metrics.json"), load(chain / "e" / "metrics.json")
    assert trained["step"] == 2
    assert measured == pytest.approx(trained)
    assert (chain / "f" / "predictions.jsonl").read_text() == (chain / "e" / "predictions.jsonl").read_text()
    names = {path.name for path in (chain / "e").iterdir()}
    assert names >= {"card.json", "examples.png", "predictions.jsonl", "answers.json", "config-validate.yaml"}
    assert not [name for name in names if name.endswith(".ckpt")]


def test_history_and_image_size_pass_from_run_to_run(chain: Path) -> None:
    card = load(chain / "e" / "card.json")
    assert [step["task"] for step in card["lineage"]] == [
        "maskvlm.objectives.pretraining.MaskedPretraining",
        "tasks.vqa.task.Vqa",
    ]
    assert card["resolution"] == 64
    assert card["images of the split seen in training"] == 0
    assert card["checkpoint"]["file"] == "f/last.ckpt"
    assert "pos_embed" in (chain / "f" / "provenance.json").read_text()


def test_the_card_has_the_sources_settings(chain: Path) -> None:
    """Given and by default."""
    for folder in ("f", "e"):
        settings = load(chain / folder / "card.json")["data"]["settings"]
        assert (settings["train"], settings["val"], settings["seed"]) == (40, 12, 0)


def test_retrieval_names_the_images_it_found(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-shot, from pre-training."""
    monkeypatch.chdir(ROOT)
    folder, start = chain / "r", ["--from", str(chain / "p" / "last.ckpt")]
    whole = ["--trainer.limit_val_batches=1.0"]
    assert main(["validate", "--run", str(folder), *start, *stack("retrieval"), *SIZES, *whole]) == 0
    rows = Scenes(train=40, val=12).split("val")
    lines = [json.loads(one) for one in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 12 * 5 + 12
    for one in lines:
        names = [f"image {place}, {rows[place]['image_id']}" for place in one["index"]]
        texts = [one["prediction"], one["truth"]] if one["kind"] == "image retrieval" else [one["text"]]
        assert names == texts
    assert (folder / "examples.png").stat().st_size > 1000


def test_measuring_in_a_trainings_folder_touches_none_of_its_files(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --ckpt_path, as README says of a finished run: its configuration names what it began with."""
    monkeypatch.chdir(ROOT)
    folder = chain / "f"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = ["-c", str(folder / "config-fit.yaml"), "--run", str(folder), "--ckpt_path", "last"]
    assert main(["validate", *again]) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    added = {path.name for path in folder.iterdir()} - before.keys()
    assert added >= {"metrics-validate.json", "card-val.json", "predictions-val.jsonl", "examples-val.png"}
    card = load(folder / "card-val.json")
    assert card["checkpoint"]["file"] == "f/last.ckpt"
    assert [step["steps"] for step in card["lineage"]] == [1, 2]


REFUSED = [
    (["--from", "p/last.ckpt"], "nlvr", ExitCode.BAD_DATA, "p/last.ckpt: holds no heads of Nlvr (head.layers.0.weight"),
    (["--from", "p/last.ckpt"], "vqa", ExitCode.BAD_DATA, "p/last.ckpt: holds no heads of Vqa (answer.position_SD"),
    (["--from", "f/last.ckpt"], "entailment", ExitCode.USAGE, "f/last.ckpt: was fine-tuned as vqa, not as entailment"),
    (
        ["--from", "p/last.ckpt", "--model.task.contrast_dim=64"],
        "retrieval",
        ExitCode.USAGE,
        "model.task.contrast_dim: 64, but the checkpoint's projections are 128 wide. Leave it out, or give 128.",
    ),
    (
        ["--from", "p/last.ckpt", "--model.backbone.cross_layers=1"],
        "retrieval",
        ExitCode.BAD_DATA,
        "p/last.ckpt: does not fit MaskVLM: ",
    ),
]


@pytest.mark.parametrize(("words", "task", "code", "message"), REFUSED)
def test_what_a_checkpoint_cannot_do_is_one_line(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], task: str,
    code: ExitCode, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    words = [str(chain / word) if word.endswith(".ckpt") else word for word in words]
    assert main(["validate", "--run", str(chain / "no"), *stack(task), *SIZES, *words]) == code
    error = [one for one in capsys.readouterr().err.splitlines() if not one.startswith(("INFO", "💡"))]
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert message in error[0]
    assert not (chain / "no").exists()


def test_more_images_than_the_task_is_set_to_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = [
        "-c",
        "conf/model/tiny.yaml",
        *stack("nlvr"),
        *SIZES,
        "--data.steps=1",
        "--model.task.images_per_example=3",
    ]
    assert main(["fit", "--run", str(tmp_path / "run"), *words]) == ExitCode.USAGE
    (error,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error")]
    assert error == (
        "error: model.task.images_per_example: the data has 2 images per example, but the task is set to 3. "
        "Set it to 2."
    )
