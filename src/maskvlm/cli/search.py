"""`maskvlm index` and `maskvlm search` (`inference/search.py`)."""

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from maskvlm.cli.ask_model import answer_line, cautions, json_line, warn_afterwards
from maskvlm.cli.embed import data_parser, embed_data, process_of
from maskvlm.cli.shell_methods import PIPED, read_piped
from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import default_model
from maskvlm.data.inputs import check_absent, is_image
from maskvlm.data.preview import open_row, save_sheet
from maskvlm.inference.faiss_index import RECALL, faiss_module, kinds
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.search import ABOUT, SearchIndex, SearchResult, index_folder, search_index
from maskvlm.inference.vector_files import Facts
from maskvlm.utils.errors import UserError, check_positive_shares

CAPTION_WIDTH = 200
"""Most characters of a caption in a line of results."""

OPTION_OF = {"source": "--from", "captions": "--no-captions"}
"""Names of the options whose values are stored under another name."""


def make(arguments: list[str], allowed: list[str]) -> int:
    """`index`: embed the data, unless vectors are given, and build the index. Takes arguments as in the shell."""
    parser = data_parser(
        "index",
        "checkpoints/index",
        "build an index of a data set's images, from their embeddings or with a checkpoint",
    )
    parser.add_argument("--vectors", type=Path, help="folder written by `embed` (default: embed the images first)")
    parser.add_argument(
        "--kind",
        default="auto",
        choices=["auto", *kinds(1, 2)],
        help="kind of FAISS index; auto chooses by size and recall (default: %(default)s)",
    )
    parser.add_argument(
        "--exact-share",
        type=float,
        default=RECALL,
        help=f"share of the 10 exact nearest neighbours that must be found (default: {RECALL})",
    )
    options, rest = parser.parse_known_args(arguments)
    # Raises now, before hours of embedding, if FAISS is not installed.
    faiss_module()
    if process_of(os.environ)[1] > 1:
        raise UserError("index", "several processes", "`embed` with them, then `index --vectors FOLDER` with one")
    if options.vectors is not None:
        # The options of `embed` are already built into the vectors.
        own = ("vectors", "out", "kind", "exact_share")
        names = [name for name, value in vars(options).items() if value != parser.get_default(name) and name not in own]
        for name in (*(OPTION_OF.get(name, f"--{name}") for name in names), *rest):
            raise UserError(name, "has no effect with --vectors", "Leave it out")
    check_positive_shares({"--exact-share": options.exact_share})
    vectors = options.vectors or options.out / "vectors"
    if options.vectors is None:
        print(embed_data(options, rest, allowed, vectors, (0, 1)), flush=True)
    about = index_folder(vectors, options.out, options.kind, options.exact_share)
    message = "{count} images, {factory} {knob} {value}, built in {build_seconds} s; finds {share} of the"
    message += " 10 nearest that exact search finds, for {queries} {asked}; {median_ms} ms per query"
    # A flat index has no knob and no value.
    message = message.format(**about, share=f"{about['share_of_exact_10']:.1%}").replace(" None", "")
    low = "; below the requested share: --kind flat finds all of them"
    print(f"{options.out}: {message}{low if about['share_of_exact_10'] < options.exact_share else ''}", flush=True)
    return 0


def checkpoint_of_index(index: SearchIndex) -> str:
    """The checkpoint that an index was made with, if it is a run's in checkpoints/; otherwise the bundled model. A line
    on stderr says which. An index may be untrusted: no other path that it names is opened, and nothing is downloaded
    from the hub."""
    named, runs = str(index.about["checkpoint"]), Path("checkpoints")
    # The path is looked up among the runs' files; the one that the index names is never opened itself.
    own = next((file for file in runs.glob("*/*.ckpt") if file.is_file() and str(file) == named), None)
    if own is None:
        return default_model("used")
    print(
        f"no checkpoint named: using {own}, the checkpoint that the index was built with", file=sys.stderr, flush=True
    )
    return str(own)


def main(arguments: list[str], allowed: list[str]) -> int:
    """`search`: print the images found. Takes arguments as in the shell."""
    parser = OptionParser("maskvlm search", description="find images by a text or an image", allow_abbrev=False)
    parser.add_argument("query", help="a text, an image file, or - for an image from standard input")
    parser.add_argument("--index", type=Path, help="folder of the index (default: the newest checkpoints/index*)")
    parser.add_argument(
        "--from", dest="source", help="checkpoint that the index was built with (default: the one the index names)"
    )
    parser.add_argument("--k", type=int, default=10, help="number of results (default: %(default)s)")
    parser.add_argument("--rerank", action="store_true", help="re-rank the results by matching")
    parser.add_argument("--images", type=Path, help="folder or prepared set of the images, for --rerank and --show")
    parser.add_argument("--show", type=Path, metavar="FILE", help="write the results as a PNG")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per result")
    parser.add_argument("--device", help="torch device, such as cuda (default: cpu)")
    options = parser.parse_args(arguments)
    # A misspelt file name would be taken for a text query.
    check_absent([options.query])
    query = read_piped() if options.query == PIPED else options.query
    files = sorted(Path("checkpoints").glob(f"index*/{ABOUT}"), key=lambda file: file.stat().st_mtime)
    if options.index is None and len(files) > 1:
        print(f"no --index: searching {files[-1].parent}, the newest of {len(files)}", file=sys.stderr, flush=True)
    newest = files[-1].parent if files else Path("checkpoints/index")
    index = SearchIndex.load(options.index or newest, options.images)
    source = options.source or checkpoint_of_index(index)
    model = PretrainedMaskVLM.from_pretrained(source, device=options.device, allow_import=allowed)
    with warn_afterwards(model):
        hits = search_index(index, model, query, options.k, options.rerank)
        asked: tuple[list[Any], list[str]] = ([query], []) if is_image(query) else ([], [options.query])
        care = cautions(model, *asked, {}) if options.json else {}
    for place, each in enumerate(hits, 1):
        answer: Facts = {"rank": place, "match": each.match, "similarity": each.similarity}
        # For an image of a prepared set, the id holds the file's name as given in the user's table.
        place_of = each.origin if each.id in each.origin else f"{each.id}, {each.origin}"
        answer |= {"image": each.path or place_of, "caption": each.captions[0] if each.captions else None}
        where = {"id": each.id, "row": each.row, "path": each.path, "origin": each.origin}
        whole = {**answer, **where, "captions": each.captions, **care}
        # A caption may have 4,096 characters: a line has its beginning, the JSON the whole.
        short = (
            {"caption": textwrap.shorten(each.captions[0], CAPTION_WIDTH, placeholder=" ...")} if each.captions else {}
        )
        print(json_line(whole) if options.json else answer_line(answer | short), flush=True)
    if options.show is not None:
        print(f"wrote {show(index, hits, options.show)}", file=sys.stderr, flush=True)
    return 0


def show(index: SearchIndex, hits: list[SearchResult], path: Path) -> Path:
    """Write a contact sheet of the images found, best first. Raises UserError as `SearchIndex.open_images`, or if the
    file cannot be written (73)."""
    titles = [f"{place}. {each.id}, similarity {each.similarity:.3f}" for place, each in enumerate(hits, 1)]
    rows = zip(index.open_images(hits), hits, titles, strict=True)
    return save_sheet([open_row(image, each.captions, title, each.origin) for image, each, title in rows], path)
