"""Lightning's checkpoints go through `checkpoint.io`, in the background where a run asks for it."""

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
    """Hold the release that wrote a run's state against the one that would go on from it. Lightning itself warns of a
    later one and goes on.

    Raises:
        UserError: it was written by a later release than the one that is installed, or by none (65).
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
    """Lightning's hook: `trainer.plugins: [maskvlm.training.checkpoint_io.SafeCheckpointIO]` makes
    it use `checkpoint.io`.

    A save returns when the file is there, but between `begin` and `end`, where it is written in the background.
    """

    def __init__(self) -> None:
        self.writer: BackgroundWriter | None = None

    def begin(self) -> None:
        """Save in the background: from now on a save returns once it has a snapshot."""
        self.end()
        self.writer = BackgroundWriter()

    def reserve(self, values: Iterable[Tensor]) -> None:
        """Have the memory made that the first save in the background takes for these: it takes several times as long
        as the copy itself."""
        if self.writer is not None:
            self.writer.reserve(values)

    def check(self) -> None:
        """Raises UserError: a write in the background has failed; the file that was there before is untouched."""
        if self.writer is not None:
            self.writer.check()

    def finish(self) -> None:
        """Wait until all that was saved is on the disk; raises as `check`."""
        if self.writer is not None:
            self.writer.finish()

    def end(self) -> None:
        """Finish as `finish` does; from now on a save returns when the file is there."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
            writer.finish()

    teardown = end  # Lightning calls it when it is done, or has failed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """storage_options: the path that the file which was there is kept under, if any."""
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
        """Lightning asks for what a callback's state in a checkpoint names: a way out of the run's folder is none."""
        # ModelCheckpoint removes its earlier best, whose path it has from the checkpoint that a run went on from.
        if ".." in Path(path).parts or Path(path).suffix != ".ckpt":
            return
        if self.writer is None:
            _remove(Path(path))
        else:
            self.writer.run(_remove, Path(path))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    side_file(path).unlink(missing_ok=True)
