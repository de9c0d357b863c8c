"""A finished run of every stage kind, written by hand in the stages' own formats: what a report is made from, without
training anything."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.evaluation.metrics import METRICS
from align.pipeline.artifacts import Identity, write_manifest
from align.pipeline.locks import LOCK
from align.report.estimates import Change
from align.report.html.page import render
from align.report.measures import changes
from align.runs.record import read_run

STEPS = 40
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script> \x1b[31m\u202e{{ 7 * 7 }}"


def training_data(name: str, want: str, rows: int = 305, kept: int = 225) -> dict[str, Any]:
    """A data report as `DataReport.as_json` writes it."""
    source = {
        "path": name,
        "format": "preference",
        "read": rows,
        "left_out": rows - kept - 6,
        "bad": 2,
        "dropped": 0,
        "kept": kept + 4,
    }
    source |= {
        "given": kept + 4,
        "weight": None,
        "share": 1.0,
        "first_bad": [f"{name}:7 chosen: is missing", f"{name}:31: is not JSON"],
    }
    return {
        "want": want,
        "trees": kept,
        "tokens": 25354,
        "targets": 14854,
        "longest": 153,
        "dropped": {"a tie: its margin is 0": {"total": 4, "first": [f"{name}:12", f"{name}:40"]}},
        "noted": {"cut at max_length": {"total": 1, "first": [f"{name}:99"]}},
        "source_lines": [f"{name} (preference): {rows} rows read"],
        "described": [{"source": name, "figures": {"prompts": "220; 5 of them in several rows", "margins": "none"}}],
        "sources": {"given": kept + 4, "sources": [source]},
    }


def trained(before: Mapping[str, float], after: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """`report.json` of a training stage."""
    return {
        "steps": STEPS,
        "tokens": 25354,
        "seconds": 156.3,
        "tokens_per_second": 162.3,
        "peak_memory_bytes": 4211793920,
        "trainable_parameters": 134515008,
        "parameters": 134515008,
        "best_step": STEPS,
        "eval_before": dict(before),
        "eval_after": dict(after),
        "base": {"path": "base/model", "digest": "b" * 64, "revision": None},
        "samples": [],
    } | more


def estimate(value: float, half: float = 0.06) -> dict[str, float]:
    """As a reward model's report has them."""
    return {"value": value, "low": value - half, "high": value + half}


def mean(value: float, half: float, count: int = 60) -> dict[str, float]:
    """As an evaluation has them."""
    return {"mean": value, "low": value - half, "high": value + half, "count": count}


