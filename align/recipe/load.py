"""Loading a recipe by name or path, with overrides, and checking it. All problems are reported together, each with
file, line and column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from align import secrets
from align.errors import EnvironmentFault, InputError, Problem
from align.recipe import reference_syntax
from align.recipe.checks import messages, override, source_keys, stage_references
from align.recipe.checks.stage_references import ReferenceUse
from align.recipe.language import yaml_tree
from align.recipe.language.yaml_tree import Node
from align.recipe.reference_syntax import shipped_root
from align.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, with the places of all keys. A recipe is never rewritten: ``text`` and ``overrides`` are what
    the user gave."""

    recipe: Recipe
    path: Path
    """The recipe's file, absolute."""
    root: Path
    """Folder in which relative paths are looked for besides the current one. It is the recipe's folder; for a shipped
    recipe the folder above; for the copy in a run folder that of the original recipe."""
    order: tuple[str, ...]
    """Stage names in running order: each after the stages that it needs, otherwise as in the file."""
    text: str
    overrides: tuple[str, ...]
    tree: Node

    def position(self, key: str) -> tuple[int | None, int | None]:
        """Line and column (from 1) of the dotted ``key``, or of the nearest key around it; None if an override set
        it."""
        place = self._node(key).key_place
        return place.line, place.col

    def problem(self, key: str, message: str, hint: str | None = None) -> Problem:
        """``message`` about the dotted ``key``, at its place."""
        return self._node(key).key_place.problem(key, message, hint)

    def written(self, path: Sequence[str | int]) -> str:
        """The dotted key of ``path`` in the recipe as written: a value that is short for a list or a mapping is named
        by its own key."""
        return ".".join(map(str, yaml_tree.follow(self.tree, path)[0]))

    def references(self, stage: str) -> tuple[ReferenceUse, ...]:
        """All references of a stage, defaults included. The recipe's own ``model`` is not among them."""
        return tuple(stage_references.find(self.recipe.stages[stage], ("stages", stage)))

    def dependencies(self, stage: str) -> tuple[str, ...]:
        """The stages that ``stage`` refers to, each once."""
        return stage_references.needs(self.recipe.stages[stage], stage)

    def _node(self, key: str) -> Node:
        return yaml_tree.follow(self.tree, key.split("."))[1]


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package."""
    return sorted((shipped_root() / "recipes").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given by its path or by the name of a shipped recipe. Raises :class:`InputError`."""
    path = Path(name).expanduser()
    if reference_syntax.is_data(name) and path.exists():
        hint = f"`align data inspect {name}` shows it, and a recipe names it: `data: {name}`"
        raise InputError(f"{name} is data, and a recipe is wanted here", hint=hint)
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        if not path.is_file():
            raise InputError(f"no such recipe: {name}", hint="`align recipes` lists the shipped ones")
        return path
    shipped = {path.stem: path for path in shipped_recipes()}
    if name not in shipped:
        if path.exists():
            raise InputError(
                f"{name} is here, but a recipe's file ends in .yaml", hint=f"write ./{name} if it is one all the same"
            )
        known = f"shipped recipes: {', '.join(shipped)}; a file of your own ends in .yaml"
        raise InputError(f"no shipped recipe is named {name}", hint=messages.did_you_mean(name, shipped) or known)
    return shipped[name]


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe. No model is loaded and no data is read.

    Args:
        path_or_name: a file, or the name of a shipped recipe.
        overrides: ``key=value`` texts, applied in order after the file.

    Raises:
        InputError: with every problem found.
        EnvironmentFault: when the only problems are packages that are not installed.
    """
    path = find_recipe(path_or_name)
    text = _read(path)
    problems: list[Problem] = []
    tree = yaml_tree.parse(text, str(path), problems)
    if tree is None:
        raise InputError(problems)
    override.apply(tree, overrides, problems)
    if leaks := _secrets(tree):
        raise InputError(leaks)  # before any other message, which could quote a secret
    absolute = path.resolve()
    root = _root_of(absolute)
    reference_syntax.import_beside(root)
    recipe = _validated(tree, problems)
    wrong, packages = stage_references.check(tree, recipe, root)
    problems += wrong
    if recipe is not None:
        problems += source_keys.problems(tree, recipe, root)
    if recipe is None or problems:
        raise InputError(_in_order([*problems, *packages]))
    if packages:
        raise EnvironmentFault(packages)
    return LoadedRecipe(recipe, absolute, root, stage_references.order(recipe), text, tuple(overrides), tree)


def _root_of(path: Path) -> Path:
    """The folder in which relative paths of a recipe are looked for besides the current one."""
    if path.is_relative_to(shipped_root() / "recipes"):
        return shipped_root()
    try:
        recorded = (
            Path(json.loads((path.parent / "run.json").read_bytes())["root"])
            if path.name == "recipe.yaml"
            else path.parent
        )
        return recorded if recorded.is_dir() else path.parent
    # Not a copy in a run folder, or a damaged one: treated like any recipe
    except (OSError, ValueError, KeyError, TypeError):
        return path.parent


def _secrets(node: Node, path: tuple[str, ...] = ()) -> list[Problem]:
    """Problems: addresses with a password or a token, since recipes are printed and copied into every run."""
    if isinstance(node.content, dict):
        return [problem for key, child in node.content.items() for problem in _secrets(child, (*path, key))]
    if isinstance(node.content, list):
        return [problem for i, child in enumerate(node.content) for problem in _secrets(child, (*path, str(i)))]
    if not isinstance(node.content, str) or not secrets.in_address(node.content):
        return []
    hint = "leave it out; whatever needs a key reads it from an environment variable"
    return [node.place.problem(".".join(path), "an address with a user, a password or a token in it", hint)]


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Problems sorted by place, overrides last. Of several about a key only the first is kept, which causes the
    others."""
    first: dict[tuple[object, ...], Problem] = {}
    for problem in problems:
        first.setdefault((problem.file, problem.line, problem.col, problem.key), problem)
    return sorted(first.values(), key=lambda p: (p.line or 10**9, p.col or 0))


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > yaml_tree.MAX_BYTES:
            raise InputError(
                Problem(f"is {size:,} bytes; a recipe has at most {yaml_tree.MAX_BYTES:,}", file=str(path))
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(Problem(f"not UTF-8 (byte 0x{data[error.start]:02x})", file=str(path), line=line)) from error


def _validated(tree: Node, problems: list[Problem]) -> Recipe | None:
    try:
        return Recipe.model_validate(tree.plain())
    except ValidationError as error:
        problems.extend(messages.problems(error, tree))
        return None
