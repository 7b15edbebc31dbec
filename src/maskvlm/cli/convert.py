"""`maskvlm convert FROM TO`: a run's checkpoint to the hub's format, or such a folder to a checkpoint."""

from collections.abc import Iterable
from pathlib import Path

import lightning as L

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.warm_start import read_content
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import ExitCode, UserError


def convert(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Convert what the first argument names into what the second does; returns what was done.

    Raises:
        UserError: not two names, or the second is there already (73); as `from_pretrained`.
    """
    if {"-h", "--help"} & {*arguments}:
        return "maskvlm convert CHECKPOINT FOLDER    to the hub's format\nmaskvlm convert FOLDER FILE.ckpt     and back"
    if len(arguments) != 2:
        todo = "Give a checkpoint and a folder (or a folder and a file.ckpt): convert checkpoints/RUN/best.ckpt model"
        raise UserError("convert", f"{len(arguments)} names", todo)
    source, target = arguments[0], Path(arguments[1])
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(target, "is there already", "Name another one", ExitCode.CANNOT_CREATE)
    if target.suffix == ".ckpt":
        content = read_content(source)
        # A folder carries its card and metrics; a checkpoint has them in files beside it.
        content.pop("evaluation", None)
        # What Lightning looks for in a file: epoch and version; optimiser and loops are not there to be restored.
        checkpoint.save({"epoch": 0, "pytorch-lightning_version": L.__version__, **content}, target)
        return f"{target}: {len(content['state_dict'])} tensors; fine-tune it: maskvlm finetune ... from={target}"
    PretrainedMaskVLM.from_pretrained(source, allow_import=allowed).save_pretrained(target)
    return f"{target}: MaskVLM.from_pretrained('{target}'), or from={target} to fine-tune"
