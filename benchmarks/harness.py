"""What a benchmark is, and how it is run.

A benchmark is a named piece of work and its contenders. Every (contender, setting, repetition) runs in a process of its
own, on all cores. First each contender's settings are tried once, on a small part of the work; then all contenders,
each at its fastest setting, take turns (A B C A B C ...), so that a machine that slows down slows everybody. What
counts is the ratio of medians over those turns.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.data.tree import Branch, Tree
from benchmarks.measure import Recorder, cores, machine, versions
from benchmarks.model import OUT

RESULTS = Path(__file__).parent / "results"
EXPERIMENTS = RESULTS / "experiments"
GPU = RESULTS / "gpu.json"
LOSS_TOLERANCE = 1e-4
OURS = "ours"

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """The same for all contenders: ``steps`` lists the trees of each optimiser step; the first step warms up and is not
    timed."""

    trees: list[Tree]
    steps: list[list[int]]
    source: str

    def facts(self) -> dict[str, Any]:
        """Totals over the timed steps. ``pairs`` are (chosen, rejected); ``tokens`` are unique ones: a prompt counts
        once."""
        timed = [self.trees[i] for step in self.steps[1:] for i in step]
        return {
            "source": self.source,
            "steps": len(self.steps) - 1,
            "rows": len(timed),
            "pairs": sum(len(tree.branches) - 1 for tree in timed),
            "tokens": sum(tree.size for tree in timed),
            "trained_tokens": sum(int(branch.mask.sum()) for tree in timed for branch in tree.branches),
        }

    def save(self, path: Path) -> None:
        """As JSON, for the processes."""
        trees = [
            {"id": t.id, "trunk": t.trunk.tolist(), "branches": [[b.ids.tolist(), b.mask.tolist()] for b in t.branches]}
            for t in self.trees
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"trees": trees, "steps": self.steps, "source": self.source}))

    @staticmethod
    def load(path: Path) -> Work:
        """What :meth:`save` wrote."""
        saved = json.loads(path.read_text())
        trees = []
        for tree in saved["trees"]:
            branches = tuple(
                Branch(np.array(ids, np.int32), np.array(mask, np.bool_)) for ids, mask in tree["branches"]
            )
            trees.append(Tree(tree["id"], np.array(tree["trunk"], np.int32), branches))
        return Work(trees, saved["steps"], saved["source"])


@dataclass(frozen=True)
class Contender:
    """One way to do the work. ``run`` does it under a :class:`Recorder`, in a fresh process."""

    name: str
    about: str
    settings: tuple[Setting, ...]
    run: Callable[[Work, Setting, Recorder], None]
    default_counts: bool = False
    """The first setting is what users get, so it is the one that counts; the others are measured once, for
    information."""
    same_loss: bool = True
    """Does the loss have to equal ours? (Not for a bare loop that lets rows see each other.)"""


@dataclass(frozen=True)
class Benchmark:
    """``prepare(quick)`` makes the work; ``unit`` (of :meth:`Work.facts`) is what rates are given in."""

    name: str
    title: str
    about: str
    unit: str
    prepare: Callable[[bool], Work]
    contenders: tuple[Contender, ...]
    sampled: bool = False
    """Sampling instead of training: what a contender records is how many tokens it sampled, and rates are of those."""

    def contender(self, name: str) -> Contender:
        """By name."""
        return next(c for c in self.contenders if c.name == name)


def run(
    benchmark: Benchmark, *, quick: bool, repeats: int, only: Sequence[str] = (), say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run a benchmark; returns what is kept of it. ``quick`` tries no settings: every contender runs at its first."""
    work = benchmark.prepare(quick)
    file = OUT / f"{benchmark.name}.work.json"
    work.save(file)
    part, small = work if quick else benchmark.prepare(True), OUT / f"{benchmark.name}.small.json"
    part.save(small)
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "about": benchmark.about,
        "unit": benchmark.unit,
        "sampled": benchmark.sampled,
        "quick": quick,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
        "work": work.facts(),
        "tried_on": part.facts(),
        "contenders": {c.name: c.about for c in benchmark.contenders if not only or c.name in only},
        "runs": [],
    }
    contenders = [c for c in benchmark.contenders if c.name in result["contenders"]]
    say(f"{benchmark.name}: {work.facts()}")

    def measure(contender: Contender, index: int, phase: str) -> dict[str, Any]:
        run = {"contender": contender.name, "setting": dict(contender.settings[index]), "phase": phase}
        run |= _in_own_process(benchmark.name, contender.name, index, small if phase == "try" else file)
        result["runs"].append(run)
        say(_line(run))
        return run

    chosen = {c.name: 0 for c in contenders}
    for contender in [] if quick else contenders:
        indices = range(1 if contender.default_counts else 0, len(contender.settings))
        tried = {i: measure(contender, i, "try") for i in indices if len(contender.settings) > 1}
        fitting = {i: sum(run["seconds"]) for i, run in tried.items() if "error" not in run}
        if not contender.default_counts and fitting:
            chosen[contender.name] = min(fitting, key=fitting.__getitem__)
    for turn in range(repeats):
        for contender in contenders:
            measure(contender, chosen[contender.name], f"turn {turn + 1}")
    result["summary"] = summarise(result)
    return result


