"""Files of an evaluation besides its metrics: every prediction as a line of JSON, a page of images with some of them,
and the evaluation card, which records what was measured, on which data, with which weights."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from maskvlm.checkpoint.hf_folder import WEIGHTS
from maskvlm.checkpoint.integrity import sha256_of, stated
from maskvlm.checkpoint.warm_start import overlap
from maskvlm.config.bundled_models import bundled_folder
from maskvlm.data.text import tokenizer_hash
from maskvlm.objectives.task import Prediction
from maskvlm.reporting.callbacks import say, try_drawing
from maskvlm.reporting.prediction_page import ExampleCell, example_page
from maskvlm.training.run_record import SaveConfig, file_suffix, folder_of, rows_left_out, versions
from maskvlm.utils.whole_files import json_ready, write_json, write_text


class Predictions(Callback):
    """Writes `predictions.jsonl`, `examples.png` and `card.json` to the run's folder after an evaluation outside
    training.

    Evaluating a checkpoint in its training's own folder adds the split to the names instead of overwriting these files.

    Args:
        count: number of predictions on the page.
    """

    def __init__(self, count: int = 24) -> None:
        self.count, self.trained = count, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trained |= stage == "fit"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, task, data = folder_of(trainer), pl_module.task, trainer.datamodule  # type: ignore[attr-defined]
        # The card is written for every task, predictions only if the task makes some.
        end = file_suffix(folder, split, self.trained)
        write_json(folder / f"card{end}.json", evaluation_card(trainer, pl_module, split))
        if not task.predictions:  # type: ignore[union-attr]
            return
        # They have been gathered from all processes.
        predictions = with_ids(task.predictions, data.splits[split])  # type: ignore[arg-type, union-attr]
        lines = (json.dumps(json_ready(one), ensure_ascii=False) for one in predictions)
        write_text(folder / f"predictions{end}.jsonl", "".join(f"{line}\n" for line in lines))
        say(f"wrote {folder / f'predictions{end}.jsonl'}")
        cells = [example_cell(data.splits[split], one) for one in spread(predictions, self.count)]
        for name in try_drawing(trainer, folder / f"examples{end}.png", lambda path: example_page(cells, path)):
            say(f"wrote {folder / name}")
        for name, text in task.files().items():  # type: ignore[union-attr, operator]
            write_text(folder / f"{Path(name).stem}{end}{Path(name).suffix}", text)
            say(f"wrote {folder / f'{Path(name).stem}{end}{Path(name).suffix}'}")


def spread(predictions: list[Prediction], count: int) -> list[Prediction]:
    """`count` predictions at even distances, so that right and wrong ones appear in their true proportion."""
    count = min(count, len(predictions))
    return [predictions[number * len(predictions) // count] for number in range(count)]


def with_ids(predictions: list[Prediction], rows: Any) -> list[Prediction]:
    """Add ids to the images of pairs, which a task can only call `image ROW`: `image ROW, ID`, and the ids alone as
    `images`, as a row number does not identify a photo. Examples have their own ids."""
    places = sorted({place for one in predictions for place in one["index"]})
    # Rows with `images` are examples, those with `image` pairs.
    if not places or "images" in rows[places[0]]:
        return predictions
    ids = {place: rows[place]["image_id"] for place in places}
    names = {f"image {place}": f"image {place}, {id}" for place, id in ids.items()}

    def with_names(one: Prediction) -> Prediction:
        text, truth, answer = (names.get(words, words) for words in (one["text"], one["truth"], one["prediction"]))
        return {**one, "text": text, "truth": truth, "prediction": answer, "images": [ids[at] for at in one["index"]]}

    return [with_names(one) for one in predictions]


def example_cell(rows: Any, prediction: Prediction) -> ExampleCell:
    """A prediction with its images, as the source returns them. Two images get labels: "left" and "right" for an
    example, "found" and "truth" for pairs (retrieval)."""
    items = [rows[place] for place in prediction["index"]]
    images = [image for row in items for image in (row["images"] if "images" in row else [row["image"]])]
    # An NLVR example has two images; in retrieval they are two rows.
    several = ("left", "right") if items and "images" in items[0] else ("found", "truth")
    return ExampleCell(prediction, images, several if len(images) == 2 else ())


def evaluation_card(trainer: L.Trainer, pl_module: Any, split: str) -> dict[str, Any]:
    """What a reader must know to trust or reproduce the metrics."""
    data, backbone, task = trainer.datamodule, pl_module.backbone, pl_module.task  # type: ignore[attr-defined]
    rows, source = data.splits[split], type(data.source)
    # None if the source cannot identify its images without opening them.
    ids = data.hashed_image_ids(split)
    history = pl_module.history
    seen_count = None if ids is None else overlap(ids, history)
    return {
        "task": f"{type(task).__module__}.{type(task).__qualname__}",
        "data": {
            "source": f"{source.__module__}.{source.__qualname__}",
            "split": split,
            "settings": source_settings(trainer),
            "sha": rows.fingerprint,
            "rows of the split": len(rows),
            "images of the split": None if ids is None else len(ids),
            "left out or mended": rows_left_out(rows, prepared=True),
            "share measured": share_measured(trainer, split),
        },
        "checkpoint": checkpoint_of(trainer, pl_module),
        "lineage": [step.words() for step in history],
        "images of the split seen in training": "unknown" if seen_count is None else seen_count,
        "resolution": backbone.image.image_size,
        "text length": backbone.text.text_length,
        "tokenizer": tokenizer_hash(backbone.text.tokenizer),
        "settings": task.card(),
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "metrics": pl_module.metrics,
        "versions": versions(),
    }


def source_settings(trainer: L.Trainer) -> dict[str, Any] | None:
    """The source's arguments as configured, including defaults; None if it was not configured by the command line."""
    saved = next((one for one in trainer.callbacks if isinstance(one, SaveConfig)), None)  # type: ignore[attr-defined]
    if saved is None:
        return None
    # Through JSON, so that paths and the like become strings.
    init_args = saved.config.data.init_args.source.get("init_args")
    settings: dict[str, Any] = json.loads(json.dumps(init_args.as_dict() if init_args else {}, default=str))
    return settings


