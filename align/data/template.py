"""The chat template as a function from messages to text, and what probing it tells: how a turn ends, and how it takes tools.

Nothing here knows a template by name or by its words. A template is asked to render small made-up conversations, and the answers are
compared. It runs in the Jinja sandbox of transformers (``apply_chat_template``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import jinja2

from align.data.records import Message
from align.data.tokens import Tokens
from align.errors import InputError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendered = list[dict[str, Any]]
Tools = Sequence[dict[str, Any]]

_ASK, _ANSWER, _TOOL, _VALUE, _RESULT = "probequestion", "probeanswer", "probetool", "probevalue", "proberesult"
_RESERVED = {"messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "continue_final_message"}
_BROKEN = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What running somebody's template can raise."""


# How messages are spelled for a template


def _as_openai(message: Message) -> Rendered:
    """The message as it is, with call arguments as objects (OpenAI writes them as JSON text; templates print objects)."""
    plain: dict[str, Any] = {key: value for key, value in message.items() if key not in ("train", "finished")}
    plain.setdefault("content", "")
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_with_object(call) for call in calls]
    return [plain]


def _as_metadata(message: Message) -> Rendered:
    """GLM-4's spelling: a call is a block of its own, its head the function's name and its content the arguments; results are
    ``observation``. Several calls, or text and then a call, are several blocks of one turn."""
    if message["role"] == "tool":
        return [{"role": "observation", "content": message.get("content", "")}]
    calls = message.get("tool_calls") or []
    blocks: Rendered = [] if calls and not message.get("content") else [{"role": message["role"], "content": message.get("content", "")}]
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        blocks.append({"role": "assistant", "metadata": function["name"], "content": text})
    return blocks


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:  # some templates take the text as it is, and some data sets hold calls that are not JSON
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    return call


@dataclass(frozen=True)
class Ending:
    """How an assistant turn ends."""

    text: str
    """The marker that ends it and is trained."""
    own: bool
    """True: the turn writes it. False: it is the head of whatever turn comes next (GLM-4)."""


