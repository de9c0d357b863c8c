"""Loading sources as encoded trees, cached by content, with a report about every row that was left out.

The name of a cache entry is a digest of everything that its content depends on: the bytes of the sources, their
settings, the encoder, the limits, and the code of this package. An entry is built in a temporary folder and then
renamed. If several processes need the same entry, one builds it and the others wait; the ranks of a distributed run
share entries in this way too.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from align import files, sealed
from align.data.chat.encoder import Encoder
from align.data.description import Description
from align.data.files.hub import load_split
from align.data.files.locations import data_files, names_of
from align.data.formats.formats import Want
from align.data.records import Preference, Record
from align.data.report import SHOWN, DataReport
from align.data.sources.mixture import Records, read_records
from align.data.sources.source_report import ReadReport
from align.data.tree import Tree
from align.data.trees.build import ONE_REJECTED, TOO_LONG, Limits, TooLong, Unusable, tree_of
from align.data.trees.code_digest import code_digest
from align.data.trees.store import META, TreeStore, write_store
from align.errors import InputError, Problem
from align.recipe.reference_syntax import import_object, resolve_beside
from align.recipe.rows.mapping import FileAt, RowMapping
from align.recipe.schema import DataSource

if TYPE_CHECKING:
    from align.data.trees.filters import PreferenceFilter

_log = logging.getLogger("align")
_REPORT, _REJECTS = "report.json", "rejects.jsonl"


def load_trees(
    want: Want,
    sources: Sequence[DataSource],
    *,
    resolve: Callable[[str], Path | str],
    encoder: Encoder,
    max_length: int,
    too_long: TooLong,
    train_on: Literal["all", "last"],
    seed: int,
    cache: Path,
    rejects: Path | None,
    filters: PreferenceFilter | None = None,
    grades: Sequence[str] = (),
) -> tuple[TreeStore, DataReport]:
    """The records of ``sources`` as trees, from the cache or encoded now, and what became of the rows.

    A conversation is one branch, cut where its first target begins; a preference has the chosen answer as branch 0 and
    the rejected ones after it; a prompt is a trunk without branches. Branches end at their last target. ``max_length``
    bounds every path, in tokens. ``rejects`` gets one JSON line for each row that was left out, whether bad or dropped.
    ``filters`` examine all preferences first; pairs that they leave out are dropped with the reason. ``grades`` are the
    names of the grades that are learned.

    Raises :class:`InputError` for bad rows (unless their source skips them), for long ones with ``too_long="error"``,
    and when nothing is left; :class:`EnvironmentFault` when the disk or the hub does not answer.
    """
    locations = [resolve(source.path) for source in sources]
    limits = Limits(max_length, too_long, train_on, tuple(grades))
    settings: dict[str, Any] = {"want": want, "encoder": encoder.digest, **asdict(limits)}
    if any(source.weight for source in sources):
        settings["seed"] = seed  # only mixing is random
    if filters is not None:
        settings["filters"] = filters.digest
    inputs = [_identity(source, location) for source, location in zip(sources, locations, strict=True)]
    key = files.digest_json({"inputs": inputs, "code": code_digest(), **settings})
    entry = files.make_folder(cache) / key[:40]
    with _locked(cache / f".{entry.name}.lock"):
        reused = _intact(entry)
        if not reused:
            _build(
                entry,
                _Builder(want, encoder, limits, origins_to_skip(sources, locations), filters),
                sources,
                locations,
                seed,
            )
        report = _read_report(entry, reused=reused)
        if rejects is not None and (entry / _REJECTS).exists():
            with files.machine_faults(rejects):
                rejects.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(entry / _REJECTS, rejects)
        return TreeStore(entry), report


# Identity


def _identity(source: DataSource, location: Path | str) -> dict[str, Any]:
    """What the rows of a source depend on."""
    settings = source.model_dump(mode="json", exclude={"path"})
    if source.own_format:
        # The source of a user's function, but not that of the modules it imports.
        module = inspect.getsourcefile(import_object(source.own_format))
        settings["format_code"] = files.sha256_file(Path(module)) if module else None
    beside = [source.join.path] if source.join is not None else []
    tools = source.reading.tools if isinstance(source.reading, RowMapping) else None
    beside += [tools.file] if isinstance(tools, FileAt) else []
    settings["beside"] = [[name, files.sha256_file(resolve_beside(name))] for name in beside]
    if isinstance(location, str):
        return {**settings, "hub": location, "content": str(load_split(location, source)._fingerprint)}
    found = data_files(location, source)
    names = names_of(found, location)
    return {**settings, "content": [[name, files.sha256_file(path)] for name, path in zip(names, found, strict=True)]}


def origins_to_skip(sources: Sequence[DataSource], locations: Sequence[Path | str]) -> set[str]:
    """The sources whose bad rows may be skipped, named as in :class:`Origin`."""
    places: dict[bool, set[str]] = {True: set(), False: set()}
    for source, location in zip(sources, locations, strict=True):
        names = {location} if isinstance(location, str) else {str(path) for path in data_files(location, source)}
        places[source.on_bad_row == "skip"] |= names
    return places[True] - places[False]


# The cache


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock ``path`` for this process, waiting while another has it. The kernel releases the lock when a process
    dies."""
    with files.machine_faults(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with files.machine_faults(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for another process to encode the same data")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _intact(entry: Path) -> bool:
    """Is there a finished entry, unchanged since it was written? Warns about a damaged one, which will be built
    again."""
    if not entry.exists():
        return False
    problems = sealed.damage(entry, [META, _REPORT, _REJECTS])
    if problems:
        _log.warning("encoded data in %s are damaged (%s): encoding again", entry, problems[0])
    return not problems


def _read_report(entry: Path, *, reused: bool) -> DataReport:
    return DataReport.from_json(json.loads((entry / _REPORT).read_text(encoding="utf-8")), reused=reused)


def _build(
    entry: Path, builder: _Builder, sources: Sequence[DataSource], locations: Sequence[Path | str], seed: int
) -> None:
    files.clean_stale(entry.parent)
    tmp = files.temporary(entry.parent)
    try:
        files.make_folder(tmp)
        bad = tmp / "bad.jsonl"
        if builder.filters is not None:
            builder.filters.survey(read_records(sources, locations, builder.want, seed=seed, rejects=None))
        records = read_records(sources, locations, builder.want, seed=seed, rejects=bad)
        with (
            files.machine_faults(tmp),
            (tmp / _REJECTS).open("w", encoding="utf-8", errors="backslashreplace") as rejects,
        ):
            write_store(tmp, builder.trees(records, rejects))
            if bad.exists():
                with bad.open(encoding="utf-8") as lines:
                    shutil.copyfileobj(lines, rejects)
                bad.unlink()
        builder.finish(records, [source.path for source in sources])
        files.write_json(tmp / _REPORT, builder.report.as_json())
        sealed.seal(tmp)
        files.publish_folder(tmp, entry)
    finally:
        files.discard(tmp)


class _Builder:
    """Makes the trees of one entry and its report."""

    def __init__(
        self, want: Want, encoder: Encoder, limits: Limits, skipping: set[str], filters: PreferenceFilter | None
    ) -> None:
        self.want: Want = want
        self.filters = filters
        self.report = DataReport(want)
        self._encoder = encoder
        self._limits = limits
        self._skipping = skipping
        self._refused: list[Problem] = []
        self._described: dict[int, Description] = {}

    def trees(self, records: Records, rejects: TextIO) -> Iterator[Tree]:
        """Yields a tree for each record that can be used, and writes a line to ``rejects`` for each other one."""
        before: Record | None = None
        for record in records:
            repeated, before = record is before, record  # a mixture repeats a record by itself
            kept = self._filtered(record, rejects)
            if kept is None:
                continue
            try:
                tree = tree_of(kept, self._encoder, self._limits, partial(self.report.note, origin=record.origin))
            except Unusable as reason:
                self._drop(record, str(reason), rejects)
            except InputError as error:
                self._refuse(record, error.problems[0], rejects)
            else:
                self.report.add(tree)
                if not repeated:
                    self._describe(records.report, tree, kept)
                yield tree

    def _describe(self, read: ReadReport, tree: Tree, record: Record) -> None:
        number = read.giving
        if number not in self._described:
            self._described[number] = Description(read.sources[number].path, self.want)
        self._described[number].add_tree(tree, record)

    def finish(self, records: Records, paths: Sequence[str]) -> None:
        """Complete the report. Raises InputError for rows that stop the run, and when no tree is left."""
        report, limit = self.report, self._limits.max_length
        report.source_lines, report.sources = records.report.lines(), records.report.as_json()
        report.described = [{"source": one.name, "figures": one.figures()} for one in self._described.values()]
        if self._refused:
            raise InputError(self._refused)
        long = report.dropped.get(TOO_LONG)
        if long and self._limits.too_long == "error":
            places = [Problem(f"{TOO_LONG} ({limit:,} tokens)", file=place) for place in long.first]
            hint = "raise max_length, or set too_long to drop or truncate"
            raise InputError([*places, Problem(f"{long.total:,} such rows in all", hint=hint)])
        if not report.trees:
            reasons = ", ".join(f"{count.total:,} {reason}" for reason, count in report.dropped.items())
            what = f"0 rows left of {records.report.given:,}: {reasons}"
            advice: str | None
            if long:
                advice = f"max_length is {limit:,} tokens"
            elif self.filters:
                advice = self.filters.hint(report.dropped)
            else:
                advice = None
            raise InputError(Problem(what, file=", ".join(paths), hint=advice))

    def _filtered(self, record: Record, rejects: TextIO) -> Record | None:
        """The record without the pairs that the filters leave out; None when no pair is left."""
        if self.filters is None or not isinstance(record, Preference):
            return record
        reasons = self.filters.reasons(record)
        wrong = [reason for reason in reasons if reason is not None]
        if wrong and len(wrong) == len(reasons):
            self._drop(record, wrong[0], rejects)
            return None
        for reason in wrong:
            self.report.note(f"{ONE_REJECTED}, {reason}", record.origin)
            _reject(record, f"{ONE_REJECTED}, {reason}", rejects)
        return record.keeping([reason is None for reason in reasons])

    def _drop(self, record: Record, reason: str, rejects: TextIO) -> None:
        self.report.drop(reason, record.origin)
        _reject(record, reason, rejects)

    def _refuse(self, record: Record, problem: Problem, rejects: TextIO) -> None:
        """Count a record that the encoder refuses as a bad row, which is skipped or an error, depending on its
        source."""
        origin = record.origin
        if origin.source in self._skipping:
            self._drop(record, problem.message, rejects)
            return
        self._refused.append(origin.blamed(problem))
        if len(self._refused) == SHOWN:
            raise InputError(
                [*self._refused, Problem(f"stopped after {SHOWN} such rows", hint="`on_bad_row: skip` leaves them out")]
            )


def _reject(record: Record, reason: str, rejects: TextIO) -> None:
    """Write a line about a record that is not used, or only in part."""
    entry = {
        "source": record.origin.source,
        "line": record.origin.line,
        "id": record.id,
        "field": None,
        "reason": reason,
        "content": "",
    }
    rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")
