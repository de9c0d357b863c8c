"""The encoder from chats to tokens, used by every stage, rollouts, scoring, chat and evaluation.

Contract:

- For ordinary text, ids equal ``tokenizer.apply_chat_template(messages)``; GLM-4's end-of-chat role token is appended
  to it.
- The targets of an assistant message are the tokens that the model has to generate: everything after the generation
  prompt, up to and including the token that ends the turn. White space that a template puts after that token is not a
  target, and neither is the end token of a message with ``finished: false``.
- The tokens before a trained message are those of :meth:`Encoder.encode_prompt`, so training and inference see the same
  context. If the first characters of an answer would merge with the end of its prompt into one token, the two are
  encoded separately, and that is counted.
- Text in the data never becomes a control token, even if it equals one. Control tokens are those that are flagged
  special and those that the template writes. Other added tokens (HTML tags in Gemma's vocabulary) are ordinary words,
  in prompts and in answers.
- An answer that a policy sampled is trained on exactly the sampled ids (``Message["sampled"]``).
- A template that renders an earlier turn differently once more turns follow (Qwen3 drops ``<think>``) is refused for
  training that turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from align.data.chat.message_forms import Tools
from align.data.chat.rendering import Hiders, RenderedRow
from align.data.chat.template import ChatTemplate, Ending, date_of, midnight
from align.data.chat.tokens import Tokenized, Tokens
from align.data.records import Message
from align.data.strict_json import unreadable
from align.data.tree import Branch, Ids, Mask
from align.errors import InputError, Problem
from align.files import digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens. ``mask[t]`` is true where ``ids[t]`` is a training target."""

    ids: Ids  # [n]
    mask: Mask  # [n]


