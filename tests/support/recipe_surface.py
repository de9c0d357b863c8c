"""Every key that a recipe may have, with its type and default, in ``tests/fixtures/recipe_surface.txt``.

``python -m tests.support.recipe_surface`` writes the file anew; its diff is the record of what a change means for recipes.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from align.recipe.checks.fields import models_in
from align.recipe.manuals.recipe_keys import key_default, key_type
from align.recipe.schema import BUILTIN_STAGES, Recipe
from tests.support.root import ROOT

FILE = ROOT / "tests" / "fixtures" / "recipe_surface.txt"


def surface() -> str:
    """A line for each key of each model of the schema."""
    found: dict[str, list[str]] = {}
    waiting: list[type[BaseModel]] = [Recipe, *BUILTIN_STAGES.values()]
    while waiting:
        model = waiting.pop()
        if model.__name__ in found:
            continue
        found[model.__name__] = list(_lines(model))
        for field in model.model_fields.values():
            waiting += models_in(field.annotation)
    return "".join(line + "\n" for name in sorted(found) for line in found[name])


def _lines(model: type[BaseModel]) -> Iterator[str]:
    for name, field in sorted(model.model_fields.items()):
        yield f"{model.__name__}.{field.alias or name}: {key_type(field)} = {key_default(field)}".rstrip(" =")


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
