"""Asking a language model on an OpenAI-compatible server. Replies are cached by content, failures are retried, and
tokens are counted."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from align import files, sealed
from align.data.strict_json import clip
from align.errors import EnvironmentFault, InputError, Interrupted
from align.recipe.kinds.judge import Judge
from align.signals import stop_requested

T = TypeVar("T")

LONGEST_PAUSE_S = 60.0
_PASSING = frozenset({408, 409, 425, 429})
"""Status codes, besides 5xx, of failures that may be temporary."""


@dataclass(frozen=True)
class Usage:
    """Counts of the replies to some questions, whether they were requested now or found in the cache."""

    replies: int = 0
    from_cache: int = 0
    unreadable: int = 0
    """Number of questions without a readable reply."""
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def cost(self, judge: Judge) -> float | None:
        """The cost in the currency of the judge's prices; None without prices."""
        if judge.price_input is None or judge.price_output is None:
            return None
        return (self.input_tokens * judge.price_input + self.output_tokens * judge.price_output) / 1e6


@dataclass(frozen=True)
class _Reply:
    text: str
    input_tokens: int
    output_tokens: int


def key_of(judge: Judge) -> str | None:
    """The key in the environment variable that ``judge`` names; None when it names none. Raises EnvironmentFault when
    it is not set."""
    if judge.key_env is None:
        return None
    key = os.environ.get(judge.key_env, "").strip()
    if not key:
        raise EnvironmentFault(
            f"the environment variable {judge.key_env} holds no key", hint="set it, or name another in judge.key_env"
        )
    return key


class ChatServer:
    """The server that ``judge`` describes.

    Args:
        cache: folder of replies, named by a digest of everything that they depend on. A reply in it is not requested
            again.
        sleep: called with the seconds to wait between attempts. By default the wait ends early once another request has
            failed for good.

    Raises:
        EnvironmentFault: the key is not set, or httpx is not installed.
    """

    def __init__(self, judge: Judge, cache: Path, *, sleep: Callable[[float], object] | None = None) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise EnvironmentFault(
                "a judge needs the Python package httpx", hint="pip install 'alignkit[eval]'"
            ) from error
        self._judge = judge
        self._cache = cache
        self._httpx = httpx
        self._failed = threading.Event()
        self._sleep = sleep or self._failed.wait
        self._counted: set[Path] = set()
        self.unread: dict[str, str] = {}
        """Questions without a readable reply, each with the last reply, which is untrusted text."""
        self._key = key_of(judge)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        proxies = urlsplit(judge.endpoint).scheme == "https"  # requests to this machine do not go through a proxy
        self._client = httpx.Client(headers=headers, timeout=judge.timeout_s, follow_redirects=False, trust_env=proxies)

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def ask(
        self, questions: Sequence[str], read: Callable[[str], T | None], done: Callable[[int], None]
    ) -> tuple[list[T | None], Usage]:
        """The result of ``read`` for the reply to each question, in order, and the counts, to which every reply
        contributes once.

        A question whose reply cannot be read (``read`` returns None) is asked again, at most ``judge.retries`` times.
        ``done`` is called with how many questions were just finished.

        Raises:
            InputError: the server refuses the request.
            EnvironmentFault: it does not answer, or keeps failing. Replies so far are kept.
            Interrupted: a signal asked to stop.
        """
        answers: dict[str, T | None] = {}
        times = Counter(questions)
        usage = Usage()
        with ThreadPoolExecutor(self._judge.requests_at_once) as pool:
            asked = {question: pool.submit(partial(self._ask, question, read)) for question in times}
            try:
                for question, one in asked.items():
                    answers[question], took = one.result()
                    usage = usage + took
                    done(times[question])
            except BaseException:
                self._failed.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [answers[question] for question in questions], usage

    def _ask(self, question: str, read: Callable[[str], T | None]) -> tuple[T | None, Usage]:
        judge = self._judge
        body = {
            "model": judge.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
        }
        usage, last = Usage(), ""
        for attempt in range(judge.retries + 1):
            path = self._cache / f"{files.digest_json([judge.endpoint, body, attempt])[:40]}.json"
            known = _known(path)
            reply = known or self._request(body)
            if known is None:
                sealed.keep(path, files.dump_json(vars(reply)).encode())
            if path not in self._counted:
                self._counted.add(path)
                usage = usage + Usage(1, int(known is not None), 0, reply.input_tokens, reply.output_tokens)
            if (found := read(reply.text)) is not None:
                return found, usage
            last = reply.text
        self.unread[question] = last
        return None, usage + Usage(unreadable=1)

    def _request(self, body: dict[str, Any]) -> _Reply:
        httpx, judge = self._httpx, self._judge
        failure, pause = "", 0.0
        for attempt in range(judge.retries + 1):
            if attempt:
                self._sleep(min(pause, LONGEST_PAUSE_S))
            if (signum := stop_requested()) is not None:
                raise Interrupted(
                    signum, "stopped while the judge was asked; its replies are kept and the same command continues"
                )
            if self._failed.is_set():
                break
            pause = 2.0**attempt
            try:
                response = self._client.post(f"{judge.endpoint}/chat/completions", json=body)
            except httpx.TimeoutException:
                failure = f"no reply within {judge.timeout_s:g} s"
                continue
            except httpx.TransportError as error:
                failure = f"no connection ({type(error).__name__})"
                continue
            if response.status_code in _PASSING or response.status_code >= 500:
                failure = f"status {response.status_code}"
                pause = max(pause, _seconds(response.headers.get("retry-after")))
            elif not response.is_success:
                raise InputError(
                    f"the judge at {judge.endpoint} refuses: status {response.status_code}:"
                    f" {self._said(response.text)}",
                    hint="check judge.endpoint, judge.model and the key",
                )
            elif (reply := _parsed(response.content)) is not None:
                return reply
            else:
                failure = "a reply that is not of OpenAI's form"
        message = f"the judge at {judge.endpoint} failed {judge.retries + 1} times, the last time with {failure}"
        raise EnvironmentFault(message, hint="replies so far are kept; the same command continues")

    def _said(self, text: str) -> str:
        """A server's text, shortened and without the key."""
        words = " ".join(text.split())
        return clip(words.replace(self._key, "...") if self._key else words, 80)


def _known(path: Path) -> _Reply | None:
    """The cached reply; None when there is none."""
    return None if sealed.find(path) is None else _Reply(**json.loads(path.read_bytes()))


def _parsed(content: bytes) -> _Reply | None:
    """The reply in a body of OpenAI's form; None for any other body."""
    try:
        value = json.loads(content)
        text = value["choices"][0]["message"]["content"]
        usage = value.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return _Reply(text or "", *tokens) if text is None or isinstance(text, str) else None


def _seconds(header: str | None) -> float:
    """The seconds in a Retry-After header; 0 when it is empty or has a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
