"""The base of every recipe model, and the error for an unknown name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from align.recipe.language.effects import Needs, refuse_idle_keys


class Strict(BaseModel):
    """Base of every recipe model."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    key_needs: ClassVar[tuple[Needs, ...]] = ()
    """Keys that have an effect only together with certain others; they are refused when they have none."""

    takes_arguments: ClassVar[str] = ""
    """The hint for a key of another tool, in a model that passes arguments on to that tool; empty for other models."""

    @model_validator(mode="after")
    def _every_given_key_has_an_effect(self) -> Self:
        refuse_idle_keys(self)
        return self


def unknown_name_of(reason: str, known: Iterable[str]) -> PydanticCustomError:
    """The error for an unknown name; ``known`` are the names from which a hint is chosen."""
    return PydanticCustomError("unknown_name", "{reason}", {"reason": reason, "known": list(known)})
