"""The page's guards, each with the real Gradio on a real port, and each without itself (`guards.py`)."""

import asyncio
import json
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from guards import Build, without

if find_spec("gradio") is None:
    pytest.skip("gradio is not installed (pip install -e .[demo])", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st
from live_page import GOOD, JSON, Live, encoded, httpx, live, noise

from maskvlm.demo import connection_timeouts, request_limits, upload_store
from maskvlm.demo.refusal import Refused
from maskvlm.demo.request_origin import check_host, is_own
from maskvlm.demo.terminal import printable

JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
TEXT = "a red circle"
SCRIPT = "<script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("page")) as served:
        yield served


def refusal(reply: Any) -> int:
    """The status of a refusal, which is one line and lets no other origin read it."""
    assert 400 <= reply.status_code < 600, reply.text[:200]
    assert len(reply.text.splitlines()) <= 1 < 200 > len(reply.text)
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    status: int = reply.status_code
    return status


# ---------------------------------------------------------------------- who asks

ELSEWHERE: list[dict[str, str]] = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://127.0.0.1"},
    {"origin": "http://localhost:PORT"},
    {"origin": "http://127.0.0.1:PORT.evil.example"},
    {"origin": "http://127.0.0.1:PORT@evil.example"},
    {"origin": "http://evil.example#127.0.0.1:PORT"},
    {"origin": "http://127.0.0.1:PORT http://evil.example"},
    {"origin": "file://127.0.0.1:PORT"},
    {"origin": "http://127.0.0.1:PORT", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "SAME-ORIGIN,cross-site"},
    {"referer": "http://evil.example/127.0.0.1:PORT"},
    {"referer": "about:blank"},
    {"referer": "http://["},
]
OWN: list[dict[str, str]] = [
    {},
    {"origin": "http://127.0.0.1:PORT"},
    {"origin": "HTTP://127.0.0.1:PORT"},
    {"origin": "http://127.0.0.1:PORT", "sec-fetch-site": "same-origin"},
    {"origin": "http://localhost:PORT", "host": "LOCALHOST:PORT"},
    {"origin": "http://[::1]:PORT", "host": "[::1]:PORT"},
    {"sec-fetch-site": "none"},
    {"referer": "http://127.0.0.1:PORT/"},
]


def filled(head: dict[str, str], page: Live) -> dict[str, str]:
    return {name: value.replace("PORT", str(page.port)) for name, value in head.items()}


def sent(client: httpx.Client, method: str, path: str, head: dict[str, str], **content: Any) -> httpx.Response:
    """The answer to a request. A refusal that comes before all of a request was sent may be lost: it is sent again."""
    for _ in range(9):
        with suppress(httpx.TransportError):
            return client.request(method, path, headers=head, **content)
    return client.request(method, path, headers=head, **content)


@pytest.mark.guard("maskvlm.demo.request_origin:check_origin")
@pytest.mark.parametrize("head", ELSEWHERE, ids=str)
def test_another_page_gets_nothing(page: Live, build: Build, head: dict[str, str]) -> None:
    """By any door: questions, uploads, images, answers, settings, preflights."""
    client, head, image = page.asker.client, filled(head, page), page.image["path"]
    # Without an image it is short: a refusal that comes before the whole of a long one was sent may be lost.
    before, question = (
        (page.uploads, page.question_count),
        json.dumps(page.asker.question("match", image=None, texts=TEXT)),
    )
    replies = [
        sent(client, "POST", JOIN, head | JSON, content=question),
        sent(client, "POST", JOIN, head | {"content-type": "text/plain"}, content=question),
        sent(client, "POST", UPLOAD, head, files={"files": ("a.png", GOOD)}),
        sent(client, "OPTIONS", JOIN, head | {"access-control-request-method": "POST"}),
        *(sent(client, "GET", path, head) for path in ("/config", "/theme.css", f"/gradio_api/file={image}")),
        sent(client, "GET", "/gradio_api/queue/data?session_hash=x", head),
        sent(client, "HEAD", "/config", head),
        sent(client, "GET", "/", head | {"sec-fetch-mode": "no-cors"}),
        sent(client, "GET", "/", head | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}),
    ]
    assert {refusal(each) for each in replies} == {403}
    assert (page.uploads, page.question_count) == before


