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
from maskvlm.verify import first_line
from maskvlm.weights import check_file

CONFIG, WEIGHTS, SEEN = "config.json", "model.safetensors", "lineage.safetensors"


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, by the keys that `checkpoint.load` gives.

    Raises:
        UserError: it holds no model of this project (66), or a file of it is damaged (65).
    """
    config = read_config(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise UserError(path, f"holds no {WEIGHTS}", "Get the whole folder", ExitCode.MISSING_INPUT)
    check_file(weights)
    seen = path / SEEN
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
    if (path / "tokenizer.json").is_file():
        content["tokenizer"] = read_tokenizer(path)
    return content


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
        what = f"is of a model of type {kind}, not maskvlm"
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
