"""What is kept on disk to be read again, with a note of what was written: nothing is taken back without comparing it
with its note.

A file's note lies beside it: its sha256, and the digest of all that it follows from. A folder's note is a file in it:
the sha256 of every other. Notes are written last. So what has no note is not finished and simply not there, and so is
what belongs to other settings. What is there and not as it was written is damaged: that is told in one line, and
whoever wanted it makes it again.
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
    """The parts of one piece of work, numbered from 0, in ``folder``: a run that was killed finds them again and goes
    on with the next.

    Args:
        folder: made when the first part is kept.
        name: what the files are called: ``NAME-00000.SUFFIX``.
        suffix: of the parts, without its dot.
        key: JSON values; everything that the parts follow from.
    """

    def __init__(self, folder: Path, name: str, suffix: str, key: Mapping[str, Any]) -> None:
        self._folder = folder
        self._name = name
        self._suffix = suffix
        self._key = files.digest_json(key)

    def path(self, number: int) -> Path:
        """Where a part is, or will be."""
        return self._folder / f"{self._name}-{number:05d}.{self._suffix}"

    def find(self, number: int) -> Path | None:
        """The file of a part; None when there is none that belongs to this work and is as it was written."""
        return find(self.path(number), self._key)

    def keep(self, number: int, content: bytes) -> Path:
        """Write a part. Raises EnvironmentFault when the disk is full or cannot be written; an earlier part is then
        still whole."""
        return keep(self.path(number), content, self._key)


def keep(path: Path, content: bytes, key: str = "") -> Path:
    """Write one file and its note. ``key`` stands for all that it follows from, as far as its name does not.

    Raises EnvironmentFault when the disk is full or cannot be written; what was there before is then still whole.
    """
    files.make_folder(path.parent)
    files.atomic_write(path, content)
    files.write_json(_note(path), {"key": key, "sha256": files.sha256_file(path)})
    return path


def find(path: Path, key: str = "") -> Path | None:
    """``path``, if it was kept under ``key`` and is as it was written; else None, with a line when it is damaged."""
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


def seal(folder: Path) -> None:
    """Write the note of a finished folder: the sha256 of every file in it."""
    files.write_json(folder / MANIFEST, {name: files.sha256_file(folder / name) for name in _content(folder)})


def damage(
    folder: Path, required: Sequence[str] = (), *, only: Callable[[str], bool] = lambda name: True
) -> list[Problem]:
    """How a folder differs from its note; empty when it is as it was sealed, and has the ``required`` files.

    ``only`` says which files are looked at.
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
