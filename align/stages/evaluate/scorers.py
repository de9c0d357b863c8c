"""Scoring the samples of an evaluation: mean scores, and win rates against the baseline and the data's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from align import files
from align.evaluation.compare import Found, LengthControlled, Metric, Values
from align.functional.intervals import SHARE
from align.functional.win_rate import differences, wins
from align.recipe.blocks.scoring import EnsembleScorer, FunctionScorer, ImplicitScorer, ModelScorer, Rule, ScorerSpec
from align.recipe.schema import EvaluateStage
from align.scoring.open import open_scorer
from align.scoring.scorer import Answer
from align.scoring.stored import score_answers
from align.stages.context import StageContext
from align.stages.evaluate.held_out import Policy, Question, Samples
from align.training.launch import Ranks

Scores = tuple[dict[str, Values], Values | None]
"""(policy -> scores [P, n], the targets' scores [P, 1] if there are targets)."""


def scorer_names(scorers: Sequence[ScorerSpec]) -> list[str]:
    """The name of each scorer in tables: its kind, with a number if two would have the same name."""
    plain = [_plain_name(scorer) for scorer in scorers]
    return [
        name if plain.count(name) == 1 else f"{name}-{plain[: place + 1].count(name)}"
        for place, name in enumerate(plain)
    ]


def _plain_name(scorer: ScorerSpec) -> str:
    if isinstance(scorer, ModelScorer):
        return _last(scorer.model)
    if isinstance(scorer, ImplicitScorer):
        return f"{_last(scorer.policy)} over {_last(scorer.reference)}"
    if isinstance(scorer, FunctionScorer):
        return scorer.function.rpartition(":")[2]
    if isinstance(scorer, EnsembleScorer):
        return "ensemble"
    assert isinstance(scorer, Rule), type(scorer)
    return scorer.rule


def _last(reference: str) -> str:
    return reference.removeprefix("stage:").rstrip("/").rpartition("/")[2]


def score_samples(
    spec: EvaluateStage,
    ctx: StageContext,
    policies: Sequence[Policy],
    questions: Sequence[Question],
    samples: Samples,
    group: Ranks,
) -> tuple[dict[str, Found], dict[str, Scores]]:
    """(all metrics by all scorers of the recipe, the scores themselves by scorer)."""
    lengths = {
        policy.name: _lengths([[s.text for s in own] for own in samples[k]]) for k, policy in enumerate(policies)
    }
    target_lengths = (
        _lengths([[q.target.text] for q in questions if q.target is not None]) if questions[0].target else None
    )
    found: dict[str, Found] = {}
    by_scorer: dict[str, Scores] = {}
    for number, (name, scorer) in enumerate(zip(scorer_names(spec.scorers), spec.scorers, strict=True)):
        scores, targets = _scores(scorer, f"scores-{number}", ctx, policies, questions, samples, group)
        by_scorer[name] = scores, targets
        found[f"score/{name}"] = Metric(
            f"score by {name}", {policy: values.mean(axis=1) for policy, values in scores.items()}
        )
        baseline = policies[0].name
        others = {policy: values for policy, values in scores.items() if policy != baseline}
        found |= win_rates(
            f"{name}", "", f"over {baseline} by {name}", others, scores[baseline], lengths, lengths[baseline]
        )
        if targets is not None and target_lengths is not None:
            found |= win_rates(
                name, "_over_target", f"over the data's answer by {name}", scores, targets, lengths, target_lengths
            )
    return found, by_scorer


def win_rates(
    name: str,
    suffix: str,
    words: str,
    scores: Mapping[str, Values],
    theirs: Values,
    lengths: Mapping[str, Values],
    their_lengths: Values,
) -> dict[str, Found]:
    """How often each policy's answers beat an opponent's, ties counting half; and the same corrected for length.

    Args:
        scores: policy -> [P, n].
        theirs: the opponent's scores, [P, m].
        lengths: policy -> [P, n], in characters.
    """
    results = {policy: wins(values, theirs) for policy, values in scores.items()}
    if not results:
        return {}
    pairs = {
        policy: np.stack([result, differences(lengths[policy], their_lengths)], axis=-1)
        for policy, result in results.items()
    }
    return {
        f"win_rate{suffix}/{name}": Metric(
            f"win rate {words}", {p: r.mean(axis=1) for p, r in results.items()}, paired=False, within=SHARE
        ),
        f"lc_win_rate{suffix}/{name}": LengthControlled(f"win rate {words}, length-controlled", pairs),
    }


def _scores(
    scorer: ScorerSpec,
    part: str,
    ctx: StageContext,
    policies: Sequence[Policy],
    questions: Sequence[Question],
    samples: Samples,
    group: Ranks,
) -> Scores:
    """One scorer's scores of all samples. It is opened once for all policies that share an encoder."""
    targets = [question.own_answer() for question in questions if question.target is not None]
    scores: dict[str, Values] = {}
    for digest in dict.fromkeys(policy.encoder.digest for policy in policies):
        mine = [k for k, policy in enumerate(policies) if policy.encoder.digest == digest]
        answers = [answer for k in mine for own in samples[k] for answer in own]
        found = score_once(scorer, f"{part}/{digest[:16]}", ctx, [*answers, *targets], digest, group)
        drawn = np.array(found[: len(answers)]).reshape(len(mine), len(questions), -1)
        scores |= {policies[k].name: drawn[place] for place, k in enumerate(mine)}
    theirs = np.array(found[len(answers) :]).reshape(-1, 1) if targets else None
    return {policy.name: scores[policy.name] for policy in policies}, theirs


def score_once(
    scorer: ScorerSpec, part: str, ctx: StageContext, answers: Sequence[Answer], digest: str | None, group: Ranks
) -> list[float]:
    """Score ``answers``, equal answers to a prompt only once: scores computed twice may differ by rounding, and one of
    two equal answers would win.

    ``part`` names the folder in which scores are kept for a run that is interrupted; ``digest`` is that of the encoder
    that made the answers' ids, None if they have none.
    """
    places: dict[str, int] = {}
    of = [places.setdefault(files.digest_json(asdict(answer)), len(places)) for answer in answers]
    first = {place: answer for place, answer in zip(reversed(of), reversed(answers), strict=True)}
    scores = _score(scorer, part, ctx, [first[place] for place in range(len(places))], digest, group)
    return [scores[place] for place in of]


def _score(
    scorer: ScorerSpec, part: str, ctx: StageContext, answers: Sequence[Answer], digest: str | None, group: Ranks
) -> list[float]:
    return score_answers(
        lambda: open_scorer(scorer, resolve=ctx.resolve, cache=ctx.cache, device=group.device, ids_from=digest),
        answers,
        folder=ctx.work / part,
        key={"scorer": scorer.model_dump(mode="json"), "ids_from": digest},
        console=ctx.console,
        name=ctx.name,
        group=group,
    )


def _lengths(texts: Sequence[Sequence[str]]) -> Values:
    return np.array([[len(text) for text in group] for group in texts], dtype=np.float64)
