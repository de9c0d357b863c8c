"""The training step of every kind on a GPU that is not there (see :mod:`tests.sim.device`): it runs, no tensor is on the
wrong device, and what costs time on a GPU stays within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from align.recipe.schema import Lora
from align.sizing.needs import trained_parameters
from align.sizing.shapes import GLM_4_9B
from tests.sim import guard
from tests.support.root import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(guard.missing() is not None, reason=guard.missing() or "everything is here"),
]
SYNCS = {"sft": 2, "dpo": 2, "reward": 2, "ppo": 4, "dpo with sft": 6, "reward grades": 6, "idle": 1}
"""How often the CPU may wait for the GPU in a step of two micro-batches, of each kind of PPO's: once for all metrics,
once for the norm of each group's gradient, and in PPO once for the largest ratio; more where it has to count."""
LORA = Lora(rank=32, alpha=64)
TWO_LAYERS = replace(GLM_4_9B, layers=2)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What :mod:`tests.sim.cases` found, by case."""
    guard.built()
    folder = tmp_path_factory.mktemp("sim")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    halves = {
        part: subprocess.Popen(
            [sys.executable, "-m", "tests.sim.cases", str(folder / f"{part[0]}.json"), part],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in ("1/2", "2/2")
    }
    found: dict[str, dict[str, Any]] = {}
    for part, process in halves.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        found |= json.loads((folder / f"{part[0]}.json").read_text())
    return found


@pytest.fixture(scope="module")
def steps(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that are an optimiser step."""
    return {name: case for name, case in cases.items() if "peak" in case}


def test_every_case_runs(cases: dict[str, dict[str, Any]]) -> None:
    """No operation mixes devices, anywhere."""
    failed = {name: case["trace"] for name, case in cases.items() if "error" in case and "planted" not in name}
    assert not failed, "\n".join(failed.values())
    assert len(cases) > 45


def test_planted_bugs_are_found(cases: dict[str, dict[str, Any]]) -> None:
    """Either would stop a run on a GPU, and no test on a CPU sees it."""
    left_out = cases["planted: a device left out"]
    assert "device" in left_out["error"] and "cpu" in left_out["error"] and "cuda:0" in left_out["error"]
    assert "without_device" in left_out["trace"]
    indexed = cases["planted: a CPU tensor indexed by CUDA"]
    assert "indices should be either on cpu" in indexed["error"] and "indexed_on_device" in indexed["trace"]


def test_large_products_are_computed_in_bf16(steps: dict[str, dict[str, Any]]) -> None:
    """Wherever the recipe says bf16, the LM head of fp32 weights under autocast included. What is left in fp32: a head
    of one output, and adapters on a bf16 base without autocast."""
    for name, step in steps.items():
        share = sum(step["fp32_at"].values()) / max(1, sum(step["flops"].values()))
        assert share < (0.01 if name == "sft without autocast" else 1e-4), f"{name}: {step['fp32_at']}"


def test_the_cpu_seldom_waits_for_the_gpu(cases: dict[str, dict[str, Any]], steps: dict[str, dict[str, Any]]) -> None:
    """Each time the GPU may run dry."""
    over = {}
    for name, step in steps.items():
        bound = SYNCS[name] if name in SYNCS else SYNCS[name.split()[0]]
        if sum(step["syncs"].values()) > bound:
            over[name] = step["syncs"]
    assert not over, json.dumps(over, indent=1)
    reference = cases["reference"]
    assert sum(reference["syncs"].values()) == reference["microbatches"], reference["syncs"]


def test_attention_is_compiled_once(steps: dict[str, dict[str, Any]]) -> None:
    """All micro-batches of a step have one row length; the padded layout and streamed trees have kernels that need no
    compiling."""
    compiled = {name: step["compiled"] for name, step in steps.items()}
    assert {name for name, count in compiled.items() if not count} == {
        *("sft padded", "dpo padded", "reward padded", "dpo streamed", "idle")
    }
    assert max(compiled.values()) == 1, compiled


def test_processes_exchange_the_gradients_once_and_nothing_else_changes(steps: dict[str, dict[str, Any]]) -> None:
    """Whatever their number: one sum of all gradients a step, in fp32, and the same memory, but for the few bytes that
    DPO keeps of each row of the data, which has more rows here for more processes."""
    adapters = 4 * trained_parameters(TWO_LAYERS, LORA)
    head = 4 * GLM_4_9B.hidden
    sent = {"sft": adapters, "dpo": adapters, "reward": adapters + head, "ppo": 2 * adapters + head}
    for kind, size in sent.items():
        alone = steps["ppo gae" if kind == "ppo" else "dpo sigmoid" if kind == "dpo" else kind]
        for world in (8, 64, 512):
            step = steps[f"{kind} at {world}"]
            assert step["messages"] == {"allreduce": size}, f"{kind} at {world}"
            assert step["microbatches"] == alone["microbatches"]
            kept = 64 * world if kind == "dpo" else 0
            assert 0 <= step["peak"] - alone["peak"] <= kept, f"{kind} at {world}"
    assert steps["sft full at 8"]["messages"] == {"allreduce": 4 * TWO_LAYERS.parameters}
    assert steps["idle"]["messages"] == {"allreduce": adapters}, "a process without a micro-batch sends zeros"


def test_what_is_alive_at_rest(steps: dict[str, dict[str, Any]]) -> None:
    """Before a step there are weights and the optimiser's moments, and nothing of the step before."""
    weights, adapters = 2 * TWO_LAYERS.parameters, trained_parameters(TWO_LAYERS, LORA)
    assert weights + 12 * adapters <= steps["sft"]["at_rest"] <= weights + 12 * adapters + 1e6
    full = 12 * TWO_LAYERS.parameters
    assert full <= steps["sft full"]["at_rest"] <= full + 1e6


def test_streaming_and_checkpointing_save_memory(steps: dict[str, dict[str, Any]]) -> None:
    """A tree that is cut into groups takes less than one that is computed whole, and layers that are computed again
    less than layers that are kept."""
    assert steps["dpo streamed"]["peak"] < 0.95 * steps["dpo sigmoid"]["peak"]
    assert steps["sft checkpointed"]["peak"] < 0.96 * steps["sft"]["peak"]


def test_saved_and_taken_up_again(cases: dict[str, dict[str, Any]]) -> None:
    """Weights and moments go to the disk and back to the device; an engine gets every weight."""
    for kind in ("sft", "dpo", "reward", "ppo"):
        assert {key: cases[f"resumed {kind}"][key] for key in ("saved", "steps", "optimizer")} == {
            "saved": 1,
            "steps": 2,
            "optimizer": ["cuda"],
        }
    assert cases["pushed"]["received"] == 127_552 and cases["pushed"]["version"] == 3
