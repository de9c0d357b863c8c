"""Files and folders that are saved with a note of their sha256, and are compared with the note before they are read
again.

A file's note is another file beside it, with its sha256 and a key, the digest of everything that it depends on. A
folder's note is a file in it, with the sha256 of every other file. Notes are written last. A file without a note is
unfinished, and counts as absent, as does one with another key. A file that differs from its note is damaged: a warning
is printed, and the caller makes it again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align import files
from align.errors import Problem

MANIFEST = "manifest.json"
"""A folder's note."""
_log = logging.getLogger("align")


class PartStore:
    """Numbered parts of a result in ``folder``, saved one by one. A run that was killed finds the finished parts and
    continues with the next.

    Args:
        folder: created when the first part is saved.
        name: of the files, ``NAME-00000.SUFFIX``.
        suffix: of the parts, without its dot.
        key: JSON values; everything that the parts depend on.
    """

    def __init__(self, folder: Path, name: str, suffix: str, key: Mapping[str, Any]) -> None:
        self._folder = folder
        self._name = name
        self._suffix = suffix
        self._key = files.digest_json(key)

    def path(self, number: int) -> Path:
        """Path of a part, which may not exist yet."""
        return self._folder / f"{self._name}-{number:05d}.{self._suffix}"

    def find(self, number: int) -> Path | None:
        """The file of a part; None when it does not exist, has another key, or is damaged."""
        return find(self.path(number), self._key)

    def keep(self, number: int, content: bytes) -> Path:
        """Write a part. Raises EnvironmentFault when the disk is full or cannot be written; an earlier version of the
        part is then kept."""
        return keep(self.path(number), content, self._key)


def keep(path: Path, content: bytes, key: str = "") -> Path:
    """Write a file and its note. ``key`` is a digest of everything that it depends on and that is not in its name.

    Raises EnvironmentFault when the disk is full or cannot be written; an earlier version is then kept.
    """
    files.make_folder(path.parent)
    files.atomic_write(path, content)
    files.write_json(_note(path), {"key": key, "sha256": files.sha256_file(path)})
    return path


def find(path: Path, key: str = "") -> Path | None:
    """``path`` if it was saved with ``key`` and is intact; else None, with a warning if it is damaged."""
    try:
        note = json.loads(_note(path).read_bytes())
        damaged = not isinstance(note, dict) or not {"key", "sha256"} <= note.keys()
    except FileNotFoundError:
        return None
    except ValueError:
        damaged = True
    if not damaged:
        if note["key"] != key:
            return None
        damaged = not path.is_file() or files.sha256_file(path) != note["sha256"]
    if damaged:
        _log.warning("%s is damaged: made again", path)
        return None
    return path


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.note.json")


# Folders


def seal(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the note of a finished folder: the sha256 of every file in it. Those that are ``known`` are not computed
    again."""
    content = {name: (known or {}).get(name) or files.sha256_file(folder / name) for name in _content(folder)}
    files.write_json(folder / MANIFEST, content)


def damage(
    folder: Path, required: Sequence[str] = (), *, only: Callable[[str], bool] = lambda name: True
) -> list[Problem]:
    """How a folder differs from its note; empty when it does not, and it has the ``required`` files.

    ``only`` selects the files to check.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError):
        return [Problem("not readable", file=str(folder / MANIFEST))]
    problems = [Problem("not in the manifest", file=str(folder / name)) for name in required if name not in manifest]
    for name, digest in ((name, digest) for name, digest in manifest.items() if only(name)):
        path = folder / name
        if not path.is_file():
            problems.append(Problem("missing", file=str(path)))
        elif (actual := files.sha256_file(path)) != digest:
            problems.append(Problem(f"sha256 is {actual[:12]}, manifest says {str(digest)[:12]}", file=str(path)))
    return problems


def _content(folder: Path) -> list[str]:
    return [name for name in files.tree_files(folder) if name != MANIFEST]
