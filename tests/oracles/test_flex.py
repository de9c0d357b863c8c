"""The CUDA attention's rule, checked on the CPU where flex_attention runs forward: it must say what the per-tree
attention says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.batching.tree import build
from align.models.compute import flex
from align.models.compute.attention import Trees, tree_attention, tree_mask
from tests.invariants.test_layouts import LENGTH, ROWS, dense_mask
from tests.support.tiny import random_trees


@pytest.mark.parametrize("window", [None, 5])
def test_flex_equals_per_tree_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2: same output at every real token, with a row of several trees, grouped heads, padding, and a sliding
    window."""
    # The plain formula
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    trees = random_trees(np.random.default_rng(3), [1, 4, 2])
    batch = build(trees, range(3), layout="tree", multiple_of=16)
    length = batch.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, length, 8, generator=generator)
    module = torch.nn.Identity()
    expected, _ = tree_attention(
        module,
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        trees=Trees(batch.rows, torch.device("cpu")),
    )
    ours, _ = flex.flex_tree_attention(
        module,
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        trees=flex.FlexTrees(batch.rows, batch.position_ids),
    )
    real = batch.attention_mask.bool()
    assert not real.all(), "there must be padding"
    torch.testing.assert_close(ours[real], expected[real], atol=1e-6, rtol=0)
    assert ours.isfinite().all(), "padding rows must not become NaN"


@pytest.mark.parametrize("window", [None, 3])
def test_nested_nodes_under_the_block_mask(window: int | None) -> None:
    """Rows of nested nodes, token by token; padding sees padding alone."""
    position = torch.zeros(len(ROWS), LENGTH, dtype=torch.int64)
    for r, row in enumerate(ROWS):
        for span in row:
            steps = [torch.arange(before, before + n.length) for before, n in zip(span.before, span.nodes, strict=True)]
            position[r, span.start : span.end] = torch.cat(steps)
    allowed = flex.FlexTrees(ROWS, position).allowed(window)
    q, k = torch.meshgrid(torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    dense = dense_mask(ROWS, LENGTH, window)
    for r, row in enumerate(ROWS):
        ours, end = allowed(torch.tensor(r), torch.tensor(0), q, k), row[-1].end
        assert torch.equal(ours[:end], dense[r, :end])
        assert not ours[end:, :end].any() and ours[end:].any(dim=1).all()


@pytest.mark.parametrize("window", [None, 5])
def test_block_mask_is_the_dense_mask(window: int | None) -> None:
    """Token by token, the mask function equals the dense per-tree masks laid along the diagonal."""
    trees = random_trees(np.random.default_rng(4), [3, 1, 2])
    batch = build(trees, range(3), layout="tree")
    length = batch.input_ids.shape[1]
    allowed = flex.FlexTrees(batch.rows, batch.position_ids).allowed(window)
    zero = torch.zeros((), dtype=torch.int64)
    q, k = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    ours = allowed(zero, zero, q, k)
    dense = torch.zeros(length, length, dtype=torch.bool)
    for span in batch.rows[0]:
        n = span.end - span.start
        mask = tree_mask(span, window)
        dense[span.start : span.end, span.start : span.end] = (
            torch.ones(n, n, dtype=torch.bool).tril() if mask is None else mask
        )
    assert torch.equal(ours, dense)
