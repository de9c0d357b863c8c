"""What the stages that sample and score have in common: reading prompts with room for an answer, sampling, scoring, and
reporting.

Every process of a run reads the prompts and gets the same ones; the processes share the sampling and the scoring, and
the first one writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from align import files
from align.data.answer_file import AnswerRow, write_answers
from align.data.chat.encoder import Encoder
from align.data.records import Prompt
from align.data.sources.mixture import prompt_digest, read_records
from align.data.trees.load import origins_to_skip
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError, Problem
from align.functional.selection import normalised
from align.recipe.blocks.scoring import ScorerSpec
from align.recipe.kinds.sampling import SamplingStage
from align.recipe.schema import DataSource, Model
from align.rollout.engine import Sampling
from align.scoring.open import open_scorer
from align.scoring.scorer import Answer
from align.scoring.stored import score_answers
from align.scoring.text_metrics import correlation, describe, spread
from align.stages.context import StageContext
from align.stages.shared.policy_samples import answer_row, sample_policy
from align.training.launch import ranks

REPEATED = "asked before"
NO_ROOM = "leaves no room for an answer (max_length)"
TOO_FEW = "fewer than two answers that can be used"

_SHOWN = 5
_STEERING = frozenset(
    {"messages", "prompt", "completion", "completions", "chosen", "rejected", "conversations", "instruction"}
    | {"id", "margin", "votes", "grades", "scores", "system", "tools"}
)
"""Columns that are not copied from a source row into a new row, because a row's format is recognised by them or because
they are written here."""


class LeftOutPrompts:
    """Collects prompts that were left out, each with the reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, record: Prompt, reason: str, **details: float) -> None:
        """Add a prompt. ``details`` are numbers that belong to the reason."""
        place = f"{record.origin.source.rpartition('/')[2]}:{record.origin.line}"
        self.rows.append({"id": record.id, "row": place, "reason": reason, **details})

    def counts(self) -> dict[str, int]:
        """Number of prompts for each reason, in the order in which the reasons first occurred."""
        return dict(Counter(row["reason"] for row in self.rows))

    def require(self, left: Sequence[Any], what: str, sources: Sequence[DataSource]) -> None:
        """Raise InputError when ``left`` is empty."""
        if not left:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts().items())
            raise InputError(Problem(f"0 {what} left: {reasons}", file=", ".join(source.path for source in sources)))

    def table(self, title: str) -> Table:
        """A table of the counts."""
        table = Table(title=title, title_justify="left")
        table.add_column("left out", overflow="fold")
        table.add_column("prompts", justify="right")
        table.add_column("ids", overflow="fold")
        for reason, count in self.counts().items():
            ids = [row["id"] for row in self.rows if row["reason"] == reason]
            table.add_row(
                Text(reason), f"{count:,}", Text(", ".join(ids[:_SHOWN]) + (", ..." if count > _SHOWN else ""))
            )
        return table


def read_prompts(
    spec: SamplingStage,
    ctx: StageContext,
    encoder: Encoder,
    left_out: LeftOutPrompts,
    refuse: Callable[[Prompt], str | None],
) -> list[EncodedPrompt]:
    """The prompts of a stage, each once, that leave room for an answer and for which ``refuse`` returns no reason.

    Raises :class:`InputError` for bad rows and for prompts that the chat template refuses (unless their source skips
    them), and when no prompt is left.
    """
    locations = [ctx.resolve(source.path) for source in spec.prompts]
    rejects = ctx.out / "rejects.jsonl" if ranks().first else None
    skipping = origins_to_skip(spec.prompts, locations)
    records = read_records(spec.prompts, locations, "prompt", seed=ctx.seed, rejects=rejects)
    asked: list[EncodedPrompt] = []
    seen: set[str] = set()
    for record in records:
        assert isinstance(record, Prompt)
        digest = prompt_digest(record)
        reason = refuse(record) or (REPEATED if digest in seen else None)
        if reason is None:
            seen.add(digest)
            try:
                ids = tuple(encoder.encode_prompt(record.prompt, record.tools).tolist())
            except InputError as error:
                if record.origin.source not in skipping:
                    raise InputError(record.origin.blamed(error.problems[0])) from error
                left_out.add(record, error.problems[0].message)
                continue
            if len(ids) + spec.max_new_tokens <= spec.max_length:
                asked.append(EncodedPrompt(record, ids))
                continue
            reason = NO_ROOM
        left_out.add(record, reason)
    for line in records.report.lines():
        ctx.console.print(f"{ctx.name}  {line}", highlight=False, markup=False, soft_wrap=True)
    left_out.require(asked, "prompts", spec.prompts)
    return asked


# Answers


@dataclass(frozen=True)
class Answered:
    """A prompt and a policy's answers to it."""

    record: Prompt
    answers: tuple[Answer, ...]
    drop_reasons: tuple[str | None, ...]
    """Why an answer is not used: see :func:`drop_reasons_of`. None for one that is."""
    scores: tuple[float, ...]
    """Scores of the answers that are used, in order. Empty when fewer than two are: there is nothing to compare."""

    @property
    def used(self) -> list[Answer]:
        """The answers that are scored."""
        return (
            [answer for answer, reason in zip(self.answers, self.drop_reasons, strict=True) if reason is None]
            if self.scores
            else []
        )

    def rows(self, policy: str) -> Iterator[AnswerRow]:
        """All answers, as rows of ``answers.jsonl``."""
        scores = iter(self.scores)
        for number, (answer, dropped) in enumerate(zip(self.answers, self.drop_reasons, strict=True)):
            reason = dropped or (None if self.scores else TOO_FEW)
            scored = {"reward": next(scores)} if dropped is None and self.scores else {}
            yield answer_row("prompts", self.record.id, policy, number, answer, scored, left_out=reason)


