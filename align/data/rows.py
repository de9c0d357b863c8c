"""What the readers of files produce: rows with their places, rows that cannot be used, and remarks about how a file was
read."""

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
    """One row of the data."""

    value: dict[str, Any]
    origin: Origin
    cells: frozenset[str] = frozenset()
    """The columns that are cells of a text table, in which an empty text means no value. All rows of a file share the
    set."""


@dataclass(frozen=True)
class BadRow(Problem):
    """A row that cannot be used. ``file`` and ``line`` are always set; ``key`` is the faulty field, if there is one."""

    content: str = ""
    """The beginning of the row, for the rejects file; messages do not show it."""


class LeftOut(RowError):
    """Raised for a row that is sound but gives no record, such as a tie. The message is the reason, which is counted
    and written to the rejects file."""


Bad = Callable[[BadRow], None]


@dataclass
class Told:
    """How a source was read, as far as that was recognised from its files and not set in the recipe; reported to the
    user."""

    notes: list[str] = field(default_factory=list)
    """Sentences without repetition: ``support.csv: read as cp1252, separated by `;```."""
    keys: dict[str, str] = field(default_factory=dict)
    """The same as keys of a data source, which can be copied into a recipe."""
    log: bool = False
    """Log each note at once, for readers that print no report."""

    def note(self, text: str, **keys: str) -> None:
        """Note ``text``; ``keys`` are the recipe keys that would set the same."""
        for key, value in keys.items():
            self.keys.setdefault(key, value)
        if text not in self.notes:
            self.notes.append(text)
            if self.log:
                _log.info("%s", text)


@dataclass(frozen=True)
class Reading:
    """What the readers of a source's files share."""

    source: DataSource
    bad: Bad
    told: Told
