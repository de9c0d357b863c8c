"""``kind: label``: preferences from a policy's own answers. Prompts in, preferences out.

ChatGLM-RLHF (arXiv 2404.00934) makes its DPO pairs this way: the policy answers the prompts of reinforcement learning,
and the reward model labels the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.data.records import Message
from align.models.load import load_encoder
from align.recipe.kinds.sampling import LabelStage
from align.scoring.text_metrics import spread
from align.stages.context import StageContext
from align.stages.shared.policy_samples import AsSampled
from align.stages.shared.scored_answers import (
    Answered,
    LeftOutPrompts,
    answer_prompts,
    prompt_row,
    read_prompts,
    write_results,
)

TIED = "all its answers score the same"
TOO_CLOSE = "no two answers are min_margin apart"

_BIASED = 0.75
_ENOUGH = 20


@dataclass(frozen=True)
class ScoredPair:
    """Which of a prompt's scored answers is chosen and which are rejected, by their indices."""

    chosen: int
    rejected: tuple[int, ...]
    """Indices, the best answer first."""


def run(spec: LabelStage, ctx: StageContext) -> None:
    """Sample, score, and make preferences; report what was left out and why, and whether the longer answers won."""
    policy = ctx.policy(spec.policy)
    encoder = load_encoder(policy, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    left_out = LeftOutPrompts()
    asked = read_prompts(spec, ctx, encoder, left_out, lambda record: None)
    given = len(asked) + len(left_out.rows)
    answered = answer_prompts(spec, ctx, policy, encoder, asked, left_out, distinct=True)
    rows: list[dict[str, Any]] = []
    longer = []
    as_sampled = AsSampled(encoder)
    for one in answered:
        pairs = make_pairs(one.scores, spec.pairs, spec.min_margin)
        if one.scores and not pairs:
            left_out.add(
                one.record, TIED if len(set(one.scores)) == 1 else TOO_CLOSE, margin=max(one.scores) - min(one.scores)
            )
        for number, pair in enumerate(pairs, 1):
            rows.append(preference_row(one, pair, number if len(pairs) > 1 else None, as_sampled))
            longer += [len(one.used[pair.chosen].ids) - len(one.used[place].ids) for place in pair.rejected]
    left_out.require(rows, "preferences", spec.prompts)
    warning = _length_bias(longer)
    outcome: dict[str, Any] = {
        "prompts": given,
        "preferences": len(rows),
        "pairs": len(longer),
        "longer_chosen": sum(difference > 0 for difference in longer),
        "shorter_chosen": sum(difference < 0 for difference in longer),
        "answers_with_ids": as_sampled.with_ids,
        "margins": spread([row["scores"]["chosen"] - score for row in rows for score in row["scores"]["rejected"]]),
        "warnings": [warning] if warning else [],
    }
    write_results(ctx, rows, answered, left_out, outcome, policy=spec.policy or ctx.model.path)
    ctx.console.print(
        f"{ctx.name}  {len(rows):,} preferences from {given:,} prompts, {len(longer):,} pairs; the longer answer is"
        f" chosen in {outcome['longer_chosen']:,}, the shorter in {outcome['shorter_chosen']:,}; median margin"
        f" {outcome['margins']['median']:.3g}",
        highlight=False,
        soft_wrap=True,
    )
    if line := as_sampled.line(ctx.name):
        ctx.console.print(line, highlight=False, soft_wrap=True)


def make_pairs(
    scores: Sequence[float], pairs: Literal["best_worst", "best_vs_rest", "margin"], min_margin: float
) -> list[ScoredPair]:
    """The pairs made from the ``scores`` of the answers to one prompt, best first. Among equally good best answers the
    first is chosen.

    The scores of chosen and rejected differ by at least ``min_margin``, and are never equal.

    >>> make_pairs([1.0, 3.0, 2.0], "best_worst", 0)
    [ScoredPair(chosen=1, rejected=(0,))]
    >>> make_pairs([1.0, 3.0, 2.0], "margin", 1.5)
    [ScoredPair(chosen=1, rejected=(0,))]
    """
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))

    def below(chosen: int) -> tuple[int, ...]:
        margins = {place: scores[chosen] - scores[place] for place in order}
        return tuple(place for place, margin in margins.items() if margin > 0 and margin >= min_margin)

    if pairs == "margin":
        return [ScoredPair(chosen, (rejected,)) for chosen in order for rejected in below(chosen)]
    best = [ScoredPair(chosen, below(chosen)) for chosen in order[:1] if below(chosen)]
    if pairs == "best_vs_rest":
        return best
    worst = min(range(len(scores)), key=scores.__getitem__, default=0)
    return [ScoredPair(pair.chosen, (worst,)) for pair in best]


def preference_row(one: Answered, pair: ScoredPair, number: int | None, as_sampled: AsSampled) -> dict[str, Any]:
    """A pair as a row of preferences. ``margin`` is the difference of scores, one for each of several rejected answers;
    ``number`` distinguishes several pairs of a prompt."""
    row = prompt_row(one.record)
    rejected = [one.scores[place] for place in pair.rejected]
    margins = [one.scores[pair.chosen] - score for score in rejected]

    def said(place: int) -> list[Message]:
        return [as_sampled.message(one.used[place], one.record.tools)]

    return {
        **row,
        "id": row["id"] if number is None else f"{row['id']}#{number}",
        "chosen": said(pair.chosen),
        "rejected": [said(place) for place in pair.rejected],
        "margin": margins[0] if len(margins) == 1 else margins,
        "scores": {"chosen": one.scores[pair.chosen], "rejected": rejected},
    }


def _length_bias(differences: Sequence[int]) -> str | None:
    """A warning when chosen answers could be told from rejected ones by their lengths; else None."""
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if longer + shorter < _ENOUGH or max(longer, shorter) < _BIASED * (longer + shorter):
        return None
    which, count = ("longer", longer) if longer > shorter else ("shorter", shorter)
    return (
        f"the {which} answer is chosen in {count} of {longer + shorter} pairs of unequal length: a policy may learn"
        " length alone. report.json has the correlation of score and length; `length_balance` trains a reward model"
        " against it."
    )