def answer_prompts(
    spec: SamplingStage,
    ctx: StageContext,
    policy: Model,
    encoder: Encoder,
    asked: Sequence[EncodedPrompt],
    left_out: LeftOutPrompts,
    *,
    distinct: bool,
) -> list[Answered]:
    """Sample answers to every prompt and score them. Prompts with fewer than two usable answers are also added to
    ``left_out``.

    With ``distinct`` an answer that equals an earlier one is not used. Samples and scores of an interrupted run are
    reused. The engine is closed before a scoring model is loaded.
    """
    answers = _sample(spec, ctx, policy, encoder, asked)
    drop_reasons = [
        drop_reasons_of(group, keep_unfinished=spec.unfinished == "keep", distinct=distinct) for group in answers
    ]
    used = [
        [a for a, reason in zip(group, of, strict=True) if reason is None]
        for group, of in zip(answers, drop_reasons, strict=True)
    ]
    scores = iter(score(spec.reward, ctx, [answer for group in used if len(group) > 1 for answer in group], "scores"))
    answered = []
    for one, group, of, usable in zip(asked, answers, drop_reasons, used, strict=True):
        if len(usable) < 2:
            left_out.add(one.record, TOO_FEW, answers=len(usable))
        answered.append(
            Answered(one.record, tuple(group), of, tuple(next(scores) for _ in usable) if len(usable) > 1 else ())
        )
    return answered


def drop_reasons_of(answers: Sequence[Answer], *, keep_unfinished: bool, distinct: bool) -> tuple[str | None, ...]:
    """Why each answer is not used: ``unfinished``, ``empty``, or ``repeated`` (with ``distinct``); None for an answer
    that is used."""
    drop_reasons: list[str | None] = []
    seen: set[str] = set()
    for answer in answers:
        plain = normalised(answer.text)
        reason = None
        if not answer.finished and not keep_unfinished:
            reason = "unfinished"
        elif not plain:
            reason = "empty"
        elif distinct and plain in seen:
            reason = "repeated"
        else:
            seen.add(plain)
        drop_reasons.append(reason)
    return tuple(drop_reasons)


def _sample(
    spec: SamplingStage, ctx: StageContext, policy: Model, encoder: Encoder, asked: Sequence[EncodedPrompt]
) -> list[list[Answer]]:
    return sample_policy(
        spec.rollout,
        policy,
        encoder,
        asked,
        Sampling(spec.max_new_tokens, n=spec.samples_per_prompt, temperature=spec.temperature, seed=ctx.seed),
        ctx,
        ranks(),
        max_length=spec.max_length,
        name=ctx.name,
    )


def score(scorer: ScorerSpec, ctx: StageContext, answers: Sequence[Answer], part: str) -> list[float]:
    """A score for each answer; ``part`` names the folder in which scores are kept for a run that is interrupted."""
    return score_answers(
        lambda: open_scorer(
            scorer, resolve=ctx.resolve, cache=ctx.cache, device=ranks().device, ids_from=ctx.encoder_digest
        ),
        answers,
        folder=ctx.work / part,
        key={"scorer": scorer.model_dump(mode="json")},
        console=ctx.console,
        name=ctx.name,
        group=ranks(),
    )


# Results


def prompt_row(record: Prompt) -> dict[str, Any]:
    """A prompt as a row of a data file, with the other columns of the row that it was read from."""
    tools = {"tools": list(record.tools)} if record.tools else {}
    others = {key: value for key, value in record.fields.items() if key not in _STEERING}
    return {"id": record.id, "prompt": list(record.prompt), **tools, **others}


def answers_report(answered: Sequence[Answered]) -> dict[str, Any]:
    """The part of a report about a policy's answers: metrics of their texts, why some were not used, scores, and
    whether longer ones score higher."""
    drop_reasons = [reason for one in answered for reason in one.drop_reasons]
    scores = [value for one in answered for value in one.scores]
    return {
        "answers": describe([answer for one in answered for answer in one.answers]),
        "answers_left_out": {
            reason: drop_reasons.count(reason)
            for reason in ("unfinished", "empty", "repeated")
            if reason in drop_reasons
        },
        "scores": spread(scores),
        "length_correlation": correlation(scores, [len(answer.ids) for one in answered for answer in one.used]),
    }


def write_results(
    ctx: StageContext,
    rows: Sequence[Mapping[str, Any]],
    answered: Sequence[Answered],
    left_out: LeftOutPrompts,
    outcome: Mapping[str, Any],
    *,
    policy: str,
) -> None:
    """Write the rows, all answers of ``policy``, the prompts that were left out and the report, and print the last two.
    None of the files depends on time or machine."""
    if not ranks().first:
        return
    outcome = {**outcome, **answers_report(answered), "left_out": left_out.counts()}
    for name, lines in (("data", rows), ("left_out", left_out.rows)):
        with files.atomic_lines(ctx.out / f"{name}.jsonl") as write:
            for line in lines:
                write(line)
    write_answers(ctx.out, (row for one in answered for row in one.rows(policy)))
    files.write_json(ctx.out / "report.json", outcome)
    ctx.note(outcome)
    if left_out.rows:
        ctx.console.print(left_out.table(f"{ctx.name}: left out (all of them are in left_out.jsonl)"))
    for warning in outcome.get("warnings", ()):
        ctx.console.print(f"{ctx.name}  note: {warning}", highlight=False, markup=False, soft_wrap=True)
