"""`maskvlm embed`: the vectors of a data set's images and captions, as Parquet files, one per shard.

    maskvlm embed --from checkpoints/first/best.ckpt --out vectors --split val -c conf/base.yaml -c ...

Files are written under a temporary name and renamed, so existing files are complete; running the command again makes
the missing shards. Under torchrun or srun, process r of W takes every W-th shard. Processes do not communicate: there
is no process group, none waits for another, and the next run may use a different number of them.

Shapes: B images, C captions, E contrast width, N rows of all shards.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskvlm.checkpoint.integrity import first_line
from maskvlm.data.batch import Pairs
from maskvlm.data.caption_text import clean_caption
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.text import tokenizer_hash
from maskvlm.data.transforms import eval_transform
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.objectives.loaded_model import in_batches
from maskvlm.reporting.meters import duration, number
from maskvlm.training.failure import process_rank
from maskvlm.utils.cores import cores
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.status_bar import StatusBar
from maskvlm.utils.whole_files import whole_file
from maskvlm.utils.write_errors import cannot_write

FACTS, BAD = "vectors.json", "bad_samples.json"
SHARD = 4096  # images
SAME = {"weights": "another checkpoint", "data": "other data", "split": "another split"}
SAME |= {"shard": "shards of another size", "captions": "or without captions"}
"""What a second run must have in common with the first, and how an error names the difference."""
Facts = dict[str, Any]
Process = tuple[int, int]
"""This process's number, and the number of processes."""