@dataclass
class Notes:
    """Counts of what a report should mention about encoded text. Pass an instance to collect them."""

    merged: int = 0
    """Answers whose first characters would have merged with the end of their prompt into one token."""
    control: int = 0
    """Control-token texts found in the data and encoded as plain text."""
    closed: int = 0
    """Trained answers without reasoning, before which the template writes the end of the reasoning."""
    tags: int = 0
    """Answers with think tags in their content that the template treats as text."""
    text_only: int = 0
    """Sampled answers that were encoded from their text, because their ids belong to another encoder or other messages
    follow."""

    def add(self, other: Notes) -> None:
        """Add the counts of ``other``."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class _Turn:
    """The characters of one assistant message: ``begin`` right after its generation prompt, ``end`` right after its end
    token."""

    index: int
    begin: int
    end: int | None  # None: not determined


class Encoder:
    """Encodes conversations for one tokenizer, template and set of template arguments.

    ``chat_template`` is the text of a template that replaces the tokenizer's own. Raises InputError for a tokenizer
    without a template, a slow tokenizer, and a template that cannot be trained on. The tokenizer is not changed, and
    later changes to it have no effect.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template_date: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell where its tokens come from",
                hint=(
                    "convert it to tokenizer.json (AutoTokenizer.from_pretrained(...,"
                    " use_fast=True).save_pretrained(...))"
                ),
            )
        self.tokenizer = tokenizer
        self.chat_template: str | dict[str, str] = (
            chat_template if chat_template is not None else _own_template(tokenizer)
        )
        """The model's templates by name, or its only one."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {_USED[0]: self.chat_template}
        used = {name: named[name] for name in _USED if name in named}
        self.template: str = used[_USED[0]]
        """The template of conversations without tools; of all conversations if there is only one."""
        self.template_kwargs = dict(template_kwargs or {})
        self._tokens = Tokens(cast(Any, tokenizer).backend_tokenizer.to_str())
        now = midnight(chat_template_date)
        self._templates = {
            name: ChatTemplate(tokenizer, text, self.template_kwargs, self._tokens, now) for name, text in used.items()
        }
        self.chat_template_date: str | None = date_of(self._templates.values(), chat_template_date)
        """The date that the template gets; None when it prints no date."""
        self._hiders = {name: Hiders.of(self._tokens, template) for name, template in self._templates.items()}
        control = frozenset[str]().union(*(template.control for template in self._templates.values()))
        self._control = frozenset(marker.id for marker in self._tokens.markers.values() if marker.text in control)
        self.stop_ids: tuple[int, ...] = self._find_stops()
        """The ids that end an assistant turn: first that of the template, then the tokenizer's eos."""
        pad = tokenizer.pad_token_id
        self.pad_id: int = int(cast(int, pad if pad is not None else self.stop_ids[0]))
        """Id of padding. It may equal a stop id, since no code recognises padding by its id."""
        self.vocabulary: int = max(tokenizer.get_vocab().values()) + 1
        """Ids from this one on have no token, even if the model has embeddings for them."""
        identity: dict[str, Any] = {
            "tokenizer": hashlib.sha256(self._tokens.canonical.encode("utf-8")).hexdigest(),
            "special": {name: str(text) for name, text in tokenizer.special_tokens_map.items()},
            "template": used if len(used) > 1 else self.template,
            "template_kwargs": self.template_kwargs,
        }
        if self.chat_template_date is not None:
            identity["date"] = self.chat_template_date
        self.digest: str = digest_json(identity)
        """Digest of everything that ids and masks depend on."""

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        train_on: Literal["all", "last"] = "all",
        *,
        notes: Notes | None = None,
    ) -> Encoded:
        """Ids and training mask of a whole conversation.

        ``train_on`` chooses between all assistant messages and the last one; a message with ``train: false`` is never a
        target, which affects only its own mask. Raises InputError when the template refuses the conversation, leaves a
        part of it out, or rewrites a turn that is to be trained.
        """
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = answers if train_on == "all" else answers[-1:]
        ids, mask, _ = self._encode(messages, tools, {k for k in chosen if messages[k].get("train", True)}, notes)
        return Encoded(ids, mask)

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = (), *, notes: Notes | None = None) -> Ids:
        """Ids int32 [p] of a conversation that a model is to continue; ends with the generation prompt.

        Raises InputError as :meth:`encode` does, and when the last message is the assistant's.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise InputError("a prompt must end with a message of the user or a tool result")
        row = self._row(messages, tools)
        text = row.render(len(messages), prompt=True)
        row.check_context(text, prompt=True)
        cuts = [turn.begin for turn in self._turns(row, text, set())]
        return self._tokenize(row, text, cuts, [], notes).ids

    def encode_answers(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        tools: Tools = (),
        *,
        notes: Notes | None = None,
    ) -> tuple[Ids, tuple[Branch, ...]]:
        """One prompt and its answers: the trunk int32 [p], and a branch for each answer, in order.

        The trunk is ``encode_prompt(prompt)``; trunk and branch together are ``encode`` of the whole conversation. An
        answer is a list of messages that begins with the assistant's; only its assistant messages are targets. Raises
        InputError as :meth:`encode` does; in particular when the template renders an answer so that it does not
        continue the prompt.
        """
        shared = Notes()
        trunk = self.encode_prompt(prompt, tools, notes=shared)
        counted = [shared]
        branches = []
        for answer in answers:
            if not answer or answer[0]["role"] != "assistant":
                raise InputError("an answer must begin with a message of the assistant")
            messages = (*prompt, *answer)
            trained = {k for k in range(len(prompt), len(messages)) if _is_target(messages[k])}
            own = Notes()
            ids, mask, starts = self._encode(messages, tools, trained, own, boundary=len(prompt))
            counted.append(replace(own, merged=own.merged - shared.merged, control=own.control - shared.control))
            assert np.array_equal(ids[: starts[0]], trunk), "an answer must not change the tokens of its prompt"
            branches.append(Branch(ids[len(trunk) :], mask[len(trunk) :]))
        if notes is not None:
            for one in counted:
                notes.add(one)
        return trunk, tuple(branches)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, without special tokens and without the token that ended the turn."""
        kept = [int(i) for i in ids]
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        return cast(str, self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def until_stop(self, ids: Iterable[int]) -> tuple[int, ...]:
        """Sampled ids up to and including the first stop id. The rest is not part of the answer: it is padding, or was
        sampled after the end."""
        said = []
        for token in ids:
            said.append(int(token))
            if said[-1] in self.stop_ids:
                break
        return tuple(said)

    def answer_text(self, ids: Sequence[int], *, finished: bool) -> str:
        """The text of a policy's answer for scorers, embedders, data files and people.

        White space at its beginning is removed (some templates write it), and so is a character whose bytes are
        incomplete. Empty when it contains NUL, which data files cannot have.
        """
        text = self.decode(ids).lstrip()
        if not finished:
            text = text.rstrip("\ufffd")
        return "" if unreadable(text) else text

    def spell(self, ids: Iterable[int]) -> str:
        """Text of ids with all special tokens, for people to read."""
        return cast(
            str,
            self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False),
        )

    def is_control(self, token: int) -> bool:
        """Is ``token`` a control token, which text in the data never becomes?"""
        return token in self._control

    # Implementation

    def _row(self, messages: Sequence[Message], tools: Tools) -> RenderedRow:
        """The rendered conversation. As in transformers, one with tools uses the template ``tool_use`` if there is
        one."""
        name = _USED[1] if tools and _USED[1] in self._templates else _USED[0]
        return RenderedRow(self._templates[name], self._hiders[name], messages, tools)

    def _encode(
        self,
        messages: Sequence[Message],
        tools: Tools,
        trained: set[int],
        notes: Notes | None,
        boundary: int | None = None,
    ) -> tuple[Ids, Mask, tuple[int, ...]]:
        """Ids, mask, and the token at which each turn of ``trained`` (and the one at ``boundary``) begins."""
        sampled = self._sampled(messages, notes)
        last = len(messages) - 1
        row = self._row(messages if sampled is None else messages[:-1], tools)
        text = row.render(len(row.messages), prompt=sampled is not None)
        tagged = row.check_context(text, prompt=sampled is not None)
        if sampled is None and messages[-1]["role"] == "assistant":
            text += self._hand_over(row, messages[-1])
        asked = trained if boundary is None else trained | {boundary}
        turns = self._turns(row, text, asked)
        spans = [turn for turn in turns if turn.index in asked]
        places = [place for turn in spans for place in (turn.begin, cast(int, turn.end))]
        tokenized = self._tokenize(row, text, [turn.begin for turn in turns], places, notes)
        ids = tokenized.ids
        begins = tokenized.places[::2]
        ends = tokenized.places[1::2]
        mask = np.zeros(len(ids), dtype=np.bool_)
        for turn, begin, end in zip(spans, begins, ends, strict=True):
            if turn.index in trained:
                # The end token of an answer that was cut off was written by the template, not by the model.
                mask[begin : end if messages[turn.index].get("finished", True) else end - 1] = True
        if notes is not None:
            notes.tags += tagged
            notes.closed += sum(_closes_thinking(row, turn, text) for turn in spans if turn.index in trained)
        if sampled is not None:
            begins = (*begins, len(ids)) if last in asked else begins
            ids, mask = np.concatenate([ids, sampled]), np.concatenate([mask, np.full(len(sampled), last in trained)])
        return ids, mask, begins

    def _sampled(self, messages: Sequence[Message], notes: Notes | None) -> Ids | None:
        """The sampled ids of the last message; None if it has none, or if they are of another tokenizer or template."""
        kept = [k for k, message in enumerate(messages) if "sampled" in message]
        found = None
        if kept and kept[-1] == len(messages) - 1 > 0 and messages[-1]["sampled"]["encoder"] == self.digest:
            last = messages[-1]
            finished, ids = last.get("finished", True), last["sampled"]["ids"]
            if not ids or not 0 <= min(ids) <= max(ids) < self.vocabulary or (ids[-1] in self.stop_ids) != finished:
                raise InputError(
                    "`sampled` holds ids that no policy can have sampled", hint="remove `sampled` from the message"
                )
            if self.answer_text(ids, finished=finished) != last["content"]:
                hint = "remove `sampled` from messages whose content was changed"
                raise InputError("the ids in `sampled` say something else than the content", hint=hint)
            found = np.array(ids, dtype=np.int32)
        if notes is not None:
            notes.text_only += len(kept) - (found is not None)
        return found

    def _hand_over(self, row: RenderedRow, last: Message) -> str:
        """The marker that ends a conversation's last turn if the template writes it only as the head of the next turn
        (GLM-4: ``<|user|>``); else empty."""
        ending = (row.template.call if last.get("tool_calls") else None) or row.template.plain
        return "" if ending.own else ending.text

    def _turns(self, row: RenderedRow, text: str, asked: set[int]) -> list[_Turn]:
        """The assistant turns of a rendered conversation that continue their generation prompt. Raises InputError when
        one of ``asked`` does not."""
        turns = []
        for k, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            if k == 0:
                if k in asked:
                    raise InputError(
                        "the conversation begins with the assistant, so there is no prompt for its first message"
                    )
                continue
            prompt = row.render(k, prompt=True)
            if text.startswith(prompt):
                turns.append(_Turn(k, len(prompt), self._end_of(row, k, text, len(prompt)) if k in asked else None))
            elif k in asked:
                raise _rewritten(last=k == len(row.messages) - 1)
        return turns

    def _end_of(self, row: RenderedRow, k: int, text: str, begin: int) -> int:
        """Index after the end token of turn ``k``. Raises InputError when later messages change how the turn is
        rendered."""
        final = k == len(row.messages) - 1
        alone = text if final else row.render(k + 1, prompt=False)
        if row.template.plain.own:
            endings = {ending.text for ending in _endings(row.template)}
            end = max((at + len(e) for e in endings if (at := alone.rfind(e, begin)) >= 0), default=-1)
            if end < 0:
                raise InputError("the chat template does not end this assistant message with its end token")
        else:
            head = None if final else self._tokens.pattern.search(text, len(alone))
            if head and head[0] not in {ending.text for ending in _endings(row.template)}:
                raise InputError(
                    f"the chat template lets {head[0]} follow an answer, with which a model cannot end one"
                )
            if final:
                end = len(text)
            elif head and head.start() == len(alone):
                end = head.end()
            else:
                end = -1
        if end < 0 or not text.startswith(alone[: min(end, len(alone))]):
            raise _rewritten(last=False)
        row.check_answer(k, text, begin, end)
        return end

    def _tokenize(
        self, row: RenderedRow, text: str, cuts: list[int], places: list[int], notes: Notes | None
    ) -> Tokenized:
        tokenized = self._tokens.encode(text, cuts, places, hidden=row.hidden > 0)
        if notes is not None:
            notes.merged += tokenized.merged
            notes.control += row.hidden
        return tokenized

    def _find_stops(self) -> tuple[int, ...]:
        endings = [ending.text for template in self._templates.values() for ending in _endings(template)]
        if not self._templates[_USED[0]].plain.own:
            # Models of GLM's family also stop before tool results, even if this template has no tools.
            endings += [text for text in ("<|observation|>", "<|endoftext|>") if text in self._tokens.markers]
        ids = [self._tokens.markers[text].id for text in endings]
        if self.tokenizer.eos_token_id is not None:
            ids.append(int(cast(int, self.tokenizer.eos_token_id)))
        return tuple(dict.fromkeys(ids))


