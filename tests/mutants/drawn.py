"""Mistakes drawn at random: which of them does some test notice?

python -m tests.mutants.drawn map --work FOLDER                # a copy of the repository, and which test executes which line
python -m tests.mutants.drawn run --work FOLDER [--seconds S]  # 200 mistakes, one after the other; again: goes on where
it stopped
python -m tests.mutants.drawn show --work FOLDER               # the score and what survived

FOLDER is outside of the repository. A mistake is tried on the tests that execute its line, fastest first, for S seconds
of them (all when S is 0); a test that takes ten times as long as it did has noticed it too. ``show`` leaves out what
``equivalent.yaml`` explains.

A mistake costs seconds, because its tests run in a fork of a process that has imported torch, transformers and the rest
already.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.mutants.operators import Mutation, mutations

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DRAWN_FROM = [
    *(
        "align/functional/*.py",
        "align/batching/*.py",
        "align/training/*.py",
        "align/rollout/sync.py",
        "align/stages/dpo.py",
    ),
    *("align/stages/reward/*.py", "align/stages/ppo/*.py", "align/models/adapters.py", "align/models/placement.py"),
    *("align/rollout/dispatch.py", "align/recipe/blocks/pair_losses.py", "align/recipe/blocks/estimators.py"),
    *(f"align/models/compute/{name}.py" for name in ("forward", "attention", "stream")),
    *(f"align/models/scalar/{name}.py" for name in ("heads", "critic")),
]
TESTS = ["tests/oracles", "tests/invariants", "tests/unit", "tests/integration"]
LEFT_OUT = (
    ".git",
    ".venv",
    "__pycache__",
    "runs",
    "out",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".sessions",
)
FIRST_FILES, FIRST_SECONDS = 3, 5.0
"""A first look is at this many test files only, and this long: most mistakes are found there, and collecting all files
takes seconds."""


@dataclass(frozen=True)
class Test:
    """A test that passes without a mistake."""

    id: str
    seconds: float

    @property
    def limit(self) -> float:
        """Seconds after which it hangs, on a machine that may be busy."""
        return 30 + 10 * self.seconds


def files() -> list[str]:
    """Where mistakes are drawn from."""
    return sorted(str(path) for pattern in DRAWN_FROM for path in Path().glob(pattern) if path.name != "__init__.py")


def draw(number: int, seed: int) -> list[tuple[str, Mutation, str]]:
    """(file, mistake, the file with it): at most one in a line, every line with the same chance. The same for the same
    sources."""
    modules = {file: ast.parse(Path(file).read_text(encoding="utf-8")) for file in files()}
    by_line: dict[tuple[str, int], list[Mutation]] = {}
    for file, module in modules.items():
        for mutation in mutations(module):
            by_line.setdefault((file, mutation.lines[0]), []).append(mutation)
    rng = random.Random(seed)
    lines = rng.sample(sorted(by_line), min(number, len(by_line)))
    chosen = [(file, rng.choice(by_line[file, line])) for file, line in lines]
    return [(file, mutation, mutation.source(modules[file])) for file, mutation in chosen]


class Map:
    """Which test executes which line."""

    def __init__(self, path: Path, unsound: set[str]) -> None:
        self._tests: dict[str, Test] = {}
        self._by_line: dict[tuple[str, int], set[str]] = {}
        self._by_file: dict[str, set[str]] = {}
        for text in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(text)
            if not one["passed"] or one["test"] in unsound:
                continue
            self._tests[one["test"]] = Test(one["test"], one["seconds"])
            for absolute, lines in one["lines"].items():
                file = os.path.relpath(absolute)
                self._by_file.setdefault(file, set()).add(one["test"])
                for line in lines:
                    self._by_line.setdefault((file, line), set()).add(one["test"])

    def tests(self, file: str, mutation: Mutation) -> list[Test]:
        """Those that execute the mistake, or its statement when none does; those of the file where it runs at import.

        Fastest first, but a test before the second case of another that is as fast: cases of one test notice the same
        mistakes.
        """
        statement = mutation.statement
        spans = [mutation.lines, (statement.lineno, statement.end_lineno or statement.lineno)]
        if isinstance(statement, ast.FunctionDef):  # a default or a decorator: what counts is who runs the function
            spans = [(statement.body[0].lineno, statement.end_lineno or statement.lineno)]
        found: set[str] = set()
        for first, last in spans:
            found = found or set().union(*(self._by_line.get((file, line), set()) for line in range(first, last + 1)))
        tests = sorted(
            (self._tests[test] for test in found or self._by_file.get(file, set())),
            key=lambda test: (test.seconds, test.id),
        )
        cases: Counter[str] = Counter()
        weighed = []
        for test in tests:
            cases[test.id.split("[")[0]] += 1
            weighed.append(((test.seconds + 0.05) * cases[test.id.split("[")[0]], test.id, test))
        return [test for *_, test in sorted(weighed)]


# Running tests in a fork


class _Chosen:
    """Runs some tests in a given order and tells how it goes, line by line."""

    def __init__(self, tests: Sequence[Test], to: int) -> None:
        self.order, self.to = [test.id for test in tests], to

    def tell(self, **news: Any) -> None:
        os.write(self.to, (json.dumps(news) + "\n").encode())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self.order if test in found]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(failed=f"collecting {report.nodeid}", why=str(report.longrepr)[-300:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.tell(failed=report.nodeid, why=str(getattr(crash, "message", ""))[:300])


def _child(tests: Sequence[Test], to: int, work: Path) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    log = os.open(work / "child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    sys.dont_write_bytecode = True
    chosen = _Chosen(tests, to)
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={work / 'tmp' / 'base'}"]
    code = int(pytest.main([*options, *dict.fromkeys(test.id.split("::")[0] for test in tests)], plugins=[chosen]))
    chosen.tell(ended=code)
    return code


def noticed_by(tests: Sequence[Test], work: Path) -> tuple[str, str] | None:
    """(test, why) of the first test that fails or hangs; None when all pass."""
    limits = {test.id: test.limit for test in tests}
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        code = 70
        try:
            code = _child(tests, write, work)
        finally:
            os._exit(code)
    os.close(write)
    running, limit, rest, found, ended = "collecting", 180.0, b"", None, False
    try:
        while found is None and not ended:
            ready, _, _ = select.select([read], [], [], limit)
            if not ready:
                return running, f"more than {limit:.0f} s"
            data = os.read(read, 65536)
            if not data:
                return running, "the process is gone"
            *lines, rest = (rest + data).split(b"\n")
            for news in map(json.loads, lines):
                if "started" in news:
                    running, limit = news["started"], limits[news["started"]]
                if "failed" in news and found is None:
                    found = news["failed"], news["why"]
                ended |= "ended" in news
    finally:
        os.close(read)
        time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def _preload() -> None:
    """Import what the tests import, except for what is of this repository; children import that anew."""
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *TESTS])
    for name in [name for name in sys.modules if name.split(".")[0] in ("align", "tests", "conftest", "benchmarks")]:
        if not name.startswith("tests.mutants") and name != "tests":
            del sys.modules[name]
    gc.collect()
    gc.freeze()


def _rounds(tests: list[Test], seconds: float) -> Iterator[list[Test]]:
    """The tests in two rounds: the quick ones of a few files, then the others as far as the time goes."""
    by_file: dict[str, list[Test]] = {}
    for test in tests:
        if (
            sum(other.seconds for other in by_file.get(test.id.split("::")[0], [])) + test.seconds
            <= FIRST_SECONDS / FIRST_FILES
        ):
            by_file.setdefault(test.id.split("::")[0], []).append(test)
    biggest = sorted(by_file.values(), key=lambda some: -len(some))[:FIRST_FILES]
    first = sorted((test for some in biggest for test in some), key=lambda test: test.seconds)
    if first:
        yield first
    used, rest = sum(test.seconds for test in first), []
    for test in tests:
        if test not in first and (not seconds or used + test.seconds <= seconds or not (first or rest)):
            rest.append(test)
            used += test.seconds
    if rest:
        yield rest


# Commands


def make_copy(work: Path) -> Path:
    """The working tree, in ``work/copy``."""
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    return copy


def in_copy(work: Path, *arguments: str) -> int:
    """Run this file, or another module, in the copy, and leave no trace of it elsewhere."""
    copy = work / "copy"
    (work / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(copy), "TMPDIR": str(work / "tmp"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=copy, env=environment, check=False).returncode


def make_map(work: Path, tests: Sequence[str]) -> int:
    """Copy, and run all tests once."""
    copy = make_copy(work)
    os.chdir(copy)
    (work / "files.txt").write_text("\n".join(files()))
    (work / "map.jsonl").unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.mutants.covering", "--covering-of", str(work / "files.txt")]
    return in_copy(work, "pytest", *options, "--covering-to", str(work / "map.jsonl"), *tests)


def serve(work: Path, number: int, seed: int, seconds: float, again: bool) -> int:
    """Try the mistakes that have no result yet; with ``again`` also those that survived a shorter time."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the file with the mistake is put right on the way out
    results, unsound_file = work / "results.jsonl", work / "unsound.txt"
    _preload()
    # This process's own part of the repository is the tool; ``tests`` itself is a folder, no module with code.
    unsound = set(unsound_file.read_text().splitlines()) if unsound_file.exists() else set()
    covering, sound_tests = Map(work / "map.jsonl", unsound), set[str]()
    known = {result["mutant"]: result for result in read_results(work)}
    for place, (file, mutation, broken) in enumerate(draw(number, seed)):
        before, after = mutation.statements()
        name = f"{file}:{mutation.lines[0]} {mutation.what}: {before} -> {after}"
        old = known.get(name)
        if old and (old["noticed_by"] or not again or old["complete"]):
            continue
        began, path = time.monotonic(), Path(file)
        sound = path.read_text(encoding="utf-8")
        while True:
            tests = covering.tests(file, mutation)
            tried, found = 0, None
            path.write_text(broken, encoding="utf-8")
            try:
                for some in _rounds(tests, seconds):
                    tried += len(some)
                    if found := noticed_by(some, work):
                        break
            finally:
                path.write_text(sound, encoding="utf-8")
            suspect = next(
                (test for test in tests if found and test.id == found[0] and test.id not in sound_tests), None
            )
            if suspect is None or noticed_by([suspect], work) is None:
                sound_tests |= {suspect.id} if suspect else set()
                break
            with unsound_file.open("a") as out:  # fails without a mistake as well: says nothing
                out.write(suspect.id + "\n")
            unsound.add(suspect.id)
            covering = Map(work / "map.jsonl", unsound)
        test, why = found or (None, "")
        result = {
            "mutant": name,
            "file": file,
            "line": mutation.lines[0],
            "what": mutation.what,
            "before": before,
            "after": after,
        }
        result |= {"noticed_by": test, "why": why, "complete": tried == len(tests), "tests": len(tests), "tried": tried}
        with results.open("a", encoding="utf-8") as out:
            out.write(json.dumps(result | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
        verdict = test or f"SURVIVED {tried} of {len(tests)} tests"
        print(f"{place + 1:4} {time.monotonic() - began:5.0f} s  {name[:150]!r}  {verdict}", flush=True)
    return 0


def read_results(work: Path) -> list[dict[str, Any]]:
    """The last result of each mutant."""
    path = work / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({one["mutant"]: one for one in map(json.loads, lines)}.values())


def equivalent() -> dict[tuple[str, str, str], str]:
    """Why a mistake changes nothing that could be tested, by file, statement and statement with the mistake."""
    listed = yaml.safe_load((HERE / "equivalent.yaml").read_text(encoding="utf-8")) or []
    return {(one["file"], one["before"].strip(), one["after"].strip()): one["why"] for one in listed}


def show(work: Path) -> int:
    """The score, and what survived."""
    results, explained = read_results(work), equivalent()
    lived = [one for one in results if not one["noticed_by"]]
    same = [one for one in lived if (one["file"], one["before"], one["after"]) in explained]
    for one in [one for one in lived if one not in same]:
        print(f"{one['file']}:{one['line']}  {one['what']}  ({one['tried']} of {one['tests']} tests)")
        print(f"  - {one['before']}\n  + {one['after']}")
    noticed = len(results) - len(lived)
    print(f"{len(results)} mistakes: {noticed} noticed, {len(same)} equivalent, {len(lived) - len(same)} survived")
    print(f"{(noticed + len(same)) / max(1, len(results)):.1%} noticed or equivalent")
    return 0


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["map", "run", "show", "serve"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--again", action="store_true", help="also those that survived without all their tests having been run"
    )
    parser.add_argument("tests", nargs="*", default=TESTS)
    given = parser.parse_intermixed_args()
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.command == "map":
        return make_map(work, given.tests)
    if given.command == "show":
        return show(work)
    if given.command == "serve":
        return serve(work, given.number, given.seed, given.seconds, given.again)
    options = ["--number", str(given.number), "--seed", str(given.seed), "--seconds", str(given.seconds)]
    return in_copy(
        work, "tests.mutants.drawn", "serve", "--work", str(work), *options, *(["--again"] if given.again else [])
    )


if __name__ == "__main__":
    sys.exit(main())
