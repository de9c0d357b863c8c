"""What became of the rows of each source of a data set: read, kept, left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from align.data.records import Origin
from align.data.rows import BadRow, Told
from align.errors import InputError, Problem
from align.recipe.schema import DataSource
from align.terminal import counted

SHOWN = 10
"""Number of bad rows that an error lists."""


@dataclass
class SourceReport:
    """What became of the rows of one source."""

    path: str
    """Path as written in the recipe."""
    format: str | None = None
    read: int = 0
    """Number of rows read, bad ones included, up to ``limit``."""
    left_out: int = 0
    """Rows, or with ``explode`` parts of rows, that ``where`` left out."""
    bad: int = 0
    """Rows that could not be used."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Sound rows that gave no record, by reason."""
    first_dropped: dict[str, Origin] = field(default_factory=dict)
    """First place of each reason."""
    kept: int = 0
    """Records made of the other rows."""
    used: int = 0
    """Rows, or with ``explode`` parts of rows, that these records were made of. Together with ``left_out``, ``bad`` and
    ``reasons`` they are all rows."""
    parts: int = 0
    """Number of parts that ``explode`` made of the rows."""
    kind: str = "record"
    """Type of the records."""
    given: int = 0
    """Number of records yielded: those kept, or the source's part of a mixture."""
    weight: float | None = None
    """Its share of the mixture by the recipe, from 0 to 1."""
    first_bad: list[BadRow] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    """Remarks about the rows that were kept -> how often each applies."""
    remarks: list[str] = field(default_factory=list)
    """Remarks about the source as a whole."""
    licence: str | None = None
    """The licence on the data set's card, if the card is on this machine."""
    told: Told = field(default_factory=Told)
    """How its files were read, as far as that was recognised."""

    @property
    def dropped(self) -> int:
        """Sound rows that gave no record."""
        return sum(self.reasons.values())

    def drop(self, reason: str, origin: Origin) -> None:
        """Count a sound row that gives no record."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, origin)

    def left(self) -> list[str]:
        """What became of the rows that were not kept, with their numbers."""
        parts = [f"{self.left_out:,} left out by `where`"] if self.left_out else []
        return parts + [
            f"{count:,} {reason} (first: {self.first_dropped[reason]})" for reason, count in self.reasons.items()
        ]

    def bad_rows(self) -> list[Problem]:
        """The first bad rows, then, if there are several, how many."""
        listed: list[Problem] = list(self.first_bad)
        if self.bad > 1:
            listed.append(Problem(count_of(self.bad)))
        return listed

    def skipped(self, source: DataSource) -> list[str]:
        """Lines about the bad rows of a ``source`` that skips them. Raises :class:`InputError` if it does not skip
        them."""
        if self.bad and source.on_bad_row == "error":
            raise InputError(self.bad_rows())
        return [f"left out, a bad row: {problem}" if problem.file else str(problem) for problem in self.bad_rows()]

    def line(self) -> str:
        """A line for the user."""
        made = f" as {counted(self.kept, self.kind)}" if self.used != self.kept else ""
        parts = [
            f"{self.read:,} rows read{f' in {self.parts:,} parts' if self.parts else ''}",
            f"{self.used:,} kept{made}",
        ]
        parts += self.left()
        if self.bad:
            parts.append(f"{self.bad:,} bad (first: {self.first_bad[0]})")
        if not self.parts and (rest := self.read - self.used - self.left_out - self.dropped - self.bad) > 0:
            parts.append(f"{rest:,} not asked for, behind `limit`")
        parts += [f"{count:,} times {what}" for what, count in self.notes.items()]
        parts += self.remarks
        return f"{self.path} ({self.format or 'unknown format'}): {', '.join(parts)}"


@dataclass
class ReadReport:
    """What became of all rows; complete once the records have been read to their end."""

    sources: list[SourceReport] = field(default_factory=list)
    giving: int = 0
    """Which of them the last record came from."""

    @property
    def given(self) -> int:
        """Records given out."""
        return sum(source.given for source in self.sources)

    def lines(self) -> list[str]:
        """Lines for the user: one for each source, with the actual shares of a mixture."""
        lines = []
        for source in self.sources:
            line = source.line()
            if source.weight is not None and self.given:
                share, passes = source.given / self.given, source.given / max(source.kept, 1)
                line += (
                    f"; {source.given:,} in the mixture, {share:.4f} of it (asked: {source.weight:.4f}), {passes:.2f}"
                    " passes"
                )
            lines += [line, *([f"{source.path}: {source.licence}"] if source.licence else []), *source.told.notes]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The numbers as JSON."""
        keys = (
            "path",
            "format",
            "read",
            "left_out",
            "bad",
            "dropped",
            "used",
            "kept",
            "given",
            "weight",
            "notes",
            "remarks",
            "reasons",
        )
        sources = [{key: getattr(source, key) for key in keys} for source in self.sources]
        for source, entry in zip(self.sources, sources, strict=True):
            entry["share"] = source.given / self.given if self.given else 0.0
            entry["licence"] = source.licence
            entry["first_bad"] = [str(row) for row in source.first_bad]
            entry["read_as"] = source.told.notes
        return {"given": self.given, "sources": sources}


def count_of(bad: int) -> str:
    """Text about the number of bad rows."""
    return f"{bad:,} bad {'row' if bad == 1 else 'rows'} in all" + (
        f", the first {SHOWN} are listed" if bad > SHOWN else ""
    )
