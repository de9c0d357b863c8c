"""Does a reward model learn length? With and without length balancing, with and without the L2 term, on pairs that the
longer answer wins.

python -m benchmarks.length_bias [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import data, experiment, model
from benchmarks.model import OUT, REFERENCE

TRAINING = {"longer": 112, "shorter": 38}
"""Pairs by the answer that wins: three of four times the longer one."""
HELD_OUT = {"longer": 60, "shorter": 60}
SHORTER_THAN = 128
"""Tokens of a prompt with either of its answers."""
BALANCING = {"balanced": True, "as they are": False}
L2 = (0.0, 0.1)
STEPS = 18
LEARNING_RATE = 2e-5


def pairs(split: str, wanted: Mapping[str, int]) -> tuple[Path, dict[str, int]]:
    """The first pairs of a file that are short enough and won as wanted, in a file of their own; how many of each there
    were."""
    source = data.preferences(split)
    encoder = model.encoder()
    found: dict[str, list[str]] = {side: [] for side in wanted}
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        trunk, (chosen, rejected) = encoder.encode_answers(row["prompt"], [row["chosen"], row["rejected"]])
        difference = len(chosen.ids) - len(rejected.ids)
        side = "longer" if difference > 0 else "shorter"
        short = len(trunk) + max(len(chosen.ids), len(rejected.ids)) < SHORTER_THAN
        if difference and short and len(found[side]) < wanted[side]:
            found[side].append(line)
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"length_bias.{split}.jsonl"
    file.write_text("".join(f"{line}\n" for lines in found.values() for line in lines), encoding="utf-8")
    return file, {side: len(lines) for side, lines in found.items()}


def recipe(seeds: int, training: Path, held_out: Path) -> dict[str, Any]:
    """A reward model for every setting and seed; all take the same number of steps of eight pairs."""
    stages: dict[str, Any] = {}
    for seed in range(1, seeds + 1):
        for balancing, balanced in BALANCING.items():
            for l2 in L2:
                stages[stage_key(seed, balancing, l2)] = {
                    "kind": "reward",
                    "seed": seed,
                    "data": str(training),
                    "eval_data": str(held_out),
                    "length_balance": balanced,
                    "l2": l2,
                    "train": {"learning_rate": LEARNING_RATE, "batch_size": 8, "epochs": 8, "max_steps": STEPS},
                }
    return {"name": "length-bias", "seed": 17, "model": REFERENCE, "stages": stages}


def stage_key(seed: int, balancing: str, l2: float) -> str:
    """What a stage is called by."""
    return f"{balancing.replace(' ', '-')}-{'with' if l2 else 'without'}-l2-seed-{seed}"


NUMBERS = ("accuracy", "accuracy_longer_wins", "accuracy_shorter_wins", "length_correlation", "score_mean", "score_std")


def run(seeds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings, and what the held-out pairs say of every reward model."""
    (training, trained_on), (held_out, judged_on) = pairs("train", TRAINING), pairs("test", HELD_OUT)
    stages = experiment.run(recipe(seeds, training, held_out))
    found = []
    for seed in range(1, seeds + 1):
        for balancing in BALANCING:
            for l2 in L2:
                key = stage_key(seed, balancing, l2)
                natural = experiment.report(stages, key)["held_out"]["natural"]
                first = next(row for row in experiment.rows(stages, key) if "eval/scores/mean" in row)
                start = {"score_mean": first["eval/scores/mean"], "score_std": first["eval/scores/std"]}
                numbers = {name: natural[name]["value"] for name in NUMBERS}
                found.append({"seed": seed, "balancing": balancing, "l2": l2, "start": start, **numbers})
    settings = {"training": trained_on, "held_out": judged_on, "shorter_than": SHORTER_THAN, "steps": STEPS}
    return {**settings, "learning_rate": LEARNING_RATE, "length_alone": natural["accuracy_length"]["value"]}, found


def section(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    s = result["settings"]
    seeds = len({run["seed"] for run in result["runs"]})
    lines = [
        "## What length balancing and the L2 term do to a reward model",
        "",
        (
            f"SmolLM2-135M-Instruct with a new head, {s['steps']} steps of 8 pairs, learning rate"
            f" {s['learning_rate']:g}. The training pairs are real people's preferences, each under {s['shorter_than']}"
            f" tokens: the longer answer wins in {s['training']['longer']} of them and the shorter one in"
            f" {s['training']['shorter']}. In the held-out pairs the longer answer wins {s['held_out']['longer']} times"
            f" and the shorter one {s['held_out']['shorter']} times, so always preferring the longer answer is right in"
            f" {s['length_alone']:.3f} of these. Mean over {seeds} seeds (smallest to largest). Made by"
            " `python -m benchmarks.length_bias`."
        ),
        "",
        (
            "| pairs | l2 | accuracy | where the shorter wins | where the longer wins | correlation of score and length"
            " | spread of scores | mean score | mean score at the start |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for balancing in BALANCING:
        for l2 in L2:
            runs = [run for run in result["runs"] if run["balancing"] == balancing and run["l2"] == l2]
            names = (
                "accuracy",
                "accuracy_shorter_wins",
                "accuracy_longer_wins",
                "length_correlation",
                "score_std",
                "score_mean",
            )
            cells = [experiment.spread([run[name] for run in runs]) for name in names]
            cells.append(experiment.spread([run["start"]["score_mean"] for run in runs]))
            lines.append(f"| {balancing} | {l2:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", experiment.where(result), ""])


def main(arguments: list[str]) -> int:
    """Run the seeds that are asked for, one after the other, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.length_bias")
    parser.add_argument("--seeds", type=int, default=3)
    experiment.keep("length_bias", *run(parser.parse_args(arguments).seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
