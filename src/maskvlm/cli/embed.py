"""`maskvlm embed`: embeds a data set's images and captions (`inference/vector_files.py`)."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from maskvlm.cli.ask_model import warn_afterwards
from maskvlm.cli.lightning import Parsed, built_source, run_command
from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import DEFAULT, default_model
from maskvlm.data.batch import Pairs, Source
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.prepared.manifest import read_manifest
from maskvlm.data.prepared.source import Prepared
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.vector_files import SHARD, Process, embed
from maskvlm.utils.errors import UserError, check_least

LOOKED_AT = 16  # images per split that are checked for being unlike the training data


def main(arguments: list[str], allowed: list[str]) -> int:
    """Embed a split. Takes arguments as in the shell."""
    parser = data_parser("embed", "checkpoints/vectors", "write the vectors of a data set as Parquet")
    options, rest = parser.parse_known_args(arguments)
    print(embed_data(options, rest, allowed, options.out, process_of(os.environ)), flush=True)
    return 0


def data_parser(command: str, out: str, description: str) -> argparse.ArgumentParser:
    """Parser of the options of `embed`, which `index` takes too. All other options configure the data."""
    parser = OptionParser(f"maskvlm {command}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help=f"output folder (default: {out}-DATA-SPLIT; with a whole stack of -c files: {out})",
    )
    parser.add_argument(
        "--from", dest="source", help=f"checkpoint file, Hugging Face folder or hub name (default: {DEFAULT})"
    )
    parser.add_argument(
        "--split",
        default="val",
        help="with a whole stack of -c files, otherwise split=: train, val or test; all: a prepared set that has no "
        "splits (default: %(default)s)",
    )
    parser.add_argument("--shard", type=int, default=SHARD, help="images per file (default: %(default)s)")
    parser.add_argument("--no-captions", dest="captions", action="store_false", help="embed images only")
    parser.add_argument(
        "--device", help="torch device, such as cpu (default: as where= says, or a GPU if there is one)"
    )
    return parser


def embed_data(options: argparse.Namespace, rest: list[str], allowed: list[str], folder: Path, process: Process) -> str:
    """Embed the data that `rest` configures (`-c FILE ... --data.key value`); returns a line that says what was done.

    Raises:
        UserError: the data are not images with captions, the split is streamed, or the folder holds other vectors.
    """
    options.source = options.source or default_model("used")
    check_least(1, {"shard": options.shard})
    # Parsed as `fit` would read them; nothing is built yet.
    settings = run_command(Parsed, ["fit", *rest], allowed).settings
    reader, chosen = built_source(settings), settings.data.init_args.source
    if not isinstance(reader, Source):
        todo = "Use a set of images with captions (-c conf/data/NAME.yaml)"
        raise UserError("data.source", f"{chosen.class_path} has no captions of images", todo)
    if options.split == "all":
        reader = undivided(reader)
        chosen.init_args.hold_out, options.split = 0, "train"
    pairs = reader.split(options.split)
    if hasattr(pairs, "stream"):
        todo = "Set data.source.streaming to false, or name another split"
        raise UserError("--split", f"{options.split} is streamed, so its images have no row numbers", todo)
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    device = options.device or device_of_process(str(settings.trainer.accelerator), local)
    model = PretrainedMaskVLM.from_pretrained(options.source, device=device, allow_import=allowed)
    tell_rest(reader, options.split)
    if options.split == "train" and settings.data.init_args.get("fraction", 1.0) != 1:
        print("note: embedding all images of split=train; data.fraction applies to training only", file=sys.stderr)
    tell_far(model, pairs)
    args = chosen.get("init_args")
    plain = {"class_path": chosen.class_path, "init_args": args.as_dict() if args else {}}
    # Only JSON types go into index.json: paths and other values become strings.
    facts = {"checkpoint": options.source, "split": options.split, "source": json.loads(json.dumps(plain, default=str))}
    with warn_afterwards(model, images=False):  # `tell_far` has looked at the images
        return embed(model, pairs, folder, facts, options.shard, options.captions, process)


def undivided(source: Source) -> Prepared:
    """A prepared set without splits of its own, read whole: no part of it is held out.

    Raises:
        UserError: the data set is of another kind.
    """
    there = read_manifest(source.root)["splits"] if isinstance(source, Prepared) else {}
    if not isinstance(source, Prepared) or list(there) != ["train"]:
        what = "all applies only to a prepared set that has no splits of its own"
        raise UserError("--split", what, f"Name one of {', '.join(there) or 'train, val, test'}")
    return Prepared(str(source.root))


def tell_rest(source: Source, split: str) -> None:
    """Print to stderr which images of a set without splits of its own are left out."""
    if isinstance(source, Prepared) and source.hold_out and split in ("train", "val"):
        other = "val" if split == "train" else "train"
        if list(read_manifest(source.root)["splits"]) == ["train"]:
            count = len(source.split(other))
            print(f"note: {count:,} images of {source.root} are in split={other}; split=all has all", file=sys.stderr)


def tell_far(model: PretrainedMaskVLM, pairs: Pairs) -> None:
    """Check a few images, evenly spread over a split, and warn on stderr if most are unlike the training data."""
    rows = sorted({number * len(pairs) // LOOKED_AT for number in range(LOOKED_AT)}) if len(pairs) else []
    images = []
    for row in rows:
        with suppress(BadImage):  # reported when it is embedded
            images.append(safe_open(pairs[row]["image"], pairs[row]["origin"]))
    far = sum(line is not None for line in model.far(images))
    if 2 * far > len(images):
        line = f"{far} of {len(images)} images checked are unlike those that the model was trained on"
        print(f"warning: {line}; take its vectors with care", file=sys.stderr, flush=True)


def device_of_process(accelerator: str, local: int) -> str:
    """The device of a process. accelerator: the trainer's. local: the process's local rank."""
    if torch.cuda.is_available() and accelerator != "cpu":
        # If there are more processes than GPUs, some share one.
        return f"cuda:{local % torch.cuda.device_count()}"
    # If there is no GPU, loading the model reports it.
    return "cuda" if accelerator in ("gpu", "cuda") else "cpu"


def process_of(environment: Mapping[str, str]) -> Process:
    """Rank of this process and number of processes, from torchrun's variables, else SLURM's; (0, 1) without either."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and world in environment:
            return int(environment[rank]), int(environment[world])
    return 0, 1
