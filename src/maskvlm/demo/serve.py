"""`maskvlm demo`: starts the page and serves it until Ctrl-C.

Gradio's telemetry is turned off before it is imported, and everything it writes goes to a temporary folder of this
process, which is removed when the page ends.
"""

import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import DEFAULT, default_model
from maskvlm.demo.terminal import printable
from maskvlm.utils.errors import ExitCode, UserError

RUNS = Path("checkpoints")
"""Folder that is searched for runs."""
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # Gradio makes a table of all events at every question
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def main(arguments: list[str], allowed: list[str]) -> int:
    """Serve the page. Takes arguments as in the shell, without the command's name."""
    parser = OptionParser("maskvlm demo", description="serve a web page to try models in", allow_abbrev=False)
    parser.add_argument(
        "--from", dest="sources", nargs="+", default=[], help="checkpoints to list first; others found here follow"
    )
    parser.add_argument(
        "--index", type=Path, help="folder of the index to search (default: the newest that `maskvlm index` wrote)"
    )
    parser.add_argument("--images", type=Path, help="folder or prepared set of the index's images")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any other than the default lets others in, without a login (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port; 0: any free one (default: %(default)s)")
    parser.add_argument("--device", help="torch device, such as cuda (default: cpu)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "demo", "gradio is not installed", "Run `make demo`, or pip install maskvlm[demo]", ExitCode.UNAVAILABLE
        )
    # Must be set before Gradio is imported, further down.
    os.environ.update(QUIET)
    listener = listen(options.host, options.port)
    with listener, own_folder() as folder:
        print("loading ...", flush=True)
        run_page(options, allowed, listener, folder)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, before slow imports. Raises UserError: the address or the port is not available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        # Otherwise the port is unavailable for a while after an earlier page has ended.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        return listener
    except (OSError, OverflowError) as error:
        todo = "Give another --port (0: any that is free) or --host"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}", f"cannot be listened on ({reason})", todo, ExitCode.UNAVAILABLE) from error


@contextmanager
def own_folder() -> Iterator[Path]:
    """A temporary folder for uploads and results, used for all temporary files of this process."""
    with tempfile.TemporaryDirectory(prefix="maskvlm-demo-", ignore_cleanup_errors=True) as temporary:
        # Resolved, since paths are compared exactly later.
        before, name = tempfile.tempdir, str(Path(temporary).resolve())
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = before
            os.environ.pop("GRADIO_TEMP_DIR", None)


def run_page(options: Any, allowed: list[str], listener: socket.socket, folder: Path) -> None:
    """Load the models, build the page and serve it. Raises UserError."""
    app = guarded(options, allowed, folder)
    host, port = listener.getsockname()[:2]
    url_host = f"[{host}]" if ":" in host else host
    print(f"http://{url_host}:{port}  (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM removes the folder, too
    with suppress(KeyboardInterrupt), printable():
        server_of(app).run(sockets=[listener])


def guarded(options: Any, allowed: list[str], folder: Path) -> Any:
    """The page, wrapped in its guard. Raises UserError."""
    # These import Gradio; QUIET is set by now.
    from maskvlm.demo.input_limits import Worker
    from maskvlm.demo.models import Models, find_models, run_of
    from maskvlm.demo.page import page
    from maskvlm.demo.request_limits import Guard
    from maskvlm.demo.request_schema import Calls
    from maskvlm.demo.upload_store import Shelf

    listing = find_models(RUNS, options.sources)
    if not listing.runs:
        default_model("used")  # prints that the bundled model is used
    if DEFAULT not in options.sources:
        listing = listing._replace(runs=[*listing.runs, run_of(DEFAULT)])
    models = Models(listing, options.device, allowed)
    index = options.index
    if index is None:
        # The newest one written by `maskvlm index`.
        indexes = sorted(RUNS.glob("index*/index.json"), key=lambda file: file.stat().st_mtime)
        index = indexes[-1].parent if indexes else None
    blocks = page(models, Worker(), index, options.images)
    print(", ".join(run.path for run in (*listing.runs, *listing.tasks)), flush=True)
    shelf = Shelf(folder, blocks.upload_file_set)
    return Guard(application(blocks), Calls(blocks, folder), shelf, options.host)


def server_of(app: Any) -> Any:
    """A server that gives visitors no more time, connections or trust than they need."""
    import uvicorn

    from maskvlm.demo.connection_timeouts import Hurried

    config = uvicorn.Config(
        app,
        http=Hurried,
        ws="none",
        log_level="warning",
        use_colors=False,
        server_header=False,
        # X-Forwarded-For would let visitors choose their own address.
        proxy_headers=False,
        # Twice the number of pages that may stay connected (`request_limits.MAX_OPEN`): the rest is for questions.
        limit_concurrency=200,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def application(blocks: Any) -> Any:
    """The page as an ASGI application, without its guard."""
    import fastapi
    import gradio as gr

    from maskvlm.demo.page import CSS, JS
    from maskvlm.demo.request_limits import MAX_UPLOAD

    plain = ("system-ui", "sans-serif")  # no font is downloaded
    theme = gr.themes.Default(font=plain, font_mono=("ui-monospace", "monospace"), primary_hue="teal")
    # Gradio's own colours for selected and pressed elements have too little contrast with the background.
    theme.set(
        color_accent="*primary_700",
        border_color_accent_dark="*primary_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        body_text_color_subdued="*neutral_600",
    )
    # Without FastAPI's own pages.
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        outer,
        blocks,
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css=CSS.read_text(encoding="utf-8"),
        js=JS.read_text(encoding="utf-8"),
    )