@pytest.mark.parametrize("head", OWN, ids=str)
def test_the_page_itself_and_programs_are_answered(page: Live, head: dict[str, str]) -> None:
    client, head = page.asker.client, filled(head, page)
    question = page.asker.question("match", image=None, texts=TEXT)
    assert client.post(JOIN, content=json.dumps(question), headers=head | JSON).status_code == 200
    assert client.get("/config", headers=head).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link | {"referer": "http://elsewhere.example/"}).status_code == 200


@given(st.text(max_size=40), st.sampled_from(["127.0.0.1:7860", "[::1]:7860", "gpu:80", "gpu"]))
@settings(max_examples=300, deadline=None)
def test_no_text_but_its_own_is_an_origin(text: str, host: str) -> None:
    assert not is_own(text, host) or text.lower() in (f"http://{host}", f"https://{host}", f"http://{host}:80")
    assert not is_own(f"http://{host}{text}", host) or text in ("", ":80")
    assert is_own(f"http://{host}", host)
    assert is_own("http://gpu", "gpu:80")
    assert not is_own("https://gpu", "gpu:80")


def raw(page: Live, request: bytes) -> bytes:
    """The answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as talk:
        talk.sendall(request)
        return talk.recv(65536)


@pytest.mark.guard("maskvlm.demo.request_origin:head_of", gives="dict(args[0]['headers'])")
def test_a_header_that_counts_stands_there_once(page: Live, build: Build) -> None:
    own, other = b"origin: http://127.0.0.1:%d\r\n" % page.port, b"origin: http://evil.example\r\n"
    for double in (other + own, own + other, b"host: evil.example\r\n", b"sec-fetch-site: none\r\n" * 2):
        reply = raw(page, b"GET /config HTTP/1.1\r\n%bhost: 127.0.0.1:%d\r\n\r\n" % (double, page.port))
        assert reply.startswith(b"HTTP/1.1 400")
    assert raw(page, b"GET /config HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400")


NAMES = {
    ("127.0.0.1", "127.0.0.1:7860"): True,
    ("127.0.0.1", "localhost"): True,
    ("127.0.0.2", "127.0.0.2:7860"): True,
    ("::1", "[::1]:7860"): True,
    ("127.0.0.1", "evil.example:7860"): False,
    ("127.0.0.1", "127.0.0.1.evil.example"): False,
    ("127.0.0.1", "localhost.evil.example"): False,
    ("127.0.0.1", "evil.example@127.0.0.1"): False,
    ("127.0.0.1", "192.168.0.7:7860"): False,
    ("127.0.0.1", "0.0.0.0:7860"): False,
    ("0.0.0.0", "192.168.0.7:7860"): True,
    ("::", "[fd00::7]:7860"): True,
    ("0.0.0.0", f"{socket.gethostname()}:7860"): True,
    ("gpu3.lab.example", "GPU3.lab.example:7860"): True,
    ("0.0.0.0", "evil.example:7860"): False,
    ("0.0.0.0", "192.168.0.7.evil.example"): False,
    ("0.0.0.0", ""): False,
    ("0.0.0.0", "[evil]:1"): False,
}


@pytest.mark.guard("maskvlm.demo.request_origin:check_host")
def test_a_name_that_may_have_been_rebound_is_refused(page: Live, build: Build) -> None:
    for (served, host), fine in NAMES.items():
        try:
            check_host({b"host": host.encode()}, served)
            assert fine, (served, host)
        except Refused:
            assert not fine, (served, host)
    assert refusal(page.asker.client.get("/", headers={"host": f"evil.example:{page.port}"})) == 421


@pytest.mark.guard("maskvlm.demo.request_origin:check_media_type")
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", ""]
)
def test_a_question_is_json_and_an_upload_a_form(page: Live, build: Build, kind: str) -> None:
    client, question = page.asker.client, json.dumps(page.asker.question("match", texts=TEXT))
    assert refusal(client.post(JOIN, content=question, headers={"content-type": kind})) == 415
    assert refusal(client.post(UPLOAD, content=question, headers=JSON)) == 415


@pytest.mark.guard("maskvlm.demo.request_limits:with_headers", gives="args[0]")
def test_what_is_answered_no_other_page_may_read_or_frame(page: Live, build: Build) -> None:
    image = page.asker.image(encoded(noise(), "JPEG") + SCRIPT.encode(), "a.html")["path"]
    for path in ("/", "/config", f"/gradio_api/file={image}", "/nothing"):
        reply = page.asker.client.get(path, headers={"x-forwarded-host": "evil.example"})
        assert "evil.example" not in reply.text
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["cross-origin-opener-policy"] == "same-origin"
        assert (reply.headers["x-frame-options"], reply.headers["x-content-type-options"]) == ("DENY", "nosniff")
        assert "server" not in reply.headers
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("sandbox;") if "file=" in path else "frame-ancestors 'none'" in policy
    reply = page.asker.client.get(f"/gradio_api/file={image}")
    assert reply.headers["content-type"] == "image/jpeg"  # whatever else it is, and whatever it was called


# ---------------------------------------------------------------------- what is asked


@pytest.mark.guard("maskvlm.demo.request_limits:check_url")
@pytest.mark.parametrize(
    "path",
    [
        "/?deep_link=abc",
        "/?x=1",
        "/?__theme=dark&__theme=light",
        "/?__theme=%3Cscript%3E",
        "/config?deep_link=abc",
        "/config?page=x",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/startup-events",
        "/gradio_api/queue/status",
        "/gradio_api/queue/data?session_hash=x&session_hash=y",
        "/gradio_api/queue/data?session_hash=../x",
        "/gradio_api/proxy=http://127.0.0.1:1/a.png",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/a.png",
        "/gradio_api/file=/etc/hostname",
        "/gradio_api/stream/x/y/1/playlist.m3u8",
        "/gradio_api/runs",
        "/gradio_api/token",
        "/gradio_api/call/x/y",
        "/gradio_api/vibe-code",
        "/monitoring/summary",
        "/assets/..%2f..%2froutes.py",
        "/assets/%1b%5b2J",
        "/docs",
        "/openapi.json",
    ],
)
def test_only_what_the_page_needs_is_there(page: Live, build: Build, path: str) -> None:
    assert refusal(page.asker.client.get(path)) in (400, 403, 404)
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE"):
        assert refusal(page.asker.client.request(method, path)) == 405
    for door in ("run/predict", "call/x", "api/x", "component_server", "stream/x", "cancel", "reset", "queue/join/"):
        assert refusal(page.asker.client.post(f"/gradio_api/{door}", json={})) == 405
    assert refusal(page.asker.client.post(f"{JOIN}?x=1", json={})) == 400


class Watched:
    """What this process opened and where it connected to, as far as it bears a mark."""

    def __init__(self) -> None:
        self.mark, self.events = "", list[str]()
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: Any) -> None:
        if self.mark and event in ("open", "socket.connect", "socket.getaddrinfo") and self.mark in str(arguments):
            self.events.append(f"{event} {arguments}")


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


@pytest.fixture
def bait(tmp_path: Path, watched: Watched) -> Iterator[tuple[str, str]]:
    """An address and a file that nobody may touch."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        secret = tmp_path / f"secret-{time.time_ns()}.png"
        secret.write_bytes(GOOD)
        watched.mark, watched.events = secret.name, []
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", str(secret)
        watched.mark = ""
        assert watched.events == []
        with pytest.raises(TimeoutError):
            listener.accept()


