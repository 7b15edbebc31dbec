"""The page's guards: around a toy in this process, and, in the slow tests, around the real Gradio on a real port."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("gradio") is None:
    pytest.skip("gradio is not installed (pip install -e .[demo])", allow_module_level=True)

import gradio as gr
from live_page import GOOD, JSON, Live, live
from starlette.testclient import TestClient
from watching import watched

from maskvlm.demo import connection_timeouts, request_limits, request_schema, upload_store
from maskvlm.demo.refusal import Refused
from maskvlm.demo.request_limits import Guard, check_open, counted_body
from maskvlm.demo.request_origin import check_host, head_of, is_own
from maskvlm.demo.request_schema import Calls
from maskvlm.demo.terminal import printable
from maskvlm.demo.upload_store import Shelf

JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
HOST = "127.0.0.1:7860"
FORM = {"content-type": "multipart/form-data; boundary=x"}


class Toy:
    """A page that keeps what reaches it, behind the guard. image: one that was uploaded."""

    def __init__(self, folder: Path) -> None:
        self.reached: list[tuple[str, dict[str, str], bytes]] = []
        choice = gr.Dropdown(["x", "y"], type="index")
        inputs = [gr.Image(), gr.Textbox(), gr.CheckboxGroup(["a", "b"]), choice, gr.State()]
        self.calls = Calls(SimpleNamespace(fns={7: SimpleNamespace(inputs=inputs)}), folder)  # type: ignore[arg-type]
        self.folder, self.known = folder, set[str]()
        self.guard = Guard(self.answer, self.calls, Shelf(folder, self.known), "127.0.0.1")
        self.client = TestClient(self.guard, base_url=f"http://{HOST}")
        (path,) = self.upload(GOOD).json()
        self.image = {"path": path, "meta": {"_type": "gradio.FileData"}}

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
        head = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.reached.append((scope["path"], head, body))
        start = {"type": "http.response.start", "status": 200, "headers": [(b"access-control-allow-origin", b"*")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"fine"})

    def upload(self, data: bytes, name: str = "a.png", **more: Any) -> Any:
        return self.client.post(UPLOAD, files={"files": (name, data)}, **more)

    @property
    def uploads(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if path.is_file()}

    def question(self, image: Any = ..., **more: Any) -> dict[str, Any]:
        data = [self.image if image is ... else image, "a red circle", [0], 1, None]
        return {"fn_index": 7, "session_hash": "s1", "data": data, "event_data": None} | more

    def refuses(self, question: Any) -> bool:
        """Whether a question is refused, and without a deed."""
        with watched() as deeds:
            try:
                self.calls.understood(json.dumps(question).encode(), HOST)
            except Refused as refused:
                return refused.status in (400, 403) and not deeds
        return False


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    (tmp_path / "own").mkdir()
    return Toy(tmp_path / "own")


def refusal(reply: Any) -> int:
    """The status of a refusal, which is one line and lets no other origin read it."""
    assert 400 <= reply.status_code < 600, reply.text[:200]
    assert len(reply.text.splitlines()) <= 1 < 200 > len(reply.text)
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    status: int = reply.status_code
    return status


# ---------------------------------------------------------------------- who asks


@pytest.mark.parametrize("head", [
    {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": ""}, {"origin": "http://127.0.0.1:1"},
    {"origin": f"http://{HOST}@evil.example"}, {"origin": f"http://{HOST} http://evil.example"},
    {"origin": f"http://{HOST}", "sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
    {"referer": f"http://evil.example/{HOST}"}, {"referer": "http://["},
], ids=str)  # fmt: skip
def test_another_page_gets_nothing(toy: Toy, head: dict[str, str]) -> None:
    """By any door: questions, uploads, images, answers, settings, preflights, frames."""
    before, image, question = toy.uploads, toy.image["path"], json.dumps(toy.question())
    replies = [
        toy.client.post(JOIN, content=question, headers=head | JSON),
        toy.upload(GOOD, headers=head),
        toy.client.options(JOIN, headers=head | {"access-control-request-method": "POST"}),
        *(toy.client.get(path, headers=head) for path in ("/config", f"/gradio_api/file={image}")),
        toy.client.get("/gradio_api/queue/data?session_hash=x", headers=head),
        toy.client.get("/", headers=head | {"sec-fetch-mode": "no-cors"}),
        toy.client.get("/", headers=head | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}),
    ]
    assert {refusal(each) for each in replies} == {403}
    assert (toy.uploads, toy.reached) == (before, [])


@pytest.mark.parametrize("head", [
    {}, {"origin": f"HTTP://{HOST}"}, {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"},
    {"origin": "http://localhost:7860", "host": "LOCALHOST:7860"}, {"sec-fetch-site": "none"},
    {"referer": f"http://{HOST}/"},
], ids=str)  # fmt: skip
def test_the_page_itself_and_programs_are_answered(toy: Toy, head: dict[str, str]) -> None:
    """Without the headers that Gradio does not need."""
    more = {"x-forwarded-host": "evil.example", "cookie": "a=b", "range": "bytes=0-"}
    assert toy.client.post(JOIN, content=json.dumps(toy.question()), headers=head | JSON | more).status_code == 200
    assert toy.client.get("/config", headers=head).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert toy.client.get("/", headers=link | {"referer": "http://elsewhere.example/"}).status_code == 200
    _, passed, body = toy.reached[0]
    assert not {*more, "origin", "referer"} & passed.keys()
    assert json.loads(body)["data"] == toy.question()["data"]
    assert int(passed["content-length"]) == len(body)


HOSTS = {
    "127.0.0.1": (["localhost", HOST], ["evil.example:7860", "127.0.0.1.evil.example", "192.168.0.7:1"]),
    "0.0.0.0": (["192.168.0.7:7860"], ["evil.example:7860", "192.168.0.7.evil.example", "", "[x]:1"]),
    "gpu.lab": (["GPU.lab:1"], ["other.lab:1"]),
}


def test_hosts_and_origins() -> None:
    """A name that may have been rebound is refused; only an address of this machine, or its name, is its own."""
    for served, (fine, wrong) in HOSTS.items():
        for host in fine:
            check_host({b"host": host.encode()}, served)
        for host in wrong:
            with pytest.raises(Refused):
                check_host({b"host": host.encode()}, served)
    for text in ("null", f"file://{HOST}", f"http://{HOST}.evil.example", f"http://evil#{HOST}", "http://127.0.0.1"):
        assert not is_own(text, HOST)
    assert is_own("http://gpu", "gpu:80")
    assert not is_own("https://gpu", "gpu:80")
    for name in (b"host", b"origin", b"content-length"):
        with pytest.raises(Refused):  # two readers could use different values
            head_of({"headers": [(name, b"1"), (name, b"2")]})


def test_what_is_answered_no_other_page_may_read_or_frame(toy: Toy) -> None:
    for path in ("/", f"/gradio_api/file={toy.image['path']}", "/nothing"):
        head = toy.client.get(path).headers
        assert (head["cross-origin-resource-policy"], head["cross-origin-opener-policy"]) == ("same-origin",) * 2
        assert (head["x-frame-options"], head["x-content-type-options"]) == ("DENY", "nosniff")
        policy = head["content-security-policy"]
        assert policy.startswith("sandbox;") if "file=" in path else "frame-ancestors 'none'" in policy
        assert "access-control-allow-origin" not in head


# ---------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("path", [
    "/?x=1", "/?__theme=dark&__theme=light", "/?__theme=%3Cscript%3E", "/config?page=x", "/gradio_api/info",
    "/gradio_api/queue/data?session_hash=../x", "/gradio_api/proxy=http://127.0.0.1:1/a.png",
    "/gradio_api/file=http://127.0.0.1:1/a.png", "/gradio_api/file=/etc/hostname", "/gradio_api/call/x/y",
    "/monitoring/summary", "/assets/..%2f..%2froutes.py", "/assets/%1b%5b2J", "/docs",
])  # fmt: skip
def test_only_what_the_page_needs_is_there(toy: Toy, path: str) -> None:
    assert refusal(toy.client.get(path)) in (400, 403, 404)
    assert {refusal(toy.client.request(method, path)) for method in ("POST", "PUT", "DELETE", "TRACE")} == {405}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", ""):
        assert refusal(toy.client.post(JOIN, content=json.dumps(toy.question()), headers={"content-type": kind})) == 415
    assert refusal(toy.client.post(UPLOAD, content=b"x", headers=JSON)) == 415
    assert toy.reached == []


def test_an_image_is_an_upload_of_this_page_and_nothing_else(toy: Toy, tmp_path: Path) -> None:
    own, secret, url = toy.image, tmp_path / "secret.png", "http://127.0.0.1:9/a.png"
    secret.write_bytes(GOOD)
    link = toy.folder / ("a" * 64) / "a.png"
    link.parent.mkdir()
    link.symlink_to(secret)
    path, name, served = own["path"], f"own-{'a' * 64}", f"http://{HOST}/gradio_api/file="
    changes: dict[str, list[Any]] = {
        "path": [
            str(secret),
            str(link),
            url,
            f"file://{secret}",
            f"{path}/../{secret}",
            f"{path}\x00",
            f"{path}/",
            "..",
        ],
        "url": [
            url,
            f"{url}?{path}",
            f"file://{secret}",
            "//evil.example",
            5,
            f"{served}{secret}",
            f"{served}{path}?x",
        ],
        "orig_name": ["../a"],
        "meta": [{}, None],
        "is_stream": [True],
        "more": [1],
    }
    values: list[Any] = [own | {key: each} for key, listed in changes.items() for each in listed]
    values += [{"path": f"{name}/../a"}, {"path": name, "url": url}, {"url": url}, {"path": path}, {}, path, [own]]
    for value in values:
        assert toy.refuses(toy.question(value)), value
    assert refusal(toy.client.get(f"/gradio_api/file={link}")) == 403
    for good in (None, {"path": name}, own | {"url": f"{served}{path}", "orig_name": "my cat.png"}):
        body = toy.calls.understood(json.dumps(toy.question(good)).encode(), HOST)
        assert json.loads(body)["data"][0] in (None, {"path": name}, own)  # the path alone


def test_a_question_has_no_other_keys_and_no_other_shape(toy: Toy) -> None:
    own, data = toy.image, toy.question()["data"]
    assert not toy.refuses(toy.question())
    wrong: list[list[Any]] = [[own, 5], [own, "x", [-1], [1.5], [10**9]], [own, 2, "x", True, None], [own, "x"]]
    for place, values in enumerate(wrong, 1):  # no file and no strange value stands elsewhere
        for value in values:
            assert toy.refuses(toy.question(data=[*data[:place], value, *data[place + 1 :]])), (place, value)
    strange: dict[str, list[Any]] = {
        "session_hash": [None, "", "../x", "x" * 41, "x\n"],
        "fn_index": [-1, 8, 10**30, "7", None, True],
        "data": [[], None, data[:1], [*data, None], {"0": own}],
        "event_data": [own, {"index": 0, "value": own}, {"index": 1.5}, {"index": -1}, {"index": 0, "x": 1}],
        "oauth_token": ["x"],
    }
    for key, values in strange.items():
        assert all(toy.refuses(toy.question(**{key: value})) for value in values), key
    for body in (b"[" * 10**5, b"9" * 5000, b"NaN", b"\xff", b"", b"{}"):
        assert refusal(toy.client.post(JOIN, content=body, headers=JSON)) == 400
    # The last of two keys counts, here and further on: what was checked is what is passed on.
    double = json.dumps(toy.question()).replace('"path":', '"path": "/etc/passwd", "path":', 1)
    assert b"passwd" not in toy.calls.understood(double.encode(), HOST)


# ---------------------------------------------------------------------- how much, and how long


def test_a_body_is_bounded_in_size_and_time(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may say its size beforehand or not."""
    before = toy.uploads
    large = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + bytes(13 * 2**20)
    for content in (large, iter([large[:1000], large[1000:]])):
        assert refusal(toy.client.post(UPLOAD, content=content, headers=FORM)) == 413
    assert refusal(toy.client.post(JOIN, content=b" " * 2**19, headers=JSON)) == 413
    assert refusal(toy.client.post(JOIN, content=b"{}", headers=JSON | {"content-length": "-1"})) == 400
    assert toy.uploads == before
    monkeypatch.setattr(request_limits, "BODY_SECONDS", 0.01)

    async def slow() -> Any:
        return await counted_body(lambda: asyncio.sleep(9), 100)()  # type: ignore[arg-type]

    with pytest.raises(Refused) as caught:
        asyncio.run(slow())
    assert caught.value.status == 408
    check_open(request_limits.MAX_OPEN)
    with pytest.raises(Refused):
        check_open(request_limits.MAX_OPEN + 1)


