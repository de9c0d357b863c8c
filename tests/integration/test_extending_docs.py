"""The stages and the engine of docs/extending.md and the recipe of the README, taken from there and used from a user's folder."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.commands.evaluate import quick_recipe
from align.data.answer_file import read_answers
from align.errors import InputError
from align.models.load import load_encoder
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.planning.plan import make_plan
from align.preflight import checks
from align.publish.push import prepare
from align.recipe.load import load_recipe
from align.report.html.curves import curves
from align.report.html.page import render
from align.report.measures import changes, facts, headlines
from align.report.warnings import notes
from align.runs.record import read_run
from align.stages.shared import policy_samples
from tests.support.root import ROOT
from tests.support.saved import save_tiny
from tests.support.scripted import open_scripted, write_script


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


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task of the page, its rows, and two policies that answer from scripts."""
    for name in ("my_tasks.py", "contains.yaml"):
        (tmp_path / name).write_text(example(name))
    rows = [{"question": "Say tea.", "word": "tea"}, {"question": "Say sun.", "word": "sun"}]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for policy, answer, spread in (("one", "Tea it is.", 0.1), ("two", "Tea, sun.", 0.3)):
        save_tiny(tmp_path / policy, max_position_embeddings=512, initializer_range=spread)
        write_script(tmp_path / policy, [answer])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(policy_samples, "open_engine", open_scripted)
    return tmp_path


def test_a_task_of_ones_own_is_asked_graded_and_shown(asked: Path) -> None:
    assert checks.look(load_recipe("contains.yaml"), Path("runs")).inputs == []
    run = run_recipe(load_recipe("contains.yaml"), console=Console(file=io.StringIO(), width=160))
    (change, cut) = changes(read_run(run.folder).stage("compare"))
    assert (change.measure, change.better) == ("answers with the word", "up")
    assert (cut.measure, cut.better) == ("my_tasks:Contains, answers that never end", "down")
    assert change.before and change.after and (change.before.value, change.after.value) == (0.5, 1.0)
    said = list(read_answers(run.folder / "stages" / "compare"))
    assert {row.part for row in said} == {"my_tasks:Contains"}
    assert [(row.policy, row.scores["contains"]) for row in said] == [
        *(("./one", 1.0), ("./two", 1.0)),
        *(("./one", 0.0), ("./two", 1.0)),
    ]
    fewer = load_recipe("contains.yaml", ["stages.compare.tasks.0.exact_case=true"])
    run = run_recipe(fewer, console=Console(file=io.StringIO()), selection=Selection(replace=True))
    (change, _) = changes(read_run(run.folder).stage("compare"))
    assert change.before and change.after and (change.before.value, change.after.value) == (0.0, 0.5)


def test_without_its_module_the_report_does_not_say_which_way_is_better(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_recipe(load_recipe("contains.yaml"), console=Console(file=io.StringIO()))
    monkeypatch.setitem(sys.modules, "my_tasks", None)  # importing it fails
    (change, _) = changes(read_run(run.folder).stage("compare"))
    assert change.better is None and change.after and change.after.value == 1.0
    assert "answers with the word" in render(read_run(run.folder))


def test_a_task_of_ones_own_is_checked_like_a_built_in_one(asked: Path) -> None:
    recipe, module = asked / "contains.yaml", asked / "my_tasks.py"
    text = recipe.read_text()
    recipe.write_text(text.replace("max_new_tokens: 40", "exact_cases: true"))
    with pytest.raises(InputError, match=r"contains.yaml:7:\d+ stages.compare.tasks.0.exact_cases: unknown key"):
        load_recipe("contains.yaml")
    (asked / "other_tasks.py").write_text(module.read_text().replace("my_tasks:ContainsGrades", "other_tasks:Gone"))
    recipe.write_text(text.replace("my_tasks", "other_tasks"))
    with pytest.raises(InputError, match=r"contains.yaml:7:\d+ .*tasks.0.task: .*`implementation` that leads nowhere"):
        load_recipe("contains.yaml")
    recipe.write_text(text)
    (asked / "words.jsonl").write_text('{"question": "Say tea."}\n')
    (problem,) = checks.look(load_recipe("contains.yaml"), Path("runs")).inputs
    assert "words.jsonl:1" in str(problem) and "KeyError: 'word'" in str(problem)


def test_align_eval_takes_a_task_of_ones_own(asked: Path) -> None:
    told: dict[str, Any] = {"limit": None, "seed": 1, "max_new_tokens": None, "options": {}}
    made = quick_recipe(["./one"], tasks=["my_tasks:Contains"], data=["words.jsonl"], **told)
    assert made["stages"]["eval"]["tasks"] == [{"task": "my_tasks:Contains", "data": {"path": "words.jsonl"}}]


def test_an_engine_of_ones_own_samples_for_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("my_engine.py", "echo.yaml"):
        (tmp_path / name).write_text(example(name))
    encoder = load_encoder(save_tiny(tmp_path / "model"))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Say tea."}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = run_recipe(load_recipe("echo.yaml"), console=Console(file=io.StringIO()))
    rows = [json.loads(line) for line in (run.folder / "stages/echo/answers.jsonl").read_text().splitlines()]
    prompt = encoder.encode_prompt([{"role": "user", "content": "Say tea."}])
    assert {(row["text"], row["finished"]) for row in rows} == {(encoder.decode(prompt[:4]).strip(), True)}

    assert run_recipe(load_recipe("echo.yaml"), console=Console(file=io.StringIO())).up_to_date == ("echo",)
    module = tmp_path / "my_engine.py"
    module.write_text(module.read_text().replace("[:length]", "[1 : length + 1]"))
    changed = run_recipe(
        load_recipe("echo.yaml"), console=Console(file=io.StringIO()), selection=Selection(replace=True)
    )
    assert changed.ran == ("echo",), "it counts by its source"


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
