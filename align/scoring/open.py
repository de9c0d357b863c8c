"""From a recipe's scorer block to a scorer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from align.errors import InputError
from align.models.load import locate
from align.recipe import scoring as spec
from align.recipe.schema import Model
from align.scoring.ensemble import EnsembleScorer
from align.scoring.function import FunctionScorer
from align.scoring.rules import RuleScorer
from align.scoring.scorer import Scorer


def open_scorer(
    scorer: spec.Scorer, *, resolve: Callable[[str], Path | str], cache: Path | None = None, device: torch.device | str = "cpu"
) -> Scorer:
    """What a recipe's `reward` or `quality` block describes, ready to score.

    Args:
        resolve: from a reference of the recipe to a place.
        cache: where dequantised weights are kept.
        device: of models.

    Raises:
        InputError: a model or a function cannot be used.
        EnvironmentFault: a hub model is not on this machine and cannot be fetched.
    """
    if isinstance(scorer, spec.EnsembleScorer):
        members = [open_scorer(member, resolve=resolve, cache=cache, device=device) for member in scorer.ensemble]
        return EnsembleScorer(members, scorer.combine)
    if isinstance(scorer, spec.FunctionScorer):
        return FunctionScorer(scorer.function)
    if isinstance(scorer, spec.ModelScorer):
        return _open_model(scorer, resolve, cache, device)
    if isinstance(scorer, spec.Rule):
        return RuleScorer(scorer)
    raise TypeError(f"no scorer for {type(scorer).__name__}")


def _open_model(scorer: spec.ModelScorer, resolve: Callable[[str], Path | str], cache: Path | None, device: torch.device | str) -> Scorer:
    model = Model(
        path=str(resolve(scorer.model)),
        revision=scorer.revision,
        chat_template=None if scorer.chat_template is None else str(resolve(scorer.chat_template)),
        chat_template_kwargs=scorer.chat_template_kwargs,
    )
    if (locate(model) / "reward_head.safetensors").is_file():
        return _open_own(scorer, model, cache, device)
    from align.scoring.classifier import ClassifierScorer

    return ClassifierScorer(model, device=device, dtype=scorer.dtype, max_length=scorer.max_length, batch_tokens=scorer.batch_tokens)


def _open_own(scorer: spec.ModelScorer, model: Model, cache: Path | None, device: torch.device | str) -> Scorer:
    """A reward model of this package brings its template along, and must be read with it."""
    own = [name for name in ("chat_template", "chat_template_kwargs") if getattr(scorer, name)]
    if own:
        raise InputError(f"{scorer.model} has its own chat template: {own[0]} is for models of other people")
    from align.scoring.reward_model import RewardModelScorer

    return RewardModelScorer(model, cache=cache, device=device)
