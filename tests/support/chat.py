"""Conversations, and encoders under the fixtures' templates and all that TRL ships, for tests of what templates do."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from align.data.chat.encoder import Encoder, Notes
from align.data.records import Message
from tests.support import tokenizers

SPEC = importlib.util.find_spec("trl")
WILD = Path(SPEC.origin).parent / "chat_templates" if SPEC and SPEC.origin else Path("/nowhere")
MARKERS = re.compile(
    r"<\|[^|> ]{1,40}\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜> ]{1,40}｜>|</?[a-z_]{2,20}>|\[/?[A-Za-z_]{3,20}\]"
)
ASK: Message = {"role": "user", "content": "Is 51 prime?"}
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"type": "string", "description": "where"}},
    "required": ["place"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("weather", "clock")
]


def says(text: str = "", **keys: Any) -> Message:
    return {"role": "assistant", "content": text, **keys}  # type: ignore[typeddict-item]


def call(name: str, number: int = 0, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": arguments}}


@cache
def encoder_of(name: str, **kwargs: Any) -> Encoder:
    """A fixture's, or a template that TRL ships under a tokenizer that has the markers it names."""
    if name in ("chatml", "llama3", "mistral", "glm4", "glm4_arguments", "qwen3_fixture"):
        fixture = name.removesuffix("_fixture")
        return Encoder(
            tokenizers.glm4(fixture) if fixture.startswith("glm4") else getattr(tokenizers, fixture)(), **kwargs
        )
    path = WILD / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {path.name}")
    text = path.read_text(encoding="utf-8")
    named = set(MARKERS.findall(text))
    inner = sorted(token for token in named if re.match(r"</?(think|tool|arg)", token))
    special = [*sorted(named - set(inner)), "<bos>", "<eos>"]
    return Encoder(tokenizers.build(text, special, plain=inner, bos="<bos>", eos="<eos>"), **kwargs)


def trained(
    encoder: Encoder, messages: list[Message], tools: Any = (), notes: Notes | None = None, on: Any = "last"
) -> str:
    encoded = encoder.encode(messages, tools, on, notes=notes)
    return encoder.spell(encoded.ids[encoded.mask])
