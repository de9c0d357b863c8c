"""What an evaluation measures: each metric is a small function from what is known of a policy to one number a prompt.

A new metric is one more entry of :data:`METRICS`. Shapes: P prompts, n samples of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What is known of one policy. Log-probs are in nats, at temperature 1, summed over an answer's tokens with its end token."""

    target_logprobs: Values  # [P], of the data's answers
    baseline_logprobs: Values  # [P, n], of the samples that the first policy drew: the same for every policy
    similarities: Values  # [P, n], of the policy's own samples to the target
    lengths: Values  # [P, n], tokens of its own samples
    finished: Values  # [P, n], 1 for a sample that ended by itself


@dataclass(frozen=True)
class Metric:
    """A number of each prompt, and its name for people."""

    words: str
    of: Callable[[Measured], Values]
    """-> [P]"""


METRICS: dict[str, Metric] = {
    "margin": Metric("target's log-prob over the baseline's samples, nats", lambda m: m.target_logprobs - m.baseline_logprobs.mean(1)),
    "target_logprob": Metric("target's log-prob, nats", lambda m: m.target_logprobs),
    "similarity": Metric("similarity of own samples to the target", lambda m: m.similarities.mean(1)),
    "length": Metric("length of own samples, tokens", lambda m: m.lengths.mean(1)),
    "unfinished": Metric("share of own samples that never end", lambda m: 1 - m.finished.mean(1)),
}
