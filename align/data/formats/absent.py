"""Columns that a mapping names and no row has: a misspelt one must not be read as an empty one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.data.strict_json import clip, one_line
from align.errors import InputError, Problem
from align.recipe.checks.messages import did_you_mean
from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.places import Place, template

_SHOWN = 24
"""Columns that an error names."""


def require_columns(mapping: RowMapping, rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Raises :class:`InputError` for what a row must have by ``mapping`` and none of the first ``rows`` has.

    A single row may lack an answer, and any row may lack a system, tools and the like.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    problems = []
    for key, where in _needed(mapping):
        names = where.columns
        if not any(name in row for row in rows for name in names):
            near = did_you_mean(names[-1], columns)
            there = clip(", ".join(columns[:_SHOWN]), 300)
            hint = f"{near} They have {there}" if near else f"they have {there}"
            missing = one_line(f"the first rows have no column `{names[-1]}`")
            problems.append(Problem(missing, file=path, key=key, hint=one_line(hint)))
    if problems:
        raise InputError(problems)


def _needed(mapping: RowMapping) -> Iterator[tuple[str, Place]]:
    """What is read of every row, with the mapping's key. Texts with several places may do without one of them."""
    keys = ("messages", "prompt", "completion", "chosen", "rejected", "answers")
    given: list[tuple[str, Any]] = [(key, getattr(mapping, key)) for key in keys]
    if mapping.better is not None:
        given += [
            (f"better.{key}", getattr(mapping.better, key)) for key in ("winner", "score", "signed", "ranking", "label")
        ]
    for key, value in given:
        for one in value if isinstance(value, list) else [value]:
            found = template(one) if isinstance(one, str) else None
            if isinstance(found, Place):
                yield key, found