class ChatTemplate:
    """A tokenizer's chat template with fixed keyword arguments.

    Raises InputError when it cannot render a plain question and answer, or ends an answer with no token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, kwargs: Mapping[str, Any], tokens: Tokens) -> None:
        if clash := sorted(_RESERVED & set(kwargs)):
            raise InputError(Problem(f"{', '.join(clash)} cannot be set", key="chat_template_kwargs"))
        self._tokenizer, self._text, self._kwargs, self._tokens = tokenizer, text, dict(kwargs), tokens
        self.plain: Ending = self._probe_plain()
        self._spell: Callable[[Message], Rendered] | None = None
        self.call: Ending | None = None
        self._probe_calls()
        self._tools_as_field = self._probe_tools()
        self.assistant_may_write = self._probe_inner()

    def render(self, messages: Rendered, tools: Tools = (), *, prompt: bool) -> str:
        """The text of a conversation; ``prompt`` adds the generation prompt. Raises InputError with the template's own words."""
        if self._tools_as_field and tools:
            messages, tools = _with_tools_field(messages, tools), ()
        return self._run(messages, tools, prompt=prompt)

    def _run(self, messages: Rendered, tools: Tools = (), *, prompt: bool = False) -> str:
        try:
            return cast(
                str,
                self._tokenizer.apply_chat_template(
                    cast(Any, messages),
                    tools=cast(Any, list(tools) or None),
                    chat_template=self._text,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **self._kwargs,
                ),
            )
        except _BROKEN as error:
            raise InputError(f"the chat template refuses this conversation: {str(error)[:200]}") from error

    def spell(self, message: Message) -> Rendered:
        """``message`` in the words that the template knows. Raises InputError for a tool call that it would leave out."""
        if self._spell is not None:
            return self._spell(message)
        if message.get("tool_calls"):
            raise InputError("the chat template does not render tool calls", hint="set model.chat_template to one that does")
        return _as_openai(message)

    # Probes

    def _probe_plain(self) -> Ending:
        asked: Rendered = [{"role": "user", "content": _ASK}]
        answered: Rendered = [*asked, {"role": "assistant", "content": _ANSWER}]
        final = self._run(answered)
        between = self._run([*answered, {"role": "user", "content": _ASK}])
        if _ANSWER not in final or _ANSWER not in between:
            raise InputError("the chat template leaves out the assistant's answer", hint="set model.chat_template to one that does not")
        ending = self._ending(final.rpartition(_ANSWER)[2], between.partition(_ANSWER)[2].partition(_ASK)[0], own=None)
        if ending is None:
            raise InputError(
                "the chat template ends an assistant turn with no token of its own, so a model could not learn to stop",
                hint="set model.chat_template to one that writes such a token (eos_token) after the answer",
            )
        return ending

    def _ending(self, final: str, between: str, own: bool | None) -> Ending | None:
        """The end of a turn from what follows its text: at the end of a conversation, and in the middle of one.

        What both have in common belongs to the turn, and its last marker is the end. (Phi-3 adds an eos to every conversation that is
        complete; Cohere closes the response, and then the turn.) When they have no marker in common, a marker of the complete
        conversation is the end (gpt-oss), and without any the next turn's head is.
        """
        pattern = self._tokens.pattern
        shared = next((i for i, (a, b) in enumerate(zip(final, between, strict=False)) if a != b), min(len(final), len(between)))
        inside = [match for match in pattern.finditer(final) if match.end() <= shared]
        if own is not False and (inside or pattern.search(final)):
            match = inside[-1] if inside else pattern.search(final)
            return Ending(match[0], own=True) if match else None
        following = pattern.search(between, len(final)) if between.startswith(final) else None
        if own is not True and following and following.start() == len(final):
            return Ending(following[0], own=False)
        return None

    def _probe_calls(self) -> None:
        call = {"type": "function", "id": "call00001", "function": {"name": _TOOL, "arguments": {"key": _VALUE}}}
        turn: list[Message] = [
            {"role": "user", "content": _ASK},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": _RESULT, "name": _TOOL, "tool_call_id": "call00001"},
        ]
        for spell in (_as_openai, _as_metadata):
            spelled = [block for message in turn for block in spell(message)]
            try:
                final, between = self._run(spelled[:-1]), self._run(spelled)
            except InputError:
                continue  # a probe: a template without tools may refuse it
            if all(word in between for word in (_TOOL, _VALUE, _RESULT)) and _VALUE in final:
                self._spell = spell
                tails = final.rpartition(_VALUE)[2], between.partition(_VALUE)[2].partition(_RESULT)[0]
                self.call = self._ending(*tails, own=self.plain.own)
                return

    def _probe_tools(self) -> bool:
        """Does the template take tools as a field of a system message (GLM-4) and not as an argument?"""
        asked: Rendered = [{"role": "user", "content": _ASK}]
        parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "probe"}}, "required": ["key"]}
        tools = [{"type": "function", "function": {"name": _TOOL, "description": "probe", "parameters": parameters}}]
        for as_field in (False, True):
            try:
                text = self._run(_with_tools_field(asked, tools) if as_field else asked, () if as_field else tools)
            except InputError:
                continue  # a probe, as above
            if _TOOL in text:
                return as_field
        return False

    def _probe_inner(self) -> frozenset[str]:
        """Markers that an assistant's text may really contain: those that are not flagged special and that do not make up turns.

        ``<think>`` of Qwen3 is one: the model writes it as one token inside its own turn, and the template reads it there.
        """
        prompt = self._run([{"role": "user", "content": _ASK}], prompt=True)
        before = self._run([{"role": "user", "content": _ASK}])
        head = self._tokens.pattern.search(prompt, len(before) if prompt.startswith(before) else 0)
        turns = set(self._tokens.pattern.findall(before)) | {self.plain.text}
        turns |= {head[0]} if head else set()
        turns |= {self.call.text} if self.call else set()
        return frozenset(m.text for m in self._tokens.markers.values() if not m.special and m.text not in turns)


def _with_tools_field(messages: Rendered, tools: Tools) -> Rendered:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "tools": list(tools)}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": list(tools)}, *messages]
