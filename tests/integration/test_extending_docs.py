"""The stage of docs/extending.md and the recipe of the README, taken from there and used from a user's folder."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from align.errors import InputError
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from tests.support.root import ROOT


def example(name: str) -> str:
    found = re.search(
        rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```",
        (ROOT / "docs" / "extending.md").read_text(),
        re.DOTALL,
    )
    assert found, f"docs/extending.md has no example {name}"
    return found.group(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my_stages.py", "short.yaml"):
        (tmp_path / name).write_text(example(name))
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_stage_runs_once_and_its_rows_are_an_artefact(folder: Path) -> None:
    run = run_recipe(load_recipe("short.yaml"), console=Console(file=io.StringIO()))
    assert run.ran == ("short",)
    lines = (run.folder / "stages" / "short" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    assert run.summaries["short"]["kept"] == len(kept) > 10
    assert all(len(row["prompt"][-1]["content"]) <= 40 for row in kept)

    again = run_recipe(load_recipe("short.yaml"), console=Console(file=io.StringIO()))
    assert again.up_to_date == ("short",)
    fewer = run_recipe(
        load_recipe("short.yaml", ["stages.short.characters=20"]),
        console=Console(file=io.StringIO()),
        selection=Selection(replace=True),
    )
    assert fewer.ran == ("short",)
    assert 0 < fewer.summaries["short"]["kept"] < len(kept)


def test_its_schema_is_closed_like_a_built_in_one(folder: Path) -> None:
    recipe = folder / "short.yaml"
    recipe.write_text(recipe.read_text().replace("characters: 40", "character: 40"))
    with pytest.raises(InputError) as caught:
        load_recipe("short.yaml")
    assert "short.yaml:4:" in str(caught.value) and "characters" in str(caught.value)


def test_the_recipe_of_the_readme_is_valid(folder: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```yaml\n(name: .*?)```", readme, re.DOTALL)
    assert found
    (folder / "my-sft.yaml").write_text(found.group(1), encoding="utf-8")
    loaded = load_recipe("my-sft.yaml", ["stages.sft.train.learning_rate=2e-5"])
    assert loaded.order == ("sft",)
    assert loaded.recipe.stages["sft"].kind == "sft"
