"""Packing: nothing is lost, doubled or split, and every target is predicted by the token before it on its own path.

In the trees made here every token id occurs once, so an id tells which tree, which branch and which place a token of a
batch came from.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.batching.batch import ROOT, Batch, Pairs, Span, TreeNode
from align.batching.tree import Layout, pack
from align.data.tree import TRUNK, Branch, Tree
from tests.support.tiny import by_branch, ids_to

LAYOUTS: tuple[Layout, ...] = ("tree", "packed", "padded")
PAD = 0
small = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def numbered(shapes: Sequence[tuple[int, list[list[bool]]]], parents: Sequence[list[int]] = ()) -> list[Tree]:
    """Trees of (trunk length, masks of the branches) whose token ids count up from 1; flat, or with the branches'
    ``parents``."""
    count = itertools.count(1)
    parents = parents or [[TRUNK] * len(masks) for _, masks in shapes]

    def take(n: int) -> np.ndarray:
        return np.array([next(count) for _ in range(n)], dtype=np.int32)

    return [
        Tree(
            f"tree-{t}",
            take(trunk),
            tuple(
                Branch(take(len(mask)), np.array(mask), margin=t / 4 + s, parent=parents[t][s])
                for s, mask in enumerate(masks)
            ),
        )
        for t, (trunk, masks) in enumerate(shapes)
    ]


masks = st.lists(st.booleans(), min_size=1, max_size=6)
flat = st.lists(st.tuples(st.integers(1, 6), st.lists(masks, min_size=1, max_size=4)), min_size=1, max_size=7).map(
    numbered
)
nested = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.tuples(masks, st.integers(0, 3)), min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
).map(lambda shapes: grown(shapes))
forests = st.one_of(flat, nested)
layouts = st.sampled_from(LAYOUTS)
capacities = st.integers(1, 60)


def grown(shapes: list[tuple[int, list[tuple[list[bool], int]]]]) -> list[Tree]:
    """Trees of (trunk length, (mask, depth) of the branches): a branch continues the one before it, or one that that
    one continues, as deep as it says where there is one so deep."""
    parents = []
    for _, branches in shapes:
        of_tree: list[int] = []
        way: list[int] = []  # to the branch before
        for slot, (_, depth) in enumerate(branches):
            way = way[:depth]
            of_tree.append(way[-1] if way else TRUNK)
            way.append(slot)
        parents.append(of_tree)
    return numbered([(trunk, [mask for mask, _ in branches]) for trunk, branches in shapes], parents)


def paths(tree: Tree) -> list[list[int]]:
    """From the trunk's start to the end of each branch that nothing continues."""
    continued = {branch.parent for branch in tree.branches}
    return [ids_to(tree, slot) for slot in range(len(tree.branches)) if slot not in continued]


def real_tokens(batch: Batch) -> list[int]:
    return batch.input_ids[batch.attention_mask == 1].tolist()


def cost(tree: Tree, layout: Layout) -> int:
    """Tokens that a tree takes alone."""
    lengths = [len(path) for path in paths(tree)]
    return {"tree": tree.size, "packed": sum(lengths), "padded": len(lengths) * max(lengths)}[layout]


@given(forests, capacities)
@small
def test_tokens_are_preserved(trees: list[Tree], capacity: int) -> None:
    """A tree's tokens appear once in the tree layout, and once for every path in the others; the rest is
    padding."""
    for layout in LAYOUTS:
        batches = pack(trees, microbatch_tokens=capacity, layout=layout, pad_id=PAD)
        wanted: Counter[int] = Counter()
        for tree in trees:
            wanted.update(itertools.chain(*paths(tree)) if layout != "tree" else {*itertools.chain(*paths(tree))})
        assert Counter(itertools.chain(*(real_tokens(batch) for batch in batches))) == wanted
        for batch in batches:
            assert (batch.input_ids[batch.attention_mask == 0] == PAD).all()
            assert batch.num_tokens == len(real_tokens(batch))


