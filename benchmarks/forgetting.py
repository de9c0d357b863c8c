"""What the reference baseline and the SFT loss do in PPO: with both, without the one, without the other.

python -m benchmarks.forgetting small [--seeds 3]      a model of 7 million parameters, made and tuned here
python -m benchmarks.forgetting real [--seeds 1]      SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import experiment, model
from benchmarks.model import OUT, REFERENCE

ARMS: dict[str, dict[str, Any]] = {
    "both": {},
    "no baseline": {"reference_baseline": False},
    "no SFT loss": {"sft_weight": 0.0},
}
PROMPTS = 8
SAMPLES = 4
SFT_WEIGHT = 0.1
KL_COEFFICIENT = 0.05
LAST = 5
"""The iterations at the end that the tables take the mean of."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    words: str
    iterations: int
    max_new_tokens: int
    learning_rate: float
    sft: Mapping[str, Any]
    reward: Mapping[str, Any]
    engine: str


SIZES = {
    "small": Size(
        "A random Llama of 4 layers and 128 dimensions, tuned on the quickstart's English conversations",
        iterations=40,
        max_new_tokens=32,
        learning_rate=1e-4,
        sft={"learning_rate": 2e-3, "tokens_per_step": 2048, "epochs": 100, "max_steps": 250},
        reward={"learning_rate": 3e-4, "batch_size": 16, "epochs": 10, "max_steps": 100},
        engine="transformers",
    ),
    "real": Size(
        "SmolLM2-135M-Instruct, tuned on the quickstart's English conversations",
        iterations=10,
        max_new_tokens=48,
        learning_rate=1e-5,
        sft={"learning_rate": 5e-5, "tokens_per_step": 1024, "max_steps": 24},
        reward={"learning_rate": 2e-5, "tokens_per_step": 1500, "max_steps": 16},
        engine="auto",
    ),
}


