"""Tables from known truths: a clean error, a counted drop, or a record whose chosen answer is the one that the row
calls better.

``TABLES=10000 pytest tests/unit/data/files/test_tables.py`` tries more of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from align.data.records import Messages, Preference
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support.tables import KINDS, SUFFIXES, Truth, table

COUNT = int(os.environ.get("TABLES", "360"))
PARTS = 6


def read(path: Path, format: Any) -> tuple[list[Preference], str]:
    """The records of a file; none where it is refused, and then why."""
    keys = {} if format is None else {"format": format}
    try:
        source = DataSource.model_validate({"path": str(path), "on_bad_row": "skip", **keys})
        records = list(read_records([source], [path], "preference", seed=0, rejects=None))
    except InputError as error:
        return [], str(error)
    assert all(isinstance(record, Preference) for record in records)
    return [record for record in records if isinstance(record, Preference)], ""


def said(messages: Messages) -> str:
    return messages[-1]["content"].strip()


def check(record: Preference, truth: Truth) -> None:
    chosen, rejected = said(record.chosen), {said(one) for one in record.rejected}
    if not truth.replaced:
        assert truth.best not in rejected, "the better answer is among the rejected ones"
        assert chosen == truth.best
    if not truth.odd:
        assert rejected <= truth.others


@pytest.mark.parametrize("part", range(PARTS))
def test_chosen_and_rejected_are_never_swapped(part: int, tmp_path: Path) -> None:
    for seed in range(part, COUNT, PARTS):
        made, suffix = table(seed)
        path = made.write(tmp_path, suffix)
        records, why = read(path, made.format)
        context = f"table {seed} ({made.kind}, {path.suffix}, {made.format}): {made.rows}"
        found = {said(record.prompt): record for record in records}
        for prompt, record in found.items():
            truth = made.truths.get(prompt)
            if truth is None:  # the prompt was replaced
                assert any(one.odd for one in made.truths.values()), context
                continue
            try:
                check(record, truth)
            except AssertionError as error:
                raise AssertionError(f"{error} in {context}") from error
            assert not truth.tie or truth.odd, f"a tie is a record in {context}"
        missing = {
            prompt for prompt, truth in made.truths.items() if not truth.tie and not truth.odd and prompt not in found
        }
        assert not missing, f"nothing of {missing} is left ({why}) in {context}"


@pytest.mark.parametrize("part", range(PARTS))
def test_without_a_word_nothing_is_swapped_either(part: int, tmp_path: Path) -> None:
    """Most of these tables have names that mean nothing, and are refused; what is read is read the right way round."""
    for seed in range(part, COUNT, PARTS):
        made, suffix = table(seed)
        if made.format is None or "chosen" in str(made.format) or "rejected" in str(made.format) or "tree" in made.kind:
            continue  # read above; or with names that say something else than the table means
        records, _ = read(made.write(tmp_path, suffix), None)
        for record in records:
            truth = made.truths.get(said(record.prompt))
            if truth is not None:
                check(record, truth)


def test_the_tables_are_of_every_kind() -> None:
    made = [table(seed) for seed in range(4 * len(KINDS))]
    assert len({one.kind for one, _ in made}) == len(KINDS)
    assert {suffix for _, suffix in made} == set(SUFFIXES)
    assert any(truth.odd for one, _ in made for truth in one.truths.values())
    assert any(truth.tie for one, _ in made for truth in one.truths.values())
