"""The chat template as a function from messages to text, and finding out how it ends a turn and how it accepts tools
and reasoning.

No template is recognised by name or text. Instead it renders small made-up conversations (probes), and the results are
compared. It runs in the Jinja sandbox of transformers (``apply_chat_template``), with a fixed date and time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import jinja2

from align.data.chat.message_forms import (
    PLACES,
    TAGS,
    ReasoningPlace,
    Rendered,
    Spell,
    Tools,
    as_metadata,
    as_openai,
    as_openai_text,
)
from align.data.chat.tokens import Tokens
from align.data.records import Message
from align.errors import InputError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Ending", "Rendered", "Tools"]

_ASK = "probequestion"
_ANSWER = "probeanswer"
_TOOL = "probetool"
_VALUE = "probevalue"
_RESULT = "proberesult"
_REASON = "probereason"
_HEAD = "probehead"
_PAYLOAD = 'probe("payload")\nprobe({1})'
_RESERVED = {
    *(
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "continue_final_message",
    ),
    "strftime_now",
}
_BROKEN = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""Errors that running a template can raise."""
DATE = "2024-07-26"
"""The date for templates that print the current one, unless the recipe sets another. It is fixed so that tokens do not
depend on the day; this one is the default in Llama's template."""

_log = logging.getLogger("align")
_OTHER_DAY = timedelta(days=400, hours=13, minutes=7)
"""Added to the date for a probe: it changes the weekday, day, month, year and time."""


@dataclass(frozen=True)
class Ending:
    """How an assistant turn ends."""

    text: str
    """The marker at its end, which is trained."""
    own: bool
    """True: the marker is part of the turn. False: it is the head of the next turn (GLM-4)."""