def identity(model: PretrainedMaskVLM) -> str:
    """sha256 of what a vector depends on: tensors, image size, normalisation, tokenizer. A checkpoint and the hub
    folder made from it count as the same model; a copy in another precision does not."""
    spec = model.backbone.input_spec
    words = None if spec.tokenizer is None else tokenizer_hash(spec.tokenizer)
    facts = (spec.image_size, [round(float(part), 6) for part in (*spec.mean, *spec.std)], spec.text_length, words)
    digest = hashlib.sha256(repr(facts).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Viewed as bytes, since numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------- embedding

TEXTS = dict.fromkeys(("id", "origin", "path"), pa.string())
IMAGE_COLUMNS = pa.schema({"row": pa.int64(), **TEXTS, "captions": pa.list_(pa.string())})
"""Columns of an image besides its vector: row in the split, id, origin, file (null without one), captions."""
CAPTION = pa.schema({"row": pa.int64(), "id": pa.string(), "caption": pa.string()})
"""Columns of a caption besides its vector; row and id are those of its image."""


class RowsToEmbed(Dataset[dict[str, Any]]):
    """The IMAGE_COLUMNS of a row, plus `image` as the model's input, or `bad`: (reason, message)."""

    def __init__(self, pairs: Pairs, model: PretrainedMaskVLM) -> None:
        self.pairs, self.transform = pairs, eval_transform(model.backbone.input_spec)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.pairs[index]
        captions = [text for text, _ in map(clean_caption, row["captions"]) if text]
        path = os.path.abspath(row["image"]) if isinstance(row["image"], str) else None
        record = {"row": index, "id": row["image_id"], "origin": row["origin"], "path": path, "captions": captions}
        try:
            return record | {"image": self.transform(safe_open(row["image"], row["origin"]))}
        except BadImage as error:
            return record | {"bad": (error.reason, str(error))}


@torch.no_grad()
def embed(
    model: PretrainedMaskVLM,
    pairs: Pairs,
    folder: Path,
    details: Facts,
    shard: int = SHARD,
    captions: bool = True,
    process: Process = (0, 1),
) -> str:
    """Write this process's missing shards of a split's vectors; returns a one-line summary of what now exists.

    `details` goes into `vectors.json`: `split`, and anything else to record; `shard` is the number of images per file.

    Raises:
        UserError: the folder has other vectors, or cannot be written (73, 74); the checkpoint has no contrast head.
    """
    projection = model.head("projection", "embed")
    width, count = projection.image.out_features, math.ceil(len(pairs) / shard)
    facts = {"weights": identity(model), "data": pairs.fingerprint, "pictures": len(pairs), "shard": shard}
    claim_vectors(folder, {**facts, "width": width, "captions": captions, "shards": count, **details})
    # This process's shards, without those that already exist.
    mine = [part for part in range(count)[process[0] :: process[1]] if not file_of(folder, part, count).exists()]
    ranges = [range(part * shard, min((part + 1) * shard, len(pairs))) for part in mine]
    batches = [[list(rows) for rows in in_batches(whole, model.batch_size)] for whole in ranges]
    # One loader for all shards, so that workers read ahead across shards. On a CPU, the model needs the cores.
    loader = DataLoader(
        RowsToEmbed(pairs, model),
        batch_sampler=[rows for part in batches for rows in part],
        num_workers=min(12, max(1, cores() // process[1])) if model.device.type == "cuda" else 0,
        collate_fn=list,
    )
    line, reading = EmbedProgress(sum(map(len, ranges)), process), iter(loader)
    for part, parts in zip(mine, batches, strict=True):
        # The empty first part is for a shard without readable images.
        good, bad, vectors = [], [], [torch.zeros(0, width)]
        for _ in parts:
            rows = next(reading)
            images = [row.pop("image") for row in rows if "image" in row]  # pixels are not kept
            if images:
                image_BCHW = torch.stack(images).to(next(model.backbone.parameters()))
                vectors.append(projection.embed_image(model.backbone.image(image_BCHW)).cpu())
            good += [row for row in rows if "bad" not in row]
            bad += [row["bad"] for row in rows if "bad" in row]
            line.advance(len(rows))
        if captions:  # first: a shard counts as done once its images exist
            write_file(file_of(folder, part, count, "captions"), captions_table(model, good))
        # Failures are stored in the shard itself, where the process that finishes last finds them.
        table = table_of(good, IMAGE_COLUMNS, torch.cat(vectors))
        write_file(file_of(folder, part, count), table.replace_schema_metadata({"bad": json.dumps(bad)}))
    line.bar.close()
    return close(folder, pairs, count)


def captions_table(model: PretrainedMaskVLM, images: list[dict[str, Any]]) -> pa.Table:
    """Rows of CAPTION with their vectors."""
    rows = [{**row, "caption": text} for row in images for text in row["captions"]]
    return table_of(rows, CAPTION, model.encode_text([row["caption"] for row in rows]).cpu())


def table_of(rows: list[dict[str, Any]], kinds: pa.Schema, vector_XE: Tensor) -> pa.Table:
    """Rows with this schema and a column of their vectors, [N, E], float32."""
    # Arrow stores fixed-size lists as one flat array: (N, E) -> (N * E,)
    flat = pa.array(vector_XE.numpy().reshape(-1), pa.float32())
    vectors = pa.FixedSizeListArray.from_arrays(flat, vector_XE.shape[1])
    return pa.Table.from_pylist(rows, kinds).append_column("vector", vectors)


class EmbedProgress:
    """Images per second and time left: a bar on a terminal, otherwise a line every half minute."""

    def __init__(self, total: int, process: Process) -> None:
        self.total, self.done, self.started, self.last_report = total, 0, time.monotonic(), time.monotonic()
        self.name = "embedding" + (f", process {process[0]} of {process[1]}" if process[1] > 1 else "")
        self.bar = StatusBar(self.name, total, Console(), process[0] == 0)

    def advance(self, images: int) -> None:
        """Record that `images` more images are done."""
        self.done, now = self.done + images, time.monotonic()
        if now - self.last_report < (0.2 if self.bar.drawn else 30.0) and self.done < self.total:
            return
        self.last_report, speed = now, self.done / max(now - self.started, 1e-9)
        time_left = duration((self.total - self.done) / speed)
        status = f"{self.done}/{self.total}  {number(speed)} images/s  {time_left} left"
        self.bar.show(self.done, status, now=True)
        if not self.bar.drawn:
            print(f"{self.name}  {status}", flush=True)


def file_of(folder: Path, part: int, count: int, kind: str = "pictures") -> Path:
    """Path of shard `part` of `count`; kind: "pictures" or "captions"."""
    return folder / f"{kind}-{part:05}-of-{count:05}.parquet"


def claim_vectors(folder: Path, facts: Facts) -> None:
    """Write `vectors.json`, or compare an existing one with these facts. Raises UserError if it describes other
    vectors."""
    if (folder / FACTS).exists():
        there = facts_of(folder)
        for name, other in SAME.items():
            if there.get(name) != facts[name]:
                what = f"holds vectors of {other} ({name} {str(there.get(name))[:16]}, not {str(facts[name])[:16]})"
                raise UserError(folder, what, "Name another folder (--out), or delete this one", ExitCode.CANNOT_CREATE)
        return
    write_file(folder / FACTS, facts)


def facts_of(folder: Path) -> Facts:
    """Content of `vectors.json`. Raises UserError: it does not exist (66), or is damaged (65)."""
    path = folder / FACTS
    if not path.is_file():
        raise UserError(folder, f"holds no {FACTS}", "Make it with `maskvlm embed`", ExitCode.MISSING_INPUT)
    try:
        facts: Facts = json.loads(path.read_text(encoding="utf-8"))
        return facts | {name: int(facts[name]) for name in ("pictures", "shard", "width", "shards")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(path, f"damaged ({error!r})", "Embed into another folder", ExitCode.BAD_DATA) from error


def shards_there(folder: Path, count: int) -> list[Path]:
    """Paths of the image shards that already exist, of `count` in total."""
    paths = [file_of(folder, part, count) for part in range(count)]
    return [path for path in paths if path.exists()]


def rows_not_embedded(shards: Iterable[Path]) -> dict[str, list[str]]:
    """Rows that could not be embedded in these shards: reason -> messages."""
    listed: dict[str, list[str]] = {}
    for path in shards:
        for reason, message in json.loads((pq.read_schema(path).metadata or {}).get(b"bad", b"[]")):
            listed.setdefault(reason, []).append(message)
    return listed


def close(folder: Path, pairs: Pairs, count: int) -> str:
    """List in `bad_samples.json` what the existing shards leave out, whichever process wrote them; returns a summary
    line."""
    left_out = {reason: list(places) for reason, places in getattr(pairs, "skipped", {}).items() if places}
    there = shards_there(folder, count)
    while True:
        listed = rows_not_embedded(there)
        if listed or left_out:
            counts = {reason: len(messages) for reason, messages in listed.items()}
            content = {"samples": len(pairs), "problems": counts, "examples": listed, "left_out": left_out}
            write_file(folder / BAD, content)
        # The last writer must have seen all shards: check again for shards that were written in the meantime.
        before, there = there, shards_there(folder, count)
        if there == before:
            break
    reasons = [f"{reason}: {len(places)}" for reason, places in (*listed.items(), *left_out.items())]
    line = f"{folder}: {len(there)} of {count} shards, {len(pairs)} images in all"
    line += f"; left out or repaired ({', '.join(reasons)}): listed in {folder / BAD}" if reasons else ""
    return line + (
        "; the rest belong to other processes; if not, run the same command again" if len(there) < count else ""
    )


def write_file(path: Path, content: pa.Table | Facts) -> None:
    """Write a Parquet or JSON file atomically. Raises UserError (73, or 74 for a full disk)."""
    own = f".{process_rank()}" if isinstance(content, dict) else ""  # all processes write the same JSON files
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, own) as temporary:
            if isinstance(content, dict):
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                # File names that are not UTF-8 are escaped as in JSON.
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            else:
                # Vectors hardly ever repeat, so a dictionary would save nothing.
                pq.write_table(content, temporary, use_dictionary=False)
    except OSError as error:
        message = f"cannot be written ({first_line(error)})"
        other = UserError(path, message, "Choose another folder", ExitCode.CANNOT_CREATE)
        raise (cannot_write(error, path, "complete files are kept") or other) from error
