"""Mixtures of experts: which expert a token goes to depends on the token alone, so that trees serve them as they serve
dense models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig

from align.batching.tree import pack
from align.models.compute.forward import batch_logprobs
from tests.support.tiny import branch_logprobs, gradients, random_trees

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": hf.Qwen3MoeConfig(**SHAPE, num_experts=6, norm_topk_prob=True),
    "mixtral": hf.MixtralConfig(**SHAPE, num_local_experts=6),
    "glm4_moe": hf.Glm4MoeConfig(**SHAPE, n_routed_experts=6, n_shared_experts=1, first_k_dense_replace=1),
    "olmoe": hf.OlmoeConfig(**{**SHAPE, "intermediate_size": 16}, num_experts=6),
}


def model_of(family: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_trees_are_computed_as_sequences_by_themselves(family: str) -> None:
    """Log-probs of every answer as transformers computes them for the prompt and this answer alone."""
    model = model_of(family)
    trees = random_trees(np.random.default_rng(3), [1, 3, 2])
    found = branch_logprobs(model, pack(trees, microbatch_tokens=64))
    by_transformers = model_of(family)
    for number, tree in enumerate(trees):
        for slot, branch in enumerate(tree.branches):
            ids = torch.tensor(np.concatenate([tree.trunk, branch.ids]))[None].long()
            with torch.no_grad():
                logits = by_transformers(input_ids=ids).logits[0].float().log_softmax(-1)
            places = torch.arange(len(tree.trunk), ids.shape[1])[torch.from_numpy(branch.mask)]
            right = logits[places - 1].gather(1, ids[0, places, None]).squeeze(1)
            assert (found[number, slot] - right).abs().max() < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_padded_layout(family: str) -> None:
    """Routers and experts included."""
    model = model_of(family)
    trees = random_trees(np.random.default_rng(4), [2, 3, 1])
    by_layout = {}
    for layout in ("tree", "padded"):
        batches = pack(trees, microbatch_tokens=48, layout=layout)  # type: ignore[arg-type]
        by_layout[layout] = gradients(
            model, torch.stack([batch_logprobs(model, batch).sum() for batch in batches]).sum()
        )
    assert any("experts" in name for name in by_layout["tree"])
    for name, right in by_layout["padded"].items():
        assert (by_layout["tree"][name] - right).abs().max() < 1e-4 * max(1.0, float(right.abs().max())), name