def share_measured(trainer: L.Trainer, split: str) -> float:
    """Share of the split that was evaluated: below 1 with trainer.limit_val_batches (or limit_test_batches)."""
    counts = trainer.num_test_batches if split == "test" else trainer.num_val_batches
    loaders = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
    # Batches of this process, in total and as limited.
    total = len(loaders) if loaders is not None else 0
    share = float(sum(counts)) / total if total else 1.0
    # A limit in batches shortens the loader itself.
    data = getattr(trainer, "datamodule", None)
    return round(share * getattr(data, "share_looked_at", 1.0), 4)


def checkpoint_of(trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
    """The file of the evaluated weights, with its sha256; if this run trained them, the file that it started from."""
    origin = pl_module.backbone.origin
    path = trainer.ckpt_path or (origin.path if origin else None)
    bundled = None if path is None else bundled_folder(str(path))
    name = None if path is None else str(path) if bundled else f"{Path(path).parent.name}/{Path(path).name}"
    trained = getattr(trainer, "global_step", 0)
    if trained and pl_module.measured_step is not None:
        trained = pl_module.measured_step  # the best weights of a run that ended later
    sha = None if path is None else hash_of(bundled or Path(path))
    # The evaluated weights are in no named file: only their starting point is known.
    if trained and trainer.ckpt_path is None:
        return {"started from": name, "sha256 of that": sha, "measured after steps": trained}
    return {"file": name, "sha256": sha, "steps trained here": trained}


def hash_of(path: Path) -> str | None:
    """SHA-256 of a file, from the `.sha256` beside it or else computed; for a folder, that of its weights. None if the
    file has been removed since it was read."""
    facts = stated(path)
    # There are two if a save was interrupted at its rename: only the file itself shows which one is right.
    if len(facts) == 1:
        return facts[0].sha256
    # A folder in Hugging Face format.
    path = path / WEIGHTS if path.is_dir() else path
    return sha256_of(path) if path.is_file() else None
