"""Losses as pure functions: tensors in, one value per item out. The trainer sums and divides, once, by the step's
global count.

Shapes: N target tokens, B branches (completions).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, relu, sigmoid
from torch.nn.functional import logsigmoid

from align.functional.segments import segment_mean


def token_nll(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats: fp32 [N] -> [N]."""
    return -logprobs


def sequence_nll(logprobs: Tensor, branch: Tensor, num_branches: int) -> Tensor:
    """Mean negative log-likelihood of each completion, in nats per token -> [B].

    Averaged over the completions of a step this is LongAlign's weighted packing loss, (1/M) sum_i L_i / N_i, for any
    packing (https://arxiv.org/abs/2401.18058, section 3.2). A branch without targets gives 0 and must not be counted.
    """
    return segment_mean(token_nll(logprobs), branch, num_branches)


# Preference losses
#
# All compare a chosen with a rejected completion, pair by pair. ``margins`` [P] are implicit-reward differences in
# nats:     (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
# with log-probs summed over a completion's tokens, or averaged over them where the function says so.


@dataclass(frozen=True)
class PairLogprobs:
    """What a preference loss is computed from; tensors are [P], pair by pair."""

    chosen: Tensor
    """Log-probs of the chosen answers. Whether they are summed or averaged over tokens, and whether the reference's are
    subtracted, is what the loss asks for."""
    rejected: Tensor
    margins: Tensor
    """By how much the data say that the chosen answer is better; 0 where they say nothing."""
    shares: Tensor | None
    """Share of the judges who found the chosen answer better; None where the data have no votes."""
    reference_points: tuple[float, float] = (0.0, 0.0)
    """The step's mean log-ratio of chosen and of rejected answers, for losses that ask for them."""

    @property
    def differences(self) -> Tensor:
        """Log-probs of the chosen minus those of the rejected answers."""
        return self.chosen - self.rejected


def dpo_sigmoid(
    margins: Tensor, beta: float, label_smoothing: float | Tensor = 0.0, offsets: Tensor | None = None
) -> Tensor:
    """DPO: ``-log sigmoid(beta * margin)`` -> [P] (https://arxiv.org/abs/2305.18290, eq. 7).

    ``label_smoothing`` is the share of pairs assumed to be labelled the wrong way round: the conservative DPO of
    https://ericmitchell.ai/cdpo.pdf, eq. 3; or, as a tensor [P], the share of each pair's judges who preferred the
    rejected answer. At margin 0 the loss is ln 2 for any smoothing. ``offsets`` [P] say by how much the rewards of each
    pair have to differ: ``-log sigmoid(beta * margin - offset)``, DPO with an offset
    (https://arxiv.org/abs/2402.10571).
    """
    rewards = beta * margins if offsets is None else beta * margins - offsets
    return -(1 - label_smoothing) * logsigmoid(rewards) - label_smoothing * logsigmoid(-rewards)


def dpo_hinge(margins: Tensor, beta: float) -> Tensor:
    """Hinge: ``max(0, 1 - beta * margin)`` -> [P] (SLiC, https://arxiv.org/abs/2305.10425, with DPO's reward as in RSO,
    2309.06657)."""
    return relu(1 - beta * margins)


def ipo(mean_margins: Tensor, beta: float) -> Tensor:
    """IPO: ``(margin - 1 / (2 beta))^2`` -> [P], margins from log-probs averaged over tokens
    (https://arxiv.org/abs/2310.12036, eq. 17)."""
    return (mean_margins - 1 / (2 * beta)) ** 2


def simpo(mean_margins: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO: ``-log sigmoid(beta * margin - gamma)`` -> [P] (https://arxiv.org/abs/2405.14734, eq. 6).

    Margins are differences of the policy's own log-probs averaged over tokens: there is no reference model.
    """
    return -logsigmoid(beta * mean_margins - gamma)


def kto_pair(
    chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float, chosen_kl: float, rejected_kl: float
) -> Tensor:
    """KTO on pairs (https://arxiv.org/abs/2402.01306, eq. 7, both weights 1) -> [P].

    Each answer is judged by itself against a reference point: the policy's estimated KL from the reference on the
    answers of the other kind, a constant that carries no gradient. Ratios are ``log pi - log ref``, summed over tokens.
    """
    chosen = 1 - sigmoid(beta * (chosen_ratios - rejected_kl))
    rejected = 1 - sigmoid(beta * (chosen_kl - rejected_ratios))
    return (chosen + rejected) / 2


# Reward model losses
#
# All take the scores of a chosen and a rejected answer, pair by pair [P].


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """Ranking loss of a reward model: ``-log sigmoid(chosen - rejected - margin)`` -> [P]. At equal scores, without a
    margin: ln 2.

    Bradley and Terry's model of comparisons as in https://arxiv.org/abs/2203.02155, eq. 1; ``margins`` (how much better
    the chosen answer is, in units of the score) as in https://arxiv.org/abs/2307.09288, eq. 2: the scores have to
    differ by that much more.

    ``shares`` [P], the shares of the judges who found the chosen answer better, take the place of 1 as the probability
    to which the scores are fitted: the cross-entropy ``-share * log sigmoid(d) - (1 - share) * log sigmoid(-d)`` with
    ``d = chosen - rejected - margin``.
    """
    difference = chosen - rejected
    if margins is not None:
        difference = difference - margins
    return (
        -logsigmoid(difference)
        if shares is None
        else -shares * logsigmoid(difference) - (1 - shares) * logsigmoid(-difference)
    )


def squared_errors(scores: Tensor, grades: Tensor) -> Tensor:
    """Regression on grades: the mean over an answer's grades of ``(score - grade)^2``, [B, attributes] -> [B].

    NaN stands for a grade that was not given: it is left out of the mean, and its score gets no gradient.
    """
    given = ~grades.isnan()
    errors = (scores - grades.where(given, scores.detach())) ** 2
    return errors.sum(-1) / given.sum(-1)


def score_l2(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Keeps scores near 0: ``chosen^2 + rejected^2`` -> [P].

    The ranking loss fixes differences only, so scores may drift and spread without end. The regulariser of ChatGLM-RLHF
    (https://arxiv.org/abs/2404.00934) acts on each of the two scores, as a Gaussian prior around 0. A regulariser of
    their sum would only hold the mean at 0.
    """
    return chosen**2 + rejected**2
