"""A run's folder: who may write into it, and what a run leaves there to be understood later.

Everything a run writes lies in `trainer.default_root_dir`, which the command line sets to `--run`.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from maskvlm.checkpoint.provenance import Provenance
from maskvlm.training.attempts import forget
from maskvlm.utils.cores import cores
from maskvlm.utils.lock import HELD
from maskvlm.utils.whole_files import read_json, write_json, write_text

BAD = "bad_samples.json"
STARTS_WITH = ("versions.json", "run.lock", "config-fit.yaml", "hparams.yaml", "provenance.json")
"""What a run writes before its first step, besides the logger's events."""
PACKAGES = ("torch", "torchvision", "lightning", "transformers", "tokenizers", "timm", "datasets", "pillow")


def claim_folder(folder: Path) -> None:
    """Make a new run's folder; found at the start, not at the first checkpoint, if that cannot be done.

    Raises:
        UserError: it cannot be written (73).
    """
    write_json(folder / "versions.json", versions())
    (folder / "metrics.csv").unlink(missing_ok=True)  # of a run that died before its first checkpoint


def give_up_folder(folder: Path) -> None:
    """After `claim_folder`, of a run that could not begin: leaves nothing, where the start alone has written."""
    names = {path.name for path in folder.iterdir()}
    if all(name in STARTS_WITH or name.startswith("events.out.tfevents.") for name in names):
        for name in names - {"run.lock"}:
            (folder / name).unlink(missing_ok=True)
        HELD.withdraw()
        with suppress(OSError):  # somebody else has begun there
            folder.rmdir()


def finish_run(folder: Path, step: int, of: int) -> None:
    """Note in `versions.json` that a run has come to its end. of: the steps that it was asked for."""
    forget(folder)
    facts = read_json(folder / "versions.json")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "versions.json", facts | {"finished": {"step": step, "of": of, "time": now}})


def note_divergence(folder: Path, step: int) -> None:
    """Note in `versions.json` that a run was ended as its steps could not be made: the same command would come to the
    same end. A run that goes on begins the file anew."""
    write_json(folder / "versions.json", read_json(folder / "versions.json") | {"diverged": {"step": step}})


