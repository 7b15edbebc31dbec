"""A run's folder: who may write to it, and what a run records there for later.

A run writes all its files to `trainer.default_root_dir`, which the command line sets to `--run`.
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
"""Files that a run writes before its first step, besides the logger's events."""
PACKAGES = ("torch", "torchvision", "lightning", "transformers", "tokenizers", "timm", "datasets", "pillow")


def claim_folder(folder: Path) -> None:
    """Create a new run's folder, so that a failure shows at the start and not at the first checkpoint.

    Raises:
        UserError: the folder cannot be written (73), or the disk is full or broken (74).
    """
    write_json(folder / "versions.json", versions())
    (folder / "metrics.csv").unlink(missing_ok=True)  # left by a run that died before its first checkpoint


def give_up_folder(folder: Path) -> None:
    """Undo `claim_folder` for a run that could not start: remove everything, if only the start has written files."""
    names = {path.name for path in folder.iterdir()}
    if all(name in STARTS_WITH or name.startswith("events.out.tfevents.") for name in names):
        for name in names - {"run.lock"}:
            (folder / name).unlink(missing_ok=True)
        HELD.withdraw()
        with suppress(OSError):  # another run has started there
            folder.rmdir()


def finish_run(folder: Path, step: int, of: int) -> None:
    """Note in `versions.json` that a run has finished. of: the number of steps requested."""
    forget(folder)
    facts = read_json(folder / "versions.json")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "versions.json", facts | {"finished": {"step": step, "of": of, "time": now}})


def note_divergence(folder: Path, step: int) -> None:
    """Note in `versions.json` that a run was ended for skipped steps: the same command would end the same way. A
    resumed run rewrites the file."""
    write_json(folder / "versions.json", read_json(folder / "versions.json") | {"diverged": {"step": step}})


def versions() -> dict[str, Any]:
    """The environment of this run: our version and commit, the packages, the machine, the command."""
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
    """Entry `earlier` of a resumed run: command, commit, machine and start of each earlier part."""
    # `setup` calls this before it replaces the file.
    before = read_json(folder / "versions.json")
    if "processes" not in before:  # a new run has only claimed the folder
        return {}
    facts = {key: before[key] for key in ("command", "commit", "machine", "started", "processes") if key in before}
    parts = before.get("earlier")
    return {"earlier": [*(parts if isinstance(parts, list) else []), facts]}


def machine() -> dict[str, Any]:
    """Processor, number of cores this process may use, and names of the GPUs."""
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": cores(), "gpus": cards}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # One such line per core, all alike.
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the running code, with a + if files differ from it; None outside a repository."""
    try:
        folder = Path(__file__).parent
        # `--exclude=*` leaves out tags: always the hash.
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class RunRecord(L.Callback):
    """Adds seed and data to `versions.json`, and keeps `metrics.json` up to date.

    `metrics.json` holds the metrics of the run's latest evaluation and the step at which it was made. Evaluating a
    checkpoint later writes another file (`metrics-test.json`), so it never changes the run's record.
    """

    def __init__(self) -> None:
        self.trained = False
        # Resumes from a checkpoint, as the command line knows before the trainer does. If the checkpoint does not fit,
        # the run's record must not change, so it is written only once that is known.
        self.goes_on = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trained |= stage == "fit"
        if not trainer.is_global_zero or stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial of a few batches may use a finished run's folder
        if not self.goes_on:
            self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        """Write what is known before the first step."""
        folder, fingerprint = folder_of(trainer), getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
        # Lightning's logger opens this file by its name: a link, as a stranger's folder may have, would be followed.
        if (hparams := folder / "hparams.yaml").is_symlink():
            hparams.unlink()
        facts: dict[str, Any] = {"seed": int(os.environ.get("PL_GLOBAL_SEED", 0))}
        facts["processes"], facts["precision"] = trainer.world_size, str(trainer.precision)
        facts["data"] = fingerprint() if fingerprint else None
        # The same command, repeated, resumes the run that started from the checkpoint it names.
        named = foreign_origin(str(trainer.ckpt_path), folder) if self.goes_on else None
        if origin := named or read_json(folder / "versions.json").get("origin"):
            facts["origin"] = origin
        write_json(folder / "versions.json", versions() | facts | earlier(folder))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the record of a resumed run: the checkpoint fits, and model and data are restored by now."""
        begins = self.goes_on and trainer.state.fn == TrainerFn.FITTING  # in a script `setup` has written it
        if begins and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report where the weights come from, unless the run is resumed: then all come from the checkpoint."""
        if trainer.is_global_zero and not trainer.fast_dev_run and trainer.ckpt_path is None:  # type: ignore[attr-defined]
            provenance: Provenance = pl_module.provenance  # type: ignore[assignment]
            Console().print(provenance.table())
            provenance.save(folder_of(trainer) / "provenance.json")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report and list the samples that were left out, repaired or cut."""
        # Outside the check for the first process, since counts are gathered from all.
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
        """After a standalone evaluation, report on the evaluated split; a training has already reported on all."""
        rows = getattr(getattr(trainer, "datamodule", None), "splits", {}).get(split)
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.trained or rows is None or trial or not trainer.is_global_zero:
            return
        folder, counts = folder_of(trainer), rows_left_out(rows)
        path = folder / f"bad_samples{file_suffix(folder, split, trained=False)}.json"
        path.unlink(missing_ok=True)  # from an earlier evaluation here
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
    """Saves the composed configuration with all defaults, one file per stage; `fit -c config-fit.yaml` repeats the run.

    Args:
        parser: parser of the subcommand.
        config: configuration with the run's folder filled in.
        portable: the same with `{run}` in place of the folder; this one is saved. None: `config`.
    """

    def __init__(self, parser: Any, config: Any, portable: Any = None, **kwargs: Any) -> None:
        # Lightning's own way rejects a folder that already has a configuration, as that of a resumed run does.
        super().__init__(parser, config if portable is None else portable, save_to_log_dir=False, **kwargs)
        self.goes_on = False  # as in RunRecord

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self.goes_on:
            super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        # As a string a stage is `TrainerFn.FITTING`; its value is `fit`.
        write_text(folder_of(trainer) / f"config-{getattr(stage, 'value', stage)}.yaml", text)


