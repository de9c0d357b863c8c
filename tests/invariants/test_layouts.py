"""A layout decides what is computed twice, never what is learned: tree, packed and padded rows give one loss and one
gradient.

The oracle of the tree mask is the dense mask of a whole row, made here from the paths themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.testing import assert_close

from align.batching.batch import ROOT, Batch, Span, TreeNode
from align.batching.tree import Layout, pack
from align.data.tree import Tree
from align.errors import InputError
from align.models.compute.attention import Trees, tree_attention, tree_mask
from align.models.compute.forward import batch_logprobs, hidden_states
from tests.support.tiny import (
    FAMILIES,
    UNSERVED,
    VOCAB,
    branch_logprobs,
    by_branch,
    gradients,
    nested_tree,
    random_tree,
    random_trees,
    tiny,
)

LARGE, SMALL = 10_000, 16  # tokens a micro-batch: everything in one; one or two trees each
LAYOUTS: list[tuple[Layout, bool]] = [("packed", False), ("padded", False), ("padded", True)]
MIXED = [2, 1, 5, 2, 1]
FEW = ("llama", "glm4", "mistral_short_window", "gpt2")  # where the kind of attention matters less


def close(got: Mapping[Any, Tensor], wanted: Mapping[Any, Tensor]) -> None:
    """Equal to 1e-5, value by value."""
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert_close(value, wanted[key], atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def equal(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got, wanted)


def loss_of(logprobs: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Mean over targets, plus a term that compares the branches of each tree, as preference losses do."""
    values = torch.cat(list(logprobs.values()))
    sums = {key: value.sum() for key, value in logprobs.items()}
    pairs = [softplus(0.3 * (sums[t, b] - sums[t, 0])) for t, b in sums if b > 0]
    return -values.sum() / len(values) + (torch.stack(pairs).mean() if pairs else 0.0)


