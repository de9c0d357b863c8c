"""vLLM in a separate process: for models whose transformers classes vLLM would modify while the trainer uses them, and
for training with several processes."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from align import errors
from align.errors import AlignError, EnvironmentFault
from align.rollout.engine import Sample, Sampling, WeightSource
from align.rollout.vllm import VllmSettings
from align.rollout.weight_files import weight_files

PATIENCE_S = 600.0
"""Seconds without a sign of life after which the worker counts as hung."""
_NOT_FOR_THE_WORKER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
"""Beginnings of variables that say how this process meets the others of its run; vLLM would meet them too. With
torchrun's it would wait for a store that is not there."""


def workers_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: without this process's place among others, and with its GPU as the only one.

    vLLM takes the first GPU that it sees, so the engines of eight processes would meet on GPU 0.
    """
    found = {name: value for name, value in environ.items() if not name.startswith(_NOT_FOR_THE_WORKER)}
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        found["CUDA_VISIBLE_DEVICES"] = str(device) if visible is None else visible.split(",")[device].strip()
    return found


class ProcessEngine:
    """A :class:`align.rollout.vllm.VllmEngine` in another process; takes the same arguments.

    Raises:
        EnvironmentFault: the worker does not start, dies, or hangs; the message contains its last output.
    """

    def __init__(self, folder: Path, settings: VllmSettings) -> None:
        self.together = settings.max_sequences
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what this process has freed and keeps is not there for another one
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the engine
        ours, theirs = socket.socketpair()
        environment = workers_environment(os.environ)
        command = [sys.executable, "-m", "align.rollout.worker", str(theirs.fileno()), str(os.getpid())]
        self._child = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()
        self._socket, self._unread = ours, b""
        try:
            self._ask({"do": "open", "folder": str(folder), "settings": asdict(settings)})
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._child.pid

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """See :class:`align.rollout.engine.RolloutEngine`."""
        reply = self._ask(
            {
                "do": "generate",
                "prompts": [[int(i) for i in prompt] for prompt in prompts],
                "sampling": asdict(sampling),
            }
        )
        return [
            [Sample(tuple(c["ids"]), tuple(c["logprobs"]), c["finish_reason"], c["version"]) for c in answers]
            for answers in reply["completions"]
        ]

    def load_weights(self, weights: WeightSource) -> None:
        """See :class:`align.rollout.engine.RolloutEngine`; the weights pass through
        :func:`align.rollout.weight_files.weight_files`."""
        with weight_files(weights) as written:
            self._ask({"do": "load", "files": written, "version": weights.version})

    def close(self) -> None:
        """End the worker: it stops when its socket is closed; if it does not, it is killed."""
        self._socket.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._gone("died") from error
        while True:
            message = self._receive()
            if "done" in message:
                break
        if "error" in message:
            kind: type[AlignError] = getattr(errors, message["error"])
            raise kind(message["message"], hint=message["hint"])
        return message

    def _receive(self) -> dict[str, Any]:
        """The next message of the worker. Waits as long as it gives signs of life."""
        waited_since = time.monotonic()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._socket], [], [], 1.0)
            try:
                part = self._socket.recv(1 << 20) if ready else b""
            except OSError as error:
                raise self._gone("died") from error
            if ready and not part:
                raise self._gone("died")
            self._unread += part
            if part:
                waited_since = time.monotonic()
            elif time.monotonic() - waited_since > PATIENCE_S:
                self._child.kill()
                raise self._gone(f"gave no sign of life for {PATIENCE_S:.0f} s")
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _gone(self, what: str) -> EnvironmentFault:
        try:
            code: int | None = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()
        last = f": {words[-1][:300]}" if words else ""
        if code is None:
            how = ""
        else:
            how = f" (killed by signal {-code})" if code < 0 else f" (exit code {code})"
        return EnvironmentFault(
            f"the vLLM worker {what}{how}{last}", hint="the same command continues from what was saved"
        )
