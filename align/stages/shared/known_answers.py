"""Conversations as prompts with a known answer, the target, with which Self-Contrast and evaluation compare samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align import files
from align.data.chat.encoder import Encoder
from align.data.records import Conversation, Message, Prompt
from align.data.report import SHOWN, DataReport
from align.data.sources.mixture import read_records
from align.data.tree import Tree
from align.data.trees.build import Limits, Unusable, tree_of
from align.data.trees.load import origins_to_skip
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError, Problem
from align.recipe.schema import DataSource
from align.stages.context import StageContext

NO_ROOM = "the prompt leaves no room for max_new_tokens in max_length"
NO_TEXT = "the answer has no text"


@dataclass(frozen=True)
class KnownAnswer:
    """A prompt and the answer that the data give, the target."""

    prompt: EncodedPrompt
    answer: Message
    tree: Tree
    """The prompt, with its generation prompt, as trunk; the answer, with its end token, as the only branch."""

    @property
    def text(self) -> str:
        """The text of the answer."""
        return self.answer["content"]

    @property
    def id(self) -> str:
        """Id of the row."""
        return self.prompt.record.id


def read_targets(
    sources: Sequence[DataSource],
    ctx: StageContext,
    encoder: Encoder,
    *,
    max_length: int,
    max_new_tokens: int,
    rejects: Path | None,
) -> tuple[list[KnownAnswer], DataReport]:
    """The last turn of every conversation of ``sources`` as target, and what became of the rows.

    Left out are rows whose prompt with its answer, or with ``max_new_tokens`` more, is longer than ``max_length``
    tokens, and answers without text. ``rejects`` gets one JSON line for each row that was left out.

    Raises :class:`InputError` for bad rows (unless their source skips them), and when no row is left.
    """
    locations = [ctx.resolve(source.path) for source in sources]
    skipping = origins_to_skip(sources, locations)
    records = read_records(sources, locations, "conversation", seed=ctx.seed, rejects=rejects)
    limits = Limits(max_length, "drop", "last")
    report, targets = DataReport("conversation"), list[KnownAnswer]()
    refused: list[Problem] = []
    dropped: list[dict[str, Any]] = []
    for record in records:
        assert isinstance(record, Conversation)
        try:
            targets.append(_target(record, encoder, limits, max_new_tokens, report))
        except (Unusable, InputError) as error:
            problem = error.problems[0] if isinstance(error, InputError) else Problem(str(error))
            origin = record.origin
            if isinstance(error, InputError) and origin.source not in skipping:
                refused.append(origin.blamed(problem))
            report.drop(problem.message, origin)
            dropped.append(
                {"source": origin.source, "line": origin.line, "field": None, "reason": problem.message, "content": ""}
            )
    report.source_lines, report.sources = records.report.lines(), records.report.as_json()
    if refused:
        raise InputError(
            [*refused[:SHOWN], Problem(f"{len(refused)} such rows", hint="`on_bad_row: skip` leaves them out")]
        )
    if not targets:
        reasons = ", ".join(f"{count.total:,} {reason}" for reason, count in report.dropped.items())
        raise InputError(
            Problem(f"0 rows left of {records.report.given:,}: {reasons}", file=", ".join(s.path for s in sources))
        )
    if rejects is not None and dropped:
        bad = rejects.read_text(encoding="utf-8") if rejects.exists() else ""
        files.atomic_write(rejects, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped) + bad)
    return targets, report


def _target(
    record: Conversation, encoder: Encoder, limits: Limits, max_new_tokens: int, report: DataReport
) -> KnownAnswer:
    """Raises Unusable, or InputError as the encoder does."""
    prompt, answer = record.messages[:-1], record.messages[-1]
    if not answer.get("content", "").strip():
        raise Unusable(NO_TEXT)
    tree = tree_of(record, encoder, limits, partial(report.note, origin=record.origin))
    trunk = encoder.encode_prompt(prompt, record.tools)
    if len(trunk) + max_new_tokens > limits.max_length:
        raise Unusable(NO_ROOM)
    assert len(trunk) == len(tree.trunk), "the last turn begins where its prompt ends"
    report.add(tree)
    asked = Prompt(prompt, record.id, record.origin, record.tools, record.fields)
    return KnownAnswer(EncodedPrompt(asked, tuple(trunk.tolist())), answer, tree)
