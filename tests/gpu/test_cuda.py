"""What only a CUDA device can show. Skipped without one; run with ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from align.batching.tree import pack
from align.models.compute import attention, flex
from align.models.compute.forward import batch_logprobs
from align.recipe.schema import Lora
from tests.support.tiny import gradients, random_trees, tiny

pytestmark = pytest.mark.gpu
# Flex kernels want heads of 16 and more
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_short_window"])
def test_flex_equals_per_tree_attention(family: str) -> None:
    """Log-probs and gradients of the compiled kernel equal tree-by-tree attention on the CPU, padding and several
    rows included."""
    trees = random_trees(np.random.default_rng(5), [1, 3, 2, 5, 1])
    batches = pack(trees, microbatch_tokens=64, multiple_of=128)
    cpu, gpu = tiny(family, **WIDE), tiny(family, **WIDE).cuda()
    for batch in batches:
        expected = batch_logprobs(cpu, batch)
        found = batch_logprobs(gpu, batch.to("cuda"))
        torch.testing.assert_close(found.cpu(), expected, atol=2e-4, rtol=0)
        wanted = gradients(cpu, expected.sum())
        for name, gradient in gradients(gpu, found.sum()).items():
            scale = max(1.0, float(wanted[name].abs().max()))
            torch.testing.assert_close(gradient.cpu() / scale, wanted[name] / scale, atol=1e-3, rtol=0, msg=name)


def test_cuda_takes_the_fused_kernel() -> None:
    """The device decides: flex on CUDA, tree by tree on the CPU."""
    (batch,) = pack(random_trees(np.random.default_rng(6), [2]), microbatch_tokens=64, multiple_of=128)
    model = tiny("llama", **WIDE).cuda()
    batch_logprobs(model, batch.to("cuda"))
    assert model.config._attn_implementation == flex.NAME
    batch_logprobs(model.cpu(), batch)
    assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_dpo_starts_at_ln_2_on_the_gpu(tmp_path: Path, autocast: str | None) -> None:
    """In fp32 and under bf16 autocast: reference and policy are computed alike."""
    from align.models.adapters import add_lora
    from align.training.launch import Ranks
    from tests.invariants.test_dpo import first_step, preferences, stage, trainer

    assert Ranks().device.type == "cuda"
    net = add_lora(tiny("llama", **WIDE).cuda(), Lora(rank=4))
    spec = stage("sigmoid", label_smoothing=0.0, train={"autocast": autocast, "microbatch_tokens": 128})
    metrics, _ = first_step(trainer(tmp_path, preferences(6), spec, net))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5 if autocast is None else 2e-3)
