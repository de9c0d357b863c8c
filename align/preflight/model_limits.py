"""Checks before a run: whether the models of a recipe can read rows as long as its stages allow, and whether the engine
supports them.

Only configurations are read, no weights; torch is not imported. Hub models that are not here yet cannot be checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.errors import EnvironmentFault, InputError, Problem
from align.models.files.folder import read_folder
from align.models.files.positions import positions_at, require_positions
from align.recipe import reference_syntax
from align.recipe.checks.stage_references import ReferenceUse, find
from align.recipe.load import LoadedRecipe
from align.recipe.reference_syntax import registered
from align.recipe.schema import Model, Rollout
from align.sizing.machine import gpu_memory


def model_problems(loaded: LoadedRecipe, stages: Iterable[str] | None = None) -> tuple[list[Problem], list[str]]:
    """Problems with rows longer than their models can read, in ``stages`` (all when None); and notes for the user, one
    line each."""
    names = list(loaded.order if stages is None else stages)
    problems: list[Problem] = []
    notes: list[str] = []
    for name in names:
        for key, tokens in _lengths(loaded.recipe.stages[name]):
            try:
                notes += _beyond(loaded, name, f"stages.{name}.{key}", tokens)
            except InputError as error:
                problems += [
                    loaded.problem(f"stages.{name}.{key}", problem.message, problem.hint) for problem in error.problems
                ]
    return problems, notes


def local_models(loaded: LoadedRecipe) -> list[Model]:
    """All models on this machine that a recipe names, for :func:`align.models.files.bases.known_models`."""
    return [Model(path=str(path)) for _, path in _models(loaded, list(loaded.order))]


def require_models(loaded: LoadedRecipe, stages: Iterable[str]) -> list[str]:
    """The notes of :func:`model_problems`. Raises :class:`InputError` with its problems."""
    problems, notes = model_problems(loaded, stages)
    if problems:
        raise InputError(problems)
    return notes


def require_engines(loaded: LoadedRecipe, stages: Iterable[str]) -> None:
    """Raises :class:`EnvironmentFault` when an engine does not support, on this machine, a model that one of the stages
    samples from."""
    for name in stages:
        spec = loaded.recipe.stages[name]
        rollout = getattr(spec, "rollout", None)
        if not isinstance(rollout, Rollout) or not type(spec).always_samples:
            continue
        engine = rollout.chosen()
        if engine.limits is None or (engine.package is not None and not engine.package.installed):
            continue
        require_serves, device = registered(engine.limits), "cuda" if gpu_memory() else "cpu"
        for referred, path in _models(loaded, [name]):
            if _is_policy(referred) and _starts_here(loaded, name) and (path / "config.json").is_file():
                try:
                    require_serves(read_folder(path, None).config, device)
                except EnvironmentFault as fault:
                    told = [
                        loaded.problem(f"stages.{name}", problem.message, problem.hint) for problem in fault.problems
                    ]
                    raise EnvironmentFault(told) from fault


def _models(loaded: LoadedRecipe, names: list[str]) -> Iterator[tuple[ReferenceUse, Path]]:
    """The recipe's model and those that stages name, each once, if they are on this machine."""
    # Third parties' stages may load models in other ways
    ours = [name for name in names if ":" not in loaded.recipe.stages[name].kind]
    uses = list(find(loaded.recipe.model, ("model",))) if ours else []
    uses += [referred for name in ours for referred in loaded.references(name)]
    for referred in uses:
        of_recipe = referred.path[0] == "model" and referred.path[-1] == "path"
        if not of_recipe and not set(referred.wanted.accepts) & {"policy", "reward_model"}:
            continue
        ref = reference_syntax.parse(referred.text, loaded.root)
        location = (
            None
            if isinstance(ref, (reference_syntax.StageRef, reference_syntax.HubRef))
            else reference_syntax.resolve(referred.text, loaded.root)
        )
        if isinstance(location, Path):
            yield referred, location


def _lengths(spec: Any) -> Iterator[tuple[str, int]]:
    """Keys of a stage that limit the length of its rows, with the number of tokens that they allow."""
    if isinstance(length := getattr(spec, "max_length", None), int):
        yield "max_length", length
    prompt, answer = (getattr(spec, key, None) for key in ("max_prompt_length", "max_new_tokens"))
    if isinstance(prompt, int) and isinstance(answer, int):
        yield "max_prompt_length", prompt + answer


def _beyond(loaded: LoadedRecipe, name: str, key: str, tokens: int) -> Iterator[str]:
    """A note for each of the stage's policies that was trained on fewer positions. Raises InputError for one that fails
    after its last position."""
    own = [path for referred, path in _models(loaded, [name]) if _is_policy(referred)]
    told = set()
    for path in own if _starts_here(loaded, name) else own[1:]:
        if path in told:
            continue
        told.add(path)
        limit = positions_at(path)
        both = "max_prompt_length + max_new_tokens" if key.endswith("max_prompt_length") else ""
        hint = f"lower {both or 'max_length'} to {limit.limit:,}" if limit is not None else ""
        if note := require_positions(limit, tokens, both, hint):
            yield f"{key}: {note}; rows beyond are read at positions that it has never seen"


def _is_policy(referred: ReferenceUse) -> bool:
    return referred.path[0] == "model" or "policy" in referred.wanted.accepts


def _starts_here(loaded: LoadedRecipe, name: str) -> bool:
    """Whether a stage uses the recipe's model, directly or through the stages before it."""
    spec = loaded.recipe.stages[name]
    named = [referred for referred in loaded.references(name) if "policy" in referred.wanted.accepts]
    if not named:
        return getattr(spec, type(spec).starts_from, "") is None
    stages = [referred.text.removeprefix("stage:").strip() for referred in named if referred.text.startswith("stage:")]
    return any(_starts_here(loaded, other) for other in stages)