@pytest.mark.parametrize("branches", [[1, 1], [2, 2], [5, 5], MIXED], ids=["1", "2", "5", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree(family: str, branches: list[int]) -> None:
    """Log-probs, loss and the gradient of every parameter, in one large micro-batch and in many small
    ones."""
    trees = random_trees(np.random.default_rng(2), branches)
    model = tiny(family)
    logprobs = branch_logprobs(model, pack(trees, microbatch_tokens=LARGE))
    loss = loss_of(logprobs)
    gradient = gradients(model, loss)
    assert max(g.abs().max().item() for g in gradient.values()) > 0.01
    for layout, own in [("tree", False), *LAYOUTS]:
        batches = pack(trees, microbatch_tokens=SMALL, layout=layout)
        assert len(batches) > 1
        other = branch_logprobs(model, batches, own_attention=own)
        close(other, logprobs)
        assert_close(loss_of(other), loss, atol=1e-5, rtol=0)
        close(gradients(model, loss_of(other)), gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_large_packed_and_padded_rows_agree(family: str) -> None:
    """Many sequences in one packed row, and padded rows of very unequal lengths."""
    trees = random_trees(np.random.default_rng(4), MIXED)
    model = tiny(family)
    logprobs = branch_logprobs(model, pack(trees, microbatch_tokens=LARGE))
    for layout, own in LAYOUTS:
        (batch,) = pack(trees, microbatch_tokens=LARGE, layout=layout)
        close(branch_logprobs(model, [batch], own_attention=own), logprobs)


# Who sees whom


def changed(tree: Tree, *, trunk: int | None = None, branch: int | None = None) -> Tree:
    """The tree with other tokens in its trunk (at one place), or in all of one branch."""
    ids = tree.trunk.copy()
    if trunk is not None:
        ids[trunk] = (ids[trunk] + 1) % VOCAB
    branches = [replace(b, ids=(b.ids + 1) % VOCAB) if k == branch else b for k, b in enumerate(tree.branches)]
    return replace(tree, trunk=ids, branches=tuple(branches))


def all_targets(trees: Sequence[Tree]) -> list[Tree]:
    """Every branch token is a target, so that nothing that changes can hide."""
    return [
        replace(t, branches=tuple(replace(b, mask=np.ones(len(b.ids), dtype=bool)) for b in t.branches)) for t in trees
    ]


@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_trees_do_not_notice(family: str, layout: Layout) -> None:
    """All tokens of one tree change; every log-prob of the other trees of its row stays the same to the last
    bit."""
    trees = all_targets(random_trees(np.random.default_rng(6), [2, 1, 3]))
    model = tiny(family)
    other = replace(trees[1], trunk=(trees[1].trunk + 1) % VOCAB, branches=changed(trees[1], branch=0).branches)
    (before,), (after,) = (
        pack(t, microbatch_tokens=LARGE, layout=layout) for t in (trees, [trees[0], other, trees[2]])
    )
    with torch.no_grad():
        old, new = branch_logprobs(model, [before]), branch_logprobs(model, [after])
    for key, value in old.items():
        assert equal(new[key], value) == (key[0] != 1), key


@pytest.mark.parametrize("family", FAMILIES)
def test_sibling_branches_do_not_notice(family: str) -> None:
    """All tokens of the middle branch change; its siblings, before and after it in the row, stay the same to the last
    bit."""
    tree = all_targets([random_tree(np.random.default_rng(7), 3, [4, 5, 3])])[0]
    model = tiny(family)
    with torch.no_grad():
        old = branch_logprobs(model, pack([tree], microbatch_tokens=LARGE))
        new = branch_logprobs(model, pack([changed(tree, branch=1)], microbatch_tokens=LARGE))
    assert [equal(new[0, b], old[0, b]) for b in range(3)] == [True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_reaches_all_branches(family: str) -> None:
    """The trunk's first token changes; so does the first log-prob of every branch."""
    tree = all_targets([random_tree(np.random.default_rng(8), 4, [3, 2, 4])])[0]
    model = tiny(family)
    with torch.no_grad():
        old = branch_logprobs(model, pack([tree], microbatch_tokens=LARGE))
        new = branch_logprobs(model, pack([changed(tree, trunk=0)], microbatch_tokens=LARGE))
    assert all((new[key][0] - old[key][0]).abs() > 1e-4 for key in old)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_continue_from_the_trunk(family: str) -> None:
    """The second branch stands far to the right in its row; its positions, and so its log-probs, are those of the bare
    sequence."""
    tree = random_tree(np.random.default_rng(3), 4, [9, 6])
    alone = replace(tree, branches=tree.branches[1:])
    model = tiny(family)
    (both,), (single,) = pack([tree], microbatch_tokens=LARGE), pack([alone], microbatch_tokens=LARGE)
    assert both.position_ids.tolist() == [[*range(4), *range(4, 13), *range(4, 10)]]
    assert single.position_ids.tolist() == [[*range(10)]]
    with torch.no_grad():
        assert_close(branch_logprobs(model, [both])[0, 1], branch_logprobs(model, [single])[0, 0], atol=1e-5, rtol=0)
        # The test would be blind on a model that does not care where a branch stands.
        misplaced = replace(both, position_ids=torch.arange(19)[None])
        assert (branch_logprobs(model, [misplaced])[0, 1] - branch_logprobs(model, [single])[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_of_one_branch_is_a_plain_sequence(family: str) -> None:
    """One branch: the hidden states of the row are transformers' own on the same ids, without a mask."""
    tree = random_tree(np.random.default_rng(3), 5, [8])
    model = tiny(family)
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    (batch,) = pack([tree], microbatch_tokens=LARGE)
    ids = torch.tensor([[*tree.trunk.tolist(), *tree.branches[0].ids.tolist()]])
    with torch.no_grad():
        assert_close(
            hidden_states(model, batch)[None],
            own.base_model(ids, use_cache=False).last_hidden_state,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("rejected", [1, 4])
@pytest.mark.parametrize("family", FEW)
def test_one_tree_of_k_rejected_is_k_pairs(family: str, rejected: int) -> None:
    """Self-Contrast: one chosen answer against K rejected ones, in one tree or as K pairs of their own: same sums, same
    gradient."""
    tree = random_tree(np.random.default_rng(12), 6, [5, *[4, 7, 3, 6][:rejected]])
    pairs = [replace(tree, branches=(tree.branches[0], branch)) for branch in tree.branches[1:]]
    model = tiny(family)

    def pair_losses(
        logprobs: Mapping[tuple[int, int], Tensor], chosen: Sequence[Any], worse: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        differences = torch.stack([logprobs[c].sum() - logprobs[r].sum() for c, r in zip(chosen, worse, strict=True)])
        return differences, softplus(-0.2 * differences).sum()

    one = branch_logprobs(model, pack([tree], microbatch_tokens=LARGE))
    many = branch_logprobs(model, pack(pairs, microbatch_tokens=SMALL))
    ours, our_loss = pair_losses(one, [(0, 0)] * rejected, [(0, k + 1) for k in range(rejected)])
    theirs, their_loss = pair_losses(many, [(k, 0) for k in range(rejected)], [(k, 1) for k in range(rejected)])
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    close(gradients(model, our_loss), gradients(model, their_loss))


# Padding


def poisoned(batch: Batch) -> Batch:
    """Random ids and positions in place of the padding."""
    rng = torch.Generator().manual_seed(1)
    padding = batch.attention_mask == 0
    assert padding.sum() > 4
    ids = torch.randint(3, VOCAB, batch.input_ids.shape, generator=rng)
    positions = torch.randint(0, 100, batch.input_ids.shape, generator=rng)
    return replace(
        batch,
        input_ids=torch.where(padding, ids, batch.input_ids),
        position_ids=torch.where(padding, positions, batch.position_ids),
    )


@pytest.mark.parametrize(("layout", "own"), [("tree", False), *LAYOUTS])
@pytest.mark.parametrize("family", FEW)
def test_poisoned_padding_changes_nothing(family: str, layout: Layout, own: bool) -> None:
    """What stands in the padding, and how much of it there is, moves no log-prob and no gradient."""
    trees = random_trees(np.random.default_rng(10), MIXED)
    model = tiny(family)
    plain = branch_logprobs(model, pack(trees, microbatch_tokens=40, layout=layout), own_attention=own)
    padded = pack(trees, microbatch_tokens=40, layout=layout, multiple_of=64)
    clean = branch_logprobs(model, padded, own_attention=own)
    poison = branch_logprobs(model, [poisoned(batch) for batch in padded], own_attention=own)
    close(clean, plain)
    assert all(equal(poison[key], value) for key, value in clean.items())
    wanted = gradients(model, loss_of(clean))
    for name, gradient in gradients(model, loss_of(poison)).items():
        assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-6)


# Checkpointing and adapters


def checkpointed(model: Any) -> list[int]:
    """Switch gradient checkpointing on; the list grows by one with every run of the first layer."""
    runs: list[int] = []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    next(m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0"))).register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    return runs


@pytest.mark.parametrize(("layout", "own"), [("tree", False), ("padded", True)])
@pytest.mark.parametrize("family", FEW)
def test_gradient_checkpointing_changes_nothing(family: str, layout: Layout, own: bool) -> None:
    """The layers run again in the backward pass, with the same trees."""
    (batch,) = pack(random_trees(np.random.default_rng(13), MIXED), microbatch_tokens=LARGE, layout=layout)
    model = tiny(family)
    logprobs = branch_logprobs(model, [batch], own_attention=own)
    wanted = gradients(model, loss_of(logprobs))
    runs = checkpointed(model)
    again = branch_logprobs(model, [batch], own_attention=own)
    got = gradients(model, loss_of(again))
    assert len(runs) == 2  # once forward, once more in the backward pass
    assert all(equal(again[key], value) for key, value in logprobs.items())
    for name, gradient in got.items():
        assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-6)


def with_lora(family: str) -> peft.PeftModel:
    """LoRA on all linear layers, with a B that is not zero: a fresh one would make any adapter a no-op."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("family", FEW)
def test_lora_equals_the_merged_model(family: str) -> None:
    """Through PEFT's wrapper, the adapter is active; its gradients are those of the padded layout."""
    trees = random_trees(np.random.default_rng(14), MIXED)
    model = with_lora(family)
    batches = pack(trees, microbatch_tokens=SMALL)
    logprobs = branch_logprobs(model, batches)
    close(logprobs, branch_logprobs(copy.deepcopy(model).merge_and_unload(), batches))
    with model.disable_adapter(), torch.no_grad():
        assert any((branch_logprobs(model, batches)[key] - value).abs().max() > 0.01 for key, value in logprobs.items())
    gradient = gradients(model, loss_of(logprobs))
    assert all("lora_" in name for name in gradient)
    close(
        gradients(model, loss_of(branch_logprobs(model, pack(trees, microbatch_tokens=LARGE, layout="padded")))),
        gradient,
    )


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("family", FEW)
def test_lora_with_gradient_checkpointing(family: str) -> None:
    """Every A and B gets the same gradient, and one that is not zero, with checkpointing on."""
    (batch,) = pack(random_trees(np.random.default_rng(14), MIXED), microbatch_tokens=LARGE)
    model = with_lora(family)
    wanted = gradients(model, loss_of(branch_logprobs(model, [batch])))
    runs = checkpointed(model)
    got = gradients(model, loss_of(branch_logprobs(model, [batch])))
    assert len(runs) == 2
    for name, gradient in got.items():
        assert gradient.abs().max() > 1e-5, name
        assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-6)


# The dense mask


def dense_mask(rows: Sequence[Sequence[Span]], length: int, window: int | None) -> Tensor:
    """May token q of a row look at token k? bool [R, L, L], by the rule itself: k's node is an ancestor of q's, or their
    node is one and k is not after q. Distances are along the path."""
    mask = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for r, row in enumerate(rows):
        for span in row:
            paths: list[list[int]] = []  # of each node: the tokens from the root to its end
            start = span.start
            for node in span.nodes:
                before = paths[node.parent] if node.parent >= 0 else []
                paths.append([*before, *range(start, start + node.length)])
                start += node.length
                for q in range(len(before), len(paths[-1])):
                    for k in range(q + 1):
                        if window is None or q - k < window:
                            mask[r, paths[-1][q], paths[-1][k]] = True
    return mask


NESTED = Span(  # 0 has the children 1, 4 and 5; 1 has 2 and 3; 5, 6 and 7 are a path
    2,
    (
        TreeNode(3, ROOT),
        TreeNode(2, 0),
        TreeNode(4, 1),
        TreeNode(1, 1),
        TreeNode(2, 0),
        TreeNode(1, 0),
        TreeNode(3, 5),
        TreeNode(2, 6),
    ),
)
CHAIN = Span(20, (TreeNode(2, ROOT), TreeNode(1, 0), TreeNode(3, 1)))
ROWS = (
    (Span.of_branches(0, 3, (2, 4)), Span.of_branches(9, 2, (3,)), Span.of_branches(14, 4, (1, 2, 5))),
    (Span.of_branches(0, 6, (6,)), Span.of_branches(12, 1, (2, 2))),
    (Span(0, (TreeNode(2, ROOT),)), NESTED, CHAIN),
)
LENGTH = 30  # four tokens of padding in the first row, thirteen in the second, four in the third


@pytest.mark.parametrize("window", [None, 1, 3, 5, 50])
def test_tree_mask_is_the_dense_mask(window: int | None) -> None:
    """Span by span. None stands for plain causal attention, which must then be what the paths say."""
    dense = dense_mask(ROWS, LENGTH, window)
    for r, row in enumerate(ROWS):
        for span in row:
            part = dense[r, span.start : span.end, span.start : span.end]
            made = tree_mask(span, window)
            causal = torch.ones_like(part).tril()
            assert torch.equal(causal if made is None else made, part), span
            assert (made is None) == (span.is_path and torch.equal(causal, part))
            outside = dense[r, span.start : span.end].clone()
            outside[:, span.start : span.end] = False
            assert not outside.any()
            on_device = tree_mask(span, window, "meta")
            assert (made is None) == (on_device is None) and (on_device is None or on_device.device.type == "meta")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_tree_attention_is_dense_attention(window: int | None, kv_heads: int) -> None:
    """Softmax over the whole row under the dense mask, written out, forward and gradient; zeros at padding."""
    torch.manual_seed(0)
    query = torch.randn(3, 4, LENGTH, 8, requires_grad=True)
    key, value = (torch.randn(3, kv_heads, LENGTH, 8, requires_grad=True) for _ in range(2))
    trees = Trees(ROWS, torch.device("cpu"))
    got, _ = tree_attention(torch.nn.Module(), query, key, value, None, scaling=0.9, sliding_window=window, trees=trees)

    mask = dense_mask(ROWS, LENGTH, window)[:, None]
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
    scores = (query @ keys.transpose(2, 3) * 0.9).masked_fill(~mask, -torch.inf)
    real = mask.any(dim=-1, keepdim=True)
    wanted = (torch.where(real, scores, 0.0).softmax(-1) * real) @ values
    assert_close(got, wanted.transpose(1, 2), atol=1e-6, rtol=1e-5)
    assert (got[0, 26:] == 0).all() and (got[1, 17:] == 0).all() and (got[2, 26:] == 0).all()
    weights = torch.randn(got.shape)
    for g, w in zip(
        *(torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (got, wanted.transpose(1, 2))),
        strict=True,
    ):
        assert_close(g, w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "window"), [("llama", None), ("glm4", None), ("gpt2", None), ("mistral_short_window", 5)]
)
def test_model_under_the_dense_mask(family: str, window: int | None) -> None:
    """The oracle of D2: transformers' eager attention under the row's dense 4-D mask gives the same log-probs and
    gradients."""
    (batch,) = pack(random_trees(np.random.default_rng(15), MIXED), microbatch_tokens=LARGE, multiple_of=16)
    model = tiny(family)
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    allowed = dense_mask(batch.rows, batch.input_ids.shape[1], window)[:, None]
    # A row of -inf alone is NaN; a padding token may look at itself
    allowed |= torch.eye(allowed.shape[-1], dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
    logits = own(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=additive, use_cache=False
    ).logits.flatten(0, 1)
    wanted = by_branch(
        [batch], [torch.log_softmax(logits[batch.sources], -1)[torch.arange(batch.num_targets), batch.target_ids]]
    )
    got = branch_logprobs(model, [batch])
    close(got, wanted)
    close(gradients(model, loss_of(got)), gradients(own, loss_of(wanted)))


def test_nested_nodes_are_computed_as_their_paths() -> None:
    """Hidden states of a tree of trees: those of each path from its root, computed alone."""
    model = tiny("llama")
    (single,) = pack(random_trees(np.random.default_rng(3), [1]), microbatch_tokens=LARGE)
    spans = (Span(0, (TreeNode(2, ROOT),)), NESTED)
    ids = torch.randint(0, VOCAB, (1, NESTED.end), generator=torch.Generator().manual_seed(4))
    position = torch.cat(
        [
            torch.arange(before, before + node.length)
            for span in spans
            for before, node in zip(span.before, span.nodes, strict=True)
        ]
    )
    batch = replace(single, input_ids=ids, position_ids=position[None], rows=(spans,))
    allowed = dense_mask(batch.rows, NESTED.end, None)[0]
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        for last in range(NESTED.end):
            path = torch.nonzero(allowed[last]).squeeze(1)
            alone = replace(
                single,
                input_ids=ids[:, path],
                position_ids=torch.arange(len(path))[None],
                rows=((Span(0, (TreeNode(len(path), ROOT),)),),),
            )
            assert_close(hidden[last], hidden_states(model, alone)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_a_branch_reaches_what_continues_it_and_nothing_else(family: str) -> None:
    """All tokens of a branch change. What continues it notices, at its first token; all others stay the same to the
    last bit."""
    tree = all_targets([nested_tree(np.random.default_rng(7), [-1, 0, 0, 2, -1, 4], longest=3)])[0]
    model = tiny(family)
    with torch.no_grad():
        old = branch_logprobs(model, pack([tree], microbatch_tokens=LARGE))
        new = branch_logprobs(model, pack([changed(tree, branch=2)], microbatch_tokens=LARGE))
    assert [equal(new[0, b], old[0, b]) for b in range(6)] == [True, True, False, False, True, True]
    assert (new[0, 3][0] - old[0, 3][0]).abs() > 1e-4


def test_nodes_stand_in_depth_first_order() -> None:
    """A node that continues one whose subtree is over would be seen by tokens of others."""
    with pytest.raises(ValueError, match="node 3 comes too late to continue node 1"):
        Span(0, (TreeNode(1, ROOT), TreeNode(1, 0), TreeNode(1, 0), TreeNode(1, 1)))
    with pytest.raises(ValueError, match="node 0 comes too late"):
        Span(0, (TreeNode(1, 1), TreeNode(1, ROOT)))
    assert NESTED.ancestors[7] == (0, 5, 6) and NESTED.longest_path == 9 and not NESTED.is_flat
    assert CHAIN.is_path and not CHAIN.is_flat and Span.of_branches(0, 2, (1, 1)).is_flat


# What trees cannot do


@pytest.mark.parametrize("family", UNSERVED)
def test_models_that_trees_cannot_serve_are_refused(family: str) -> None:
    """Capped scores, attention sinks, attention code of their own, linear attention, keywords not handed on: each
    would leak or leave something out in silence. All are refused with the way out, which gives the model's own
    log-probs.
    """
    trees = random_trees(np.random.default_rng(5), [2, 1])
    model = tiny(family)
    own = copy.deepcopy(model)
    with pytest.raises(InputError, match="layout: padded"):
        branch_logprobs(model, pack(trees, microbatch_tokens=LARGE))
    with torch.no_grad():
        padded = branch_logprobs(model, pack(trees, microbatch_tokens=LARGE, layout="padded"), own_attention=True)
        for (t, b), value in padded.items():
            trunk, branch = trees[t].trunk.tolist(), trees[t].branches[b]
            logits = own(torch.tensor([[*trunk, *branch.ids.tolist()]]), use_cache=False).logits[0, len(trunk) - 1 : -1]
            wanted = torch.log_softmax(logits.float(), -1)[np.flatnonzero(branch.mask), branch.ids[branch.mask]]
            assert_close(value, wanted, atol=1e-5, rtol=1e-5)


def test_forward_without_trees_is_an_error() -> None:
    """A model left with tree attention and called directly must not fall back to attending across trees."""
    model = tiny("llama")
    (batch,) = pack(random_trees(np.random.default_rng(5), [2, 1]), microbatch_tokens=LARGE)
    batch_logprobs(model, batch)
    with pytest.raises(InputError, match="tree bounds"):
        model(batch.input_ids)