def _in_own_process(benchmark: str, contender: str, index: int, work: Path) -> dict[str, Any]:
    """One measurement; ``{"error": exit code and last line}`` when it failed (out of memory, say)."""
    out = OUT / f"{benchmark}.result.json"
    out.unlink(missing_ok=True)
    threads = str(cores())
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(OUT / "cache" / "datasets"),
    }
    command = [sys.executable, "-m", "benchmarks", "worker", benchmark, contender, str(index), str(work), str(out)]
    with tempfile.TemporaryDirectory(prefix="align-bench-") as scratch:  # what trainers write goes with it
        environment["TMPDIR"] = scratch
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode == 0:
        return dict(json.loads(out.read_text()))
    (OUT / f"{benchmark}.error.txt").write_text(done.stdout + done.stderr)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"error": f"ended with code {done.returncode}: {last[:200]}"}


def work_once(benchmark: Benchmark, contender: str, index: int, work: Path, out: Path) -> None:
    """What a worker process does."""
    import torch

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    recorder = Recorder()
    chosen = benchmark.contender(contender)
    chosen.run(Work.load(work), chosen.settings[index], recorder)
    out.write_text(json.dumps(recorder.result()))


def _line(run: Mapping[str, Any]) -> str:
    head = f"  {run['phase']:7} {run['contender']:13} {describe(run['setting']):28}"
    if "error" in run:
        return f"{head} failed: {run['error']}"
    losses = " ".join(f"{loss:.6f}".removesuffix(".000000") for loss in run["losses"])
    busy = sum(run["cpu_seconds"]) / sum(run["seconds"])
    return f"{head} {sum(run['seconds']):8.2f} s  {busy:4.2f} cores  {run['peak_bytes'] / 1e9:6.2f} GB  loss {losses}"


def describe(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in setting.items())


def turns(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs that count, by contender; without those that failed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        if run["phase"].startswith("turn") and "error" not in run:
            found.setdefault(run["contender"], []).append(run)
    return found


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Per contender: median and spread in seconds, rate, how many times as long as ours (ratio of medians), peak
    memory, losses.

    Of sampling: seconds for as many tokens as ours sampled in its first turn.
    """
    amount = result["work"][result["unit"]]
    counted = turns(result)
    if result.get("sampled") and OURS in counted:
        amount = sum(counted[OURS][0]["losses"][1:])
        counted = {name: [_for_as_many(run, amount) for run in runs] for name, runs in counted.items()}
    medians = {name: statistics.median(sum(run["seconds"]) for run in runs) for name, runs in counted.items()}
    reference = counted.get(OURS)
    summary = {}
    for name, runs in counted.items():
        totals = [sum(run["seconds"]) for run in runs]
        summary[name] = {
            "setting": runs[0]["setting"],
            "turns": len(runs),
            "median_seconds": medians[name],
            "min_seconds": min(totals),
            "max_seconds": max(totals),
            "per_second": amount / medians[name],
            "times_ours": medians[name] / medians[OURS] if reference else None,
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "gpu_peak_bytes": _median(run["gpu_peak_bytes"] for run in runs),
            "losses": runs[0]["losses"],
            "loss_difference": _distance(runs[0]["losses"], reference[0]["losses"]) if reference else None,
        }
    return summary


def _for_as_many(run: Mapping[str, Any], tokens: float) -> dict[str, Any]:
    """A run's seconds as they would be for ``tokens`` sampled tokens: nobody samples equally many."""
    return {**run, "seconds": [sum(run["seconds"]) * tokens / sum(run["losses"][1:])]}


def _median(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _distance(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def faults(benchmark: Benchmark, result: Mapping[str, Any]) -> list[str]:
    """Why a result is no finding: a contender's loss differs from ours, so it did other work, or one of its turns
    failed."""
    exact = {c.name for c in benchmark.contenders if c.same_loss}
    differ = [n for n, s in result["summary"].items() if n in exact and (s["loss_difference"] or 0.0) > LOSS_TOLERANCE]
    failed = [run for run in result["runs"] if run["phase"].startswith("turn") and "error" in run]
    return [
        *(f"{name} has another loss than ours: not the same work" for name in differ),
        *(f"{run['contender']}, {run['phase']}: {run['error']}" for run in failed),
    ]
