"""Looking into the schema: which model reads which part of a recipe, and which fields are references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.errors import InputError
from align.recipe.schema import Recipe, Reference, Stage, stage_class
from align.recipe.source import Node, follow


def stages_of(tree: Node) -> dict[str, Node]:
    """The stages of a recipe as written, which may be wrong in places."""
    stages = tree.content.get("stages") if isinstance(tree.content, dict) else None
    return stages.content if stages is not None and isinstance(stages.content, dict) else {}


def stage_model(stage: Node) -> type[Stage] | None:
    """The schema of a stage as it is written; None when its kind is missing or wrong."""
    kind = stage.content.get("kind") if isinstance(stage.content, dict) else None
    if kind is None or not isinstance(kind.content, str):
        return None
    try:
        return stage_class(kind.content)
    except InputError:  # validation reports it, at the kind
        return None


def model_at(root: Node, path: Sequence[str | int]) -> type[BaseModel] | None:
    """The model that reads the mapping at ``path`` of a recipe; None when there is none."""
    model: type[BaseModel] | None = Recipe
    if len(path) > 1 and path[0] == "stages":
        model, path = stage_model(follow(root, path[:2])[1]), path[2:]
    for part in path:
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            model = next(models_in(field.annotation), None) if field else None
    return model


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation mentions, through unions, lists and ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def mark_of(field: FieldInfo) -> Reference | None:
    """What a field that holds references accepts; None for other fields."""
    marks = [mark for mark in field.metadata if isinstance(mark, Reference)]
    return marks[0] if marks else next(_marks_in(field.annotation), None)


def _marks_in(annotation: Any) -> Iterator[Reference]:
    yield from (mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Reference))
    for argument in get_args(annotation):
        yield from _marks_in(argument)
