"""Labelled answers that a user's own function gives: compared within a prompt, as those of mappings are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data.formats.formats import Want
from align.data.records import Preference, Unpaired
from align.data.sources.contents import wanted_of
from align.data.sources.mixture import Records, read_records
from align.errors import InputError
from align.preflight.first_rows import faults
from align.recipe.schema import DataSource

HERE = __name__
CALLS: list[int] = []


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield


def judged(row: dict[str, Any]) -> Any:
    """One answer a row; a row without a vote is left out."""
    CALLS.append(row["n"])
    if row.get("fails"):
        raise ValueError("cannot read it")
    if row["good"] is None:
        return None
    return {"prompt": row["q"], "completion": row["a"], "label": row["good"], "n": row["n"]}


def several(row: dict[str, Any]) -> Any:
    """All answers of a row, as records are built in Python."""
    return [
        {"prompt": row["q"], "completion": text, "label": good}
        for texts, good in ((row["good"], True), (row["bad"], False))
        for text in texts
    ]


def mixed(row: dict[str, Any]) -> Any:
    """Labelled answers, and pairs."""
    if "pair" in row:
        return {"prompt": row["q"], "chosen": row["pair"][0], "rejected": row["pair"][1]}
    return {"prompt": row["q"], "completion": row["a"], "label": row["good"]}


def read(folder: Path, rows: list[Any], want: Want, function: str = "judged", **keys: Any) -> Records:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource.model_validate({"path": str(path), "format": f"{HERE}:{function}", **keys})
    return read_records([source], [path], want, seed=0, rejects=folder / "rejects.jsonl")


def answer(n: int, q: str, a: str, good: bool | None, **more: Any) -> dict[str, Any]:
    return {"n": n, "q": q, "a": a, "good": good, **more}


def pairs(records: Records) -> list[tuple[str, str, list[str]]]:
    found = []
    for one in records:
        assert isinstance(one, Preference)
        rejected = [worse[-1]["content"] for worse in one.rejected]
        found.append((one.prompt[-1]["content"], one.chosen[-1]["content"], rejected))
    return found


ROWS = [
    answer(1, "tea?", "three minutes", True),
    answer(2, "egg?", "boil it", True),
    answer(3, "tea?", "a day", False),
    answer(4, "late?", "", None),
    answer(5, "tea?", "never", False),
    answer(6, "rain?", "no", False),
]


def test_good_answers_are_compared_with_the_bad_ones_to_the_same_prompt(tmp_path: Path) -> None:
    records = read(tmp_path, ROWS, "preference")
    assert pairs(records) == [("tea?", "three minutes", ["a day", "never"])]
    report = records.report.sources[0]
    assert report.reasons == {
        "dropped by the format": 1,
        "labelled answers without a bad one to the same prompt": 1,
        "labelled answers without a good one to the same prompt": 1,
    }
    assert (report.read, report.used, report.parts) == (6, 3, 0)
    assert "answers with labels: the good ones are compared with the bad ones to the same prompt" in report.remarks
    assert CALLS == [1, 2, 3, 4, 5, 6]  # once each, since a function may remember what it has seen


def test_columns_and_ids_stay_with_the_record(tmp_path: Path) -> None:
    rows = [answer(7, "tea?", "three minutes", True), answer(8, "tea?", "a day", False)]
    (one,) = read(tmp_path, rows, "preference")
    assert isinstance(one, Preference)
    assert (one.id, one.fields, one.origin.line) == ("rows.jsonl:1", {"n": 7}, 1)


def test_a_row_may_give_several_answers(tmp_path: Path) -> None:
    rows = [{"q": "tea?", "good": ["x"], "bad": []}, {"q": "tea?", "good": ["y"], "bad": ["z", "w"]}]
    rows.append({"q": "alone?", "good": ["x", "y"], "bad": []})
    records = read(tmp_path, rows, "preference", "several")
    assert pairs(records) == [("tea?", "x", ["z", "w"]), ("tea?", "y", ["z", "w"])]
    report = records.report.sources[0]
    assert report.parts == 6 == report.used + report.dropped
    assert "3 rows read in 6 parts, 4 kept as 2 preferences" in report.line()


def test_conditions_of_the_source_hold(tmp_path: Path) -> None:
    rows = [*ROWS, answer(9, "egg?", "fry it", False, lang="en")]
    assert pairs(read(tmp_path, rows, "preference", where={"q": "egg?"})) == [("egg?", "boil it", ["fry it"])]
    assert pairs(read(tmp_path, rows, "preference", limit=1)) == [("tea?", "three minutes", ["a day", "never"])]


def test_a_row_that_fails_is_told_and_may_be_skipped(tmp_path: Path) -> None:
    rows = [answer(0, "tea?", "hm", True, fails=True), *ROWS]
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*raised ValueError: cannot read it"):
        list(read(tmp_path, rows, "preference"))
    records = read(tmp_path, rows, "preference", on_bad_row="skip")
    assert pairs(records) == [("tea?", "three minutes", ["a day", "never"])]
    assert records.report.sources[0].bad == 1


def test_one_source_gives_one_kind(tmp_path: Path) -> None:
    pair = {"q": "tea?", "pair": ["x", "y"]}
    with pytest.raises(InputError, match=r"rows\.jsonl:7: is no answer with a label, as the first rows are: .*second"):
        list(read(tmp_path, [*ROWS[:3], *ROWS[4:], answer(9, "egg?", "x", True), pair], "preference", "mixed"))
    with pytest.raises(
        InputError, match=r"rows\.jsonl:2 label: is one answer with a label, and the first rows are non"
    ):
        list(read(tmp_path, [pair, ROWS[0]], "preference", "mixed"))


def test_other_stages_take_them_as_they_are(tmp_path: Path) -> None:
    found = list(read(tmp_path, ROWS, "unpaired"))
    assert [one.label for one in found if isinstance(one, Unpaired)] == [True, True, False, False, False]
    source = DataSource.model_validate({"path": str(tmp_path / "rows.jsonl"), "format": f"{HERE}:judged"})
    assert wanted_of(source, tmp_path / "rows.jsonl") == "unpaired"
    assert not faults(source, tmp_path / "rows.jsonl", "preference")


def test_a_mixture_by_weight_reads_them_twice_and_gives_the_same(tmp_path: Path) -> None:
    rows = [*ROWS, answer(9, "egg?", "fry it", False)]
    records = read(tmp_path, rows, "preference", weight=1)
    assert pairs(records) == [("tea?", "three minutes", ["a day", "never"]), ("egg?", "boil it", ["fry it"])]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.booleans()), min_size=1, max_size=30))
def test_never_swapped(tmp_path: Path, drawn: list[tuple[str, bool]]) -> None:
    """Every good answer is chosen over exactly the bad answers to its prompt, and no other comparison is made."""
    rows = [answer(n, f"{q}?", f"answer {n}", good) for n, (q, good) in enumerate(drawn)]
    good, bad = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for row in rows:
        (good if row["good"] else bad)[row["q"]].append(row["a"])
    expected = [(q, a, bad[q]) for q, answers in good.items() if bad[q] for a in answers]
    if expected:
        assert sorted(pairs(read(tmp_path, rows, "preference"))) == sorted(expected)
    else:
        with pytest.raises(InputError, match="0 rows left"):
            list(read(tmp_path, rows, "preference"))
