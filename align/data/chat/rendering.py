"""Rendering a conversation with the chat template, and checking that the text contains all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from align.data.chat.call_proof import CallProof
from align.data.chat.message_forms import Rendered, Tools
from align.data.chat.template import ChatTemplate
from align.data.chat.tokens import Tokens, any_of
from align.data.records import Message, Messages
from align.errors import InputError

Hide = Callable[[str], tuple[str, int]]

_TAG = re.compile(r"([<\[◁]\|?)(/?)((?:[a-z]+:)?think)(\|?[>\]▷])", re.IGNORECASE)
"""Tags that models write around their reasoning: ``<think>``, ``[THINK]``, ``<seed:think>``, ``◁think▷``."""


@dataclass(frozen=True)
class Hiders:
    """Functions that replace texts of control tokens in data by stand-ins."""

    everything: Hide
    answer: Hide
    """For the content of assistant messages, which may contain tokens such as ``<think>``."""

    @classmethod
    def of(cls, tokens: Tokens, template: ChatTemplate) -> Hiders:
        """The functions for a tokenizer and its template."""
        control = [text for text in tokens.markers if text in template.control]
        return cls(
            tokens.hider(control), tokens.hider([text for text in control if text not in template.assistant_may_write])
        )


class RenderedRow:
    """A conversation in the template's form, with texts of control tokens replaced by stand-ins. It can be rendered up
    to any message."""

    def __init__(self, template: ChatTemplate, hiders: Hiders, messages: Sequence[Message], tools: Tools) -> None:
        self.template = template
        self._hiders = hiders
        self._given = messages
        self.hidden = 0
        """Number of texts of control tokens found in the data."""
        self.messages: Messages = tuple(self._hide_message(message) for message in messages)
        self.tools: Tools = [self._hide(tool) for tool in tools]
        self._spelled: list[Rendered] = [template.spell(message) for message in self.messages]

    def render(self, count: int, *, prompt: bool) -> str:
        """The text of the first ``count`` messages; ``prompt`` adds the generation prompt."""
        return self._rendered(self._spelled[:count], prompt)

    def _rendered(self, spelled: Sequence[Rendered], prompt: bool) -> str:
        return self.template.render([block for blocks in spelled for block in blocks], self.tools, prompt=prompt)

    def check_context(self, text: str, *, prompt: bool) -> int:
        """Raise InputError unless ``text``, the whole rendered row, contains everything that the model should read.

        A template may shorten earlier answers, but not their calls. Returns the number of answers with think tags that
        the template treats as text because it does not know reasoning.
        """
        for message in self.messages:
            if message["role"] != "assistant" and not any(_contains(text, form) for form in _forms(message)):
                raise InputError(f"the chat template leaves out the {message['role']} message")
        for tool in self.tools:
            if (tool.get("function") or tool.get("custom") or tool).get("name", "") not in text:
                raise InputError(
                    "the chat template does not render tools", hint="set model.chat_template to one that does"
                )
        if any(message.get("tool_calls") for message in self.messages):
            self._check_calls(text, prompt)
        tagged = [
            k
            for k, message in enumerate(self._given)
            if message["role"] == "assistant" and _TAG.search(message.get("content") or "")
        ]
        if tagged and self.template.place is not None:
            self._check_tags(tagged, text, prompt)
            return 0
        return len(tagged)

    def _check_calls(self, text: str, prompt: bool) -> None:
        proof = CallProof(self.messages)
        masked = self._rendered([self.template.spell(message) for message in proof.messages], prompt)
        endings = {ending.text for ending in (self.template.plain, self.template.call) if ending}
        proof.check(text, masked, any_of(sorted(endings)))

    def _check_tags(self, tagged: Sequence[int], text: str, prompt: bool) -> None:
        """Raise InputError unless reasoning inside the content is rendered like reasoning in a field, up to white
        space."""
        messages = [self._without_tags(message) if k in tagged else message for k, message in enumerate(self._given)]
        other = RenderedRow(self.template, self._hiders, messages, self.tools)
        if _squeezed(other.render(len(messages), prompt=prompt)) != _squeezed(text):
            raise _tags_are_text()

    @staticmethod
    def _without_tags(message: Message) -> Message:
        content = message["content"]
        close = next((tag for tag in _TAG.finditer(content) if tag[2]), None)
        if close is None or message.get("reasoning"):
            raise _tags_are_text()
        before, answer = content[: close.start()].strip(), content[close.end() :].strip()
        reasoning = before.removeprefix(close[1] + close[3] + close[4]).strip()
        if _TAG.search(reasoning) or _TAG.search(answer):
            raise _tags_are_text()
        return cast(Message, {**message, "content": answer, "reasoning": reasoning})

    def check_answer(self, k: int, text: str, begin: int, end: int) -> None:
        """Raise InputError unless ``text[begin:end]`` contains the reasoning and then the content of answer ``k`` (up
        to white space), and the answer is not empty. Its calls are checked with those of the whole conversation."""
        message = self.messages[k]
        reasoning, content = message.get("reasoning") or "", message.get("content", "")
        cut_in_thought = bool(reasoning.strip()) and not message.get("finished", True)
        if not self._said(k).strip() and not message.get("tool_calls") and not cut_in_thought:
            raise InputError("an assistant message that is to be trained is empty")
        if _in_order(text[begin:end], reasoning, content):
            return
        # A reasoning template may put the first word of the answer, <think>, into the generation prompt.
        whole = text[len(self.render(k, prompt=False)) : end]
        if reasoning and not _contains(whole, reasoning):
            raise InputError(
                "the chat template leaves out the reasoning of an answer",
                hint="set model.chat_template to one that does not",
            )
        if not _in_order(whole, reasoning, content):
            raise InputError("the chat template does not render an assistant message as it is, so it cannot be trained")

    def _said(self, k: int) -> str:
        """The content of answer ``k`` without the part that its template reads as reasoning; all of it if the answer
        was cut off."""
        given = self._given[k]
        content = given.get("content", "")
        if self.template.place is None or not given.get("finished", True) or not _TAG.search(content):
            return content
        return self._without_tags(given)["content"]

    def _hide_message(self, message: Message) -> Message:
        hide = self._hiders.answer if message["role"] == "assistant" else self._hiders.everything
        text, count = hide(message.get("content") or "")
        self.hidden += count
        rest = {key: self._hide(value) for key, value in message.items() if key not in ("content", "role", "sampled")}
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


def _tags_are_text() -> InputError:
    return InputError(
        "an answer has reasoning tags in its content that the chat template does not read as reasoning",
        hint="put the reasoning into a field of the message, `reasoning_content`, and only the answer into `content`",
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _in_order(text: str, reasoning: str, content: str) -> bool:
    """Does ``text`` contain both, the reasoning first, up to white space?"""
    if not reasoning.strip():
        return _contains(text, content)
    if not _contains(text, content) or not _contains(text, reasoning):
        return False
    squeezed, first = _squeezed(text), _squeezed(reasoning)
    return _squeezed(content) in squeezed[squeezed.index(first) + len(first) :]


def _contains(text: str, part: str) -> bool:
    """Does ``text`` contain ``part``, up to white space?"""
    return part.strip() in text or _squeezed(part) in _squeezed(text)


def _forms(message: Message) -> Iterator[str]:
    """The forms in which a template may write the content. Some write a tool's result as JSON (Llama-3.1)."""
    content = message.get("content", "")
    yield content
    if message["role"] == "tool":
        yield json.dumps(content, ensure_ascii=False)[1:-1]
        yield json.dumps(content)[1:-1]
