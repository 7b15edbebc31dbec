"""`maskvlm convert FROM TO`: converts a run's checkpoint to a Hugging Face folder, or such a folder to a checkpoint."""

from collections.abc import Iterable
from pathlib import Path

import lightning as L

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.warm_start import read_content
from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import bundled_models
from maskvlm.inference.model_card import UNNAMED
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import ExitCode, UserError


def convert(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Convert the source, the first argument, to the target, the second; returns a line that says what was done.

    Raises:
        UserError: the target exists already (73), or as `from_pretrained`.
    """
    parser = OptionParser(
        "maskvlm convert", description="convert a checkpoint to a Hugging Face folder, or such a folder to FILE.ckpt"
    )
    parser.add_argument("source", help="checkpoint file, Hugging Face folder or hub name")
    parser.add_argument("target", type=Path, help="new folder, or new file that ends in .ckpt")
    parser.add_argument(
        "--dtype", help="precision of the folder's weights: float32, float16 or bfloat16 (default: float32)"
    )
    options = parser.parse_args(arguments)
    source, target = options.source, options.target
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(target, "already exists", "Name another one", ExitCode.CANNOT_CREATE)
    if target.suffix == ".ckpt" and options.dtype:
        raise UserError(
            "convert: --dtype", "applies to Hugging Face folders only", "Leave it out: a checkpoint keeps its precision"
        )
    if target.suffix == ".ckpt":
        content = read_content(source)
        # A folder includes its card and metrics; a checkpoint has them in files beside it.
        content.pop("evaluation", None)
        # Lightning needs an epoch and a version in the file; there is no optimiser or loop state to restore.
        checkpoint.save({"epoch": 0, "pytorch-lightning_version": L.__version__, **content}, target)
        return f"{target}: {len(content['state_dict'])} tensors; fine-tune it: maskvlm finetune ... from={target}"
    model = PretrainedMaskVLM.from_pretrained(source, dtype=options.dtype, allow_import=allowed)
    # A bundled model can be loaded by name wherever the package is installed; other models have no name yet.
    model.save_pretrained(target, name=source if source in bundled_models() else UNNAMED)
    return f"{target}: MaskVLM.from_pretrained('{target}'), or from={target} to fine-tune"
