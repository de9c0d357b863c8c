"""Recipes are checked, and help is shown, without torch: on any machine, at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "peft",
    "accelerate",
    "vllm",
    "trl",
    "pyarrow",
    "huggingface_hub",
    "gguf",
)


def heavy_after(code: str) -> set[str]:
    """Which heavy packages are loaded once ``code`` has run in a fresh interpreter."""
    command = f"{code}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split("\n")[-2].split())


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "recipe.schema",
        "recipe.load",
        "recipe.manuals.recipe_keys",
        "sizing.needs",
        "sizing.shapes",
        "model_families",
        "cli",
        "doctor",
        "files",
        "signals",
    ],
)
def test_these_import_nothing_heavy(module: str) -> None:
    assert not heavy_after(f"import align.{module}")


def test_checking_a_recipe_loads_nothing_heavy() -> None:
    assert not heavy_after(
        "from align.recipe.load import load_recipe\nload_recipe('quickstart')\nload_recipe('trl_grpo')"
    )


@pytest.mark.parametrize("module", ["pipeline.runner", "planning.plan", "report.html.page", "report.text.summary"])
def test_runner_plan_and_report_import_no_torch(module: str) -> None:
    """They import it when they need it: a run whose stages are all up to date starts at once."""
    assert not heavy_after(f"import align.{module}") & {"torch", "transformers", "vllm", "datasets"}


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward.run", "ppo.run", "self_contrast.run"])
def test_stages_import_peft_only_where_adapters_are(stage: str) -> None:
    """It takes seconds and more than 150 MB with what it imports."""
    assert "peft" not in heavy_after(f"import align.stages.{stage}")


def test_the_check_can_fail() -> None:
    assert heavy_after("import numpy") == {"numpy"}


def test_what_the_report_knows_of_each_kind_imports_no_torch() -> None:
    code = "from align.recipe.schema import BUILTIN_STAGES\nfrom align.report.views.view import View, view_of\n"
    code += "assert all(type(view_of(kind)) is not View for kind in BUILTIN_STAGES)"
    assert not heavy_after(code) & {"torch", "transformers", "vllm", "datasets"}
