"""Which samples become negatives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.functional.selection import NegativeSelection, normalised, num_kept, select_negatives


def select(samples: list[str], similarities: list[float] | None = None, **changes: Any) -> NegativeSelection:
    options: dict[str, Any] = {"keep_least_similar": 0.75, "negatives": 2, "dedup": True, "seed": 1, "id": "p"}
    scores = similarities if similarities is not None else [i / 100 for i in range(len(samples))]
    return select_negatives("the target", samples, scores, **{**options, **changes})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris.", "paris", True),
        ("  Paris is\n big ", "paris is big", True),
        ('"Paris!"', "Paris", True),
        ("巴黎。", "巴黎", True),
        ("cafe\u0301", "café", True),
        ("STRASSE", "straße", True),
        ("-5", "5", False),
        ("$5", "5", False),
        ("50%", "50", False),
        ("it's", "its", False),
        ("...", "!!", False),
        ("...", "", False),
    ],
)
def test_what_counts_as_the_same(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) is same


@pytest.mark.parametrize(
    ("unique", "share", "kept"),
    [
        (32, 0.75, 24),
        (16, 0.75, 12),
        (4, 0.75, 3),
        (3, 0.75, 2),
        (2, 0.75, 1),
        (1, 0.75, 0),
        (0, 0.75, 0),
        (5, 1.0, 5),
        (1, 1.0, 1),
        (100, 0.29, 29),
        (10, 0.7, 7),
        (2, 0.999, 1),
        (10, 0.05, 0),
    ],
)
def test_the_filter_keeps_this_many(unique: int, share: float, kept: int) -> None:
    """The largest share below 1 still leaves out the most similar one; 0.29 of 100 are 29, not the 28 of binary
    fractions."""
    assert num_kept(unique, share) == kept


def test_a_hand_made_case() -> None:
    """Four samples at known angles to the target. Kept are the three least similar, not the three most similar."""
    angles = np.array([0.1, 1.2, 0.9, 0.5])
    target, samples = np.array([1.0, 0.0]), np.stack([np.cos(angles), np.sin(angles)], axis=1)
    chosen = select(["nearest", "farthest", "far", "near"], (samples @ target).tolist(), negatives=3)
    assert chosen.indices == (1, 2, 3)
    assert chosen.reasons == ("filtered", "negative", "negative", "negative")


def test_every_sample_has_its_reason() -> None:
    samples = ["a", "", "The Target!", "A.", "b", "c", "  ", "d", "e"]
    chosen = select(samples, [0.1, 0.0, 0.0, 0.0, 0.2, 0.3, 0.0, 0.4, 0.9], negatives=2, unfinished={5})
    assert [chosen.reasons[i] for i in (1, 2, 3, 5, 6)] == ["empty", "target", "duplicate", "unfinished", "empty"]
    assert chosen.reasons[8] == "filtered", "of a, b, d and e the most similar quarter"
    assert Counter(chosen.reasons) == {
        "empty": 2,
        "target": 1,
        "duplicate": 1,
        "unfinished": 1,
        "filtered": 1,
        "negative": 2,
        "not drawn": 1,
    }
    assert all(chosen.reasons[i] == "negative" for i in chosen.indices)


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("copy", ["the target", "The  target.", "“THE TARGET”"])
def test_a_copy_of_the_target_is_never_a_negative(copy: str, dedup: bool) -> None:
    """Also without filter and without deduplication."""
    chosen = select([copy, copy, "other"], keep_least_similar=1.0, negatives=3, dedup=dedup)
    assert chosen.indices == (2,)


def test_boundaries() -> None:
    """One sample, all identical, fewer than asked for, none at all."""
    assert select(["one"]).indices == ()
    assert select(["one"], keep_least_similar=1.0).indices == (0,)
    assert select(["same"] * 8).indices == ()
    assert select(["same"] * 8).reasons == ("filtered", *["duplicate"] * 7)
    assert select(["same"] * 8, keep_least_similar=1.0).indices == (0,)
    assert select(["same"] * 8, keep_least_similar=1.0, dedup=False, negatives=8).indices == tuple(range(8))
    assert select(["a", "b"], negatives=5).indices == (0,)
    assert select([]) == NegativeSelection((), ())


def test_ties_go_to_the_earlier_sample() -> None:
    """Where similarities are equal the cut does not depend on anything but the order of the samples."""
    assert select(["a", "b", "c", "d"], [0.5] * 4, negatives=4).reasons == (
        "negative",
        "negative",
        "negative",
        "filtered",
    )


def test_the_draw_is_uniform_and_depends_on_seed_and_id_only() -> None:
    """Each of ten samples is drawn in about two fifths of the prompts when four are drawn."""
    samples = [f"s{i}" for i in range(10)]
    counts = Counter(
        i for p in range(2000) for i in select(samples, keep_least_similar=1.0, negatives=4, id=f"p{p}").indices
    )
    assert all(abs(counts[i] - 800) < 5 * np.sqrt(2000 * 0.4 * 0.6) for i in range(10))
    options: dict[str, Any] = {"keep_least_similar": 1.0, "negatives": 4}
    assert select(samples, **options) == select(samples, **options)
    assert len({select(samples, **options, seed=seed).indices for seed in range(20)}) > 10


def test_a_smaller_draw_is_part_of_a_larger_one() -> None:
    """So that a comparison of K compares what is added, and not other samples."""
    samples = [f"s{i}" for i in range(32)]
    draws = [set(select(samples, negatives=k).indices) for k in (1, 2, 4, 8, 16)]
    assert [len(draw) for draw in draws] == [1, 2, 4, 8, 16]
    drawn = [select(samples, negatives=4, id=f"p{prompt}").indices for prompt in range(20)]
    assert all(list(indices) == sorted(indices) for indices in drawn), "in the order of the samples"
    assert all(small < large for small, large in pairwise(draws))


PROGRAM = """
from align.functional.selection import select_negatives
samples = ["a", "b", "A", "c d", "e", "f.", "f", "", "g", "h"]
for p in range(50):
    scores = [((i * 7 + p) % 10) / 10 for i in range(10)]
    print(select_negatives("the target", samples, scores, keep_least_similar=0.75, negatives=3, dedup=True, seed=p, id=f"p-{p}"))
"""


def test_python_hash_seed_has_no_say() -> None:
    """Two processes with other hash seeds print the same bytes."""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "4242")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].splitlines())) > 10


TEXTS = st.lists(st.sampled_from(["a", "A.", "b", "c", "d", "e", "f", "", " ", "The target", "..."]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.data(), st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.integers(1, 6), st.booleans())
def test_what_always_holds(samples: list[str], data: st.DataObject, share: float, negatives: int, dedup: bool) -> None:
    """No negative equals the target or is empty; none is more similar than a filtered one; with dedup none twice;
    never too many."""
    scores = data.draw(st.lists(st.floats(-1, 1), min_size=len(samples), max_size=len(samples)))
    chosen = select(samples, scores, keep_least_similar=share, negatives=negatives, dedup=dedup)
    texts = [normalised(samples[i]) for i in chosen.indices]
    assert "the target" not in texts and "" not in texts
    assert len(texts) <= negatives
    assert not dedup or len(set(texts)) == len(texts)
    filtered = [scores[i] for i, reason in enumerate(chosen.reasons) if reason == "filtered"]
    usable = [scores[i] for i, reason in enumerate(chosen.reasons) if reason in ("negative", "not drawn")]
    assert not filtered or not usable or max(usable) <= min(filtered)
    assert bool(filtered) == (share < 1 and bool(filtered + usable))
    assert len(texts) == min(negatives, len(usable))
