"""Rows in the shapes of the reward benchmarks' official files, written for tests, and their numbers from scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.evaluation.compare import compare
from align.evaluation.reward_bench.items import Bench, Item, of_scores
from align.evaluation.reward_bench.read import read_bench
from align.recipe.schema import DataSource

Row = dict[str, Any]


def rewardbench1(subset: str, number: int = 0) -> Row:
    """A pair: the first answer is the chosen one."""
    answers = {"chosen": f"A good answer, {number}.", "rejected": f"Bad {number}"}
    return {
        "prompt": f"Question {number}?",
        **answers,
        "chosen_model": "a",
        "rejected_model": "b",
        "subset": subset,
        "id": number,
    }


def rewardbench2(subset: str, name: str, right: int = 1, wrong: int = 3) -> Row:
    """Right answers, then wrong ones."""
    chosen, rejected = [f"Right {name} {i}." for i in range(right)], [f"Wrong {name} {i}." for i in range(wrong)]
    counts = {"num_correct": right, "num_incorrect": wrong, "total_completions": right + wrong}
    models = [f"m{i}" for i in range(right + wrong)]
    return {
        "id": name,
        "prompt": f"Question {name}?",
        "chosen": chosen,
        "rejected": rejected,
        **counts,
        "models": models,
        "subset": subset,
    }


def rmbench(domain: str | None, number: int = 0) -> Row:
    """Three right answers and three wrong ones, from plain to elaborate."""
    styles = ("", " Here is why.", "\n\n- Here\n- is\n- why")
    chosen, rejected = ([f"{word} {number}.{style}" for style in styles] for word in ("Yes", "No"))
    return {"id": number, "prompt": f"Is it {number}?", "chosen": chosen, "rejected": rejected} | (
        {"domain": domain} if domain else {}
    )


def judgebench(label: str, source: str = "mmlu-pro-law", number: int = 0) -> Row:
    """Two answers and which is right."""
    answers = {"response_A": f"It is A{number}.", "response_B": f"It is B{number}, and that is all there is to say."}
    names = {"pair_id": f"p{number}", "original_id": str(number), "response_model": "m"}
    return {**names, "source": source, "question": f"Which one, {number}?", **answers, "label": label}


def write(path: Path, rows: Sequence[Row]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, rows: Sequence[Row]) -> tuple[Bench, list[Item]]:
    """Through a file, as a stage reads it."""
    return read_bench(DataSource(path="rows.jsonl"), write(path, rows))


def estimates(
    path: Path, rows: Sequence[Row], scores: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """``{metric: {scorer: {mean, low, high, count}}}`` from each scorer's scores of each row's answers, the right ones
    first."""
    bench, items = read(path, rows)
    results = {
        who: [of_scores(bench, item, one) for item, one in zip(items, own, strict=True)] for who, own in scores.items()
    }
    return compare(bench.measures(items, results), next(iter(scores)), seed=0)


def means(path: Path, rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """One scorer's numbers."""
    return {name: of["rm"]["mean"] for name, of in estimates(path, rows, {"rm": scores}).items()}
