"""What stands beside our trainers: the tests that need a GPU, TRL's trainers on the same work, and vLLM with the
weights of a trainer on the same GPU."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.parts import ROOT, Skipped
from benchmarks.measure import Recorder


def gpu_tests(tiny: bool) -> dict[str, Any]:
    """``pytest -m gpu tests/gpu``: how many passed.

    Raises:
        Skipped: pytest is not installed.
        RuntimeError: tests failed, or pytest did not get as far as a result.
    """
    _require("pytest")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={report}"]
        done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    states = {case.get("name", ""): next((part for part in case if part.tag != "properties"), None) for case in cases}
    wrong = {name: state for name, state in states.items() if state is not None and state.tag != "skipped"}
    if wrong:
        told = [f"{name}: {state.get('message', '')[:500]}" for name, state in wrong.items()]
        raise RuntimeError("\n".join([*told, f"{len(wrong)} of {len(states)} tests failed: {', '.join(wrong)}"]))
    passed = sum(state is None for state in states.values())
    return {"tests_passed": passed, "tests_skipped": len(states) - passed}


def trl(kind: str, rejected: int, tiny: bool) -> dict[str, Any]:
    """The seconds that TRL's trainer takes for the work of :func:`benchmarks.gpu.steps.measured`, with the same model
    and optimiser; ``tokens`` are those of the work, where a prompt with its answers counts once.

    Raises:
        Skipped: TRL is not installed.
    """
    _require("trl", "datasets", "accelerate")
    import torch

    from benchmarks import dpo, sft
    from benchmarks.gpu.steps import PAIRS, TIMED, language_model, setting, work
    from tests.support.rollouts import ENCODER

    chosen, recorder = setting("llama", tiny=tiny), Recorder()
    trees = work(chosen.size, 1 if kind == "sft" else 1 + rejected, 1 + TIMED)
    more: dict[str, Any] = {"bf16": chosen.keys["train"]["autocast"] == "bf16", "max_length": None}
    make = sft.trl_trainer if kind == "sft" else dpo.trl_trainer
    batch = {"per_device_batch": 8 if kind == "sft" else PAIRS}
    make(trees, batch, recorder, language_model(chosen), ENCODER.tokenizer, **more).train()
    found, tokens = recorder.result(), trees.facts()["tokens"] / TIMED
    return {
        "seconds": found["seconds"],
        "losses": found["losses"],
        "tokens": tokens,
        "tokens_per_second": tokens / statistics.median(found["seconds"]),
        "peak_bytes": found["gpu_peak_bytes"] if torch.cuda.is_available() else found["peak_bytes"],
        **batch,
    }


def vllm(tiny: bool) -> dict[str, Any]:
    """vLLM in the process of a trainer of all weights: the seconds to send it the weights after an optimiser step
    and to prove that it samples from them, to sample, and to train a step beside it; the GPU's memory with both.

    Raises:
        Skipped: vLLM is not installed.
    """
    _require("vllm")
    import torch

    from align.recipe.blocks.rollout import VllmRollout
    from align.recipe.schema import Model
    from align.rollout.engine import Sampling
    from align.rollout.engines import open_engine, precision
    from align.rollout.sync import push
    from benchmarks.gpu.steps import setting, trainer_of
    from tests.support.rollouts import ENCODER, prompts

    chosen, recorder = setting("llama", tiny=tiny), Recorder()
    asked = [prompt.ids for prompt in prompts(64, chosen.size.prompt[1])]
    # The tests' tokenizer has fewer tokens than the model, and the engine would never sample the others
    every_token: Any = SimpleNamespace(stop_ids=ENCODER.stop_ids, vocabulary=chosen.shape.vocab)
    sampling = Sampling(chosen.size.answer[1], n=2, seed=1)
    with tempfile.TemporaryDirectory(prefix="align-bench-") as folder:
        run, _ = trainer_of("sft", chosen, 0, Path(folder), recorder)
        run.model.save_pretrained(Path(folder) / "model")
        rollout = VllmRollout(engine="vllm")
        seconds = {}
        with open_engine(
            rollout,
            Model(path=f"{folder}/model"),
            every_token,
            max_length=chosen.size.prompt[1] + chosen.size.answer[1],
            cache=Path(folder),
            resolve=Path,
            live=run.model,
        ) as engine:
            run.model.train()
            steps = iter(run.steps())
            for version in (1, 2):
                run.optimizer_step(next(steps))
                began = time.perf_counter()
                proof = push(engine, run.model, version=version, canaries=asked[:2], dtype=precision(rollout) or "fp32")
                seconds["push_and_prove"] = time.perf_counter() - began
                began = time.perf_counter()
                answers = engine.generate(asked, sampling)
                seconds["sample"] = time.perf_counter() - began
            seconds["train_step"] = recorder.seconds[-1]
            free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    sampled = sum(len(sample.ids) for of_prompt in answers for sample in of_prompt)
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "sampled_tokens": sampled,
        "sampled_tokens_per_second": sampled / seconds["sample"],
        "largest_logprob_difference": proof.max_difference,
        "device_bytes_in_use": total - free,
    }


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"needs {', '.join(missing)}, not installed")
