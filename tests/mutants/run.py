"""Mistakes made on purpose: each mutant is one small change to ``align`` that some test must turn red for.

python tests/mutants/run.py reward [part of a mutant's name]

Prints for every mutant of ``reward.yaml`` the first test that fails, or "no test fails", and ends with 1 when there is
one of those. Works on a copy of the repository. ``tests/repo/test_mutants.py`` keeps the lists true: what a mutant
changes is in the code exactly once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIED = ("align", "benchmarks", "data", "docs", "recipes", "tests", "Makefile", "README.md", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    find: str
    """What the file says, in one place; white space at the ends does not count."""
    replace: str
    tests: tuple[str, ...]
    """Where to look for the test that fails."""

    def broken(self, text: str) -> str:
        """The file's text with the mistake in it."""
        assert text.count(self.find) == 1, f"{self.name}: in {self.file} {text.count(self.find)} times"
        return text.replace(self.find, self.replace)


def mutants(name: str) -> list[Mutant]:
    """Those of a list; ``tests`` of the list are for every mutant that has none of its own."""
    listed = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return [
        Mutant(
            one["name"],
            one["file"],
            one["find"].strip(),
            one["replace"].strip(),
            tuple(one.get("tests", listed["tests"])),
        )
        for one in listed["mutants"]
    ]


def first_failure(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails there; None when all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ended.returncode not in (0, 1) or bool(ended.returncode) != bool(failed):
        raise SystemExit(f"pytest ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-2000:]}")
    return failed[0].split(" ", 1)[1] if failed else None


def main(name: str, part: str = "") -> int:
    """Try the mutants whose name has ``part`` in it."""
    chosen = [mutant for mutant in mutants(name) if part in mutant.name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for item in COPIED:
            source = ROOT / item
            if source.is_dir():
                shutil.copytree(source, folder / item, ignore=shutil.ignore_patterns("__pycache__", "out"))
            else:
                shutil.copy(source, folder / item)
        everywhere = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        if failure := first_failure(folder, everywhere):
            raise SystemExit(f"red before anything is broken: {failure}")
        missed = 0
        for mutant in chosen:
            file = folder / mutant.file
            sound = file.read_text(encoding="utf-8")
            file.write_text(mutant.broken(sound), encoding="utf-8")
            failure = first_failure(folder, mutant.tests)
            file.write_text(sound, encoding="utf-8")
            missed += failure is None
            print(f"{mutant.name}: {failure or 'no test fails'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
