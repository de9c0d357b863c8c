"""Durable writes: whatever fails, wherever, the old content or the new is there, and nothing
else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align import files
from align.errors import EnvironmentFault, InputError


class Crash(BaseException):
    """Ends the process, as far as the code under test can tell."""


def at(n: int, error: BaseException) -> Callable[[str, Path], None]:
    """A fault at the n-th operation, counted from 1."""
    seen = 0

    def fault(operation: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == n:
            raise error

    return fault


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def folder_with(path: Path, text: str) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "a.txt").write_text(text)
    return path


def test_a_write_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    """The mode follows the umask; blanks and Chinese in paths are no problem."""
    target = tmp_path / "für 甲" / "a b.txt"
    files.make_folder(target.parent)
    before = os.umask(0o027)
    try:
        files.atomic_write(target, "old")
        files.atomic_write(target, "neu ü")
    finally:
        os.umask(before)
    assert target.read_bytes() == "neu ü".encode()
    assert target.stat().st_mode & 0o777 == 0o640
    assert hidden(target.parent) == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_full_disk_keeps_the_old_content_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Exit 3 with bytes needed and available; own temporary file deleted; the previous content kept."""
    target = tmp_path / "a.json"
    files.write_json(target, {"step": 1})
    monkeypatch.setattr(files, "fault", at(n, disk_full()))
    with pytest.raises(
        EnvironmentFault, match=r"a\.json: No space left on device; needs 17 bytes, [\d,]+ available"
    ) as caught:
        files.write_json(target, {"step": 22})
    assert caught.value.exit_code == 3
    assert target.read_text() == '{\n  "step": 1\n}\n'
    assert hidden(tmp_path) == []


def test_a_missing_parent_or_a_file_in_the_way_is_a_fault_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "missing" / "a", tmp_path / "file" / "a"):
        with pytest.raises(EnvironmentFault, match=str(target.parent)):
            files.atomic_write(target, "x")
    with pytest.raises(EnvironmentFault, match="file"):
        files.make_folder(tmp_path / "file" / "sub")


