"""Looking things up in the schema: which model reads which part of a recipe, and which fields are references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.errors import InputError
from align.recipe.language.yaml_tree import Node, follow
from align.recipe.schema import Recipe, Reference, Stage, stage_class


def stages_of(tree: Node) -> dict[str, Node]:
    """The stages of a recipe as written, before validation."""
    stages = tree.content.get("stages") if isinstance(tree.content, dict) else None
    return stages.content if stages is not None and isinstance(stages.content, dict) else {}


def stage_model(stage: Node) -> type[Stage] | None:
    """The schema of a stage as written; None when its kind is missing or unknown."""
    kind = stage.content.get("kind") if isinstance(stage.content, dict) else None
    if kind is None or not isinstance(kind.content, str):
        return None
    try:
        return stage_class(kind.content)
    except InputError:  # validation reports the wrong kind
        return None


def model_at(root: Node, path: Sequence[str | int]) -> type[BaseModel] | None:
    """The model that reads the mapping at ``path`` of a recipe; None when there is none."""
    model: type[BaseModel] | None = Recipe
    known = 0
    if len(path) > 1 and path[0] == "stages":
        model, known = stage_model(follow(root, path[:2])[1]), 2
    annotation: Any = None
    for place in range(known, len(path)):
        part = path[place]
        if isinstance(part, str):
            field = model.model_fields.get(part) if model is not None else None
            annotation = field.annotation if field else None
        model = model_of(annotation, follow(root, path[: place + 1])[1].plain())
    return model


def model_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The model by which ``value``, as written, is read; of several in ``annotation`` the one whose required keys are
    in it."""
    models = list(models_in(annotation))
    fitting = (model for model in models if isinstance(value, Mapping) and _fits(model, value))
    return next(fitting, models[0] if models else None)


def _fits(model: type[BaseModel], value: Mapping[str, Any]) -> bool:
    required = {name: field.annotation for name, field in model.model_fields.items() if field.is_required()}
    return all(
        name in value and (get_origin(annotation) is not Literal or value[name] in get_args(annotation))
        for name, annotation in required.items()
    )


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, also inside unions, lists and ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def mark_of(field: FieldInfo) -> Reference | None:
    """The mark of a field that holds references; None for other fields."""
    marks = [mark for mark in field.metadata if isinstance(mark, Reference)]
    return marks[0] if marks else next(_marks_in(field.annotation), None)


def _marks_in(annotation: Any) -> Iterator[Reference]:
    yield from (mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Reference))
    for argument in get_args(annotation):
        yield from _marks_in(argument)
