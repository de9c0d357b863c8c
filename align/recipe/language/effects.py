"""Keys that have no effect beside the other keys of their recipe: declared next to the fields, refused by one rule.

A key without effect is a mistake of its author, who believes that it does something. What a model declares in
``key_needs`` is checked whenever it is validated, and every key that is given in vain is told at its own place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


@dataclass(frozen=True)
class Needs:
    """Keys that do something only under a condition."""

    keys: str
    """Names of fields, with blanks between them; dotted where they stand in a nested model (``train.eval_steps``)."""
    condition: Callable[[Any], bool]
    """Of the model that declares it: have the keys an effect?"""
    reason: str
    """Why they have none, after "has no effect"; ``{name}`` stands for the value of a field."""
    zero_is_none: bool = False
    """Does 0 ask for nothing, as ``null``, ``false`` and what is empty do?"""

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The keys, each as the names that lead to it."""
        return tuple(tuple(key.split(".")) for key in self.keys.split())


def declared(model: type[BaseModel]) -> Iterator[Needs]:
    """What a model and its bases declare."""
    for base in model.__mro__:
        yield from vars(base).get("key_needs", ())


def refuse_idle_keys(model: BaseModel) -> None:
    """Raises pydantic's ``ValidationError`` with one entry for each key of ``model`` that is given and has no
    effect."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("value_error", "{text}", {"text": text}), loc=(*path, "[key]"), input=None
        )
        for path, text in idle_keys(model)
    ]
    if details:
        raise ValidationError.from_exception_data(type(model).__name__, details)


def idle_keys(model: BaseModel) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where each such key stands, from ``model`` on, and what is wrong with it."""
    for needs in declared(type(model)):
        given = [path for path in needs.paths if _is_given(model, path, needs.zero_is_none)]
        if given and not needs.condition(model):
            reason = needs.reason.format_map({name: getattr(model, name) for name in type(model).model_fields})
            for path in given:
                yield path, f"has no effect {reason}"


def _is_given(model: Any, path: tuple[str, ...], zero_is_none: bool) -> bool:
    """Is the key written, with a value that asks for something?"""
    *parents, name = path
    for parent in parents:
        model = getattr(model, parent)
        if model is None:
            return False
    value = getattr(model, name, None)
    nothing = value is None or value is False or value in ((), [], {}, "") or (zero_is_none and value == 0)
    return name in model.model_fields_set and not nothing
