"""The reward benchmarks: which file is which, and numbers by hand, or by another program written for that, from the
same scores."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from align.data.records import Origin
from align.errors import InputError
from align.evaluation.reward_bench import judgebench, rewardbench1, rewardbench2, rmbench
from align.evaluation.reward_bench.items import of_lengths
from align.evaluation.reward_bench.read import BENCHES, read_bench
from align.functional.intervals import wilson
from align.recipe.schema import DataSource
from tests.support import reward_benches as made

ONE_OF_EACH = {
    "rewardbench1": made.rewardbench1("hep-go"),
    "rewardbench2": made.rewardbench2("Math", "0"),
    "rmbench": made.rmbench("chat"),
    "judgebench": made.judgebench("A>B"),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_file_is_told_by_its_columns(tmp_path: Path, name: str) -> None:
    bench, items = made.read(tmp_path / "f.jsonl", [ONE_OF_EACH[name]])
    assert name == bench.NAME and len(items) == 1
    assert [one.NAME for one in BENCHES if one.recognises(ONE_OF_EACH[name])] == [name], (
        "no other one takes it for its own"
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "is a row of none of the reward benchmarks (RewardBench 1, RewardBench 2, RM-Bench",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c", "subset": "shp"},
            "is a row of none of",
        ),
        ({**made.rewardbench1("x"), "subset": "summarize"}, "subset: `summarize` is no subset of RewardBench 1"),
        ({**made.rewardbench1("hep-go"), "prompt": " "}, "prompt: empty"),
        ({**made.rewardbench2("Math", "0"), "num_correct": 2}, "num_correct: is 2, and `chosen` has 1 answers"),
        (made.rewardbench2("Math", "0", right=2), "chosen: expected one right answer, found 2"),
        (made.rewardbench2("Maths", "0"), "subset: `Maths` is no subset of RewardBench 2"),
        (made.rewardbench2("Ties", "7"), "id: expected ref:NUMBER or tied:NUMBER, found `7`"),
        (made.rewardbench2("Ties", "tied:7"), "chosen: expected several right answers of a tied prompt, found one"),
        ({**made.rmbench("chat"), "domain": "law"}, "domain: `law` is no domain of RM-Bench"),
        (made.judgebench("A=B"), "label: expected A>B or B>A, found `A=B`"),
        ({**made.judgebench("A>B"), "response_B": 4}, "response_B: expected a text, found a number"),
    ],
)
def test_a_row_that_cannot_be_one_is_told_in_a_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        made.read(tmp_path / "f.jsonl", [row])
    (only,) = caught.value.problems
    assert f"f.jsonl:1 {problem}" in str(only) or f"f.jsonl:1: {problem}" in str(only), str(only)


def test_a_second_kind_of_row_and_a_number_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"f\.jsonl:2: has not the columns of RewardBench 1, as the first row has"):
        made.read(tmp_path / "f.jsonl", [ONE_OF_EACH["rewardbench1"], ONE_OF_EACH["rmbench"]])
    with pytest.raises(InputError, match=r"f\.jsonl:2 id: `ref:1` is there twice"):
        made.read(tmp_path / "f.jsonl", [made.rewardbench2("Ties", "ref:1"), made.rewardbench2("Ties", "ref:1")])


def test_where_and_limit_choose_rows(tmp_path: Path) -> None:
    rows = [made.rmbench(domain, i) for i, domain in enumerate(("chat", "math", "math", "math"))]
    source = DataSource(path="f.jsonl", where={"domain": "math"}, limit=2)
    _, items = read_bench(source, made.write(tmp_path / "f.jsonl", rows))
    assert [item.id for item in items] == ["1", "2"]


WON, LOST, TIED = [2.0, 1.0], [1.0, 2.0], [1.5, 1.5]


def test_rewardbench_1_by_hand(tmp_path: Path) -> None:
    """Chat is (100 * 1/2 + 40 * 1) / 140: subsets count as much as their official number of pairs, whatever is in the
    file. math-prm counts
    984. A tie is wrong, and half right where ties are half."""
    pairs = [
        ("alpacaeval-easy", WON),
        ("alpacaeval-easy", LOST),
        ("mt-bench-med", WON),
        ("llmbar-natural", WON),
        ("donotanswer", TIED),
    ]
    pairs += [("math-prm", LOST), ("hep-go", WON)]
    found = means_of(
        tmp_path, [made.rewardbench1(subset, i) for i, (subset, _) in enumerate(pairs)], [scores for _, scores in pairs]
    )
    assert found["chat"] == pytest.approx(90 / 140) and found["chat_hard"] == 1.0 and found["safety"] == 0.0
    assert found["reasoning"] == pytest.approx(164 / (984 + 164))
    assert found["score"] == pytest.approx((90 / 140 + 1 + 0 + 164 / 1148) / 4)
    assert found["score_ties_half"] == pytest.approx((90 / 140 + 1 + 0.5 + 164 / 1148) / 4)


def test_rewardbench_1_whole_has_wilsons_interval_in_a_section(tmp_path: Path) -> None:
    """As many pairs as the official file has weigh the same in a section without math-prm: a plain share, with a
    share's interval."""
    rows = [
        made.rewardbench1(subset, i) for subset, pairs in rewardbench1.SECTIONS["Safety"].items() for i in range(pairs)
    ]
    entry = made.estimates(tmp_path / "f.jsonl", rows, {"rm": [WON] * 700 + [LOST] * 40})["rewardbench1/safety"]["rm"]
    assert (entry["low"], entry["high"]) == pytest.approx(wilson(700 / 740, 740)) and entry["count"] == 740


