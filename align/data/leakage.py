"""Is a prompt of one set in another one as well? Prompts are compared by a digest of what they say."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable

from align.data.records import Conversation, Origin, Record


def prompt_digest(record: Record) -> str:
    """Hex sha256 of what is asked: a prompt's or preference's prompt, a conversation without its last message.

    Roles and text count; runs of white space, and how Unicode composes a character, do not.
    """
    messages = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
    said = [
        [message["role"], " ".join(unicodedata.normalize("NFC", message["content"]).split())] for message in messages
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def shared_prompts(one: Iterable[Record], other: Iterable[Record]) -> list[tuple[Origin, Origin]]:
    """For each record of ``other`` whose prompt is in ``one`` as well: where it first stands in ``one``, and where in
    ``other``."""
    first: dict[str, Origin] = {}
    for record in one:
        first.setdefault(prompt_digest(record), record.origin)
    return [(first[digest], record.origin) for record in other if (digest := prompt_digest(record)) in first]
