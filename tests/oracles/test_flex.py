"""The CUDA attention's rule, checked on the CPU where flex_attention runs forward: it must say what the per-tree
attention says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from align.batching.tree import build, pack
from align.models.compute import attention, flex
from align.models.compute.attention import Trees, lacks_grouped_kernel, tree_attention, tree_mask
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
    zero = torch.tensor(0)
    for r, row in enumerate(ROWS):
        ours, end = allowed(zero, zero, r * LENGTH + q, r * LENGTH + k), row[-1].end
        for other in set(range(len(ROWS))) - {r}:
            assert not allowed(zero, zero, r * LENGTH + q, other * LENGTH + k).any(), "rows see nothing of each other"
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


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tokens", [40, 400])
def test_rows_are_attended_in_one(window: int | None, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of several rows, laid into a single one: the same output as tree by tree."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    trees = random_trees(np.random.default_rng(5), [1, 3, 2, 5, 1, 4, 2])
    batch = build(trees, range(7), layout="padded") if tokens == 40 else pack(trees, microbatch_tokens=tokens)[0]
    rows, length = batch.input_ids.shape
    assert (rows > 4) == (tokens == 40)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, length, 8, generator=generator)
    key, value = torch.randn(2, rows, 2, length, 8, generator=generator)
    module = torch.nn.Identity()
    expected, _ = tree_attention(
        module, query, key, value, None, sliding_window=window, trees=Trees(batch.rows, torch.device("cpu"))
    )
    bounds = flex.FlexTrees(batch.rows, batch.position_ids)
    ours, _ = flex.flex_tree_attention(module, query, key, value, None, sliding_window=window, trees=bounds)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(ours[real], expected[real], atol=1e-6, rtol=0)
    assert ours.shape == expected.shape and ours.isfinite().all()


@pytest.mark.parametrize("window", [None, 150])
def test_the_block_mask_is_flex_attentions_own(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made of a few rows of blocks at a time, it says what torch says that holds every pair of tokens."""
    trees = random_trees(np.random.default_rng(7), [2] * 60)
    (batch,) = pack(trees, microbatch_tokens=100_000)
    bounds = flex.FlexTrees(batch.rows, batch.position_ids)
    total = len(bounds.until)
    assert total >= 8 * flex.BLOCK
    monkeypatch.setattr(flex, "_CHUNK", 3 * flex.BLOCK * total)
    ours = bounds.block_mask(window)
    theirs = create_block_mask(bounds.allowed(window), 1, None, total, total, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.seq_lengths == theirs.seq_lengths
    for mine, its in ((ours.kv_num_blocks, theirs.kv_num_blocks), (ours.full_kv_num_blocks, theirs.full_kv_num_blocks)):
        assert mine is not None and its is not None and torch.equal(mine, its)
    for mine, its, count in (
        (ours.kv_indices, theirs.kv_indices, ours.kv_num_blocks),
        (ours.full_kv_indices, theirs.full_kv_indices, ours.full_kv_num_blocks),
        (ours.q_indices, theirs.q_indices, ours.q_num_blocks),
    ):
        assert mine is not None and its is not None and count is not None
        for a, b, n in zip(mine[0, 0], its[0, 0], count[0, 0], strict=True):
            assert sorted(a[:n].tolist()) == sorted(b[:n].tolist())


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def test_a_block_mask_of_a_long_row_takes_little_memory() -> None:
    """Every pair of 16384 tokens would be 1.07 GB in int32."""
    (batch,) = pack(random_trees(np.random.default_rng(8), [2]), microbatch_tokens=10**6, multiple_of=2**14)
    bounds = flex.FlexTrees(batch.rows, batch.position_ids)
    with Largest() as largest:
        bounds.block_mask(None)
    assert 2**20 < largest.bytes <= 64 * 2**20


def test_lengths_are_few() -> None:
    """Four from each power of two to the next, and little of them is padding."""
    lengths = [flex.padded_length(tokens) for tokens in range(1, 2**17 + 1)]
    assert all(length >= tokens and length % flex.BLOCK == 0 for tokens, length in enumerate(lengths, 1))
    assert all(5 * (length - tokens) <= length for tokens, length in enumerate(lengths, 1) if tokens > 1024)
    assert len(set(lengths)) == 8 + 4 * 7
    assert flex.padded_length(8192) == 8192 and flex.padded_length(8193) == 10240


@torch._dynamo.config.patch(disable=False)
def test_the_kernel_is_compiled_for_lengths_and_not_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty batches of other rows and lengths need four kernels; torch's limit of 8 for each function would be spent
    after 8 of them. More than are allowed raise, where torch by itself goes on unfused."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    settings: dict[str, Any] = {}
    compiling = torch.compile

    def on_the_cpu(function: Any, **how: Any) -> Any:
        settings.update(how)
        return compiling(function, backend=backend, **how)

    monkeypatch.setattr(torch, "compile", on_the_cpu)
    kernel = flex._compiled.__wrapped__()
    monkeypatch.setattr(flex, "_kernel", lambda query: kernel)
    module = torch.nn.Identity()

    def attend(rows: int, length: int) -> None:
        bounds = flex.FlexTrees(((),) * rows, torch.zeros(rows, length, dtype=torch.int64))
        query = torch.zeros(rows, 2, length, 16)
        with torch.no_grad():
            flex.flex_tree_attention(module, query, query, query, None, trees=bounds)

    for number in range(30):
        attend(rows=1 + number % 3, length=12 + 5 * number)
    assert len(graphs) == len({flex.padded_length((1 + n % 3) * (12 + 5 * n)) for n in range(30)}) == 4
    assert settings == {"dynamic": False, "fullgraph": True, "recompile_limit": flex._SHAPES}

    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_SHAPES", 2)
    kernel = flex._compiled.__wrapped__()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for number in range(4):
            attend(rows=1, length=128 * (number + 1))
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [None, 5])
def test_repeated_heads_give_what_grouped_ones_give(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no fused kernel takes a mask and groups, keys and values are repeated: same output, same gradients, and
    plain causal attention, which needs no mask, keeps its groups."""
    trees = random_trees(np.random.default_rng(3), [1, 4, 2])
    batch = build(trees, range(3), layout="tree", multiple_of=16)
    length = batch.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    found = []
    for lacks in (False, True):
        monkeypatch.setattr(attention, "lacks_grouped_kernel", lambda query, lacks=lacks: lacks)
        asked: list[tuple[bool, bool]] = []

        def attend(*parts: Tensor, enable_gqa: bool, attn_mask: Any, asked: Any = asked, **how: Any) -> Tensor:
            asked.append((attn_mask is not None, enable_gqa))
            return torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=attn_mask, enable_gqa=enable_gqa, **how
            )

        monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
        generator.manual_seed(0)
        parts = [torch.randn(1, heads, length, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
        bounds = Trees(batch.rows, torch.device("cpu"))
        output, _ = tree_attention(torch.nn.Identity(), *parts, None, sliding_window=window, trees=bounds)
        output.square().sum().backward()
        found.append([output, *(part.grad for part in parts)])
        assert {masked for masked, _ in asked} == {False, True}
        assert all(grouped == (not lacks or not masked) for masked, grouped in asked)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "capability", "lacks"),
    [
        (torch.bfloat16, (9, 0), False),
        (torch.float16, (10, 0), False),
        (torch.bfloat16, (8, 0), True),
        (torch.float32, (9, 0), True),
    ],
)
def test_which_gpus_lack_a_grouped_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], lacks: bool
) -> None:
    """fp32 anywhere, and half precision before Hopper; under autocast its precision counts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
    assert lacks_grouped_kernel(query) == lacks
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert lacks_grouped_kernel(query) == (capability < (9, 0))
    assert not lacks_grouped_kernel(torch.zeros(1))
