"""The types of records that stages need, and converting records to them."""

from __future__ import annotations

from typing import Any

from align.data.records import Conversation, Graded, Preference, Prompt, Record, Unpaired
from align.data.strict_json import RowError
from align.recipe.language.marks import RecordType
from align.recipe.rows.mapping import RowMapping

Want = RecordType
"""The type of record that is needed; for a stage's data the kind defines it (``Stage.reads``)."""

_LABELLED = (
    "is one answer with a label, and the first rows are none: where such answers are compared within a prompt, a source"
    " gives nothing else; give them by a function of their own, as a second source"
)
_UNSORTED = "has a label, and answers labelled false must not be trained on; `where: {keep}` keeps the good ones"
_NO_GRADES = "has no grades; `format: {prompt: ..., completion: ..., grades: {NAME: PLACE}}` says where they stand"
_GRADED = (
    "is one answer with grades: a `reward` stage with `grades` learns from it; to compare answers, use `group` and"
    " `better: {score: ...}`"
)
_WANTED = {
    "preference": "a preference, with chosen and rejected answers",
    "unpaired": "an answer with a label, or chosen and rejected ones",
}


def narrow(record: Record, want: Want, *, good: bool = False, keep: str = "{label: true}") -> Record:
    """The record as one of type ``want``; ``good`` says that the source keeps only answers labelled true, and ``keep``
    is the condition, as a recipe writes it, that would keep them.

    Raises :class:`RowError` when it cannot be one.
    """
    if want == "prompt":
        asked = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
        return Prompt(asked, record.id, record.origin, record.tools, record.fields)
    if isinstance(record, Prompt):
        raise RowError(f"ends with the {record.prompt[-1]['role']}: there is no answer to train on")
    if want == "graded" or isinstance(record, Graded):
        if not isinstance(record, Graded):
            raise RowError(_NO_GRADES)
        if want != "graded":
            raise RowError(_GRADED, "grades")
    elif isinstance(record, Unpaired):
        if want == "preference":
            raise RowError(_LABELLED, "label")
        if want == "conversation":
            if not (good and record.label):
                raise RowError(_UNSORTED.format(keep=keep), "label")
            before: Any = [{**m, "train": False} if m["role"] == "assistant" else m for m in record.prompt]
            return Conversation((*before, *record.completion), record.id, record.origin, record.tools, record.fields)
    elif isinstance(record, Preference):
        if want == "conversation":
            return Conversation(record.prompt + record.chosen, record.id, record.origin, record.tools, record.fields)
    elif want != "conversation":
        raise RowError(f"is a conversation; wanted is {_WANTED[want]}")
    return record


def is_labelled(mapping: RowMapping) -> bool:
    """Do rows of this mapping have one answer with a label?"""
    labels = mapping.better is not None and mapping.better.label is not None
    return labels and (mapping.completion is not None or mapping.messages is not None)


def kinds_of(mapping: RowMapping) -> tuple[Want, ...]:
    """The types of the records that a mapping can give."""
    if mapping.grades:
        return ("graded",)
    if is_labelled(mapping):
        return ("unpaired",)
    if mapping.chosen is not None or mapping.answers is not None or mapping.tree is not None:
        return ("preference",)
    if mapping.messages is not None:
        return ("conversation", "prompt")
    return ("conversation",) if mapping.completion is not None else ("prompt",)
