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
    messages = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
    said = [
        [message["role"], " ".join(unicodedata.normalize("NFC", message["content"]).split())] for message in messages
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def shared_prompts(one: Iterable[Record], other: Iterable[Record]) -> list[tuple[Origin, Origin]]:
    """For each record of ``other`` whose prompt is in ``one`` too: its first place in ``one``, and its place in
    ``other``."""
    first: dict[str, Origin] = {}
    for record in one:
        first.setdefault(prompt_digest(record), record.origin)
    return [(first[digest], record.origin) for record in other if (digest := prompt_digest(record)) in first]