def test_the_name_of_an_upload_is_not_used(toy: Toy) -> None:
    for name in ("../../../evil.png", "/etc/evil.png", "a" * 300, "\u202egnp.exe", "CON", "x\x1b[2J.html"):
        path = Path(toy.upload(GOOD, name).json()[0])
        assert (path.parent.parent, path.name, len(path.parent.name)) == (toy.folder, "image.png", 64)
        assert path.read_bytes() == GOOD
        assert str(path) in toy.known  # so that Gradio removes it


def test_an_upload_is_one_file_in_one_form(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = toy.uploads
    part = b'--x\r\nContent-Disposition: form-data; name="%b"; filename="a"\r\n\r\nabc\r\n'
    field, end = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\n/etc/passwd\r\n', b"--x--\r\n"
    wrong = (part % b"files" * 2 + end, part % b"other" + end, field + end, part % b"files" + field + end, end, b"x")
    for body in wrong:
        assert refusal(toy.client.post(UPLOAD, content=body, headers=FORM)) == 400

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(upload_store.shutil, "copyfileobj", full)
        assert refusal(toy.upload(GOOD)) == 507
    monkeypatch.setattr(upload_store, "MAX_FILES", 1)
    assert [toy.upload(GOOD).status_code for _ in range(3)] == [200, 503, 503]
    assert refusal(toy.client.post(JOIN, content=json.dumps(toy.question()), headers=JSON)) == 503
    assert len(toy.uploads) == len(before) + 1
    monkeypatch.setattr(upload_store, "KEPT_SECONDS", -1)  # an empty place goes
    Path(toy.image["path"]).unlink()
    assert upload_store.held(toy.folder)[0] == 1
    assert not Path(toy.image["path"]).parent.exists()


def test_no_stranger_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    with printable():
        print("told: \x1b[31m\x07\r\u202e\x9b2J fine é")
    output = capsys.readouterr().out
    assert "\\x1b[31m" in output
    assert "fine é" in output
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(output)


# ---------------------------------------------------------------------- the real page on a real port


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("page")) as served:
        yield served


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)


