"""What the page takes from strangers, and what not: sizes, times, paths, texts.

Every request passes `Guard` before Gradio sees it: only the paths that the page needs, bodies of bounded size and time,
no address and no file that was not uploaded here. Whatever is refused is refused in one line.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MAX_UPLOAD = 12 * 2**20  # bytes of a request that brings files
MAX_BODY = 256 * 2**10  # bytes of any other
MAX_KEPT = 256 * 2**20  # bytes of all uploads and results that wait for their removal
KEPT_SECONDS = 600  # until an upload or a result is removed
BODY_SECONDS = 60.0  # for a request to arrive

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
GET: tuple[str, ...] = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
GET += tuple(f"/gradio_api/{name}" for name in ("theme.css", "queue/data", "upload_progress", "info", "app_id"))
GET_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
FILE = "/gradio_api/file="
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
POST = (UPLOAD, JOIN, "/gradio_api/cancel", "/gradio_api/reset")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
"""The browser itself refuses what is not from here."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """A request that is not answered: status and one line."""

    def __init__(self, status: int, line: str) -> None:
        self.status, self.line = status, line
        super().__init__(line)


class Guard:
    """ASGI middleware around the page.

    Args:
        app: the page.
        folder: where uploads and results lie; nothing else is ever handed out.
        loopback: answer only to a browser that was pointed at this machine (against rebound names).
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], folder: Path, loopback: bool) -> None:
        self.app, self.folder, self.loopback = app, folder.resolve(), loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self.check(scope)
            if scope["path"] == UPLOAD:
                await self.upload(scope, receive, send)
            else:
                ready = receive if scope["method"] in ("GET", "HEAD") else await self.whole(scope, receive)
                await self.app(scope, ready, with_headers(send, scope["path"].startswith(FILE)))
        except Refused as refused:
            await reply(scope, send, refused)
        except asyncio.CancelledError:  # the server ends while a page is still open
            return
        except Exception as error:  # the page has answered by now, with 500
            told = f"{scope['method']} {scope['path'][:80]}: {type(error).__name__}: {error}"
            print(" ".join(told.split())[:300], file=sys.stderr, flush=True)

    def check(self, scope: Scope) -> None:
        """Raises Refused by host, method, path and stated size."""
        path, method, head = scope["path"], scope["method"], dict(scope["headers"])
        host = head.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.loopback and name not in LOOPBACK:
            raise Refused(421, "This page answers to 127.0.0.1 and localhost only.")
        if method in ("GET", "HEAD"):
            if path.startswith(FILE):
                if not self.inside(path.removeprefix(FILE)):
                    raise Refused(403, "That file is not of this page.")
            elif path not in GET and not path.startswith(GET_BELOW):
                raise Refused(404, "There is no such page.")
        elif method != "POST" or path.rstrip("/") not in POST:
            raise Refused(405, "There is nothing of that kind here.")
        stated = head.get(b"content-length", b"0")
        most = MAX_UPLOAD if path == UPLOAD else MAX_BODY
        if not stated.isdigit() or int(stated) > most:
            raise Refused(413, too_large(most))

    def inside(self, path: str) -> bool:
        """Whether a path leads into the folder of uploads and results."""
        if "\0" in path or len(path) > 4096 or "://" in unquote(path):
            return False
        try:
            return Path(path).resolve().is_relative_to(self.folder)
        except (OSError, RuntimeError, ValueError):
            return False

    async def whole(self, scope: Scope, receive: Receive) -> Receive:
        """Read a small body, check it, and hand it on."""
        body, deadline = bytearray(), asyncio.get_running_loop().time() + BODY_SECONDS
        more = True
        while more:
            message = await in_time(receive, deadline)
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                raise Refused(413, too_large(MAX_BODY))
        self.check_json(bytes(body))
        given = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def again() -> Message:
            return next(given, None) or await receive()

        return again

    def check_json(self, body: bytes) -> None:
        """Raises Refused: no JSON, or it names an address or a file that was not uploaded here. Gradio would fetch the
        one and might read the other."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "That is no JSON.") from None
        for path in paths_of(content):
            if not isinstance(path, str) or not self.inside(path):
                raise Refused(403, "A picture must be uploaded: addresses and paths are not opened.")

    async def upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Files come in pieces, which are counted; what is too much or too late is cut off."""
        if kept(self.folder) > MAX_KEPT:
            raise Refused(503, f"Too many pictures are here at the moment. Try again in {KEPT_SECONDS // 60} minutes.")
        deadline, size, stopped = asyncio.get_running_loop().time() + BODY_SECONDS, 0, list[Refused]()

        async def counted() -> Message:
            nonlocal size
            try:
                message = await in_time(receive, deadline)
            except Refused as refused:
                stopped.append(refused)
                return {"type": "http.disconnect"}
            size += len(message.get("body", b""))
            if size > MAX_UPLOAD:
                stopped.append(Refused(413, too_large(MAX_UPLOAD)))
                return {"type": "http.disconnect"}
            return message

        async def unless_stopped(message: Message) -> None:
            if not stopped:
                await send(message)

        try:
            await self.app(scope, counted, with_headers(unless_stopped, False))
        except Exception:
            if not stopped:
                raise
        if stopped:
            raise stopped[0]


def too_large(most: int) -> str:
    size = f"{most // 2**20} MB" if most >= 2**20 else f"{most // 2**10} KB"
    return f"That is too large: at most {size} at once."


async def in_time(receive: Receive, deadline: float) -> Message:
    try:
        return await asyncio.wait_for(receive(), max(0.0, deadline - asyncio.get_running_loop().time()))
    except TimeoutError:
        raise Refused(408, f"That took more than {BODY_SECONDS:.0f} seconds to arrive.") from None


def paths_of(content: Any) -> Iterator[Any]:
    """What a JSON content names as files: whatever stands under `path`, at any depth."""
    todo = [content]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if one.get("path") is not None:
                yield one["path"]
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def kept(folder: Path) -> int:
    """Bytes of all files in a folder; some may go while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def with_headers(send: Send, is_file: bool) -> Send:
    """A file that somebody uploaded is no page: whatever a browser takes it for, it runs nothing."""
    policy = "sandbox; default-src 'none'" if is_file else POLICY
    more = {b"content-security-policy": policy, b"x-content-type-options": "nosniff", b"referrer-policy": "no-referrer"}

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [pair for pair in message.get("headers", []) if pair[0].lower() not in more]
            message["headers"] = [*others, *((name, value.encode()) for name, value in more.items())]
        await send(message)

    return send_with


async def reply(scope: Scope, send: Send, refused: Refused) -> None:
    """One line: as JSON to the page's questions, which expect it, as text to all else."""
    is_json = scope["path"] == JOIN
    body = (json.dumps({"detail": refused.line}) if is_json else refused.line).encode()
    kind = b"application/json" if is_json else b"text/plain; charset=utf-8"
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    start = {"type": "http.response.start", "status": refused.status, "headers": head}
    await with_headers(send, False)(start)
    await send({"type": "http.response.body", "body": body})
