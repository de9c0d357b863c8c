"""docs/simulated.md: made from the rows that are kept, which agree with what a step must take."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.sizing.shapes import GLM_4_9B
from tests.sim.table import PAGE, TABLE, page, waiting

TABLE_ROWS: list[dict[str, Any]] = json.loads(TABLE.read_text())


def test_the_page_is_that_of_the_rows() -> None:
    assert PAGE.read_text() == page(TABLE_ROWS)
    assert "**Simulated, not measured.**" in PAGE.read_text()


@pytest.mark.parametrize("row", TABLE_ROWS, ids=lambda row: f"{row['name']} at {row['gpus']}")
def test_the_operations_are_those_of_the_matrices(row: dict[str, Any]) -> None:
    """Two for each weight and token, and as many again for each time: forward, once more for the checkpoints (not the
    LM head), gradients of inputs, and of weights where they are trained. On top attention's, at most of all pairs."""
    shape, tokens = GLM_4_9B, row["tokens"]
    layer = shape.hidden * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer += 3 * shape.hidden * shape.intermediate
    passes = 3 if row["name"] == "LoRA" else 4
    head = shape.hidden * shape.vocab * (passes - 1)
    least = 2 * tokens * (row["layers"] * layer * passes + head)
    pairs = 4 * tokens**2 * shape.heads * shape.head_dim * row["layers"]
    adapters = 0.05 * least if row["name"] == "LoRA" else 0
    assert 0.98 * least < sum(row["flops"].values()) < least + adapters + 4.5 * pairs


def test_a_process_has_the_same_work_whatever_their_number() -> None:
    """Data parallel: operations are those of one process; one process sends nothing."""
    alone = {row["name"]: row for row in TABLE_ROWS if row["gpus"] == 1}
    for row in TABLE_ROWS:
        if row["name"] in alone:
            assert row["flops"] == alone[row["name"]]["flops"]
            assert (sum(row["message_bytes"].values()) == 0) == (row["gpus"] == 1)


def test_all_gradients_are_sent_once() -> None:
    """In fp32: four bytes for each weight, and little else."""
    sent = {sum(row["message_bytes"].values()) for row in TABLE_ROWS if row["name"] == "full" and row["gpus"] > 1}
    assert len(sent) == 1 and sent.pop() == pytest.approx(4 * GLM_4_9B.parameters, rel=0.01)


def test_messages_take_their_way_through_the_ring() -> None:
    """An all-reduce of 9 GB over 8 GPUs of a machine sends seven eighths of it twice, at 450 GB/s: 0.035 s. A gather of
    5 GB over 64 GPUs sends 63 of 64 parts once, at 50 GB/s."""
    assert waiting({"all_reduce": 9_000_000_000}, 8) == pytest.approx(0.035)
    assert waiting({"all_gather_into_tensor": 5_000_000_000}, 64) == pytest.approx(0.1 * 63 / 64)
    assert waiting({}, 1) == 0