def hostile(own: dict[str, Any], url: str, secret: str, base: str) -> list[Any]:
    """What may not stand where an image does, by an upload of the page's own."""
    path, meta = own["path"], own["meta"]
    named = [secret, url, f"file://{secret}", f"{path}/../../../{secret}", f"{path}\x00.png", f"/./{path}", f"{path}/"]
    named += [
        "",
        ".",
        "..",
        "/",
        "a.png",
        "~/a.png",
        "\\\\host\\a.png",
        "data:image/png;base64,AAAA",
        str(Path(path).parent),
    ]
    values: list[Any] = [{"path": each, "meta": meta} for each in (*named, 5, None, [path], {"path": path}, True)]
    values += [own | {"url": each} for each in (url, f"{url}?{path}", f"file://{secret}", "//evil.example", 5)]
    values += [
        own | {"url": f"{each}/gradio_api/file={path}"} for each in ("http://evil.example", "", f"{base}@evil.example")
    ]
    values += [own | {"url": f"{base}/gradio_api/file={secret}"}, own | {"url": f"{base}/gradio_api/file={path}?x"}]
    values += [own | {"orig_name": each} for each in ("../../a.png", "/etc/a.png", "a\\b.png", "x" * 2000, 5)]
    values += [own | {"meta": each} for each in ({}, None, {"_type": "x"}, meta | {"more": 1}, [meta])]
    values += [
        own | {"is_stream": True},
        own | {"is_stream": 1},
        own | {"size": -1},
        own | {"size": "9"},
        own | {"more": 1},
    ]
    name = f"own-{'a' * 64}"  # of one of the page's own images
    values += [{"path": name, "url": url}, {"path": name, "meta": meta}, {"path": f"{name}/../a"}, {"path": f"{name}a"}]
    values += [own | {"data": url}, {"url": url}, {"url": url, "meta": meta}, {"path": path}, {"meta": meta}, {}]
    return [*values, url, secret, path, 5, True, [], [own], {"image": own}, {"value": own, "__type__": "update"}]


