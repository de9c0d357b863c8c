"""Parsing places in a row, which are written ``a.b``, ``a[*].b``, ``a[-1]``, ``a[:2]``, ``a[key=value]``, and texts
with ``{places}``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_STEP = re.compile(
    r"(?P<dot>\.)?(?P<name>[^.\[\]{}]+)|\[(?P<all>\*)\]|\[(?P<index>-?\d+)\]|\[(?P<start>-?\d*):(?P<stop>-?\d*)\]"
    r"|\[(?P<key>[^=\]\[]+)=(?P<value>[^\]\[]*)\]"
)
_INSIDE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Every:
    """Every item of a list."""


@dataclass(frozen=True)
class Only:
    """The items of a list that have this value under this key."""

    key: str
    value: str


WHOLE = "[]"
"""Column under which a row that is a list is kept, so that every row is a mapping. Places in such a row begin with an
index."""

Step = str | int | slice | Every | Only
"""A key of an object, an index, a slice, every item, or the items with a value."""


@dataclass(frozen=True)
class Place:
    """A place in a row."""

    text: str
    steps: tuple[Step, ...]

    @property
    def many(self) -> bool:
        """Does the place give a list of values?"""
        return any(isinstance(step, (Every, Only)) for step in self.steps)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names with which it may begin, the longest first, since names may have dots."""
        if not isinstance(self.steps[0], str):
            return (WHOLE,)
        names: list[str] = []
        for step in self.steps:
            if not isinstance(step, str):
                break
            names.append(step)
        return tuple(".".join(names[:end]) for end in range(len(names), 0, -1)) or (self.text,)


@dataclass(frozen=True)
class Template:
    """A text with places in it."""

    text: str
    parts: tuple[str | Place, ...]
    """Literal texts and places, alternating; the first and the last are texts, which may be empty."""


@lru_cache(maxsize=4096)
def place(text: str) -> Place:
    """Parses a place. Raises ValueError for a text that is not a place."""
    steps: list[Step] = []
    at = 0
    while at < len(text):
        step = _STEP.match(text, at)
        if not step or (step["name"] is not None and (step["dot"] is None) != (at == 0)):
            raise ValueError(
                f"not a place in a row: {text[:60]!r}; written are a.b, a[*].b, a[-1], a[:2], a[key=value]"
            )
        if step["name"] is not None:
            steps.append(step["name"])
        elif step["all"]:
            steps.append(Every())
        elif step["index"]:
            steps.append(int(step["index"]))
        elif step["key"] is not None:
            steps.append(Only(step["key"], step["value"]))
        else:
            steps.append(slice(*(int(end) if end else None for end in (step["start"], step["stop"]))))
        at = step.end()
    if not steps:
        raise ValueError("an empty place")
    return Place(text, tuple(steps))


@lru_cache(maxsize=4096)
def template(text: str) -> Template | Place:
    """Parses a text with ``{places}``, or a single place if it has no braces. Raises ValueError."""
    if "{" not in text:
        return place(text)
    pieces = _INSIDE.split(text)
    return Template(text, tuple(place(piece) if number % 2 else piece for number, piece in enumerate(pieces)))
