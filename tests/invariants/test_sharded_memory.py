"""What processes that each hold a part of a model need in memory, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from align.recipe.schema import Train
from align.sizing import needs
from align.sizing.shapes import Shape
from align.training.launch import respawn
from tests.support.sharded_memory import MICROBATCH, SHAPE, VOCAB


def measured(folder: Path, function: str) -> dict[str, float]:
    module = "tests.support.sharded_memory"
    code = f"from pathlib import Path\nfrom {module} import {function}\n{function}(Path({str(folder)!r}))"
    assert respawn(2, [sys.executable, "-c", code]) == 0
    found: dict[str, float] = json.loads((folder / "found.json").read_text())
    print(found)
    return found


def test_training_needs_less_than_the_whole_model_and_what_was_planned(tmp_path: Path) -> None:
    """Weights, gradients and two moments of a whole model are four times its size. The plan is within a quarter."""
    found = measured(tmp_path, "memory_of_training")
    assert found["peak"] < 0.9 * 4 * found["model"]
    hidden, inside, layers, heads = SHAPE.values()
    shape = Shape(layers, hidden, heads, heads, hidden // heads, inside, VOCAB, tied=False)
    assert 4 * shape.parameters == found["model"]
    train = Train(microbatch_tokens=MICROBATCH, sharding="full")
    terms = needs.memory(shape, train, None, device="cpu", processes=2)
    planned = sum(term.amount for term in terms if term.name != "runtime")
    print(planned)
    assert abs(planned - found["peak"]) < 0.25 * found["peak"]


def test_memory_does_not_hold_the_whole_model(tmp_path: Path) -> None:
    """The first process's memory rises by a file and a tensor (which is gathered from pieces of its size), and 16 MB
    for what allocators and libraries do; a model of 250 MB would show."""
    found = measured(tmp_path, "memory_of_leaving")
    bound = found["file"] + 2 * found["largest"] + 16e6
    assert found["model"] > 3 * bound
    assert 0 < found["saved"] < bound
    assert 0 < found["handed over"] < bound
