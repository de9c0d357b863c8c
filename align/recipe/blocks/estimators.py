"""Estimators of advantages: for each one its name, what it needs, and how it is computed.

A new estimator is a class here, in ``ESTIMATORS``, and its formula in ``align/functional/advantages.py``. No other code
depends on which estimator is used. torch is imported only when advantages are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Estimator:
    """Computes advantages: how much better an answer was than expected."""

    has_value_model: ClassVar[bool] = False
    """Does it use a value model? Advantages are then computed for each token, by
    :func:`align.functional.advantages.gae`; otherwise one for each answer, by :meth:`of_answers`."""
    compares: ClassVar[bool] = False
    """Does it compare the answers to a prompt with each other? It then needs several, and a baseline cancels out."""
    needs_baseline: ClassVar[bool] = False
    """Is the reference's score the only baseline, and therefore required?"""

    def of_answers(self, scores: Tensor, prompt_of: Tensor, baselines: Tensor) -> Tensor:
        """Advantages [B] of answers, from their scores [B] with the KL penalty included, the number of each answer's
        prompt [B], and the reference's scores on these prompts [B]."""
        raise TypeError(f"{type(self).__name__} judges tokens, not answers")


class Gae(Estimator):
    """With a value model, token by token (https://arxiv.org/abs/1506.02438)."""

    has_value_model = True


class Rloo(Estimator):
    """The reward minus the mean reward of the prompt's other answers (https://arxiv.org/abs/2402.14740)."""

    compares = True

    def of_answers(self, scores: Tensor, prompt_of: Tensor, baselines: Tensor) -> Tensor:
        """See :func:`align.functional.advantages.rloo`."""
        from align.functional.advantages import rloo

        return rloo(scores, prompt_of)


class GroupNormalised(Estimator):
    """The reward minus the mean, divided by the standard deviation, of the prompt's answers, as in GRPO
    (https://arxiv.org/abs/2402.03300)."""

    compares = True

    def of_answers(self, scores: Tensor, prompt_of: Tensor, baselines: Tensor) -> Tensor:
        """See :func:`align.functional.advantages.group_normalised`."""
        from align.functional.advantages import group_normalised

        return group_normalised(scores, prompt_of)


class Reinforce(Estimator):
    """The reward with the reference baseline alone (https://arxiv.org/abs/2404.00934)."""

    needs_baseline = True

    def of_answers(self, scores: Tensor, prompt_of: Tensor, baselines: Tensor) -> Tensor:
        """See :func:`align.functional.advantages.reinforce_baseline`."""
        from align.functional.advantages import reinforce_baseline

        return reinforce_baseline(scores, baselines)


ESTIMATORS: dict[str, Estimator] = {"gae": Gae(), "rloo": Rloo(), "group": GroupNormalised(), "reinforce": Reinforce()}
