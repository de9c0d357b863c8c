"""What experiments have in common: a recipe with a stage for every setting and seed, run like any other, and kept as
JSON.

Killed anywhere, the same command goes on. Results go to ``benchmarks/results/experiments``; of each, ``python -m
benchmarks docs`` makes a section of ``docs/experiments.md``.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import EXPERIMENTS
from benchmarks.measure import machine, versions
from benchmarks.model import OUT


def run(recipe: Mapping[str, Any]) -> Path:
    """Run a recipe; returns the folder of its stages' results."""
    from rich.console import Console

    from align.pipeline.runner import run_recipe
    from align.recipe.load import load_recipe

    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"{recipe['name']}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run_recipe(load_recipe(str(file), []), runs_dir=OUT / "runs", console=Console(width=140)).folder / "stages"


def report(stages: Path, name: str) -> dict[str, Any]:
    """What a stage reported."""
    return dict(json.loads((stages / name / "report.json").read_text()))


def rows(stages: Path, name: str) -> list[dict[str, Any]]:
    """A stage's metrics, step by step."""
    return [json.loads(line) for line in (stages / name / "metrics.jsonl").read_text().splitlines()]


def keep(name: str, settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """Write down what came out, with the machine and the versions."""
    found = {
        "experiment": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "runs": list(runs),
    }
    EXPERIMENTS.mkdir(parents=True, exist_ok=True)
    (EXPERIMENTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean over seeds, with the smallest and the largest seed where there are several."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def where(result: Mapping[str, Any]) -> str:
    """The last line of a section."""
    m = result["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {result['date']}."