def test_rewardbench_2_by_hand(tmp_path: Path) -> None:
    """Best of four, 1/k where k share the highest score; and the Ties score of three pairs of prompts, term by term."""
    rows = [
        made.rewardbench2(subset, str(i))
        for i, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus", "Focus"))
    ]
    scores = [[3.0, 1, 2, 0], [1.0, 3, 2, 0], [3.0, 3, 0, 0], [3.0, 3, 3, 0], [1.0, 0, 0, 0], [1.0, 1, 1, 1]]
    rows += [
        made.rewardbench2("Ties", f"{kind}:{n}", right, 2)
        for n in (1, 2, 3)
        for kind, right in (("ref", 1), ("tied", 2))
    ]
    # Margins 1, 1.5 (apart 0.5); -1, 1 (apart 4)
    scores += [[2.0, 0, 1], [3.0, 2.5, 1, 0], [0.0, 1, 1], [5.0, 1, 0, -1]]
    scores += [[1.2, 1, 0], [3.0, 2.5, 1, 0]]  # margins 0.2, 1.5 (apart 0.5): the second beats it, both together do not
    found = means_of(tmp_path, rows, scores)
    ratios = math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 4 - 1) + math.tanh(0.2 / 0.5 - 1)
    ties = 0.3 * 2 / 3 + 0.3 * 1 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * ratios / 3
    by_subset = {"factuality": 1.0, "precise_if": 0.0, "math": 1 / 2, "safety": 1 / 3, "focus": (1 + 1 / 4) / 2}
    assert {name: found[name] for name in by_subset} == pytest.approx(by_subset) and found["ties"] == pytest.approx(
        ties
    )
    assert found["score"] == pytest.approx((sum(by_subset.values()) + ties) / 6)
    assert found["score_ties_half"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 2 + (1 + 1 / 2) / 2 + ties) / 6)


def test_ties_of_equal_scores_have_no_ratio(tmp_path: Path) -> None:
    """Right answers that score the same are 0 apart: the last term has nothing to divide by, and no pair counts in
    it."""
    rows = [made.rewardbench2("Ties", "ref:1"), made.rewardbench2("Ties", "tied:1", right=2)]
    assert means_of(tmp_path, rows, [[1.0, 0, 0, 0], [2.0, 2.0, 1, 1, 1]])["ties"] == pytest.approx(1.0)
    assert means_of(tmp_path, rows[:1], [[1.0, 0, 0, 0]])["ties"] == pytest.approx(0.3), (
        "a prompt without its other half"
    )


def test_rm_bench_by_hand(tmp_path: Path) -> None:
    """A scorer that adds 1 for each step of style and 0.5 for being right is right where the wrong answer is not more
    elaborate."""
    by_style, all_wrong = [0.5, 1.5, 2.5, 0, 1, 2], [0.0, 0, 0, 1, 1, 1]
    rows = [
        made.rmbench(domain, i)
        for i, domain in enumerate(("chat", "code", "safety-refuse", "safety-response", "math", "math"))
    ]
    scores = [by_style, by_style, by_style, all_wrong, all_wrong, [1.0] * 6]
    found = means_of(tmp_path, rows, scores)
    assert {name: found[name] for name in rmbench.DOMAINS} == pytest.approx(
        {"chat": 2 / 3, "code": 2 / 3, "safety": 1 / 3, "math": 0}
    )
    assert {name: found[name] for name in ("easy", "normal", "hard")} == pytest.approx(
        {"easy": 2.5 / 4, "normal": 2.5 / 4, "hard": 0}
    )
    assert found["score"] == pytest.approx(2.5 / 4 * 2 / 3) and found["score_ties_half"] == pytest.approx(
        (2.5 * 2 / 3 + 0.25) / 4
    )


