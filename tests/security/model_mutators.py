"""Random edits of what a checkpoint or a folder of the hub's format holds: its structure, its values, its bytes.

Pure functions of a `random.Random`: short tests and the long fuzz share them.
"""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from mutators import ODD_TEXTS, any_bytes, edited

NAMES = ("x", "class_path", "init_args", "_target_", "start", "pretrained_cfg", "auto_map", "weights", "")
PLAIN: tuple[Any, ...] = (None, True, 0, -1, 10**12, 2**63, -(2**70), 0.5, -1e300, math.nan, math.inf, "9" * 5000)
TEXTS = ("hf-hub:x/y", "http://127.0.0.1:9/x", "tasks.vqa.task.Vqa", "os.system", "${oc.env:HOME}", "1e9", *ODD_TEXTS)
TENSORS = (
    torch.zeros(0),
    torch.full((2, 2), math.nan),
    torch.zeros(1).expand(10**9),
    torch.empty(10**6, 10**6, device="meta"),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(3, 3).to_sparse(),
    torch.zeros(2, dtype=torch.float16),
)


def odd_values(mark: str) -> list[Any]:
    """What does not belong there; some of it makes a careless reader run `touch MARK`."""
    evil = {"class_path": "torch.utils.collect_env.run", "init_args": {"command": f"touch {mark}"}}
    return [*PLAIN, *TEXTS, [], {}, [[[[[]]]]], [0] * 300, {"a": 1}, evil, [evil], {"x": evil}]


def checkpoint(content: dict[str, Any], rng: random.Random, mark: str) -> dict[str, Any]:
    """The content of a checkpoint, edited: the whole, its recipe, its task, its tokenizer, its tensors."""
    mutant, odd = dict(content), odd_values(mark)
    part = rng.choice(["model", "model", "task", "tokenizer", "state_dict", "whole"])
    if part == "whole":
        kept = mutant.pop("state_dict")
        mutant = edited(mutant, rng, [*odd, *TENSORS], NAMES)
        return {**mutant, "state_dict": kept} if isinstance(mutant, dict) else {"state_dict": mutant}
    if part == "state_dict":
        state = dict(mutant[part])
        name = rng.choice(sorted(state))
        state[rng.choice([name, name, "x", 5, name * 40])] = rng.choice([state.pop(name), *odd, *TENSORS])
        return {**mutant, part: state}
    read, write = (json.loads, json.dumps) if part == "tokenizer" else (yaml.safe_load, yaml.safe_dump)
    try:
        mutant[part] = write(edited(read(mutant[part]), rng, odd, NAMES))  # type: ignore[operator]
    except (yaml.YAMLError, UnicodeError):  # half a character
        mutant[part] = str(odd)
    return mutant


raw = any_bytes


def folder(whole: Path, mutant: Path, rng: random.Random, mark: str) -> str:
    """A copy of a folder of the hub's format with one file edited; returns which. The sums stay or go."""
    shutil.copytree(whole, mutant)
    names = sorted(path.name for path in mutant.iterdir())
    name = rng.choice([*names, "config.json", "tokenizer.json", "tokenizer_config.json"])
    file = mutant / name
    how = rng.choice(["structure", "structure", "bytes", "gone", "swapped"])
    if how == "structure" and name.endswith(".json"):
        file.write_text(json.dumps(edited(json.loads(file.read_text()), rng, odd_values(mark), NAMES)))
    elif how == "gone":
        file.unlink()
    elif how == "swapped":
        file.write_bytes((mutant / rng.choice(names)).read_bytes())
    else:
        file.write_bytes(any_bytes(file.read_bytes(), rng))
    if rng.random() < 0.7:
        (mutant / "checksums.json").unlink(missing_ok=True)
    return name
