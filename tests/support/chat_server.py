"""A server on loopback that speaks OpenAI's chat interface and answers from a script."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request."""

    text: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Instead of a reply of OpenAI's form."""
    wait: float = 0.0


@dataclass
class Server:
    """A running server and what it was asked."""

    endpoint: str
    requests: list[dict[str, Any]]
    keys: list[str | None]


@contextmanager
def serving(answer: Callable[[str, int], Reply]) -> Iterator[Server]:
    """``answer`` gets the question and how often that question was asked before."""
    requests: list[dict[str, Any]] = []
    keys: list[str | None] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            question = asked["messages"][0]["content"]
            with lock:
                before = sum(one["messages"] == asked["messages"] for one in requests)
                requests.append(asked)
                keys.append(self.headers.get("authorization"))
            reply = answer(question, before)
            time.sleep(reply.wait)
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            body = (
                reply.body or json.dumps({"choices": [{"message": {"content": reply.text}}], "usage": usage}).encode()
            )
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the client has given up
                pass

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_address[1]}/v1", requests, keys)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
