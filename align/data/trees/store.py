"""Trees on disk: written as a stream, read as memory maps, checked before use.

A store is a folder of raw little-endian arrays and one JSON file. N trees have P parts in all (a trunk, then its
branches) and T tokens:

    ids.bin      int32 [T]      tokens, part after part
    mask.bin     uint8 [T]      1 where a token is a target; 0 in trunks
    parts.bin    int32 [P, 2]   tokens of each part, and the part of its tree that it continues; -1 for a trunk
    first.bin    int64 [N + 1]  where a tree's parts begin in parts.bin
    start.bin    int64 [N + 1]  where a tree's tokens begin in ids.bin
    longest.bin  int64 [N]      tokens of the longest path
    targets.bin  int64 [N]      trained tokens
    marks.bin    float64        of each branch: margin, share, and its grades (as many in every branch of a tree)
    mark.bin     int64 [N + 1]  where a tree's marks begin in marks.bin
    names.bin    UTF-8          record ids, one after the other
    name.bin     int64 [N + 1]  where a record id begins in names.bin
    meta.json                   version, counts, size and sha256 of each file, and a sha256 of itself

Nothing is pickled. Memory while writing does not grow with the number of trees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from align.data.tree import Branch, Tree
from align.errors import InputError, Problem
from align.files import digest_json, machine_faults, sha256_file, write_json

VERSION = 3
META = "meta.json"
_TYPES = {
    "ids": "<i4",
    "mask": "|u1",
    "parts": "<i4",
    "first": "<i8",
    "start": "<i8",
    "longest": "<i8",
    "targets": "<i8",
    "marks": "<f8",
    "mark": "<i8",
    "names": "|u1",
    "name": "<i8",
}
_BUFFER = 1 << 17


class DamagedStore(InputError):
    """Raised when a folder is not a store, is one of another version, or was changed since it was written."""


class _File:
    """An array file being written, with the size and digest of what was appended."""

    def __init__(self, handle: BinaryIO, dtype: str) -> None:
        self._handle = handle
        self._dtype = np.dtype(dtype)
        self._hash = hashlib.sha256()
        self.bytes = 0

    def append(self, values: npt.ArrayLike) -> None:
        data = np.ascontiguousarray(values, dtype=self._dtype).tobytes()
        self._handle.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


def write_store(folder: Path, trees: Iterable[Tree]) -> None:
    """Write ``trees`` into the existing, empty ``folder``; complete once this returns. A tree may have no branches (a
    bare prompt).

    Raises :class:`EnvironmentFault` when the disk is full or not writable, and whatever ``trees`` raises.
    """
    files: dict[str, _File] = {}
    with machine_faults(folder, lambda: sum(file.bytes for file in files.values())), ExitStack() as stack:
        files |= {
            name: _File(stack.enter_context((folder / f"{name}.bin").open("wb", buffering=_BUFFER)), dtype)
            for name, dtype in _TYPES.items()
        }
        count = 0
        for name in ("first", "start", "mark", "name"):
            files[name].append([0])
        for tree in trees:
            _append(files, tree)
            count += 1
    content = {"version": VERSION, "trees": count, "files": {name: file.entry() for name, file in files.items()}}
    write_json(folder / META, {**content, "sha256": digest_json(content)})


def _append(files: dict[str, _File], tree: Tree) -> None:
    parts = [len(tree.trunk), -1]
    for branch in tree.branches:
        parts += [len(branch.ids), branch.parent + 1]
    files["ids"].append(np.concatenate([tree.trunk, *(branch.ids for branch in tree.branches)]))
    masks = [np.zeros(len(tree.trunk), dtype=np.bool_), *(branch.mask for branch in tree.branches)]
    files["mask"].append(np.concatenate(masks))
    files["parts"].append(parts)
    files["longest"].append([tree.longest_path])
    files["targets"].append([sum(int(branch.mask.sum()) for branch in tree.branches)])
    files["marks"].append(
        [value for branch in tree.branches for value in (branch.margin, branch.share, *branch.grades)]
    )
    files["names"].append(np.frombuffer(tree.id.encode("utf-8", "backslashreplace"), dtype=np.uint8))
    files["first"].append([files["parts"].bytes // 8])
    files["start"].append([files["ids"].bytes // 4])
    files["mark"].append([files["marks"].bytes // 8])
    files["name"].append([files["names"].bytes])


class TreeStore:
    """A store as a sequence of trees. Their arrays are read-only views into the files.

    Raises :class:`DamagedStore` when the folder's description or the size of a file is not what was written;
    :meth:`verify` also compares all contents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._meta = _read_meta(folder)
        self._arrays = {name: _map(folder, name, self._meta["files"][name]["bytes"]) for name in _TYPES}
        self.sizes: npt.NDArray[np.int64] = np.diff(self._arrays["start"])
        """Unique tokens of each tree (trunk and all branches), int64 [N]."""
        self.path_lengths: npt.NDArray[np.int64] = self._arrays["longest"]
        """Tokens from the trunk's start to the end of the longest branch, int64 [N]."""
        self.targets: npt.NDArray[np.int64] = self._arrays["targets"]
        """Trained tokens of each tree, int64 [N]."""

    def __len__(self) -> int:
        return int(self._meta["trees"])

    def __getitem__(self, index: int) -> Tree:
        if not -len(self) <= index < len(self):
            raise IndexError(f"tree {index} of {len(self)}")
        index %= len(self)
        a = self._arrays
        parts = a["parts"].reshape(-1, 2)[a["first"][index] : a["first"][index + 1]]
        ends = (a["start"][index] + np.cumsum(parts[:, 0], dtype=np.int64)).tolist()
        spans = list(zip([int(a["start"][index]), *ends[:-1]], ends, strict=True))
        mask = a["mask"].view(np.bool_)
        begin, end = spans[0]
        return Tree(
            id=a["names"][a["name"][index] : a["name"][index + 1]].tobytes().decode("utf-8"),
            trunk=a["ids"][begin:end],
            branches=tuple(
                Branch(a["ids"][b:e], mask[b:e], margin, share, tuple(grades), parent - 1)
                for (b, e), parent, (margin, share, *grades) in zip(
                    spans[1:], parts[1:, 1].tolist(), self._marks(index, len(spans) - 1), strict=True
                )
            ),
        )

    def _marks(self, index: int, branches: int) -> list[list[float]]:
        """Margin, share and grades of each of a tree's branches."""
        found = self._arrays["marks"][self._arrays["mark"][index] : self._arrays["mark"][index + 1]].tolist()
        size = len(found) // max(branches, 1)
        return [found[b * size : (b + 1) * size] for b in range(branches)]

    def marks(self, grades: int = 0) -> npt.NDArray[np.float64]:
        """Margin, share and ``grades`` grades of every branch of every tree, float64 [branches, 2 + grades]."""
        found: npt.NDArray[np.float64] = self._arrays["marks"].reshape(-1, 2 + grades)
        return found

    def verify(self) -> None:
        """Compare every byte with what was written. Raises :class:`DamagedStore`."""
        for name, entry in self._meta["files"].items():
            path = self.folder / f"{name}.bin"
            if sha256_file(path) != entry["sha256"]:
                raise DamagedStore(Problem("has been changed since it was written", file=str(path)))

    @property
    def digest(self) -> str:
        """Hex sha256 of the whole content."""
        return str(self._meta["sha256"])


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or meta.pop("sha256") != (digest := digest_json(meta)):
            raise ValueError("does not match its own digest")
        if meta["version"] != VERSION:
            raise ValueError(f"is of version {meta['version']}, this is {VERSION}")
    except FileNotFoundError as error:
        raise DamagedStore(Problem("is not a store of trees, or an unfinished one", file=str(folder))) from error
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise DamagedStore(Problem(f"cannot be used: {error}", file=str(path))) from error
    return {**meta, "sha256": digest}


def _map(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    path = folder / f"{name}.bin"
    actual = path.stat().st_size if path.is_file() else -1
    if actual != size:
        raise DamagedStore(
            Problem(f"has {actual:,} bytes, not {size:,}" if actual >= 0 else "is missing", file=str(path))
        )
    dtype = np.dtype(_TYPES[name])
    if size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    with machine_faults(path):
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
