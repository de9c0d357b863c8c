"""The records of one or many sources: filtered, checked, counted and, where sources have weights, drawn in proportion.

Without weights every row comes once, in the order of the sources and of their rows, in bounded memory.

With weights an epoch of the mixture has as many records as its sources have together, shared out by weight: a source that gets fewer
than it has gives a random sample, a source that gets more gives all of its records several times, and a random sample of them once more.
Why this rule: the shares come out exact, whatever the seed (drawing with replacement meets them on average only, and leaves out about a
third of the rows of a source that should come once); mixing changes neither the length of an epoch nor its cost; and a small source is
repeated as a mixture of 0.2 and 0.8 wants it (AgentTuning, https://arxiv.org/abs/2310.12823) without a tiny weight beside a huge source
blowing the epoch up. Records come source by source, repetitions side by side: the loader shuffles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from align.data.conditions import Choice, Part
from align.data.formats import Converter, RowError, Want, converter
from align.data.leakage import prompt_digest as prompt_digest
from align.data.leakage import shared_prompts as shared_prompts
from align.data.personal import impersonal
from align.data.readers import BadRow, Row, read_rows
from align.data.records import Origin, Record
from align.data.rows import LeftOut, Told
from align.data.strict_json import clip
from align.errors import InputError, Problem
from align.files import machine_faults
from align.recipe.schema import DataSource

SHOWN = 10
"""Bad rows that an error lists; their number is told in any case."""
_CONTENT = 200
NO_RECORD = "dropped by the format"
_REASONS = 3
"""Bad rows that are shown when nothing is left."""


@dataclass
class SourceReport:
    """What became of the rows of one source."""

    path: str
    """As the recipe writes it."""
    format: str | None = None
    read: int = 0
    """Rows seen, bad ones included. A ``limit`` ends the reading."""
    left_out: int = 0
    """Rows, or with ``explode`` parts of rows, that ``where`` left out."""
    bad: int = 0
    """Rows that could not be used."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Sound rows that gave no record, by reason."""
    first_dropped: dict[str, Origin] = field(default_factory=dict)
    """Where each reason came first."""
    kept: int = 0
    """Records made of the other rows."""
    given: int = 0
    """Records given out: those kept, or the source's part of a mixture."""
    weight: float | None = None
    """Its share of the mixture as asked for, from 0 to 1."""
    first_bad: list[BadRow] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    """What a person should know of the rows that were kept, and how often it happened."""
    told: Told = field(default_factory=Told)
    """How its files were read, as far as it was found out."""

    @property
    def dropped(self) -> int:
        """Sound rows that gave no record."""
        return sum(self.reasons.values())

    def drop(self, reason: str, origin: Origin) -> None:
        """A sound row gives no record."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, origin)

    def left(self) -> list[str]:
        """What became of the rows that were not kept, each with its number."""
        parts = [f"{self.left_out:,} left out by `where`"] if self.left_out else []
        return parts + [f"{count:,} {reason} (first: {self.first_dropped[reason]})" for reason, count in self.reasons.items()]

    def bad_rows(self) -> list[Problem]:
        """The first bad rows, then, if there are several, how many."""
        listed: list[Problem] = list(self.first_bad)
        if self.bad > 1:
            listed.append(Problem(_count_of(self.bad)))
        return listed

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.read:,} rows read", f"{self.kept:,} kept"]
        parts += self.left()
        if self.bad:
            parts.append(f"{self.bad:,} bad (first: {self.first_bad[0]})")
        parts += [f"{count:,} times {what}" for what, count in self.notes.items()]
        return f"{self.path} ({self.format or 'unknown format'}): {', '.join(parts)}"


@dataclass
class ReadReport:
    """What became of all rows; complete once the records have been read to their end."""

    sources: list[SourceReport] = field(default_factory=list)

    @property
    def given(self) -> int:
        """Records given out."""
        return sum(source.given for source in self.sources)

    def lines(self) -> list[str]:
        """For people: one line a source, with the realised ratio of a mixture."""
        lines = []
        for source in self.sources:
            line = source.line()
            if source.weight is not None and self.given:
                share, passes = source.given / self.given, source.given / max(source.kept, 1)
                line += f"; {source.given:,} in the mixture, {share:.4f} of it (asked: {source.weight:.4f}), {passes:.2f} passes"
            lines += [line, *source.told.notes]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same numbers for machines."""
        keys = ("path", "format", "read", "left_out", "bad", "dropped", "kept", "given", "weight", "notes", "reasons")
        sources = [{key: getattr(source, key) for key in keys} for source in self.sources]
        for source, entry in zip(self.sources, sources, strict=True):
            entry["share"] = source.given / self.given if self.given else 0.0
            entry["first_bad"] = [str(row) for row in source.first_bad]
            entry["read_as"] = source.told.notes
        return {"given": self.given, "sources": sources}


