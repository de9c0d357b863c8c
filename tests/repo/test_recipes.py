"""Every shipped recipe loads and plans, says what it is for, and is in the reference manual's terms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.pipeline.plan import make_plan
from align.recipe.load import load_recipe, shipped_recipes
from align.recipe.reference import render
from align.recipe.refs import shipped_root

RECIPES = shipped_recipes()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_plan(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(path.stem)
    plan = make_plan(loaded, tmp_path / "runs")
    assert not plan.problems
    assert [stage.name for stage in plan.stages] == list(loaded.order)
    for stage in plan.stages:
        if stage.memory is not None:
            assert stage.memory > 0
            assert "unknown" not in {row.value for row in stage.rows}, "a shipped recipe plans without a network"
    assert not list(tmp_path.iterdir()), "a plan leaves nothing behind"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_explain_themselves(path: Path) -> None:
    """A comment first: what it is in one line, the command, the hardware, what it reproduces and where it departs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert re.match(r"# \S.{20,140}\.?\n#\n", comment)
    assert re.search(rf"align (run|sft|reward|dpo) .*{path.stem}", comment)
    assert "Hardware:" in comment
    assert re.search(r"[Rr]eproduces|ChatGLM-RLHF|quickstart|as in arXiv", comment)


def test_the_promised_recipes_are_there() -> None:
    assert {"quickstart", "sft", "rm", "dpo", "glm4_sft", "glm4_rm", "glm4_dpo", "qwen3_sft", "qwen3_dpo"} <= {
        path.stem for path in RECIPES
    }


def test_recipes_for_other_machines_say_which() -> None:
    for name, gpus in (("glm4_sft", 8), ("glm4_rm", 8), ("glm4_dpo", 8), ("qwen3_sft", 1), ("qwen3_dpo", 1)):
        hardware = load_recipe(name).recipe.hardware
        assert hardware is not None
        assert hardware.gpus == gpus


@pytest.mark.parametrize(("stage", "limit"), [("sft", 25_000), ("dpo", 30_000)])
def test_quickstart_trains_on_few_tokens(stage: str, limit: int) -> None:
    train = load_recipe("quickstart").recipe.stages[stage].train  # type: ignore[attr-defined]
    assert train.max_steps * train.tokens_per_step <= limit


def test_the_reference_manual_is_current() -> None:
    """After a change of the schema: python -m align.recipe.reference docs/recipes.md."""
    assert (shipped_root() / "docs" / "recipes.md").read_text(encoding="utf-8") == render()
