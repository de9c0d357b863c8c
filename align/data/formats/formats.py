"""Making records of rows of any format: conversations, preferences, labelled or graded answers, or prompts.

A format is a function from a row to a dictionary in one of five *forms*; :func:`record_of` makes the record of it:

    {"messages": [...]}                                   a conversation, or a prompt if the user speaks last
    {"prompt": ..., "chosen": ..., "rejected": ...}       a preference; "margin" and "votes" may be there
    {"prompt": ..., "completion": ..., "label": ...}      a labelled answer; or "messages" and "label", of the last
    {"prompt": ..., "completion": ..., "grades": {...}}   a graded answer, numbers by name; or "messages" and "grades"
    {"prompt": ...}                                       a prompt

Each may have "id", "tools" and "system". A user's own format is such a function too, named ``package.module:function``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from align.data.formats.absent import require_columns
from align.data.formats.beside import FIELDS_LIMIT as FIELDS_LIMIT
from align.data.formats.beside import id_of, kept
from align.data.formats.column_names import MEDIA, may_mean, nearest_presets, yaml_line
from align.data.formats.detect import LOOK_AT, Found, detect_rows
from align.data.formats.detect import detect as detect
from align.data.formats.format_names import FORMATS as FORMATS
from align.data.formats.format_names import Format
from align.data.formats.known_sets import TEST_SET
from align.data.formats.own_answers import Choosing, OwnFormat
from align.data.formats.own_rows import without_own
from align.data.formats.proposed import line_to_write
from align.data.formats.unread import complain_of_unread, unread_grades, unread_texts
from align.data.formats.wanted import Want as Want
from align.data.formats.wanted import is_labelled, kinds_of
from align.data.formats.wanted import narrow as narrow
from align.data.mapping.better import good_values, keeps_good, spelled
from align.data.mapping.coded import CODED, Coded
from align.data.mapping.grouped import by_key, by_parent
from align.data.mapping.labelled import REMARK, key_of_prompt, paired
from align.data.mapping.mapped import MappedRows
from align.data.mapping.places import find, place, text_at
from align.data.mapping.row_parts import SHAPES
from align.data.mapping.values import PASTED, holds_answer
from align.data.messages.dialogue import speaker
from align.data.messages.forms import own_votes, record_of
from align.data.records import Origin, Prompt, Record, Unpaired
from align.data.rows import LeftOut, Row
from align.data.strict_json import RowError as RowError
from align.data.strict_json import as_json
from align.errors import InputError, Problem
from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource

_MEDIA = frozenset(MEDIA)


@dataclass(frozen=True)
class Group:
    """Rows that belong together."""

    rows: list[Row]
    path: list[Row] | None = None
    """For answers in a tree of rows, the messages that lead to them."""

    @property
    def value(self) -> dict[str, Any]:
        """The first row."""
        return self.rows[0].value

    @property
    def origin(self) -> Origin:
        """Place of the first row."""
        return self.rows[0].origin


class Converter:
    """Makes records of a row, or of rows that belong together: usually one record; with groups, trees or a user's own
    format any number.

    Raises :class:`RowError` for a row that cannot be used, and its subclass :class:`~align.data.rows.LeftOut` for a
    sound row that gives no record.
    """

    def __init__(self, source: DataSource, want: Want) -> None:
        self.format: str | None = None
        """The format's name, or the mapping as in a recipe; recognised from the first rows if the source does not set
        it."""
        self._want = want
        self._ignored = frozenset(getattr(source, "ignore", ()))
        reading = source.reading
        better = reading.better if isinstance(reading, RowMapping) else None
        label = (better.label if better is not None else None) or "label"
        self._chosen_by = {name for where in source.where for name in place(where).columns}
        self._good = label in source.where and keeps_good(source.where[label], better)
        self._keep = yaml_line({label: good_values(better)})
        self.notes: dict[str, int] = {}
        """What a report should mention about the rows -> how often it occurred."""
        self.remarks: list[str] = []
        """What a report should mention about the source."""
        self._source = source
        self._labelled: tuple[Converter, Converter] | None = None
        """For labelled answers that will be compared: the converters that find a row's prompt and make its record."""
        self.aside: list[tuple[Row, RowError]] = []
        """Rows that were left out of their groups, with the reasons; the caller collects them."""
        self._detected: Found | None = None
        self._watched: dict[tuple[str, ...], tuple[list[str], set[str]]] = {}
        self._core: Format | None = None
        self._parts: list[tuple[dict[str, Any], MappedRows]] = []
        own = source.own_format
        self._own = OwnFormat(own, want, self._note, good=self._good) if own is not None else None
        self._unchecked = reading if isinstance(reading, RowMapping) and reading.preset is None else None
        """A mapping of the recipe whose columns have not been checked against rows yet."""
        if own is not None:
            self.format = own
        elif isinstance(source.reading, RowMapping):
            self.use(
                Found(
                    yaml_line(source.reading.model_dump(mode="json", by_alias=True, exclude_unset=True)), source.reading
                )
            )
        elif source.reading is not None:
            self.use(Found(source.reading))

    @property
    def grouped(self) -> bool:
        """Are rows converted in groups instead of one by one?"""
        return any(mapped.grouped for _, mapped in self._parts)

    @property
    def from_labels(self) -> bool:
        """Are preferences made from labelled answers?"""
        return self._labelled is not None

    def means(self, want: Want) -> bool:
        """Is the mapping meant for this type of record? A mapping with answers to compare could also give prompts, but
        that is not what its author means."""
        kinds = [kinds_of(mapped.mapping) for _, mapped in self._parts]
        return not kinds or any(want in kind for kind in kinds)

    @property
    def undecided(self) -> bool:
        """Must :meth:`decide` still recognise the format, or check a mapping's columns?"""
        own = self._own is not None and self._own.undecided
        return self.format is None or self._unchecked is not None or own

    def decide(self, rows: Sequence[Row]) -> None:
        """Recognise the format from the first of these rows, or check that the rows have the columns of the mapping.

        Raises :class:`InputError` when they do not, when no format fits, or when a column that carries meaning would
        not be read.
        """
        if self._unchecked is not None:
            require_columns(self._unchecked, [row.value for row in rows], self._source.path)
            self._unchecked = None
            return
        rows = rows[:LOOK_AT]
        if self._own is not None:
            if self._own.gives_labels(rows):
                self._compare_labels("unpaired")
            return
        values = [
            {key: item for key, item in without_own(row.value).items() if key not in self._ignored} for row in rows
        ]
        try:
            found = detect_rows(values, self._want, self._chosen_by)
        except RowError as error:
            raise _unknown(error, rows) from error
        self.use(found)
        self._detected = found
        read = columns_read(found, values)
        if grades := unread_grades(values, read):
            self.remarks.append(f"columns that may grade the answers, and that nothing reads: {', '.join(grades[:8])}")
        if unread := unread_texts(values, read):
            self.remarks.append(f"columns with texts that nothing reads: {', '.join(unread[:8])}")

    def use(self, found: Found) -> None:
        """Read rows by this format."""
        self.format = found.name
        if found.mapping is None and found.name in FORMATS:
            self._core = FORMATS[found.name]
            self._pair_labels(found)
            return
        wants = {
            "prompts": self._want == "prompt",
            "labelled": self._want == "unpaired",
            "graded": self._want == "graded",
        }
        options = {**wants, "compared": self._want in ("preference", "unpaired")}
        code = code_of(found)
        self._parts = [(where, MappedRows(mapping, code=code, **options)) for where, mapping in parts_of(found)]
        if (
            self._want not in ("graded", "prompt")
            and found.mapping is not None
            and found.mapping.grades
            and found.mapping.better
        ):
            hint = "a `reward` stage with `grades` learns from them"
            raise InputError(
                Problem(
                    "`grades` have no effect: here answers are compared or labelled", file=self._source.path, hint=hint
                )
            )
        self._pair_labels(found)
        if found.name in PRESETS and PRESETS[found.name].test_set and TEST_SET not in self.remarks:
            self.remarks.append(TEST_SET)

    def _pair_labels(self, found: Found) -> None:
        """Compare labelled answers if preferences are wanted."""
        mappings = [mapped.mapping for _, mapped in self._parts]
        if self._want == "preference" and (all(map(is_labelled, mappings)) if mappings else found.name == "unpaired"):
            self._compare_labels(found.mapping or found.name)

    def _compare_labels(self, format: RowMapping | str) -> None:
        source = self._source.model_copy(update={"format": format, "columns": None})
        self._labelled = Converter(source, "unpaired"), Converter(source, "unpaired")
        self._labelled[1].notes = self.notes
        self.remarks.append(REMARK)

    @property
    def parts(self) -> int:
        """Number of answers that a user's own format made of the rows, if they are compared and differ in number from
        the rows."""
        return self._own.parts if self._own is not None else 0

    def _key_of_prompt(self, row: Row) -> str:
        assert self._labelled is not None
        return key_of_prompt(self._labelled[0](row)[0])

    def _from_labels(self, unit: Row | Group, answers: Converter) -> tuple[Record, ...]:
        found = [answers(row)[0] for row in (unit.rows if isinstance(unit, Group) else [unit])]
        if not isinstance(unit, Group):
            raise LeftOut("belongs to a group, and was read by itself")
        own = self._parts[0][1].mapping if self._parts else None
        pairs = own.pairs if own is not None and "pairs" in own.model_fields_set else "each"
        return paired([answer for answer in found if isinstance(answer, Unpaired)], pairs, self._note)

    def units(self, rows: Iterator[Row], chosen: Choosing) -> Iterator[Row | Group]:
        """The units of conversion: single rows; or, of the ``chosen`` rows, the rows of a group or the answers in a
        tree.

        ``chosen`` gets the rows and a function that finds a row's group or place in the tree, and leaves out rows for
        which that function raises RowError.
        """
        first = next(rows, None)  # the format is recognised before the first row is passed on
        grouped = [mapped for _, mapped in self._parts if mapped.grouped]
        if first is None:
            return iter(())
        rows = chain([first], rows)
        if self._labelled and self._own is not None:
            return map(Group, by_key(self._own.answers(rows, chosen)))
        if self._labelled:
            return map(Group, by_key((self._key_of_prompt(row), row) for row in chosen(rows, self._key_of_prompt)))
        if not grouped:
            return rows
        tree = grouped[0].mapping.tree
        if tree is None:
            return map(Group, by_key((self._key(row), row) for row in chosen(rows, self._key)))
        own, above = tree.id or "id", tree.parent or "parent_id"

        def node(row: Row) -> tuple[str, str | None, Row]:
            return text_at(find(row.value, own), own), text_at(find(row.value, above), above) or None, row

        return self._siblings(node(row) for row in chosen(rows, node))

    def _siblings(self, nodes: Iterable[tuple[str, str | None, Row]]) -> Iterator[Group]:
        for path, siblings in by_parent(nodes):
            answers = [row for row in siblings if speaker(row.value) == "assistant"]
            if answers:
                yield Group(answers, [] if path is None else path)

    def _key(self, row: Row) -> str:
        try:
            number, mapped = self._part(row)
        except LeftOut:
            return f"- {row.origin}"  # a group of its own, so that it is counted
        return f"{number} {mapped.key(row.value)}" if mapped.grouped else f"{number} {row.origin}"

    def _part(self, row: Row) -> tuple[int, MappedRows]:
        """The mapping for this row, with its number."""
        for number, (where, mapped) in enumerate(self._parts):
            if all(_holds(find(row.value, place), value) for place, value in where.items()):
                return number, mapped
        raise LeftOut("none of the preset's parts is for it")

    def __call__(self, unit: Row | Group) -> tuple[Record, ...]:
        row = unit.rows[0] if isinstance(unit, Group) else unit
        if self.format is None:
            self.decide([row])
        if self._detected is not None:
            for one in unit.rows if isinstance(unit, Group) else (row,):
                self._watch(without_own(one.value), self._detected)
        if self._labelled:
            return self._from_labels(unit, self._labelled[1])
        if self._own is not None:
            return self._own.records(row)
        if _MEDIA & row.value.keys():
            self._refuse_media(row.value)
        if self._core is None:
            return self._mapped(unit, row)
        core = self._core
        id_column, id = id_of(row.value, row.origin)
        form = core.convert(row.value)
        fields = kept(row.value, core.columns | {id_column} | own_votes(form))
        record = record_of(form, row.origin, id=id, fields=fields, column=core.messages, note=self._note)
        return (narrow(record, self._want, good=self._good, keep=self._keep),)

    def _watch(self, row: Mapping[str, Any], found: Found) -> None:
        """Raises RowError for a column that carries meaning, is not read, and did not occur in the rows by which the
        format was recognised."""
        keys = tuple(row)
        known = self._watched.get(keys)
        if known is None:
            read = columns_read(found, [row]) | self._chosen_by | self._ignored
            known = [name for name in keys if name not in read and may_mean(name, row[name])], read
            if len(self._watched) < SHAPES:
                self._watched[keys] = known
        if any(row[name] not in (None, "", [], {}) for name in known[0]):
            complain_of_unread(row, found, self._want, known[1])

    def _refuse_media(self, row: Mapping[str, Any]) -> None:
        """Refuse rows with pictures or other media, even if the recipe sets the format: their text must not be trained
        on without them."""
        read = self._core.columns if self._core else set().union(*(mapped.columns(row) for _, mapped in self._parts))
        for name in sorted(_MEDIA & row.keys()):
            if row[name] and name not in read and name not in self._ignored:
                raise RowError(
                    f"has {name}, and a text model cannot take them; `ignore: [{name}]` says that the text does"
                    " without",
                    name,
                )

    def _mapped(self, unit: Row | Group, row: Row) -> tuple[Record, ...]:
        _, mapped = self._part(row)
        forms: list[dict[str, Any]] = []
        try:
            forms = self._forms(mapped, unit, row)
            return self._records(mapped, forms, row)
        except RowError as error:
            if forms:
                error.field = mapped.as_the_row_calls_it(error.field, forms[0])
            raise

    def _forms(self, mapped: MappedRows, unit: Row | Group, row: Row) -> list[dict[str, Any]]:
        if not mapped.grouped:
            return mapped.forms(row.value, self._note)
        if not isinstance(unit, Group):
            raise LeftOut("belongs to a group, and was read by itself")

        def aside(number: int, error: RowError) -> None:
            self.aside.append((unit.rows[number], error))

        if mapped.mapping.tree is None:
            return mapped.of_group([one.value for one in unit.rows], self._note, aside)
        if not unit.path:
            raise LeftOut("its parent is missing")
        return mapped.of_siblings([one.value for one in unit.path], [one.value for one in unit.rows], self._note, aside)

    def _records(self, mapped: MappedRows, forms: list[dict[str, Any]], row: Row) -> tuple[Record, ...]:
        id_column, id = id_of(row.value, row.origin)
        used = mapped.columns(row.value)
        fields = kept(row.value, used | {id_column})
        column = (
            "messages" if mapped.mapping.messages is not None or mapped.mapping.completion is not None else "prompt"
        )
        records = []
        for number, form in enumerate(forms, 1):
            own = str(form.get("id") or id) if len(forms) == 1 else f"{form.get('id') or id}#{number}"
            if form.get("answer") is not None and (answer := as_json(form["answer"])) is not None:
                fields = {**fields, "answer": answer[0]}
            record = record_of(form, row.origin, id=own, fields=fields, column=column, note=self._note)
            if (
                self._want == "prompt"
                and isinstance(record, Prompt)
                and holds_answer(record.prompt[-1]["content"], fields.get("answer"))
            ):
                self._note(PASTED)
            records.append(narrow(record, self._want, good=self._good, keep=self._keep))
        return tuple(records)

    def _note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1


