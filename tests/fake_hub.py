"""A hub on this machine, as much of it as uploading, downloading and asking for a model takes (the client's own HTTP
calls)."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self

COMMIT = "c0ffee" * 6 + "c0ff"
TOKEN = "hf_toytoytoytoytoytoytoytoytoytoytoyto"


class FakeHub:
    """Repositories in memory: `files` of each, by name. Whoever writes must show the token.

    Attributes:
        account: whose the token is, as the hub tells it.
        created: what was asked for each new repository.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, Any]] = {}
        self.account: dict[str, Any] = {
            "name": "ann", "type": "user", "orgs": [{"name": "acme"}], "auth": {"accessToken": {"role": "write"}},
        }  # fmt: skip
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def post(self, path: str, body: bytes) -> Any:
        """The answer to a POST, plain data."""
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            if name not in self.files:
                self.files[name], self.created[name] = {}, request
            return {"url": f"{self.address}/{name}", "name": name, "id": name}
        name, what = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(\w+)/.*", path).groups()  # type: ignore[union-attr]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]}
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}

    def get(self, path: str) -> bytes | None:
        """The answer to a GET; None for what is not there."""
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/\w+)?(/tree/\w+)?", path):
            name = match[1]
            if name not in self.files:
                return None
            if match[3]:
                sizes = ((key, len(value)) for key, value in self.files[name].items())
                return json.dumps([{"type": "file", "path": p, "size": s, "oid": p} for p, s in sizes]).encode()
            record = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": key} for key in self.files[name]]}
            return json.dumps(record).encode()
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.*)", path):
            return self.files.get(match[1], {}).get(match[2])
        return b"{}" if path in ("/", "/api/validate-yaml") else None

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def answer(self, status: int, body: bytes) -> None:
                hub.requests.append(f"{self.command} {self.path} {status}")
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                if status == 404:
                    known = self.path.partition("/resolve/")[0].strip("/") in hub.files
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                if path == "/api/validate-yaml":
                    self.answer(200, b'{"errors": [], "warnings": []}')
                elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.answer(401, b'{"error": "Invalid username or password."}')
                else:
                    self.answer(200, json.dumps(hub.post(path, body)).encode())

            def do_GET(self) -> None:
                if self.path == "/api/whoami-v2":
                    known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                    body = json.dumps(hub.account if known else {"error": "Invalid credentials"}).encode()
                    self.answer(200 if known else 401, body)
                    return
                body = hub.get(self.path.partition("?")[0])
                self.answer(404 if body is None else 200, body or b"")

            do_HEAD = do_GET

        return Handler
