"""A conversation on its way through the chat template, and the proof that nothing of it got lost there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from align.data.records import Message, Messages
from align.data.template import ChatTemplate, Rendered, Tools
from align.data.tokens import Tokens
from align.errors import InputError

Hide = Callable[[str], tuple[str, int]]


@dataclass(frozen=True)
class Hiders:
    """What puts stand-ins for control-token texts into data."""

    everything: Hide
    answer: Hide
    """For the text of assistant messages, which may really contain such tokens as ``<think>``."""

    @classmethod
    def of(cls, tokens: Tokens, template: ChatTemplate) -> Hiders:
        """Those of a tokenizer and its template."""
        markers = list(tokens.markers)
        return cls(tokens.hider(markers), tokens.hider([text for text in markers if text not in template.assistant_may_write]))


class Row:
    """A conversation with the control-token texts of its data hidden, spelled in the template's words, to be rendered up to any message."""

    def __init__(self, template: ChatTemplate, hiders: Hiders, messages: Sequence[Message], tools: Tools) -> None:
        self._template, self._hiders = template, hiders
        self.hidden = 0
        """Control-token texts found in the data."""
        self.messages: Messages = tuple(self._hide_message(message) for message in messages)
        self.tools: Tools = [self._hide(tool) for tool in tools]
        self._spelled: list[Rendered] = [template.spell(message) for message in self.messages]

    def render(self, count: int, *, prompt: bool) -> str:
        """The text of the first ``count`` messages; ``prompt`` adds the generation prompt."""
        blocks = [block for spelled in self._spelled[:count] for block in spelled]
        return self._template.render(blocks, self.tools, prompt=prompt)

    def check_context(self, text: str) -> None:
        """Raise InputError unless all that a model is to read is in ``text``; a template may shorten earlier answers."""
        for message in self.messages:
            if message["role"] != "assistant" and not any(_contains(text, form) for form in _forms(message)):
                raise InputError(f"the chat template leaves out the {message['role']} message")
        for tool in self.tools:
            if tool.get("function", tool).get("name", "") not in text:
                raise InputError("the chat template does not render tools", hint="set model.chat_template to one that does")

    def check_answer(self, k: int, text: str, begin: int, end: int) -> None:
        """Raise InputError unless the whole of answer ``k`` lies in ``text[begin:end]`` (up to white space), and there is one (C10)."""
        message = self.messages[k]
        wanted = [message.get("content", ""), *(call.get("function", call)["name"] for call in message.get("tool_calls", []))]
        if not any(part.strip() for part in wanted):
            raise InputError("an assistant message that is to be trained is empty")
        if not all(_contains(text[begin:end], part) for part in wanted):
            # A reasoning template may put the first word of the answer, <think>, into the generation prompt.
            whole = text[len(self.render(k, prompt=False)) : end]
            if not all(_contains(whole, part) for part in wanted):
                raise InputError("the chat template does not render an assistant message as it is, so it cannot be trained")

    def _hide_message(self, message: Message) -> Message:
        hide = self._hiders.answer if message["role"] == "assistant" else self._hiders.everything
        text, count = hide(message.get("content") or "")
        self.hidden += count
        rest = {key: self._hide(value) for key, value in message.items() if key not in ("content", "role")}
        return cast(Message, {"role": message["role"], "content": text, **rest})

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            text, count = self._hiders.everything(value)
            self.hidden += count
            return text
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item) for item in value]
        return value


def _contains(text: str, part: str) -> bool:
    """Is ``part`` in ``text``, white space aside?"""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _forms(message: Message) -> Iterator[str]:
    """The content as a template may write it. Some write a tool's result as JSON (Llama-3.1)."""
    content = message.get("content", "")
    yield content
    if message["role"] == "tool":
        yield json.dumps(content, ensure_ascii=False)[1:-1]
        yield json.dumps(content)[1:-1]
