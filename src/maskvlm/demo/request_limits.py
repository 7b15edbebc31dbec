"""Which requests the page accepts.

Every request passes `Guard` before Gradio sees it. It accepts requests from the page itself only (`request_origin`),
only the paths that the page needs, bodies of bounded size and time, questions that fit a closed schema
(`request_schema`), and files under names of our own (`upload_store`). Anything else is rejected with one line.
"""

import asyncio
import json
import re
import sys
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect

from maskvlm.demo.refusal import App, Message, Receive, Refused, Scope, Send
from maskvlm.demo.request_origin import PASSED, Head, check_host, check_media_type, check_origin, head_of
from maskvlm.demo.request_schema import FILE, Calls, is_of_page
from maskvlm.demo.upload_store import Shelf

MAX_UPLOAD = 12 * 2**20  # bytes of a request that uploads a file
MAX_BODY = 256 * 2**10  # bytes of any other request
BODY_SECONDS = 60.0  # for a request to arrive
MAX_OPEN = 100  # pages that stay connected, each with its own connection

UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
PROGRESS, STAYING = "/gradio_api/upload_progress", "/gradio_api/heartbeat/"
POST = {UPLOAD: "multipart/form-data", JOIN: "application/json"}
GET = {path: set[str]() for path in ("/config", "/favicon.ico", "/manifest.json", "/robots.txt")}
GET |= {"/": {"__theme"}, "/theme.css": {"v"}, "/gradio_api/queue/data": {"session_hash"}, PROGRESS: {"upload_id"}}
"""Paths, and the query parameters that each accepts."""
BELOW = re.compile(r"/(assets|static|svelte)/[\w./-]+|/gradio_api/heartbeat/[0-9A-Za-z]{1,40}", re.ASCII)
VALUE = re.compile(r"[\w-]{0,128}", re.ASCII)

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; frame-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Makes the browser itself reject what is not from here, and not show the page in a frame."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware around the page.

    Args:
        app: the page.
        calls: the questions that it accepts.
        shelf: storage of uploads and results; no other files are ever served.
        served: the address or the name that it listens on.
    """

    def __init__(self, app: App, calls: Calls, shelf: Shelf, served: str) -> None:
        self.app, self.calls, self.shelf, self.served = app, calls, shelf, served
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Start and end of the server, not a visitor.
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        # The page uses no websockets; 1008 means a policy violation.
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            await self.answer(scope, self.check(scope), receive, with_headers(send, scope["path"].startswith(FILE)))
        except Refused as refused:
            await refuse(scope, with_headers(send, False), refused)
        except (asyncio.CancelledError, ClientDisconnect):  # the server stops or the visitor leaves
            return
        except Exception as error:  # the page has already answered with 500
            line = f"{scope['method']} {scope['path'][:80]}: {type(error).__name__}: {error}"
            print(" ".join(line.split())[:300], file=sys.stderr, flush=True)

    def check(self, scope: Scope) -> Head:
        """Check origin, method, path, query, stated size and media type; returns the headers. Raises Refused."""
        # All of this needs only the head, before any of the body is read.
        head = head_of(scope)
        check_host(head, self.served)
        check_origin(scope, head)
        check_url(scope, self.calls)
        # The stated size only allows an early rejection; the bytes that arrive are counted (`counted_body`).
        stated = head.get(b"content-length", b"0")
        if not stated.isdigit():
            raise Refused(400, "The header content-length is wrong.")
        check_head_size(int(stated), most_of(scope))
        check_media_type(scope, head, POST.get(scope["path"], ""))
        return head

    async def answer(self, scope: Scope, head: Head, receive: Receive, send: Send) -> None:
        """Handle uploads here, and pass other requests on to Gradio with the headers that it needs."""
        path = scope["path"]
        if scope["method"] == "POST":
            receive = counted_body(receive, most_of(scope))
        # Gradio never sees an upload.
        if path == UPLOAD:
            stored = await self.shelf.put(scope, receive)
            return await reply(send, 200, b"application/json", json.dumps([stored]).encode())
        if path == PROGRESS:  # an upload is complete once it is answered
            return await reply(send, 200, b"text/event-stream", b'data: {"msg":"done"}\n\n')
        if path == JOIN:
            await self.shelf.check_room()  # for the images of the answer
            body = self.calls.understood(await whole(receive), head[b"host"].decode("latin-1"))
            # The body has changed, and so has its length.
            head, receive = head | {b"content-length": str(len(body)).encode()}, replayed(body, receive)
        passed = [(name, value) for name, value in head.items() if name in PASSED]
        staying = path.startswith(STAYING)
        # Nothing is awaited in between, so no other request can take the free place.
        check_open(self.open + staying)
        self.open += staying
        try:
            await self.app({**scope, "headers": passed}, receive, send)
        finally:
            self.open -= staying


def check_url(scope: Scope, calls: Calls) -> None:
    """Raises Refused: the page does not need this path or method, or the query has more than it needs."""
    path, method = scope["path"], scope["method"]
    if method == "POST":
        allowed = {"upload_id"} if path == UPLOAD else set()
        if path not in POST:
            raise Refused(405, "Method not allowed.")
    elif method not in ("GET", "HEAD"):
        raise Refused(405, "Method not allowed.")
    elif path.startswith(FILE):
        allowed = set()
        if not is_of_page(path.removeprefix(FILE), calls.folder):
            raise Refused(403, "That file does not belong to this page.")
    else:
        allowed = GET.get(path, set())
        # Names may contain dots, but none may lead upwards.
        if path not in GET and (BELOW.fullmatch(path) is None or ".." in path):
            raise Refused(404, "There is no such page.")
    # Blank values are kept, so that the check sees what Gradio would see.
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    names = [name for name, _ in query]
    if len(set(names)) < len(names) or not allowed.issuperset(names) or not all(VALUE.fullmatch(v) for _, v in query):
        raise Refused(400, "Unexpected query parameters.")


def most_of(scope: Scope) -> int:
    """Maximum size of a request's body, in bytes."""
    return MAX_UPLOAD if scope["path"] == UPLOAD else MAX_BODY


