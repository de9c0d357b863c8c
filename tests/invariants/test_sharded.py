"""Several processes that each hold a part of the model (``train.sharding``) make the training step of one that holds it
whole: the same losses and gradients, for every kind of training, however unequal the work of the processes is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from align.models.compute.stream import group_count
from align.recipe.schema import Train
from align.training.launch import Ranks, respawn
from tests.invariants.test_dpo import preferences
from tests.support.sharded import CASES, loaders

BOUND = 1e-5
"""Sums in another order; measured: 2e-7."""
ON_THREE = ("sft, tied head", "sft, one micro-batch", "dpo, in groups", "ppo, adapters on one base")
ON_TWO_MACHINES = ("sft, clipped", "dpo, in groups", "reward")
Found = dict[str, dict[str, float]]


def run_cases(folder: Path, names: Sequence[str], nproc: int, sharding: str = "full") -> Found:
    """With ``hybrid``, every two processes take themselves for a machine."""
    code = (
        f"import os\nos.environ['LOCAL_WORLD_SIZE'] = '{2 if sharding == 'hybrid' else nproc}'\n"
        "from pathlib import Path\nfrom tests.support.sharded import side_by_side\n"
        f"side_by_side(Path({str(folder)!r}), {list(names)!r}, {sharding!r})"
    )
    assert respawn(nproc, [sys.executable, "-c", code]) == 0
    found: Found = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(tmp_path_factory.mktemp("two"), list(CASES), 2)


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(tmp_path_factory.mktemp("three"), ON_THREE, 3)


@pytest.fixture(scope="module")
def on_two_machines(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two machines with two processes each, as their launcher says."""
    return run_cases(tmp_path_factory.mktemp("machines"), ON_TWO_MACHINES, 4, "hybrid")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_step_of_one(on_two: Found, name: str) -> None:
    """Held-out metrics, metrics of the step, its gradients."""
    assert max(on_two[name].values()) < BOUND, on_two[name]


@pytest.mark.parametrize("name", ON_THREE)
def test_three_processes_make_the_step_of_one(on_three: Found, name: str) -> None:
    """Rows that three does not divide; some processes have no row of a parameter."""
    assert max(on_three[name].values()) < BOUND, on_three[name]


@pytest.mark.parametrize("name", ON_TWO_MACHINES)
def test_parts_on_each_of_two_machines_make_the_step_of_one(on_two_machines: Found, name: str) -> None:
    """A copy of the model on each machine."""
    assert max(on_two_machines[name].values()) < BOUND, on_two_machines[name]


def test_the_work_that_is_compared_is_unequal() -> None:
    """Or the comparisons above would say nothing: the cases give processes different numbers of micro-batches, some
    none, and trees that are computed in different numbers of groups."""

    def groups(rank: int, rejected: tuple[int, ...], tokens: int) -> list[int]:
        train = Train(learning_rate=1.0, batch_size=7, microbatch_tokens=tokens)
        loader, _ = loaders(preferences(7, rejected=rejected), [], train, Ranks(rank, 2), None)
        return sorted(group_count(batch, tokens) for batch in loader.step(0))

    for rejected, tokens in (((1, 9, 4), 16), ((8, 1, 5), 16), ((12, 1, 1, 1, 1, 1, 1), 32)):
        first, second = (groups(rank, rejected, tokens) for rank in (0, 1))
        assert [n for n in first if n] != [n for n in second if n] and len(first) != len(second)
    assert groups(1, (1,), 4096) == []
