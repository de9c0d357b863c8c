"""Where a training run is, and which of its evaluations was the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass
class Progress:
    """How far the run is. All of it is saved in a checkpoint; resuming needs nothing else besides weights, optimiser
    and RNG."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_eval: dict[str, float] | None = None
    last_eval: dict[str, float] | None = None
    """The last evaluation; once the run is over, that of the weights that are kept."""
    best_eval: dict[str, float] | None = None
    """The best evaluation so far, by the trainer's :attr:`Trainer.best_metric`."""
    best_step: int = 0
    evals_without_improvement: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """Read from a checkpoint. Checkpoints of earlier versions have a separate key for the best loss, which is
        ignored."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})


@dataclass(frozen=True)
class BestMetric:
    """The held-out metric by which the best weights are chosen, and whether a higher or a lower value is better."""

    name: str
    better: Literal["lower", "higher"]

    def improved(self, values: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        """Is this evaluation better than ``best``, the best one so far? True when there was none."""
        if best is None:
            return True
        now, before = values[self.name], best[self.name]
        return now < before if self.better == "lower" else now > before
