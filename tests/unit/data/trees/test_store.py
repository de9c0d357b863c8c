"""Trees on disk: what is written is what is read, and damage is noticed."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.tree import TRUNK, Branch, Tree
from align.data.trees.store import DamagedStore, TreeStore, write_store


def tree(
    name: str,
    trunk: list[int],
    *branches: list[tuple[int, bool]],
    marks: tuple[float, ...] = (0.0, 1.0),
    chain: int = 0,
) -> Tree:
    """``marks``: margin, share and grades of the first branch; those of the others are each one more. The first
    ``chain`` branches after the first continue each the one before."""
    made = []
    for b, tokens in enumerate(branches):
        margin, share, *grades = (mark + b for mark in marks)
        ids, mask = np.array([i for i, _ in tokens], np.int32), np.array([m for _, m in tokens], np.bool_)
        made.append(Branch(ids, mask, margin, share, tuple(grades), b - 1 if b <= chain else TRUNK))
    return Tree(name, np.array(trunk, np.int32), tuple(made))


def marks(branch: Branch) -> tuple[str, ...]:
    """As text, in which NaN equals itself."""
    return tuple(map(repr, (branch.margin, branch.share, *branch.grades)))


def equal(one: Tree, other: Tree) -> bool:
    return (
        (one.id, len(one.branches)) == (other.id, len(other.branches))
        and [marks(branch) for branch in one.branches] == [marks(branch) for branch in other.branches]
        and [branch.parent for branch in one.branches] == [branch.parent for branch in other.branches]
        and np.array_equal(one.trunk, other.trunk)
        and all(
            np.array_equal(a.ids, b.ids) and np.array_equal(a.mask, b.mask)
            for a, b in zip(one.branches, other.branches, strict=True)
        )
    )


TREES = [
    tree("a", [1, 2], [(3, True), (4, False), (5, True)]),
    tree("很好", [7], [(8, True)], [(9, True), (10, True)], [(11, False)], marks=(0.5, 0.25, float("nan"), 4.0)),
    tree("", [2**31 - 1, 0]),
]


@pytest.fixture
def store(tmp_path: Path) -> TreeStore:
    write_store(tmp_path, TREES)
    return TreeStore(tmp_path)


def test_trees_come_back_as_they_were(store: TreeStore) -> None:
    assert len(store) == 3
    assert all(equal(store[i], TREES[i]) for i in range(3))
    assert equal(store[-1], TREES[2])
    assert store[0].trunk.dtype == np.int32 and store[0].branches[0].mask.dtype == np.bool_
    with pytest.raises(IndexError):
        store[3]
    store.verify()


def test_a_branch_continues_what_it_continued(tmp_path: Path) -> None:
    """The tokens of the longest path are those of a chain of branches."""
    chain = tree("a", [1], [(2, True)], [(3, True), (4, True)], [(5, True)], [(6, True)], chain=2)
    write_store(tmp_path, [chain, TREES[0]])
    store = TreeStore(tmp_path)
    assert [branch.parent for branch in store[0].branches] == [TRUNK, 0, 1, TRUNK]
    assert (store.path_lengths.tolist(), store.sizes.tolist(), store.targets.tolist()) == ([5, 5], [6, 5], [5, 2])
    assert equal(store[1], TREES[0]) and store[0].paths == [(0, 1, 2), (3,)]


def test_lengths_are_those_of_the_trees(store: TreeStore) -> None:
    assert store.sizes.tolist() == [5, 5, 2]
    assert store.path_lengths.tolist() == [5, 3, 2]
    assert store.targets.tolist() == [2, 3, 0]
    assert store.sizes.dtype == np.int64


def test_a_store_cannot_be_written_through_its_trees(store: TreeStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        store[0].trunk[0] = 5


IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
BRANCH = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=5)
ANY_TREE = st.builds(
    lambda name, trunk, branches, marks, chain: tree(name, trunk, *branches, marks=tuple(marks), chain=chain),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    IDS,
    st.lists(BRANCH, max_size=4),
    st.lists(st.floats(), min_size=2, max_size=5),
    st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(trees=st.lists(ANY_TREE, max_size=8))
def test_any_trees_come_back(tmp_path_factory: pytest.TempPathFactory, trees: list[Tree]) -> None:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, trees)
    store = TreeStore(folder)
    assert len(store) == len(trees)
    assert all(equal(store[i], one) for i, one in enumerate(trees))


def test_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    for name, trees in (("a", TREES), ("b", TREES), ("c", TREES[::-1])):
        (tmp_path / name).mkdir()
        write_store(tmp_path / name, trees)
    a, b, c = (TreeStore(tmp_path / name).digest for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("name", ["ids", "mask", "parts", "start", "names", "marks", "mark"])
def test_a_file_that_was_cut_short_is_noticed_at_opening(store: TreeStore, name: str) -> None:
    """A damaged store is not trained on."""
    path = store.folder / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedStore, match=f"{name}.bin: has"):
        TreeStore(store.folder)
    path.unlink()
    with pytest.raises(DamagedStore, match="is missing"):
        TreeStore(store.folder)


def test_a_changed_byte_is_noticed_by_verify(store: TreeStore) -> None:
    path = store.folder / "mask.bin"
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match="has been changed"):
        TreeStore(store.folder).verify()


def test_a_changed_description_is_noticed(store: TreeStore) -> None:
    meta = json.loads((store.folder / "meta.json").read_text())
    for broken in ({**meta, "trees": 2}, {**meta, "version": 99}, [meta], {}):
        (store.folder / "meta.json").write_text(json.dumps(broken))
        with pytest.raises(DamagedStore):
            TreeStore(store.folder)
    (store.folder / "meta.json").write_bytes(b"\xff{")
    with pytest.raises(DamagedStore):
        TreeStore(store.folder)
    (store.folder / "meta.json").unlink()
    with pytest.raises(DamagedStore, match="unfinished"):
        TreeStore(store.folder)


def test_memory_does_not_grow_with_the_number_of_trees(tmp_path: Path) -> None:
    """A million rows must fit: 5,000 trees of 400 tokens are 10 MB on disk."""
    one = tree("x", list(range(200)), [(i, True) for i in range(200)])

    def many(count: int) -> Iterator[Tree]:
        for _ in range(count):
            yield one

    tracemalloc.start()
    write_store(tmp_path, many(5_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "ids.bin").stat().st_size == 5_000 * 400 * 4
    assert peak < 3 << 20
