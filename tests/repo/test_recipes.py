"""Every shipped recipe loads and plans, says what it is for, and is in the reference manual's terms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.data.chat.encoder import Encoder
from align.data.records import Message
from align.planning.plan import make_plan
from align.recipe.load import load_recipe, shipped_recipes
from align.recipe.manuals.recipe_keys import render
from align.recipe.reference_syntax import shipped_root
from align.recipe.schema import BUILTIN_STAGES, SftStage, Strict
from tests.support.tokenizers import mistral

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
            chained = any("what stage" in row.source for row in stage.rows)  # data that another stage is still to make
            assert chained or "unknown" not in {row.value for row in stage.rows}, (
                "a shipped recipe plans without a network"
            )
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
    names = {
        "quickstart",
        "sft",
        "dpo",
        "self_contrast",
        "glm4_sft",
        "glm4_dpo",
        "glm4_self_contrast",
        "mistral_self_contrast",
    }
    later = {"qwen3_sft", "qwen3_dpo", "reward", "glm4_reward", "rlhf_dpo", "ppo", "glm4_ppo", "chatglm_rlhf"}
    later |= {"glm4_full_sft", "glm4_full_dpo"}
    assert names | later <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", ["glm4_self_contrast", "mistral_self_contrast"])
def test_the_papers_settings_of_self_contrast(name: str) -> None:
    """arXiv 2404.00604: 32 samples at temperature 1, a quarter filtered, 16 negatives; DPO with beta 0.1 on 128
    prompts, one epoch."""
    stages = load_recipe(name).recipe.stages
    contrast, dpo, sft = stages["contrast"].model_dump(), stages["dpo"].model_dump(), stages["sft"].model_dump()
    assert (contrast["samples_per_prompt"], contrast["temperature"], contrast["top_p"]) == (32, 1.0, 1.0)
    assert (contrast["keep_least_similar"], contrast["negatives"], contrast["embedder"]) == (
        0.75,
        16,
        "WhereIsAI/UAE-Large-V1",
    )
    assert (dpo["beta"], dpo["train"]["batch_size"], dpo["train"]["epochs"], dpo["max_length"]) == (0.1, 128, 1, 2048)
    assert (sft["train_on"], sft["train"]["batch_size"], sft["max_length"], load_recipe(name).recipe.seed) == (
        "last",
        128,
        1024,
        42,
    )


def test_the_template_of_the_papers_mistral() -> None:
    """Zephyr's: an empty system message where there is none, headers on their own lines, every message closed by the
    end token."""
    encoder = Encoder(
        mistral(), chat_template=(shipped_root() / "recipes" / "templates" / "zephyr.jinja").read_text(encoding="utf-8")
    )
    turns: list[Message] = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    prompt = "<|system|>\n</s>\n<|user|>\nOne?</s>\n<|assistant|>\n"
    assert encoder.spell(encoder.encode_prompt(turns[:1])) == prompt
    encoded = encoder.encode([*turns, *turns])
    assert encoder.spell(encoded.ids[encoded.mask]) == "Two.</s>" * 2
    system: Message = {"role": "system", "content": "Be kind."}
    assert encoder.spell(encoder.encode_prompt([system, turns[0]])) == prompt.replace(
        "<|system|>\n", "<|system|>\nBe kind."
    )


def test_recipes_for_other_machines_say_which() -> None:
    eight = ("glm4_sft", "glm4_dpo", "glm4_reward", "glm4_ppo", "glm4_self_contrast")
    eight += ("glm4_full_sft", "glm4_full_dpo")
    for name, gpus in (*((name, 8) for name in eight), ("qwen3_sft", 1), ("qwen3_dpo", 1)):
        hardware = load_recipe(name).recipe.hardware
        assert hardware is not None
        assert hardware.gpus == gpus


@pytest.mark.parametrize(("stage", "limit"), [("sft", 25_000), ("dpo", 30_000)])
def test_quickstart_trains_on_few_tokens(stage: str, limit: int) -> None:
    train = load_recipe("quickstart").recipe.stages[stage].train  # type: ignore[attr-defined]
    assert train.max_steps * train.tokens_per_step <= limit


def test_the_reference_manual_is_current() -> None:
    """After a change of the schema: python -m align.recipe.manuals.recipe_keys docs/recipes.md."""
    assert (shipped_root() / "docs" / "recipes.md").read_text(encoding="utf-8") == render()


def test_the_blocks_that_a_new_kind_brings_are_in_the_manual(monkeypatch: pytest.MonkeyPatch) -> None:
    class Schedule(Strict):
        """When what is done."""

        rounds: int = 3
        """How often."""

    class Scheduled(SftStage):
        """A kind with a block of its own."""

        schedule: Schedule = Schedule()
        """When."""

    assert "## `schedule`" not in render()
    monkeypatch.setitem(BUILTIN_STAGES, "scheduled", Scheduled)
    page = render()
    assert "### `kind: scheduled`" in page and "[schedule](#schedule)" in page
    assert "## `schedule`\n\nWhen what is done.\n\n| key |" in page
