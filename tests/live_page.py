"""The page in a thread of the tests, on a real port with the real Gradio; and who speaks to it as its script does."""

import io
import json
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from toy_pretrained import saved

httpx: Any = pytest.importorskip("httpx") if find_spec("gradio") else None  # Gradio brings it
JSON = {"content-type": "application/json"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
IN_CHROMIUM = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright (pip install -e .[test])"),
]


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser of this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield opened
        opened.close()


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def noise(seed: int = 0, side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


GOOD = encoded(noise())


class Asker:
    """Speaks to the page as its own script does."""

    def __init__(self, base: str) -> None:
        self.client = httpx.Client(base_url=base, timeout=120)
        self.config = self.client.get("/config").json()
        self.parts = {each["id"]: each["props"] for each in self.config["components"]}
        self.ids = {props["elem_id"]: each for each, props in self.parts.items() if props.get("elem_id")}

    def upload(self, data: bytes, name: str = "a.png") -> Any:
        return self.client.post("/gradio_api/upload", files={"files": (name, data)})

    def image(self, data: bytes, name: str = "a.png") -> dict[str, Any]:
        (path,) = self.upload(data, name).raise_for_status().json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def question(self, part: str, event: str = "click", event_data: Any = None, **values: Any) -> dict[str, Any]:
        """What the page's script would send; values by elem_id."""
        target = [self.ids[part], event]
        # What the browser does by itself has no function behind it.
        known = [each for each in self.config["dependencies"] if target in each["targets"] and not each["js"]]
        by_id = {self.ids[name]: value for name, value in values.items()}
        data = [by_id.get(each, self.parts[each].get("value")) for each in known[0]["inputs"]]
        body = {"fn_index": known[0]["id"], "session_hash": f"s{time.time_ns()}", "data": data}
        return body | {"event_data": event_data}

    def join(self, part: str, event: str, event_data: Any = None, **values: Any) -> Any:
        """Put a question into the queue."""
        body = self.question(part, event, event_data, **values)
        return body, self.client.post("/gradio_api/queue/join", content=json.dumps(body), headers=JSON)

    def ask(self, part: str, event: str = "click", event_data: Any = None, **values: Any) -> str:
        """The answer as JSON, whatever it is."""
        body, reply = self.join(part, event, event_data, **values)
        if reply.status_code != 200:
            return f"{reply.status_code} {reply.text}"
        return self.answer(body["session_hash"])

    def answer(self, session: str) -> str:
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if event.get("msg") in ("process_completed", "unexpected_error"):
                    return json.dumps(event)
        return "nothing"


class Live(NamedTuple):
    """A page that is served from within the tests.

    port: its own; guard: around it; folder: of its uploads; server: of uvicorn; answers: method, path, status of each.
    """

    asker: Asker
    port: int
    guard: Any
    folder: Path
    server: Any
    answers: list[tuple[str, str, int]]

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def uploads(self) -> set[Path]:
        """Images that were uploaded and are still there."""
        return set(self.folder.rglob("image.*"))

    @property
    def question_count(self) -> int:
        """Questions that reached the queue so far."""
        count: int = self.guard.calls.blocks._queue.events_recorded
        return count


@contextmanager
def live(place: Path, runs: Path | None = None) -> Iterator[Live]:
    """Serve a toy model and a task of two images; or what is in a folder of runs."""
    from maskvlm.demo import serve
    from maskvlm.demo.serve import guarded, listen, own_folder, server_of

    sources = [] if runs else [str(place / kind / "best.ckpt") for kind in ("pretrain", "nlvr")]
    for path in sources:
        saved(Path(path), Path(path).parent.name)
    options = Namespace(sources=sources, index=None, images=None, device=None, host="127.0.0.1")
    # Not what happens to lie in the folder of this clone.
    here = patch.object(serve, "RUNS", runs or place / "nothing")
    with here, listen("127.0.0.1", 0) as listener, own_folder() as folder:
        port = listener.getsockname()[1]
        guard = guarded(options, [], folder)
        answers = list[tuple[str, str, int]]()

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            async def note(message: Any) -> None:
                if message["type"] == "http.response.start":
                    answers.append((scope["method"], scope["path"], message["status"]))
                await send(message)

            await guard(scope, receive, note)

        server = server_of(noted)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Live(Asker(f"http://127.0.0.1:{port}"), port, guard, folder, server, answers)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
