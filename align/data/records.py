"""Records, which are made of data rows: conversations, preferences, labelled or graded answers, and prompts. The
formats of rows are only known in :mod:`align.data.formats`.

A message is ``{"role": ..., "content": ...}`` with roles ``system``, ``user``, ``assistant``, ``tool``; an assistant
message may carry ``train`` (bool, default true: is it a training target?), ``finished`` (bool, default true: false for
an answer that was cut off, which must not be trained to end where it was cut), ``reasoning`` (the model's text before
its answer; never part of ``content``) and ``tool_calls`` in OpenAI's two forms: ``{"type": "function", "function":
{"name": ..., "arguments": {...}}}``, or, for a call with plain text, ``{"type": "custom", "custom": {"name": ...,
"input": "..."}}``. A tool message may carry ``metadata``, the head of GLM-4's ``observation``.

``sampled`` contains the tokens of a policy's answer and the digest of their encoder; it is there only if the answer's
text would be encoded as other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypedDict

from align.errors import Problem


class Sampled(TypedDict):
    """The tokens of an answer as a policy sampled them, end token included."""

    encoder: str
    """``Encoder.digest`` of the tokenizer and template that the ids belong to."""
    ids: list[int]


class Message(TypedDict, total=False):
    """One message. ``role`` is always there, ``content`` too (it may be empty if there are ``tool_calls``)."""

    role: str
    content: str
    reasoning: str
    train: bool
    finished: bool
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    metadata: str
    sampled: Sampled


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Origin:
    """The origin of a record, for error messages: file (or hub id) and line (or row), counted from 1."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"

    def blamed(self, problem: Problem) -> Problem:
        """The problem with this row as its place."""
        return replace(problem, file=self.source, line=self.line)


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant; the SFT record."""

    messages: Messages
    id: str
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, such as ``lang``."""


class Votes(NamedTuple):
    """How many of several judges found the chosen answer better, and how many the rejected one; a tie is half a vote
    for each."""

    chosen: float
    rejected: float

    @property
    def share(self) -> float:
        """Share of the votes for the chosen answer; 1 when nobody compared the two, as nobody contradicts the row
        then."""
        return self.chosen / (self.chosen + self.rejected) if self.chosen + self.rejected else 1.0


@dataclass(frozen=True)
class Preference:
    """A prompt, one preferred completion and one or many rejected ones. Completions are message lists (usually of one
    message)."""

    prompt: Messages
    chosen: Messages
    rejected: tuple[Messages, ...]
    id: str
    origin: Origin
    margins: tuple[float, ...] | None = None
    """How much better the chosen answer is than each rejected one, on the data's scale; None when the data do not
    say."""
    tools: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    votes: tuple[Votes, ...] | None = None
    """The votes of several judges on the chosen and each rejected answer; None when the data do not say."""

    def keeping(self, wanted: Sequence[bool]) -> Preference:
        """The preference with only the ``wanted`` rejected answers, and their margins and votes."""

        def chosen(values: Any) -> Any:
            return None if values is None else tuple(value for value, keep in zip(values, wanted, strict=True) if keep)

        return replace(self, rejected=chosen(self.rejected), margins=chosen(self.margins), votes=chosen(self.votes))


@dataclass(frozen=True)
class Unpaired:
    """A prompt, one completion, and whether it is a good one. KTO learns from such answers, each judged by itself."""

    prompt: Messages
    completion: Messages
    label: bool
    id: str
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    """A prompt, one completion, and its grades by name, such as helpfulness and correctness, which a reward model
    learns by regression."""

    prompt: Messages
    completion: Messages
    grades: dict[str, float]
    """At least one grade; attributes without a grade are left out."""
    id: str
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Messages that end with the user (or a tool result), to be answered by a model."""

    prompt: Messages
    id: str
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


Record = Conversation | Preference | Unpaired | Graded | Prompt