@given(forests, capacities, layouts)
@small
def test_every_target_is_predicted_by_the_token_before_it_on_its_path(
    trees: list[Tree], capacity: int, layout: Layout
) -> None:
    """(source token, target token) pairs are exactly those of the paths, each once, however many paths lead through it;
    none crosses into another document or branch."""
    wanted = []
    for tree in trees:
        for slot, branch in enumerate(tree.branches):
            path = ids_to(tree, slot)
            places = len(path) - len(branch.ids) + np.flatnonzero(branch.mask)
            wanted += [(path[place - 1], path[place]) for place in places]
    found = []
    for batch in pack(trees, microbatch_tokens=capacity, layout=layout):
        flat = batch.input_ids.flatten()
        found += list(zip(flat[batch.sources].tolist(), flat[batch.targets].tolist(), strict=True))
        assert torch.equal(batch.target_ids, flat[batch.targets])
        assert batch.num_targets == len(batch.targets) == len(batch.sources) == len(batch.branch)
        # The source stands in the target's row: its hidden state has seen what the target's path holds.
        length = batch.input_ids.shape[1]
        assert torch.equal(batch.sources // length, batch.targets // length)
    assert sorted(found) == sorted(wanted)


@given(forests, capacities, layouts)
@small
def test_positions_count_along_the_path(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """A token's position is its place on its path, wherever it stands in the row."""
    place = {token: i for tree in trees for path in paths(tree) for i, token in enumerate(path)}
    for batch in pack(trees, microbatch_tokens=capacity, layout=layout):
        real = batch.attention_mask == 1
        assert batch.position_ids[real].tolist() == [place[token] for token in batch.input_ids[real].tolist()]


@given(forests, capacities, layouts)
@small
def test_capacity(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """At most ``microbatch_tokens`` tokens, padding included, unless a single tree is larger: it then is alone."""
    for batch in pack(trees, microbatch_tokens=capacity, layout=layout):
        if batch.input_ids.numel() > capacity:
            (index,) = batch.tree_index
            assert batch.input_ids.numel() == cost(trees[index], layout)


@given(forests, capacities, st.sampled_from(["tree", "packed"]))
@small
def test_no_two_micro_batches_could_be_one(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """What best fit promises: a second micro-batch is opened only for a tree that fits in none."""
    sizes = [batch.num_tokens for batch in pack(trees, microbatch_tokens=capacity, layout=layout)]
    assert all(a + b > capacity for a, b in itertools.combinations(sizes, 2))


@given(forests, capacities, st.sampled_from(["tree", "packed"]))
@small
def test_trees_of_a_micro_batch_keep_their_order(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """As they were given: what a step reads first does not depend on how long it is."""
    for batch in pack(trees, microbatch_tokens=capacity, layout=layout):
        assert list(batch.tree_index) == sorted(batch.tree_index)


@given(forests, capacities, layouts)
@small
def test_branches_and_trees_are_numbered_consistently(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """The branches of a tree stay in one micro-batch, in order, and every target, branch, id and margin belongs to its
    own tree."""
    batches = pack(trees, microbatch_tokens=capacity, layout=layout)
    assert sorted(itertools.chain(*(batch.tree_index for batch in batches))) == list(range(len(trees)))
    for batch in batches:
        members = [trees[i] for i in batch.tree_index]
        assert batch.tree_ids == tuple(tree.id for tree in members)
        assert batch.margins.tolist() == [branch.margin for tree in members for branch in tree.branches]
        assert batch.branch_tree.tolist() == [t for t, tree in enumerate(members) for _ in tree.branches]
        assert batch.branch_slot.tolist() == [slot for tree in members for slot in range(len(tree.branches))]
        assert batch.num_branches == sum(len(tree.branches) for tree in members)
        targets = by_branch([batch], [batch.target_ids])
        for t, tree in zip(batch.tree_index, members, strict=True):
            for slot, branch in enumerate(tree.branches):
                assert targets[t, slot].tolist() == branch.ids[branch.mask].tolist()


@given(forests, capacities, layouts)
@small
def test_spans_cover_the_rows(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """Read back through its spans, a row is whole paths, laid end to end from 0; what lies after the last is
    padding."""
    found = []
    for batch in pack(trees, microbatch_tokens=capacity, layout=layout, multiple_of=4):
        assert len(batch.rows) == len(batch.input_ids)
        for ids, mask, row in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.rows, strict=True):
            assert layout != "padded" or len(row) == 1
            cursor = 0
            for span in row:
                assert span.start == cursor
                assert span.is_path or layout == "tree"
                ways: list[list[int]] = []
                for node in span.nodes:
                    before = ways[node.parent] if node.parent >= 0 else []
                    ways.append([*before, *ids[cursor : cursor + node.length]])
                    cursor += node.length
                continued = {node.parent for node in span.nodes}
                found += [way for number, way in enumerate(ways) if number not in continued]
                assert span.end == cursor
            assert mask == [1] * cursor + [0] * (len(ids) - cursor)
    assert sorted(found) == sorted(path for tree in trees for path in paths(tree))


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@given(forests, capacities, layouts)
@small
def test_order_is_deterministic(trees: list[Tree], capacity: int, layout: Layout) -> None:
    """The same trees give the same micro-batches; and which trees share one does not depend on ids, margins or
    contents."""
    first, again = (pack(trees, microbatch_tokens=capacity, layout=layout) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    moved = [
        replace(tree, branches=tuple(replace(branch, margin=9.0, share=0.5) for branch in tree.branches))
        for tree in trees
    ]
    renamed = [replace(tree, id=f"z{len(trees) - t}", trunk=tree.trunk + 1) for t, tree in enumerate(moved)]
    other = pack(renamed, microbatch_tokens=capacity, layout=layout)
    assert [batch.tree_index for batch in other] == [batch.tree_index for batch in first]


@given(forests, layouts, st.integers(1, 16))
@small
def test_multiple_of_only_adds_padding(trees: list[Tree], layout: Layout, multiple: int) -> None:
    """Row lengths are rounded up, to the next multiple and no further; tokens, targets and their order stay."""
    for plain, rounded in zip(
        pack(trees, microbatch_tokens=30, layout=layout),
        pack(trees, microbatch_tokens=30, layout=layout, multiple_of=multiple, pad_id=-7),
        strict=True,
    ):
        length, longer = plain.input_ids.shape[1], rounded.input_ids.shape[1]
        assert longer % multiple == 0 and 0 <= longer - length < multiple
        assert torch.equal(
            rounded.input_ids[:, :length][plain.attention_mask == 1], plain.input_ids[plain.attention_mask == 1]
        )
        assert (rounded.input_ids[rounded.attention_mask == 0] == -7).all()
        assert torch.equal(rounded.target_ids, plain.target_ids)
        assert rounded.rows == plain.rows


# Worked examples

EXAMPLE = Tree(
    "example",
    np.array([10, 11], dtype=np.int32),
    (
        Branch(np.array([20, 21], dtype=np.int32), np.array([True, True])),
        Branch(np.array([30], dtype=np.int32), np.array([True])),
    ),
)


def test_example_of_the_docstring() -> None:
    """The table in Batch's docstring, P0 P1 = 10 11, a b = 20 21, c = 30, entry by entry."""
    (batch,) = pack([EXAMPLE], microbatch_tokens=100)
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.targets.tolist() == [2, 3, 4]
    assert batch.sources.tolist() == [1, 2, 1]
    assert batch.branch.tolist() == [0, 0, 1]
    assert batch.branch_tree.tolist() == [0, 0]
    assert batch.branch_slot.tolist() == [0, 1]
    assert batch.rows == ((Span.of_branches(0, 2, (2, 1)),),)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1]]
    assert (batch.num_tokens, batch.num_targets, batch.num_branches) == (5, 3, 2)
    for name in ("input_ids", "position_ids", "targets", "sources", "branch", "branch_tree", "branch_slot"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.margins.dtype == torch.float32


def test_same_example_in_the_other_layouts() -> None:
    (packed,) = pack([EXAMPLE], microbatch_tokens=100, layout="packed")
    assert packed.input_ids.tolist() == [[10, 11, 20, 21, 10, 11, 30]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert (packed.targets.tolist(), packed.sources.tolist()) == ([2, 3, 6], [1, 2, 5])
    assert packed.rows == ((Span.of_branches(0, 2, (2,)), Span.of_branches(4, 2, (1,))),)

    (padded,) = pack([EXAMPLE], microbatch_tokens=100, layout="padded", pad_id=99)
    assert padded.input_ids.tolist() == [[10, 11, 20, 21], [10, 11, 30, 99]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert (padded.targets.tolist(), padded.sources.tolist()) == ([2, 3, 6], [1, 2, 5])
    assert padded.rows == ((Span.of_branches(0, 2, (2,)),), (Span.of_branches(0, 2, (1,)),))


NESTED = numbered([(2, [[True, False], [True], [False, True], [True]])], [[TRUNK, 0, 0, TRUNK]])[0]
"""1 2, continued by 3 4 and by 8; 3 4 by 5 and by 6 7. Targets are 3, 5, 7 and 8."""


def test_branches_that_continue_a_branch() -> None:
    """In a tree every token stands once. Elsewhere 3 4 stands in two rows, and is trained in the first."""
    (batch,) = pack([NESTED], microbatch_tokens=100)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5, 2]]
    assert (batch.targets.tolist(), batch.sources.tolist()) == ([2, 4, 6, 7], [1, 3, 5, 1])
    assert (batch.branch.tolist(), batch.branch_slot.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    nodes = [(2, ROOT), (2, 0), (1, 1), (2, 1), (1, 0)]
    assert batch.rows == ((Span(0, tuple(TreeNode(*node) for node in nodes)),),)

    (padded,) = pack([NESTED], microbatch_tokens=100, layout="padded")
    assert padded.input_ids.tolist() == [[1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 6, 7], [1, 2, 8, 0, 0, 0]]
    assert padded.target_ids.tolist() == [3, 5, 7, 8]
    assert (padded.targets.tolist(), padded.sources.tolist()) == ([2, 4, 11, 14], [1, 3, 10, 13])
    assert (padded.branch.tolist(), padded.branch_slot.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert padded.rows[1] == (Span(0, (TreeNode(2, ROOT), TreeNode(2, 0), TreeNode(2, 1))),)
    assert NESTED.paths == [(0, 1), (0, 2), (3,)] and (NESTED.size, NESTED.longest_path) == (8, 6)
    assert not NESTED.is_flat and EXAMPLE.is_flat


def test_answers_that_are_compared_continue_their_prompt() -> None:
    """The sums of two parts of answers say nothing about which answer is better."""
    for layout in LAYOUTS:
        assert len(Pairs.of(pack([EXAMPLE], microbatch_tokens=100, layout=layout)[0]).chosen) == 1
        with pytest.raises(ValueError, match="only branches that each continue their prompt"):
            Pairs.of(pack([EXAMPLE, NESTED], microbatch_tokens=100, layout=layout)[0])


@pytest.mark.parametrize("parents", [[0], [TRUNK, 1], [TRUNK, 2, TRUNK], [TRUNK, TRUNK, 0], [TRUNK, 0, TRUNK, 1]])
def test_branches_stand_in_depth_first_order(parents: list[int]) -> None:
    """What continues a branch follows it without a gap: not itself, not a later one, not one whose turn is over."""
    with pytest.raises(ValueError, match="comes too late to continue"):
        numbered([(1, [[True]] * len(parents))], [parents])


def test_best_fit_takes_the_fullest_bin() -> None:
    """Sizes 6 5 4 3 2 into tens: 6+4 (the fuller bin for 4), then 5+3+2."""
    trees = numbered([(n - 1, [[True]]) for n in (6, 5, 4, 3, 2)])
    assert [batch.tree_index for batch in pack(trees, microbatch_tokens=10)] == [(0, 2), (1, 3, 4)]


def test_padded_neighbours_in_length_share_a_batch() -> None:
    """Lengths 2 6 2 6 into twelve tokens: the two of 6 together, the two of 2 together; no padding at all."""
    trees = numbered([(n - 1, [[True]]) for n in (2, 6, 2, 6)])
    batches = pack(trees, microbatch_tokens=12, layout="padded")
    assert [batch.tree_index for batch in batches] == [(1, 3), (0, 2)]
    assert all((batch.attention_mask == 1).all() for batch in batches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_branch_without_targets(layout: Layout) -> None:
    """It keeps its number, so that a loss over branches sees a branch of nothing and not its neighbour's tokens."""
    (batch,) = pack(numbered([(2, [[False, False], [True]]), (1, [[False]])]), microbatch_tokens=100, layout=layout)
    assert batch.num_branches == 3
    assert batch.branch.tolist() == [1]


def test_to_moves_every_tensor() -> None:
    """Checked on the meta device, which is not where a batch is made."""
    (batch,) = pack([EXAMPLE], microbatch_tokens=100)
    moved = batch.to("meta")
    tensors = {f.name for f in fields(Batch) if isinstance(getattr(batch, f.name), Tensor)}
    assert tensors and all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert moved.rows == batch.rows and moved.tree_ids == batch.tree_ids
