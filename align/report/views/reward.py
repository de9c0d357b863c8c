"""What the report shows of a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from align.functional.intervals import DIFFERENCE, SHARE
from align.report.estimates import Change, ReportedNumber
from align.report.views.view import KNOWN, LOSS, Bars, Panel, View, circumstances
from align.runs.record import StageRecord
from align.runs.values import count, mapping, number, rows, short


class RewardView(View):
    """How often held-out pairs are ranked right, also on pairs balanced by length, and compared with the accuracy of
    length or words alone."""

    measures = tuple(KNOWN[key] for key in ("accuracy", "loss", "margin"))
    panels = (
        LOSS,
        Panel("Accuracy", "share of pairs ranked right", (("accuracy", "accuracy"),)),
        Panel("Scores", "", (("scores/chosen", "chosen"), ("scores/rejected", "rejected"), ("margin", "margin"))),
        Panel("Spread of scores", "", (("scores/mean", "mean"), ("scores/std", "standard deviation"))),
    )
    held_out_key = "eval_data"
    all_numbers = False

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """See :meth:`View.changes`."""
        held_out = mapping(stage.report, "held_out")
        for key, change in self.measured(stage):
            accuracy = ReportedNumber.of(held_out, "natural", "accuracy")
            if change and accuracy and key == "accuracy":
                difference = None if change.before is None else ReportedNumber(accuracy.value - change.before.value)
                note = _pairs(held_out, "natural")
                change = replace(change, after=accuracy, difference=difference, chance=0.5, note=note)
            yield change
        balanced = ReportedNumber.of(held_out, "length_balanced", "accuracy")
        words, note = "accuracy where length tells nothing", _pairs(held_out, "length_balanced")
        about = circumstances(stage) | {"items": count(held_out, "length_balanced", "prompts") or None, "within": SHARE}
        yield Change.between(stage.name, words, None, balanced, better="up", chance=0.5, note=note, **about)
        for key, words in (
            ("accuracy_longer_wins", "accuracy where the longer answer wins"),
            ("accuracy_shorter_wins", "accuracy where the shorter answer wins"),
            ("accuracy_length", "baseline: accuracy of length alone"),
            ("accuracy_words", "baseline: accuracy of words alone"),
            ("length_correlation", "correlation of score and length"),
            ("calibration_error", "calibration error"),
        ):
            within = DIFFERENCE if key == "length_correlation" else SHARE
            yield Change.between(stage.name, words, None, ReportedNumber.of(held_out, "natural", key), within=within)

    def bars(self, stage: StageRecord) -> Iterator[Bars]:
        """How the model is calibrated."""
        made = [
            (
                f"{number(row, 'from') or 0:.1f} to {number(row, 'to') or 0:.1f}",
                [float(number(row, "right") or 0)],
                f"{short(number(row, 'right'))}, predicted {short(number(row, 'predicted'))}",
            )
            for row in rows(stage.report, "held_out", "natural", "calibration")
        ]
        title = "How often the preferred answer wins, by its predicted probability"
        yield Bars(title, made, [("share that wins", 0)], label_width=80)


def _pairs(held_out: Mapping[str, Any], which: str) -> str:
    return (
        f"{count(held_out, which, 'pairs'):,} pairs of {count(held_out, which, 'prompts'):,} prompts; guessing"
        " gives 0.5"
    )
