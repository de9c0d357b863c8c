"""A reward model from real people's preferences: how often it is right on their held-out pairs, and on pairs made to
mislead it.

python -m benchmarks.people [--pairs 1000]

The pairs are those of Anthropic's hh-rlhf (helpful), the misleading ones LLMBar's, both in the folder that
benchmarks/data.py reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data, experiment
from benchmarks.model import REFERENCE

LEARNING_RATE = 2e-5
PAIRS_PER_STEP = 16
L2 = 1e-3
LONGEST = 1024
"""Tokens of a prompt with an answer: no pair is left out for its length."""
JUDGED = {
    "accuracy": "the reward model",
    "accuracy_longer_wins": "where the longer answer wins",
    "accuracy_shorter_wins": "where the shorter answer wins",
    "accuracy_words": "TF-IDF on the same pairs",
    "accuracy_length": "length alone",
}


def recipe(pairs: int) -> dict[str, Any]:
    """One reward model, one pass."""
    stage = {
        "kind": "reward",
        "data": {"path": str(data.preferences("train")), "limit": pairs},
        "eval_data": str(data.preferences("test")),
        "l2": L2,
        "max_length": LONGEST,
        "train": {"learning_rate": LEARNING_RATE, "batch_size": PAIRS_PER_STEP, "epochs": 1, "save_steps": 10},
    }
    return {"name": "people", "seed": 17, "model": REFERENCE, "stages": {"reward": stage}}


def misleading(folder: Path) -> dict[str, dict[str, float]]:
    """How often the reward model in ``folder`` is right on each part of LLMBar, with its interval."""
    from align.commands.score import score_rows
    from align.functional.intervals import SHARE, mean_of
    from align.recipe.schema import Model
    from align.scoring.reward_model import RewardModelScorer

    file = data.misleading()
    parts = [json.loads(line)["subset"] for line in file.read_text(encoding="utf-8").splitlines()]
    right: dict[str, list[float]] = {}
    for part, scores in zip(parts, score_rows(RewardModelScorer(Model(path=str(folder))), file), strict=True):
        (rejected,) = scores["rejected"]
        right.setdefault(part, []).append((np.sign(scores["chosen"] - rejected) + 1) / 2)  # a tie is half right
    return {part: vars(mean_of(values, SHARE)) for part, values in sorted(right.items())}


def run(pairs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was trained on, and what came out."""
    data.misleading()  # before an hour of training, and in the same folder as the pairs
    stages = experiment.run(recipe(pairs))
    report = experiment.report(stages, "reward")
    natural = report["held_out"]["natural"]
    settings = {
        "pairs": report["data"]["trees"],
        "tokens": report["tokens"],
        "seconds": report["seconds"],
        "held_out": natural["pairs"],
    }
    settings |= {
        "learning_rate": LEARNING_RATE,
        "pairs_per_step": PAIRS_PER_STEP,
        "l2": L2,
        "threads": torch.get_num_threads(),
    }
    return settings, {"held_out": {name: natural[name] for name in JUDGED}, "misleading": misleading(stages / "reward")}


def section(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    s, (found,) = result["settings"], result["runs"]
    lines = [
        "## A reward model from people's preferences",
        "",
        (
            f"SmolLM2-135M-Instruct with a new head, one pass over {s['pairs']:,} pairs of Anthropic's hh-rlhf"
            f" (helpful; {s['tokens']:,} tokens, {s['seconds'] / 60:.0f} minutes of training on {s['threads']}"
            f" thread{'s' * (s['threads'] > 1)}) in steps of {s['pairs_per_step']}, learning rate"
            f" {s['learning_rate']:g}, L2 term {s['l2']:g}, no length balancing. It is tested on {s['held_out']:,}"
            " held-out pairs of the same kind, and on LLMBar, in whose adversarial parts the worse answer looks"
            " better. The tables show the share of pairs ranked right, with its 95 % interval; guessing gives 0.5."
            " Made by `python -m benchmarks.people`."
        ),
        "",
        "| held-out pairs | share right |",
        "|---|---|",
        *(f"| {words} | {_cell(found['held_out'][name], 'value')} |" for name, words in JUDGED.items()),
        "",
        "| LLMBar | pairs | share right |",
        "|---|---|---|",
        *(
            f"| {part.replace('_', ', ')} | {of['count']} | {_cell(of, 'mean')} |"
            for part, of in found["misleading"].items()
        ),
    ]
    return "\n".join([*lines, "", experiment.where(result), ""])


def _cell(estimate: Mapping[str, float], middle: str) -> str:
    return f"{estimate[middle]:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def main(arguments: list[str]) -> int:
    """Train, judge, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.people")
    parser.add_argument("--pairs", type=int, default=1000)
    settings, found = run(parser.parse_args(arguments).pairs)
    experiment.keep("people", settings, [found])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