@pytest.mark.guard("maskvlm.demo.request_schema:check_upload")
def test_an_image_is_an_upload_of_this_page_and_nothing_else(page: Live, build: Build, bait: tuple[str, str]) -> None:
    url, secret = bait
    own = page.asker.image(GOOD)
    link = page.folder / ("a" * 64) / "a.png"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    before, got = page.question_count, list[Any]()
    for each in [*hostile(own, url, secret, page.base), own | {"path": str(link)}]:
        for part in ("match", "write", "find-like"):
            _, reply = page.asker.join(part, "click", image=each)
            if refusal(reply) not in (400, 403):
                got.append(each)
    assert got == []
    assert page.question_count == before
    assert refusal(page.asker.client.get(f"/gradio_api/file={link}")) == 403
    for extra in ({}, {"url": None, "size": None, "mime_type": None, "orig_name": "my cat.png", "is_stream": False}):
        assert "%" in page.asker.ask("match", image=own | extra, texts=TEXT)
    with_url = own | {"url": f"{page.base}/gradio_api/file={own['path']}"}
    assert "%" in page.asker.ask("match", image=with_url, texts=TEXT)


@pytest.mark.guard("maskvlm.demo.request_schema:check_shape", gives="args[1]")
def test_no_file_and_no_strange_value_stands_elsewhere(page: Live, build: Build, bait: tuple[str, str]) -> None:
    url, secret = bait
    own = page.asker.image(GOOD)
    files = [own, own | {"path": secret}, own | {"path": url}, {"url": url}, [own], {"a": [own]}, [[[own]]]]
    before = page.question_count
    for each in (*files, 5, True, ["x"], {"a": 1}):
        assert refusal(page.asker.join("match", "click", image=None, texts=each)[1]) in (400, 403)
        assert refusal(page.asker.join("find", "click", query=each)[1]) in (400, 403)
    for each in (*files, "x", ["x"], [1.5], [True], [-1], [10**9], list(range(10**4 + 1)), None):
        assert refusal(page.asker.join("chips", "input", image=None, text=TEXT, chips=each)[1]) in (400, 403)
    for each in (*files, "x", 1.5, True, -1, 2, 10**30, None):  # this page has two runs, its own and scenes-tiny
        assert refusal(page.asker.join("examples", "click", {"index": 0}, run=each)[1]) in (400, 403)
    assert page.question_count == before