_USED = ("default", "tool_use")
"""Names of the templates that transformers chooses by default: for conversations without tools, and with tools."""


def _endings(template: ChatTemplate) -> list[Ending]:
    return [ending for ending in (template.plain, template.call) if ending]


def _closes_thinking(row: RenderedRow, turn: _Turn, text: str) -> bool:
    """Does the model have to write empty reasoning before an answer without reasoning?"""
    closing = row.template.closes_thinking
    return bool(closing) and not row.messages[turn.index].get("reasoning") and text.startswith(closing, turn.begin)


def _is_target(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _rewritten(*, last: bool) -> InputError:
    if last:
        return InputError(
            "the chat template renders an answer differently from its own generation prompt, so training would not"
            " match inference",
            hint="set chat_template_kwargs or chat_template so that an answer continues the prompt",
        )
    return InputError(
        "the chat template rewrites an assistant message when more messages follow, so only the last one can be"
        " trained",
        hint="set train_on: last, or chat_template to one that keeps earlier turns",
    )


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    template = tokenizer.chat_template
    if not template:
        raise InputError(
            Problem(
                "the tokenizer has no chat template (a base model)",
                key="model.chat_template",
                hint="set it to a Jinja file, with an end token that the vocabulary has",
            )
        )
    if isinstance(template, Mapping) and _USED[0] not in template:
        what = (
            f"the tokenizer has the chat templates {', '.join(sorted(template))}, and none of them is called {_USED[0]}"
        )
        raise InputError(Problem(what, key="model.chat_template", hint="set it to the Jinja file of the one to use"))
    return dict(template) if isinstance(template, Mapping) else cast(str, template)
