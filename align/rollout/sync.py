"""Sending the weights of the model in training to the engine, with adapters merged in, and checking that the engine
samples from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.batching.tree import pack
from align.data.tree import Branch, Tree
from align.errors import TrainingFault
from align.models.adapters import is_lora_layer, unwrap
from align.models.compute.forward import batch_logprobs, causal_lm
from align.models.merging import merged_weight
from align.models.placement import WHOLE, device_of
from align.rollout.engine import RolloutEngine, Sample, Sampling, Together, WeightSource

CANARY_TOKENS = 2
"""Tokens of each answer that the check samples: the first is predicted by the prefill, the second by a decoding step.
The engine reads all weights in each of them, so more tokens would cost time and prove no more."""
CANARY_SAMPLES = 8
"""Answers to each canary. They share the prompt in the trainer's forward pass."""


@dataclass(frozen=True)
class Proof:
    """How far the engine's log-probs are from the trainer's, over tokens that the engine sampled, in nats."""

    version: int
    tokens: int
    max_difference: float
    mean_difference: float


@dataclass(frozen=True)
class Bound:
    """Largest differences that are put down to rounding."""

    max_difference: float
    mean_difference: float


BOUNDS = {"fp32": Bound(1e-3, 2e-4), "bf16": Bound(1.0, 0.1)}
"""Bounds by the engine's precision. Measured differences, largest and mean: fp32 3e-5 and 6e-6; bf16 0.19 and 0.04;
with the LM head of an earlier step 0.57 and 0.18."""


def push(
    engine: RolloutEngine,
    model: nn.Module,
    *,
    version: int,
    canaries: Sequence[Sequence[int]],
    dtype: str = "fp32",
    together: Together | None = None,
) -> Proof:
    """Send the current weights of ``model`` to the engine, and check that it samples from them.

    Args:
        model: the policy in training, with or without wrappers; adapters count as merged.
        version: number that every sample will have from now on; larger than before.
        canaries: a few prompts, as token ids.
        dtype: the engine's precision.
        together: all processes of the run, where each of them pushes these weights now.

    Raises:
        TrainingFault: the engine has other weights, or its log-probs differ by more than rounding.
    """
    engine.load_weights(weights_of(model, version, together))
    return prove(engine, model, version=version, canaries=canaries, dtype=dtype)


def prove(
    engine: RolloutEngine, model: nn.Module, *, version: int, canaries: Sequence[Sequence[int]], dtype: str = "fp32"
) -> Proof:
    """Sample answers to the canary prompts and compare the engine's log-probs with the model's. Raises as
    :func:`push`."""
    sampled = engine.generate(canaries, Sampling(max_new_tokens=CANARY_TOKENS, n=CANARY_SAMPLES, seed=version))
    stale = {completion.version for answers in sampled for completion in answers} - {version}
    if stale:
        raise TrainingFault(
            f"the engine sampled from version {stale.pop()} of the weights, version {version} was pushed"
        )
    differences = np.concatenate(
        [
            np.abs(a - b)
            for a, b in zip(_engine_logprobs(sampled), policy_logprobs(model, canaries, sampled), strict=True)
        ]
    )
    proof = Proof(version, len(differences), float(differences.max()), float(differences.mean()))
    bound = BOUNDS[dtype]
    if not (proof.max_difference <= bound.max_difference and proof.mean_difference <= bound.mean_difference):
        raise TrainingFault(
            f"the engine does not sample from the trained weights: its log-probs are off by {proof.max_difference:.2g}"
            f" nats at most and {proof.mean_difference:.2g} on average, rounding explains {bound.max_difference:g} and"
            f" {bound.mean_difference:g}",
            hint="set rollout.engine: transformers, and please report it with the model's name",
        )
    return proof


def weights_of(model: nn.Module, version: int, together: Together | None = None) -> WeightSource:
    """The policy's weights; each iteration yields them as they are at that time."""
    return WeightSource(version, lambda: policy_weights(model), together)


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the policy by their names in transformers, one at a time; active adapters are merged into theirs.

    Merged in fp32, then rounded to the base's dtype. A tied LM head comes under its own name as well: vLLM needs it.
    """
    lm = causal_lm(unwrap(model))
    adapted: dict[str, Any] = {name: module for name, module in lm.named_modules() if is_lora_layer(module)}
    for name, parameter in WHOLE.full_parameters(lm):
        *path, own = name.split(".")
        if any(part.startswith("lora_") for part in path):
            continue
        if path and path[-1] == "base_layer":
            layer = adapted[".".join(path[:-1])]
            dtype = parameter.dtype if parameter.is_floating_point() else lm.dtype
            yield ".".join((*path[:-1], own)), merged_weight(layer).to(dtype) if own == "weight" else parameter
        else:
            yield name, parameter
    head = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(lm.config.get_text_config(), "tie_word_embeddings", False) and head is not None:
        name = next(name for name, module in lm.named_modules() if module is head)
        yield f"{name}.weight", WHOLE.whole(head.weight)


@torch.no_grad()
def policy_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sample]],
    *,
    temperature: float = 1.0,
    microbatch_tokens: int = 2048,
) -> list[np.ndarray]:
    """Log-probs of completions under the model, computed like the trainer's: fp32, one array for each, prompt by
    prompt."""
    trees = [
        Tree(str(p), np.array(prompt, np.int32), tuple(_branch(c) for c in answers))
        for p, (prompt, answers) in enumerate(zip(prompts, completions, strict=True))
    ]
    outer = unwrap(model)
    training = outer.training
    outer.eval()
    first = np.cumsum([0, *(len(tree.branches) for tree in trees)])
    found: list[np.ndarray] = [np.empty(0, np.float32)] * int(first[-1])
    device = device_of(outer)
    for cpu_batch in pack(trees, microbatch_tokens=microbatch_tokens):
        batch = cpu_batch.to(device)
        logprobs = batch_logprobs(outer, batch, temperature=temperature).cpu()
        for b in range(batch.num_branches):
            tree = batch.tree_index[int(batch.branch_tree[b])]
            found[int(first[tree]) + int(batch.branch_slot[b])] = logprobs[cpu_batch.branch == b].numpy()
    outer.train(training)
    return found


def _branch(completion: Sample) -> Branch:
    return Branch(np.array(completion.ids, np.int32), np.ones(len(completion.ids), np.bool_))


def _engine_logprobs(sampled: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
    if any(completion.logprobs is None for answers in sampled for completion in answers):
        raise TrainingFault("the engine gives no log-probs, so nothing can be proved about its weights")
    return [np.array(completion.logprobs, np.float32) for answers in sampled for completion in answers]
