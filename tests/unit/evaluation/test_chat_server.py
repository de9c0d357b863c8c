"""The client of a judge against a server on loopback that fails in every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.errors import EnvironmentFault, InputError
from align.evaluation.chat_server import ChatServer, Usage
from align.recipe.kinds.judge import Judge
from tests.support.chat_server import Reply, Server, serving


def judge(server: Server, **options: Any) -> Judge:
    return Judge.model_validate(
        {"endpoint": server.endpoint, "model": "m", "retries": 2, "requests_at_once": 1, **options}
    )


def ask(
    server: Server,
    cache: Path,
    *questions: str,
    pauses: list[float] | None = None,
    read: Callable[[str], Any] = str,
    **options: Any,
) -> tuple[list[Any], Usage]:
    client = ChatServer(judge(server, **options), cache, sleep=(pauses if pauses is not None else []).append)
    try:
        return client.ask(questions, read, lambda count: None)
    finally:
        client.close()


def test_replies_come_in_order_and_are_kept_by_content(tmp_path: Path) -> None:
    with serving(lambda question, before: Reply(f"re: {question}")) as server:
        found, usage = ask(server, tmp_path, "a", "b", "c", requests_at_once=3)
        assert found == ["re: a", "re: b", "re: c"] and usage == Usage(3, 0, 0, 300, 30)
        found, usage = ask(server, tmp_path, "c", "a", "d")
        assert found == ["re: c", "re: a", "re: d"] and len(server.requests) == 4
        assert usage == Usage(3, 2, 0, 300, 30), "what the cache gives counts as well: it is what the result took"
        ask(server, tmp_path, "a", temperature=0.5)
        assert len(server.requests) == 5, "another temperature is another question"
        assert server.requests[0] | {"messages": 0} == {
            "model": "m",
            "messages": 0,
            "temperature": 0.0,
            "max_tokens": 1024,
        }


def test_the_same_question_is_asked_and_counted_once(tmp_path: Path) -> None:
    with serving(lambda question, before: Reply(f"re: {question}")) as server:
        found, usage = ask(server, tmp_path, "a", "b", "a", "a", requests_at_once=4)
    assert (
        found == ["re: a", "re: b", "re: a", "re: a"] and len(server.requests) == 2 and usage == Usage(2, 0, 0, 200, 20)
    )


def test_a_damaged_reply_in_the_cache_is_asked_for_again(tmp_path: Path) -> None:
    with serving(lambda question, before: Reply("x")) as server:
        ask(server, tmp_path, "a")
        (kept,) = (path for path in tmp_path.iterdir() if "note" not in path.name)
        kept.write_text('{"text": "x"')
        assert ask(server, tmp_path, "a")[0] == ["x"] and len(server.requests) == 2


@pytest.mark.parametrize(
    "failure",
    [Reply(status=500), Reply(status=429), Reply(body=b"<html>"), Reply(body=b'{"choices": []}'), Reply(body=b"[1]")],
)
def test_failures_that_may_pass_are_tried_again_with_growing_pauses(failure: Reply, tmp_path: Path) -> None:
    pauses: list[float] = []
    with serving(lambda question, before: failure if before < 2 else Reply("at last")) as server:
        assert ask(server, tmp_path, "a", pauses=pauses)[0] == ["at last"]
    assert pauses == [1.0, 2.0]


def test_the_server_says_how_long_to_wait_within_bounds(tmp_path: Path) -> None:
    pauses: list[float] = []
    waits = ["7", "100000", "Wed, 21 Oct 2026 07:28:00 GMT", "-3", "nan"]
    with serving(
        lambda q, n: Reply(status=429, headers={"retry-after": waits[n]}) if n < len(waits) else Reply("x")
    ) as server:
        ask(server, tmp_path, "a", pauses=pauses, retries=5)
    assert pauses == [7.0, 60.0, 4.0, 8.0, 16.0]


def test_a_failure_that_stays_ends_the_run_and_keeps_what_there_is(tmp_path: Path) -> None:
    with serving(lambda question, before: Reply(status=503) if question == "b" else Reply("x")) as server:
        with pytest.raises(
            EnvironmentFault, match=r"failed 3 times, the last time with status 503; replies so far are kept"
        ):
            ask(server, tmp_path, "a", "b")
        assert sum(one["messages"][0]["content"] == "b" for one in server.requests) == 3
        assert ask(server, tmp_path, "a")[1].from_cache == 1


def test_a_timeout(tmp_path: Path) -> None:
    with (
        serving(lambda question, before: Reply("x", wait=2.5)) as server,
        pytest.raises(EnvironmentFault, match=r"no reply within 1 s"),
    ):
        # Long enough that the server notes the request, however busy the machine
        ask(server, tmp_path, "a", timeout_s=1, retries=1)
    assert len(server.requests) == 2


def test_nobody_is_there(tmp_path: Path) -> None:
    with serving(lambda question, before: Reply("x")) as server:
        pass
    with pytest.raises(EnvironmentFault, match=r"no connection \(ConnectError\)"):
        ask(server, tmp_path, "a")


def test_a_refusal_is_told_at_once_and_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(lambda question, before: Reply(status=401, body=b"wrong key sk-secret")) as server:
        with pytest.raises(InputError, match=r"refuses: status 401: wrong key \.\.\.; check judge\.endpoint") as caught:
            ask(server, tmp_path, "a", key_env="MY_KEY")
        assert len(server.requests) == 1 and server.keys == ["Bearer sk-secret"]
    assert "sk-secret" not in str(caught.value)
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    """It would carry the key elsewhere."""
    elsewhere = Reply(status=307, headers={"location": "http://127.0.0.1:1/"})
    with serving(lambda question, before: elsewhere) as server, pytest.raises(InputError, match="status 307"):
        ask(server, tmp_path, "a")


def test_without_a_key_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with (
        serving(lambda question, before: Reply("x")) as server,
        pytest.raises(EnvironmentFault, match="MY_KEY holds no key"),
    ):
        ask(server, tmp_path, "a", key_env="MY_KEY")
    assert not server.requests


def test_replies_that_cannot_be_read_are_asked_for_again_then_counted(tmp_path: Path) -> None:
    def number(text: str) -> int | None:
        return int(text) if text.isdigit() else None

    with serving(lambda q, before: Reply("?" if q == "never" or before < 1 else "5")) as server:
        found, usage = ask(server, tmp_path, "soon", "never", read=number)
        assert found == [5, None] and usage == Usage(5, 0, 1, 500, 50)
        again = ask(server, tmp_path, "soon", "never", read=number)
        assert again == ([5, None], Usage(5, 5, 1, 500, 50)) and len(server.requests) == 5


def test_cost_is_of_the_recipes_prices_or_not_told(tmp_path: Path) -> None:
    with serving(lambda question, before: Reply("x")) as server:
        usage = ask(server, tmp_path, "a", "b")[1]
        # 200 input tokens at 3 and 20 output tokens at 15 a million
        assert usage.cost(judge(server, price_input=3.0, price_output=15.0)) == pytest.approx((200 * 3 + 20 * 15) / 1e6)
        assert usage.cost(judge(server)) is None
