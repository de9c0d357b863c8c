"""From epochs to optimiser steps: every example equally often, the last small step kept, and any step reachable by its
number alone."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from align.batching.batch import Batch
from align.batching.loader import Loader, StepPlan, plan_steps, share
from align.batching.tree import pack
from align.data.tree import Tree
from tests.support.tiny import random_tree, random_trees

SIZES = np.random.default_rng(0).integers(3, 40, 23)


def seen(plan: StepPlan) -> Counter[int]:
    """How often each example is in a step."""
    return Counter(int(i) for step in range(len(plan)) for i in plan.examples(step))


# plan_steps


def test_last_small_step_is_kept() -> None:
    """10 examples, 4 a step, one epoch: steps of 4, 4 and 2, and every example once."""
    plan = plan_steps([5] * 10, seed=1, batch_size=4)
    assert [len(plan.examples(s)) for s in range(len(plan))] == [4, 4, 2]
    assert seen(plan) == Counter(range(10))
    assert plan.steps_per_epoch == 3


def test_steps_run_across_epochs() -> None:
    """10 examples, 4 a step, two epochs: five full steps, the third of which holds the end of one epoch and the start
    of the next."""
    plan = plan_steps([5] * 10, seed=1, epochs=2, batch_size=4)
    assert [len(plan.examples(s)) for s in range(len(plan))] == [4] * 5
    assert seen(plan) == Counter({i: 2 for i in range(10)})
    assert sorted(plan.order[:10]) == sorted(plan.order[10:]) == list(range(10))
    assert plan.steps_per_epoch == 2.5


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize(
    "cut", [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 100}, {"tokens_per_step": 50}, {"tokens_per_step": 1}]
)
def test_every_example_equally_often(epochs: int, cut: dict[str, int]) -> None:
    plan = plan_steps(SIZES, seed=3, epochs=epochs, **cut)
    assert seen(plan) == Counter({i: epochs for i in range(len(SIZES))})
    assert all(len(plan.examples(s)) > 0 for s in range(len(plan)))


def test_tokens_per_step() -> None:
    """As many as fit: no step is over the limit, and none could have taken the next step's first example as well."""
    plan = plan_steps(SIZES, seed=3, epochs=2, tokens_per_step=60)
    steps = [SIZES[plan.examples(s)] for s in range(len(plan))]
    assert all(step.sum() <= 60 for step in steps)
    assert all(step.sum() + following[0] > 60 for step, following in itertools.pairwise(steps))
    assert len({len(step) for step in steps}) > 1


def test_example_larger_than_a_step_is_a_step_of_its_own() -> None:
    sizes = [10, 500, 10, 10]
    plan = plan_steps(sizes, seed=0, tokens_per_step=40)
    assert seen(plan) == Counter(range(4))
    assert [1] in [plan.examples(s).tolist() for s in range(len(plan))]


def test_without_a_size_a_step_has_4096_tokens() -> None:
    """8 examples of 1024 tokens: two steps of four."""
    plan = plan_steps([1024] * 8, seed=0)
    assert [len(plan.examples(s)) for s in range(len(plan))] == [4, 4]


@pytest.mark.parametrize(("epochs", "total"), [(0.5, 5), (0.05, 1), (1.5, 15), (2.3, 23)])
def test_fractions_of_an_epoch(epochs: float, total: int) -> None:
    """Of 10 examples; nobody is seen more than one time more than another, and at least one is seen at all."""
    plan = plan_steps([5] * 10, seed=2, epochs=epochs, batch_size=4)
    counts = seen(plan)
    assert counts.total() == total
    times = [counts[i] for i in range(10)]
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("cut", [{"batch_size": 4}, {"tokens_per_step": 60}])
def test_max_steps_is_a_prefix(cut: dict[str, int]) -> None:
    """Ending earlier changes no step before the end; a limit beyond the end changes nothing."""
    full = plan_steps(SIZES, seed=5, epochs=2, **cut)
    short = plan_steps(SIZES, seed=5, epochs=2, max_steps=3, **cut)
    assert len(short) == 3
    assert all(np.array_equal(short.examples(s), full.examples(s)) for s in range(3))
    assert len(plan_steps(SIZES, seed=5, epochs=2, max_steps=10_000, **cut)) == len(full)


def test_more_epochs_continue_the_same_order() -> None:
    """A run of two epochs starts as the run of one does; its second epoch has another order."""
    one, two = plan_steps(SIZES, seed=5, batch_size=4), plan_steps(SIZES, seed=5, epochs=2, batch_size=4)
    n = len(SIZES)
    assert np.array_equal(one.order, two.order[:n])
    assert not np.array_equal(two.order[:n], two.order[n:])