def test_a_question_has_no_other_keys_and_no_other_shape(page: Live, bait: tuple[str, str]) -> None:
    _, secret = bait
    own, before = page.asker.image(GOOD), page.question_count
    good = page.asker.question("match", image=own, texts=TEXT)
    state = page.asker.question("board", "click", {"index": 1}, image=own, text=TEXT)
    (mask,) = [place for place, each in enumerate(state["data"]) if each is None]
    strange: list[dict[str, Any]] = [
        good | {name: "x"} for name in ("oauth_token", "simple_format", "batched", "event_id")
    ]
    strange += [good | {"session_hash": each} for each in (None, "", "../x", "\x1b[2J", "x" * 41, "x\n", 5)]
    strange += [good | {"fn_index": each} for each in (-1, 10**6, 10**30, "7", None, True, 1.0)]
    strange += [good | {"data": each} for each in ([], None, good["data"][:1], [*good["data"], None], {"0": own}, "x")]
    strange += [
        good | {"event_data": each} for each in (own, {"index": 0, "value": own}, {"index": [0]}, {"index": [0, own]})
    ]
    strange += [
        *(good | {"event_data": {"index": each}} for each in (1e400, 1.5, -1, 2**31, True, "1", None, [1, 1])),
        good | {"event_data": {"index": 0, "value": None, "x": 1}},
    ]
    strange += [good | {"trigger_id": each} for each in ("x", -1, own)]
    strange += [
        state | {"data": [*state["data"][:mask], each, *state["data"][mask + 1 :]]} for each in ([[True]], own, secret)
    ]
    strange += [{}, {"data": []}]
    for each in strange:
        assert refusal(page.asker.client.post(JOIN, content=json.dumps(each), headers=JSON)) in (400, 403), each
    text = json.dumps(good)
    double = text.replace(
        '"path":', f'"path": {json.dumps(secret)}, "path":', 1
    )  # the last counts, here and further on
    assert double != text
    for body in (
        "[" * 10**5,
        '{"a":' * 10**4,
        "9" * 5000,
        "NaN",
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xff",
        b"",
    ):
        assert refusal(page.asker.client.post(JOIN, content=body, headers=JSON)) == 400
    assert page.question_count == before
    assert page.asker.client.post(JOIN, content=double, headers=JSON).status_code == 200
    assert "%" in page.asker.answer(good["session_hash"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["path", "url", "meta", "data", "fn_index", "session_hash", "x"]), inner, max_size=5
            )
        ),
        max_leaves=20,
    ),
    st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_whatever_a_question_is_it_is_understood_or_refused(page: Live, value: Any, place: int) -> None:
    """What is understood names no path but that of the page's own image."""
    own = page.asker.parts[page.asker.ids["image"]]["value"]["path"]
    good = page.asker.question("match", texts=TEXT)
    body = [value, good | {"data": value}, good | {"event_data": value}, good | {"data": [0, value, TEXT]}][place]
    try:
        text = json.loads(page.guard.calls.understood(json.dumps(body).encode(), f"127.0.0.1:{page.port}"))
    except Refused:
        return
    assert set(text) == {"fn_index", "session_hash", "data", "event_data", "trigger_id"}
    assert text["data"][1] in (None, {"path": own})