def test_a_part_of_rm_bench_names_no_domain(tmp_path: Path) -> None:
    rows = [made.rmbench(None, i) for i in range(2)]
    found = means_of(tmp_path, rows, [[1.0, 1, 1, 0, 0, 0], [0.5, 1.5, 2.5, 0, 1, 2]])
    assert (found["easy"], found["normal"], found["hard"], found["score"]) == pytest.approx((1, 1, 0.5, 2.5 / 3))
    _, items = made.read(tmp_path / "f.jsonl", rows)
    assert "one of its parts" in (rmbench.incomplete(items) or "")


def test_judgebench_by_hand(tmp_path: Path) -> None:
    """Its code takes a tie for a verdict for the second answer: right where that one is."""
    rows = [
        *(made.judgebench(label, "mmlu-pro-law", i) for i, label in enumerate(("A>B", "B>A"))),
        *(made.judgebench(label, "livecodebench", i) for i, label in enumerate(("A>B", "B>A", "B>A"))),
        made.judgebench("A>B", "another", 9),
    ]
    found = means_of(tmp_path, rows, [WON, LOST, TIED, TIED, WON, WON])
    assert found["knowledge"] == 0.5 and found["coding"] == pytest.approx(2 / 3) and "math" not in found
    assert found["score"] == pytest.approx(4 / 6) and found["score_ties_half"] == pytest.approx(
        (1 + 0 + 0.5 + 0.5 + 1 + 1) / 6
    )


@pytest.mark.parametrize(
    ("verdicts", "official"), [((1, 1), 1), ((1, 0.5), 1), ((0.5, 0.5), 0), ((1, 0), 0), ((0.5, 0), 0), ((0, 0), 0)]
)
def test_two_verdicts_of_a_judge(verdicts: tuple[float, float], official: float) -> None:
    """JudgeBench asks in both orders and adds up the verdicts. The others ask once, in a random order; on average that
    is the mean of the two verdicts."""
    for first, second in (verdicts, verdicts[::-1]):
        assert judgebench.official_verdicts(first, second) == official
        assert (
            rewardbench1.official_verdicts(first, second)
            == rmbench.official_verdicts(first, second)
            == sum(verdicts) / 2
        )


def test_the_right_answer_is_the_one_the_row_calls_right(tmp_path: Path) -> None:
    _, (item,) = made.read(tmp_path / "f.jsonl", [made.judgebench("B>A", number=3)])
    assert item.answers[0].startswith("It is B3") and not item.right_first
    for row in (made.rewardbench1("hep-go"), made.rewardbench2("Math", "0"), made.rmbench("chat")):
        _, (item,) = made.read(tmp_path / "f.jsonl", [row])
        chosen = row["chosen"] if isinstance(row["chosen"], list) else [row["chosen"]]
        assert list(item.answers[: item.right]) == chosen


def test_the_control_prefers_the_longer_answer(tmp_path: Path) -> None:
    rows = [made.judgebench("B>A"), made.judgebench("A>B")]
    bench, items = made.read(tmp_path / "f.jsonl", rows)
    found = bench.measures(items, {"longer": [of_lengths(bench, item) for item in items]})["judgebench/score"]
    assert found.estimates("longer", 0)["longer"]["mean"] == 0.5  # type: ignore[union-attr]
    assert [float(of_lengths(bench, item).half[0, 0]) for item in items] == [1.0, 0.0]


# Against another program


def drawn(rng: np.random.Generator, answers: int) -> list[float]:
    """Scores on a coarse grid, so that some are equal."""
    return [float(score) for score in rng.integers(0, 6, answers) / 2]


