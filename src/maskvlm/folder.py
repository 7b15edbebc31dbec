"""The hub's format: a folder with `config.json`, `model.safetensors`, tokenizer and image-processing files, no pickle.

Reading gives what a checkpoint file holds, so that whatever takes the one takes the other.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from maskvlm.data.text import tokenizer_json
from maskvlm.errors import ExitCode, UserError
from maskvlm.verify import first_line, sha256_of
from maskvlm.weights import check_file

CONFIG, WEIGHTS, SEEN, SUMS = "config.json", "model.safetensors", "lineage.safetensors", "checksums.json"


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, by the keys that `checkpoint.load` gives.

    Raises:
        UserError: it holds no model of this project (66), or a file of it is damaged (65).
    """
    config = read_config(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise UserError(path, f"holds no {WEIGHTS}", "Get the whole folder", ExitCode.MISSING_INPUT)
    seen = path / SEEN
    for file in (weights, *([seen] if seen.is_file() else [])):
        check_file(file)
    check_sums(path)
    ids = load_file(seen) if seen.is_file() else {}
    lineage = [{**told, "ids": ids.get(str(number))} for number, told in enumerate(config.get("lineage") or [])]
    content = {
        "state_dict": load_file(weights),
        "model": yaml.safe_dump({"model": {"random_init": True, "backbone": config["backbone"]}}, sort_keys=False),
        "lineage": lineage,
        "global_step": config.get("step", 0),
        "evaluation": config.get("evaluation"),
    }
    if config.get("task"):
        content["task"] = yaml.safe_dump(config["task"], sort_keys=False)
    if config.get("labels") is not None:
        content["labels"] = config["labels"]
    if not (path / "tokenizer.json").is_file():
        raise UserError(path, "holds no tokenizer.json", "Get the whole folder", ExitCode.MISSING_INPUT)
    content["tokenizer"] = read_tokenizer(path)
    return content


def write_sums(path: Path) -> None:
    """`checksums.json`: safetensors files have none inside, and a damaged number is still a number."""
    sums = {name: sha256_of(path / name) for name in (WEIGHTS, SEEN) if (path / name).is_file()}
    (path / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_sums(path: Path) -> None:
    """Raises UserError for a file that is not the one that was written (65); a folder without sums passes."""
    file = path / SUMS
    if not file.is_file():
        return
    try:
        sums = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        what = f"cannot be read ({first_line(error)})"
        raise UserError(file, what, "Get the file again", ExitCode.BAD_DATA) from error
    for name in (WEIGHTS, SEEN):
        if name in sums and (path / name).is_file() and sha256_of(path / name) != sums[name]:
            what = f"damaged: not the file that {SUMS} knows"
            raise UserError(path / name, what, "Get the folder again", ExitCode.BAD_DATA)


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` as plain data; raises as `read`."""
    file = path / CONFIG
    if not file.is_file():
        found = sorted(each.name for each in path.glob("*.ckpt"))
        todo = f"Name a file in it, such as {path / found[0]}" if found else "Check the path"
        raise UserError(path, f"is a folder without {CONFIG}", todo, ExitCode.MISSING_INPUT)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        what = f"cannot be read ({first_line(error)})"
        raise UserError(file, what, "Get the file again", ExitCode.BAD_DATA) from error
    if kind != "maskvlm" or not isinstance(config.get("backbone"), dict):
        what = "tells no backbone" if kind == "maskvlm" else f"is of a model of type {kind}, not maskvlm"
        raise UserError(file, what, "Name a folder that this project wrote", ExitCode.BAD_DATA)
    return config


def read_tokenizer(path: Path) -> str:
    """As a checkpoint stores it."""
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries underneath have their own
        what = f"the tokenizer cannot be read ({first_line(error)})"
        raise UserError(path, what, "Get the folder again", ExitCode.BAD_DATA) from error
    return tokenizer_json(tokenizer)
