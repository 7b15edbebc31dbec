"""The visual output of a run: the table of metrics, `curves.png`, `reconstructions.png`, and a page of all three."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maskvlm.data.batch import Batch
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.reconstructed_examples import subsample
from maskvlm.reporting.curves import curves
from maskvlm.reporting.metric_tables import claim_line, metrics_table, score_line
from maskvlm.reporting.reconstruction_page import reconstructions
from maskvlm.training.run_record import folder_of
from maskvlm.utils.errors import UserError
from maskvlm.utils.whole_files import whole_file, write_text

log = logging.getLogger(__name__)


class Report(Callback):
    """After an evaluation outside training, prints the table of metrics and writes the two figures to the run's folder
    and to TensorBoard, and `report.html`, which shows the table and the figures. During training, prints the metrics of
    each evaluation in one line.

    If a figure cannot be drawn, it warns and never fails a finished training. Evaluating a checkpoint later does not
    overwrite the training's images: it writes `reconstructions-validate.png`.

    Args:
        every: also draw the figures after every `every` evaluations during training; None: do not.
        count: number of pairs in `reconstructions.png`.
    """

    def __init__(self, every: int | None = None, count: int = 12) -> None:
        self.every, self.count = every, count
        self.evaluations, self.trained = 0, False
        self.batch: Batch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trained |= stage == "fit"

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pairs, as they are already decoded and on the device."""
        pretrains = isinstance(getattr(pl_module, "task", None), MaskedPretraining)
        if pretrains and batch_idx == 0 and trainer.is_global_zero and not trainer.sanity_checking:
            self.batch = subsample(batch, self.count)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        metrics = getattr(pl_module, "metrics", {})
        # During training, a line for each evaluation and sometimes figures; outside of training, the whole table.
        if trainer.state.fn == TrainerFn.FITTING:
            self.evaluations += 1
            # Pre-training reports its claim, a downstream task its score.
            if line := claim_line(metrics) or score_line(metrics):
                say(f"step {trainer.global_step}: {line}")
            if not self.every or self.evaluations % self.every:
                return
        else:
            Console().print(metrics_table(metrics))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.draw(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            Console().print(metrics_table(getattr(pl_module, "metrics", {})))

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw both figures, if there is something to draw."""
        folder, drawn = folder_of(trainer), list[str]()
        # Only a training has curves, not the evaluation of a checkpoint.
        logged = metrics_file(trainer)
        if logged is not None and self.trained:
            drawn += try_drawing(trainer, folder / "curves.png", lambda path: curves(logged, path, title=folder.name))
        task, batch = getattr(pl_module, "task", None), self.batch
        if isinstance(task, MaskedPretraining) and batch is not None:
            backbone: Any = pl_module.backbone

            def fill(path: Path) -> None:
                # In the precision of an evaluation, which Lightning sets for steps only; and, as there, not compiled.
                with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.val_step_context():
                    reconstructions(backbone, task, batch, backbone.text.tokenizer, path, self.count)

            name = "reconstructions.png" if self.trained else "reconstructions-validate.png"
            drawn = [*try_drawing(trainer, folder / name, fill), *drawn]  # what the model fills in comes first
        self.batch = None
        if drawn:
            page = folder / ("report.html" if self.trained else "report-validate.html")
            try:
                write_text(page, report_page(folder.name, metrics_table(getattr(pl_module, "metrics", {})), drawn))
            except UserError as error:  # as for a figure
                log.warning("warning: %s was not written: %s", page, error)
                return
            say(f"wrote {page}")


def metrics_file(trainer: L.Trainer) -> Path | None:
    """The metrics.csv of the run, with everything logged so far."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
            path = Path(logger.log_dir) / "metrics.csv"
            return path if path.is_file() else None
    return None


def report_page(title: str, table: Table, figures: list[str]) -> str:
    """An HTML page with the table of metrics and the figures, which lie beside it."""
    console = Console(record=True, file=io.StringIO(), width=100)
    console.print(f"[bold]{escape(title)}[/bold]", table)
    images = "".join(f'<img src="{name}" style="max-width: 100%">\n' for name in figures)
    return console.export_html(inline_styles=True).replace("</body>", f"{images}</body>")


def try_drawing(trainer: L.Trainer, path: Path, draw: Callable[[Path], object]) -> list[str]:
    """Draw a figure and pass it to TensorBoard; returns its name. If that fails, warn in one line; returns nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            draw(temporary)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(path.stem, pixels, trainer.global_step, dataformats="HWC")
    except Exception as error:  # hours of training must not end here
        log.warning("warning: %s was not drawn: %s: %s", path, type(error).__name__, " ".join(str(error).split()))
        return []
    return [path.name]


def say(text: str) -> None:
    """Print a line to stdout, above a progress bar if there is one."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)
