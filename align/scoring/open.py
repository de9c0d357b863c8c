"""Making a scorer from a recipe's scorer block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.errors import InputError
from align.models.load import locate
from align.recipe.blocks import scoring as spec
from align.recipe.schema import Model
from align.scoring.ensemble import MemberScorer
from align.scoring.function import CalledScorer
from align.scoring.rules import RuleScorer
from align.scoring.scorer import Scorer

OUR_HEAD = "reward_head.safetensors"
"""The file that makes a folder a reward model of this package."""


def open_scorer(
    scorer: spec.ScorerSpec,
    *,
    resolve: Callable[[str], Path | str],
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    ids_from: str | None = None,
) -> Scorer:
    """The scorer that a recipe's `reward` or `quality` block describes.

    Args:
        resolve: gives the path, or hub id, of a reference in the recipe.
        cache: where dequantised weights are kept.
        device: device of the models.
        ids_from: digest of the encoder that made the answers' ids, if they will have ids. A reward model of this
            package with the same encoder scores the ids unchanged.

    Raises:
        InputError: a model or a function cannot be used.
        EnvironmentFault: a hub model is not on this machine and cannot be fetched.
    """
    if isinstance(scorer, spec.EnsembleScorer):
        options: dict[str, Any] = {"resolve": resolve, "cache": cache, "device": device, "ids_from": ids_from}
        return MemberScorer([open_scorer(member, **options) for member in scorer.ensemble], scorer.combine)
    if isinstance(scorer, spec.FunctionScorer):
        return CalledScorer(scorer.function)
    if isinstance(scorer, spec.Rule):
        return RuleScorer(scorer)
    if isinstance(scorer, spec.ImplicitScorer):
        from align.scoring.implicit import ImplicitRewardScorer

        policy, reference = (Model(path=str(resolve(path))) for path in (scorer.policy, scorer.reference))
        return ImplicitRewardScorer(
            policy,
            reference,
            beta=scorer.beta,
            ids_from=ids_from,
            microbatch_tokens=scorer.batch_tokens,
            dtype=scorer.dtype,
            device=device,
            cache=cache,
        )
    assert isinstance(scorer, spec.ModelScorer), type(scorer)
    return _open_model(scorer, resolve, cache=cache, device=device, ids_from=ids_from)


def _open_model(
    scorer: spec.ModelScorer,
    resolve: Callable[[str], Path | str],
    *,
    cache: Path | None,
    device: torch.device | str,
    ids_from: str | None,
) -> Scorer:
    """A reward model of this package, or a sequence classifier of any origin."""
    model = Model(
        path=str(resolve(scorer.model)),
        revision=scorer.revision,
        chat_template=None if scorer.chat_template is None else str(resolve(scorer.chat_template)),
        chat_template_kwargs=scorer.chat_template_kwargs,
    )
    settings: dict[str, Any] = {"dtype": scorer.dtype, "device": device}
    if not (locate(model) / OUR_HEAD).is_file():
        from align.scoring.classifier import ClassifierScorer

        settings |= {"max_length": scorer.max_length, "batch_tokens": scorer.batch_tokens}
        return ClassifierScorer(model, **settings, grades=scorer.grades)
    keys = ("chat_template", "chat_template_kwargs", "max_length", "grades")
    if foreign := [name for name in keys if getattr(scorer, name)]:
        raise InputError(
            f"{scorer.model} was made here and knows its own template, length and grades",
            hint=f"remove {', '.join(foreign)}",
        )
    from align.scoring.reward_model import RewardModelScorer

    return RewardModelScorer(model, **settings, cache=cache, ids_from=ids_from, microbatch_tokens=scorer.batch_tokens)
