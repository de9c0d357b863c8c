"""Making a tree of a record: encoding it, cutting it to length, and refusing records without anything to learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from align.data.chat.encoder import Encoder, Notes
from align.data.records import Conversation, Graded, Preference, Prompt, Record, Unpaired
from align.data.tree import Branch, Tree

TooLong = Literal["drop", "truncate", "error"]

TOO_LONG = "longer than max_length"
PROMPT_FILLS = "the prompt alone fills max_length"
NOTHING = "nothing to train on"
SAME = "chosen and rejected are equal"
UNGRADED = "has none of the grades that are learned"
SAME_CUT = "chosen and rejected are equal once cut to max_length"

UNLEARNED = "a grade that is not learned"
CUT = "cut to max_length"
ONE_REJECTED = "a rejected answer left out"
SHORTER = f"{ONE_REJECTED}, longer than max_length"
DOUBLE = f"{ONE_REJECTED}, equal to another answer"
CONTROL = "control-token text in the data, encoded as plain text"
CLOSED = (
    "an answer without reasoning, which the template begins by closing the thinking: it teaches the model not to think"
)
TAGS = "think tags in an answer, trained as text: the chat template knows no reasoning"
TEXT_ONLY = (
    "a sampled answer encoded from its text: its ids are another tokenizer's or template's, or more messages follow it"
)
MERGED = "an answer's first characters would have merged with its prompt's last token; encoded apart"


class Unusable(Exception):
    """Raised for a record that has nothing to learn or is too long; the message is one of the reasons above."""


@dataclass(frozen=True)
class Limits:
    """How records become trees."""

    max_length: int
    """Maximum length of a path, in tokens."""
    too_long: TooLong
    """With ``truncate`` a long answer is cut at its end; otherwise the record cannot be used."""
    train_on: Literal["all", "last"]
    """Which assistant messages of a conversation are targets."""
    grades: tuple[str, ...] = ()
    """Names of the grades that are learned, in this order."""


def tree_of(record: Record, encoder: Encoder, limits: Limits, note: Callable[[str], None]) -> Tree:
    """The record as a tree; ``note`` is called with remarks for the report.

    Raises :class:`Unusable`, and InputError as :class:`Encoder` does.
    """
    notes = Notes()
    if isinstance(record, Conversation):
        tree = _conversation(record, encoder, limits, note, notes)
    elif isinstance(record, Preference):
        tree = _preference(record, encoder, limits, note, notes)
    elif isinstance(record, Unpaired):
        tree = _unpaired(record, encoder, limits, note, notes)
    elif isinstance(record, Graded):
        tree = _graded(record, encoder, limits, note, notes)
    else:
        tree = _prompt(record, encoder, limits, notes)
    for count, what in (
        (notes.control, CONTROL),
        (notes.merged, MERGED),
        (notes.closed, CLOSED),
        (notes.tags, TAGS),
        (notes.text_only, TEXT_ONLY),
    ):
        if count:
            note(what)
    return tree


def _conversation(
    record: Conversation, encoder: Encoder, limits: Limits, note: Callable[[str], None], notes: Notes
) -> Tree:
    encoded = encoder.encode(record.messages, record.tools, limits.train_on, notes=notes)
    if not encoded.mask.any():
        raise Unusable(NOTHING)
    start = int(encoded.mask.argmax())
    branch = Branch(encoded.ids[start:], encoded.mask[start:])
    fitted = _fit(branch, start, limits)
    if fitted.cut:
        note(CUT)
    return Tree(record.id, encoded.ids[:start], (fitted.branch,))


def _preference(
    record: Preference, encoder: Encoder, limits: Limits, note: Callable[[str], None], notes: Notes
) -> Tree:
    trunk, answers = encoder.encode_answers(record.prompt, (record.chosen, *record.rejected), record.tools, notes=notes)
    chosen = _fit(answers[0], len(trunk), limits)
    kept = [chosen]
    long = same = False
    for number, answer in enumerate(answers[1:]):
        try:
            rejected = _fit(answer, len(trunk), limits)
        except Unusable as reason:
            if str(reason) != TOO_LONG or limits.too_long == "error":
                raise
            long = True
            continue
        if any(np.array_equal(rejected.branch.ids, other.branch.ids) for other in kept):
            same = True
        else:
            if record.margins is not None:
                rejected = rejected.marked(margin=record.margins[number])
            if record.votes is not None:
                rejected = rejected.marked(share=record.votes[number].share)
            kept.append(rejected)
    if len(kept) == 1:
        if long:
            raise Unusable(TOO_LONG)
        raise Unusable(SAME_CUT if chosen.cut else SAME)
    for happened, what in ((long, SHORTER), (same, DOUBLE), (any(answer.cut for answer in kept), CUT)):
        if happened:
            note(what)
    return Tree(record.id, trunk, tuple(answer.branch for answer in kept))


def _unpaired(record: Unpaired, encoder: Encoder, limits: Limits, note: Callable[[str], None], notes: Notes) -> Tree:
    """A labelled answer as a tree with one branch, whose margin is the label; see :class:`Branch`."""
    trunk, (answer,) = encoder.encode_answers(record.prompt, (record.completion,), record.tools, notes=notes)
    fitted = _fit(answer, len(trunk), limits)
    if fitted.cut:
        note(CUT)
    return Tree(record.id, trunk, (fitted.marked(margin=1.0 if record.label else -1.0).branch,))


def _graded(record: Graded, encoder: Encoder, limits: Limits, note: Callable[[str], None], notes: Notes) -> Tree:
    """The one answer is the one branch."""
    grades = tuple(record.grades.get(name, math.nan) for name in limits.grades)
    if limits.grades and all(map(math.isnan, grades)):
        raise Unusable(UNGRADED)
    trunk, (answer,) = encoder.encode_answers(record.prompt, (record.completion,), record.tools, notes=notes)
    fitted = _fit(answer, len(trunk), limits)
    if fitted.cut:
        note(CUT)
    for name in record.grades:
        if limits.grades and name not in limits.grades:
            note(f"{UNLEARNED}: {name}")
    return Tree(record.id, trunk, (fitted.marked(grades=grades).branch,))


def _prompt(record: Prompt, encoder: Encoder, limits: Limits, notes: Notes) -> Tree:
    trunk = encoder.encode_prompt(record.prompt, record.tools, notes=notes)
    if len(trunk) > limits.max_length:
        raise Unusable(TOO_LONG)
    return Tree(record.id, trunk, ())


@dataclass(frozen=True)
class _Fitted:
    branch: Branch
    cut: bool

    def marked(self, **marks: Any) -> _Fitted:
        """The branch with margin, share or grades set."""
        return replace(self, branch=replace(self.branch, **marks))


def _fit(branch: Branch, trunk: int, limits: Limits) -> _Fitted:
    """The branch up to its last target, cut so that its path is not too long. No end token is added to a cut branch."""
    whole = _up_to_last_target(branch)
    room = limits.max_length - trunk
    if len(whole.ids) <= room:
        return _Fitted(whole, cut=False)
    if limits.too_long != "truncate":
        raise Unusable(TOO_LONG)
    if room <= 0:
        raise Unusable(PROMPT_FILLS)
    return _Fitted(_up_to_last_target(Branch(whole.ids[:room], whole.mask[:room])), cut=True)


def _up_to_last_target(branch: Branch) -> Branch:
    """Remove tokens after the last target (a template's line break, turns that are not trained), whose computation
    would be wasted."""
    targets = np.flatnonzero(branch.mask)
    if not len(targets):
        raise Unusable(NOTHING)
    end = int(targets[-1]) + 1
    return Branch(branch.ids[:end], branch.mask[:end])
