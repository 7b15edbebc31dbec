"""How Sphinx builds the site: `make docs` writes docs/_build/html. Tutorials are executed while it is built, nothing is
fetched, and a warning is an error."""

import logging
import os
import re
import sys
from importlib import import_module, metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import myst_nb.core.render
from docutils import nodes
from nbclient import NotebookClient
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.parallel import make_chunks

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SHOWN = {
    "SECURITY.md": "reference/security.md",
    "tasks/README.md": "reference/tasks.md",
    "checkpoints/README.md": "reference/runs.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "CHANGELOG.md": "about/changes.md",
}
"""Files outside of docs/ that a page includes."""
sys.path.insert(0, str(ROOT / "src"))

project = "MaskVLM"
author = "The MaskVLM authors"
project_copyright = "the MaskVLM authors, Apache-2.0"
try:
    release = metadata.version("maskvlm")
except metadata.PackageNotFoundError:  # a clone that runs by PYTHONPATH alone
    release = ""

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "notebooks/*"]
suppress_warnings: list[str] = []

# ---- pages
html_theme = "furo"
html_title = "MaskVLM"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# ---- the reference: docstrings are plain text with `code` in single backquotes, in Google's sections
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

# ---- tutorials: each in a folder of its own, by this Python, offline, without a terminal's colours
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 900  # seconds a cell
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_show_tb = True
logging.getLogger("traitlets").setLevel(logging.ERROR)  # which notebook is being run
NotebookClient.extra_arguments.default_args = (["--log-level=ERROR"],)  # each kernel warns that its local port is open
TUTORIALS = [
    f"tutorials/{name}"
    for name in ["your-images", "a-study", "fine-tune", "add-a-task", "search", "add-a-loss", "first-steps", "slurm"]
]
"""The longest first, by what they take to run."""
os.environ |= {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    "MASKVLM_DOCS": str(DOCS),  # the tutorial on SLURM shortens this path
    "TTY_COMPATIBLE": "0",  # plain lines in the place of bars
    "SHELLOPTS": "errexit",  # a command that fails in a cell of several ends the build
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
    **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "88", "PYTHONWARNINGS": "ignore"},
}


def join_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a cell printed, as one text for each of stdout and stderr. A cell of %%bash prints in pieces of 100 bytes,
    and myst-nb's own function would end each of these with a new line."""
    joined: list[dict[str, Any]] = []
    streams: dict[str, dict[str, Any]] = {}
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] in streams:
            streams[output["name"]]["text"] += output["text"]
            continue
        if output["output_type"] == "stream":
            streams[output["name"]] = output
        joined.append(output)
    return joined


myst_nb.core.render.coalesce_streams = join_streams


def spread_tutorials(app: Sphinx, env: BuildEnvironment, names: list[str]) -> None:
    """Order the pages so that all processes of `-j`, each of which reads the next chunk of pages, end together: the
    tutorials are dealt out to the chunks there and back, so that a long one is beside a short one."""
    sizes = [len(chunk) for chunk in make_chunks(names, app.parallel)]
    chunks: list[list[str]] = [[] for _ in sizes]
    there_and_back = cycle([*chunks, *reversed(chunks)])
    for name in (name for name in TUTORIALS if name in names):
        next(there_and_back).append(name)
    others = iter([name for name in names if name not in TUTORIALS])
    for chunk, size in zip(chunks, sizes, strict=True):
        chunk.extend(islice(others, max(0, size - len(chunk))))
    names[:] = [name for chunk in [*chunks, others] for name in chunk]


def import_once(app: Sphinx, env: BuildEnvironment, names: list[str]) -> None:
    """Import what the reference reads docstrings of, before `-j` forks processes that would each import it."""
    if any(name.startswith("reference/api/") for name in names):
        for module in ("maskvlm.inference.api", "maskvlm.training.lit"):
            import_module(module)


def show_plainly(app: Sphinx, document: nodes.document) -> None:
    """A cell of %%bash is shown as what one types into a shell, one of %%writefile as the file, its name on top."""
    for block in document.findall(nodes.literal_block):
        first, _, rest = block.astext().partition("\n")
        if first == "%%bash":
            block["language"], text = "bash", rest
        elif first.startswith("%%writefile "):
            name = first.split()[1]
            block["language"] = "yaml" if name.endswith(".yaml") else "python"
            text = f"# {name}\n{rest}"
        else:
            continue
        block.children, block.rawsource = [nodes.Text(text)], text


def whole_links(text: str, source: Path, page: Path) -> str:
    """Links as they work where the repository itself is read, made to work on the page that shows the text: one to a
    folder leads to its README.md, one to a file that is a page of this site to that page, any other one to the file.

    Args:
        text: Markdown.
        source, page: the file that it stands in, and the page that shows it.
    """

    def whole(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        path = Path(os.path.normpath(source.parent / target))
        path = path / "README.md" if path.is_dir() else path
        if not path.is_file():
            return found[0]
        shown = SHOWN.get(path.relative_to(ROOT).as_posix())
        path = DOCS / shown if shown else path
        kind = "path:" if path.suffix == ".md" and not path.is_relative_to(DOCS) else ""
        return f"]({kind}{os.path.relpath(path, page.parent)}{anchor})"

    return re.sub(r"\]\(([\w./-]+)(#[\w-]*)?\)", whole, text)


def page_links(app: Sphinx, name: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    content[0] = whole_links(content[0], page, page)


def included_links(app: Sphinx, source: Path, name: str, content: list[str]) -> None:
    content[0] = whole_links(content[0], Path(os.path.normpath(DOCS / source)), Path(app.env.doc2path(app.env.docname)))


def setup(app: Sphinx) -> None:
    app.connect("env-before-read-docs", spread_tutorials)
    app.connect("env-before-read-docs", import_once)
    app.connect("doctree-read", show_plainly)
    app.connect("source-read", page_links)
    app.connect("include-read", included_links)
