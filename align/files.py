"""Writing files and folders atomically and durably. All results are written through this module.

A file or folder is written under a hidden temporary name beside its final name (so that a rename never crosses file
systems), flushed to disk, and renamed. What a crash leaves behind is put right by :func:`recover`. A failed write
raises :class:`EnvironmentFault` and removes its own temporary file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import AlignError, EnvironmentFault, InputError

fault: Callable[[str, Path], None] | None = None
"""For tests that inject faults: called before every operation (``write fsync rename remove``) with its name and
path."""

_log = logging.getLogger("align")
_TEMPORARY = re.compile(r"\.tmp-(\d+)-[0-9a-f]{32}")
_OLD = ".old-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXT = re.compile(
    r"No space left|os error (28|122)\b|disk (is )?full|[Dd]isk quota|requested and \d+ written|file write"
    r" failed|unexpected pos \d+ vs"
)
_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENODEV,
    errno.EMFILE,
    errno.ENFILE,
}
_live: set[str] = set()
"""Temporary names that this process is writing now. Other names with its pid were left by an earlier process with the
same pid."""


def _point(operation: str, path: Path) -> None:
    if fault is not None:
        fault(operation, path)


def free_space(path: Path) -> int:
    """Bytes that may still be written to the file system of ``path``, which need not exist yet."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def free_space_or_raise(path: Path, needed: int) -> None:
    """Raise :class:`EnvironmentFault` unless ``needed`` bytes fit on the file system of ``path``."""
    available = free_space(path)
    if needed > available:
        raise EnvironmentFault(f"{path}: not enough disk space: needs {needed:,} bytes, {available:,} available")


def fault_of(error: OSError, path: Path, needed: int | None = None) -> EnvironmentFault:
    """``error`` as a message for the user: the place, what failed, and the free space."""
    text = f"{path}: {error.strerror or error}"
    if error.errno in _FULL:
        text += f"; {f'needs {needed:,} bytes' if needed is not None else 'disk full'}, {free_space(path):,} available"
    return EnvironmentFault(text)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full. For some libraries (safetensors, torch, NumPy, SQLite) it is
    recognised by the text."""
    return getattr(error, "errno", None) in _FULL or bool(_FULL_TEXT.search(str(error)))


@contextmanager
def machine_faults(path: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn errors of the machine (disk full, read-only, no permission, I/O) into :class:`EnvironmentFault`; all others
    pass.

    ``path`` is named if the error names no file; ``needed`` returns the number of bytes to be written inside, if known.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        known = getattr(error, "errno", None) in _MACHINE
        if not known and not is_full(error):
            raise
        named = getattr(error, "filename", None)
        fault = error if isinstance(error, OSError) and known else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise fault_of(
            fault, Path(named) if isinstance(named, str) else path, None if needed is None else needed()
        ) from error


@contextmanager
def _writing(path: Path, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fault_of(error, path, needed) from error


# Writing


def temporary(parent: Path) -> Path:
    """A new hidden name in ``parent`` to write to and publish from. Creates nothing; what a crash leaves under the name
    is removed by :func:`clean_stale`."""
    name = f".tmp-{os.getpid()}-{uuid.uuid4().hex}"
    _live.add(name)
    return parent / name


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents (modes follow the umask); fine when it exists. Raises
    :class:`EnvironmentFault`."""
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8): after a crash it holds the old content or the new, never a part.

    Raises :class:`EnvironmentFault`, with the old content intact.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    tmp = temporary(path.parent)
    try:
        with _writing(path, len(payload)):
            _point("write", path)
            with tmp.open("xb") as handle:
                handle.write(payload)
                handle.flush()
                _point("fsync", path)
                os.fsync(handle.fileno())
            _rename(tmp, path)
            fsync_folder(path.parent)
    finally:
        discard(tmp)


def dump_json(value: Any) -> str:
    """``value`` as JSON text with sorted keys: equal values give equal bytes. NaN and infinity are refused
    (ValueError)."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """:func:`atomic_write` of :func:`dump_json`."""
    atomic_write(path, dump_json(value))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Replace ``path`` by a file that the block writes under the yielded name. The replacement happens at the end of
    the block, and not at all if it raises."""
    tmp = temporary(path.parent)
    try:
        with machine_faults(path):
            _point("write", path)
            yield tmp
            with tmp.open("rb") as handle:
                _point("fsync", path)
                os.fsync(handle.fileno())
        with _writing(path):
            _rename(tmp, path)
            fsync_folder(path.parent)
    finally:
        discard(tmp)


@contextmanager
def atomic_lines(path: Path) -> Iterator[Callable[[Any], None]]:
    """Replace ``path`` by lines of JSON without having them all in memory: call the yielded function with each value.

    The replacement happens at the end of the block, and not at all if it raises.
    """
    with atomic_file(path) as tmp, tmp.open("x", encoding="utf-8", newline="\n") as handle:
        yield lambda value: print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=handle)


def append_line(path: Path, value: Any) -> None:
    """Append ``value`` as one line of JSON with one write call. If the line does not fit on the disk, the part that was
    written is removed."""
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    with _writing(path, len(line)):
        _point("write", path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)