def test_seed_decides_the_order() -> None:
    first, again, other = (plan_steps(SIZES, seed=seed, batch_size=4) for seed in (5, 5, 6))
    assert np.array_equal(first.order, again.order) and np.array_equal(first.bounds, again.bounds)
    assert not np.array_equal(first.order, other.order)
    assert not np.array_equal(first.order, np.arange(len(SIZES)))


# share and Loader

TREES = random_trees(np.random.default_rng(1), [1, 2, 3, 1, 2, 1, 1, 4, 1, 2, 1])


def ids(batches: list[Batch]) -> list[str]:
    return [tree for batch in batches for tree in batch.tree_ids]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_share_is_a_partition(world: int) -> None:
    """Every micro-batch goes to exactly one process, more processes than micro-batches included."""
    batches = pack(TREES, microbatch_tokens=30)
    parts = [share(batches, rank, world) for rank in range(world)]
    assert sorted(id(batch) for part in parts for batch in part) == sorted(id(batch) for batch in batches)


@pytest.mark.parametrize("world", [2, 3])
def test_share_is_balanced(world: int) -> None:
    """Largest first to whom has least: loads differ by no more than one micro-batch, the smallest of the fuller
    process."""
    batches = pack(TREES, microbatch_tokens=20)
    parts = [[batch.input_ids.numel() for batch in share(batches, rank, world)] for rank in range(world)]
    fullest = max(parts, key=sum)
    assert sum(fullest) - min(map(sum, parts)) <= min(fullest)


def test_share_by_hand() -> None:
    """Micro-batches of 9 7 6 5 4 tokens over two processes: 9+5 and 7+6, then 4 to the second (13 < 14)."""
    rng = np.random.default_rng(0)
    sizes = [4, 5, 6, 7, 9]
    batches = [pack([random_tree(rng, 1, [n - 1])], microbatch_tokens=100)[0] for n in sizes]
    assert [[b.input_ids.numel() for b in share(batches, rank, 2)] for rank in (0, 1)] == [[9, 5], [7, 6, 4]]


def loader(rank: int = 0, world: int = 1) -> Loader:
    plan = plan_steps([tree.size for tree in TREES], seed=4, epochs=2, batch_size=4)
    return Loader(TREES.__getitem__, plan, microbatch_tokens=30, rank=rank, world=world, row_multiple=8)


def test_a_step_holds_its_examples() -> None:
    """Of one process: the plan's examples of that step, in micro-batches of the asked size and row length."""
    ours = loader()
    for number in range(len(ours.plan)):
        batches = ours.step(number)
        assert sorted(ids(batches)) == sorted(TREES[i].id for i in ours.plan.examples(number))
        assert all(batch.input_ids.shape[1] % 8 == 0 for batch in batches)
        assert all(len(batch.tree_ids) == 1 or batch.num_tokens <= 30 for batch in batches)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_every_step(world: int) -> None:
    """Together they see what one process would, step by step; no example twice, some processes with nothing."""
    alone, parts = loader(), [loader(rank, world) for rank in range(world)]
    for number in range(len(alone.plan)):
        together = [tree for part in parts for tree in ids(part.step(number))]
        assert sorted(together) == sorted(ids(alone.step(number)))
    if world == 5:
        assert any(part.step(number) == [] for part in parts for number in range(len(alone.plan)))


@pytest.mark.parametrize("rank", [0, 1])
def test_any_step_is_reached_by_its_number(rank: int) -> None:
    """From_step(k) is the tail of from_step(0), inside an epoch, at its boundary and at the end; nothing is read
    to get there."""
    whole = list(loader(rank, 2).from_step(0))
    assert len(whole) == len(loader().plan) == 6
    for k in range(len(whole) + 1):
        tail = list(loader(rank, 2).from_step(k))
        assert [[batch.tree_ids for batch in step] for step in tail] == [
            [batch.tree_ids for batch in step] for step in whole[k:]
        ]
        for got, wanted in zip(tail, whole[k:], strict=True):
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(got, wanted, strict=True))


def test_from_step_reads_only_what_it_yields() -> None:
    read: list[int] = []

    def tree(index: int) -> Tree:
        read.append(index)
        return TREES[index]

    plan = plan_steps([tree.size for tree in TREES], seed=4, batch_size=4)
    steps = Loader(tree, plan, microbatch_tokens=30).from_step(1)
    assert read == []
    next(steps)
    assert read == plan.examples(1).tolist()
