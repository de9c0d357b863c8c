"""The lists of mistakes in ``tests/mutants`` fit the code: each changes exactly one place, and names tests that
exist."""

from __future__ import annotations

import ast
import importlib.util
import sys
from types import ModuleType

import pytest
import yaml

from tests.mutants import drawn
from tests.mutants.operators import mutations
from tests.support.root import ROOT

LISTS = sorted(path.stem for path in (ROOT / "tests" / "mutants").glob("*.yaml") if path.stem != "equivalent")


def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_run", ROOT / "tests" / "mutants" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LISTS)
def test_each_changes_one_place_and_leaves_python(name: str) -> None:
    for mutant in runner().mutants(name):
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        broken = mutant.broken(text)
        assert broken != text
        ast.parse(broken)


@pytest.mark.parametrize("name", LISTS)
def test_the_tests_exist(name: str) -> None:
    named = {test.split("::")[0] for mutant in runner().mutants(name) for test in mutant.tests}
    assert not {test for test in named if not (ROOT / test).is_file()}


def test_what_is_drawn_is_another_program_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    one, again = (drawn.draw(30, seed=1) for _ in range(2))
    assert [(file, mutation.statements()) for file, mutation, _ in one] == [
        (file, mutation.statements()) for file, mutation, _ in again
    ]
    assert len({(file, mutation.lines[0]) for file, mutation, _ in one}) == 30
    for file, _, broken in one:
        sound = ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert ast.unparse(ast.parse(broken)) != sound


def test_what_is_said_to_change_nothing_is_still_in_the_code() -> None:
    """An explanation of code that has changed since explains nothing."""
    wanted = yaml.safe_load((ROOT / "tests" / "mutants" / "equivalent.yaml").read_text(encoding="utf-8"))
    assert len(wanted) == len({tuple(one[key] for key in ("file", "before", "after")) for one in wanted})
    for file in sorted({one["file"] for one in wanted}):
        found = {mutation.statements() for mutation in mutations(ast.parse((ROOT / file).read_text(encoding="utf-8")))}
        assert [one for one in wanted if one["file"] == file and (one["before"], one["after"]) not in found] == []