def converter(source: DataSource, want: Want) -> Converter:
    """The converter of ``source`` to records of the type that a stage needs.

    A preference also serves as a conversation (prompt and chosen answer) and as a prompt; a conversation also serves as
    a prompt, without its last message. Raises :class:`InputError` when a user's own format cannot be imported, or the
    first row's format is unknown.
    """
    return Converter(source, want)


def parts_of(found: Found) -> list[tuple[dict[str, Any], RowMapping]]:
    """The mappings of a format, each with the condition on the rows that it reads."""
    mapping = found.mapping
    name = mapping.preset if mapping is not None else found.name
    if name is None:
        assert mapping is not None
        return [({}, mapping)]
    changed = mapping.given() if mapping is not None else {}
    return [(part.where, RowMapping.model_validate({**part.mapping, **changed})) for part in PRESETS[name].parts]


def code_of(found: Found) -> Coded | None:
    """The function that changes a row before its mapping reads it; None without one."""
    name = found.mapping.preset if found.mapping is not None else found.name
    code = PRESETS[name].code if name is not None and name in PRESETS else None
    return CODED[code] if code is not None else None


def columns_read(found: Found, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns of ``rows`` that a format reads."""
    if found.mapping is None and found.name in FORMATS:
        return set(FORMATS[found.name].columns)
    read: set[str] = set()
    for where, mapping in parts_of(found):
        mapped = MappedRows(mapping, code=code_of(found))
        for row in rows:
            read |= mapped.columns(row) | {key.split(".")[0] for key in where}
    return read


def _holds(value: Any, wanted: Any) -> bool:
    return value in (None, "") if wanted is None else value is not None and spelled(value) == spelled(wanted)


def _unknown(error: RowError, rows: Sequence[Row]) -> InputError:
    """An error for rows of an unknown format, with their columns and a line for the recipe."""
    row = rows[0]
    hint = None
    if error.message.startswith("no known format"):
        nearest = nearest_presets(row.value)
        near = f"nearest: {nearest}; " if nearest else ""
        line = line_to_write([one.value for one in rows])
        hint = f"{near}say what the columns are, such as `{line}` (or an own function, package.module:function)"
    return InputError(Problem(error.message, file=row.origin.source, line=row.origin.line, key=error.field, hint=hint))
