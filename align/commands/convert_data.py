"""``align data convert``: writing records to a file, in this package's format or another tool's, with their provenance.

The provenance is written beside the file as ``FILE.provenance.yaml``. It has the source as a block of a recipe with
everything that was recognised, the sha256 of the source's files and of the written file, and the counts of what was
left out. It is a separate file because formats of other tools have no place for it, a mapping in every row would be
larger than most rows, and readers of data ignore it. Rows in this package's format also name their original row
(:mod:`align.data.formats.own_rows`), so a file may be shuffled and cut.

Memory does not grow with the file. The file is written under a temporary name and renamed after the provenance was
written, so that a file that exists is complete and has its provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from align import __version__, files
from align.data.files.hub import load_split
from align.data.files.locations import data_files, names_of
from align.data.files.written import Row, Sink, opened
from align.data.formats.column_names import yaml_line
from align.data.formats.formats import Converter, Want, converter
from align.data.formats.other_tools import TARGETS, Unsayable
from align.data.formats.own_rows import row_of
from align.data.records import Conversation, Graded, Preference, Prompt, Record, Unpaired
from align.data.report import Counted
from align.data.rows import Row as ReadRow
from align.data.sources.as_source import as_source
from align.data.sources.mixture import Records, read_records
from align.data.strict_json import RowError
from align.errors import InputError, Problem
from align.recipe.schema import DataSource
from align.terminal import counted

SUFFIXES = (".jsonl", ".parquet")
KINDS: dict[type[Record], Want] = {
    Conversation: "conversation",
    Preference: "preference",
    Unpaired: "unpaired",
    Graded: "graded",
    Prompt: "prompt",
}
_NAMES = {
    Conversation: "conversations",
    Preference: "preferences",
    Unpaired: "labelled answers",
    Graded: "graded answers",
    Prompt: "prompts",
}
_BLOCK = 500
"""Number of records that are written, and read back, at a time."""

_Said = tuple[Record, list[Row]]
"""A record and its rows in the written format."""


@dataclass
class Converted:
    """What became of the records."""

    out: Path
    to: str
    kind: type[Record] = Conversation
    records: int = 0
    rows: int = 0
    unsaid: dict[str, Counted] = field(default_factory=dict)
    """Parts of written records that the format cannot express."""
    left_out: dict[str, Counted] = field(default_factory=dict)
    """Records that the format cannot express, by reason."""
    source_lines: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Lines for the user."""
        made = counted(self.records, KINDS[self.kind])
        rows = f" as {self.rows:,} rows" if self.rows != self.records else ""
        return [
            *self.source_lines,
            *(f"left out, {self.to} cannot say it: {reason}: {count}" for reason, count in self.left_out.items()),
            *(f"not written, {self.to} has no place for it: {what}: {count}" for what, count in self.unsaid.items()),
            f"{self.out}: {made}{rows}; where they come from: {provenance_of(self.out).name}",
        ]


def provenance_of(out: Path) -> Path:
    """The provenance file of ``out``."""
    return out.with_name(f"{out.name}.provenance.yaml")


def convert(
    source: DataSource, location: Path | str, out: Path, *, to: str = "align", want: Want, replace: bool = False
) -> Converted:
    """Write the records of a source to ``out``, which ends in ``.jsonl`` or ``.parquet``.

    Args:
        to: ``align``, this package's format, in which every row is checked to give the same record when it is read
            back; or a name of :data:`~align.data.formats.other_tools.TARGETS`.
        want: type of the records; ``wanted_of`` recognises it from a file.
        replace: may an existing ``out`` be replaced?

    Raises:
        InputError: bad rows (unless the source skips them), nothing to write, ``out`` exists, the format cannot express
            such records, or only some of them have what another tool reads in all rows or in none.
        EnvironmentFault: the disk is full or cannot be written, or the hub does not answer.
    """
    _require_place(source, location, out, to, replace=replace)
    made = Converted(out, to)
    before = _content(source, location)
    records = read_records([source], [location], want, seed=0, rejects=None)
    files.clean_stale(out.parent)
    with files.atomic_file(out) as scratch:
        with opened(scratch, out.suffix) as sink:
            _write(_said(records, made, _name_of(location)), sink, made)
        if not made.rows:
            reasons = ", ".join(f"{count.total:,} {reason}" for reason, count in made.left_out.items())
            raise InputError(Problem(f"nothing is left that {to} can say: {reasons}", file=source.path))
        if _content(source, location) != before:
            raise InputError(Problem("changed while it was read", file=str(location)))
        made.source_lines = records.report.lines()
        _write_provenance(source, records, made, before, scratch)
    return made


def _require_place(source: DataSource, location: Path | str, out: Path, to: str, *, replace: bool) -> None:
    """Raises InputError when ``out`` must not or cannot be written."""
    suffixes = SUFFIXES if to == "align" else SUFFIXES[:1]
    if out.suffix not in suffixes:
        raise InputError(f"{out} must end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}")
    if isinstance(location, Path) and out.exists() and any(out.samefile(path) for path in data_files(location, source)):
        raise InputError(f"{out} is the file that is read", hint="write to another file")
    for path in (out, provenance_of(out)):
        if path.is_dir() or (path.exists() and not replace):
            raise InputError(f"{path} exists", hint="write to another file, or replace it with --replace")