class Records(Iterator[Record]):
    """The records, one at a time, and a report that grows with them."""

    def __init__(self, records: Iterator[Record], report: ReadReport) -> None:
        self._records = records
        self.report = report

    def __next__(self) -> Record:
        return next(self._records)


def read_records(sources: Sequence[DataSource], locations: Sequence[Path | str], want: Want, *, seed: int, rejects: Path | None) -> Records:
    """Records of type ``want`` of all ``sources``; ``locations`` says where each of them is (a path, or a hub id).

    Bad rows of a source with ``on_bad_row: skip`` are written to ``rejects`` (JSONL: source, line, field, reason, content) and counted.
    Bad rows of other sources end the reading: once the first has been found no more records are given, the rest is read for further ones,
    and then one error lists the first ten and tells how many there are.

    Raises, while it is read: :class:`InputError` for those, for a source of which nothing is left, and what :func:`read_rows` and
    :func:`converter` raise.
    """
    total = sum(source.weight or 0 for source in sources)
    shares = [source.weight / total if source.weight else None for source in sources]
    report = ReadReport([SourceReport(source.path, source.format, weight=share) for source, share in zip(sources, shares, strict=True)])
    mixture = _Mixture(list(zip(sources, locations, report.sources, strict=True)), want, rejects)
    return Records(mixture.weighted(seed) if total else mixture.plain(), report)


_Source = tuple[DataSource, Path | str, SourceReport]