class ChatTemplate:
    """A tokenizer's chat template with fixed keyword arguments.

    ``now`` is the time that the template always gets (``strftime_now``). Raises InputError when the template cannot
    render a plain question and answer, ends an answer without a token, or renders the same conversation differently the
    second time.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, kwargs: Mapping[str, Any], tokens: Tokens, now: datetime
    ) -> None:
        if clash := sorted(_RESERVED & set(kwargs)):
            raise InputError(Problem(f"{', '.join(clash)} cannot be set", key="chat_template_kwargs"))
        self._tokenizer = tokenizer
        self._text = text
        self._kwargs = dict(kwargs)
        self._tokens = tokens
        self._now = now
        self._written: set[str] = set()
        self.plain: Ending = self._probe_plain()
        self._spell: Spell | None = None
        self._payloads = self._heads = False
        self.call: Ending | None = None
        self._probe_calls()
        self._tools_as_field = self._probe_tools()
        self.reads_clock = self._probe_clock()
        """Does its output depend on the date or time?"""
        self.closes_thinking = ""
        """The text by which the model has to say that an answer has no reasoning; empty if it needs none."""
        self.place: ReasoningPlace | None = self._probe_reasoning()
        """The place from which it reads reasoning; None when it has none."""
        self.assistant_may_write = self._probe_inner()
        self.control: frozenset[str] = frozenset(
            m.text for m in tokens.markers.values() if m.special or m.text in self._written or m.text in text
        )
        """Markers that structure conversations: those flagged special, and those that the template writes."""

    def render(self, messages: Rendered, tools: Tools = (), *, prompt: bool) -> str:
        """The text of a conversation; ``prompt`` adds the generation prompt. Raises InputError with the template's
        message."""
        if self._tools_as_field and tools:
            messages, tools = _with_tools_field(messages, tools), ()
        return self._run(messages, tools, prompt=prompt)

    def _run(self, messages: Rendered, tools: Tools = (), *, prompt: bool = False, now: datetime | None = None) -> str:
        try:
            return cast(
                str,
                self._tokenizer.apply_chat_template(
                    cast(Any, messages),
                    tools=cast(Any, list(tools) or None),
                    chat_template=self._text,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    strftime_now=(now or self._now).strftime,
                    **self._kwargs,
                ),
            )
        except _BROKEN as error:
            raise InputError(f"the chat template refuses this conversation: {str(error)[:200]}") from error

    def spell(self, message: Message) -> Rendered:
        """``message`` in the form that the template reads.

        Raises InputError for a tool call, a payload of plain text, metadata of a result, or reasoning that the template
        would drop.
        """
        if calls := message.get("tool_calls"):
            if self._spell is None:
                raise InputError(
                    "the chat template does not render tool calls", hint="set model.chat_template to one that does"
                )
            if not self._payloads and any("custom" in call for call in calls):
                hint = "set model.chat_template to one that does (GLM-4's), or leave such rows out"
                raise InputError(
                    "the chat template does not render calls of custom tools, whose payload is plain text", hint=hint
                )
        if message.get("metadata") and not self._heads:
            raise InputError(
                "the chat template has no place for the metadata of a tool's result", hint="remove it from the row"
            )
        blocks = (self._spell or as_openai)(message)
        if reasoning := message.get("reasoning"):
            if self.place is None:
                hint = (
                    "set model.chat_template_kwargs (often enable_thinking: true) or model.chat_template to get one, or"
                    " write the reasoning into the content, between the tags that the model is to learn"
                )
                raise InputError("the chat template has no place for an answer's reasoning", hint=hint)
            self.place.put(blocks[0], reasoning)
        return blocks

    # Probes

    def _probe(self, messages: Rendered, tools: Tools = (), *, prompt: bool = False) -> str:
        """Render a made-up conversation without markers in it, so that all markers in the output are the template's."""
        text = self._run(messages, tools, prompt=prompt)
        self._written |= set(self._tokens.pattern.findall(text))
        return text

    def _probe_plain(self) -> Ending:
        asked: Rendered = [{"role": "user", "content": _ASK}]
        answered: Rendered = [*asked, {"role": "assistant", "content": _ANSWER}]
        final = self._probe(answered)
        between = self._probe([*answered, {"role": "user", "content": _ASK}])
        if _ANSWER not in final or _ANSWER not in between:
            raise InputError(
                "the chat template leaves out the assistant's answer",
                hint="set model.chat_template to one that does not",
            )
        ending = self._ending(final.rpartition(_ANSWER)[2], between.partition(_ANSWER)[2].partition(_ASK)[0], own=None)
        if ending is None:
            raise InputError(
                "the chat template ends an assistant turn with no token of its own, so a model could not learn to stop",
                hint="set model.chat_template to one that writes such a token (eos_token) after the answer",
            )
        return ending

    def _ending(self, final: str, between: str, own: bool | None) -> Ending | None:
        """Find how a turn ends, from the text after it at the end of a conversation (``final``) and in the middle of
        one (``between``).

        Their common beginning belongs to the turn, and its last marker is the end. (Phi-3 adds an eos to every
        conversation that is complete; Cohere closes the response, and then the turn.) When they have no marker in
        common, a marker of the complete conversation is the end (gpt-oss), and without any the next turn's head is.
        """
        pattern = self._tokens.pattern
        shared = next(
            (i for i, (a, b) in enumerate(zip(final, between, strict=False)) if a != b), min(len(final), len(between))
        )
        inside = [match for match in pattern.finditer(final) if match.end() <= shared]
        if own is not False and (inside or pattern.search(final)):
            match = inside[-1] if inside else pattern.search(final)
            return Ending(match[0], own=True) if match else None
        following = pattern.search(between, len(final)) if between.startswith(final) else None
        if own is not True and following and following.start() == len(final):
            return Ending(following[0], own=False)
        return None

    def _probe_calls(self) -> None:
        for spell in (as_openai, as_openai_text, as_metadata):
            spelled = [block for message in _CALLING for block in spell(message)]
            try:
                final, between = self._probe(spelled[:-1]), self._probe(spelled)
            except InputError:
                continue  # a template without tools may refuse this probe
            if all(word in between for word in (_TOOL, _VALUE, _RESULT)) and _VALUE in final:
                self._spell = spell
                if spell is as_metadata:
                    self._probe_heads()
                tails = final.rpartition(_VALUE)[2], between.partition(_VALUE)[2].partition(_RESULT)[0]
                self.call = self._ending(*tails, own=self.plain.own)
                return

    def _probe_heads(self) -> None:
        """Does GLM-4's form preserve a payload of plain text and the metadata of a result?"""
        custom = {"type": "custom", "custom": {"name": _TOOL, "input": _PAYLOAD}}
        turn: list[Message] = [
            _CALLING[0],
            {"role": "assistant", "content": "", "tool_calls": [custom]},
            {"role": "tool", "content": _RESULT, "metadata": _HEAD},
        ]
        text = self._probe([block for message in turn for block in as_metadata(message)])
        self._payloads, self._heads = f"{_TOOL}\n{_PAYLOAD}" in text, f"{_HEAD}\n{_RESULT}" in text

    def _probe_tools(self) -> bool:
        """Does the template take tools as a field of a system message (GLM-4) and not as an argument?"""
        for as_field in (False, True):
            try:
                text = self._probe(
                    _with_tools_field(_ASKED, _TOOLS) if as_field else _ASKED, () if as_field else _TOOLS
                )
            except InputError:
                continue  # a probe, as above
            if _TOOL in text:
                return as_field
        return False

    def _probe_clock(self) -> bool:
        """Does the output depend on the date? Refuses a template whose output is random."""
        reads = False
        for tools in ((), _TOOLS):
            try:
                texts = [
                    self._run(_ASKED, tools, prompt=True, now=self._now + day)
                    for day in (timedelta(), _OTHER_DAY, timedelta())
                ]
            except InputError:
                continue  # a probe, as above
            if texts[0] != texts[2]:
                raise InputError(
                    "the chat template renders the same conversation differently each time, so it cannot be trained on"
                )
            reads = reads or texts[0] != texts[1]
        return reads

    def _probe_reasoning(self) -> ReasoningPlace | None:
        prompt = self._probe(_ASKED, prompt=True)
        plain = self._probe([*_ASKED, {"role": "assistant", "content": _ANSWER}])
        calling = self._spell(_CALLING[1]) if self._spell is not None else []
        for turn in ([{"role": "assistant", "content": _ANSWER}], calling):
            place = next((place for place in PLACES if turn and self._reads(place, turn)), None)
            if place is not None:
                head = plain[len(prompt) : plain.rfind(_ANSWER)] if plain.startswith(prompt) else ""
                self.closes_thinking = head.rstrip() if head.strip() else ""
                return place
        return None

    def _reads(self, place: ReasoningPlace, turn: Rendered) -> bool:
        """Is text at this place rendered as reasoning, before the answer (or the call), and not copied as text or
        printed as a data structure?"""
        said = _ANSWER if _ANSWER in turn[0]["content"] else _VALUE
        texts = []
        for reason in (_REASON, f"\n{_REASON}\n"):
            blocks = [dict(block) for block in turn]
            place.put(blocks[0], reason)
            try:
                texts.append(self._run([*_ASKED, *blocks]))
            except InputError:
                return False  # a probe, as above
        begin = texts[0].rfind(_ASK)
        at = texts[0].rfind(_REASON)
        end = texts[0].rfind(said)
        if not 0 <= begin < at < end or texts[0].count(_REASON) > 1:
            return False
        if place is TAGS:  # a template that reads tags replaces the white space around the reasoning
            return texts[0] == texts[1] and "<think>" not in texts[0].replace("<think>", "", 1)
        words = texts[0][begin:end]
        self._written |= set(self._tokens.pattern.findall(texts[0]))
        return "'type'" not in words and '"type"' not in words

    def _probe_inner(self) -> frozenset[str]:
        """Markers that an assistant's text may contain: those that are not flagged special and do not structure turns.

        ``<think>`` of Qwen3 is one: the model writes it as one token inside its own turn, and the template reads it
        there.
        """
        prompt = self._probe(_ASKED, prompt=True)
        before = self._probe(_ASKED)
        head = self._tokens.pattern.search(prompt, len(before) if prompt.startswith(before) else 0)
        turns = set(self._tokens.pattern.findall(before)) | {self.plain.text}
        turns |= {head[0]} if head else set()
        turns |= {self.call.text} if self.call else set()
        return frozenset(m.text for m in self._tokens.markers.values() if not m.special and m.text not in turns)