def versions() -> dict[str, Any]:
    """What this run is made of: our version and commit, the packages, the machine, the command."""
    return {
        "maskvlm": _version("maskvlm"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": machine(),
        "command": sys.argv[1:],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def earlier(folder: Path) -> dict[str, Any]:
    """`earlier`: of a run that goes on, what it was made of before: command, commit, machine and start of each part."""
    # `setup` asks before it replaces the file.
    before = read_json(folder / "versions.json")
    if "processes" not in before:  # a run that begins has only claimed the folder
        return {}
    facts = {key: before[key] for key in ("command", "commit", "machine", "started", "processes") if key in before}
    parts = before.get("earlier")
    return {"earlier": [*(parts if isinstance(parts, list) else []), facts]}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, and the cards, by name."""
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": cores(), "gpus": cards}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # One such line a core, all alike.
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs, with a + where files differ from it; None outside a repository."""
    try:
        folder = Path(__file__).parent
        # `--exclude=*` leaves out tags: always the hash.
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class RunRecord(L.Callback):
    """Completes `versions.json` with seed and data, and keeps `metrics.json` up to date.

    `metrics.json` holds the numbers of the run's latest evaluation and the step it was made at. Measuring a
    checkpoint later writes another file (`metrics-test.json`): looking at a run never changes its record.
    """

    def __init__(self) -> None:
        self.trained = False
        # From a checkpoint, as the command line knows before the trainer does. One that does not fit must leave the
        # record of its run as it is: it is written only once that is known.
        self.goes_on = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trained |= stage == "fit"
        if not trainer.is_global_zero or stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial of a few batches may stand on a finished run's folder
        if not self.goes_on:
            self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        """Write what is known before the first step."""
        folder, fingerprint = folder_of(trainer), getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
        facts: dict[str, Any] = {"seed": int(os.environ.get("PL_GLOBAL_SEED", 0))}
        facts["processes"], facts["precision"] = trainer.world_size, str(trainer.precision)
        facts["data"] = fingerprint() if fingerprint else None
        # The same command, repeated, goes on with what began from the checkpoint that it names.
        named = foreign_origin(str(trainer.ckpt_path), folder) if self.goes_on else None
        if origin := named or read_json(folder / "versions.json").get("origin"):
            facts["origin"] = origin
        write_json(folder / "versions.json", versions() | facts | earlier(folder))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run goes on: the checkpoint was found to fit. Model and data are restored by now."""
        begins = self.goes_on and trainer.state.fn == TrainerFn.FITTING  # in a script `setup` has written it
        if begins and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the weights come from; of a run that goes on, the checkpoint brings every tensor."""
        if trainer.is_global_zero and not trainer.fast_dev_run and trainer.ckpt_path is None:  # type: ignore[attr-defined]
            provenance: Provenance = pl_module.provenance  # type: ignore[assignment]
            Console().print(provenance.table())
            provenance.save(folder_of(trainer) / "provenance.json")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say and list which samples were left out, mended or cut."""
        # Outside of the question for the first process: counts are gathered from all.
        rows = bad_rows_of(trainer)
        counts = dict(rows.get("problems", {}))
        for split, reasons in rows.get("left_out", {}).items():
            counts |= {f"{reason} ({split})": len(places) for reason, places in reasons.items()}
        if "skipped_steps" in rows:
            counts["steps skipped"] = rows["skipped_steps"]["count"]
        if trainer.is_global_zero and counts and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            report_skipped(folder_of(trainer) / BAD, f"{rows['samples']} read", counts, rows)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)
        self._report_left_out(trainer, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)
        self._report_left_out(trainer, "test")

    def _report_left_out(self, trainer: L.Trainer, split: str) -> None:
        """After an evaluation alone, of the split that was measured; a training has said it of all its splits."""
        rows = getattr(getattr(trainer, "datamodule", None), "splits", {}).get(split)
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.trained or rows is None or trial or not trainer.is_global_zero:
            return
        folder, counts = folder_of(trainer), rows_left_out(rows)
        path = folder / f"bad_samples{file_suffix(folder, split, trained=False)}.json"
        path.unlink(missing_ok=True)  # of an earlier evaluation here
        if counts:
            listed = {"samples": len(rows), "problems": {}, "examples": {}, "left_out": {split: rows.skipped}}
            report_skipped(path, f"{split}, {len(rows)} rows", counts, listed)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = getattr(pl_module, "metrics", {})
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and metrics and not trial:
            stage = "fit" if self.trained or trainer.state.fn is None else trainer.state.fn.value
            end = file_suffix(folder_of(trainer), stage, trained=stage == "fit")
            step = getattr(pl_module, "measured_step", None)
            step = trainer.global_step if step is None else step
            write_json(folder_of(trainer) / f"metrics{end}.json", {"step": step} | metrics)


class SaveConfig(SaveConfigCallback):
    """The composed configuration, defaults written out, a file a stage: `fit -c config-fit.yaml` repeats.

    Args:
        parser: of the subcommand.
        config: with the run's folder filled in.
        portable: the same with `{run}` in its place; this is saved. None: `config`.
    """

    def __init__(self, parser: Any, config: Any, portable: Any = None, **kwargs: Any) -> None:
        # Lightning's own way refuses a folder that holds a configuration, as that of a run which goes on does.
        super().__init__(parser, config if portable is None else portable, save_to_log_dir=False, **kwargs)
        self.goes_on = False  # as RunRecord's

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self.goes_on:
            super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        # As text a stage is `TrainerFn.FITTING`, its value is `fit`.
        write_text(folder_of(trainer) / f"config-{getattr(stage, 'value', stage)}.yaml", text)


def foreign_origin(checkpoint: str | Path, folder: Path) -> str | None:
    """Path of the other run's checkpoint that a run in this folder begins from; None where it is one of the folder's
    own, which may lie in a folder below. Links to files are not followed: a run may keep its checkpoints elsewhere."""
    path, here = Path(checkpoint), folder.resolve()
    path = path.parent.resolve() / path.name
    run = next((above for above in path.parents if above == here or is_training_run(above)), None)
    return None if run == here else str(path)


def is_training_run(folder: Path) -> bool:
    """Whether a training left its record here, which measuring a checkpoint must not replace."""
    return (folder / "config-fit.yaml").exists()


def file_suffix(folder: Path, split: str, trained: bool) -> str:
    """What the names of an evaluation's files end in: nothing where they are the folder's own, `-val` or the like where
    they would replace those of the training that the folder belongs to. trained: in this very process."""
    return f"-{split}" if is_training_run(folder) and not trained else ""


def rows_left_out(rows: Any, prepared: bool = False) -> dict[str, int]:
    """Rows of a split that its reader left out or mended, by reason; empty where it tells none.

    Args:
        prepared: also those that `maskvlm data` left out or mended, which it has told when it prepared the set.
    """
    counts = Counter({reason: len(places) for reason, places in getattr(rows, "skipped", {}).items() if places})
    if prepared:
        counts.update({reason: len(places) for reason, places in getattr(rows, "unprepared", {}).items()})
    return dict(counts)


def bad_rows_of(trainer: L.Trainer) -> dict[str, Any]:
    """Samples of the training that were left out or mended, and those of skipped steps. All processes ask: their counts
    are added up."""
    bad_rows = getattr(trainer.datamodule, "bad_rows", None)  # type: ignore[attr-defined]
    rows: dict[str, Any] = bad_rows() if bad_rows else {"samples": 0}
    # StepGuard has them; of the other callbacks none.
    for callback in getattr(trainer, "callbacks", []):
        rows |= getattr(callback, "skipped_steps", {})
    return rows


def write_bad_samples(trainer: L.Trainer) -> Path:
    """Write `bad_samples.json` in the middle of a training; returns where it is. All processes call it."""
    rows, path = bad_rows_of(trainer), folder_of(trainer) / BAD
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_json(path, rows)
    return path


def report_skipped(path: Path, of: str, counts: Mapping[str, int], listed: dict[str, Any]) -> None:
    """One line on the standard output, and which samples they are in `path`."""
    write_json(path, listed)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
    print(f"samples skipped or repaired ({of}): {reasons}; listed in {path}", flush=True)


def folder_of(trainer: L.Trainer) -> Path:
    """The run's folder."""
    return Path(trainer.default_root_dir)
