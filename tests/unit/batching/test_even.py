"""Micro-batches of several processes, filled up with batches without examples."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from align.batching.batch import Batch
from align.batching.even import evened
from align.batching.tree import pack
from tests.support.tiny import random_trees


def batches(*counts: int) -> list[Batch]:
    """One batch for each number of branches."""
    trees = random_trees(np.random.default_rng(0), counts)
    return [batch for tree in trees for batch in pack([tree], microbatch_tokens=1)]


def groups(batch: Batch) -> int:
    """As if all but two-branch trees were cut, into as many groups as there are branches."""
    return 0 if batch.num_branches == 2 else batch.num_branches


def shape(batch: Batch) -> tuple[int, int]:
    return len(batch.tree_ids), batch.groups


def test_all_get_as_many_of_each_kind() -> None:
    """First those that are computed in groups, in as many as the one that needs most; then the others."""
    made = evened([batches(2, 1, 4), batches(5), []], groups)
    assert [[shape(batch) for batch in share] for share in made] == [
        [(1, 5), (1, 1), (1, 0)],
        [(1, 5), (0, 1), (0, 0)],
        [(0, 5), (0, 1), (0, 0)],
    ]


def test_what_is_even_stays() -> None:
    assert evened([[], []], groups) == [[], []]
    own = [batches(2, 2), batches(2, 2)]
    assert evened(own, groups) == own


def test_a_batch_without_examples_has_nothing_to_learn_from() -> None:
    """No target, no branch, no token that counts; tensors as those of others."""
    (like,) = batches(3)
    for idle in (like.idle(), like.idle(groups=2), like.idle(tokens=128)):
        assert (idle.num_targets, idle.num_branches, idle.num_tokens, idle.tree_ids) == (0, 0, 0, ())
        assert idle.input_ids.shape == idle.position_ids.shape and idle.attention_mask.sum() == 1 + bool(idle.groups)
        for field in fields(Batch):
            own, other = getattr(idle, field.name), getattr(like, field.name)
            assert not isinstance(other, torch.Tensor) or own.dtype == other.dtype, field.name
    assert like.idle(tokens=128).input_ids.shape == (1, 128)
