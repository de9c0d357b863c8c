"""Parts of long work: found again when they are whole and of the same work, and never otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from align import files
from align import sealed as notes
from align.errors import EnvironmentFault
from align.sealed import PartStore


def test_a_part_is_found_by_the_same_work_only(tmp_path: Path) -> None:
    kept = PartStore(tmp_path / "work", "part", "bin", {"a": 1})
    assert kept.find(0) is None
    path = kept.keep(0, b"content")
    assert path == kept.path(0) == tmp_path / "work" / "part-00000.bin"
    assert PartStore(tmp_path / "work", "part", "bin", {"a": 1}).find(0) == path
    assert kept.find(1) is None
    assert PartStore(tmp_path / "work", "part", "bin", {"a": 2}).find(0) is None


@pytest.mark.parametrize("damage", ["content", "cut", "gone", "note", "note is a list", "no note"])
def test_a_damaged_part_is_not_there(tmp_path: Path, damage: str) -> None:
    kept = PartStore(tmp_path, "part", "bin", {})
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
        old, new = (PartStore(folder, "part", "bin", {"version": version}) for version in (1, 2))
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


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "note cut", "note empty"])
def test_damage_is_told_and_nothing_else_is(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """What was never finished, or belongs to other settings, is no damage."""
    path = tmp_path / "a.bin"
    assert notes.find(path) is None
    path.write_bytes(b"killed before the note")
    assert notes.find(path) is None
    assert notes.keep(path, b"content", "key") == path == notes.find(path, "key")
    assert notes.find(path, "other") is None
    assert caplog.text == ""
    changed = path.with_name("a.bin.note.json") if damage.startswith("note") else path
    if damage == "gone":
        path.unlink()
    else:
        content = changed.read_bytes()
        half = len(content) // 2
        changed.write_bytes(
            {"flip": bytes([content[0] ^ 1]) + content[1:], "cut": content[:half], "note cut": content[:half]}.get(
                damage, b""
            )
        )
    assert notes.find(path, "key") is None
    assert f"{path} is damaged: made again" in caplog.text


def test_a_sealed_folder_notices_every_change(tmp_path: Path) -> None:
    """Of any file in it, of the note itself, and of a file that the reader needs and nobody wrote."""
    for name in ("a", "b/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert "manifest.json: not readable" in str(notes.damage(tmp_path)[0])
    notes.seal(tmp_path)
    assert notes.damage(tmp_path, ["a"]) == []
    assert [problem.message for problem in notes.damage(tmp_path, ["d"])] == ["not in the manifest"]
    for name in ("a", "b/c", "manifest.json"):
        content = (tmp_path / name).read_bytes()
        for number in range(len(content)):
            (tmp_path / name).write_bytes(content[:number] + bytes([content[number] ^ 1]) + content[number + 1 :])
            assert notes.damage(tmp_path, ["a", "b/c"]), (name, number)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "b" / "c").unlink()
    assert [problem.message for problem in notes.damage(tmp_path)] == ["missing"]
    assert notes.damage(tmp_path, only=lambda name: name == "a") == []
