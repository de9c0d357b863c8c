"""What the readers of files give: rows, each with the place it stands at, rows that cannot be used, and what was found
out about a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.data.records import Origin
from align.data.strict_json import RowError
from align.errors import Problem
from align.recipe.schema import DataSource

_log = logging.getLogger("align")


Columns = Mapping[str, Any]
"""The columns of a row, by name."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data."""

    value: dict[str, Any]
    origin: Origin
    cells: frozenset[str] = frozenset()
    """Its columns that are cells of a text table, in which an empty text is nothing there. The rows of a file share the
    set."""


@dataclass(frozen=True)
class BadRow(Problem):
    """A row that cannot be used. ``file`` and ``line`` are always set; ``key`` is the field, if one is to blame."""

    content: str = ""
    """The row's beginning, for the rejects file; no message shows it."""


class LeftOut(RowError):
    """A row that is sound and gives no record, such as a tie; the message is the reason, counted and written to the
    rejects file."""


Bad = Callable[[BadRow], None]


@dataclass
class Told:
    """What a person must know of how a source was read, because it was found out and not written in the recipe."""

    notes: list[str] = field(default_factory=list)
    """Sentences, each once: ``support.csv: read as cp1252, separated by `;```."""
    keys: dict[str, str] = field(default_factory=dict)
    """The same as keys of a data source, to be copied into a recipe."""
    log: bool = False
    """Also tell at once, for readers that print no report."""

    def note(self, text: str, **keys: str) -> None:
        """Tell ``text``; ``keys`` would have said it in the recipe."""
        for key, value in keys.items():
            self.keys.setdefault(key, value)
        if text not in self.notes:
            self.notes.append(text)
            if self.log:
                _log.info("%s", text)


@dataclass(frozen=True)
class Reading:
    """What the readers of one source share."""

    source: DataSource
    bad: Bad
    told: Told
