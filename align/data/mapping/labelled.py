"""Making preferences of labelled answers: the good answers to a prompt against the bad ones."""

from __future__ import annotations

import json
from collections.abc import Sequence

from align.data.mapping.better import compare
from align.data.mapping.comparisons import SAME_TWICE
from align.data.messages.messages import Note
from align.data.records import Preference, Record, Unpaired
from align.data.rows import LeftOut

ONLY_GOOD = "labelled answers without a bad one to the same prompt"
ONLY_BAD = "labelled answers without a good one to the same prompt"
EVEN = "an answer labelled good as often as bad, left out"
REMARK = "answers with labels: the good ones are compared with the bad ones to the same prompt"


def key_of_prompt(record: Record) -> str:
    """The key that answers share which may be compared: prompt and tools."""
    assert isinstance(record, Unpaired)
    return json.dumps([record.prompt, record.tools], sort_keys=True)


def paired(answers: Sequence[Unpaired], pairs: str, note: Note) -> tuple[Preference, ...]:
    """The preferences made of the labelled answers to one prompt; with ``pairs: each`` one for each good answer, with
    all bad ones rejected.

    Equal answers count as one, whose label is that of the majority. Raises :class:`LeftOut` when there are only good
    answers, or only bad ones.
    """
    labels: dict[str, list[bool]] = {}
    first: dict[str, Unpaired] = {}
    for answer in answers:
        said = json.dumps([{**m, "content": m["content"].strip()} for m in answer.completion], sort_keys=True)
        if said in first:
            note(SAME_TWICE)
        first.setdefault(said, answer)
        labels.setdefault(said, []).append(answer.label)
    kept: list[tuple[Unpaired, float]] = []
    for said, given in labels.items():
        if 2 * sum(given) == len(given):
            note(EVEN)
        else:
            kept.append((first[said], float(2 * sum(given) > len(given))))
    scores = [score for _, score in kept]
    if not any(scores) or all(scores):
        raise LeftOut(ONLY_GOOD if any(scores) else ONLY_BAD)
    found = []
    for one in compare(scores, pairs, None):
        good = kept[one.best][0]
        rejected = tuple(kept[place][0].completion for place in one.worse)
        found.append(
            Preference(
                good.prompt, good.completion, rejected, good.id, good.origin, tools=good.tools, fields=good.fields
            )
        )
    return tuple(found)