def _name_of(location: Path | str) -> Callable[[Record], str]:
    """Gives the name of a record's source for its row: the name of a file without its path, which is the same on every
    machine, or a hub id."""
    return lambda record: location if isinstance(location, str) else Path(record.origin.source).name


def _said(records: Records, made: Converted, name: Callable[[Record], str]) -> Iterator[_Said]:
    """Each record with its rows in the written format. Raises InputError for a record of another type than the
    first."""
    first = next(records, None)
    if first is None:
        return
    made.kind = type(first)
    target = TARGETS.get(made.to)
    if target is not None and made.kind not in target.takes:
        takes = ", ".join(_NAMES[kind] for kind in target.takes)
        hint = f"it takes {takes}; --want chooses what a file is read as"
        raise InputError(f"--to {made.to} has no place for {_NAMES[made.kind]}", hint=hint)
    pattern: _Said | None = None
    for record in chain([first], records):
        if type(record) is not made.kind:
            what = f"gives {_NAMES[type(record)]} beside {_NAMES[made.kind]}"
            raise InputError(record.origin.blamed(Problem(what, hint="write them apart, with `where` in the source")))
        said = record, [row_of(record, name(record))] if target is None else _of_another(record, made)
        if target is not None and said[1]:
            pattern = pattern or said
            _require_even(pattern, said, made.to)
        yield said


def _require_even(pattern: _Said, said: _Said, to: str) -> None:
    """Raises InputError for rows with other columns than the first ones, if the tool cannot read such a file."""
    (earlier, (first, *_)), (record, rows) = pattern, said
    column = next(filter(None, (TARGETS[to].uneven_column(first, row) for row in rows)), None)
    if column is None:
        return
    here = f"missing, but {earlier.origin} has it" if column in first else f"{earlier.origin} has none"
    what = f"{here}: {to} reads this column in all rows or in none"
    if column in TARGETS[to].may_lack:
        hint = "begin the file with rows that have it, or write the two kinds apart, with `where` in the source"
    else:
        hint = "choose rows with `where` in the source, or leave the column out with `ignore`"
    raise InputError(record.origin.blamed(Problem(what, key=column, hint=hint)))


def _of_another(record: Record, made: Converted) -> list[Row]:
    """The rows of a record in another tool's format; none if it cannot be expressed, which is counted."""
    notes: dict[str, None] = {}
    try:
        rows = list(TARGETS[made.to].rows(record, lambda what: notes.setdefault(what)))
    except Unsayable as reason:
        made.left_out.setdefault(str(reason), Counted()).add(record.origin)
        return []
    for what in notes:
        made.unsaid.setdefault(what, Counted()).add(record.origin)
    return rows


def _write(said: Iterator[_Said], sink: Sink, made: Converted) -> None:
    """Write block by block. Rows in this package's format are read back and compared with their records."""
    reader: Converter | None = None
    while block := list(islice(said, _BLOCK)):
        rows = [row for _, rows in block for row in rows]
        made.records += sum(bool(rows) for _, rows in block)
        made.rows += len(rows)
        if rows:
            written = sink.write(rows)
            if made.to == "align":
                reader = reader or converter(DataSource(path=str(made.out)), KINDS[made.kind])
                for (record, _), row in zip(block, written, strict=True):
                    _require_same(record, row, reader)


def _require_same(record: Record, row: Row, reader: Converter) -> None:
    """Raises InputError unless the row gives the record. It always should; this check protects data from a mistake in
    this package."""
    try:
        (again,) = reader(ReadRow(row, record.origin))
    except RowError as error:
        problem = Problem(f"cannot be written as {KINDS[type(record)]}: {error.message}", key=error.field)
        raise InputError(record.origin.blamed(problem)) from error
    if again != record:
        raise InputError(
            record.origin.blamed(Problem("would not be read again as it is", hint="please report this row"))
        )


# Provenance


def _content(source: DataSource, location: Path | str) -> dict[str, str]:
    """The files of a source with their sha256; for a hub data set its fingerprint."""
    if isinstance(location, str):
        return {location: str(load_split(location, source)._fingerprint)}
    paths = data_files(location, source)
    return {name: files.sha256_file(path) for name, path in zip(names_of(paths, location), paths, strict=True)}


def _write_provenance(
    source: DataSource, records: Records, made: Converted, content: dict[str, str], scratch: Path
) -> None:
    (read,) = records.report.sources
    counts = {"read": read.read, "kept": read.kept, "left out by where": read.left_out, "bad": read.bad, **read.reasons}
    told: dict[str, Any] = {
        "file": {"name": made.out.name, "sha256": files.sha256_file(scratch), "rows": made.rows},
        "shape": made.to,
        "records": {"kind": KINDS[made.kind], "number": made.records},
        "written_by": f"align {__version__}",
        "source": as_source(source, read),
        "source_sha256": content,
        "source_rows": {key: count for key, count in counts.items() if count},
    }
    if made.left_out:
        told["left_out"] = {reason: count.total for reason, count in made.left_out.items()}
    if made.unsaid:
        told["not_written"] = {what: count.total for what, count in made.unsaid.items()}
    files.atomic_write(provenance_of(made.out), "".join(f"{key}: {yaml_line(value)}\n" for key, value in told.items()))
