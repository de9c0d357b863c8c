"""Recognising from the numbers of an iteration when reinforcement learning goes wrong, and the messages that say so.

The numbers come from :mod:`align.stages.ppo.collect`: means over an iteration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.recipe.kinds.ppo import Health, PpoStage

Numbers = Mapping[str, float]

_SETTLED = 4
"""Number of iterations after which a value model's explained variance is checked."""
_IN_A_ROW = 3
_COMPARED = 4
"""Number of iterations at the start and at the end whose mean losses are compared. The losses of single steps vary by
more than forgetting changes them, since a step has few conversations."""


@dataclass(frozen=True)
class Symptom:
    """Something unhealthy."""

    kind: str
    """The recipe key whose bound was crossed, or a name for a check without a key."""
    message: str
    """What is wrong and what to do about it."""


def of_rollouts(spec: PpoStage, history: Sequence[Numbers]) -> list[Symptom]:
    """What is unhealthy about the newest iteration's answers; ``history`` has the summaries of all iterations, the
    newest last."""
    return [*_answers(spec, history[-1], history[0]), *_kl(spec.health, history), *_trust(spec.health, history)]


def _answers(spec: PpoStage, now: Numbers, first: Numbers) -> Iterator[Symptom]:
    health, several = spec.health, now["answers"] > 1
    if several and now["score_std"] < 1e-8:
        words = (
            "all answers of the iteration score the same, so there is nothing to learn from: look at the scores in the"
            " rollouts file"
        )
        yield Symptom("equal_scores", words)
    if (unfinished := 1 - now["finished"]) > health.unfinished:
        words = f"{unfinished:.0%} of the answers do not end within max_new_tokens ({spec.max_new_tokens})"
        yield Symptom("unfinished", f"{words}: raise it, or set unfinished_penalty")
    if several and now["distinct"] < health.distinct:
        words = f"only {now['distinct']:.0%} of the answers differ from each other: the policy has collapsed"
        yield Symptom("distinct", f"{words}; raise kl_coefficient, or lower the learning rate")
    if now["entropy"] < health.entropy * first["entropy"]:
        words = (
            f"the policy's entropy fell from {first['entropy']:.3g} to {now['entropy']:.3g} nats per token: it says the"
            " same every time"
        )
        yield Symptom("entropy", f"{words}; raise kl_coefficient or entropy_weight, or lower the learning rate")


def _kl(health: Health, history: Sequence[Numbers]) -> Iterator[Symptom]:
    now, recent = history[-1]["kl"], history[-_IN_A_ROW:]
    if now > health.kl:
        words = (
            f"the KL from the reference is {now:.3g} nats per token, more than {health.kl:g}: the policy has left the"
            " reference"
        )
        yield Symptom("kl", f"{words}; raise kl_coefficient, or lower the learning rate")
    if len(recent) == _IN_A_ROW and all(numbers["kl"] < -health.negative_kl for numbers in recent):
        words = (
            f"the KL from the reference is negative ({now:.3g} nats per token) in {_IN_A_ROW} iterations in a row,"
            " which a KL cannot be"
        )
        yield Symptom("negative_kl", f"{words}: the answers are not sampled from the policy that trains")


def _trust(health: Health, history: Sequence[Numbers]) -> Iterator[Symptom]:
    now, least = history[-1], health.explained_variance
    if (off := now.get("mismatch", 0.0)) > health.mismatch:
        words = f"the engine's log-probs are off by {off:.3g} nats per token on average, more than {health.mismatch:g}"
        yield Symptom(
            "mismatch",
            f"{words}: it samples from another distribution; set rollout.dtype: fp32 or rollout.engine: transformers",
        )
    variances = [numbers["explained_variance"] for numbers in history[_SETTLED:] if "explained_variance" in numbers][
        -_IN_A_ROW:
    ]
    if len(variances) == _IN_A_ROW and max(variances) < least:
        words = (
            f"the value model explains {variances[-1]:.2f} of the returns' variance, less than {least:g}, {_IN_A_ROW}"
            " iterations in a row"
        )
        yield Symptom(
            "explained_variance", f"{words}: it is worse than a constant; change value_learning_rate or value_init"
        )


def first_ratio_bound(spec: PpoStage) -> float:
    """Largest log-ratio in an iteration's first step that rounding can explain."""
    if spec.health.first_ratio is not None:
        return spec.health.first_ratio
    return 1e-3 if spec.train.dtype == "fp32" and spec.train.autocast is None else 0.5


def of_first_step(spec: PpoStage, metrics: Numbers) -> list[Symptom]:
    """In an iteration's first step the policy must still be the one that sampled, since no weights have changed. If its
    log-probs differ, something is wrong."""
    largest, bound = metrics["ratio/largest_log"], first_ratio_bound(spec)
    if largest <= bound:
        return []
    words = (
        f"the probability ratio is not 1 in an iteration's first step: a log-prob is off by {largest:.3g} nats,"
        f" {bound:g} is allowed"
    )
    return [
        Symptom(
            "first_ratio",
            f"{words}; the same weights give other log-probs than before, please report it with the model's name",
        )
    ]


def of_training(
    spec: PpoStage, history: Sequence[Numbers], clip_fraction: float, sft_losses: Sequence[float]
) -> list[Symptom]:
    """What is unhealthy about an iteration's training.

    Args:
        history: the summaries of all iterations, this one last.
        clip_fraction: mean over the iteration's steps.
        sft_losses: mean loss on ``sft_data`` of every iteration so far, this one last; empty without such data.
    """
    found = []
    if clip_fraction > spec.health.clip_fraction:
        words = f"the clip holds back {clip_fraction:.0%} of the tokens: the steps are too large"
        found.append(
            Symptom("clip_fraction", f"{words}; lower the learning rate, use fewer ppo_epochs, or set target_kl")
        )
    losses, k = np.array(sft_losses), min(_COMPARED, len(sft_losses) // 2)
    if k >= _IN_A_ROW:
        first, last = losses[:k].mean(), losses[-k:].mean()
        gain = np.mean([numbers["reward"] for numbers in history[-k:]]) - np.mean(
            [numbers["reward"] for numbers in history[:k]]
        )
        # The noise is estimated from differences between successive iterations, which a steady rise hardly affects; the
        # difference of two means of k iterations has this standard deviation.
        noise = np.sqrt(np.mean(np.diff(losses) ** 2) / k)
        rise = last - first
        if gain > 0 and rise - 2 * noise > spec.health.sft_loss:
            words = (
                f"the reward rose by {gain:.3g} while the loss on sft_data rose from {first:.3g} to {last:.3g} nats per"
            )
            what = f"token (means of the first and the last {k} iterations)"
            found.append(Symptom("sft_loss", f"{words} {what}: the policy forgets; raise sft_weight or kl_coefficient"))
    return found