@pytest.mark.slow
def test_behind_the_guard_gradio_opens_no_other_file_either(
    page: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It checks nothing where it is mounted, unless it is told that it was launched."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(GOOD)
    image = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    with watched() as deeds:
        assert page.asker.ask("match", image=image, texts="a red circle").startswith("403 ")
        assert refusal(page.asker.client.get(f"/gradio_api/file={secret}")) == 403
        monkeypatch.setattr(request_schema, "check_upload", lambda *_: None)
        answer = page.asker.ask("match", image=image, texts="a red circle")
    assert '"success": false' in answer
    assert f"read {secret}" not in deeds


@pytest.mark.slow
def test_connections_that_stand_still_are_given_up(page: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 200 of them keep all others out: a head that never ends, a body, an answer that nobody reads."""
    monkeypatch.setattr(connection_timeouts, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connection_timeouts, "READ_SECONDS", 0.3)
    monkeypatch.setattr(request_limits, "BODY_SECONDS", 0.3)
    connections = page.server.server_state.connections
    whole = b"GET /config HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    body = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    for begun in (b"", b"GET / HT", whole + b"GET / HTTP/1.1\r\nx: ", body % JOIN.encode(), whole * 300):
        before = set(connections)
        with socket.socket() as talk:
            talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            talk.connect(("127.0.0.1", page.port))
            talk.sendall(begun)
            until(lambda: bool(connections - before))  # noqa: B023
            until(lambda: not connections - before)  # noqa: B023