def publish_folder(tmp: Path, final: Path) -> None:
    """Make ``tmp`` visible as ``final``, in the same parent, after flushing all of it. An older ``final`` is replaced.

    The older one is moved aside first and removed last. A crash in between leaves it aside; :func:`recover` puts it
    back.
    """
    if tmp.parent != final.parent:
        raise ValueError(f"{tmp} and {final} are not in one folder, so one rename cannot publish")
    aside = final.with_name(_OLD + final.name)
    with _writing(final):
        fsync_tree(tmp)
        if final.exists():
            remove_folder(aside)
            _rename(final, aside)
        _rename(tmp, final)
        fsync_folder(final.parent)
    _live.discard(tmp.name)
    remove_folder(aside)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists, atomically: it is renamed to a temporary name, then deleted.

    A folder that is no longer needed must not stop the program. If something cannot be deleted now (such as a file
    still open on a network file system), that is a warning, and it stays under the hidden name until the next
    :func:`recover`.
    """
    if not path.exists():
        return
    tmp = temporary(path.parent)
    try:
        _rename(path, tmp)
    except OSError as error:
        _keep(path, error)
    else:
        _delete(tmp)


def _delete(tmp: Path) -> None:
    try:
        _point("remove", tmp)
        if tmp.is_dir() and not tmp.is_symlink():
            shutil.rmtree(tmp)
        else:
            tmp.unlink()
    except OSError as error:
        _keep(tmp, error)
    _live.discard(tmp.name)


def _keep(path: Path, error: OSError) -> None:
    _log.warning("cannot remove %s (%s); the next start tries again", path, error.strerror or error)


def discard(tmp: Path) -> None:
    """Delete a temporary file or folder that will not be published; fine when it is not there."""
    if os.path.lexists(tmp):  # does not raise even if the parent cannot be read
        _delete(tmp)
    _live.discard(tmp.name)


def _rename(source: Path, target: Path) -> None:
    _point("rename", target)
    os.replace(source, target)


def fsync_folder(path: Path) -> None:
    """Flush the names in a folder. On file systems that cannot flush folders nothing is done."""
    _point("fsync", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder under ``folder``, contents before the names that lead to them."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):
            path = Path(parent, name)
            _point("fsync", path)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(Path(parent))


# After a crash


def clean_stale(parent: Path) -> None:
    """Delete temporary files and folders in ``parent`` whose process is gone. Safe while other processes write
    there."""
    for path, pid in _temporaries(parent):
        mine = pid == os.getpid() and path.name not in _live
        if mine or not alive(pid):
            _delete(path)


def recover(parent: Path) -> None:
    """Undo what a crash left in ``parent``: put back folders that were moved aside, delete everything temporary.

    Only the process that has the run's lock may call it: it would delete the unfinished files of another process.
    """
    if not parent.is_dir():
        return
    with _writing(parent):
        for aside in sorted(parent.glob(f"{_OLD}*")):
            final = parent / aside.name.removeprefix(_OLD)
            if final.exists():
                remove_folder(aside)
            else:
                _rename(aside, final)
                fsync_folder(parent)
        for path, _ in _temporaries(parent):
            if path.name not in _live:
                _delete(path)


def _temporaries(parent: Path) -> list[tuple[Path, int]]:
    matches = [(path, _TEMPORARY.fullmatch(path.name)) for path in sorted(parent.glob(".tmp-*"))]
    return [(path, int(match[1])) for path, match in matches if match]


def alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Names and content


def safe_name(text: str) -> str:
    """``text``, if it may be the name of a file or folder: letters, digits, ``. _ -``, at most 64, not starting with a
    dot.

    Raises :class:`InputError`.
    """
    if not _NAME.fullmatch(text):
        raise InputError(
            f"{text[:80]!r} is not a name", hint="use 1 to 64 of A-Z a-z 0-9 . _ -, and begin with a letter or digit"
        )
    return text


def inside(root: Path, path: Path) -> Path:
    """``path``, if it lies under ``root`` once symbolic links are followed. Raises :class:`InputError`."""
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, a name that is too long, a loop of links
        raise InputError(f"{str(path)[:80]!r} is not a usable path: {error}") from error
    if not resolved.is_relative_to(root.resolve()):
        raise InputError(f"{str(path)[:80]!r} leads out of {root}")
    return path


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Hex sha256 of ``value`` as canonical JSON."""
    return hashlib.sha256(dump_json(value).encode("utf-8")).hexdigest()


def tree_files(folder: Path) -> dict[str, Path]:
    """The files under ``folder`` by relative POSIX path, sorted. Links are followed; names that start with a dot are
    left out (version control and download caches keep their state there, models and data do not)."""
    found: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(parent, name)
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def digest_tree(folder: Path) -> str:
    """Hex sha256 over the relative paths and contents of :func:`tree_files`."""
    return digest_json({name: sha256_file(path) for name, path in tree_files(folder).items()})


def digest_path(path: Path) -> str:
    """Content digest of a file or a folder."""
    return digest_tree(path) if path.is_dir() else sha256_file(path)
