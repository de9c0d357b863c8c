"""Grouping rows: by a common key, or by the trees that they form.

They are kept in a temporary SQLite file, since a source may be larger than memory; only one group at a time is in
memory.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from align.data.records import Origin
from align.data.rows import Row
from align.errors import EnvironmentFault, Problem

CACHE_KIB = 16_384
"""Size of SQLite's cache in KiB."""
DEEPEST = 10_000
"""Largest number of messages from a tree's root to a leaf; a longer path is taken for a circle."""


def by_key(keyed: Iterable[tuple[str, Row]]) -> Iterator[list[Row]]:
    """Rows with the same key, in the order in which the keys first come. Raises EnvironmentFault when the disk is
    full."""
    with Kept() as kept:
        kept.fill((key, None, row) for key, row in keyed)
        kept.connection.execute("CREATE INDEX by_key ON rows (key)")
        for (key,) in kept.connection.execute("SELECT key FROM rows GROUP BY key ORDER BY MIN(number)"):
            found = kept.connection.execute(
                "SELECT source, line, value FROM rows WHERE key = ? ORDER BY number", (key,)
            )
            yield [Row(json.loads(value), Origin(source, line)) for source, line, value in found]


def by_parent(nodes: Iterable[tuple[str, str | None, Row]]) -> Iterator[tuple[list[Row] | None, list[Row]]]:
    """``(path, siblings)`` for rows ``(id, parent, row)``. Siblings answer the same message, and ``path`` leads from
    the root to that message; it is None if one of its messages is missing. Roots are not siblings."""
    with Kept() as kept:
        kept.fill(nodes)
        kept.connection.execute("CREATE INDEX by_id ON rows (key)")
        kept.connection.execute("CREATE INDEX by_parent ON rows (parent)")
        parents = kept.connection.execute(
            "SELECT parent, MIN(number) AS first FROM rows WHERE parent IS NOT NULL GROUP BY parent ORDER BY first"
        )
        for parent, _ in parents:
            siblings = [
                Row(json.loads(value), Origin(source, line))
                for source, line, value in kept.connection.execute(
                    "SELECT source, line, value FROM rows WHERE parent = ? ORDER BY number", (parent,)
                )
            ]
            yield _path(kept.connection, parent), siblings


def _path(connection: sqlite3.Connection, id: str) -> list[Row] | None:
    path: list[Row] = []
    wanted: str | None = id
    while wanted is not None:
        found = connection.execute("SELECT source, line, value, parent FROM rows WHERE key = ?", (wanted,)).fetchone()
        if found is None or len(path) > DEEPEST:
            return None
        path.append(Row(json.loads(found[2]), Origin(found[0], found[1])))
        wanted = found[3]
    return path[::-1]


class Kept:
    """Rows in a temporary file, which is removed at the end of the block."""

    def __enter__(self) -> Kept:
        self._folder = tempfile.TemporaryDirectory(prefix="align-rows-")
        self.connection = sqlite3.connect(Path(self._folder.name) / "rows.db", isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = OFF")
        self.connection.execute("PRAGMA synchronous = OFF")
        self.connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self.connection.execute(
            "CREATE TABLE rows (number INTEGER PRIMARY KEY, key TEXT, parent TEXT, source TEXT, line INTEGER, value"
            " TEXT)"
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()
        self._folder.cleanup()

    def fill(self, rows: Iterable[tuple[str, str | None, Row]]) -> None:
        """Store rows ``(key, parent, row)``. Raises EnvironmentFault when the disk is full."""
        insert = "INSERT INTO rows (key, parent, source, line, value) VALUES (?, ?, ?, ?, ?)"
        lines = (
            (key, parent, row.origin.source, row.origin.line, json.dumps(row.value, ensure_ascii=False, default=str))
            for key, parent, row in rows
        )
        try:
            with closing(self.connection.cursor()) as cursor:
                cursor.execute("BEGIN")
                cursor.executemany(insert, lines)
                cursor.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise EnvironmentFault(Problem(f"cannot keep rows on disk: {error}", file=tempfile.gettempdir())) from error

    def repeated(self) -> tuple[str, list[int]] | None:
        """A key that several rows have, with their lines; None when there is none."""
        self.connection.execute("CREATE INDEX by_key ON rows (key)")
        found = self.connection.execute("SELECT key FROM rows GROUP BY key HAVING COUNT(*) > 1 LIMIT 1").fetchone()
        if found is None:
            return None
        lines = self.connection.execute("SELECT line FROM rows WHERE key = ? ORDER BY number", found)
        return found[0], [line for (line,) in lines]

    def one(self, key: str) -> dict[str, Any] | None:
        """The row with this key, or None."""
        found = self.connection.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])
