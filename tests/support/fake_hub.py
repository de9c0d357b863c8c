"""A hub on this machine that takes models: the few calls that creating a repository and committing to it make."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was created and committed, and how requests are answered."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.refusal: int | None = None
        """Answer everything with this status."""
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON value."""
        self.requests.append(f"{method} {path}")
        if self.refusal is not None:
            return self.refusal, {"error": "not for you"}
        parts = path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        name = "/".join(parts[2:4])
        if parts[:2] != ["api", "models"] or name not in self.private:
            return 404, {"error": "Repository not found"}
        if parts[4:5] == ["preupload"]:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if parts[4:5] == ["commit"]:
            return self._commit(name, body)
        return 200, {"id": name, "private": self.private[name]}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.private:
            return 409, {"error": "exists", "url": f"{self.address}/{name}"}
        self.private[name], self.files[name] = (
            wanted.get("visibility") == "private" or wanted.get("private") is True,
            {},
        )
        return 200, {"url": f"{self.address}/{name}"}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1", "success": True}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """``hub`` behind a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body)
            payload = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = _serve

        def log_message(self, format: str, *values: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
