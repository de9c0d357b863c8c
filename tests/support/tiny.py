"""Tiny models with random weights, one for each way of attending that must come out right, and random trees to run them
on.

The weights are large enough (logits of standard deviation 1 to 3, sharp attention) that a token too many in a mask, or
a position off by one, moves log-probs by 0.01 and more; the tests compare to 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import models as hf

from align.batching.batch import Batch
from align.data.tree import Branch, Tree
from align.models.compute.forward import batch_logprobs

VOCAB = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GEMMA = {
    **_SHAPE,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.25,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {**_SHAPE, "tie_word_embeddings": True}),
    "glm": (hf.GlmConfig, {**_SHAPE, "head_dim": 8, "attention_bias": True}),
    "glm4": (hf.Glm4Config, {**_SHAPE, "head_dim": 8}),
    "qwen3": (hf.Qwen3Config, {**_SHAPE, "head_dim": 8}),
    "mistral_long_window": (hf.MistralConfig, {**_SHAPE, "sliding_window": 64}),
    "mistral_short_window": (hf.MistralConfig, {**_SHAPE, "sliding_window": 5}),
    "gemma3": (hf.Gemma3TextConfig, _GEMMA),
    "gpt2": (hf.GPT2Config, _GPT2),
    # Models that do something to their logits, or have a bias on them.
    "cohere": (hf.CohereConfig, {**_SHAPE, "logit_scale": 0.25}),
    "granite": (
        hf.GraniteConfig,
        {**_SHAPE, "logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.8},
    ),
    "gemma2": (hf.Gemma2Config, {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": 4.0}),
    "phi": (hf.PhiConfig, {**_SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    # Models that trees cannot serve (UNSERVED).
    "capped": (hf.Gemma2Config, {**_GEMMA, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}),
    "sinks": (
        hf.GptOssConfig,
        {**_SHAPE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "bloom": (
        hf.BloomConfig,
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.25},
    ),
    "gptj": (hf.GPTJConfig, {**_GPT2, "rotary_dim": 4}),
    "nemotron": (hf.NemotronConfig, {**_SHAPE, "head_dim": 8}),
    "qwen3_next": (
        hf.Qwen3NextConfig,
        {
            **_SHAPE,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
UNSERVED = ("capped", "sinks", "bloom", "gptj", "nemotron", "qwen3_next")
FAMILIES = ("llama", "glm", "glm4", "qwen3", "mistral_long_window", "mistral_short_window", "gemma3", "gpt2")


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A two-layer model of ``family`` in fp32; the same weights every time. ``changes`` go into its config."""
    kind, settings = CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**{**settings, **changes}), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start at one and zero, which would hide one that is left out
                    parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_tree(
    rng: np.random.Generator,
    trunk: int,
    branches: Sequence[int],
    masks: Sequence[Sequence[int]] | None = None,
    *,
    name: str = "",
) -> Tree:
    """A tree of random tokens: ``trunk`` and ``branches`` are lengths. Random masks with at least one target each when
    None."""
    made = []
    for k, length in enumerate(branches):
        mask = rng.random(length) < 0.7 if masks is None else np.array(masks[k], dtype=bool)
        if masks is None and not mask.any():
            mask[rng.integers(length)] = True
        made.append(Branch(rng.integers(3, VOCAB, length, dtype=np.int32), mask, margin=float(rng.random())))
    return Tree(name, rng.integers(3, VOCAB, trunk, dtype=np.int32), tuple(made))


def nested_tree(rng: np.random.Generator, parents: Sequence[int], *, longest: int = 5, name: str = "") -> Tree:
    """A tree whose branches continue those at ``parents`` (-1: the trunk), of random lengths, tokens and masks."""
    lengths = rng.integers(1, longest + 1, len(parents) + 1).tolist()
    flat = random_tree(rng, lengths[0], lengths[1:], name=name)
    branches = tuple(replace(b, parent=parent) for b, parent in zip(flat.branches, parents, strict=True))
    return replace(flat, branches=branches)


def ids_to(tree: Tree, slot: int) -> list[int]:
    """All tokens from the start of the trunk to the end of a branch."""
    branch = tree.branches[slot]
    before = tree.trunk.tolist() if branch.parent < 0 else ids_to(tree, branch.parent)
    return [*before, *branch.ids.tolist()]


def random_trees(rng: np.random.Generator, branches: Sequence[int], *, longest: int = 9) -> list[Tree]:
    """One tree of random lengths for each number of branches."""
    made = []
    for t, count in enumerate(branches):
        lengths = rng.integers(1, longest + 1, count).tolist()
        made.append(random_tree(rng, int(rng.integers(1, longest + 1)), lengths, name=f"tree-{t}"))
    return made


def by_branch(batches: Sequence[Batch], values: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Target values of micro-batches, by (tree in the list that was packed, branch of the tree), in token order."""
    found: dict[tuple[int, int], Tensor] = {}
    for batch, value in zip(batches, values, strict=True):
        for b in range(batch.num_branches):
            key = batch.tree_index[int(batch.branch_tree[b])], int(batch.branch_slot[b])
            assert key not in found, f"branch {key} twice"
            found[key] = value[batch.branch == b]
    return dict(sorted(found.items()))


def branch_logprobs(model: torch.nn.Module, batches: Sequence[Batch], **options: Any) -> dict[tuple[int, int], Tensor]:
    """Log-probs of all targets, by (tree, branch)."""
    return by_branch(batches, [batch_logprobs(model, batch, **options) for batch in batches])


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every trained parameter, by name; zeros where the loss does not reach. Nothing is left on the
    model."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))
