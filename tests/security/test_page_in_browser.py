"""A hostile page on another origin, in a real browser, against the page; and the page itself in that browser."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("gradio") is None:
    pytest.skip("gradio is not installed (pip install -e .[demo])", allow_module_level=True)

from live_page import GOOD, IN_CHROMIUM, Live, chromium, encoded, live, noise

from maskvlm.demo.samples import Hit, Searched

SCRIPT = "<script>document.title='taken'</script>"
TEMPLATE = "${document.title='taken'} {{document.title='taken'}} {{{lookup this}}}"  # Gradio's HTML is a template
pytestmark = IN_CHROMIUM

ATTACKS = """
async ([base, question, image]) => {
  const results = {}, join = base + "/gradio_api/queue/join", upload = base + "/gradio_api/upload";
  const tell = async (name, attack) => {
    try { results[name] = String(await attack()); } catch (error) { results[name] = "blocked"; }
  };
  const loads = (tag, url) => new Promise(done => {
    const element = document.createElement(tag);
    element.onload = () => done("loaded"); element.onerror = () => done("blocked");
    element.src = url; document.body.append(element); setTimeout(() => done("blocked"), 4000);
  });
  const file = () => { const form = new FormData(); form.append("files", new Blob(["x"]), "a.png"); return form; };
  const post = (url, body, more) => fetch(url, {method: "POST", body, ...more}).then(reply => reply.text());
  await tell("text", () => post(join, question, {mode: "no-cors", headers: {"content-type": "text/plain"}}));
  await tell("json", () => post(join, question, {headers: {"content-type": "application/json"}}));
  await tell("file", () => post(upload, file(), {mode: "no-cors"}));
  await tell("settings", () => fetch(base + "/config").then(reply => reply.text()));
  await tell("stream", () => new Promise((done, fail) => {
    const stream = new EventSource(base + "/gradio_api/heartbeat/abc"); stream.onmessage = done; stream.onerror = fail;
  }));
  await tell("socket", () => new Promise((done, fail) => {
    const socket = new WebSocket(join.replace("http", "ws")); socket.onopen = done; socket.onerror = fail;
  }));
  results["image"] = await loads("img", image);
  const submit = (url, kind, name) => new Promise(done => {
    const frame = document.createElement("iframe"), form = document.createElement("form");
    frame.name = "f" + Math.random(); frame.onload = () => done(); document.body.append(frame);
    const text = document.createElement("textarea"); text.name = name; text.value = '"}';
    Object.assign(form, {action: url, method: "POST", enctype: kind, target: frame.name});
    form.append(text); document.body.append(form); form.submit(); setTimeout(done, 4000);
  });
  await submit(join, "text/plain", question.slice(0, -1) + ', "x": "');
  await submit(upload, "multipart/form-data", "files");
  const frame = document.createElement("iframe"); frame.id = "framed"; frame.src = base + "/";
  await new Promise(done => { frame.onload = done; document.body.append(frame); setTimeout(done, 4000); });
  return results;
}
"""


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>hostile</title><body>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """Another origin: another port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("page")) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def test_a_hostile_page_cannot_ask_upload_read_or_frame(page: Live, browser: Any, elsewhere: str) -> None:
    question = page.asker.question("match", image=None, texts="a red circle")
    image = f"{page.base}/gradio_api/file={page.asker.image(GOOD)['path']}"
    before, start = (page.uploads, page.question_count), len(page.answers)
    tab = browser.new_page()
    tab.goto(elsewhere)
    results = tab.evaluate(ATTACKS, [page.base, json.dumps(question), image])
    frames = [frame.content() for frame in tab.frames if frame != tab.main_frame]
    tab.close()
    assert set(results.values()) <= {"", "blocked"}, results  # "" is what the browser shows of an answer that it hides
    assert not [content for content in frames if "gradio" in content.lower()]
    reached = page.answers[start:]
    assert len(reached) > 7  # the attacks did arrive
    assert {method for method, _, _ in reached} == {"GET", "POST", "OPTIONS"}
    assert {status for _, _, status in reached} == {403}
    assert (page.uploads, page.question_count) == before


def test_the_page_itself_works_and_asks_nobody_else(
    page: Live, browser: Any, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reached by a link from the hostile page; an upload with a strange name, texts and captions that are scripts."""
    monkeypatch.setattr(Searched, "by_text", lambda *_: [Hit(noise(), f"{SCRIPT} {TEMPLATE}")])
    path = tmp_path / "my cat's <image> ünï.jpg"
    path.write_bytes(encoded(noise(2, 64), "JPEG") + SCRIPT.encode())
    tab, requests, errors = browser.new_page(), list[str](), list[str]()
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("response", lambda reply: errors.append(f"{reply.status} {reply.url}") if reply.status >= 400 else None)
    tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(elsewhere)
    tab.evaluate("base => { location.href = base }", page.base + "/")
    tab.wait_for_selector("#words .side")
    with tab.expect_response(lambda reply: "/gradio_api/upload?" in reply.url) as uploaded:
        tab.locator("#image input[type=file]").set_input_files(path)
    (stored_path,) = uploaded.value.json()
    tab.wait_for_selector(f"#image img[src*='{Path(stored_path).parent.name}']")
    assert tab.evaluate("document.querySelector('#image img').complete")
    tab.fill("#text textarea", f"a [MASK] circle {SCRIPT}")
    tab.press("#text textarea", "Tab")
    tab.wait_for_function("document.querySelector('#words .sentence')?.innerText.includes('<script>')")
    tab.get_by_role("tab", name="Match").click()
    tab.fill("#texts textarea", f"a red circle\n{SCRIPT}\n{TEMPLATE}")
    tab.locator("#match").click()
    tab.wait_for_function("document.querySelectorAll('#matches tr').length == 3")
    assert "${document.title=" in tab.locator("#matches").inner_text()
    tab.get_by_role("tab", name="Search").click()
    tab.locator("#find").click()
    tab.wait_for_selector("#found figcaption")
    assert SCRIPT in tab.locator("#found").inner_text()
    assert tab.title() == "MaskVLM"
    assert errors == []
    own = (page.base, "data:", f"blob:{page.base}", elsewhere)
    assert [url for url in requests if not url.startswith(own)] == []
    tab.goto(f"{page.base}/gradio_api/file={stored_path}")  # an image and a page at once is shown as an image
    assert tab.evaluate("[document.contentType, document.title == 'taken']") == ["image/jpeg", False]
    tab.close()
