"""`maskvlm publish from=CHECKPOINT to=owner/name`: writes what can be released of a run, checks it and uploads it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch.nn.functional import cosine_similarity

from maskvlm.checkpoint.hub_client import check_publishable, check_repository, upload
from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.config.arguments import OptionParser
from maskvlm.config.compose import data_root
from maskvlm.data.prepared.manifest import read_manifest
from maskvlm.data.raw import FACTS
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference.hf_config import MaskVLMConfig, processor_of
from maskvlm.inference.model_card import DRAWN, KnownSet, is_unknown, run_facts, shape_of_pretrained
from maskvlm.inference.pretrained import MESSAGE, MaskVLMOutput, PretrainedMaskVLM
from maskvlm.utils.errors import ExitCode, UserError

DTYPES = ("float16", "bfloat16", "float32")
"""The first is the default: as small as bfloat16, with three more bits of precision. Weights that it cannot hold
(above 65,504) are rejected with an error."""
LEAST_COSINE = 0.999
SCENES = 8


def main(arguments: list[str], allowed: Iterable[str] = ()) -> int:
    """Publish a model; `arguments` are options. `allowed`: packages that a task may come from.

    Raises:
        UserError: as `from_pretrained`, `compared` and `check_publishable`; the name is not valid on the hub (2),
            FOLDER exists (73).
    """
    parser = OptionParser("maskvlm publish", description="upload a model to the hub", allow_abbrev=False)
    parser.add_argument("--from", dest="source", required=True, help="checkpoint file or Hugging Face folder")
    parser.add_argument("--to", required=True, help="owner/name on the hub; created if it does not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"precision of the weights (default: {DTYPES[0]})"
    )
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument(
        "--dry-run", action="store_true", help="check with the hub and report what would be done; upload nothing"
    )
    parser.add_argument("--folder", type=Path, help="new folder in which to keep what is uploaded")
    options = parser.parse_args(arguments)
    # Cheap checks come before a large model is loaded.
    check_repository(options.to)
    folder = options.folder
    if folder is not None and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(folder, "already exists", "Name another one", ExitCode.CANNOT_CREATE)
    with TemporaryDirectory() as temporary:
        model_folder = folder or Path(temporary) / "model"
        for line in write_release(options.source, model_folder, options.to, options.dtype, allowed):
            print(line, flush=True)
        hub = check_publishable(options.to)
        state = "already exists; an upload adds a commit to it" if hub.there else "is free"
        print(f"{options.to}: {state}; the token is of {hub.user}", flush=True)
        if options.dry_run:
            print("nothing was uploaded (--dry-run)", flush=True)
        else:
            # None leaves the visibility of an existing repository unchanged.
            private = True if options.private else None
            print(f"uploaded: {upload(model_folder, options.to, MESSAGE, {'private': private})}", flush=True)
    return 0


def write_release(source: str, folder: Path, name: str, dtype: str, allowed: Iterable[str] = ()) -> Iterator[str]:
    """Write the Hugging Face format; yields lines on its files, its difference from the original and what is missing.

    Raises:
        UserError: as `from_pretrained` and `compared`; the precision cannot hold the weights (73).
    """
    # Run before the other is loaded, and not saved itself: a tokenizer's file records the settings of its last call.
    before = outputs(PretrainedMaskVLM.from_pretrained(source, allow_import=allowed))
    model = PretrainedMaskVLM.from_pretrained(source, dtype=dtype, allow_import=allowed)
    # The checkpoint's own weights are finite, or it would not load.
    if large := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
        what = f"{dtype} cannot hold numbers of {large[0]}"
        raise UserError(f"{source}: --dtype", what, "Give bfloat16 or float32", ExitCode.CANNOT_CREATE)
    config = cast(MaskVLMConfig, model.config)
    sets = known_sets(model.origin.history, run_facts(config).card)
    model.save_pretrained(folder, name=name, sets=sets)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    yield from (f"{file.stat().st_size:>13,}  {file.name}" for file in files)
    yield f"{sum(file.stat().st_size for file in files):>13,}  bytes in all, weights in {dtype}"
    yield compared(before, outputs(PretrainedMaskVLM.from_pretrained(folder, allow_import=allowed)), folder)
    yield from data_lines(model.origin.history, sets)
    yield from (f"missing: {line}" for line in missing(config))


# ---------------------------------------------------------------------- the same as the original


@torch.no_grad()
def outputs(model: PretrainedMaskVLM) -> MaskVLMOutput:
    """Outputs of a float32 model for drawn scenes and their captions, which are available everywhere."""
    rows = [*map(Scenes().split("val").__getitem__, range(SCENES))]
    inputs = processor_of(model.backbone.input_spec)(
        images=[row["image"] for row in rows], text=[str(row["captions"][0]) for row in rows],
        return_tensors="pt", padding=True, truncation=True,
    )  # fmt: skip
    output: MaskVLMOutput = model(**{key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")})
    return output


def compared(before: MaskVLMOutput, after: MaskVLMOutput, folder: Path) -> str:
    """How close the written weights' embeddings are to the original's: contrastive ones, if the model has them, and
    fused ones.

    Raises:
        UserError: a cosine is below LEAST_COSINE, or NaN (73).
    """
    cosines = []
    for name, kind in (("image_embeds", "images"), ("text_embeds", "texts"), ("fused", "pairs")):
        ours, theirs = getattr(before, name), getattr(after, name)
        if ours is None:
            continue
        # In double precision: float32 has only seven digits near 1.
        cosine = float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min())
        if not cosine >= LEAST_COSINE:  # also true for NaN
            what = f"vectors of {kind} have a cosine of {cosine:.4f} with the original's, less than {LEAST_COSINE}"
            raise UserError(folder, what, "Give another --dtype; float32 keeps every bit", ExitCode.CANNOT_CREATE)
        cosines.append(f"{kind} {cosine:.7f} (largest difference {float((ours - theirs).abs().max()):.1e})")
    return f"loaded again, {SCENES} drawn scenes: least cosine with the original's vectors: {', '.join(cosines)}"


# ---------------------------------------------------------------------- what is known of the data


def known_sets(history: Sequence[LineageEntry], card: Mapping[str, Any]) -> dict[str, KnownSet]:
    """Hash of a training set -> what is known of it, from the prepared set on this machine with that hash; for the last
    set, else from the folder that the run's card names."""
    manifests = []
    for file in sorted(data_root().glob("*/manifest.json")):
        # Damaged sets are not this command's concern.
        try:
            manifests.append(read_manifest(file.parent))
        except UserError:
            continue
    here = {split["sha256"][:16]: manifest for manifest in manifests for split in manifest["splits"].values()}
    sets = {
        entry.sha: KnownSet(manifest["title"], manifest["licence"])
        for entry in history
        if (manifest := here.get(entry.sha))
    }
    data = card.get("data")
    settings = data.get("settings") if isinstance(data, dict) else None
    root = settings.get("root") if isinstance(settings, dict) else None
    if history and isinstance(root, str) and history[-1].sha not in sets:
        facts = FACTS.get(name := Path(root).name)
        sets[history[-1].sha] = KnownSet(f"`{name}`", facts.licence if facts else "not known")
    return sets


