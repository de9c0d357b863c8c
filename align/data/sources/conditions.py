"""Which rows of a source are used, and how often: ``explode``, ``where``, ``ignore`` and ``unique``, in this order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from align.data.leakage import prompt_digest, prompt_hash
from align.data.mapping.places import Place, find, place
from align.data.records import Record
from align.data.rows import LeftOut, Row
from align.data.strict_json import RowError, type_name
from align.recipe.schema import Condition, DataSource

EMPTY_LIST = "has nothing to explode"
REPEATED = "repeated: its {place} came before"
ASKED_AGAIN = "a prompt that came before: `unique: prompt` takes each once"


class RowPart(NamedTuple):
    """A row, or one of the rows that ``explode`` makes of it."""

    row: Row
    number: int | None = None
    """Number of the part, from 1; None for a whole row."""
    length: int = 0
    """Number of items that the list had."""


class Choice:
    """Applies the conditions of a source, and notes places and columns that no row has."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._where = [(place(name), wanted) for name, wanted in source.where.items()]
        self._seen: Counter[str] = Counter()
        self._columns: set[str] = set()
        self._prints: set[bytes] = set()
        self._prompts: set[int] = set()

    @property
    def chooses(self) -> bool:
        """Does the source have conditions? Usually not, and rows are then passed on unchanged."""
        source = self._source
        return bool(source.where or source.unique or source.explode or source.ignore)

    def parts(self, row: Row) -> Iterator[RowPart]:
        """The rows that ``explode`` makes of a row; without it the row itself.

        Raises :class:`RowError` when there is no list at its place, and :class:`LeftOut` when the list is empty.
        """
        at = self._source.explode
        if at is None:
            yield RowPart(row)
            return
        items = find(row.value, at)
        if not isinstance(items, list):
            raise RowError("missing" if items is None else f"expected a list, found {type_name(items)}", at)
        if not items:
            raise LeftOut(EMPTY_LIST)
        for number, item in enumerate(items, 1):
            yield RowPart(replace(row, value=_with(row.value, at, item)), number, len(items))

    def wanted(self, part: RowPart) -> bool:
        """Does ``where`` keep it? For a part that ``explode`` made, lists of the same length are compared at the item
        of this part."""
        kept = True
        for where, condition in self._where:
            value = find(part.row.value, where)
            if part.number is not None and isinstance(value, list) and not where.many and len(value) == part.length:
                value = value[part.number - 1]
            self._seen[where.text] += value is not None and value != []
            kept = kept and _meets(value, where, condition, part.row)
        return kept

    def refuses(self, row: Row) -> bool:
        """Do the row's own columns fail ``where``, before columns are joined to it? Such a row needs no counterpart in
        the other file."""
        own = [
            (where, wanted)
            for where, wanted in self._where
            if where.text in row.value or any(name in row.value for name in where.columns)
        ]
        if not own or self._source.explode is not None:
            return False
        try:
            return not all(_meets(find(row.value, where), where, wanted, row) for where, wanted in own)
        except RowError:
            return False

    def stripped(self, row: Row) -> Row:
        """The row without ignored columns."""
        ignored = self._source.ignore
        if not ignored:
            return row
        self._columns |= row.value.keys() & set(ignored)
        return replace(row, value={key: item for key, item in row.value.items() if key not in ignored})

    def once(self, row: Row, record: Record) -> None:
        """Raises :class:`LeftOut` when the value at the place of ``unique`` occurred before. Keeps 16 bytes for each
        record."""
        at = self._source.unique
        if at is None:
            return
        value = prompt_digest(record) if at == "prompt" else find(row.value, at)
        if value is None:
            raise RowError("missing: `unique` looks at it", at)
        digest = hashlib.sha256(
            json.dumps(value, sort_keys=True, default=str).encode("utf-8", "backslashreplace")
        ).digest()[:16]
        if digest in self._prints:
            raise LeftOut(REPEATED.format(place=at))
        self._prints.add(digest)

    def again(self, records: Sequence[Record]) -> int:
        """How many of a row's records ask what an earlier one asks. Keeps a number for each prompt."""
        found = 0
        for record in records:
            number = prompt_hash(record)
            found += number in self._prompts
            self._prompts.add(number)
        return found

    @property
    def absent(self) -> list[str]:
        """Places of ``where`` at which no row had a value."""
        return [where.text for where, condition in self._where if not self._seen[where.text] and condition is not None]

    @property
    def never_ignored(self) -> list[str]:
        """Columns of ``ignore`` that no row has."""
        return [name for name in self._source.ignore if name not in self._columns]


def _meets(value: Any, where: Place, wanted: Any, row: Row) -> bool:
    """Does the value at a place of a row meet a condition? For several values one is enough."""
    if _several(where, value):
        return any(matches(item, wanted) for item in value)
    return matches(value, wanted, cell=where.text in row.cells)


def matches(value: Any, wanted: Any, *, cell: bool = False) -> bool:
    """Does a value meet a condition: a value, a list of values, bounds, or values that it must not have? Null means no
    value.

    ``cell``: the value is a cell of a text table; an empty cell matches both null and the empty text.
    """
    if isinstance(wanted, (list, tuple)):
        return any(matches(value, one, cell=cell) for one in wanted)
    if isinstance(wanted, Condition):
        if "not_" in wanted.model_fields_set and matches(value, wanted.not_, cell=cell):
            return False
        if wanted.min is None and wanted.max is None:
            return True
        number = _number(value)
        return (
            number is not None
            and (wanted.min is None or number >= wanted.min)
            and (wanted.max is None or number <= wanted.max)
        )
    if value is None or wanted is None:
        return wanted is None and (value is None or (cell and not str(value).strip()))
    return _equal(value, wanted)


def _equal(value: Any, wanted: Any) -> bool:
    """Whether two values are equal as text, because a CSV cell is always text, or as numbers, because tables turn 3
    into 3.0."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    return bool(value == wanted) or str(value) == str(wanted)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _several(where: Place, value: Any) -> bool:
    return where.many and isinstance(value, list)


def _with(row: Mapping[str, Any], at: str, item: Any) -> dict[str, Any]:
    """A copy of the row with the value at a place replaced by ``item``."""
    if at in row or "." not in at:
        return {**row, at: item}
    for cut in range(len(at), 0, -1):
        head, rest = at[:cut], at[cut + 1 :]
        if at[cut : cut + 1] == "." and isinstance(row.get(head), Mapping):
            return {**row, head: _with(row[head], rest, item)}
    return {**row, at: item}