def foreign_origin(checkpoint: str | Path, folder: Path) -> str | None:
    """Path of the other run's checkpoint from which a run in this folder starts; None if it is one of this folder's
    own, possibly in a subfolder. Links to files are not followed, as a run may keep its checkpoints elsewhere."""
    path, here = Path(checkpoint), folder.resolve()
    path = path.parent.resolve() / path.name
    run = next((above for above in path.parents if above == here or is_training_run(above)), None)
    return None if run == here else str(path)


def is_training_run(folder: Path) -> bool:
    """Whether the folder holds the record of a training, which evaluating a checkpoint must not replace."""
    return (folder / "config-fit.yaml").exists()


def file_suffix(folder: Path, split: str, trained: bool) -> str:
    """Suffix of the names of an evaluation's files: empty if the folder is the evaluation's own, `-val` or the like if
    they would replace those of the training in this folder. trained: the training was in this process."""
    return f"-{split}" if is_training_run(folder) and not trained else ""


def rows_left_out(rows: Any, prepared: bool = False) -> dict[str, int]:
    """Number of rows of a split that its reader left out or repaired, by reason; empty if it reports none.

    Args:
        prepared: also count those that `maskvlm data` left out or repaired, and reported, when it prepared the set.
    """
    counts = Counter({reason: len(places) for reason, places in getattr(rows, "skipped", {}).items() if places})
    if prepared:
        counts.update({reason: len(places) for reason, places in getattr(rows, "unprepared", {}).items()})
    return dict(counts)


def bad_rows_of(trainer: L.Trainer) -> dict[str, Any]:
    """Training samples that were left out or repaired, and those of skipped steps. All processes call it: their counts
    are summed."""
    bad_rows = getattr(trainer.datamodule, "bad_rows", None)  # type: ignore[attr-defined]
    rows: dict[str, Any] = bad_rows() if bad_rows else {"samples": 0}
    # Only StepGuard has them.
    for callback in getattr(trainer, "callbacks", []):
        rows |= getattr(callback, "skipped_steps", {})
    return rows


def write_bad_samples(trainer: L.Trainer) -> Path:
    """Write `bad_samples.json` during training and return its path. All processes call it."""
    rows, path = bad_rows_of(trainer), folder_of(trainer) / BAD
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_json(path, rows)
    return path


def report_skipped(path: Path, of: str, counts: Mapping[str, int], listed: dict[str, Any]) -> None:
    """Print one line to standard output, and list the samples in `path`."""
    write_json(path, listed)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
    print(f"samples skipped or repaired ({of}): {reasons}; listed in {path}", flush=True)


def folder_of(trainer: L.Trainer) -> Path:
    """The run's folder."""
    return Path(trainer.default_root_dir)
