"""Overrides, ``key=value`` after the recipe. They change the recipe's tree before it is checked, so that a mistake in
an override is reported like any other."""

from __future__ import annotations

from collections.abc import Sequence

from align.errors import Problem
from align.recipe.checks.fields import models_in, stage_model, stages_of
from align.recipe.checks.messages import key_hint, shown
from align.recipe.language import yaml_tree
from align.recipe.language.yaml_tree import Node, SourcePlace
from align.recipe.schema import Recipe
from align.secrets import hide


def apply(tree: Node, overrides: Sequence[str], problems: list[Problem]) -> None:
    """Apply overrides to ``tree``, in order and in place. Mistakes are added to ``problems``."""
    for override in overrides:
        place = SourcePlace(f'override "{hide(override)[:200]}"')
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            problems.append(place.problem("", "is not of the form key=value"))
        elif not text.strip():
            problems.append(place.problem(key, "has no value", "write null for none"))
        else:
            value = yaml_tree.parse_value(text, place, problems)
            path = _full_path(tree, key.strip().split("."), place, problems)
            if value is not None and path is not None:
                _put(tree, path, value, problems)


def _full_path(tree: Node, parts: list[str], place: SourcePlace, problems: list[Problem]) -> list[str] | None:
    """The full path of a key, which is looked for at the root, then inside the only stage, then inside that stage's
    ``train``."""
    if parts[0] in Recipe.model_fields:
        return parts
    stages = stages_of(tree)
    homes = [["stages", name, *home] for name, stage in stages.items() if (home := _home(parts[0], stage)) is not None]
    if homes and len(stages) == 1:
        return [*homes[0], *parts]
    if homes:
        hint = f"with several stages, say which: {'.'.join([*homes[0], *parts])}=..."
    else:
        known = [*Recipe.model_fields, *(key for stage in stages.values() for key in _short_keys(stage))]
        hint = _hint(parts, stages, known) or f"known keys: {', '.join(dict.fromkeys(known))}"
    problems.append(place.problem(".".join(parts), "unknown key", hint))
    return None


def _hint(parts: list[str], stages: dict[str, Node], known: list[str]) -> str | None:
    """A hint for an unknown key. A key of a part of a stage (``format`` of ``data``) has to be written with its
    path."""
    for name, stage in stages.items():
        model = stage_model(stage)
        for part, field in model.model_fields.items() if model is not None else ():
            if any(parts[0] in inner.model_fields for inner in models_in(field.annotation)):
                return f"write {'.'.join(['stages', name, part, *parts])}=..."
    return key_hint(parts[0], Recipe, known)


def _home(key: str, stage: Node) -> list[str] | None:
    model = stage_model(stage)
    if model is None or key not in _short_keys(stage):
        return None
    return [] if key in model.model_fields else ["train"]


def _short_keys(stage: Node) -> list[str]:
    """Keys that may be written without their path: the fields of the stage, and those of its ``train``."""
    model = stage_model(stage)
    if model is None:
        return []
    train = model.model_fields.get("train")
    return (
        [*model.model_fields, *(key for inner in models_in(train.annotation) for key in inner.model_fields)]
        if train
        else [*model.model_fields]
    )


def _put(tree: Node, path: list[str], value: Node, problems: list[Problem]) -> None:
    """Set the value at ``path``, creating missing mappings on the way."""
    node = tree
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        # The short form `data: PATH` or `model: PATH` becomes the mapping that it stands for
        if isinstance(node.content, str):
            node.content = {"path": Node(node.content, node.place, node.key_place, node.text)}
        elif node.content is None:
            node.content = {}
        if isinstance(node.content, list):
            if not part.isdigit() or int(part) >= len(node.content):
                message = f"is a list of {len(node.content)}"
                problems.append(
                    value.place.problem(".".join(path[:depth]), message, "name an entry by its number, from 0")
                )
                return
            if last:
                node.content[int(part)] = value
            node = node.content[int(part)]
        elif isinstance(node.content, dict):
            if last:
                node.content[part] = value
            node = node.content.setdefault(part, Node({}, value.place, value.place))
        else:
            problems.append(value.place.problem(".".join(path[:depth]), f"is {shown(node)}, not a mapping"))
            return
