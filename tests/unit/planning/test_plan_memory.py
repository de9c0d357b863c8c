"""How many tokens a stage holds at once: the plan against the micro-batches that the loader really makes, and what
follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from align.batching.loader import Loader, plan_steps
from align.batching.tree import Layout, grouped, pack, tokens_of
from align.models.compute.stream import held_at_once, split
from align.planning import plan as planning
from align.planning.plan import Plan, make_plan
from align.recipe.load import load_recipe
from align.sizing.machine import Machine
from tests.support.saved import save_tiny
from tests.support.tiny import random_tree, random_trees

GB = 10**9


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        planning, "this_machine", lambda runs: Machine("a test machine", "cpu", 2, 16.0 * GB, 1000.0 * GB, True)
    )


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_the_largest_micro_batch_is_the_one_that_is_built(layout: Layout) -> None:
    """For random trees and limits: as many tokens as the tensors have."""
    rng = np.random.default_rng(0)
    for limit in (8, 20, 50, 400):
        for multiple in (1, 16):
            trees = random_trees(rng, rng.integers(1, 5, 12).tolist())
            built = pack(trees, microbatch_tokens=limit, layout=layout, multiple_of=multiple)
            groups = grouped(trees, limit, layout)
            counted = [tokens_of([trees[i] for i in group], layout, multiple) for group in groups]
            assert counted == [batch.input_ids.numel() for batch in built]


def test_what_is_held_of_a_tree_that_is_cut() -> None:
    rng = np.random.default_rng(1)
    for limit in (4, 10, 30):
        for branches in ([3, 4], [5, 2, 9, 1, 1, 6], [2]):
            (batch,) = pack([random_tree(rng, 7, branches)], microbatch_tokens=limit)
            parts = split(batch, limit)
            cut = batch.num_tokens if parts is None else sum(p.num_tokens for p in (parts.trunk, parts.first))
            cut += 0 if parts is None else max(group.num_tokens for group in parts.groups)
            assert held_at_once(7, branches, limit) == cut


def write(kind: str, lengths: list[int], **train: Any) -> None:
    """A recipe with one row for each number of words."""
    if not Path("model").exists():
        save_tiny(Path("model"), max_position_embeddings=100_000)
    rows = [{"prompt": f"{i}?", "chosen": "yes " * n, "rejected": "no " * n} for i, n in enumerate(lengths)]
    if kind == "sft":
        rows = [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}
            for r in rows
        ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"kind": kind, "data": "data.jsonl", "max_length": 50_000, "train": train}
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": {"s": stage}}))


def planned() -> Plan:
    return make_plan(load_recipe("r.yaml"))


def terms(plan: Plan) -> dict[str, tuple[str, str]]:
    return {row.name.strip(): (row.value, row.source) for row in plan.stages[0].rows}


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_memory_follows_the_longest_row(kind: str) -> None:
    """A row is never cut for a forward pass, so what it takes grows with it; what a micro-batch may hold is not what is
    held."""
    found = []
    for longest in (100, 1_000, 4_000):
        write(kind, [5] * 20 + [longest], microbatch_tokens=512, batch_size=4)
        found.append(planned().stages[0].memory)
    assert found[0] is not None and found[0] < found[1] < found[2]  # type: ignore[operator]
    assert "the longest row" in terms(planned())["activations"][1]


def test_few_tokens_never_need_memory_for_many() -> None:
    """With more room than data the plan is that of the data."""
    write("sft", [20] * 10, microbatch_tokens=20_000, batch_size=10)
    small = planned().stages[0].memory
    write("sft", [20] * 10, microbatch_tokens=2_000, batch_size=10)
    assert planned().stages[0].memory == small
    write("sft", [20] * 10, microbatch_tokens=200, batch_size=10)
    assert planned().stages[0].memory < small  # type: ignore[operator]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_the_parts_are_those_of_the_loader(layout: str) -> None:
    """The tokens that the plan names are those of the largest micro-batch of all steps."""
    write("dpo", [3, 30, 7, 90, 12, 5, 60], microbatch_tokens=150, batch_size=3, layout=layout)
    words = terms(planned())["activations"][1]
    from align.models.load import load_encoder
    from align.pipeline.folder import RunFolder
    from align.planning.data_size import locate
    from align.recipe.schema import DpoStage, Model
    from align.stages.shared.training_data import read_data

    loaded = load_recipe("r.yaml")
    spec = loaded.recipe.stages["s"]
    assert isinstance(spec, DpoStage)
    run = RunFolder.of(loaded, Path("runs"))
    encoder = load_encoder(Model(path=str(Path("model").resolve())))
    read = read_data(
        spec,
        resolve=lambda t: locate(loaded, run, t),
        encoder=encoder,
        cache=Path("cache"),
        seed=loaded.recipe.seed,
        rejects=None,
    )
    plan = plan_steps(read.examples.sizes, seed=loaded.recipe.seed, epochs=1, batch_size=3)
    loader = Loader(read.examples.__getitem__, plan, microbatch_tokens=150, layout=spec.train.layout)
    largest = 0
    for step in loader.from_step(0):
        for batch in step:
            cut = split(batch, 150) if layout == "tree" else None
            parts = (
                [batch] if cut is None else [cut.trunk, cut.first, max(cut.groups, key=lambda group: group.num_tokens)]
            )
            largest = max(largest, sum(part.input_ids.numel() for part in parts))
    assert words.startswith(f"{largest:,} tokens ")


def test_the_parts_of_a_refusal_add_up_and_it_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    write("sft", [5] * 20 + [3_000], microbatch_tokens=512, batch_size=4)
    needed = (planned().stages[0].memory or 0) / 1.15  # without the allocator's slack
    monkeypatch.setattr(
        planning, "this_machine", lambda runs: Machine("a test machine", "cpu", 2, needed - 5e6, 1e12, True)
    )
    (problem,) = make_plan(load_recipe("r.yaml"), here=True).problems
    total, parts = problem.message.partition(" of memory: ")[::2]
    listed = [_bytes(" ".join(part.split()[-2:])) for part in parts.partition(";")[0].split(", ")]
    assert sum(listed) == pytest.approx(_bytes(total.removeprefix("needs at least ")), rel=0.1)
    assert problem.hint is not None and problem.hint.startswith("lower `max_length`: there is room for ")
    assert problem.hint.endswith(", or set `train.gradient_checkpointing: true`")


def _bytes(text: str) -> float:
    amount, unit = text.split()
    return float(amount) * {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]


def test_a_plan_with_bad_data_is_a_plan_all_the_same() -> None:
    """The rest is printed; the row is told with its line."""
    write("sft", [5, 6])
    Path("data.jsonl").write_text(Path("data.jsonl").read_text() + "{not json\n")
    plan = planned()
    assert plan.faults[0].line == 3 and terms(plan)["data"][0] == "cannot be read"
