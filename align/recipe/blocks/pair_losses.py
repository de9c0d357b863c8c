"""Preference losses: for each one its name, its options, what it reads, and how it is computed.

A new loss is a class here, in ``PAIR_LOSSES``, and its formula in ``align/functional/losses.py``. No other code depends
on which loss is used. torch is imported only when a loss is computed, so recipes are checked without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import Strict, unknown_name
from align.recipe.language.effects import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from align.functional.losses import PairLogprobs


class PairLoss(Strict):
    """How a preference stage compares a chosen with a rejected answer. Instead of the mapping, its `name` alone may be
    written as a text."""

    reads: ClassVar[Literal["sum", "mean"]] = "sum"
    """Does the loss read log-probs that are summed over an answer's tokens, or averaged?"""
    rewards: ClassVar[Literal["sum", "mean"]] = "sum"
    """An answer's reward in the metrics is ``beta`` times its log-ratio; this says whether that is summed or averaged
    over tokens."""
    needs_reference: ClassVar[bool] = True
    """Are the reference's log-probs subtracted from the policy's?"""
    needs_reference_points: ClassVar[bool] = False
    """Does it need the step's mean log-ratios of chosen and of rejected answers? They take an additional forward
    pass."""

    name: str
    """Which loss this is."""

    @abstractmethod
    def of_pairs(self, pairs: PairLogprobs, beta: float) -> Tensor:
        """The loss of each pair, [P]."""

    @property
    def reads_margins(self) -> bool:
        """Are the margins of the data used?"""
        return False

    @property
    def reads_shares(self) -> bool:
        """Are the judges' votes used?"""
        return False

    def __str__(self) -> str:
        return self.name


class SigmoidLoss(PairLoss):
    """DPO (https://arxiv.org/abs/2305.18290)."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "soft_labels",
            lambda loss: not loss.label_smoothing,
            "with label_smoothing: one of the two says how sure a label is",
        ),
    )

    name: Literal["sigmoid"]
    """`sigmoid`"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are assumed to be labelled the wrong way round."""
    offset: float = Field(default=0.0, ge=0)
    """Weight of the margins of the data. The rewards of a pair have to differ by `offset` times its margin (DPO with an
    offset, https://arxiv.org/abs/2402.10571): `-log sigmoid(beta * difference - offset * margin)`. With 0, margins have
    no effect."""
    soft_labels: bool = False
    """If several judges compared the answers, use the share of votes for the chosen answer as its target probability,
    instead of 1: `-share * log sigmoid(d) - (1 - share) * log sigmoid(-d)`, where `d` is the argument of `sigmoid` in
    the loss without this key."""

    @property
    def reads_margins(self) -> bool:
        """True with an offset."""
        return self.offset > 0

    @property
    def reads_shares(self) -> bool:
        """True with soft labels."""
        return self.soft_labels

    def of_pairs(self, pairs: PairLogprobs, beta: float) -> Tensor:
        """See :func:`align.functional.losses.dpo_sigmoid`."""
        from align.functional.losses import dpo_sigmoid

        mistaken: float | Tensor = self.label_smoothing
        if self.soft_labels and pairs.shares is not None:
            mistaken = 1 - pairs.shares
        return dpo_sigmoid(pairs.differences, beta, mistaken, self.offset * pairs.margins if self.offset else None)


class IpoLoss(PairLoss):
    """The squared distance to a target margin of 1 / (2 beta), on means per token
    (https://arxiv.org/abs/2310.12036)."""

    reads = "mean"

    name: Literal["ipo"]
    """`ipo`"""

    def of_pairs(self, pairs: PairLogprobs, beta: float) -> Tensor:
        """See :func:`align.functional.losses.ipo`."""
        from align.functional.losses import ipo

        return ipo(pairs.differences, beta)


class HingeLoss(PairLoss):
    """A loss that falls until the margin is 1 / beta and is 0 beyond it (https://arxiv.org/abs/2309.06657)."""

    name: Literal["hinge"]
    """`hinge`"""

    def of_pairs(self, pairs: PairLogprobs, beta: float) -> Tensor:
        """See :func:`align.functional.losses.dpo_hinge`."""
        from align.functional.losses import dpo_hinge

        return dpo_hinge(pairs.differences, beta)


class KtoPairLoss(PairLoss):
    """Each answer is judged by itself: its log-ratio is compared with the mean log-ratio of the answers of the other
    kind (https://arxiv.org/abs/2402.01306)."""

    needs_reference_points = True

    name: Literal["kto_pair"]
    """`kto_pair`"""

    def of_pairs(self, pairs: PairLogprobs, beta: float) -> Tensor:
        """See :func:`align.functional.losses.kto_pair`."""
        from align.functional.losses import kto_pair

        return kto_pair(pairs.chosen, pairs.rejected, beta, *pairs.reference_points)


class SimpoLoss(PairLoss):
    """SimPO: means per token, a target margin and no reference (https://arxiv.org/abs/2405.14734). `beta` is the scale
    of its reward; about 2 is usual."""

    reads = rewards = "mean"
    needs_reference = False

    name: Literal["simpo"]
    """`simpo`"""
    gamma: float = Field(default=1.0, ge=0)
    """Target margin, in units of its reward."""

    def of_pairs(self, pairs: PairLogprobs, beta: float) -> Tensor:
        """See :func:`align.functional.losses.simpo`."""
        from align.functional.losses import simpo

        return simpo(pairs.differences, beta, self.gamma)


PAIR_LOSSES: dict[str, type[PairLoss]] = {
    "sigmoid": SigmoidLoss,
    "ipo": IpoLoss,
    "hinge": HingeLoss,
    "kto_pair": KtoPairLoss,
    "simpo": SimpoLoss,
}


def _pair_loss(value: Any) -> Any:
    """A name stands for a loss with its defaults; a mapping is validated by the class that its ``name`` names."""
    if isinstance(value, PairLoss):
        return value
    block = isinstance(value, Mapping)
    name = value.get("name") if block else value
    if not isinstance(name, str) or name not in PAIR_LOSSES:
        known = ", ".join(PAIR_LOSSES)
        if block and name is None:
            raise ValueError(f"expected one of {known}, or a mapping with it as `name`")
        error = InputError(f"no preference loss `{str(name)[:80]}`; known: {known}")
        details = InitErrorDetails(type=unknown_name(error, PAIR_LOSSES), loc=("name",) if block else (), input=name)
        raise ValidationError.from_exception_data("PairLoss", [details]) from error
    return PAIR_LOSSES[name].model_validate(value if block else {"name": name})


if TYPE_CHECKING:
    LossChoice = PairLoss
else:
    LossChoice = Annotated[Union[tuple(PAIR_LOSSES.values())], BeforeValidator(_pair_loss)]  # noqa: UP007 - of a table
"""The type of a recipe field that holds a preference loss."""
