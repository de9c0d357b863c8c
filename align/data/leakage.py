"""Finding prompts that two data sets share. Prompts are compared by a digest of their content."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable

from align.data.records import Conversation, Origin, Record


def prompt_digest(record: Record) -> str:
    """Hex sha256 of the prompt: that of a prompt or preference, or a conversation without its last message.

    It depends on roles and texts, but not on runs of white space or Unicode composition.
    """
    return hashlib.sha256(json.dumps(_asked(record)).encode()).hexdigest()


def prompt_hash(record: Record) -> int:
    """The same as a number, equal for equal digests within one process and a fifth of the work: to count prompts."""
    return hash(tuple(_asked(record)))


def _asked(record: Record) -> list[tuple[str, str]]:
    messages = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
    return [(message["role"], " ".join(_composed(message["content"]).split())) for message in messages]


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def shared_prompts(one: Iterable[Record], other: Iterable[Record]) -> list[tuple[Origin, Origin]]:
    """For each record of ``other`` whose prompt is in ``one`` too: its first place in ``one``, and its place in
    ``other``."""
    first: dict[str, Origin] = {}
    for record in one:
        first.setdefault(prompt_digest(record), record.origin)
    return [(first[digest], record.origin) for record in other if (digest := prompt_digest(record)) in first]