def test_an_own_image_is_known_by_its_name_and_nothing_is_opened_by_it(page: Live) -> None:
    own = page.asker.parts[page.asker.ids["image"]]["value"]
    assert own["url"].startswith("data:image/png;base64,")
    before = page.uploads
    assert "%" in page.asker.ask("match", texts=TEXT)
    answer = page.asker.ask("match", image={"path": f"own-{'a' * 64}"}, texts=TEXT)
    assert "has expired" in answer
    assert "%" not in answer
    assert page.uploads == before


def test_behind_the_guard_gradio_opens_no_other_file_either(page: Live, tmp_path: Path) -> None:
    """It checks nothing where it is mounted, unless it is told that it was launched."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(GOOD)
    with without("maskvlm.demo.request_schema:check_upload"):
        answer = page.asker.ask("match", image={"path": str(secret), "meta": {"_type": "gradio.FileData"}}, texts=TEXT)
    assert '"success": false' in answer
    assert "%" not in answer


# ---------------------------------------------------------------------- how much, and how long


@pytest.mark.guard("maskvlm.demo.request_limits:check_head_size")
def test_a_body_of_500_megabytes_is_cut_off(page: Live, build: Build) -> None:
    """It may say so beforehand or not."""
    before, sent = page.uploads, 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(500):
            sent += 2**20
            yield bytes(2**20)
        yield b"\r\n--x--\r\n"

    head = {"content-type": "multipart/form-data; boundary=x"}
    for more in ({"content-length": str(500 * 2**20)}, {}):
        with suppress(httpx.TransportError):  # it hangs up while we are still sending
            assert refusal(page.asker.client.post(UPLOAD, content=endless(), headers=head | more)) == 413
        assert page.uploads == before
        assert sent < 80 * 2**20  # what lies in the buffers between us
    assert refusal(page.asker.client.post(JOIN, content=b" " * 2**19, headers=JSON)) == 413


@pytest.mark.guard("maskvlm.demo.request_limits:in_time", gives="args[0]()")
def test_a_slow_body_is_given_up(page: Live, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "BODY_SECONDS", 0.3)
    before, start = page.uploads, time.monotonic()
    for path, kind in ((JOIN, "application/json"), (UPLOAD, "multipart/form-data; boundary=x")):
        with socket.create_connection(("127.0.0.1", page.port), timeout=2) as talk:
            head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {kind}\r\ncontent-length: 100\r\n\r\n"
            talk.sendall(head.encode() + b"--x\r\n")
            assert talk.recv(65536).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start < 2
    assert page.uploads == before


@pytest.mark.guard("maskvlm.demo.connection_timeouts:Hurried.watch")
def test_a_head_that_never_ends_is_given_up(page: Live, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 200 such connections keep all others out."""
    monkeypatch.setattr(connection_timeouts, "HEAD_SECONDS", 0.4)
    first = b"GET /robots.txt HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    for begun in (b"", b"GET / HT", first + b"GET / HTTP/1.1\r\nx: "):
        with socket.create_connection(("127.0.0.1", page.port), timeout=2) as talk:
            talk.sendall(begun)
            assert ends(talk, 1.5, drip=bool(begun))


def ends(talk: socket.socket, seconds: float, drip: bool) -> bool:
    """Whether the other side ends a connection within a time, though a byte comes now and then."""
    talk.settimeout(0.1)
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        try:
            if drip:
                talk.sendall(b"x")
            if not talk.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


@pytest.mark.guard("maskvlm.demo.connection_timeouts:Hurried.pause_writing")
def test_an_answer_that_is_not_read_is_given_up(page: Live, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_timeouts, "READ_SECONDS", 0.3)
    connections = page.server.server_state.connections
    before = set(connections)
    with socket.socket() as talk:
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        talk.connect(("127.0.0.1", page.port))
        talk.sendall(b"GET /config HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 300)
        until(lambda: bool(connections - before))
        until(lambda: not connections - before, 3)


def until(true: Callable[[], bool], seconds: float = 5) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)


