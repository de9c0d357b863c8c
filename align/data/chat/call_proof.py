"""Proving that the rendered text of a conversation contains all its tool calls: each call, with its name and every
value of its arguments, in order.

Templates write calls as JSON, XML, Python or otherwise, so they cannot be parsed from the text. Instead the template
renders the conversation a second time, with every name, text and number in the arguments replaced by a stand-in: a word
that occurs nowhere else. All stand-ins must be in the output, call after call. Replacing them there by the real values
must give exactly the text of the conversation.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from align.data.chat.message_forms import name_of, object_of
from align.data.records import Message
from align.errors import InputError

_NONCE = secrets.token_hex(4)
_LETTERS = f"Vz{_NONCE}k"
_DIGITS = f"9{int(_NONCE, 16) % 10**8:08d}"


class _Payload(str):
    """The input of a custom tool. A template may trim white space at its ends, as with any content."""

    __slots__ = ()


@dataclass
class _Call:
    """The stand-ins of one call."""

    message: int
    """Index of its message in the conversation."""
    name: str
    leaves: dict[str, Any] = field(default_factory=dict)
    """Stand-in -> the name, text or number that it replaces; the name comes first."""
    paths: dict[str, str] = field(default_factory=dict)
    """Stand-in -> description of the value, for messages."""
    keys: list[str] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    """Booleans and nulls, which are not replaced because a template may test them."""


class CallProof:
    """The calls of a conversation with stand-ins in their places."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._calls: list[_Call] = []
        self._number = 0
        self.messages: list[Message] = [self._masked(k, message) for k, message in enumerate(messages)]
        """The conversation with stand-ins, to be rendered in the same way."""

    def check(self, text: str, masked: str, ends: re.Pattern[str]) -> None:
        """Raise InputError unless ``masked`` has all stand-ins and becomes ``text`` when they are replaced by the names
        and values.

        ``text`` and ``masked`` are renderings of the conversation and of :attr:`messages`; ``ends`` matches what ends a
        turn.
        """
        leaves = {stand_in: value for call in self._calls for stand_in, value in call.leaves.items()}
        found = list(re.finditer("(['\"]?)(" + "|".join(map(re.escape, leaves)) + r")\1", masked))
        self._require_order([match[2] for match in found], masked, ends)
        at = begin = 0
        ahead = [match.start() for match in found[1:]] + [len(masked)]
        for match, stop in zip(found, ahead, strict=True):
            piece = masked[begin : match.start()]
            following = masked[match.end() : stop]
            reached = _after(text, at, piece, following, _forms(leaves[match[2]], match[1]))
            if reached is None:
                raise InputError(f"the chat template does not render {self._what(match[2])} as it is")
            at, begin = reached, match.end()
        if text[at:] != masked[begin:]:
            raise InputError("the chat template renders tool calls so that they cannot be proved to be complete")

    def _require_order(self, found: Sequence[str], masked: str, ends: re.Pattern[str]) -> None:
        places: dict[str, list[int]] = {}
        for place, stand_in in enumerate(found):
            places.setdefault(stand_in, []).append(place)
        last = -1
        for number, call in enumerate(self._calls):
            missing = next((stand_in for stand_in in call.leaves if stand_in not in places), None)
            if missing is not None:
                raise InputError(f"the chat template leaves out {self._what(missing)}", hint=_hint(self._calls, number))
            first = min(places[stand_in][0] for stand_in in call.leaves)
            if first <= last:
                raise InputError(
                    f"the chat template mixes up {self._what(next(iter(call.leaves)))} and the call before it"
                )
            # A template may name a call again where it renders the result, so only the first place of each part counts.
            last = max(places[stand_in][0] for stand_in in call.leaves)
            self._require_rest(call, masked, ends)

    def _require_rest(self, call: _Call, masked: str, ends: re.Pattern[str]) -> None:
        """Keys, and values without a stand-in, must occur between the call's stand-ins and the end of the turn."""
        begin = min(masked.find(stand_in) for stand_in in call.leaves)
        later = [masked.find(next(iter(other.leaves)), begin) for other in self._calls if other is not call]
        limit = ends.search(masked, begin)
        stop = min([place for place in later if place > begin] + [limit.start() if limit else len(masked)])
        span = masked[begin:stop]
        for key in call.keys:
            if (
                key not in span
                and json.dumps(key, ensure_ascii=False)[1:-1] not in span
                and json.dumps(key)[1:-1] not in span
            ):
                raise InputError(f"the chat template leaves out {key!r} of the call {call.name!r}")
        lower = span.lower()
        for flag in (True, False):
            if len(re.findall(rf"\b{str(flag).lower()}\b", lower)) < call.flags.count(flag):
                raise InputError(f"the chat template leaves out a value {str(flag).lower()} of the call {call.name!r}")

    def _what(self, stand_in: str) -> str:
        call = next(call for call in self._calls if stand_in in call.leaves)
        return call.paths[stand_in]

    # Stand-ins

    def _masked(self, place: int, message: Message) -> Message:
        if not message.get("tool_calls"):
            return message
        return cast(Message, {**message, "tool_calls": [self._call(place, call) for call in message["tool_calls"]]})

    def _call(self, place: int, call: Mapping[str, Any]) -> dict[str, Any]:
        name = name_of(call)
        made = _Call(place, name)
        self._calls.append(made)
        stand_in = self._new(made, name, f"the name of the call {name!r}")
        if "custom" in call:
            text = self._new(made, _Payload(call["custom"]["input"]), f"the payload of the call {name!r}")
            return {**call, "custom": {**call["custom"], "name": stand_in, "input": text}}
        inner = dict(call.get("function", call))
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = object_of(arguments)
        inner |= {"name": stand_in, "arguments": self._value(made, arguments, "")}
        return {**call, "function": inner} if "function" in call else inner

    def _value(self, call: _Call, value: Any, path: str) -> Any:
        """``value`` with stand-ins of the same types: a template may write a text and a number differently."""
        if isinstance(value, Mapping):
            call.keys += map(str, value)
            return {key: self._value(call, item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._value(call, item, f"{path}.{i}") for i, item in enumerate(value)]
        if isinstance(value, bool):
            call.flags.append(value)
            return value
        if value is None:
            return value
        what = (
            f"the value of {path!r} in the call {call.name!r}" if path else f"the arguments of the call {call.name!r}"
        )
        return self._new(call, value, what)

    def _new(self, call: _Call, value: Any, what: str) -> Any:
        self._number += 1
        made: Any = f"{_LETTERS}{self._number:04d}zV"
        if isinstance(value, int):
            made = int(f"{_DIGITS}{self._number:04d}")
        elif isinstance(value, float):
            made = float(f"{_DIGITS[:8]}{self._number:04d}.25")
        call.leaves[str(made)] = value
        call.paths[str(made)] = what
        return made


def _after(text: str, at: int, piece: str, following: str, forms: Sequence[str]) -> int | None:
    """The end of a value in ``text``: after ``piece`` at ``at`` the text has one of its ``forms``, then ``following``.
    None if it does not."""
    if not text.startswith(piece, at):
        return None
    at += len(piece)
    for form in forms:
        if text.startswith(form, at) and text.startswith(following, at + len(form)):
            return at + len(form)
    return None


def _forms(value: Any, quote: str) -> list[str]:
    """The texts by which a template may write a value, the longest first. ``quote`` is the quotation mark around it,
    part of the text."""
    if not isinstance(value, str):
        texts = {json.dumps(value), str(value)}
        return sorted((quote + text + quote for text in texts), key=lambda text: -len(text))
    plain, escaped = json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]
    inner = {value, plain, escaped, _html(plain), _html(escaped), repr(str(value))[1:-1]}
    inner |= {value.strip()} if isinstance(value, _Payload) else set()
    inner |= {json.dumps(text, ensure_ascii=False)[1:-1] for text in (plain, escaped)}  # JSON as a text within JSON
    forms = {quote + text + quote for text in inner}
    if quote == "'":
        forms.add(repr(str(value)))  # Python takes double quotes around a text with an apostrophe
    return sorted(forms, key=lambda text: -len(text))


def _html(text: str) -> str:
    """``text`` with the escapes of Jinja's ``tojson``."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("'", "\\u0027")


def _hint(calls: Sequence[_Call], number: int) -> str | None:
    several = number > 0 and calls[number - 1].message == calls[number].message
    return (
        "it renders one call in a message only: leave such rows out, or set model.chat_template to one that renders all"
        if several
        else None
    )
