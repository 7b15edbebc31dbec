"""Routes Lightning's checkpoints through `checkpoint.io`, optionally in the background."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from packaging.version import InvalidVersion, Version
from torch import Tensor

from maskvlm.checkpoint.background import BackgroundWriter
from maskvlm.checkpoint.integrity import bad, side_file
from maskvlm.checkpoint.io import load, save


def check_version(content: Mapping[str, Any], path: str | Path) -> None:
    """Check that the installed Lightning is not older than the release that wrote a run's state. Lightning itself only
    warns.

    Raises:
        UserError: the state was written by a later release than the installed one, or names no release (65).
    """
    written = content.get("pytorch-lightning_version", "")
    try:
        # A later patch release counts as the same.
        later = Version(written).release[:2] > Version(L.__version__).release[:2]
    except InvalidVersion as error:
        what = f"does not give a version of Lightning ({written!r})"
        raise bad(path, what, "Start a new run --from this checkpoint, whose weights are intact") from error
    if later:
        what = f"its state was written by Lightning {written}, this is {L.__version__}"
        raise bad(path, what, "Update lightning, or start a new run --from this checkpoint: it takes only the weights")


class SafeCheckpointIO(CheckpointIO):
    """Lightning plugin that uses `checkpoint.io`; enabled by
    `trainer.plugins: [maskvlm.training.checkpoint_io.SafeCheckpointIO]`.

    A save returns once the file is written, except between `begin` and `end`, when it is written in the background.
    """

    def __init__(self) -> None:
        self.writer: BackgroundWriter | None = None

    def begin(self) -> None:
        """Save in the background from now on: a save returns once it has taken a snapshot."""
        self.end()
        self.writer = BackgroundWriter()

    def reserve(self, values: Iterable[Tensor]) -> None:
        """Allocate the memory that the first background save needs for these tensors, as allocating takes several times
        as long as the copy itself."""
        if self.writer is not None:
            self.writer.reserve(values)

    def check(self) -> None:
        """Raise UserError if a background write has failed; the previous file is untouched."""
        if self.writer is not None:
            self.writer.check()

    def finish(self) -> None:
        """Wait until everything saved is on disk; raises like `check`."""
        if self.writer is not None:
            self.writer.finish()

    def end(self) -> None:
        """Call `finish`, then stop saving in the background: a save returns once the file is written."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
            writer.finish()

    teardown = end  # Lightning calls it when it has finished or failed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint. storage_options: path under which to keep the file being replaced, if any."""
        if self.writer is None:
            save(checkpoint, path, storage_options)
        else:
            self.writer.save(partial(save, path=path, previous=storage_options), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        self.finish()
        content = load(path, map_location)
        check_version(content, path)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint. The path may come from a callback's state in a checkpoint, so a path with `..` in it, or
        without the suffix `.ckpt`, is ignored."""
        # ModelCheckpoint removes its earlier best, whose path it takes from the checkpoint that a run resumed from.
        if ".." in Path(path).parts or Path(path).suffix != ".ckpt":
            return
        if self.writer is None:
            _remove(Path(path))
        else:
            self.writer.run(_remove, Path(path))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    side_file(path).unlink(missing_ok=True)
