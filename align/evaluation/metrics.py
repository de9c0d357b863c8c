"""The metrics of answers to held-out data. Each is a small function from the measures of a policy to one number for
each prompt.

A new metric is one more entry of :data:`METRICS`. Shapes: P prompts, n samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from align.evaluation.compare import Found, Metric, Values
from align.functional.intervals import ANY, SHARE, Direction, Range


@dataclass(frozen=True)
class Targets:
    """Measures of a policy that need the data's answers. Log-probs are in nats, at temperature 1, and include the end
    token."""

    logprobs: Values  # [P], of the data's answers, summed over their tokens
    tokens: Values  # [P], of the data's answers
    baseline_logprobs: Values  # [P, n], of the samples that the first policy drew: the same for every policy
    similarities: Values | None  # [P, n], of the policy's own samples to the target; None without an embedder


@dataclass(frozen=True)
class PolicyMeasures:
    """The measures of a policy's answers, and of targets if the data have them."""

    lengths: Values  # [P, n], tokens of its own samples
    finished: Values  # [P, n], 1 for a sample that ended by itself
    distinct: Values  # [P, 2], different words and pairs of words in a prompt's samples together, as shares
    mixed: Values  # [P, n], 1 for a sample that mixes Chinese and English
    targets: Targets | None = None


@dataclass(frozen=True)
class Kind:
    """A metric: a number for each prompt, and its name."""

    words: str
    of: Callable[[PolicyMeasures], Values | None]
    """Returns [P], or None when it cannot be measured."""
    better: Direction | None = None
    """Which way is better; None for what is neither good nor bad."""
    counts: Callable[[PolicyMeasures], Values] | None = None
    """Returns [P], the number of things that each number is a sum over, if the mean is not over prompts."""
    within: Range = ANY
    """The least and the largest value that its mean can have."""


def _of_targets(of: Callable[[Targets], Values | None]) -> Callable[[PolicyMeasures], Values | None]:
    return lambda measured: None if measured.targets is None else of(measured.targets)


def _tokens(measured: PolicyMeasures) -> Values:
    assert measured.targets is not None
    return measured.targets.tokens


METRICS: dict[str, Kind] = {
    "margin": Kind(
        "target's log-prob over the baseline's samples, nats",
        _of_targets(lambda t: t.logprobs - t.baseline_logprobs.mean(axis=1)),
        "up",
    ),
    "target_logprob": Kind("target's log-prob, nats", _of_targets(lambda t: t.logprobs), "up"),
    "loss": Kind(
        "held-out loss, nats per target token", _of_targets(lambda t: -t.logprobs), "down", _tokens, (0.0, math.inf)
    ),
    "similarity": Kind(
        "similarity of own samples to the target",
        _of_targets(lambda t: None if t.similarities is None else t.similarities.mean(axis=1)),
        "up",
        within=(-1.0, 1.0),
    ),
    "length": Kind("length of own samples, tokens", lambda m: m.lengths.mean(axis=1), within=(0.0, math.inf)),
    "unfinished": Kind(
        "share of own samples that never end", lambda m: 1 - m.finished.mean(axis=1), "down", within=SHARE
    ),
    "distinct_1": Kind("different words of a prompt's samples, share", lambda m: m.distinct[:, 0], within=SHARE),
    "distinct_2": Kind("different word pairs of a prompt's samples, share", lambda m: m.distinct[:, 1], within=SHARE),
    "mixed_languages": Kind(
        "share of own samples that mix Chinese and English", lambda m: m.mixed.mean(axis=1), "down", within=SHARE
    ),
}


def metrics_of(measured: Mapping[str, PolicyMeasures]) -> dict[str, Found]:
    """The metrics of all policies; those that cannot be measured on the data are left out."""
    first = next(iter(measured.values()))
    found: dict[str, Found] = {}
    for name, kind in METRICS.items():
        values = {policy: kind.of(one) for policy, one in measured.items()}
        known = {policy: value for policy, value in values.items() if value is not None}
        if known:
            found[name] = Metric(
                kind.words, known, None if kind.counts is None else kind.counts(first), within=kind.within
            )
    return found


def per_prompt(found: Mapping[str, Found]) -> dict[str, dict[str, list[float]]]:
    """``{metric: {policy: [P]}}`` of the metrics that have one number for each prompt."""
    table: dict[str, dict[str, list[float]]] = {}
    for name, metric in found.items():
        if isinstance(metric, Metric):
            counts = np.ones(1) if metric.counts is None else np.maximum(metric.counts, 1)
            table[name] = {policy: (values / counts).tolist() for policy, values in metric.values.items()}
    return table
