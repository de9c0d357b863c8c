"""Translating pydantic's errors into messages for the user, each at its place in the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from align.errors import Problem
from align.recipe.checks import other_tools
from align.recipe.checks.fields import model_at, models_in
from align.recipe.language.strict import Strict
from align.recipe.language.yaml_tree import Node, SourcePlace, follow

_EXPECTED = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_NEAR = 0.72
"""Similarity (0 to 1) from which an unknown key may be a misspelt one: `sed` and `seed`, but not `format` and `lora`.
When there are few names to choose from, a lower one is used."""
_RANGES = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def problems(error: ValidationError, root: Node) -> list[Problem]:
    """The mistakes that the validation of a recipe found, one problem for each place."""
    mistakes = [_Mistake(details, root) for details in error.errors(include_url=False)]
    # Every member of a union reports errors. Those of members that accepted the value's type and refused something
    # inside are shown; those of members that refused the whole value are dropped.
    entered = {m.union for m in mistakes if m.union is not None and m.path != m.union}
    groups: dict[tuple[str | int, ...], list[_Mistake]] = {}
    for mistake in mistakes:
        if mistake.union not in entered or mistake.path != mistake.union:
            groups.setdefault((*mistake.path, mistake.missing or ""), []).append(mistake)
    return [_worded(group, root) for group in groups.values()]


class _Mistake:
    """One pydantic error and the node it is about."""

    def __init__(self, details: Any, root: Node) -> None:
        loc = [part for part in details["loc"] if part != "[key]"]
        self.type: str = details["type"]
        self.text: str = details["msg"].removeprefix("Value error, ")
        self.context: dict[str, Any] = details.get("ctx") or {}
        self.missing = str(loc.pop()) if self.type == "missing" else None
        self.at_key = self.type in ("extra_forbidden", "missing") or len(loc) < len(details["loc"])
        self.path, self.node, gap = follow(root, loc)
        # A part of the location that is not in the recipe is pydantic's name of a union's member, such as `list[str]`.
        self.union = None if gap is None else self.path[:gap]

    @property
    def place(self) -> SourcePlace:
        return self.node.key_place if self.at_key else self.node.place


def _worded(mistakes: list[_Mistake], root: Node) -> Problem:
    first = mistakes[0]
    key = ".".join(str(part) for part in (*first.path, *((first.missing,) if first.missing else ())))
    if len(mistakes) > 1:
        wanted = " or ".join(dict.fromkeys(_expected(m) for m in mistakes))
        return first.place.problem(key, f"expected {wanted}; got {shown(first.node)}")
    if first.type == "extra_forbidden":
        return first.place.problem(
            key, "unknown key", _known_keys_hint(str(first.path[-1]), model_at(root, first.path[:-1]))
        )
    return first.place.problem(key, *_one(first))


def _one(m: _Mistake) -> tuple[str, str | None]:
    got = shown(m.node)
    if m.type == "missing":
        return "required key is missing", None
    if m.type == "literal_error":
        allowed = _choices(m.context["expected"])
        return f"must be one of {', '.join(allowed)}; got {got}", did_you_mean(m.node.text, allowed)
    if m.type in _RANGES:
        bound = next(m.context[name] for name in ("gt", "ge", "lt", "le") if name in m.context)
        return f"must be {_RANGES[m.type]} {bound:g}, got {got}", None
    if m.type in ("string_too_short", "too_short"):
        least = m.context.get("min_length", 1)
        return ("must not be empty" if least == 1 else f"needs at least {least} entries"), None
    if m.type == "finite_number":
        return f"must be a finite number, got {got}", None
    if m.type == "unknown_name":
        kind = other_tools.kind_here(m.node.text) if m.path[-1:] == ("kind",) else None
        return m.text, did_you_mean(m.node.text, m.context["known"]) or kind
    if m.type == "value_error":
        return m.text, None
    wanted = _expected(m)
    return (m.text if wanted == m.text else f"expected {wanted}; got {got}"), _type_hint(m, wanted)


def _expected(m: _Mistake) -> str:
    if m.type == "literal_error":
        return " or ".join(f"`{choice}`" for choice in _choices(m.context["expected"]))
    return (
        _EXPECTED.get(m.type.split("_")[0], m.text) if m.type.endswith(("_type", "_parsing", "_from_float")) else m.text
    )


def _type_hint(m: _Mistake, wanted: str) -> str | None:
    content = m.node.content
    if wanted == "text" and isinstance(content, (bool, int, float)):
        return f'quote it: "{m.node.text[:80]}"'
    if wanted == "a whole number" and isinstance(content, float) and content.is_integer():
        return f"write {int(content)}"
    if wanted == "true or false" and m.node.text.lower() in ("yes", "no", "on", "off"):
        return "write true or false"
    return None


def shown(node: Node) -> str:
    """A value as it is written in the recipe, with the type that it was read as."""
    if isinstance(node.content, (dict, list)):
        return "a mapping" if isinstance(node.content, dict) else "a list"
    if node.content is None:
        return "nothing"
    if isinstance(node.content, bool):
        kind = "true/false value"
    elif isinstance(node.content, str):
        kind = "text"
    else:
        kind = "number"
    return f"the {kind} `{node.text[:80]}`"


def _choices(expected: str) -> list[str]:
    """The choices in pydantic's text ``'a', 'b' or 'c'``."""
    return [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]


def did_you_mean(word: str, known: Iterable[str], near: float = 0.6) -> str | None:
    """A hint with the most similar known word, if one is similar enough, ignoring case; else None."""
    lower = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=near)
    return f"did you mean `{lower[nearest[0]]}`?" if nearest else None


def _known_keys_hint(key: str, model: type[BaseModel] | None) -> str | None:
    if model is None:
        return None
    return key_hint(key, model, model.model_fields) or f"known keys: {', '.join(model.model_fields)}"


def key_hint(key: str, model: type[BaseModel], known: Iterable[str]) -> str | None:
    """A hint for an unknown key in a mapping that ``model`` reads: the key belongs into a mapping inside, is misspelt,
    or is another tool's name for one."""
    if homes := [
        name
        for name, field in model.model_fields.items()
        if any(key in inner.model_fields for inner in models_in(field.annotation))
    ]:
        return f"it belongs under `{homes[0]}`"
    if issubclass(model, Strict) and model.takes_arguments and other_tools.key_here(key):
        return model.takes_arguments
    return did_you_mean(key, known, _NEAR) or other_tools.key_here(key)