def data_lines(history: Sequence[LineageEntry], sets: Mapping[str, KnownSet]) -> Iterator[str]:
    """A line for each training set, with its terms as far as they are known here."""
    for entry in {entry.sha: entry for entry in history}.values():
        drawn = KnownSet("drawn scenes", "Apache-2.0, as this project") if DRAWN.fullmatch(entry.source) else None
        known = drawn or sets.get(entry.sha, KnownSet("a set that the history does not name", "not known here"))
        yield f"trained on: {known.title} ({entry.source}); terms: {known.licence}; see docs/licences.md"


def missing(config: MaskVLMConfig) -> Iterator[str]:
    """What to fix before others get the model, as far as its files show."""
    _, versions, metrics = run_facts(config)
    if not metrics:
        yield "no metrics came with the checkpoint (metrics.json beside it): the card has no figures"
    elif metrics.get("step") not in (None, config.step):
        yield f"the card's figures are from step {metrics['step']}, these weights from step {config.step}"
    for key in ("command", "commit"):
        if not versions.get(key):
            yield f"the {key} that made it is unknown (card.json beside the checkpoint would say)"
    if str(versions.get("commit")).endswith("+"):
        yield f"the run's code differed from its commit ({versions['commit']}): that code is not available to others"
    if is_unknown(config.lineage or []):
        yield "part of its training data is unknown, so the terms under which it may be shared cannot be determined"
    if name := shape_of_pretrained(config):
        yield f"what the encoders started from: their shape is that of {name}, whose weights have their licence"
