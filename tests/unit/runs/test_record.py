"""What a run's folder tells, whatever state it was left in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.locks import LOCK, OWNER, Owner, RunLock
from align.runs.record import find_run, list_runs, read_run
from tests.support.fake_run import FakeRun, event

CHAIN = {
    "dpo": {"kind": "dpo", "policy": "stage:sft", "data": ["stage:made", "x.jsonl"]},
    "sft": {"kind": "sft"},
    "made": {"kind": "label"},
}


@pytest.fixture
def fake(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path / "runs" / "r", CHAIN)


def owned_by(folder: Path, pid: int, host: str | None = None, start: str = "2026") -> None:
    """As a run that is there, or was killed, leaves its folder."""
    (folder / OWNER).write_text(json.dumps(asdict(Owner(pid, host or socket.gethostname(), start))))


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_stages_come_after_those_that_they_need(fake: FakeRun) -> None:
    """In lists and below other keys as well; a `stage:` that names none is no need."""
    run = read_run(fake.folder)
    assert [stage.name for stage in run.stages] == ["sft", "made", "dpo"]
    assert run.stage("dpo").needs == ("sft", "made")
    assert (run.state, run.seconds, run.last) == ("not run", 0.0, "2026-01-02T03:04:05+00:00")
    with pytest.raises(InputError, match="has no stage dop; did you mean `dpo`"):
        run.stage("dop")


def test_a_recipe_that_was_edited_into_a_circle_is_read(tmp_path: Path) -> None:
    stages = {
        "a": {"kind": "sft", "policy": "stage:b"},
        "b": {"kind": "sft", "policy": "stage:a"},
        "c": {"kind": "sft", "policy": "stage:c"},
    }
    run = read_run(FakeRun(tmp_path / "r", stages).folder)
    assert sorted(stage.name for stage in run.stages) == ["a", "b", "c"]


def test_a_finished_stage_has_its_result(fake: FakeRun) -> None:
    rows = [{"step": 2, "loss": 1.0}, {"step": 0, "eval/loss": 3.0}]
    files = {"report.json": '{"data": {}}', "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    fake.result("sft", files, summary={"steps": 2, "warnings": ["careful"]}, seconds=7.5)
    stage = read_run(fake.folder).stage("sft")
    assert (stage.state, stage.seconds, stage.summary["steps"], stage.warnings) == ("finished", 7.5, 2, ("careful",))
    assert [row["step"] for row in stage.metrics] == [0, 2]
    assert stage.place == stage.folder


@pytest.mark.parametrize("name", ["manifest.json", "report.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe\x00", None])
def test_a_damaged_file_leaves_its_part_empty(fake: FakeRun, name: str, damage: bytes | None) -> None:
    """`align verify` says what is damaged; reading never stops at it. Of a report there is what the manifest says in
    short."""
    folder = fake.result("sft", {"report.json": '{"a": 1}', "metrics.jsonl": '{"step": 1}\n'}, summary={"steps": 1})
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    stage = read_run(fake.folder).stage("sft")
    assert (stage.manifest is None) == (name == "manifest.json")
    assert ("a" not in stage.report) == (name == "report.json")
    assert stage.report.get("steps") == (None if name == "manifest.json" else 1)
    assert (stage.metrics == ()) == (name == "metrics.jsonl")
    assert stage.state == ("not run" if name == "manifest.json" else "finished")


def test_a_line_that_a_crash_cut_is_left_out(fake: FakeRun) -> None:
    """And a line separator inside a text, which Python's `splitlines` would cut at, is no end of a line."""
    fake.result("sft", {"x": "x"})
    fake.history([event("made", "started", reason="a\u2028b")])
    with (fake.folder / "history.jsonl").open("a") as history:
        history.write('{"stage": "made", "event": "fini')
    stage = read_run(fake.folder).stage("made")
    assert [line["event"] for line in stage.events] == ["started"]
    assert stage.state == "killed"


def test_an_unfinished_attempt_shows_its_own_metrics(fake: FakeRun) -> None:
    """Not those of the result that an earlier run left."""
    fake.result("sft", {"metrics.jsonl": '{"step": 9}\n'})
    work = fake.folder / "work" / "sft" / ("a" * 16)
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text('{"step": 1}\n{"step": "x"}\n{"st')
    fake.history([event("sft", "started"), event("sft", "interrupted", error="stopped")])
    stage = read_run(fake.folder).stage("sft")
    assert (stage.state, [row["step"] for row in stage.metrics], stage.place) == ("interrupted", [1], work)
    assert stage.manifest is not None, "the earlier result"


def test_a_run_runs_while_its_process_is_there(fake: FakeRun) -> None:
    """The owner of the lock tells a run from one that was killed."""
    fake.history([event("made", "started"), event("sft", "started")])

    def states() -> dict[str, str]:
        return {stage.name: stage.state for stage in read_run(fake.folder).stages}

    assert states() == {"sft": "killed", "made": "killed", "dpo": "not run"}
    with RunLock(fake.folder):
        assert states() == {"sft": "running", "made": "killed", "dpo": "not run"}
        assert read_run(fake.folder).state == "running"
    owned_by(fake.folder, dead_pid())
    assert read_run(fake.folder).state == "killed"
    owned_by(fake.folder, os.getpid(), start="2001-02-03T04:05:06+0000")
    assert read_run(fake.folder).state == "killed", "the number is another process's by now"
    owned_by(fake.folder, os.getpid(), "another-host")
    assert states()["sft"] == "running", "nobody here can tell"
    (fake.folder / OWNER).write_text("{")
    assert states()["sft"] == "running"


def test_the_worst_state_is_the_runs(fake: FakeRun) -> None:
    for name in CHAIN:
        fake.result(name, {"x": "x"})
    assert read_run(fake.folder).state == "finished"
    fake.history([event("made", "started"), event("made", "failed", error="ValueError: boo")])
    assert read_run(fake.folder).state == "failed"


def test_what_is_no_run_is_refused(tmp_path: Path, fake: FakeRun) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(InputError, match="is not a run folder"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"no run nothing; .*has: r"):
        find_run("nothing", runs)
    assert find_run("r", runs) == find_run(str(runs / "r"), tmp_path) == fake.folder
    for text in ("stages: [", "- a\n", "name: x\n", "stages: 3\n"):
        (fake.folder / "recipe.yaml").write_text(text)
        with pytest.raises(InputError):
            read_run(fake.folder)
    (fake.folder / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_run(fake.folder)


def test_a_name_that_leads_out_is_refused(fake: FakeRun) -> None:
    """A recipe in a downloaded run folder is somebody else's text."""
    (fake.folder / "recipe.yaml").write_text('stages:\n  "../../x": {kind: sft}\n')
    with pytest.raises(InputError, match="is not a name"):
        read_run(fake.folder)


def test_runs_are_listed_by_their_last_start(tmp_path: Path) -> None:
    for number, name in enumerate(("undated", "old", "new")):
        run = FakeRun(tmp_path / name, CHAIN)
        os.utime(run.folder / "run.json", (number + 1, number + 1))
    (tmp_path / "undated" / "run.json").unlink()
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "a-file").touch()
    assert [folder.name for folder in list_runs(tmp_path)] == ["new", "old", "undated"]
    assert list_runs(tmp_path / "missing") == []
    (tmp_path / "old" / LOCK).unlink()
    assert "old" not in {folder.name for folder in list_runs(tmp_path)}
