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
from align.planning.plan import make_plan
from align.publish.push import prepare
from align.recipe.load import load_recipe
from align.report.html.curves import curves
from align.report.html.page import render
from align.report.measures import facts, headlines
from align.report.warnings import notes
from align.runs.record import read_run
from tests.support.root import ROOT
from tests.support.saved import save_tiny


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


@pytest.fixture
def averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the kind that says everything of itself has made a model."""
    for name in ("my_average.py", "average.yaml"):
        (tmp_path / name).write_text(example(name))
    save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "two", initializer_range=0.3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_third_partys_kind_has_plan_rows_headline_panels_and_a_model_card(averaged: Path) -> None:
    plan = make_plan(load_recipe("average.yaml"), here=True).stages[0]
    assert ("averages", "./one, ./two") in [(row.name, row.value) for row in plan.rows]

    run = run_recipe(load_recipe("average.yaml"), console=Console(file=io.StringIO()))
    stage = read_run(run.folder).stage("mean")
    (headline,) = headlines(stage)
    assert headline.title == "distance of the two, mean over all weights"
    assert headline.after and headline.after.value == run.summaries["mean"]["distance"] > 0
    (panel,) = curves(stage)
    assert panel.title == "Distance of the two"
    page = render(read_run(run.folder))
    assert "Distance of the two" in page and "distance of the two, mean over all weights" in page
    assert notes(stage) == []

    card = prepare(str(run.folder), averaged / "runs", to="me/average", stage=None).card
    assert "made by averaging weights" in card and "## How it was averaged" in card
    assert "| mean: distance of the two, mean over all weights |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_a_view_that_leads_nowhere_is_told_at_the_kind(averaged: Path) -> None:
    module = averaged / "my_average.py"
    module.write_text(module.read_text().replace('"my_average:AverageView"', '"my_average:Average_View"'))
    (averaged / "elsewhere.py").write_text(module.read_text().replace("my_average", "elsewhere"))
    recipe = averaged / "average.yaml"
    recipe.write_text(recipe.read_text().replace("my_average", "elsewhere"))
    with pytest.raises(InputError, match=r"average.yaml:4:\d+ .*`view` that leads nowhere: cannot import"):
        load_recipe("average.yaml")


def test_without_its_module_the_report_shows_the_numbers_as_they_are(averaged: Path) -> None:
    run = run_recipe(load_recipe("average.yaml"), console=Console(file=io.StringIO()))
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("my_average", "a_module_that_is_gone"))
    stage = read_run(run.folder).stage("mean")
    assert headlines(stage) == []
    assert [panel.title for panel in curves(stage)] == ["distance"]
    assert "distance" in dict(facts(stage))


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
