"""What a stage's data hold, counted from their tokens while they are encoded; ``align data describe`` counts the same
from texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.chat.encoder import Encoder
from align.data.report import DataReport
from align.data.trees.load import load_trees
from align.recipe.schema import DataSource
from tests.support import tokenizers

ENCODER = Encoder(tokenizers.chatml())
PAIRS = [
    {"prompt": "Is it warm?", "chosen": "Yes, very.", "rejected": ["No.", "Perhaps it is, who knows."], "margin": [2, 0]},
    {"prompt": "Is it warm?", "chosen": "It is.", "rejected": "It is not.", "margin": -1},
    {"prompt": "今天怎么样？", "chosen": "今天很好。", "rejected": "不好。", "margin": 1},
    {"prompt": "今天怎么样？", "chosen": "今天很好。", "rejected": "不好。", "margin": 1},
]  # fmt: skip


def described(folder: Path, want: Any, *sources: tuple[list[Any], dict[str, Any]], **more: Any) -> DataReport:
    specs = []
    for number, (rows, keys) in enumerate(sources):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs.append(DataSource.model_validate({"path": str(path), **keys}))
    settings: dict[str, Any] = {"max_length": 200, "too_long": "drop", "train_on": "all", "seed": 1, "rejects": None}
    settings |= {"resolve": Path, "encoder": ENCODER, "cache": folder / "cache"}
    return load_trees(want, specs, **settings, **more)[1]


def tokens(text: str) -> int:
    """Of an answer, with the token that ends it."""
    return len(ENCODER.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


def test_the_figures_of_preferences_are_those_counted_by_hand(tmp_path: Path) -> None:
    (one,) = described(tmp_path, "preference", (PAIRS, {})).described
    figures = one["figures"]
    assert one["source"] == str(tmp_path / "0.jsonl")
    expected = {
        "preference": "4",
        "prompts": "2; 2 of them in several rows, up to 2",
        "answers a prompt": "4.50",
        "rows equal to an earlier one": "1",
        "letters": "Latin 50%, Han 50%",
        "margins": "-1 to 2, median 1; 1 ties, 1 below 0",
    }
    assert {name: figures[name] for name in expected} == expected
    longest = max(map(tokens, ("No.", "Perhaps it is, who knows.", "It is not.", "不好。")))
    assert figures["rejected, tokens"].endswith(f"longest {longest}")
    gaps = [tokens(p["chosen"]) - tokens(r) for p in PAIRS for r in ([p["rejected"]] if isinstance(p["rejected"], str) else p["rejected"])]  # fmt: skip
    unequal = [gap for gap in gaps if gap]
    share = sum(gap > 0 for gap in unequal) / len(unequal)
    assert figures["longer answer chosen"] == f"{share:.0%} of {len(unequal)} pairs of unequal length"


def test_of_a_conversation_all_but_the_last_answer_is_its_prompt(tmp_path: Path) -> None:
    """Also where earlier answers are trained as well."""
    turns = ["Hello.", "Hello, who is it?", "Me.", "Good."]
    chats = [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]}
        for texts in (turns, [*turns[:3], "Well."], [turns[0], "Yes?", *turns[2:]], turns[:2])
    ]
    (one,) = described(tmp_path, "conversation", (chats, {})).described
    figures = one["figures"]
    assert figures["prompts"] == "3; 1 of them in several rows, up to 2"
    assert figures["answer, tokens"].endswith(f"longest {tokens(turns[1])}")
    assert figures["rows equal to an earlier one"] == "0"


def test_each_source_has_its_figures_and_repetitions_of_a_mixture_are_none(tmp_path: Path) -> None:
    prompts = [{"prompt": f"question {k}"} for k in range(6)]
    report = described(tmp_path, "prompt", (prompts[:2], {"weight": 2.0}), (prompts[2:], {"weight": 1.0}))
    assert report.trees == 6 and [source["given"] for source in report.sources["sources"]] == [4, 2]
    first, second = (one["figures"] for one in report.described)
    assert (first["prompt"], first["rows equal to an earlier one"]) == ("2", "0")
    assert second["prompt"] == "2"
    assert "answers a prompt" not in first and "margins" not in first
    again = described(tmp_path, "prompt", (prompts[:2], {"weight": 2.0}), (prompts[2:], {"weight": 1.0}))
    assert again.reused and again.described == report.described


def test_the_script_is_that_of_records_spread_over_all(tmp_path: Path) -> None:
    """Of 3,000: the first hundred, 90 of the next 900 and 21 of the rest; each stands for its neighbours."""
    rows = [{"prompt": "Latin letters" if k < 1500 else "汉字在这里"} for k in range(3000)]
    (one,) = described(tmp_path, "prompt", (rows, {})).described
    (name,) = [name for name in one["figures"] if name.startswith("letters")]
    assert name == "letters of 210 of them"
    shares = dict(part.split() for part in one["figures"][name].split(", "))
    assert {script: float(share[:-1]) for script, share in shares.items()} == pytest.approx(
        {"Latin": 50, "Han": 50}, abs=3
    )


@pytest.mark.parametrize(("want", "row", "label"), [("graded", {"grades": {"help": 3, "tone": 1}}, "graded: help")])
def test_grades_are_counted_by_name(tmp_path: Path, want: str, row: dict[str, Any], label: str) -> None:
    rows = [{"prompt": "q", "completion": "a", **row}, {"prompt": "q", "completion": "b", "grades": {"help": 1}}]
    (one,) = described(tmp_path, want, (rows, {}), grades=("help", "tone")).described
    assert (one["figures"]["graded: help"], one["figures"]["graded: tone"]) == ("2", "1")
