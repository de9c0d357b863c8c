"""Preference filters: what goes, what stays, and that each is counted with its id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.chat.encoder import Encoder
from align.data.records import Origin, Preference
from align.data.report import DataReport
from align.data.sources.mixture import prompt_digest, read_records
from align.data.trees import filters
from align.data.trees.filters import PreferenceFilter, conflicts, prompt_digests
from align.data.trees.load import load_trees
from align.data.trees.store import TreeStore
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support import tokenizers

ENCODER = Encoder(tokenizers.chatml())


def row(chosen: str, *rejected: str, prompt: str = "Which?", **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": list(rejected) if len(rejected) > 1 else rejected[0],
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"r{i}", **r}, ensure_ascii=False) + "\n" for i, r in enumerate(rows, 1)),
        encoding="utf-8",
    )
    return path


def load(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    held_out: set[str] | None = None,
    *,
    on: bool = True,
    cache: str = "cache",
) -> tuple[TreeStore, DataReport]:
    return load_trees(
        "preference",
        [DataSource(path=str(write(tmp_path / "rows.jsonl", rows)))],
        resolve=Path,
        encoder=ENCODER,
        max_length=200,
        too_long="drop",
        train_on="last",
        seed=0,
        cache=tmp_path / cache,
        rejects=tmp_path / "rejects.jsonl",
        filters=PreferenceFilter(held_out or ()) if on else None,
    )


def kept(store: TreeStore) -> list[str]:
    return [store[i].id for i in range(len(store))]


def edges(*pairs: str) -> set[tuple[bytes, bytes]]:
    return {(pair[0].encode(), pair[1].encode()) for pair in pairs}


def test_conflicts_are_the_edges_inside_a_circle() -> None:
    """A > B > C > A goes, D > A leads in and C > E leads out and both stay; two circles joined by one edge lose all but
    that edge."""
    circle = edges("AB", "BC", "CA")
    assert conflicts(circle | edges("DA", "CE", "DE")) == dict.fromkeys(circle, filters.CYCLE)
    two = circle | edges("XY", "YZ", "ZX")
    assert conflicts(two | edges("AX")).keys() == two
    assert conflicts(edges("AB", "BA", "AC")) == dict.fromkeys(edges("AB", "BA"), filters.CONTRADICTED)
    assert conflicts(edges("AB", "BC", "AC")) == {}


def test_a_circle_goes_and_what_hangs_on_it_stays(tmp_path: Path) -> None:
    """Of one prompt's answers, the 3-cycle is removed and an attached acyclic edge survives; the same
    edges under another prompt are no circle."""
    rows = [
        row("a", "b"),
        row("b", "c"),
        row("c", "a"),
        row("a", "d"),
        row("b", "c", prompt="Other?"),
        row("c", "a", prompt="Third?"),
    ]
    store, report = load(tmp_path, rows)
    assert kept(store) == ["r4", "r5", "r6"]
    assert report.dropped[filters.CYCLE].total == 3
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(line["id"], line["line"], line["reason"]) for line in lines] == [
        (f"r{i}", i, filters.CYCLE) for i in (1, 2, 3)
    ]


def test_contradictions_ties_and_equal_answers(tmp_path: Path) -> None:
    """White space at the ends and Unicode composition do not make two answers; a tie proves nothing, so it contradicts
    nothing."""
    rows = [
        row("yes", "no"),
        row("no ", "yes"),
        row("up", "down", prompt="Where?", margin=0.5),
        row("down", "up", prompt="Where?", margin=0),
        row("in", "out", prompt="How?", margin=-1),
        row("caf\u00e9", "cafe\u0301", prompt="What?"),
        row("left", "right", prompt="Side?"),
        row("left", "right", prompt="Side?"),
    ]
    store, report = load(tmp_path, rows)
    assert kept(store) == ["r3", "r7", "r8"], "the same preference twice is no contradiction"
    counts = {reason: count.total for reason, count in report.dropped.items()}
    assert counts == {filters.CONTRADICTED: 2, filters.TIE: 1, filters.BACKWARDS: 1, filters.EQUAL: 1}


def test_each_pair_is_judged_by_its_own_margin(tmp_path: Path) -> None:
    """Of three rejected answers one is as good as the chosen one and one is better: the third stays, with the margin
    that is its own."""
    store, report = load(tmp_path, [row("a", "b", "c", "d", margin=[0, 2, -1]), row("d", "a")])
    assert kept(store) == ["r1", "r2"], "a pair that is no preference contradicts none"
    assert [(ENCODER.decode(branch.ids), branch.margin) for branch in store[0].branches] == [("a", 0.0), ("c", 2.0)]
    left_out = {what.removeprefix("a rejected answer left out, "): count.total for what, count in report.noted.items()}
    assert left_out == {filters.TIE: 1, filters.BACKWARDS: 1}


def test_only_the_wrong_answers_of_a_prompt_go(tmp_path: Path) -> None:
    """Of three rejected answers one is preferred elsewhere: the row stays with the other two, and that is noted with
    its id."""
    store, report = load(tmp_path, [row("a", "b", "c", "d"), row("c", "a")])
    assert kept(store) == ["r1"]
    assert [ENCODER.decode(branch.ids) for branch in store[0].branches] == ["a", "b", "d"]
    assert [(what, count.total) for what, count in report.noted.items()] == [
        (f"a rejected answer left out, {filters.CONTRADICTED}", 1)
    ]
    assert report.dropped[filters.CONTRADICTED].total == 1
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r1", "r2"]


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    """By prompt, whatever the answers and the spaces; the cache knows which held-out data it was filtered by."""
    held_out_file = write(tmp_path / "held.jsonl", [row("x", "y", prompt="Which  one?")])
    held_out = prompt_digests(read_records([DataSource(path="h")], [held_out_file], "preference", seed=0, rejects=None))
    rows = [row("a", "b", prompt="Which one?"), row("a", "b", prompt="Which two?")]
    store, report = load(tmp_path, rows, held_out)
    assert kept(store) == ["r2"]
    assert report.dropped[filters.LEAKED].total == 1
    assert kept(load(tmp_path, rows)[0]) == ["r1", "r2"], "without held-out data nothing leaks, and the cache has both"
    assert load(tmp_path, rows, held_out)[1].reused


def test_filters_are_off_where_nobody_asks(tmp_path: Path) -> None:
    store, report = load(tmp_path, [row("a", "b"), row("b", "a")], on=False)
    assert kept(store) == ["r1", "r2"] and report.dropped == {}


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 rows left of 2: 2 contradicted"):
        load(tmp_path, [row("a", "b"), row("b", "a")])
    with pytest.raises(InputError, match="held-out data; hold out other prompts, or set filters: false"):
        load(
            tmp_path,
            [row("a", "b")],
            {prompt_digest(Preference(({"role": "user", "content": "Which?"},), (), (), "", Origin("", 1)))},
        )
