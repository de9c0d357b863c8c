"""The records of one or many sources: filtered, checked, counted and, where sources have weights, drawn in proportion.

Without weights every row is used once, in the order of the sources and of their rows, with bounded memory.

With weights an epoch of the mixture has as many records as the sources have together, divided by weight. A source whose
part is smaller than its number of records contributes a random sample. A source whose part is larger contributes all of
its records several times, and a random sample of them once more. Reasons for this rule: the shares are exact for every
seed (drawing with replacement gives them only on average, and misses about a third of the rows of a source that should
be used once); the length and cost of an epoch do not change; and small sources are repeated as in a mixture of 0.2 and
0.8 (AgentTuning, https://arxiv.org/abs/2310.12823), while a tiny weight beside a huge source does not make the epoch
longer. Records come source by source, repetitions next to each other; the loader shuffles them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from align.data.formats.absent import seen_enough
from align.data.formats.formats import Converter, Group, RowError, Want, converter
from align.data.formats.known_sets import TEST_SET, is_test_set, licence_of
from align.data.formats.own_answers import NO_RECORD as NO_RECORD
from align.data.formats.personal import impersonal
from align.data.leakage import prompt_digest as prompt_digest
from align.data.leakage import shared_prompts as shared_prompts
from align.data.records import Record
from align.data.rows import LeftOut
from align.data.sources.conditions import ASKED_AGAIN, Choice, RowPart
from align.data.sources.readers import BadRow, Row, read_rows
from align.data.sources.source_report import SHOWN as SHOWN
from align.data.sources.source_report import ReadReport as ReadReport
from align.data.sources.source_report import SourceReport as SourceReport
from align.data.sources.source_report import count_of
from align.data.strict_json import clip
from align.errors import InputError, Problem
from align.files import machine_faults
from align.recipe.schema import DataSource

_CONTENT = 200
GROUP_REFUSED = "belongs to a group with a bad row"
_REASONS = 3
"""Number of bad rows that are shown when no record is left."""


class Records(Iterator[Record]):
    """The records, to be iterated over once, and a report that is complete afterwards."""

    def __init__(self, records: Iterator[Record], report: ReadReport) -> None:
        self._records = records
        self.report = report

    def __next__(self) -> Record:
        return next(self._records)


def read_records(
    sources: Sequence[DataSource], locations: Sequence[Path | str], want: Want, *, seed: int, rejects: Path | None
) -> Records:
    """Records of type ``want`` of all ``sources``; ``locations`` are their paths or hub ids.

    Bad rows of a source with ``on_bad_row: skip`` are written to ``rejects`` (JSONL: source, line, field, reason,
    content) and counted. Bad rows of other sources are an error: after the first one no more records are yielded, but
    the rest is read for further bad rows, and then an error lists the first ten and their number.

    Raises, during iteration: :class:`InputError` for these, and for a source of which no record is left; and what
    :func:`read_rows` and :func:`converter` raise.
    """
    total = sum(source.weight or 0 for source in sources)
    shares = [source.weight / total if source.weight else None for source in sources]
    report = ReadReport(
        [SourceReport(source.path, weight=share) for source, share in zip(sources, shares, strict=True)]
    )
    mixture = _Mixture(list(zip(sources, locations, report.sources, strict=True)), want, rejects, report)
    return Records(mixture.weighted(seed) if total else mixture.plain(), report)


_Source = tuple[DataSource, Path | str, SourceReport]


class _Mixture:
    def __init__(
        self, sources: list[_Source], want: Want, rejects: Path | None, report: ReadReport | None = None
    ) -> None:
        self._sources = sources
        self._report = report or ReadReport()
        self._want: Want = want
        self._rejects = rejects
        self._file: TextIO | None = None
        self._fatal = 0
        """Number of bad rows that must not be skipped."""
        self._problems: list[Problem] = []
        """The first of these bad rows, and sources of which no record is left."""

    def plain(self) -> Iterator[Record]:
        """Every record once."""
        with self._checked():
            for i, source in enumerate(self._sources):
                for record in self._records(source):
                    if not self._fatal:
                        source[2].given += 1
                        self._report.giving = i
                        yield record

    def weighted(self, seed: int) -> Iterator[Record]:
        """Reads the sources twice: first to check and count, then to yield. Only one number for each record is kept in
        memory."""
        with self._checked():
            for source in self._sources:
                for _ in self._records(source):
                    pass
        total = sum(report.kept for _, _, report in self._sources)
        quotas = share_out(total, [report.weight or 0 for _, _, report in self._sources])
        for i, (quota, (spec, location, report)) in enumerate(zip(quotas, self._sources, strict=True)):
            if not quota:
                raise InputError(
                    Problem("its weight gives it none of the mixture's records", file=spec.path, key="weight")
                )
            whole, rest = divmod(quota, report.kept)
            once_more = frozenset(random.Random(f"{seed}/{i}").sample(range(report.kept), rest))
            again = _Mixture([], self._want, None)  # bad rows were reported in the first pass
            for j, record in enumerate(again._records((spec, location, SourceReport(spec.path)))):
                for _ in range(whole + (j in once_more)):
                    report.given += 1
                    self._report.giving = i
                    yield record
            if report.given != quota:
                raise InputError(Problem("changed while it was read", file=str(location)))

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Inside, all sources are read with the rejects file open; afterwards one error is raised for all bad rows."""
        with ExitStack() as stack:
            if self._rejects is not None:
                stack.enter_context(machine_faults(self._rejects))
                self._rejects.unlink(missing_ok=True)  # of an earlier reading
            stack.callback(lambda: self._file and self._file.close())
            yield
        if self._fatal == 1:
            self._problems = [self._advised(problem) for problem in self._problems]
        elif self._fatal:
            self._problems.append(
                Problem(count_of(self._fatal), hint="mend them, or leave them out with `on_bad_row: skip`")
            )
        if self._problems:
            raise InputError(self._problems)

    def _advised(self, problem: Problem) -> Problem:
        """The problem with advice added, for the case that it is the only bad row."""
        advice = "mend it, or leave it out with `on_bad_row: skip`"
        return (
            replace(problem, hint=f"{problem.hint}; {advice}" if problem.hint else advice)
            if isinstance(problem, BadRow)
            else problem
        )

    def _records(self, source: _Source) -> Iterator[Record]:
        spec, location, report = source
        convert = converter(spec, self._want)
        report.notes, report.remarks = convert.notes, convert.remarks
        if not spec.own_format and TEST_SET not in convert.remarks and is_test_set(spec, location):
            convert.remarks.append(TEST_SET)
        report.licence, report.kind = licence_of(spec, location), self._want
        choice = Choice(spec)
        may_repeat = self._want == "prompt" and spec.unique is None
        units = 0
        for unit in convert.units(
            self._rows(source, convert, choice), lambda rows, place: self._chosen(choice, rows, place, source)
        ):
            records = self._converted(convert, choice, unit, source)
            report.format = convert.format
            report.kept += len(records)
            if may_repeat and (again := choice.again(records)):
                report.notes[ASKED_AGAIN] = report.notes.get(ASKED_AGAIN, 0) + again
            yield from records
            units += bool(records)
            if units == spec.limit:
                break
        report.parts = report.parts or convert.parts
        if not report.kept and not (report.bad and spec.on_bad_row == "error"):
            self._problems += _nothing_left(spec, report, choice.absent)
        elif report.kept and choice.never_ignored and units != spec.limit:
            report.told.note(f"{spec.path}: `ignore` names columns that no row has: {', '.join(choice.never_ignored)}")

    def _rows(self, source: _Source, convert: Converter, choice: Choice) -> Iterator[Row]:
        """The rows, counted. If the format is not known yet, it is recognised from the first used rows before any is
        yielded."""
        spec, location, report = source
        pending: list[Row | BadRow] = []
        looking = convert.undecided

        def unreadable(row: BadRow) -> None:
            if looking:
                pending.append(row)
                return
            report.read += 1
            self._bad(source, row)

        rows = read_rows(spec, location, unreadable, report.told)
        if looking:
            first: list[Row] = []
            for row in rows:
                pending.append(row)
                first += looked_at(choice, row)
                if seen_enough(spec, first, len(pending)):
                    break
            if first:
                convert.decide(first)
            looking = False
            for one in pending:
                if isinstance(one, BadRow):
                    unreadable(one)
                else:
                    report.read += 1
                    yield one
        for row in rows:
            report.read += 1
            yield row

    def _chosen(
        self, choice: Choice, rows: Iterator[Row], place: Callable[[Row], object], source: _Source
    ) -> Iterator[Row]:
        """The rows, or parts of rows, that may belong to a group; ``place`` raises RowError for one whose group cannot
        be read."""
        report = source[2]
        for row in rows:
            try:
                for part in choice.parts(row):
                    report.parts += part.number is not None
                    if choice.wanted(part):
                        kept = choice.stripped(part.row)
                        place(kept)
                        yield kept
                    else:
                        report.left_out += 1
            except LeftOut as reason:
                self._dropped(reason, row, report)
            except RowError as error:
                self._refused(error, row, source)

    def _converted(self, convert: Converter, choice: Choice, unit: Row | Group, source: _Source) -> list[Record]:
        """The records of a row or group; if it gives none, that is counted with the reason."""
        report = source[2]
        records: list[Record] = []
        try:
            if isinstance(unit, Group):
                return self._of_group(convert, choice, unit, source)
            if not choice.chooses:
                if found := convert(unit):
                    report.used += 1
                    return list(found)
                raise LeftOut(NO_RECORD)
            used = 0
            for part in choice.parts(unit):
                report.parts += part.number is not None
                if not choice.wanted(part):
                    report.left_out += 1
                    continue
                try:
                    records += _of_part(convert, choice, part, choice.stripped(part.row))
                    used += 1
                except LeftOut as reason:
                    self._dropped(reason, part.row, report)
            report.used += used
        except LeftOut as reason:
            self._dropped(reason, unit, report)
        except RowError as error:
            records = []
            self._refused(error, unit, source)
        return records

    def _of_group(self, convert: Converter, choice: Choice, unit: Group, source: _Source) -> list[Record]:
        """The records of a group. Each row that contributes nothing is counted by itself, with its own reason if it has
        one."""
        report = source[2]
        why: RowError | None = None
        records: list[Record] = []
        try:
            records = _of_part(convert, choice, RowPart(unit.rows[0]), unit)
        except RowError as error:
            why = error
        aside, convert.aside = convert.aside, []
        for row, reason in aside:
            if isinstance(reason, LeftOut):
                self._dropped(reason, row, report)
            else:
                self._refused(reason, row, source)
        apart = {row.origin for row, _ in aside}
        report.used += sum(row.origin not in apart for row in unit.rows) if why is None else 0
        for row in unit.rows if why is not None else ():
            if row.origin in apart:
                continue
            if why is None or isinstance(why, LeftOut):
                self._dropped(why or LeftOut(NO_RECORD), row, report)
            else:
                self._refused(why, row, source)
                why = LeftOut(GROUP_REFUSED)  # of the other rows
        return records

    def _refused(self, error: RowError, unit: Row | Group, source: _Source) -> None:
        self._bad(
            source,
            BadRow(error.message, unit.origin.source, unit.origin.line, key=error.field, content=_shown(unit.value)),
        )

    def _dropped(self, reason: LeftOut, row: Row | Group, report: SourceReport) -> None:
        origin = row.origin
        report.drop(reason.message, origin)
        if self._rejects is not None:
            self._write(BadRow(reason.message, origin.source, origin.line, key=reason.field, content=_shown(row.value)))

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
        entry = {
            "source": row.file,
            "line": row.line,
            "field": row.key,
            "reason": row.message,
            "content": clip(row.content, _CONTENT),
        }
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def looked_at(choice: Choice, row: Row) -> list[Row]:
    """The row in the form that a converter gets it, or none if it is not used; for recognising the format."""
    try:
        return [choice.stripped(part.row) for part in islice(choice.parts(row), 1) if choice.wanted(part)]
    except RowError:
        return []


def _of_part(convert: Converter, choice: Choice, part: RowPart, unit: Row | Group) -> list[Record]:
    """The records of a part. Raises :class:`LeftOut` when there is none, and :class:`RowError`."""
    records = convert(unit)
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
    """Divide ``total`` into whole numbers, each within one of its share; ``shares`` sum to 1. The remainder goes to the
    largest fractions, to the first among equal ones."""
    exact = [total * share for share in shares]
    counts = [int(part) for part in exact]
    by_fraction = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_fraction[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _nothing_left(spec: DataSource, report: SourceReport, absent: list[str]) -> list[Problem]:
    """The problem that no record is left, with the first reasons."""
    text = f"0 rows left of {report.read:,} read"
    parts = [*report.left(), *([f"{report.bad:,} bad"] if report.bad else [])]
    text += ": " + ", ".join(parts) if parts else ""
    hint = f"no row has a field {', '.join(absent)}" if absent else None
    return [*report.first_bad[:_REASONS], Problem(text, file=spec.path, hint=hint)]
