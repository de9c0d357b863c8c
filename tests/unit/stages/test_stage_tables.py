"""What stages show of their results on a terminal: every number and every answer that they were given."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from align.data.answer_file import AnswerRow
from align.stages.ppo import report
from align.stages.reward import run
from align.stages.shared.training_run import before_and_after

BEFORE, AFTER = {"loss": 9.5, "reward": 0.25, "length": 11.5}, {"loss": 9.25, "reward": 0.75, "length": 12.5}
SAMPLES = [
    {"prompt": f"question {n}", "before": f"first answer {n} [bold]", "after": f"second answer {n}"} for n in (1, 2)
]


class Shown:
    """A stage's context as far as showing goes."""

    name = "here"

    def __init__(self) -> None:
        self.console = Console(file=io.StringIO(), width=200)

    def rows(self) -> list[list[str]]:
        """What was printed, line by line, as words and numbers that two spaces or a table's line part."""
        lines = self.console.file.getvalue().replace("│", "  ").replace("┃", "  ").splitlines()  # type: ignore[attr-defined]
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


ANSWERS = [
    AnswerRow("held-out", str(number), one["prompt"], "here", 0, one[when], 3, finished=True, version=version)
    for number, one in enumerate(SAMPLES)
    for version, when in enumerate(("before", "after"))
]


def test_before_and_after() -> None:
    """Numbers of both times, answers as they are; nothing at all where there is neither."""
    shown: Any = Shown()
    before_and_after(shown, BEFORE, {**AFTER, "only after": 1.0}, ANSWERS)
    rows = shown.rows()
    assert ["here: before and after"] in rows and ["before", "after"] in rows
    assert ["held-out loss", "9.5000", "9.2500"] in rows and ["held-out reward", "0.2500", "0.7500"] in rows
    assert ["held-out length", "11.5000", "12.5000"] in rows
    assert [[row[0], row[1], row[2]] for row in rows if row and row[0].startswith("question")] == [
        list(one.values()) for one in SAMPLES
    ]
    nothing: Any = Shown()
    before_and_after(nothing, None, None, ())
    assert nothing.rows() == []


def test_ppo() -> None:
    """The loss is minus the reward and not shown; the change with its interval, the counts, the time of every phase and
    the memory."""
    shown: Any = Shown()
    result = {
        "eval_before": BEFORE,
        "eval_after": AFTER,
        "held_out_change": {"prompts": 40, "mean": 0.5, "interval": [0.25, 0.75]},
        "iterations": 7,
        "steps": 28,
        "phase_seconds": {"generate": 10.0, "train": 30.0},
        "peak_memory_bytes": 3 * 2**30,
    }
    report._show(shown, result, ANSWERS)
    rows = shown.rows()
    assert ["held-out reward", "0.2500", "0.7500"] in rows and not any("held-out loss" in row for row in rows)
    assert sum(row[:1] == [one["prompt"]] for row in rows for one in SAMPLES) == 2
    said = shown.console.file.getvalue()
    assert "the reward on 40 held-out prompts changed by +0.5000 (95 % interval +0.2500 to +0.7500)" in said
    assert "7 iterations, 28 steps" in said and "generate 10.0 (25%), train 30.0 (75%), peak memory 3" in said
    few: Any = Shown()
    report._show(few, {**result, "held_out_change": {"prompts": 2, "mean": 0.5, "interval": [None, None]}}, ())
    assert "2 held-out prompts changed by +0.5000 (too few for an interval)" in few.console.file.getvalue()
    nothing: Any = Shown()
    report._show(nothing, {**result, "eval_before": None, "eval_after": None, "held_out_change": None}, ())
    assert [row for row in nothing.rows() if row] == [["here", said.splitlines()[-1].partition("  ")[2]]], (
        "the last line alone"
    )


def test_an_iterations_lines() -> None:
    """What the reward is made of where something was subtracted; the rest of what is known, and nothing of what is
    not."""
    summary = {
        "reward": 0.25,
        "score": 0.75,
        "baseline": 0.5,
        "kl": 0.0125,
        "length": 31.0,
        "finished": 0.5,
        "entropy": 1.25,
    }
    lap = {"generate": 3.0, "train": 1.0}
    first, second = report.iteration_lines(1, 4, summary, lap, 0.125, ())
    assert first.startswith(
        "iteration 2/4  reward 0.250 (score 0.750, baseline 0.500), KL 0.0125 nats/token, length 31, finished 50%, "
    )
    assert first.endswith("finished 50%, entropy 1.25, clipped 12.5%")
    assert second == "iteration 2/4  4.0 s: generate 3.0 (75%), train 1.0 (25%)"
    more = {
        **summary,
        "baseline": 0.0,
        "explained_variance": 0.5,
        "mismatch": 0.001,
        "mismatch_max": 0.02,
        "importance": 1.5,
    }
    first, second = report.iteration_lines(1, 4, more, lap, 0.0, (3.0, 2.0))
    assert "reward 0.250, KL" in first and first.endswith("values explain 0.50, SFT loss 2.000")
    assert second.endswith("engine's log-probs off by 0.001 nats (largest 0.02), importance ratio 1.5000")


def test_reward_buckets_and_held_out_numbers() -> None:
    shown: Any = Shown()
    buckets = [
        {"tokens": "0 to 7", "longer": 11, "shorter": 12, "equal": 13, "used": 14, "left": 15},
        {"tokens": "8 and more", "longer": 21, "shorter": 22, "equal": 23, "used": 24, "left": 25},
    ]
    run._show_buckets(shown, buckets)
    assert [row for row in shown.rows() if row and row[0] in ("0 to 7", "8 and more")] == [
        list(map(str, row.values())) for row in buckets
    ]
    estimates = {key: {"value": 0.1 + n / 100, "low": 0.1, "high": 0.9} for n, key in enumerate(run._ROWS)}
    held_out = {
        "natural": {"pairs": 30, **estimates},
        "length_balanced": {"pairs": 20, **estimates, "accuracy_words": None},
    }
    run._show_held_out(shown, held_out)
    rows = shown.rows()
    assert ["natural (30 pairs)", "length-balanced (20 pairs)"] in rows
    for n, (key, words) in enumerate(run._ROWS.items()):
        number = f"{0.1 + n / 100:.3f}"
        (row,) = [row for row in rows if row and row[0] == words.strip()]
        assert row[1] == number and row[2] == "(0.100 to 0.900)"
        assert row[3] == ("-" if key == "accuracy_words" else number)
