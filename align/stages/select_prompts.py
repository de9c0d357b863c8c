"""``kind: select_prompts``: prompts that a policy can learn from. Prompts in, fewer prompts out.

As in ChatGLM-RLHF (arXiv 2404.00934), rules drop prompts without content or that no model can answer, and a classifier
drops those of low quality. Then several answers to each prompt are scored. A prompt whose answers have nearly the same
score is dropped, because it does not teach which answer is better. The paper gives neither the number of answers nor
the threshold; here a share of the prompts is dropped, or all below a threshold.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fractions import Fraction

from align.data.records import Prompt
from align.data.trees.prompts import EncodedPrompt
from align.models.load import load_encoder
from align.recipe.kinds.sampling import UNANSWERABLE, SelectPromptsStage
from align.scoring.rules import matches
from align.scoring.scorer import Answer
from align.scoring.text_metrics import spread
from align.stages.context import StageContext
from align.stages.shared.scored_answers import (
    LeftOutPrompts,
    answer_prompts,
    prompt_row,
    read_prompts,
    score,
    write_results,
)

TOO_SHORT = "too short (min_characters)"
TOO_LONG = "too long (max_characters)"
UNANSWERABLE_PROMPT = "cannot be answered (unanswerable)"
LOW_QUALITY = "low quality (min_quality)"
ALIKE = "its answers score alike"

_DEFAULT_SHARE = 0.25


def run(spec: SelectPromptsStage, ctx: StageContext) -> None:
    """Drop prompts by rules, by quality, and by the spread of scores; write the rest, and report what was dropped and
    why."""
    policy = ctx.policy(spec.policy)
    encoder = load_encoder(policy, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    left_out = LeftOutPrompts()
    asked = read_prompts(spec, ctx, encoder, left_out, lambda record: rule_against(record, spec))
    given = len(asked) + len(left_out.rows)
    asked = _of_quality(spec, ctx, asked, left_out)
    answered = answer_prompts(spec, ctx, policy, encoder, asked, left_out, distinct=False)
    compared = [one for one in answered if one.scores]
    stds = [statistics.pstdev(one.scores) for one in compared]
    dropped = too_alike(stds, share=spec.drop_lowest_variance, least=spec.min_std)
    rows = []
    for place, (one, std) in enumerate(zip(compared, stds, strict=True)):
        if place in dropped:
            left_out.add(one.record, ALIKE, reward_std=std)
        else:
            rows.append({**prompt_row(one.record), "reward_mean": statistics.fmean(one.scores), "reward_std": std})
    left_out.require(rows, "prompts", spec.prompts)
    without = sum(row["reward_std"] == 0 for row in rows)
    outcome = {"prompts": given, "kept": len(rows), "kept_without_spread": without, "reward_std": spread(stds)}
    write_results(ctx, rows, answered, left_out, outcome, policy=spec.policy or ctx.model.path)
    ctx.console.print(
        f"{ctx.name}  kept {len(rows):,} of {given:,} prompts; standard deviation of a prompt's scores:"
        f" {statistics.median(stds):.3g} (median), at least {min(row['reward_std'] for row in rows):.3g} where it is"
        " kept",
        highlight=False,
        soft_wrap=True,
    )


def rule_against(record: Prompt, spec: SelectPromptsStage) -> str | None:
    """The reason by which a rule drops this prompt; None when it is kept."""
    said = [message["content"].strip() for message in record.prompt if message["role"] == "user"]
    length = sum(map(len, said))
    if length < spec.min_characters:
        return TOO_SHORT
    if spec.max_characters is not None and length > spec.max_characters:
        return TOO_LONG
    patterns = UNANSWERABLE if spec.unanswerable is None else spec.unanswerable
    return UNANSWERABLE_PROMPT if any(matches(pattern, said[-1]) for pattern in patterns) else None


def too_alike(stds: Sequence[float], *, share: float | None = None, least: float | None = None) -> set[int]:
    """Indices of the prompts whose scores differ too little.

    With ``least``: those whose standard deviation is smaller. Otherwise the ``share`` (a quarter when None) of all
    prompts with the smallest standard deviations, rounded down; among equal ones the later are taken first.

    >>> too_alike([0.5, 0.0, 0.2, 0.3], share=0.5)
    {1, 2}
    """
    if least is not None:
        return {place for place, std in enumerate(stds) if std < least}
    # Computed in decimal: 0.29 of 100 is 29, not 28
    number = int(len(stds) * Fraction(str(_DEFAULT_SHARE if share is None else share)))
    return set(sorted(range(len(stds)), key=lambda place: (stds[place], -place))[:number])


def _of_quality(
    spec: SelectPromptsStage, ctx: StageContext, asked: list[EncodedPrompt], left_out: LeftOutPrompts
) -> list[EncodedPrompt]:
    """The prompts with a high enough quality score; all of them without a quality scorer."""
    if spec.quality is None or spec.min_quality is None:
        return asked
    kept = []
    prompts = [Answer(one.record.prompt, "", fields=one.record.fields) for one in asked]
    for one, quality in zip(asked, score(spec.quality, ctx, prompts, "quality"), strict=True):
        if quality < spec.min_quality:
            left_out.add(one.record, LOW_QUALITY, quality=quality)
        else:
            kept.append(one)
    left_out.require(kept, "prompts", spec.prompts)
    return kept
