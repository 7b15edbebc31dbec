"""Random edits of what a checkpoint or a folder of the hub's format holds: its structure, its values, its bytes.

Pure functions of a `random.Random`: the property tests and the long fuzz share them.
"""

import copy
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

EVIL: dict[str, Any] = {
    "class_path": "torch.utils.collect_env.run",
    "init_args": {"command": "touch MARK"},
}
"""What a careless reader runs; `MARK` is replaced by the caller."""


def values(rng: random.Random, mark: str) -> Any:
    """Something that does not belong there."""
    evil = json.loads(json.dumps(EVIL).replace("MARK", mark))
    plain = [None, True, False, 0, 1, -1, 7, 10**12, 2**63, -(2**70), 0.5, -1e300, math.nan, math.inf, "", "x", "bert"]
    texts = ["vit_tiny_patch16_224", "hf-hub:x/y", "../../x", "/etc/passwd", "\x1b[31mred", "\ud800", "a" * 5000, "1e9"]
    texts += [
        "http://127.0.0.1:9/x",
        "maskvlm.model.maskvlm.MaskVLM",
        "tasks.vqa.task.Vqa",
        "os.system",
        "${oc.env:HOME}",
    ]
    nested = [[], {}, [1, 2], {"a": 1}, [[[[[]]]]], [0] * 300, {"class_path": "os.system"}, evil, [evil], {"x": evil}]
    return rng.choice([*plain, *texts, *nested])


def tensors(rng: random.Random) -> Any:
    """A tensor that is none of a model's."""
    makers: list[Callable[[], Any]] = [
        lambda: torch.zeros(0), lambda: torch.zeros(3), lambda: torch.full((2, 2), math.nan), lambda: torch.tensor(7),
        lambda: torch.zeros(1).expand(10**9), lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.zeros(2, dtype=torch.complex64), lambda: torch.zeros(4, 4).t(), lambda: torch.zeros(2).bool(),
        lambda: torch.zeros(3, 3).to_sparse(), lambda: torch.zeros(2, dtype=torch.float16),
    ]  # fmt: skip
    return rng.choice(makers)()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in nested dicts and lists."""
    paths = [path] if path else []
    if isinstance(value, dict):
        for key, part in value.items():
            paths += places(part, (*path, key))
    elif isinstance(value, list):
        for number, part in enumerate(value[:20]):
            paths += places(part, (*path, number))
    return paths


def edited(value: Any, rng: random.Random, mark: str, tensor: bool = False) -> Any:
    """A copy with one to three edits: a value replaced, removed, doubled, renamed, added, or moved elsewhere."""
    mutant = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        spots = places(mutant)
        if not spots:
            return mutant
        path = rng.choice(spots)
        holder = mutant
        for key in path[:-1]:
            holder = holder[key]
        key, how = path[-1], rng.choice(["value", "value", "value", "drop", "rename", "add", "move", "near"])
        new = tensors(rng) if tensor and rng.random() < 0.3 else values(rng, mark)
        if how == "value":
            holder[key] = new
        elif how == "drop":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[rng.choice(["x", "class_path", "init_args", f"{key}_", "_target_", "start", 5])] = holder.pop(key)
        elif how == "add" and isinstance(holder, dict):
            holder[rng.choice(["x", "class_path", "pretrained_cfg", "auto_map", "checkpoint_path", "weights"])] = new
        elif how == "add":
            holder.append(new)
        elif how == "move":
            other = rng.choice(spots)
            source = mutant
            try:
                for step in other:
                    source = source[step]
                holder[key] = copy.deepcopy(source)
            except (KeyError, IndexError, TypeError):
                continue
        else:
            holder[key] = near(holder[key], rng)
    return mutant


def near(value: Any, rng: random.Random) -> Any:
    """The same type, another value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 2, 0, value * 10**6])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e6, math.nan, 0.0])
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(["", "x", "\n", ":", "-", "9"]) + value[place + 1 :]
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        return rng.choice([value.half(), value.flatten(), value[None], value * math.inf, value.to("meta")])
    return value