def test_json_has_one_form_and_no_nan(tmp_path: Path) -> None:
    assert files.dump_json({"b": 1, "a": "ü"}) == files.dump_json({"a": "ü", "b": 1}) == '{\n  "a": "ü",\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk takes only half of a line, that half is taken back."""
    log = tmp_path / "metrics.jsonl"
    files.append_line(log, {"step": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(EnvironmentFault, match="No space left"):
        files.append_line(log, {"step": 2})
    monkeypatch.setattr(os, "write", real)
    files.append_line(log, {"step": 3})
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_lines_are_written_one_by_one_and_appear_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays whole until the last line, whatever goes wrong before it, and no temporary file is left."""
    path = tmp_path / "rows.jsonl"
    with files.atomic_lines(path) as write:
        write({"a": "雪"})
        assert not path.exists()
        write([1])
    assert path.read_text(encoding="utf-8") == '{"a": "雪"}\n[1]\n'
    with pytest.raises(ZeroDivisionError), files.atomic_lines(path) as write:
        write({})
        raise ZeroDivisionError
    for operation in ("write", "fsync", "rename"):

        def fail(called: str, where: Path, operation: str = operation) -> None:
            if called == operation:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "fault", fail)
        with pytest.raises(EnvironmentFault, match="No space left"), files.atomic_lines(path) as write:
            write({})
        monkeypatch.setattr(files, "fault", None)
    with pytest.raises(ValueError, match="JSON compliant"), files.atomic_lines(path) as write:
        write(float("nan"))
    assert path.read_text(encoding="utf-8") == '{"a": "雪"}\n[1]\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_space_is_checked_beforehand(tmp_path: Path) -> None:
    """Names bytes needed and available, for a folder that does not exist yet as well."""
    files.free_space_or_raise(tmp_path / "not" / "yet", 1)
    with pytest.raises(EnvironmentFault, match=r"needs 1,000,000,000,000,000,000 bytes, [\d,]+ available"):
        files.free_space_or_raise(tmp_path / "not" / "yet", 10**18)


@pytest.mark.parametrize("old", [False, True])
def test_publishing_is_all_or_nothing_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """Crash before the n-th call, for every n; after recovery there is the old version or the new, whole."""
    seen: set[str] = set()
    for n in range(1, 100):
        parent = tmp_path / f"{n}"
        parent.mkdir()
        final = parent / "model"
        if old:
            folder_with(final, "old")
        tmp = folder_with(files.temporary(parent), "new")
        monkeypatch.setattr(files, "fault", at(n, Crash()))
        try:
            files.publish_folder(tmp, final)
            crashed = False
        except Crash:
            crashed = True
        monkeypatch.setattr(files, "fault", None)
        monkeypatch.setattr(files, "_live", set())  # what a new process would know
        files.recover(parent)
        assert [path.name for path in parent.iterdir()] in ([], ["model"])
        text = (final / "sub" / "a.txt").read_text() if final.exists() else "nothing"
        assert text in ({"old", "new"} if old else {"nothing", "new"})
        seen.add(text)
        if not crashed:
            assert text == "new"
            break
    # Fsync file, sub, folder; rename (two with an old one); fsync parent; rename and remove the old one
    assert n == (9 if old else 6)
    assert seen == ({"old", "new"} if old else {"nothing", "new"})


def test_a_failure_to_remove_the_old_version_does_not_undo_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed purge is a warning, and the next start purges."""
    final = folder_with(tmp_path / "model", "old")
    tmp = folder_with(files.temporary(tmp_path), "new")
    monkeypatch.setattr(
        files, "fault", lambda operation, path: (_ for _ in ()).throw(disk_full()) if operation == "remove" else None
    )
    files.publish_folder(tmp, final)
    assert "the next start tries again" in caplog.text
    assert (final / "sub" / "a.txt").read_text() == "new"
    assert len(hidden(tmp_path)) == 1
    monkeypatch.setattr(files, "fault", None)
    files.recover(tmp_path)
    assert hidden(tmp_path) == []


def test_publishing_across_folders_is_refused(tmp_path: Path) -> None:
    """A temporary folder elsewhere may be on another file system."""
    with pytest.raises(ValueError):
        files.publish_folder(folder_with(tmp_path / "elsewhere" / "x", ""), tmp_path / "x")


def test_only_temporaries_of_processes_that_are_gone_are_stale(tmp_path: Path) -> None:
    """Cleaned at the next start, also when a new process got the old one's id; a live process keeps its own."""
    gone = tmp_path / f".tmp-{dead_pid()}-{'0' * 32}"
    reused = tmp_path / f".tmp-{os.getpid()}-{'1' * 32}"
    others = tmp_path / f".tmp-{os.getppid()}-{'2' * 32}"
    mine = files.temporary(tmp_path)
    foreign = tmp_path / ".tmp-mine"
    for path in (gone, reused, others, mine):
        folder_with(path, "x")
    foreign.write_text("not ours")
    files.clean_stale(tmp_path)
    assert hidden(tmp_path) == sorted([foreign.name, others.name, mine.name])
    files.recover(tmp_path)
    assert hidden(tmp_path) == sorted([foreign.name, mine.name])
    files.discard(mine)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "..", ".", ".hidden", "a/b", "a\0b", "x" * 65, "x" * 300, "", "a b", "ä"]
)
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        files.safe_name(name)
    assert files.safe_name("sft-2.b_C") == "sft-2.b_C"


def test_paths_must_stay_inside(tmp_path: Path) -> None:
    """Also by way of a link, and without a traceback for paths that cannot exist."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "in").mkdir()
    assert files.inside(root, root / "in" / "new") == root / "in" / "new"
    for path in ("..", "out", "out/x", "in/../../x", "/etc/passwd", "a\0b"):
        with pytest.raises(InputError):
            files.inside(root, root / path)


def test_a_digest_follows_the_content_only(tmp_path: Path) -> None:
    """An edit that keeps size and time is seen; order of creation, hidden files and a loop of links are not."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, names in ((a, ("x", "y")), (b, ("y", "x"))):
        (folder / "sub").mkdir(parents=True)
        for name in names:
            (folder / "sub" / name).write_text(name)
    (b / ".git").mkdir()
    (b / ".git" / "HEAD").write_text("1")
    (b / "sub" / "loop").symlink_to(b)
    assert files.digest_tree(a) == files.digest_tree(b)
    stat = (a / "sub" / "x").stat()
    (a / "sub" / "x").write_text("z")
    os.utime(a / "sub" / "x", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.digest_tree(a) != files.digest_tree(b)
    (a / "sub" / "x").rename(a / "sub" / "w")
    renamed = files.digest_tree(a)
    (a / "sub" / "w").rename(a / "w")
    assert files.digest_tree(a) != renamed


def test_linked_files_are_read_through(tmp_path: Path) -> None:
    """The hub's cache holds links; a change behind one is a change."""
    blob = tmp_path / "blob"
    blob.write_text("1")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    before = files.digest_path(folder)
    blob.write_text("2")
    assert files.digest_path(folder) != before