_ASKED: Rendered = [{"role": "user", "content": _ASK}]
_CALLING: list[Message] = [
    {"role": "user", "content": _ASK},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "call00001", "function": {"name": _TOOL, "arguments": {"key": _VALUE}}}
        ],
    },
    {"role": "tool", "content": _RESULT, "name": _TOOL, "tool_call_id": "call00001"},
]
_PARAMETERS = {"type": "object", "properties": {"key": {"type": "string", "description": "probe"}}, "required": ["key"]}
_TOOLS = [{"type": "function", "function": {"name": _TOOL, "description": "probe", "parameters": _PARAMETERS}}]


def _with_tools_field(messages: Rendered, tools: Tools) -> Rendered:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "tools": list(tools)}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": list(tools)}, *messages]


# The day


def midnight(day: str | None) -> datetime:
    """The time that the template gets: the beginning of ``day`` (2026-11-30), or of :data:`DATE`."""
    return datetime.combine(date.fromisoformat(day or DATE), time())


def date_of(templates: Iterable[ChatTemplate], asked: str | None) -> str | None:
    """The date that the templates get, if they print one. Raises InputError for an ``asked`` date that has no
    effect."""
    if any(template.reads_clock for template in templates):
        if asked is None:
            _say_date(DATE)
        return asked or DATE
    if asked is not None:
        raise InputError(
            Problem("the chat template does not print a date", key="model.chat_template_date", hint="remove the key")
        )
    return None


@cache
def _say_date(told: str) -> None:
    """Log the date, once in a process."""
    _log.warning(
        "the chat template prints the date: here it is always %s, so that no result depends on the day; set"
        " model.chat_template_date for another. A program that serves the model prints its own day's",
        told,
    )
