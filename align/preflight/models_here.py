"""Whether a run can load the recipe's models from this machine's disk, checked without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.errors import AlignError, Problem
from align.models.files.folder import read_folder
from align.models.files.own_code import refuse_own_code
from align.models.files.starts import output_names, output_weights
from align.pipeline.identity import needs_model
from align.planning.planner import planner_of
from align.recipe import reference_syntax
from align.recipe.blocks.scoring import ModelScorer
from align.recipe.checks.fields import mark_of
from align.recipe.load import LoadedRecipe
from align.recipe.schema import BUILTIN_STAGES, Model, Stage

Kind = Literal["policy", "scorer", "embedder"]


class NeededModel(NamedTuple):
    """A model that a recipe names."""

    key: str
    model: Model
    kind: Kind
    """The use that a stage makes of the model."""
    grades: Mapping[str, float] | None = None
    """For a scoring model, the outputs that the recipe selects."""


def needed_models(loaded: LoadedRecipe, stages: Sequence[str]) -> Iterator[NeededModel]:
    """The recipe's model, and every model that ``stages`` name.

    Results of stages are left out, and so are stages of third parties, which may load models in other ways.
    """
    recipe = loaded.recipe
    stages = [name for name in stages if recipe.stages[name].kind in BUILTIN_STAGES]
    if starting := [recipe.stages[name] for name in stages if needs_model(recipe.stages[name])]:
        yield NeededModel("model", recipe.model, "scorer" if all(map(_may_be_a_scorer, starting)) else "policy")
    for name in stages:
        for referred in loaded.references(name):
            accepts = set(referred.wanted.accepts)
            if not referred.wanted.hub or accepts & {"preferences", "prompts"} or referred.text.startswith("stage:"):
                continue
            parent: Any = recipe.stages[name]
            for part in referred.path[2:-1]:
                parent = parent[part] if isinstance(part, int) else getattr(parent, part)
            kind: Kind
            if "reward_model" in accepts:
                kind = "scorer"
            else:
                kind = "policy" if accepts else "embedder"
            if kind == "embedder" and getattr(parent, "data", None) is None:
                continue  # without held-out data an evaluation does not use its embedder
            yield NeededModel(
                loaded.written(referred.path),
                Model(path=referred.text, revision=getattr(parent, "revision", None)),
                kind,
                parent.grades if isinstance(parent, ModelScorer) else None,
            )


def _may_be_a_scorer(spec: Stage) -> bool:
    """Whether a stage can start from a reward model."""
    mark = mark_of(type(spec).model_fields[type(spec).starts_from])
    return mark is not None and "reward_model" in mark.accepts


def starts(loaded: LoadedRecipe, stages: Sequence[str]) -> Iterator[tuple[str, Stage, Path]]:
    """(key, stage, folder) of the models on this machine that ``stages`` start from. A reference that cannot be
    resolved is skipped: another check reports it."""
    for name in stages:
        spec = loaded.recipe.stages[name]
        if (spec.starting_model or "").startswith("stage:"):
            continue
        location: Path | str = ""
        with suppress(AlignError):
            location = reference_syntax.resolve(spec.starting_model or loaded.recipe.model.path, loaded.root)
        if isinstance(location, Path) and location.is_dir():
            yield f"stages.{name}.{type(spec).starts_from}" if spec.starting_model else "model", spec, location


def look_at(location: Path, needed: NeededModel) -> None:
    """Raises :class:`InputError` for a folder that loading would refuse: pickled or missing weights, need of Python
    code, another kind of model, a classifier with several outputs of which none is chosen."""
    if needed.kind == "embedder" or location.suffix == ".gguf":
        return
    folder = read_folder(location, "policy" if needed.kind == "policy" else None)
    refuse_own_code(folder)
    if needed.grades is not None and not folder.is_reward_model and (names := output_names(folder)) is not None:
        output_weights(names, needed.grades or folder.config.get("grade_weights") or {}, str(location))


def refused(loaded: LoadedRecipe) -> list[Problem]:
    """The models on this machine that a run would refuse, each as a problem at its key."""
    problems = []

    def told(key: str, error: AlignError) -> None:
        place = loaded.problem(key, "")
        for one in error.problems:
            where = f"{one.file}: " if one.file else ""
            problems.append(Problem(f"{where}{one.message}", place.file, place.line, place.col, key, one.hint))

    for needed in needed_models(loaded, loaded.order):
        try:
            location = reference_syntax.resolve(needed.model.path, loaded.root)
            if isinstance(location, Path):
                look_at(location, needed)
        except AlignError as error:
            told(needed.key, error)
    for key, fault in starts_refused(loaded, [] if problems else loaded.order):
        told(key, fault)
    return list(dict.fromkeys(problems))


def starts_refused(loaded: LoadedRecipe, stages: Sequence[str]) -> Iterator[tuple[str, AlignError]]:
    """(key, error) for stages that cannot start from their model because they could not keep its head."""
    for key, spec, location in starts(loaded, stages):
        try:
            planner_of(spec).look_at_start(spec, location)
        except AlignError as error:
            yield key, error