@pytest.mark.guard("maskvlm.demo.request_limits:check_open")
def test_pages_that_stay_in_touch_leave_room_for_questions(
    page: Live, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_limits, "MAX_OPEN", 3)
    talks = [socket.create_connection(("127.0.0.1", page.port), timeout=5) for _ in range(5)]
    replies = []
    for talk in talks:
        talk.sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        replies.append(talk.recv(12))
    for talk in talks:
        talk.close()
    assert replies == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 503"] * 2
    until(lambda: page.guard.open == 0)


def test_what_comes_while_the_folder_is_counted_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = upload_store.Shelf(tmp_path, set())

    def slow(folder: Path) -> tuple[int, int]:
        shelf.added = (3, 300)  # as three uploads leave it that end meanwhile
        return 5, 500

    monkeypatch.setattr(upload_store, "held", slow)
    asyncio.run(shelf.check_room())
    assert shelf.held == (8, 800)


@pytest.mark.guard("maskvlm.demo.upload_store:Shelf.check_room", gives="__import__('asyncio').sleep(0)")
def test_a_hundred_uploads_at_once_find_room_or_are_told(
    page: Live, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, size = upload_store.held(page.folder)
    data = encoded(noise(1, 180))
    monkeypatch.setattr(upload_store, "MAX_BYTES", size + 10 * len(data))
    before = page.uploads
    with ThreadPoolExecutor(100) as pool:
        replies = list(
            pool.map(lambda _: httpx.post(page.base + UPLOAD, files={"files": ("a", data)}, timeout=60), range(100))
        )
    try:
        codes = [each.status_code for each in replies]
        assert set(codes) == {200, 503}
        assert {refusal(each) for each in replies if each.status_code == 503} == {503}
        assert codes.count(200) == len(page.uploads - before) <= 11 + upload_store.AT_ONCE
        assert refusal(page.asker.join("write", "click")[1]) == 503
    finally:
        for path in page.uploads - before:
            path.unlink()
    monkeypatch.undo()
    time.sleep(1.1)  # it is counted once a second
    assert "belongs" in page.asker.ask("write").lower()
    assert upload_store.held(page.folder)[0] <= number + 5


@pytest.mark.parametrize("name", ["../../x", "/etc/x.png", "a.html", "..", "\x1b[2J", "x" * 3000, "\u202egnp.exe", ""])
def test_the_name_of_an_upload_is_not_used(page: Live, name: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%b"\r\n\r\n%b\r\n--x--\r\n'
    head = {"content-type": "multipart/form-data; boundary=x"}
    reply = page.asker.client.post(UPLOAD, content=body % (name.encode(), GOOD), headers=head)
    if name == "":  # an empty name is how a browser says that no file was chosen
        assert refusal(reply) == 400 if reply.status_code != 200 else True
        return
    path = Path(reply.json()[0])
    assert (path.parent.parent, path.name, len(path.parent.name)) == (page.folder, "image.png", 64)
    assert path.read_bytes() == GOOD


def test_an_upload_is_one_file_in_one_form(page: Live) -> None:
    before, client = page.uploads, page.asker.client
    part = b'--x\r\nContent-Disposition: form-data; name="%b"; filename="a"\r\n\r\nabc\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\n/etc/passwd\r\n'
    end, head = b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}
    for body in (
        part % b"files" * 2 + end,
        part % b"other" + end,
        field + end,
        part % b"files" + field + end,
        end,
        b"",
        b"x",
    ):
        assert refusal(client.post(UPLOAD, content=body, headers=head)) == 400
    for kind in (
        "multipart/form-data",
        'multipart/form-data; boundary=""',
        "multipart/form-data; charset=x; boundary=y",
    ):
        assert refusal(client.post(UPLOAD, content=part % b"files" + end, headers={"content-type": kind})) == 400
    assert page.uploads == before


def test_of_an_upload_that_breaks_off_nothing_stays(page: Live) -> None:
    """Nor of one that is too large: else 22 of them would fill the folder for good."""
    before = {path for path in page.folder.rglob("*") if path.is_file()}
    head = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9999999\r\n"
    head += b"content-type: multipart/form-data; boundary=x\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", page.port)) as talk:
            talk.sendall(head % UPLOAD.encode())
            talk.sendall(
                b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(3 * 2**20)
            )
    page.asker.image(GOOD)
    until(lambda: len({path for path in page.folder.rglob("*") if path.is_file()} - before) == 1)