def steps(
    start: Mapping[str, float], end: Mapping[str, float], held_out: Sequence[str] = (), every: int = 1
) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl` that go from one to the other, with held-out rows at the begin, in the middle and at the
    end."""
    rows: list[dict[str, float]] = []
    for step in range(STEPS + 1):
        part = 1 - math.exp(-3 * step / STEPS)
        wiggle = 0.04 * math.sin(2.1 * step) + 0.02 * math.cos(5.3 * step)
        values = {key: start[key] + (end[key] - start[key]) * (part + wiggle) for key in start}
        if step:
            own = {
                key: value for key, value in values.items() if not key.startswith("rollout/") or (step - 1) % every == 0
            }
            rows.append(
                {
                    "step": step,
                    **own,
                    "grad_norm": 8 - 3 * part + 9 * wiggle,
                    "learning_rate": 1e-5 * (1 - part),
                    "tokens": 1495,
                }
            )
            rows[-1] |= {"step_seconds": 8.1, "tokens_per_second": 160 + 90 * wiggle}
        if held_out and step % 20 == 0:
            rows.append(
                {"step": step, **{f"eval/{key}": start[key] + (end[key] - start[key]) * part for key in held_out}}
            )
    return rows


def sft() -> dict[str, Any]:
    samples = [
        {
            "prompt": "user\nIs Toronto the capital of Canada?\nassistant\n",
            "before": "The capital of Canada is Toronto.",
            "after": "No, Ottawa is.",
        },
        {"prompt": f"user\n{HOSTILE}\nassistant\n", "before": HOSTILE, "after": "你好，世界。\n\n\tنعم"},
    ]
    report = trained({"loss": 2.879149676952005}, {"loss": 2.4859404394118703}, samples=samples)
    report["held_out_leaked"] = 0
    report["data"], report["held_out_data"] = (
        training_data("talk.jsonl", "conversation"),
        training_data("held.jsonl", "conversation", 60, 50),
    )
    return {"report": report, "metrics": steps({"loss": 2.3}, {"loss": 1.7}, ["loss"])}


def dpo() -> dict[str, Any]:
    before = {
        "loss": 0.6931,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "logps/chosen": -75.58,
        "logps/rejected": -83.75,
    }
    after = {
        "loss": 0.5430,
        "rewards/accuracies": 0.9333,
        "rewards/margins": 0.347,
        "logps/chosen": -77.2,
        "logps/rejected": -86.85,
    }
    lengths = {"length/chosen": 27.7, "length/rejected": 32.8}
    samples = [
        {
            "prompt": "user\nIs Toronto the capital of Canada?\nassistant\n",
            "before": "No, Ottawa is.",
            "after": "No. It is Ottawa.",
        }
    ]
    report = trained(
        before | lengths, after | lengths, samples=samples, data=training_data("pairs.jsonl", "preference")
    )
    report["held_out_data"] = training_data("pairs.held.jsonl", "preference", 113, 107)
    start = before | {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
    end = after | {"rewards/chosen": -0.16, "rewards/rejected": -0.5}
    return {"report": report, "metrics": steps(start, end, list(start))}


def reward() -> dict[str, Any]:
    natural = {
        "prompts": 100,
        "pairs": 140,
        "accuracy": estimate(0.712),
        "accuracy_longer_wins": estimate(0.82),
        "accuracy_shorter_wins": estimate(0.6),
        "accuracy_length": estimate(0.69),
        "accuracy_words": estimate(0.55),
        "length_correlation": estimate(0.41, 0.1),
        "score_mean": estimate(0.1),
        "score_std": estimate(1.2),
        "calibration_error": estimate(0.08, 0.03),
        "calibration": [
            {"from": 0.5 + k / 10, "to": 0.6 + k / 10, "pairs": 28, "predicted": 0.55 + k / 10, "right": 0.5 + k / 11}
            for k in range(5)
        ],
    }
    buckets = [
        {
            "tokens": name,
            "longer_wins": 40 - k,
            "shorter_wins": 20 + k,
            "equal": 0 if k else 6,
            "used": 46,
            "left_out": 14 + k,
        }
        for k, name in enumerate(("0-7", "8-31", "32-63", "256+"))
    ]
    report = trained({"loss": 0.7, "accuracy": 0.48, "margin": 0.0}, {"loss": 0.55, "accuracy": 0.712, "margin": 0.9})
    report |= {
        "scores": {"mean": 0.1, "std": 1.2, "count": 400},
        "length_balance": buckets,
        "data": training_data("pairs.jsonl", "preference"),
    }
    report["held_out"] = {
        "natural": natural,
        "length_balanced": {**natural, "pairs": 80, "prompts": 70, "accuracy": estimate(0.55, 0.09)},
    }
    start = {
        "loss": 0.7,
        "accuracy": 0.5,
        "scores/chosen": 0.0,
        "scores/rejected": 0.0,
        "margin": 0.0,
        "scores/mean": 0.0,
        "scores/std": 0.4,
    }
    end = {
        "loss": 0.5,
        "accuracy": 0.74,
        "scores/chosen": 0.6,
        "scores/rejected": -0.4,
        "margin": 1.0,
        "scores/mean": 0.1,
        "scores/std": 1.2,
    }
    return {"report": report, "metrics": steps(start, end, ["loss", "accuracy", "margin"])}


def select() -> dict[str, Any]:
    report = {
        "prompts": 60,
        "kept": 44,
        "kept_without_spread": 1,
        "left_out": {"its answers score alike": 14, "asked before": 2},
    }
    report |= sampled()
    left_out = [{"id": f"p{k}", "row": f"prompts.jsonl:{k}", "reason": "its answers score alike"} for k in range(3, 17)]
    return {"report": report, "left_out": left_out, "data": [{"id": "p1", "prompt": [], "reward_mean": 1.0}]}


def sampled() -> dict[str, Any]:
    """What the stages say that sample and score."""
    answers = {
        "answers": 240,
        "tokens": 41.5,
        "words": 30.25,
        "distinct_1": 0.21,
        "distinct_2": 0.55,
        "unfinished": 0.35,
    }
    spread = {"mean": 0.4, "std": 0.3, "min": 0.0, "median": 0.38, "max": 1.9}
    found: dict[str, Any] = {"answers": answers, "answers_left_out": {"unfinished": 84, "empty": 1}, "scores": spread}
    return found | {"length_correlation": -0.46, "reward_std": spread}


def ppo() -> dict[str, Any]:
    before, after = (
        {"loss": -r, "reward": r, "length": n, "finished": f, "sft_loss": s}
        for r, n, f, s in ((0.12, 40, 0.9, 2.4), (0.35, 31, 0.7, 2.6))
    )
    unhealthy = {
        "kl": {"message": "the KL from the reference is 0.6 nats per token, more than 0.5", "step": 18, "times": 2}
    }
    phases = {"sync": 12.5, "generate": 340.25, "score": 22.0, "values": 60.5, "train": 410.75}
    samples = [
        {
            "prompt": "user\nName tea.\nassistant\n",
            "before": "Tea\n[score 0.120]",
            "after": "Tea is tea.\n[score 0.350]",
        }
    ]
    report = trained(before, after, iterations=20, phase_seconds=phases, unhealthy=unhealthy, samples=samples)
    report |= {
        "held_out_change": {"prompts": 60, "mean": 0.23, "interval": [0.11, 0.35]},
        "data": training_data("prompts.jsonl", "prompt"),
    }
    names = {
        "rollout/reward": (0.0, 0.4), "rollout/score": (0.1, 0.5), "rollout/baseline": (0.1, 0.1), "rollout/kl": (0.0, 0.62),
        "rollout/entropy": (2.2, 1.3), "rollout/explained_variance": (-0.2, 0.6),
        "rollout/length": (40, 31), "rollout/finished": (0.9, 0.7),
        "kl_from_old": (0.0, 0.02), "clip_fraction": (0.01, 0.12), "value_clip_fraction": (0.0, 0.1),
        "sft_loss": (2.4, 2.6), "loss/policy": (0.0, -0.05), "loss/value": (1.4, 0.3), "reward": (0.12, 0.35), "loss": (1.4, 0.3),
    }  # fmt: skip
    rows = steps(
        {k: a for k, (a, _) in names.items()}, {k: b for k, (_, b) in names.items()}, ["reward", "sft_loss"], every=2
    )
    for row in rows:
        row.pop("reward", None)
    return {"report": report, "metrics": rows}


def label() -> dict[str, Any]:
    report = {
        "prompts": 44,
        "preferences": 36,
        "pairs": 80,
        "longer_chosen": 20,
        "shorter_chosen": 58,
        "margins": sampled()["scores"],
    }
    report |= {
        "warnings": ["the shorter answer is chosen in 58 of 78 pairs of unequal length"],
        "left_out": {"all its answers score the same": 8},
    }
    return {"report": report | sampled(), "data": [], "left_out": []}


def contrast() -> dict[str, Any]:
    reasons = {
        "empty": 3,
        "unfinished": 150,
        "target": 1,
        "duplicate": 60,
        "filtered": 110,
        "not drawn": 56,
        "negative": 260,
    }
    bins = [
        {"from": k / 10 - 0.1, "to": k / 10, "samples": 20 + 12 * k * (10 - k), "negatives": max(0, 60 - 9 * k)}
        for k in range(10)
    ]
    report = {
        "prompts": 40,
        "kept": 33,
        "dropped": 7,
        "samples": 640,
        "samples_by_reason": reasons,
        "similarity": 0.412,
    }
    report |= {
        "similarity_of_negatives": 0.305,
        "chosen_tokens": 41.5,
        "rejected_tokens": 38.25,
        "texts_cut_by_embedder": 0.125,
    }
    report |= {"histogram": bins, "embedding": {"embedder": "e", "max_tokens": 256, "texts": 680, "cut": 85}}
    return {"report": report | {"data": training_data("talk.jsonl", "conversation")}, "data": []}


def evaluate(policies: Sequence[str] = ("stage:sft", "stage:dpo", "stage:ppo")) -> dict[str, Any]:
    centres = {
        "margin": (-12.5, 4.25, 1.5),
        "target_logprob": (-70.0, 2.5, 1.5),
        "similarity": (0.41, 0.012, 0.02),
        "length": (31.0, -3.5, 4.0),
    }
    metrics = {}
    for name, (base, gain, half) in {**centres, "unfinished": (0.32, -0.1, 0.05)}.items():
        metrics[name] = {policy: mean(base + k * gain, half) for k, policy in enumerate(policies)}
        for k, policy in enumerate(policies[1:], 1):
            metrics[name][policy]["difference"] = mean(k * gain, half)
    report = {
        "prompts": 60,
        "samples_per_prompt": 4,
        "baseline": policies[0],
        "texts_cut_by_embedder": 0.02,
        "embedder_max_tokens": 256,
    }
    rows = []
    for p in range(60):
        said = {
            policy: {
                "margin": -1.5 * p,
                "length": 20.0 + p,
                "samples": [f"{policy} says {p}.{n} " + "so it goes " * (4 + n) for n in range(4)],
            }
            for policy in policies
        }
        messages = [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": f"Question {p}: what is {p} plus {p}?"},
        ]
        rows.append({"id": f"held-{p}", "prompt": messages, "target": f"It is {2 * p}.", "policies": said})
    rows[1]["policies"][policies[0]]["samples"][0] = HOSTILE
    words = {name: METRICS[name].words for name in metrics}
    report |= {"metrics": metrics, "words": words, "data": training_data("held.jsonl", "conversation", 66, 60)}
    return {"report": report, "data": rows}


STAGES: dict[str, tuple[dict[str, Any], Any]] = {
    "sft": ({"kind": "sft", "data": "talk.jsonl"}, sft),
    "reward": ({"kind": "reward", "init": "stage:sft", "data": "pairs.jsonl"}, reward),
    "select": (
        {"kind": "select_prompts", "policy": "stage:sft", "reward": "stage:reward", "prompts": "prompts.jsonl"},
        select,
    ),
    "ppo": ({"kind": "ppo", "policy": "stage:sft", "reward": "stage:reward", "prompts": "stage:select"}, ppo),
    "label": ({"kind": "label", "policy": "stage:sft", "reward": "stage:reward", "prompts": "stage:select"}, label),
    "contrast": ({"kind": "self_contrast", "policy": "stage:sft", "data": "talk.jsonl"}, contrast),
    "dpo": ({"kind": "dpo", "policy": "stage:sft", "data": ["stage:label", "stage:contrast"]}, dpo),
    "compare": (
        {"kind": "evaluate", "policies": ["stage:sft", "stage:dpo", "stage:ppo"], "data": "held.jsonl"},
        evaluate,
    ),
}
"""Name -> recipe and content of each stage."""


def write_run(folder: Path, names: Sequence[str] = tuple(STAGES), **changed: Mapping[str, Any]) -> Path:
    """A run folder with the stages ``names``; ``changed`` replaces keys of a stage's report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).touch()
    recipe = {"name": folder.name, "model": "base/model", "stages": {name: STAGES[name][0] for name in names}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    about = {
        "command": ["align", "run", "a recipe.yaml", "seed=3"],
        "started": "2026-01-02T03:04:05+00:00",
        "packages": {"torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(about))
    history = []
    for k, name in enumerate(names):
        made = STAGES[name][1]()
        made["report"] |= changed.get(name, {})
        write_stage(folder, name, STAGES[name][0]["kind"], made)
        history.append({"time": "2026-01-02T03:04:05+00:00", "stage": name, "event": "started", "reason": "first run"})
        history.append({"time": "2026-01-02T03:05:05+00:00", "stage": name, "event": "finished", "seconds": 61.5 + k})
    jsonl(folder / "history.jsonl", history)
    return folder


def write_stage(folder: Path, name: str, kind: str, made: Mapping[str, Any], **config: Any) -> Path:
    """The result of a stage, with ``config`` in its manifest."""
    out = folder / "stages" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(made["report"], ensure_ascii=False))
    for part in ("metrics", "data", "left_out"):
        if part in made:
            jsonl(out / f"{part}.jsonl", made[part])
    identity = Identity(kind, config, 17, None, {"talk.jsonl": "d" * 64})
    told = {
        key: value
        for key, value in made["report"].items()
        if key not in ("samples", "data", "held_out_data", "length_balance")
    }
    write_manifest(out, type="policy", stage=name, identity=identity, encoder="e" * 64, summary=told)
    return out


def reported(folder: Path) -> dict[str, dict[str, Change]]:
    """What the report of a real run says: changes by title, of each stage. The page must come out, too."""
    run = read_run(folder)
    page = render(run)
    found = {stage.name: {change.title: change for change in changes(stage)} for stage in run.stages}
    assert all(
        html.escape(cell) in page for made in found.values() for change in made.values() for cell in change.cells
    )
    return found


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
