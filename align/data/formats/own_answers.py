"""Applying a user's own format: making records of rows with a function, and recognising whether they are labelled
answers that have to be compared within a prompt.

That is known only after the function was called. It is called once for each row, and again only after an error, since
it may have a state. Therefore its results for the first rows are kept until these rows are read. Labelled answers are
kept on disk, as rows in this package's format, until all rows have been read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align.data.formats.beside import bounded, id_of
from align.data.formats.format_names import FORM_KEYS
from align.data.formats.own_format import call
from align.data.formats.own_rows import row_of
from align.data.formats.wanted import Want, narrow
from align.data.mapping.labelled import key_of_prompt
from align.data.messages.forms import own_votes, record_of
from align.data.messages.messages import Note
from align.data.records import Record, Unpaired
from align.data.rows import LeftOut, Row
from align.data.strict_json import RowError
from align.recipe.reference_syntax import import_object

NO_RECORD = "dropped by the format"
_MIXED = (
    "is no answer with a label, as the first rows are: a source whose labelled answers are compared within a prompt"
    " gives nothing else; give the others by a function of their own, as a second source"
)

Choosing = Callable[[Iterator[Row], Callable[[Row], object]], Iterator[Row]]


class OwnFormat:
    """The function ``name`` (``package.module:function``); ``good`` says that the source keeps only answers labelled
    true."""

    def __init__(self, name: str, want: Want, note: Note, *, good: bool) -> None:
        self._name = name
        self._function = import_object(name)
        self._want: Want = want
        self._note = note
        self._good = good
        self.undecided = want == "preference"
        """Must the first rows still be checked? Only if labelled answers would have to be compared."""
        self._given: list[tuple[Row, list[Mapping[str, Any]]]] = []
        """Rows that were checked, with the function's result for each."""
        self._rows = self._answers = 0

    @property
    def parts(self) -> int:
        """Number of labelled answers made of the rows, if it differs from the number of rows."""
        return 0 if self._answers == self._rows else self._answers

    def gives_labels(self, rows: Sequence[Row]) -> bool:
        """Is the first record of these rows a labelled answer?"""
        self.undecided = False
        for row in rows:
            try:
                forms = call(self._function, self._name, row)
                self._given.append((row, forms))
                if forms:
                    return isinstance(self._record(forms[0], row, None), Unpaired)
            except RowError:
                continue  # its row is refused when its turn comes
        return False

    def records(self, row: Row) -> tuple[Record, ...]:
        """The records of a row, of the type that is wanted."""
        forms = self._forms(row)
        several = len(forms) > 1
        made = (self._record(form, row, i if several else None) for i, form in enumerate(forms, 1))
        return tuple(narrow(record, self._want, good=self._good) for record in made)

    def answers(self, rows: Iterator[Row], chosen: Choosing) -> Iterator[tuple[str, Row]]:
        """(key that answers to the same prompt share, labelled answer as a row in this package's format)."""
        found: list[Unpaired] = []

        def read(row: Row) -> None:
            found.clear()
            forms = self._forms(row)
            if not forms:
                raise LeftOut(NO_RECORD)
            for number, form in enumerate(forms, 1):
                record = self._record(form, row, number if len(forms) > 1 else None)
                if not isinstance(record, Unpaired):
                    raise RowError(_MIXED)
                found.append(record)

        for _ in chosen(rows, read):
            self._rows += 1
            self._answers += len(found)
            for record in found:
                yield key_of_prompt(record), Row(row_of(record, record.origin.source), record.origin)

    def _forms(self, row: Row) -> list[Mapping[str, Any]]:
        for number, (known, forms) in enumerate(self._given):
            if known == row:
                del self._given[number]
                return forms
        return call(self._function, self._name, row)

    def _record(self, form: Mapping[str, Any], row: Row, number: int | None) -> Record:
        id_column, id = id_of(form, row.origin)
        if id_column is None:
            id = id_of(row.value, row.origin)[1] + (f"#{number}" if number else "")
        judged = isinstance(form.get("label"), bool)  # a label of another type is an ordinary column of the row
        used = FORM_KEYS | own_votes(form) | {id_column} | ({"label", "completion"} if judged else set())
        fields = bounded({key: item for key, item in form.items() if key not in used})
        if not judged:
            form = {key: item for key, item in form.items() if key != "label"}
        return record_of(form, row.origin, id=id, fields=fields, note=self._note)
