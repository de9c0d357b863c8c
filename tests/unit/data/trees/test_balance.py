"""Length balancing: in every bucket as many pairs whose longer answer wins as pairs whose shorter answer wins, anew
each epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from align.batching.loader import plan_steps
from align.data.tree import Branch, Tree
from align.data.trees.balance import EDGES, BalancedTrees, LengthBalance, PairTable
from align.data.trees.store import TreeStore, write_store
from align.errors import InputError

RNG = np.random.default_rng(0)
# 300 pairs whose longer answer wins and 100 whose shorter one does, up to 400 tokens apart, and 10 of equal length.
DIFFERENCES = np.concatenate([RNG.integers(1, 401, 300), -RNG.integers(1, 401, 100), np.zeros(10, dtype=np.int64)])


def answer(tokens: int) -> Branch:
    return Branch(np.arange(3, 3 + tokens, dtype=np.int32), np.ones(tokens, dtype=bool))


def store(folder: Path, lengths: list[tuple[int, ...]]) -> TreeStore:
    """Trees with the given lengths of chosen and rejected answers."""
    folder.mkdir()
    write_store(
        folder,
        (Tree(f"t{i}", np.arange(3, 7, dtype=np.int32), tuple(map(answer, parts))) for i, parts in enumerate(lengths)),
    )
    return TreeStore(folder)


@pytest.mark.parametrize(
    ("difference", "bucket"), [(0, 0), (7, 0), (-8, 1), (31, 1), (32, 2), (-64, 3), (255, 4), (256, 5), (-5000, 5)]
)
def test_buckets_begin_at_their_edge(difference: int, bucket: int) -> None:
    """0-7, 8-31, 32-63, 64-127, 128-255, 256 and more tokens; the sign does not matter."""
    assert LengthBalance(np.array([difference]), 0).bucket.tolist() == [bucket]


def test_every_bucket_is_balanced_and_nothing_more_is_left_out() -> None:
    """P(longer wins) = 1/2 in each bucket, exactly; the minority is there whole, and so are pairs of equal length."""
    balance = LengthBalance(DIFFERENCES, 7)
    kept = balance.kept(0)
    for bucket in range(len(EDGES)):
        inside = balance.bucket == bucket
        longer, shorter = (int((inside & kept & side).sum()) for side in (DIFFERENCES > 0, DIFFERENCES < 0))
        assert longer == shorter == min((inside & side).sum() for side in (DIFFERENCES > 0, DIFFERENCES < 0)) > 0
    assert kept[DIFFERENCES == 0].all()
    assert kept.sum() == 210


def test_the_sample_changes_each_epoch_and_no_pair_is_lost_for_good() -> None:
    balance = LengthBalance(DIFFERENCES, 7)
    epochs = [balance.kept(epoch) for epoch in range(30)]
    assert np.array_equal(epochs[3], LengthBalance(DIFFERENCES, 7).kept(3)), "an epoch follows from seed and number"
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], LengthBalance(DIFFERENCES, 8).kept(0))
    assert np.any(epochs, axis=0).all()


def test_the_report_adds_up() -> None:
    """What is in a bucket is used or left out; by hand for the smallest: 2 longer, 1 shorter and 1 equal make 3 used
    and 1 left out."""
    small = LengthBalance(np.array([3, 5, -7, 0, 300]), 0).report()
    assert small == [
        {"tokens": "0-7", "longer_wins": 2, "shorter_wins": 1, "equal": 1, "used": 3, "left_out": 1},
        {"tokens": "256+", "longer_wins": 1, "shorter_wins": 0, "equal": 0, "used": 0, "left_out": 1},
    ]
    rows = LengthBalance(DIFFERENCES, 1).report()
    assert sum(row["used"] for row in rows) == 210 and sum(row["left_out"] for row in rows) == 200
    assert all(row["longer_wins"] + row["shorter_wins"] + row["equal"] == row["used"] + row["left_out"] for row in rows)


def test_pairs_are_drawn_one_by_one(tmp_path: Path) -> None:
    """A prompt with several rejected answers is there with those that were drawn; its size is theirs; the plan takes
    nothing else."""
    lengths = [(20, 3, 25, 20), (9, 4), (4, 8), (12, 7, 6), (5, 5)]
    trees = store(tmp_path / "store", lengths)
    balanced = BalancedTrees(trees, seed=3, epochs=2)
    table = PairTable.of(trees[i] for i in range(len(trees)))
    plan = plan_steps(balanced.sizes, seed=3, epochs=2, batch_size=2, epoch_indices=balanced.epoch)
    seen = Counter(plan.order.tolist())
    assert set(seen.values()) == {1}
    for epoch in range(2):
        kept = balanced.balance.kept(epoch)
        assert balanced.epoch(epoch).tolist() == sorted(i for i in seen if i // 5 == epoch)
        for index in balanced.epoch(epoch).tolist():
            tree, own = balanced[index], kept & (table.tree == index % 5)
            assert tree.id == f"t{index % 5}"
            assert [len(b.ids) for b in tree.branches] == [lengths[index % 5][0], *table.rejected[own].tolist()]
            assert balanced.sizes[index] == tree.size
            longer = [len(tree.branches[0].ids) - len(b.ids) for b in tree.branches[1:]]
            assert len(longer) == own.sum() > 0
    # A classifier that picks the longer answer is right half of the time on what an epoch holds.
    differences = [
        len(t.branches[0].ids) - len(b.ids)
        for i in balanced.epoch(0).tolist()
        for t in [balanced[i]]
        for b in t.branches[1:]
    ]
    assert sum(np.sign(differences)) == 0


def test_what_cannot_be_balanced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="length balancing leaves no pair of 2: where answers differ in length, the longer one wins"
    ):
        BalancedTrees(store(tmp_path / "s", [(9, 4), (6, 5)]), seed=0, epochs=1)


def test_epochs_of_different_sizes() -> None:
    """Epochs of 4, 2 and 4 examples, 2.5 of them: the mean epoch has 10/3, so round(2.5 * 10/3) = 8 examples, in the
    order of epochs."""
    epochs = [np.arange(4), np.arange(10, 12), np.arange(20, 24)]
    plan = plan_steps([5] * 30, seed=1, epochs=2.5, batch_size=3, epoch_indices=epochs.__getitem__)
    assert [sorted(part.tolist()) for part in np.split(plan.order, [4, 6])][:2] == [[0, 1, 2, 3], [10, 11]]
    assert len(plan.order) == 8 and set(plan.order[6:]) <= set(epochs[2])
    assert [len(plan.examples(s)) for s in range(len(plan))] == [3, 3, 2]