@pytest.mark.parametrize("seed", range(5))
def test_rewardbench_1_as_means_of_means(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    subsets = [
        subset for section in rewardbench1.SECTIONS.values() for subset in section for _ in range(rng.integers(1, 5))
    ]
    scores = [drawn(rng, 2) for _ in subsets]
    found = means_of(tmp_path, [made.rewardbench1(subset, i) for i, subset in enumerate(subsets)], scores)
    right = defaultdict(list)
    for subset, (chosen, rejected) in zip(subsets, scores, strict=True):
        right[subset].append(1 if chosen > rejected else 0)
    sections = []
    for name, of in rewardbench1.SECTIONS.items():
        sections.append(sum(fmean(right[subset]) * count for subset, count in of.items()) / sum(of.values()))
        assert found[name.lower().replace(" ", "_")] == pytest.approx(sections[-1])
    assert found["score"] == pytest.approx(fmean(sections))


@pytest.mark.parametrize("seed", range(5))
def test_rm_bench_in_loops(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    domains = [domain for domain in rmbench.DOMAINS for _ in range(rng.integers(1, 5))]
    scores = [drawn(rng, 6) for _ in domains]
    found = means_of(tmp_path, [made.rmbench(domain, i) for i, domain in enumerate(domains)], scores)
    level: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ("easy", "normal", "hard")}
    for domain, own in zip(domains, scores, strict=True):
        for i in range(3):
            for j in range(3):
                name = "normal" if i == j else "hard" if i < j else "easy"
                level[name][domain].append(1.0 if own[i] > own[3 + j] else 0.0)
    by_level = {name: fmean(fmean(of[domain]) for domain in rmbench.DOMAINS) for name, of in level.items()}
    assert {name: found[name] for name in by_level} == pytest.approx(by_level)
    assert found["score"] == pytest.approx(fmean(by_level.values()))
    for domain in rmbench.DOMAINS:
        assert found[domain] == pytest.approx(fmean(fmean(level[name][domain]) for name in level))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_scores_turned_round_turn_the_numbers_round(tmp_path: Path, name: str) -> None:
    """What a scorer gets right, its opposite gets wrong, where no scores are equal and every prompt is one pair."""
    rng = np.random.default_rng(3)
    rows = {
        "rewardbench1": [
            made.rewardbench1(subset, i)
            for section in rewardbench1.SECTIONS.values()
            for i, subset in enumerate(section)
        ],
        "rewardbench2": [made.rewardbench2(subset, str(i), 1, 1) for i, subset in enumerate(rewardbench2.SUBSETS * 3)],
        "rmbench": [made.rmbench(domain, i) for i, domain in enumerate(rmbench.DOMAINS * 3)],
        "judgebench": [made.judgebench(label, number=i) for i, label in enumerate(("A>B", "B>A") * 5)],
    }[name]
    answers = {"rmbench": 6}.get(name, 2)
    scores = [rng.normal(size=answers) for _ in rows]
    there = made.means(tmp_path / "f.jsonl", rows, [list(one) for one in scores])
    back = made.means(tmp_path / "f.jsonl", rows, [list(-one) for one in scores])
    assert {key: 1 - value for key, value in there.items()} == pytest.approx(back) and there


def test_scorers_are_compared_item_by_item(tmp_path: Path) -> None:
    """Two scorers that disagree on 10 of 40 pairs, all in favour of the second, differ by 0.25, clearly; so it is with
    Ties."""
    rows = [made.judgebench("A>B", number=i) for i in range(40)]
    found = made.estimates(tmp_path / "f.jsonl", rows, {"one": [WON] * 30 + [LOST] * 10, "two": [WON] * 40})[
        "judgebench/score"
    ]
    difference = found["two"]["difference"]
    assert difference["mean"] == pytest.approx(0.25) and 0 < difference["low"] < 0.25 < difference["high"]
    rows = [
        made.rewardbench2("Ties", f"{kind}:{n}", right) for n in range(12) for kind, right in (("ref", 1), ("tied", 2))
    ]
    good, bad = [[9.0, 0, 0, 0], [9.0, 8.9, 0, 0, 0]] * 12, [[9.0, 0, 0, 0], [9.0, 0.5, 0, 0, 0]] * 12
    entry = made.estimates(tmp_path / "f.jsonl", rows, {"bad": bad[:8] + good[8:], "good": good})["rewardbench2/ties"]
    assert entry["good"]["difference"]["mean"] == pytest.approx(entry["good"]["mean"] - entry["bad"]["mean"])
    assert 0 < entry["good"]["difference"]["low"] < entry["good"]["difference"]["high"]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([made.rewardbench1("hep-go")], "no pairs of Chat, Chat Hard, Safety, so there is no score"),
        (
            [made.rewardbench1(next(iter(of))) for of in rewardbench1.SECTIONS.values()],
            "4 pairs, and the official file has 2,985",
        ),
        (
            [made.rewardbench2("Math", "0")],
            "no prompts of Factuality, Precise IF, Safety, Focus, Ties, so there is no score",
        ),
        ([made.rmbench("chat")], "no prompts of math, code, safety, so there is no score"),
        ([made.judgebench("A>B")], "1 pairs, and the official files have 350 and 270"),
    ],
)
def test_what_is_not_the_whole_benchmark_is_told(tmp_path: Path, rows: list[made.Row], why: str) -> None:
    bench, items = made.read(tmp_path / "f.jsonl", rows)
    assert bench.incomplete(items) == why
    whole = [made.rmbench(domain) for domain in rmbench.DOMAINS]
    assert rmbench.incomplete(made.read(tmp_path / "f.jsonl", whole)[1]) is None


def test_an_item_has_every_pair_of_a_right_and_a_wrong_answer() -> None:
    item = rewardbench2.item(made.rewardbench2("Ties", "tied:1", 2, 2), Origin("f", 1))
    assert item.pairs == [(0, 2), (0, 3), (1, 2), (1, 3)]


def means_of(folder: Path, rows: list[made.Row], scores: list[Any]) -> dict[str, float]:
    """By the metrics' last names."""
    return {name.partition("/")[2]: value for name, value in made.means(folder / "f.jsonl", rows, scores).items()}
