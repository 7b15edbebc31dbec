"""The Hugging Face format: a folder with `config.json`, `model.safetensors`, tokenizer and image-processing files, no
pickle.

Reading it gives what a checkpoint file holds, so that both can be used alike and one schema holds for both.
`checksums.json` covers every file that is read: a damaged number in a tensor or setting is still a number.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from maskvlm.checkpoint.integrity import sha256_of
from maskvlm.checkpoint.tokenizer_files import file_text, read_tokenizer
from maskvlm.checkpoint.weights import check_file, is_safetensors
from maskvlm.config.plain_schema import Entries, Listed, OneOf, Record, Text, Tree, Whole, maybe
from maskvlm.data.files import load_json
from maskvlm.data.text import tokenizer_json
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import check_inside

CONFIG, WEIGHTS, LINEAGE, SUMS = "config.json", "model.safetensors", "lineage.safetensors", "checksums.json"
TOKENIZER, PROCESSOR = "tokenizer.json", "processor_config.json"
KNOWN = "known_images.safetensors"
FOR_PEOPLE = (LINEAGE, PROCESSOR, KNOWN)
"""Files that a model works without."""
READ = (CONFIG, WEIGHTS, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", *FOR_PEOPLE)
"""Files whose content matters. The model card is not among them: people edit it."""
AGAIN = "Get the folder again"
MODEL_TYPE = "maskvlm"
CONFIG_SCHEMA = Record(
    {"model_type": OneOf((MODEL_TYPE,)), "backbone": Tree()},
    {
        "task": maybe(Tree()), "labels": maybe(Listed(Text(), 1_000_000)), "lineage": maybe(Listed(Tree(), 1000)),
        "evaluation": maybe(Tree()), "step": Whole(),
    },
)  # fmt: skip
"""What is read from `config.json`; further keys that transformers writes are ignored."""
SUM = Entries(Text(64, "[0-9a-f]{64}"))


def read_folder(path: Path) -> dict[str, Any]:
    """The content of a folder, under the keys that `checkpoint.load` returns.

    Raises:
        UserError: it lacks a file that a model needs (66); it is of another kind of model, or one of its files is
            damaged or does not match `checksums.json` (65); one is a link out of the folder, or a pickle (77); one of
            the JSON files cannot be read (74).
    """
    check_links(path)
    config = read_model_config(path)
    for name in (WEIGHTS, TOKENIZER):
        if not (path / name).is_file():
            raise UserError(path, f"holds no {name}", "Get the whole folder", ExitCode.MISSING_INPUT)
    lineage_file, known_file = path / LINEAGE, path / KNOWN
    # A truncated file is reported as such, before its checksum is found wrong.
    for file in (path / WEIGHTS, *(file for file in (lineage_file, known_file) if file.is_file())):
        check_file(file)
        if not is_safetensors(file):  # intact, but of another kind
            raise UserError(file, "is not a safetensors file", AGAIN, ExitCode.BAD_DATA)
    check_sums(path)
    # Hashes of image ids are in a file beside the lineage, by the entry's number.
    ids = load_file(lineage_file) if lineage_file.is_file() else {}
    lineage = config.get("lineage") or []
    # Under the keys of a checkpoint file, so that one schema holds for both.
    content = {
        "state_dict": load_file(path / WEIGHTS),
        "model": _yaml({"model": {"random_init": True, "backbone": config["backbone"]}}),
        "lineage": [
            entry | {"ids": ids.get(str(number))} for number, entry in enumerate(lineage) if type(entry) is dict
        ],
        "global_step": config.get("step", 0),
        "evaluation": config.get("evaluation"),
        "known_images": load_file(known_file).get("features") if known_file.is_file() else None,
    }
    # Entries that are not mappings were left out above.
    if len(content["lineage"]) < len(lineage):
        raise UserError(path / CONFIG, "an entry of its lineage is not a mapping", AGAIN, ExitCode.BAD_DATA)
    if config.get("task"):
        content["task"] = _yaml(config["task"])
    if config.get("labels") is not None:
        content["labels"] = config["labels"]
    tokenizer = read_tokenizer(path)
    assert tokenizer is not None  # its file is there
    content["tokenizer"] = tokenizer_json(tokenizer)
    return content


def check_links(path: Path) -> None:
    """Raise UserError (77) if a file that is read is a symbolic link out of the folder."""
    for name in (*READ, SUMS):
        if (path / name).is_symlink():
            check_inside(path / name)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False)


def write_sums(path: Path) -> None:
    """Write `checksums.json`, with the checksum of every other file in the folder."""
    sums = {file.name: sha256_of(file) for file in sorted(path.iterdir()) if file.is_file() and file.name != SUMS}
    (path / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_sums(path: Path) -> None:
    """Compare every file that is read with `checksums.json`; a folder without it passes.

    Raises:
        UserError: a file was changed, is missing or was added, or `checksums.json` is damaged (65), is a link out of
            the folder (77) or cannot be read (74). Files in FOR_PEOPLE may be missing.
    """
    file = path / SUMS
    if not file.is_file():
        return
    # The list itself is untrusted, too.
    sums = load_json(file_text(file).encode(), file)
    if not SUM.fits(sums):
        raise UserError(file, f"expected {SUM.says()}", AGAIN, ExitCode.BAD_DATA)
    every = sums.keys() - {WEIGHTS, LINEAGE}  # the first versions listed only these two
    for name in READ:
        # `lexists`, as a broken link counts as there, too.
        there = os.path.lexists(path / name)
        if name not in sums:
            if there and every:
                raise UserError(path / name, f"is not listed in {SUMS}", AGAIN, ExitCode.BAD_DATA)
        elif not (path / name).is_file():
            # These may be left out when a folder is copied.
            if name in FOR_PEOPLE:
                continue
            raise UserError(path / name, f"is missing, but {SUMS} lists it", AGAIN, ExitCode.BAD_DATA)
        elif sha256_of(path / name) != sums[name]:
            todo = f"{AGAIN}; if you changed it yourself, remove {SUMS}"
            raise UserError(path / name, f"damaged or changed: its hash differs from {SUMS}", todo, ExitCode.BAD_DATA)


def read_model_config(path: Path) -> dict[str, Any]:
    """What is read from `config.json`, as plain data; raises as `read_folder`."""
    file = path / CONFIG
    if not file.is_file():
        checkpoints = sorted(each.name for each in path.glob("*.ckpt"))
        todo = f"Name a file in it, such as {path / checkpoints[0]}" if checkpoints else "Check the path"
        raise UserError(path, f"is a folder without {CONFIG}", todo, ExitCode.MISSING_INPUT)
    config = load_json(file_text(file).encode(), file)
    if not isinstance(config, dict):
        raise UserError(file, "expected a mapping", AGAIN, ExitCode.BAD_DATA)
    return CONFIG_SCHEMA.read(
        {key: config[key] for key in (*CONFIG_SCHEMA.needed, *CONFIG_SCHEMA.also) if key in config}, str(file), AGAIN
    )
