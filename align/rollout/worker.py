"""The worker process with vLLM, which :mod:`align.rollout.process` starts. They exchange lines of JSON over a private
pair of sockets.

Weights come as safetensors files, in memory where they fit. The process ends with the one that started it, however
that ended, and at the latest when the socket is closed.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from align.errors import AlignError
from align.signals import end_with

SIGN_OF_LIFE_S = 5.0
"""Seconds between the messages that say that sampling is still running."""


class _Server:
    """Serves requests of the client with one engine."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._said = out, 0.0
        self._engine: Any = None

    def say(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def alive(self) -> None:
        if time.monotonic() - self._said > SIGN_OF_LIFE_S:
            self._said = time.monotonic()
            self.say(alive=True)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request."""
        from align.rollout.engine import Sampling, WeightSource
        from align.rollout.vllm import VllmEngine, VllmSettings

        match request.pop("do"):
            case "open":
                self._engine = VllmEngine(
                    Path(request["folder"]), VllmSettings(**request["settings"]), alive=self.alive
                )
                return {}
            case "generate":
                found = self._engine.generate(request["prompts"], Sampling(**request["sampling"]))
                return {"completions": [[asdict(completion) for completion in answers] for answers in found]}
            case "load":
                self._engine.load_weights(WeightSource(request["version"], lambda: _tensors(request["files"])))
                return {}
        raise ValueError("unknown request")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _tensors(files: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """One at a time, out of safetensors files."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                yield name, tensors.get_tensor(name)


def main() -> None:
    """Serve requests until the client is gone."""
    # A Ctrl-C in the terminal is handled by the process that started this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(int(sys.argv[2]))
    with (
        socket.socket(fileno=int(sys.argv[1])) as connection,
        connection.makefile("r") as requests,
        connection.makefile("w") as out,
    ):
        server = _Server(out)
        try:
            for line in requests:
                try:
                    reply = server.answer(json.loads(line))
                except AlignError as error:
                    reply = {
                        "error": type(error).__name__,
                        "message": error.problems[0].message,
                        "hint": error.problems[0].hint,
                    }
                except Exception as error:  # the client reports any error of vLLM
                    reply = {
                        "error": "EnvironmentFault",
                        "message": f"{type(error).__name__}: {error}"[:2000],
                        "hint": None,
                    }
                server.say(done=True, **reply)
        finally:
            server.close()


if __name__ == "__main__":
    main()
