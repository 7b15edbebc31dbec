"""`maskvlm index` and `search`: find images in a large collection by a text or an image.

An index is a folder: `index.json` describes it, `index.faiss` has the vectors, `ids.parquet` the images that they
belong to. It is searched by inner product of unit vectors, which is the cosine. It contains no pickle, and `index.json`
is checked against a closed schema and has the files' hashes; but FAISS's C++ reader trusts its file: do not load an
index from an untrusted source.

Shapes: N vectors, Q queries, K results, E contrast width.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from maskvlm.checkpoint.integrity import sha256_of
from maskvlm.checkpoint.tokenizer_files import file_text
from maskvlm.config.old_names import current
from maskvlm.config.plain_schema import Entries, OneOf, Record, Text, Tree, Whole, describe_value, maybe
from maskvlm.data.batch import Pairs, Source
from maskvlm.data.files import load_json
from maskvlm.data.inputs import ImageInput, as_list, check_whole, is_image
from maskvlm.data.prepared.manifest import MANIFEST
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference.embeddings import by_match, encode, features_of, log_odds, pair_up
from maskvlm.inference.faiss_index import RECALL, Array, build_index, faiss_module, kinds, turn, write_index
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.rebuild import read_arguments
from maskvlm.inference.vector_files import IMAGE_COLUMNS, Facts, facts_of, file_of, identity, write_file
from maskvlm.utils.errors import ExitCode, UserError

ABOUT, VECTORS, IDS = "index.json", "index.faiss", "ids.parquet"
WORLD = "maskvlm.data.scenes.source.Scenes"
INDEX_SCHEMA = Record({
    "sha256": Entries(Text(64, "[0-9a-f]{64}")), "width": Whole(1, 10**6), "count": Whole(0), "weights": Text(64),
    "knob": OneOf((None, *(kind.knob for kind in kinds(1, 2).values() if kind.knob))), "value": maybe(Whole(0, 10**6)),
    "checkpoint": Text(), "data": Text(), "split": Text(100), "source": maybe(Tree()),
})  # fmt: skip
"""The part of `index.json` that is read."""


def index_folder(vectors: Path, out: Path, name: str = "auto", least: float = RECALL) -> Facts:
    """Index a folder of vectors; returns the content of `index.json`.

    Raises:
        UserError: there are no vectors (66), none is usable, or a shard is missing or damaged (65); too few for this
            kind of index (2); FAISS is not installed (69); the index cannot be written (73, 74).
    """
    facts = facts_of(vectors)
    parts, width = range(facts["shards"]), facts["width"]
    if not parts:
        raise UserError(vectors, "holds no vectors: nothing was embedded", "Embed another split", ExitCode.BAD_DATA)
    # A sample of the captions is enough for queries.
    caption_parts = parts[:: math.ceil(len(parts) / 8)] if facts.get("captions") else []
    images = [read_vectors(file_of(vectors, part, len(parts)), width) for part in parts]
    captions = [read_vectors(file_of(vectors, part, len(parts), "captions"), width)[1] for part in caption_parts]
    vector_NE = np.concatenate([vector_NE for _, vector_NE in images])
    if not len(vector_NE):
        raise UserError(vectors, "holds no image that could be read", "See its bad_samples.json", ExitCode.BAD_DATA)
    # Captions are realistic queries for tuning; without them, the index's own vectors are used.
    query_NE = np.concatenate(captions) if sum(map(len, captions)) else vector_NE
    chosen = np.random.default_rng(0).choice(len(query_NE), min(500, len(query_NE)), replace=False)
    index, about = build_index(vector_NE, query_NE[chosen], name, least)
    (out / ABOUT).unlink(missing_ok=True)  # of an older index: without it, the folder is not an index
    write_file(out / IDS, pa.concat_tables([table.select(IMAGE_COLUMNS.names) for table, _ in images]))
    write_index(index, out / VECTORS)
    about |= {"asked": "pictures" if query_NE is vector_NE else "captions", "count": len(vector_NE)}
    about |= {name: facts.get(name) for name in ("width", "weights", "checkpoint", "data", "split", "source")}
    # Last, with the checksums of both files: an interrupted run leaves no index.
    write_file(out / ABOUT, about | {"sha256": {name: sha256_of(out / name) for name in (VECTORS, IDS)}})
    return about


def read_vectors(path: Path, width: int) -> tuple[pa.Table, Array]:
    """A shard and its vectors, [N, E]. Raises UserError (65)."""
    try:
        table = pq.read_table(path)
        # Arrow stores lists of E numbers as one flat array: (N * E,) -> (N, E)
        return table, table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, width)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        todo = "Start the same `embed` again; if the file is there, delete it first"
        raise UserError(path, f"missing or damaged ({str(error)[:100]})", todo, ExitCode.BAD_DATA) from error


class SearchResult(NamedTuple):
    """An image: its row in the split, its file or None, the cosine with the query, the match probability."""

    row: int
    id: str
    origin: str
    path: str | None
    captions: list[str]
    similarity: float
    match: float | None = None


class SearchIndex:
    """An index in memory; `about` is the part of its `index.json` that is read, `images` the folder that the user
    named."""

    def __init__(self, index: Any, ids: pa.Table, about: Facts, images: Path | None = None) -> None:
        self.index, self.ids, self.about, self.images = index, ids, about, images
        self.model: PretrainedMaskVLM | None = None  # the model that has been checked

    @classmethod
    def load(cls, folder: str | Path, images: str | Path | None = None) -> "SearchIndex":
        """Read an index.

        Args:
            folder: folder made by `index`.
            images: location of its images: a folder of files, or a prepared set; needed only to open them.

        Raises:
            UserError: not an index (66), damaged (65), `index.json` is a link out of the folder (77) or cannot be read
                (74), `images` is not a folder (66), or FAISS is not installed (69).
        """
        place, faiss = Path(folder), faiss_module()
        if images is not None and not Path(images).is_dir():
            todo = "Name the folder that holds the images, or the prepared set"
            raise UserError(images, "no such folder", todo, ExitCode.MISSING_INPUT)
        if not (place / ABOUT).is_file():
            beside = sorted(str(file.parent) for file in place.parent.glob(f"*/{ABOUT}"))
            what = f"holds no {ABOUT}" if place.exists() else "no such folder"
            raise UserError(
                place,
                what + (f"; there are: {', '.join(beside)}" if beside else ""),
                "Make one: maskvlm index from=checkpoints/first/best.ckpt",
                ExitCode.MISSING_INPUT,
            )
        file = place / ABOUT
        content = load_json(file_text(file).encode(), file)
        about: Facts = (
            {key: content[key] for key in INDEX_SCHEMA.needed if key in content}
            if isinstance(content, dict)
            else content
        )
        INDEX_SCHEMA.read(about, str(file), "Make it again")
        try:
            # Checksums first: FAISS's C++ reader trusts its file.
            if any(sha256_of(place / name) != about["sha256"].get(name) for name in (VECTORS, IDS)):
                raise ValueError(f"a file does not match {ABOUT}")
            index, ids = faiss.read_index(str(place / VECTORS)), pq.read_table(place / IDS)
            if (
                ids.schema.remove_metadata() != IMAGE_COLUMNS
                or ids.num_rows != index.ntotal
                or index.d != about["width"]
            ):
                raise ValueError("its files do not belong together")
            turn(index, about["knob"], about["value"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(place, f"damaged ({error})"[:200], "Make it again", ExitCode.BAD_DATA) from error
        return cls(index, ids, about, None if images is None else Path(images))

    def search(self, vector_QE: Array | Tensor, k: int = 10) -> tuple[Array, Array]:
        """The k nearest of each query, nearest first: cosines and positions, [Q, K]; position -1 where IVF found fewer
        in the lists it searched."""
        check_whole("search", "k", k, 1)
        # FAISS needs contiguous float32 rows.
        query_QE = np.ascontiguousarray(np.atleast_2d(np.asarray(vector_QE, np.float32)))
        if query_QE.shape[1] != self.index.d:
            what = f"vectors of width {query_QE.shape[1]}, the index has {self.index.d}"
            raise UserError("search", what, "Encode with the model that the index was built with")
        hits: tuple[Array, Array] = self.index.search(query_QE, min(k, self.index.ntotal))
        return hits

    def open_images(self, hits: list[SearchResult]) -> list[ImageInput]:
        """Open the images: files or a prepared set in the folder that the user named, or scenes of the built-in world.
        The index is untrusted: its file paths are checked against that folder, and nothing else is opened.

        Raises:
            UserError: no folder was named for images that are not of the built-in world, or an image is outside it
                (77); an image or the prepared set is missing (66); the folder has files, but the index names rows of a
                set (2); the data set has changed, or the index names rows that it does not have (65).
        """
        if self.images is None or (self.images / MANIFEST).is_file():
            pairs = self.pairs(hits)
            if not all(type(each.row) is int and 0 <= each.row < len(pairs) for each in hits):
                what = f"{IDS} names rows that the data set does not have"
                raise UserError("search", what, "Index it again", ExitCode.BAD_DATA)
            return [pairs[each.row]["image"] for each in hits]
        # Resolve links on both sides, so that none leads out of the folder.
        root = os.path.realpath(self.images)
        for each in hits:
            if each.path is None:
                todo = f"Name the prepared set that the index was built from, the folder of its {MANIFEST}"
                raise UserError("--images", "is a folder of files, but the index names rows of a set", todo)
            if not Path(os.path.realpath(each.path)).is_relative_to(root):
                todo = "Name the folder that holds its images, or search without --rerank and --show"
                raise UserError("--images", f"{describe_value(each.path)} is not in {root}", todo, ExitCode.REFUSED)
            if not Path(each.path).is_file():
                todo = "Restore it, or search without --rerank and --show"
                raise UserError(each.path, "the images are not on disk", todo, ExitCode.MISSING_INPUT)
        return [Path(str(each.path)) for each in hits]

    def pairs(self, hits: list[SearchResult]) -> Pairs:
        """The split of the data set that was indexed; raises the same errors as `open_images`."""
        settings = self.about["source"] or {}
        name, args = current(str(settings.get("class_path"))), settings.get("init_args") or {}
        # Only the user (`images`) determines where the data are, never the index.
        plain = {key: value for key, value in args.items() if key != "root"} if isinstance(args, dict) else {}
        where = f"{ABOUT}: source"
        source: Source
        if self.images is not None:
            hold_out = plain.get("hold_out", 0)
            source = Prepared(str(self.images), hold_out if Whole(0, 10**9).fits(hold_out) else 0)
        elif name == WORLD:
            source = Scenes(**read_arguments(Scenes, plain, where))
        else:
            root = args.get("root") if isinstance(args, dict) else None
            place = root or next((os.path.dirname(each.path) for each in hits if each.path), "a place it does not name")
            what = f"the images are in {describe_value(place)}, says {ABOUT}; it is not opened without your consent"
            todo = "If you trust it: --images FOLDER (a folder or a prepared set)"
            todo += "; or leave out --rerank and --show"
            raise UserError("search", what, todo, ExitCode.REFUSED)
        pairs = source.split(self.about["split"])
        if pairs.fingerprint != self.about["data"]:
            raise UserError("search", "the data set is not the one of the index", "Index it again", ExitCode.BAD_DATA)
        return pairs


@torch.no_grad()
def search_index(
    index: SearchIndex, model: PretrainedMaskVLM, query: ImageInput, k: int = 10, rerank: bool = False
) -> list[SearchResult]:
    """The k nearest images to a text or an image, nearest first; a string that names a file is an image.

    rerank: order them as `rank` does, by matching (ITM) and, if the model's task re-ranks by both, the cosine of the
    matched pair. A text is matched with the images themselves, an image with their captions, of which the best
    counts. Raises UserError: the index was not made with this model (65).
    """
    # `identity` hashes all weights, so remember a model that has passed.
    if model is not index.model and identity(model) != index.about["weights"]:
        todo = f"Give {index.about['checkpoint']}, or make the index again"
        raise UserError(model.origin.path, "is not the checkpoint of the index", todo, ExitCode.BAD_DATA)
    index.model = model
    (query, *more), single = as_list(query)
    if more or not single:
        raise UserError("search", "several queries", "Give one text or image per call")
    by_image = is_image(query)
    vector_E = model.encode_image(query) if by_image else model.encode_text(str(query))
    (similarity_K,), (position_K,) = index.search(vector_E.cpu(), k)
    rows = index.ids.take(position_K[position_K >= 0]).to_pylist()
    # FAISS puts -1 last, so the first cosines belong to the remaining rows.
    hits = [SearchResult(**row, similarity=value) for row, value in zip(rows, similarity_K.tolist(), strict=False)]
    if not rerank:
        return hits
    # Matching needs an image and a text: a query image is matched with the captions of the results.
    images = [query] if by_image else index.open_images(hits)
    texts = [caption for each in hits for caption in each.captions] if by_image else [str(query)]
    image, text = encode(model, images, True), encode(model, texts, False)
    pairs = pair_up("search", len(images), len(texts))
    image_features = features_of(model, image, range(len(images)))
    text_features = features_of(model, text, range(len(texts)))
    odds_M = log_odds(model, [image_features[i] for i, _ in pairs], [text_features[t] for _, t in pairs]).cpu()
    cosine_M = (image.vector_XE @ text.vector_XE.T).flatten().cpu()
    # Each pair's index among the results: captions of an image share its index, and the best one counts.
    places = [place for place, each in enumerate(hits) for _ in each.captions] if by_image else list(range(len(hits)))
    best: dict[int, float] = {}
    for at in by_match(model, odds_M, cosine_M):
        best.setdefault(places[at], float(odds_M[at].sigmoid()))
    # Results without captions cannot be matched and come last.
    best |= {place: 0.0 for place in range(len(hits)) if place not in best}
    return [hits[place]._replace(match=match) for place, match in best.items()]
