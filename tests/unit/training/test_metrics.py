"""``metrics.jsonl``: no step twice after a resume, and no half line. The line of progress."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.training import metrics
from align.training.metrics import MetricsLog


def log(path: Path, resumed_at: int) -> MetricsLog:
    return MetricsLog(path, resumed_at=resumed_at, report_to=[], run_name="r", config={})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = log(path, 0)
    for step in range(5):
        first.write(step, {"loss": 1.0})
    second = log(path, 2)
    second.write(3, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_trackers_get_every_step_and_are_told_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold back until then would be lost."""

    class Tracker:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.told.append((step, values))

        def finish(self) -> None:
            self.told.append("end")

    trackers = [Tracker(), Tracker()]
    monkeypatch.setattr(metrics, "_open_trackers", lambda *settings: trackers)
    one = log(tmp_path / "metrics.jsonl", 0)
    one.write(1, {"loss": 2.0})
    one.write(2, {"loss": 1.0})
    one.close()
    assert [tracker.told for tracker in trackers] == [[(1, {"loss": 2.0}), (2, {"loss": 1.0}), "end"]] * 2


def test_a_tracker_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it wants one, beside the metrics; it is told of the settings that are plain values, and is asked for before
    it is opened."""
    from accelerate import tracking

    opened: list[Any] = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, run_name: str, logging_dir: str | None = None) -> None:
            opened.append((run_name, logging_dir, logging_dir is not None and Path(logging_dir).is_dir()))

        def start(self) -> None:
            opened.append("start")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            opened.append(values)

    class Folder(Tracker):
        requires_logging_directory = True

    asked: list[str] = []
    monkeypatch.setattr(metrics, "require_tracker", asked.append)
    monkeypatch.setattr(tracking, "filter_trackers", lambda names, folder: names)
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {"one": Tracker, "two": Folder})
    config = {"learning_rate": 0.5, "lora": None, "report_to": ["one"], "layout": "tree"}
    MetricsLog(tmp_path / "metrics.jsonl", resumed_at=0, report_to=["one", "two"], run_name="r", config=config)
    assert asked == ["one", "two"]
    told = ["start", {"learning_rate": 0.5, "layout": "tree"}]
    assert opened == [("r", None, False), *told, ("r", str(tmp_path / "trackers"), True), *told]


@pytest.mark.parametrize("end", [b'{"step": 2, "lo', b"\x00\x00\x00", b'{"loss": 1}\n', b"[2]\n", b"\xff"])
def test_what_a_crash_left_of_a_line_is_dropped(tmp_path: Path, end: bytes) -> None:
    """The run goes on all the same."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + end)
    log(path, 9).write(2, {})
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_time_left_is_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 4 s, and 10 s from one to the next, because between them the run samples: 10 s for each step that is
    left."""
    text = lines(monkeypatch, total=5, seconds=10.0, steps=3)
    assert [line.rpartition("tokens/s  ")[2] for line in text] == ["16 s left", "30 s left", "20 s left"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.01, [100, 200, 300]), (6.0, [5, 10, 15]), (7.0, [5, 10, 15, 20]), (45.0, [1, 2, 3])]
)
def test_without_a_terminal_nobody_waits_long_for_a_line(
    monkeypatch: pytest.MonkeyPatch, seconds: float, shown: list[int]
) -> None:
    """Of 1,000 steps a line comes every 100, or every half minute."""
    text = lines(monkeypatch, total=1000, seconds=seconds, steps=shown[-1])
    assert [int(line.split()[2].partition("/")[0]) for line in text] == shown


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was() -> None:
    text = io.StringIO()
    bar = metrics.ProgressBar(Console(file=text, force_terminal=True, width=120), "sft", total=10, done=3)
    bar.close()
    assert " 3/10" in text.getvalue()


def lines(monkeypatch: pytest.MonkeyPatch, *, total: int, seconds: float, steps: int) -> list[str]:
    """What is printed of the first ``steps``, which take ``seconds`` each by the clock and 4 s by their own account."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    bar = metrics.ProgressBar(Console(file=text, width=120), "ppo", total=total, done=0)
    for step in range(1, steps + 1):
        now[0] += seconds
        bar.update(step, {"loss": 1.0, "tokens_per_second": 200.0, "step_seconds": 4.0})
    return text.getvalue().splitlines()