class _Mixture:
    def __init__(self, sources: list[_Source], want: Want, rejects: Path | None) -> None:
        self._sources = sources
        self._want: Want = want
        self._rejects = rejects
        self._file: TextIO | None = None
        self._fatal = 0
        """Bad rows that must not be skipped."""
        self._problems: list[Problem] = []
        """The first of them, and sources of which nothing is left."""

    def plain(self) -> Iterator[Record]:
        """Every record once."""
        with self._checked():
            for source in self._sources:
                for record in self._records(source):
                    if not self._fatal:
                        source[2].given += 1
                        yield record

    def weighted(self, seed: int) -> Iterator[Record]:
        """Two passes: the first checks and counts, the second gives. So no more than one number a record is held in memory."""
        with self._checked():
            for source in self._sources:
                for _ in self._records(source):
                    pass
        total = sum(report.kept for _, _, report in self._sources)
        quotas = share_out(total, [report.weight or 0 for _, _, report in self._sources])
        for i, (quota, (spec, location, report)) in enumerate(zip(quotas, self._sources, strict=True)):
            if not quota:
                raise InputError(Problem("its weight gives it none of the mixture's records", file=spec.path, key="weight"))
            whole, rest = divmod(quota, report.kept)
            once_more = frozenset(random.Random(f"{seed}/{i}").sample(range(report.kept), rest))
            again = _Mixture([], self._want, None)  # the first pass has told of the bad rows
            for j, record in enumerate(again._records((spec, location, SourceReport(spec.path)))):
                for _ in range(whole + (j in once_more)):
                    report.given += 1
                    yield record
            if report.given != quota:
                raise InputError(Problem("changed while it was read", file=str(location)))

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Reading every source to its end, with the rejects file open; then the one error for all bad rows."""
        with ExitStack() as stack:
            if self._rejects is not None:
                stack.enter_context(machine_faults(self._rejects))
                self._rejects.unlink(missing_ok=True)  # of an earlier reading
            stack.callback(lambda: self._file and self._file.close())
            yield
        if self._fatal == 1:
            self._problems = [self._advised(problem) for problem in self._problems]
        elif self._fatal:
            self._problems.append(Problem(_count_of(self._fatal), hint="mend them, or leave them out with `on_bad_row: skip`"))
        if self._problems:
            raise InputError(self._problems)

    def _advised(self, problem: Problem) -> Problem:
        """The only bad row, with what to do in the same line."""
        advice = "mend it, or leave it out with `on_bad_row: skip`"
        return replace(problem, hint=f"{problem.hint}; {advice}" if problem.hint else advice) if isinstance(problem, BadRow) else problem

    def _records(self, source: _Source) -> Iterator[Record]:
        spec, location, report = source
        convert = converter(spec, self._want)
        choice = Choice(spec)
        chooses = choice.chooses
        rows = 0

        def unreadable(row: BadRow) -> None:
            report.read += 1
            self._bad(source, row)

        for row in read_rows(spec, location, unreadable, report.told):
            report.read += 1
            records = self._converted(convert, choice if chooses else None, row, source)
            report.format, report.notes = convert.format, convert.notes
            report.kept += len(records)
            yield from records
            rows += bool(records)
            if rows == spec.limit:
                break
        if not report.kept and not (report.bad and spec.on_bad_row == "error"):
            self._problems += _nothing_left(spec, report, choice.absent)
        elif report.kept and choice.never_ignored and rows != spec.limit:
            report.told.note(f"{spec.path}: `ignore` names columns that no row has: {', '.join(choice.never_ignored)}")

    def _converted(self, convert: Converter, choice: Choice | None, row: Row, source: _Source) -> list[Record]:
        """The records of a row; what it does not give is counted, with the reason."""
        report = source[2]
        records: list[Record] = []
        try:
            if choice is None:
                if found := convert(row):
                    return list(found)
                raise LeftOut(NO_RECORD)
            for part in choice.parts(row):
                if not choice.wanted(part):
                    report.left_out += 1
                    continue
                try:
                    records += _of_part(convert, choice, part)
                except LeftOut as reason:
                    self._dropped(str(reason), row, report)
        except LeftOut as reason:
            self._dropped(str(reason), row, report)
        except RowError as error:
            records = []
            self._bad(source, BadRow(error.message, row.origin.source, row.origin.line, key=error.field, content=_shown(row.value)))
        return records

    def _dropped(self, reason: str, row: Row, report: SourceReport) -> None:
        report.drop(reason, row.origin)
        self._write(BadRow(reason, row.origin.source, row.origin.line))

    def _bad(self, source: _Source, row: BadRow) -> None:
        spec, _, report = source
        report.bad += 1
        if len(report.first_bad) < SHOWN:
            report.first_bad.append(row)
        if spec.on_bad_row == "error":
            self._fatal += 1
            if self._fatal <= SHOWN:
                self._problems.append(row)
        else:
            self._write(row)

    def _write(self, row: BadRow) -> None:
        """A line of the rejects file."""
        if self._rejects is None:
            return
        if self._file is None:
            self._rejects.parent.mkdir(parents=True, exist_ok=True)
            # backslashreplace: a lone surrogate is written as JSON's own escape
            self._file = self._rejects.open("w", encoding="utf-8", errors="backslashreplace")
        entry = {"source": row.file, "line": row.line, "field": row.key, "reason": row.message, "content": clip(row.content, _CONTENT)}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _of_part(convert: Converter, choice: Choice, part: Part) -> list[Record]:
    """Raises :class:`LeftOut` where there is none, and :class:`RowError`."""
    row = choice.stripped(part.row)
    records = convert(row)
    if not records:
        raise LeftOut(NO_RECORD)
    choice.once(part.row, records[0])
    return [replace(record, id=f"{record.id}#{part.number}") for record in records] if part.number else list(records)


def _shown(value: Mapping[str, Any]) -> str:
    """The beginning of a row, for the rejects file."""
    try:
        return clip(json.dumps(impersonal(value), ensure_ascii=False, default=str), _CONTENT)
    except (RecursionError, ValueError):
        return ", ".join(clip(key, 40) for key in value)  # nested too deeply to be written


def share_out(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``total``, each within one of its share of it. Shares sum to 1; what rounding leaves goes to the largest
    fractions, the first of equal ones."""
    exact = [total * share for share in shares]
    counts = [int(part) for part in exact]
    by_fraction = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_fraction[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _nothing_left(spec: DataSource, report: SourceReport, absent: list[str]) -> list[Problem]:
    """That nothing is left, and the first reasons."""
    text = f"0 rows left of {report.read:,} read"
    parts = [*report.left(), *([f"{report.bad:,} bad"] if report.bad else [])]
    text += ": " + ", ".join(parts) if parts else ""
    hint = f"no row has a field {', '.join(absent)}" if absent else None
    return [*report.first_bad[:_REASONS], Problem(text, file=spec.path, hint=hint)]


def _count_of(bad: int) -> str:
    return f"{bad:,} bad {'row' if bad == 1 else 'rows'} in all" + (f", the first {SHOWN} are listed" if bad > SHOWN else "")
