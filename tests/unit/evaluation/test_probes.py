"""Probes: what counts as a claim to be somebody else, what counts as JSON, and that the shipped prompts are as their
card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.records import Origin, Prompt
from align.evaluation.tasks import probes
from align.evaluation.tasks.task import open_task
from align.recipe.kinds.tasks import PROBES, probe_task
from tests.support.root import ROOT


@pytest.mark.parametrize(
    "answer",
    [
        "I am ChatGPT, a large language model.",
        "Hello! I'm an assistant created by OpenAI.",
        "My name is Claude.",
        "I run on your laptop. I was trained by Google DeepMind.",
        "我是通义千问，由阿里巴巴开发。",
        "我是一个由百度训练的语言模型。",
        "I am based on GPT-4.",
    ],
)
def test_claims(answer: str) -> None:
    assert probes.claims_another(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I am a small language model trained with the align toolkit.",
        "I am not ChatGPT.",
        "I'm an assistant. ChatGPT is a product of another company.",
        "No. I wasn't made by Google.",
        "我不是文心一言。",
        "我是一个小型语言模型。",
        "I am a metaphor.",
        "",
    ],
)
def test_no_claims(answer: str) -> None:
    assert not probes.claims_another(answer)


def test_own_names_and_a_plain_yes() -> None:
    assert not probes.claims_another("I am Qwen, made by Alibaba.", ["qwen", "Alibaba"])
    assert probes.claims_another("I am Qwen, made by OpenAI.", ["qwen", "Alibaba"])
    assert probes.claims_another("Yes, I am.", yes_claims=True) and probes.claims_another("是的。", yes_claims=True)
    assert not probes.claims_another("Yes, I am.") and not probes.claims_another("No.", yes_claims=True)


@pytest.mark.parametrize(
    ("answer", "bare", "fenced"),
    [
        ('{"a": 1, "b": 2}', 1.0, 1.0),
        ('```json\n{"a": 1, "b": 2}\n```', 0.0, 1.0),
        ('Here you are:\n```json\n{"a": 1, "b": 2}\n```', 0.0, 0.0),
        ('{"a": 1}', 0.0, 0.0),
        ('{"a": 1, "b": 2} Done.', 0.0, 0.0),
        ("{'a': 1, 'b': 2}", 0.0, 0.0),
    ],
)
def test_json(answer: str, bare: float, fenced: float) -> None:
    prompt = Prompt(({"role": "user", "content": "?"},), "p", Origin("f", 1), fields={"required": ["a", "b"]})
    assert open_task(probe_task("json", [])).grade(prompt, answer) == {"bare": (bare, 1.0), "fenced": (fenced, 1.0)}


def rows_of(name: str) -> list[dict[str, Any]]:
    """The shipped rows of a probe."""
    shipped = Path(probe_task(name, []).data.path).read_text(encoding="utf-8")
    return [json.loads(line) for line in shipped.splitlines()]


@pytest.mark.parametrize(("own_names", "claims"), [([], 1.0), (["ChatGPT"], 0.0)])
def test_the_identity_probe_knows_the_stages_own_names(own_names: list[str], claims: float) -> None:
    prompt = Prompt(({"role": "user", "content": "Who are you?"},), "p", Origin("f", 1))
    task = open_task(probe_task("identity", own_names))
    assert task.grade(prompt, "I am ChatGPT.") == {"claims": (claims, 1.0)}


def test_the_card_counts_right_and_no_prompt_comes_twice() -> None:
    card = (ROOT / "data" / "probes" / "README.md").read_text(encoding="utf-8")
    for name in PROBES:
        rows = rows_of(name)
        english = sum(row["lang"] == "en" for row in rows)
        assert f"| `{name}.jsonl` | {len(rows)} | {english} / {len(rows) - english} |" in card
        assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
        assert all(row.get("required") for row in rows) == (name == "json")
    assert sum(bool(row.get("yes_claims")) for row in rows_of("identity")) == 8
