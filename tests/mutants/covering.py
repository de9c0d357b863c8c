"""A pytest plugin: which test executes which lines of some files, and how long it takes.

pytest -p tests.mutants.covering --covering-of LIST --covering-to MAP [tests]

LIST holds one path a line, MAP gets one line of JSON for every test: its node id, its seconds, whether it passed, and
the lines of each file that it executed, in this process and in those that it started with ``python`` (through
``sitecustomize``, see ``CHILD``). Lines that run at import belong to no test.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

FILES, INTO = "MUTANTS_TRACED_FILES", "MUTANTS_TRACED_INTO"
"""Environment of child processes: the traced files, and a folder in which each child leaves what it executed."""
CHILD = """
import sys
sys.path.insert(0, {folder!r})
import covering
covering.trace_child()
sys.path.pop(0)
"""


class Tracer:
    """Remembers executed lines of ``files``, by the path that they were compiled from."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = frozenset(files)
        self.seen: set[tuple[str, int]] = set()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        """For sys.settrace: looks into the frames of traced files only."""
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self

    def start(self) -> None:
        """In this thread and in those that are started from now on."""
        threading.settrace(self)
        sys.settrace(self)

    def stop(self) -> dict[str, list[int]]:
        """The lines seen since the last stop, by file."""
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        found: dict[str, list[int]] = {}
        for file, line in sorted(self.seen):
            found.setdefault(file, []).append(line)
        self.seen = set()
        return found


def trace_child() -> None:
    """Called at the start of a Python process that a traced test starts: it writes at its end what it executed, unless
    it is killed."""
    import atexit

    tracer = Tracer(os.environ[FILES].split(os.pathsep))
    into = Path(os.environ[INTO])

    def leave() -> None:
        found = tracer.stop()
        if into.is_dir():
            (into / f"{os.getpid()}-{time.monotonic_ns()}.json").write_text(json.dumps(found))

    atexit.register(leave)
    tracer.start()


class Covering:
    """Traces the tests of a session and appends to the map."""

    def __init__(self, files: list[str], to: Path) -> None:
        self.tracer, self.to = Tracer(files), to
        self.children = Path(tempfile.mkdtemp(prefix="covering-"))
        hook = Path(tempfile.mkdtemp(prefix="covering-site-"))
        (hook / "sitecustomize.py").write_text(CHILD.format(folder=str(Path(__file__).parent)))
        os.environ |= {FILES: os.pathsep.join(files), INTO: str(self.children)}
        os.environ["PYTHONPATH"] = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """One test with its fixtures."""
        self.passed = True
        began = time.perf_counter()
        self.tracer.start()
        try:
            return (yield)
        finally:
            found = self.tracer.stop()
            seconds = time.perf_counter() - began
            for left in self.children.iterdir():
                for file, lines in json.loads(left.read_text()).items():
                    found[file] = sorted({*found.get(file, []), *lines})
                left.unlink()
            with self.to.open("a", encoding="utf-8") as out:
                line = {"test": item.nodeid, "seconds": round(seconds, 3), "passed": self.passed, "lines": found}
                out.write(json.dumps(line) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails or is skipped without a mutant says nothing about one."""
        self.passed &= report.passed


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which files, and where the map goes."""
    parser.addoption("--covering-of", type=Path)
    parser.addoption("--covering-to", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """Only where asked for."""
    if files := config.getoption("--covering-of"):
        paths = [str(Path(line).resolve()) for line in files.read_text().splitlines()]
        config.pluginmanager.register(Covering(paths, config.getoption("--covering-to")))
