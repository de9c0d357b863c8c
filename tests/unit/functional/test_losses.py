"""Segment sums and the supervised losses, with the arithmetic written out."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from align.functional.losses import sequence_nll, token_nll
from align.functional.segments import segment_count, segment_mean, segment_sum

VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
SEGMENT = torch.tensor([0, 2, 0, 3, 2])  # interleaved; segment 1 is empty


def test_segments() -> None:
    """Segment 0 holds 1 and 4, segment 2 holds 2 and 16, segment 3 holds 8."""
    assert segment_sum(VALUES, SEGMENT, 4).tolist() == [5, 0, 18, 8]
    assert segment_count(SEGMENT, 4).tolist() == [2, 0, 2, 1]
    assert segment_mean(VALUES, SEGMENT, 4).tolist() == [2.5, 0, 9, 8]


def test_last_segments_may_be_empty() -> None:
    assert segment_sum(VALUES, SEGMENT, 6).tolist() == [5, 0, 18, 8, 0, 0]
    assert segment_mean(VALUES, SEGMENT, 6).shape == segment_count(SEGMENT, 6).shape == (6,)


def test_gradient_of_a_segment_mean() -> None:
    """d mean / d value = 1 / count of its segment: 1/2 1/2 1/2 1 1/2, times the weight of the segment."""
    values = VALUES.clone().requires_grad_()
    (segment_mean(values, SEGMENT, 4) * torch.tensor([1.0, 5.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 1.0, 0.5, 3.0, 1.0]


def test_token_nll_is_minus_the_logprob() -> None:
    """A token of probability 1/4 costs log 4 = 1.386 nats."""
    assert_close(token_nll(torch.tensor([math.log(0.25), 0.0])), torch.tensor([math.log(4), 0.0]))


def test_sequence_nll_averages_inside_a_completion() -> None:
    """Sample 0 has tokens of 1 and 3 nats, completion 1 one of 5: (2, 5), so the mean over completions is 3.5; over
    tokens it is 3."""
    logprobs, branch = torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1])
    assert sequence_nll(logprobs, branch, 2).tolist() == [2.0, 5.0]
    assert token_nll(logprobs).mean() == 3.0
