"""Finding the references of a recipe by the marks in the schema, and checking them against the stages, the disk and the
installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.errors import EnvironmentFault, InputError, Problem
from align.recipe import reference_syntax
from align.recipe.checks.fields import mark_of, model_of, stage_model, stages_of
from align.recipe.checks.messages import did_you_mean
from align.recipe.language.yaml_tree import Node, follow
from align.recipe.schema import Recipe, Reference

_MODELS = ("policy", "reward_model")
_MODEL_FILES = ("config.json", "adapter_config.json", "modules.json")
"""A folder with one of these is a model, an adapter, or an embedder."""


@dataclass(frozen=True)
class ReferenceUse:
    """A reference in a recipe."""

    path: tuple[str | int, ...]
    """Its place in the recipe: ``("stages", "sft", "data", 0, "path")``."""
    text: str
    """As written."""
    wanted: Reference

    @property
    def key(self) -> str:
        """``path``, dotted."""
        return ".".join(map(str, self.path))


def find(
    value: Any, path: tuple[str | int, ...] = (), annotation: Any = None, mark: Reference | None = None
) -> Iterator[ReferenceUse]:
    """The references in a validated model, or in plain values before validation, which ``annotation`` describes.

    Args:
        value: a validated model (with its defaults), a mapping, a list, or a text.
        path: place of ``value`` in the recipe.
        annotation: the type that the schema gives it.
        mark: the schema's mark, if ``value`` is a reference or a list of them.
    """
    model = type(value) if isinstance(value, BaseModel) else model_of(annotation, value)
    if isinstance(value, str) and mark is not None:
        yield ReferenceUse(path, value, mark)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from find(item, (*path, i), annotation, mark)
    elif isinstance(value, Mapping) and mark is not None:
        for key, item in value.items():
            yield from find(item, (*path, key), annotation, mark)
    elif model is not None and isinstance(value, (str, Mapping, BaseModel)):
        fields = _short_form(model, value) if isinstance(value, str) else value
        for name, field in model.model_fields.items():
            item = getattr(fields, name) if isinstance(fields, BaseModel) else fields.get(name)
            yield from find(item, (*path, name), field.annotation, mark_of(field))


def _short_form(model: type[BaseModel], text: str) -> dict[str, str]:
    """The mapping that a text is short for: it sets the model's first reference. Empty for the name of code."""
    marked = (name for name, field in model.model_fields.items() if mark_of(field) is not None)
    return {} if reference_syntax.names_code(text) else {name: text for name in islice(marked, 1)}


def check(tree: Node, recipe: Recipe | None, root: Path) -> tuple[list[Problem], list[Problem]]:
    """(problems of a recipe's references, those that are only a missing Python package).

    Args:
        tree: the recipe as written.
        recipe: the same, validated; None when validation failed.
        root: where relative paths are looked for besides the current folder.
    """
    stages = stages_of(tree)
    produces = {name: getattr(stage_model(stage), "produces", None) for name, stage in stages.items()}
    problems: list[Problem] = []
    packages: list[Problem] = []
    for referred in _all(tree, recipe):
        written, node, _ = follow(tree, referred.path)
        # A default, or as written
        key = referred.key if isinstance(node.content, (dict, list)) else ".".join(map(str, written))
        try:
            ref = reference_syntax.parse(referred.text, root)
            if isinstance(ref, reference_syntax.StageRef):
                _check_stage(ref.name, referred, produces)
            elif isinstance(ref, reference_syntax.HubRef) and not referred.wanted.hub:
                raise InputError(f"no such file: {referred.text}")
            elif not isinstance(ref, reference_syntax.HubRef):
                _check_fit(Path(reference_syntax.resolve(referred.text, root)), referred.wanted)
                problems.extend(_idle_revision(tree, referred))
        except (InputError, EnvironmentFault) as error:
            kind = packages if isinstance(error, EnvironmentFault) else problems
            kind.extend(node.place.problem(key, p.message, p.hint) for p in error.problems)
    return problems + _refused_starts(tree, recipe) + _cycles(tree, recipe), packages


def _refused_starts(tree: Node, recipe: Recipe | None) -> list[Problem]:
    """Problems of stages that refuse to start from the result of another stage."""
    stages = {} if recipe is None else recipe.stages
    problems = []
    for name, spec in stages.items():
        start = spec.starting_model or ""
        other = stages.get(start.removeprefix("stage:").strip()) if start.startswith("stage:") else None
        refusal = None if other is None else spec.refuses_start(other)
        if refusal is not None:
            key = type(spec).starts_from
            _, node, _ = follow(tree, ("stages", name, key))
            problems.append(node.place.problem(f"stages.{name}.{key}", *refusal))
    return problems


