"""Attention along long paths without a mask of all pairs: equal to attention with one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from align.models.compute import long_paths
from align.models.compute.attention import Trees, path_attention

WAYS = {"joined": (None, 40), "window": (7, 40), "window, no trunk": (7, 0), "window as long as the node": (23, 40)}


def drawn(heads: int, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """For each length a tensor [1, heads, length, 8]."""
    return [torch.randn(1, heads, length, 8, dtype=dtype, requires_grad=True) for length in lengths]


def by_hand(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """The definition, in fp64: softmax of the scores of what a token may see."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    before = key.shape[2] - query.shape[2]
    place, other = torch.arange(query.shape[2])[:, None] + before, torch.arange(key.shape[2])[None]
    seen = (other <= place) & (other > place - (window or key.shape[2]))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_long_paths_are_attended_as_the_definition_says(
    monkeypatch: pytest.MonkeyPatch, way: str, heads: int, dtype: torch.dtype, bound: float
) -> None:
    """Results, and gradients by queries, keys and values, with two heads of keys and values."""
    monkeypatch.setattr(long_paths, "MASKED", 0)
    torch.manual_seed(0)
    window, before = WAYS[way]
    kv_heads = min(heads, 2)
    (query,) = drawn(heads, [23], dtype)
    pieces = [length for length in (before - 15, 15, 23) if length > 0]
    keys, values = drawn(kv_heads, pieces, dtype), drawn(kv_heads, pieces, dtype)
    trees = Trees((), torch.device("cpu"))
    found = path_attention(trees, query, keys, values, window=window, dropout=0.0, scale=0.3)
    right = by_hand(query, torch.cat(keys, 2), torch.cat(values, 2), window, 0.3)
    assert (found - right).abs().max() < bound
    upstream = torch.randn_like(right)
    inputs = [query, *keys, *values]
    ours = torch.autograd.grad(found, inputs, upstream.to(dtype))
    for mine, theirs in zip(ours, torch.autograd.grad(right, inputs, upstream), strict=True):
        assert (mine - theirs).abs().max() < 4 * bound


MEASURED = """
import resource, sys
import numpy as np, torch
from align.batching.tree import pack
from align.data.tree import Branch, Tree
from align.models.compute.forward import batch_logprobs
from tests.support.tiny import tiny

torch.set_num_threads(1)
trunk, *branches = (int(length) for length in sys.argv[2:])
model = tiny(sys.argv[1], max_position_embeddings=trunk + max(branches))
drawn = np.random.default_rng(0)
ids = lambda length: drawn.integers(3, 90, length).astype(np.int32)
tree = Tree("t", ids(trunk), tuple(Branch(ids(length), np.ones(length, bool)) for length in branches))
(batch,) = pack([tree], microbatch_tokens=trunk + sum(branches))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batch_logprobs(model, batch).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB there")
@pytest.mark.parametrize("family", ["llama", "mistral_long_window"])
def test_memory_grows_with_the_length_of_a_trunk_and_not_with_its_square(family: str) -> None:
    """A trunk of 32,768 tokens with two branches of 4,096: one mask of a branch in fp32 would take 600 MB, and a layer
    keeps one for each branch; within a window of 64 one mask of the trunk alone would take 4 GB."""
    arguments = [sys.executable, "-c", MEASURED, family, "32768", "4096", "4096"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 600, done.stdout