def small_model() -> Path:
    """A random Llama with SmolLM2's tokenizer, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, encoder = OUT / "small", model.encoder()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    tokenizer: Any = encoder.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": encoder.pad_id,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ids)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def recipe(name: str, seeds: int) -> dict[str, Any]:
    """One policy, one reward model, and PPO for every arm and seed."""
    size = SIZES[name]
    english = {"where": {"lang": "en"}}
    conversations = {"path": "data/quickstart/conversations.jsonl", **english}
    stages: dict[str, Any] = {
        "sft": {"kind": "sft", "data": conversations, "samples": 0, "train": dict(size.sft)},
        "reward": {
            "kind": "reward",
            "init": "stage:sft",
            "data": {"path": "data/quickstart/preferences.jsonl", **english},
            "eval_data": {"path": "data/quickstart/preferences.test.jsonl", **english},
            "train": dict(size.reward),
        },
    }
    for seed in range(1, seeds + 1):
        for arm, changes in ARMS.items():
            stages[stage_key(arm, seed)] = {
                "kind": "ppo",
                "seed": seed,
                "policy": "stage:sft",
                "reward": "stage:reward",
                "prompts": {"path": "data/quickstart/prompts.jsonl", **english},
                "eval_prompts": {"path": "data/quickstart/prompts.test.jsonl", **english},
                "sft_data": conversations,
                "eval_sft_data": {"path": "data/quickstart/conversations.test.jsonl", **english},
                "sft_weight": SFT_WEIGHT,
                "sft_batch_size": 4,
                "iterations": size.iterations,
                "samples_per_prompt": SAMPLES,
                "max_new_tokens": size.max_new_tokens,
                "max_prompt_length": 160,
                "kl_coefficient": KL_COEFFICIENT,
                "unfinished_penalty": 0.5,
                "value_learning_rate": 2 * size.learning_rate,
                "samples": 0,
                "rollout": {"engine": size.engine},
                "train": {"learning_rate": size.learning_rate, "batch_size": PROMPTS},
                **changes,
            }
    start = str(small_model()) if name == "small" else REFERENCE
    return {"name": f"forgetting-{name}", "seed": 17, "model": start, "stages": stages}


def stage_key(arm: str, seed: int) -> str:
    """What a stage is called by."""
    return f"{arm.replace(' ', '-')}-seed-{seed}"


def run(name: str, seeds: int) -> list[dict[str, Any]]:
    """Curves of every arm and seed, and the held-out numbers before and after."""
    stages = experiment.run(recipe(name, seeds))
    found = []
    for seed in range(1, seeds + 1):
        for arm in ARMS:
            rows = [row for row in experiment.rows(stages, stage_key(arm, seed)) if "rollout/score" in row]
            curves = {key: [row[f"rollout/{key}"] for row in rows] for key in ("score", "reward", "kl")}
            report = experiment.report(stages, stage_key(arm, seed))
            before_after = {when: report[f"eval_{when}"] for when in ("before", "after")}
            found.append(
                {
                    "seed": seed,
                    "arm": arm,
                    **before_after,
                    "curves": {**curves, "sft_loss": [row["sft_loss"] for row in rows]},
                }
            )
    return found


def section(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    s, runs = result["settings"], result["runs"]
    seeds = len({run["seed"] for run in runs})
    lines = [
        f"## PPO with and without reference baseline and SFT loss: {s['size']}",
        "",
        f"{s['words']}; a reward model trained on the quickstart's English preferences; {s['iterations']} iterations of"
        f" {s['prompts']} prompts with {s['samples']} answers each, of at most {s['max_new_tokens']} tokens; learning"
        f" rate {s['learning_rate']:g}, KL coefficient {s['kl_coefficient']:g}, weight of the SFT loss"
        f" {s['sft_weight']:g}. "
        + (f"Mean over {seeds} seeds (smallest to largest). " if seeds > 1 else "One seed. ")
        + f"*Score gained*: the score of the samples, without baseline and KL, in the last {LAST} iterations, minus"
        f" that in the first. *Noise*: the standard deviation of the reward that PPO trains on, over those {LAST}."
        f" *KL*: from the tuned model, in nats per token, in the last {LAST}. *SFT loss*: the loss on the"
        f" conversations that the model was tuned on, in nats per token, in the first {LAST} → the last {LAST}."
        " *Held-out score*: the score of greedy answers to held-out prompts, before → after. *Held-out SFT loss*: the"
        " loss on held-out conversations, in nats per token, before → after. Made by `python -m"
        " benchmarks.forgetting`.",
        "",
        "| | score gained | noise of the reward | KL | SFT loss | held-out score | held-out SFT loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        gained = experiment.spread(
            [_mean(run["curves"]["score"][-LAST:]) - run["curves"]["score"][0] for run in own], "+.3f"
        )
        noise = experiment.spread([_deviation(run["curves"]["reward"][-LAST:]) for run in own])
        kl = experiment.spread([_mean(run["curves"]["kl"][-LAST:]) for run in own], ".4f")
        losses = [run["curves"]["sft_loss"] for run in own]
        sft = (
            f"{_mean([_mean(curve[:LAST]) for curve in losses]):.3f} →"
            f" {experiment.spread([_mean(curve[-LAST:]) for curve in losses])}"
        )
        held_out = [_change(own, key) for key in ("reward", "sft_loss")]
        lines.append(f"| {arm} | {' | '.join([gained, noise, kl, sft, *held_out])} |")
    return "\n".join([*lines, "", experiment.where(result), ""])


def _change(runs: list[Mapping[str, Any]], key: str) -> str:
    return f"{runs[0]['before'][key]:.3f} → {experiment.spread([run['after'][key] for run in runs])}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: list[float]) -> float:
    mean = _mean(values)
    return float((sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5)


def main(arguments: list[str]) -> int:
    """Run the seeds that are asked for, one after the other, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting")
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    settings = {key: value for key, value in asdict(SIZES[chosen.size]).items() if key not in ("sft", "reward")}
    settings |= {
        "size": chosen.size,
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "sft_weight": SFT_WEIGHT,
        "kl_coefficient": KL_COEFFICIENT,
    }
    experiment.keep(f"forgetting-{chosen.size}", settings, run(chosen.size, chosen.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
