"""Where a training run is, and which of its evaluations was the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass
class Progress:
    """Where the run is. Everything here is saved, and is all that resuming needs besides weights, optimiser and RNG."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_eval: dict[str, float] | None = None
    last_eval: dict[str, float] | None = None
    """Of the model that is kept, once the run is over."""
    best_eval: dict[str, float] | None = None
    """The evaluation that was best by the trainer's :attr:`Trainer.best_metric`."""
    best_step: int = 0
    evals_without_improvement: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """As a checkpoint has it. Those of earlier versions also keep the best loss apart from ``best_eval``."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})


@dataclass(frozen=True)
class BestMetric:
    """The held-out metric that says which weights are the best, and which way."""

    name: str
    better: Literal["lower", "higher"]

    def improved(self, values: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        """Is an evaluation better than the best so far, if there was one?"""
        if best is None:
            return True
        now, before = values[self.name], best[self.name]
        return now < before if self.better == "lower" else now > before
