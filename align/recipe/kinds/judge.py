"""A language model as a judge of answers, over an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from align.recipe.blocks.base import Strict
from align.recipe.language.effects import Needs

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, user = parts.hostname, parts.username
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"not an address: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("expected an address such as https://HOST/v1")
    if parts.scheme == "http" and host not in _THIS_MACHINE:
        raise ValueError(
            "prompts and answers would travel unencrypted; use https, or http only on this machine (127.0.0.1)"
        )
    if user is not None or parts.query or parts.fragment:
        raise ValueError(
            "an address has no user, query or fragment; the key comes from the environment variable that `key_env`"
            " names"
        )
    return text.rstrip("/")


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("expected the name of an environment variable, not a key")
    return text


class Judge(Strict):
    """A language model that judges answers, on any server with OpenAI's chat interface. Its replies are kept in the
    runs' cache, so that the same question is not asked twice."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs("against", lambda judge: "pairwise" in judge.methods, "without the method pairwise"),
    )

    endpoint: Annotated[str, AfterValidator(_endpoint)]
    """Base address of the server, such as `https://HOST/v1`: `/chat/completions` is added. https, or http on this
    machine only."""
    model: str = Field(min_length=1)
    """The name that the server has for the model."""
    key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Name of the environment variable that holds the key. The key itself is read when the stage runs, sent to
    `endpoint` only, and written nowhere."""
    methods: list[Literal["pairwise", "pointwise"]] = Field(default=["pairwise"], min_length=1)
    """`pairwise`: the judge says which of two answers is better. It is asked in both orders, and if its verdicts
    differ, the result is a tie. `pointwise`: the judge grades an answer from 1 to 10 on several dimensions and over
    all; if the data have an answer, it sees that too (as in AlignBench, https://arxiv.org/abs/2311.18743)."""
    against: Literal["baseline", "target"] = "baseline"
    """Only for `pairwise`: the opponent is the first policy's answer, or the data's own."""
    language: Literal["en", "zh"] = "en"
    """Language of the judge's instructions."""
    temperature: float = Field(default=0.0, ge=0)
    """The judge's sampling temperature."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest reply, in tokens."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds until a request counts as failed."""
    retries: int = Field(default=5, ge=0)
    """How often a request is repeated after a failure that may be temporary (429, 5xx, a timeout), with growing pauses,
    and after a reply that cannot be read. Items whose reply still cannot be read are left out and counted."""
    requests_at_once: int = Field(default=4, ge=1)
    """Largest number of requests at the same time."""
    price_input: float | None = Field(default=None, ge=0)
    """Price of a million input tokens, in any currency. Without prices, tokens are counted but no cost is shown."""
    price_output: float | None = Field(default=None, ge=0)
    """Price of a million output tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> Judge:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output need each other")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("a method is named twice")
        return self