def checkpoint(content: dict[str, Any], rng: random.Random, mark: str) -> dict[str, Any]:
    """The content of a checkpoint, edited: the whole, its recipe, its task, its tokenizer or its history."""
    mutant = dict(content)
    part = rng.choice(["model", "model", "task", "tokenizer", "lineage", "whole", "state", "rest"])
    if part in ("model", "task"):
        recipe = edited(yaml.safe_load(mutant[part]), rng, mark)
        try:
            mutant[part] = yaml.safe_dump(recipe)
        except (yaml.YAMLError, UnicodeError):
            mutant[part] = str(recipe)
        if rng.random() < 0.2:
            mutant[part] = text(mutant[part], rng)
    elif part == "tokenizer":
        tokenizer = edited(json.loads(mutant[part]), rng, mark)
        mutant[part] = text(json.dumps(tokenizer), rng) if rng.random() < 0.3 else json.dumps(tokenizer)
    elif part == "lineage":
        mutant[part] = edited(mutant[part], rng, mark, tensor=True)
    elif part == "state":
        state = dict(mutant["state_dict"])
        name = rng.choice(sorted(state))
        how = rng.choice(["drop", "tensor", "near", "value", "rename"])
        old = state.pop(name)
        if how != "drop":
            label = rng.choice(["x", 5, name * 40, f"{name}.x"]) if how == "rename" else name
            state[label] = {"tensor": tensors(rng), "near": near(old, rng), "value": values(rng, mark)}.get(how, old)
        mutant["state_dict"] = state
    else:
        keep = {"state_dict"} if part == "rest" else set()
        shallow = edited({key: value for key, value in mutant.items() if key not in keep}, rng, mark, tensor=True)
        mutant = shallow | {key: mutant[key] for key in keep}
    return mutant


def text(original: str, rng: random.Random) -> str:
    """A few characters lost, doubled, exchanged or put in."""
    mutant = original
    for _ in range(rng.randint(1, 4)):
        if not mutant:
            return mutant
        place, size = rng.randrange(len(mutant)), rng.choice([1, 1, 2, 20])
        piece = mutant[place : place + size]
        put = rng.choice(
            ["", piece * 2, piece[::-1], rng.choice(["{", "}", "[", ":", '"', "&a", "*a", "!!x", "\t", "9" * 50])]
        )
        mutant = mutant[:place] + put + mutant[place + size :]
    return mutant


def raw(original: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, or filled with zeros."""
    mutant = bytearray(original)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not mutant:
            break
        place, how = rng.randrange(len(mutant)), rng.choice(["flip", "flip", "cut", "drop", "double", "zero", "put"])
        size = rng.choice([1, 4, 64, 1024])
        if how == "flip":
            mutant[place] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del mutant[place:]
        elif how == "drop":
            del mutant[place : place + size]
        elif how == "double":
            mutant[place:place] = mutant[place : place + size]
        elif how == "zero":
            mutant[place : place + size] = bytes(len(mutant[place : place + size]))
        else:
            mutant[place:place] = rng.randbytes(size)
    return bytes(mutant)


def folder(whole: Path, mutant: Path, rng: random.Random, mark: str) -> str:
    """A copy of a folder of the hub's format with one file edited; returns which. Sums stay, go, or are made anew."""
    shutil.copytree(whole, mutant)
    names = sorted(path.name for path in mutant.iterdir())
    name = rng.choice([*names, "config.json", "tokenizer.json", "tokenizer_config.json"])
    file = mutant / name
    how = rng.choice(["structure", "structure", "text", "bytes", "gone", "swapped"])
    if how == "structure" and name.endswith(".json"):
        document = edited(json.loads(file.read_text()), rng, mark)
        file.write_text(json.dumps(document), errors="surrogatepass")
    elif how == "text" and not name.endswith(".safetensors"):
        file.write_text(text(file.read_text(), rng), errors="surrogatepass")
    elif how == "gone":
        file.unlink()
    elif how == "swapped":
        file.write_bytes((mutant / rng.choice(names)).read_bytes())
    else:
        file.write_bytes(raw(file.read_bytes(), rng))
    if rng.random() < 0.7:
        (mutant / "checksums.json").unlink(missing_ok=True)
    return name
