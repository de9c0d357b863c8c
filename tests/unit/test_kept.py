"""Parts of long work: found again when they are whole and of the same work, and never otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from align import files
from align.data.kept import Kept
from align.errors import EnvironmentFault


def test_a_part_is_found_by_the_same_work_only(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "work", "part", "bin", {"a": 1})
    assert kept.find(0) is None
    path = kept.keep(0, b"content")
    assert path == kept.path(0) == tmp_path / "work" / "part-00000.bin"
    assert Kept(tmp_path / "work", "part", "bin", {"a": 1}).find(0) == path
    assert kept.find(1) is None
    assert Kept(tmp_path / "work", "part", "bin", {"a": 2}).find(0) is None


@pytest.mark.parametrize("damage", ["content", "cut", "gone", "note", "note is a list", "no note"])
def test_a_damaged_part_is_not_there(tmp_path: Path, damage: str) -> None:
    kept = Kept(tmp_path, "part", "bin", {})
    path = kept.keep(0, b"content")
    note = path.with_name("part-00000.bin.note.json")
    match damage:
        case "content":
            path.write_bytes(b"CONTENT")
        case "cut":
            path.write_bytes(b"conten")
        case "gone":
            path.unlink()
        case "note":
            note.write_text("{")
        case "note is a list":
            note.write_text("[]")
        case _:
            note.unlink()
    assert kept.find(0) is None
    kept.keep(0, b"content")
    assert kept.find(0) == path


def test_a_kill_at_any_point_leaves_a_whole_part_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the n-th file operation: afterwards the part is the old one, the new one, or not there."""
    for n in range(1, 20):
        folder = tmp_path / str(n)
        old, new = (Kept(folder, "part", "bin", {"version": version}) for version in (1, 2))
        old.keep(0, b"old")
        calls = iter(range(1, 100))

        def fail(operation: str, path: Path, calls: object = calls, n: int = n) -> None:
            if next(calls) == n:  # type: ignore[call-overload]
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "fault", fail)
        try:
            new.keep(0, b"new")
            finished = True
        except EnvironmentFault:
            finished = False
        monkeypatch.setattr(files, "fault", None)
        found = new.find(0)
        assert found is None or found.read_bytes() == b"new"
        if (old_found := old.find(0)) is not None:
            assert old_found.read_bytes() == b"old"
        if finished:
            assert found is not None
            return
    raise AssertionError("never finished")
