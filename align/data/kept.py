"""Parts of long work, kept as they are finished: a run that was killed finds them again and goes on with the next one.

A part is one file, written at once, and beside it a note with its sha256 and with the digest of all that it follows from. The note is
written last. So a part without its note, one that was changed since, and one of other settings are all simply not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align import files


class Kept:
    """The parts of one piece of work, numbered from 0, in ``folder``.

    Args:
        folder: made when the first part is kept.
        name: what the files are called: ``NAME-00000.SUFFIX``.
        suffix: of the parts, without its dot.
        key: JSON values; everything that the parts follow from.
    """

    def __init__(self, folder: Path, name: str, suffix: str, key: Mapping[str, Any]) -> None:
        self._folder, self._name, self._suffix = folder, name, suffix
        self._key = files.digest_json(key)

    def path(self, number: int) -> Path:
        """Where a part is, or will be."""
        return self._folder / f"{self._name}-{number:05d}.{self._suffix}"

    def find(self, number: int) -> Path | None:
        """The file of a part; None when there is none that belongs to this work and is as it was written."""
        path = self.path(number)
        try:
            note = json.loads(_note(path).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("key") != self._key or not path.is_file():
            return None
        return path if files.sha256_file(path) == note.get("sha256") else None

    def keep(self, number: int, content: bytes) -> Path:
        """Write a part. Raises EnvironmentFault when the disk is full or cannot be written; an earlier part is then still whole."""
        path = self.path(number)
        files.make_folder(self._folder)
        files.atomic_write(path, content)
        files.write_json(_note(path), {"key": self._key, "sha256": files.sha256_file(path)})
        return path


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.note.json")
