"""Refusing keys that have no effect together with the other keys of a recipe. They are declared next to the fields.

A key without effect is an error, because the recipe's author expects one. Whenever a model is validated, its
declarations in ``key_needs`` are checked, and every key without effect is reported at its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


@dataclass(frozen=True)
class Needs:
    """Keys that have an effect only under a condition."""

    keys: str
    """Names of fields, separated by blanks; dotted for fields of a nested model (``train.eval_steps``)."""
    condition: Callable[[Any], bool]
    """Gets the model that declares it, and tells whether the keys have an effect."""
    reason: str
    """The rest of the message after "has no effect"; ``{name}`` is replaced by the value of a field."""
    zero_is_none: bool = False
    """Does 0, like ``null``, ``false`` and empty values, count as not given?"""

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The paths of the keys."""
        return tuple(tuple(key.split(".")) for key in self.keys.split())


def declared(model: type[BaseModel]) -> Iterator[Needs]:
    """The declarations of a model and its bases."""
    for base in model.__mro__:
        yield from vars(base).get("key_needs", ())


def refuse_idle_keys(model: BaseModel) -> None:
    """Raises pydantic's ``ValidationError`` with one entry for each key of ``model`` that is given and has no
    effect."""
    details = [idle_key(path, text) for path, text in idle_keys(model)]
    if details:
        raise ValidationError.from_exception_data(type(model).__name__, details)


def idle_key(path: tuple[str, ...], text: str) -> InitErrorDetails:
    """The entry for a key without effect: where it stands, and what is wrong with it."""
    error = PydanticCustomError("value_error", "{text}", {"text": text})
    return InitErrorDetails(type=error, loc=(*path, "[key]"), input=None)


def idle_keys(model: BaseModel) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path inside ``model``, message) of each key that is given and has no effect."""
    for needs in declared(type(model)):
        given = [path for path in needs.paths if _is_given(model, path, needs.zero_is_none)]
        if given and not needs.condition(model):
            reason = needs.reason.format_map({name: getattr(model, name) for name in type(model).model_fields})
            for path in given:
                yield path, f"has no effect {reason}"


def _is_given(model: Any, path: tuple[str, ...], zero_is_none: bool) -> bool:
    """Is the key given, with a value that asks for something?"""
    *parents, name = path
    for parent in parents:
        model = getattr(model, parent)
        if model is None:
            return False
    value = getattr(model, name, None)
    return name in model.model_fields_set and not (asks_for_nothing(value) or (zero_is_none and value == 0))


def asks_for_nothing(value: Any) -> bool:
    """Is it a value that a key may always have: ``null``, ``false``, or empty?"""
    return value is None or value is False or value in ((), [], {}, "")