def test_uploads_are_removed_and_their_places_too(page: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio.route_utils import delete_files_created_by_app

    path = Path(page.asker.image(GOOD)["path"])
    delete_files_created_by_app(page.guard.calls.blocks, 3600)
    assert path.exists()
    delete_files_created_by_app(page.guard.calls.blocks, 0)
    assert not path.exists()
    assert path.parent.exists()
    monkeypatch.setattr(upload_store, "KEPT_SECONDS", -1)
    upload_store.held(page.folder)
    assert not path.parent.exists()
    assert page.asker.client.get("/").status_code == 200


def test_a_full_disk_is_one_line(page: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page.uploads

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upload_store.shutil, "copyfileobj", full)
    reply = page.asker.upload(GOOD)
    assert (refusal(reply), "No space left" in reply.text) == (507, True)
    assert page.uploads == before


def test_visitors_are_forgotten_one_after_another(page: Live) -> None:
    """Each costs memory until then; Gradio would keep 10,000."""
    holder = page.guard.calls.blocks.state_holder
    assert holder.capacity == 200
    for number in range(205):
        holder[f"visitor{number}"]
    assert len(holder.session_data) <= 201


# ---------------------------------------------------------------------- what is shown


@pytest.mark.guard("html:escape", gives="args[0]")
def test_a_caption_that_is_a_script_is_shown_as_text(page: Live, build: Build) -> None:
    image = page.asker.image(GOOD)
    for answer in (
        page.asker.ask("match", image=image, texts=SCRIPT),
        page.asker.ask("chips", "input", image=image, text="<script>a</script> [MASK]", chips=[0]),
    ):
        assert "&lt;" in answer
        assert "<script" not in answer


@pytest.mark.guard("maskvlm.data.images:_check_size")
def test_a_bomb_is_refused_by_its_header(page: Live, build: Build) -> None:
    size = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)  # more than ours, less than Pillow's own limit
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    blocks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    assert "too large" in page.asker.ask("write", image=page.asker.image(b"\x89PNG\r\n\x1a\n" + b"".join(blocks)))


@pytest.mark.guard("maskvlm.demo.terminal:escaped", gives="args[0]")
def test_no_stranger_moves_the_cursor(
    page: Live, build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback and what the page's code prints, of whatever text."""

    def broken(*_: Any) -> None:
        print("told: \x1b[31m\x07\r\u202e\x9b2J fine é")
        raise RuntimeError("\x1b[2J\x1b]0;taken\x07")

    monkeypatch.setattr("maskvlm.demo.answers.captioned", broken)
    with printable():
        assert "bug" in page.asker.ask("write", image=page.asker.image(GOOD))
    output = "".join(capsys.readouterr())
    assert "\\x1b[31m" in output
    assert "\\x1b]0;taken" in output
    assert "fine é" in output
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(output)


def test_no_request_writes_its_own_line_into_the_log(page: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/gradio_api/file=%0aforged%1b[2J", "/%0d%0aforged", "/assets/%0aforged", "/config?x=%0aforged"):
        refusal(page.asker.client.get(path, headers={"user-agent": "\x1b[2J", "x-forwarded-for": "forged"}))
    refusal(page.asker.client.post(JOIN, content='{"a": "\x1b[2J\\nforged"}', headers=JSON))
    output = "".join(capsys.readouterr())
    assert "forged" not in output
    assert "\x1b" not in output