def check_head_size(size: int, most: int) -> None:
    """Raises Refused if a body is too large."""
    if size > most:
        limit = f"{most // 2**20} MB" if most >= 2**20 else f"{most // 2**10} KB"
        raise Refused(413, f"That is too large: at most {limit} per request.")


def check_open(count: int) -> None:
    """Raises Refused: so many pages stay connected that questions would find no free connection."""
    if count > MAX_OPEN:
        raise Refused(503, "Too many pages are open at the moment. Try again later.")


def counted_body(receive: Receive, most: int) -> Receive:
    """Counts the pieces of a body, which must all arrive within BODY_SECONDS. Raises Refused: too large or too late."""
    deadline, size, more = asyncio.get_running_loop().time() + BODY_SECONDS, 0, True

    async def counted() -> Message:
        nonlocal size, more
        # After the body, only the end of the connection is awaited, for as long as the answer takes.
        message = await (in_time(receive, deadline) if more else receive())
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        check_head_size(size, most)
        return message

    return counted


async def in_time(receive: Receive, deadline: float) -> Message:
    try:
        return await asyncio.wait_for(receive(), max(0.0, deadline - asyncio.get_running_loop().time()))
    except TimeoutError:
        raise Refused(408, f"That took more than {BODY_SECONDS:.0f} seconds to arrive.") from None


async def whole(receive: Receive) -> bytes:
    """The whole of a small body."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body, and then reports when the client disconnects."""
    once = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        return next(once, None) or await receive()

    return again


def with_headers(send: Send, is_file: bool) -> Send:
    """Adds the security headers to every answer. An uploaded file can run nothing, whatever the browser takes it for.
    No other origin may read an answer."""
    headers = HEADERS | {"content-security-policy": "sandbox; default-src 'none'" if is_file else POLICY}
    more = {name.encode(): value.encode() for name, value in headers.items()}

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            own_headers = [(name.lower(), value) for name, value in message.get("headers", [])]
            # Gradio allows other origins by a rule of its own: its headers for that are dropped.
            own_headers = [(n, v) for n, v in own_headers if n not in more and not n.startswith(b"access-control-")]
            message["headers"] = [*own_headers, *more.items()]
        await send(message)

    return send_with


async def refuse(scope: Scope, send: Send, refused: Refused) -> None:
    """Answer with one line: as JSON to the page's questions, which expect it, as text otherwise."""
    if scope["path"] == JOIN:
        body, kind = json.dumps({"detail": refused.line}).encode(), b"application/json"
    else:
        body, kind = refused.line.encode(), b"text/plain; charset=utf-8"
    # The rest of a rejected body is not read, so the connection is closed.
    await reply(send, refused.status, kind, body, (b"connection", b"close"))


async def reply(send: Send, status: int, kind: bytes, body: bytes, *more: tuple[bytes, bytes]) -> None:
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