def _idle_revision(tree: Node, referred: ReferenceUse) -> Iterator[Problem]:
    """Problem: a commit is given for a model that is not a hub id. For data, `align.recipe.checks.source_keys` checks
    this."""
    if not referred.wanted.hub:
        return  # a file beside the model, such as its template, to which the commit does not apply
    mapping = follow(tree, referred.path[:-1])[1].content
    revision = mapping.get("revision") if isinstance(mapping, dict) else None
    if (
        revision is not None
        and revision.content is not None
        and not set(referred.wanted.accepts) & {"preferences", "prompts"}
    ):
        key = ".".join(map(str, (*referred.path[:-1], "revision")))
        yield revision.key_place.problem(
            key, f"has no effect with {referred.text[:80]}, which is on this machine", "remove it"
        )


def order(recipe: Recipe) -> tuple[str, ...]:
    """Stage names, each after the stages that it needs, in file order otherwise. The references must be free of
    cycles."""
    return tuple(reference_syntax.running_order({name: needs(stage, name) for name, stage in recipe.stages.items()}))


def needs(stage: Any, name: str, annotation: Any = None) -> tuple[str, ...]:
    """The names of the stages that a stage refers to, each once."""
    texts = (referred.text for referred in find(stage, ("stages", name), annotation))
    return tuple(dict.fromkeys(text.removeprefix("stage:").strip() for text in texts if text.startswith("stage:")))


def _all(tree: Node, recipe: Recipe | None) -> Iterator[ReferenceUse]:
    if recipe is not None:
        yield from find(recipe.model, ("model",))
        for name, stage in recipe.stages.items():
            yield from find(stage, ("stages", name))
        return
    plain = tree.plain() if isinstance(tree.content, dict) else {}
    yield from find(plain.get("model"), ("model",), Recipe.model_fields["model"].annotation)
    for name, node in stages_of(tree).items():
        yield from find(node.plain(), ("stages", name), stage_model(node))


def _check_stage(name: str, referred: ReferenceUse, produces: Mapping[str, str | None]) -> None:
    wanted = referred.wanted.accepts
    if not wanted:
        raise InputError("a stage cannot be named here")
    if name not in produces:
        known = f"stages: {', '.join(produces)}"
        near = did_you_mean(name, produces)
        raise InputError(f"no stage is named `{name[:80]}`", hint=f"{near} {known}" if near else known)
    if referred.path[:2] == ("stages", name):
        raise InputError("the stage refers to itself")
    made = produces[name]
    if made is not None and made not in wanted:
        kinds = " or ".join(_a(kind) for kind in wanted)
        fitting = [other for other, kind in produces.items() if kind in wanted and other != referred.path[1]]
        hint = f"stages that make one: {', '.join(fitting)}" if fitting else "no stage of this recipe makes one"
        raise InputError(f"`{name}` makes {_a(made)}, {kinds} is wanted here", hint=hint)


def _a(artifact: str) -> str:
    words = artifact.replace("_", " ")
    return words if words.endswith("s") else f"a {words}"


def _check_fit(path: Path, wanted: Reference) -> None:
    """Check what is visible of a local file or folder without reading it."""
    is_model = wanted.hub and (not wanted.accepts or set(wanted.accepts) & set(_MODELS))
    if not wanted.hub and not path.is_file():
        raise InputError(f"{path} is not a file")
    if is_model and path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{path} is not a model", hint="a model is a folder or a .gguf file")
    if is_model and path.is_dir() and not any((path / name).is_file() for name in _MODEL_FILES):
        raise InputError(f"{path} is not a model folder: it has no config.json")
    if not is_model and path.suffix == ".py":
        raise InputError(
            "data set scripts are never run", hint="name a data file, or use `format: package.module:function`"
        )


def _cycles(tree: Node, recipe: Recipe | None) -> list[Problem]:
    """A problem for each cycle of stages, at the first of them in the file. A stage that names itself is reported by
    another check."""
    nodes = stages_of(tree)
    stages = recipe.stages if recipe is not None else {name: node.plain() for name, node in nodes.items()}
    edges = {
        name: [n for n in needs(stage, name, stage_model(nodes[name])) if n in nodes and n != name]
        for name, stage in stages.items()
    }
    done: set[str] = set()
    problems: list[Problem] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            cycle = [*trail[trail.index(name) :], name]
            problems.append(
                nodes[name].key_place.problem(
                    f"stages.{name}", f"stages need each other in a circle: {' -> '.join(cycle)}"
                )
            )
        elif name not in done:
            for needed in edges[name]:
                visit(needed, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    return problems
