"""The judge's client against vLLM's own server: a tiny model cannot judge, but it is asked, and answers and counts as a
real one."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from align.evaluation.chat_server import ChatServer, Usage
from align.recipe.kinds.judge import Judge
from tests.support.saved import save_tiny
from tests.support.tokenizers import chatml

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")]

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    # vLLM's attention on a CPU wants heads of at least 32, and never samples an id that has no token.
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(chatml())}
    save_tiny(folder / "judge", max_position_embeddings=1024, **shape)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "judge"),
        "--served-model-name",
        "judge",
    ]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-num-seqs", "4", "--enforce-eager"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=log, stderr=log, start_new_session=True)
    try:
        while not _is_there(int(port)):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def _is_there(port: int) -> bool:
    # Through no proxy, whatever the environment says
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(
    judge: Judge, cache: Path, questions: list[str], read: Callable[[str], str | None]
) -> tuple[list[str | None], Usage]:
    with closing(ChatServer(judge, cache)) as server:
        return server.ask(questions, read, done=lambda count: None)


def test_questions_are_answered_and_counted(endpoint: str, tmp_path: Path) -> None:
    judge = Judge(endpoint=endpoint, model="judge", max_tokens=8, price_input=1.0, price_output=2.0)
    questions = ["Which is better, A or B?", "哪个更好？", "Which is better, A or B?"]
    replies, usage = ask(judge, tmp_path, questions, lambda text: text)
    assert replies[0] == replies[2] and None not in replies
    assert usage.replies == 2 and usage.unreadable == 0, "the same question is asked once"
    assert usage.input_tokens > 20 and usage.output_tokens == 16
    assert usage.cost(judge) == pytest.approx((usage.input_tokens + 32) / 1e6)
    again, kept = ask(judge, tmp_path, questions, lambda text: text)
    assert again == replies and kept.from_cache == 2


def test_a_reply_without_a_verdict_is_asked_for_again_and_counted(endpoint: str, tmp_path: Path) -> None:
    judge = Judge(endpoint=endpoint, model="judge", max_tokens=8)
    replies, usage = ask(judge, tmp_path, ["A or B?"], lambda text: None)
    assert replies == [None] and usage.unreadable == 1
