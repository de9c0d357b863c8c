"""What the report shows of preference optimisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from align.functional.both_fell import both_fell
from align.functional.intervals import wilson
from align.report.estimates import Change, ReportedNumber
from align.report.views.view import KNOWN, LOSS, Panel, View
from align.runs.record import StageRecord
from align.runs.values import mapping, number


class DpoView(View):
    """How often pairs are ranked right, by what margin, and how the answers' log-probs changed."""

    measures = tuple(
        KNOWN[key] for key in ("rewards/accuracies", "rewards/margins", "loss", "logps/chosen", "logps/rejected")
    )
    panels = (
        LOSS,
        Panel("Log-probs of answers", "nats", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
        Panel(
            "Implicit rewards",
            "",
            (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin")),
        ),
        Panel("Accuracy", "share of pairs ranked right", (("rewards/accuracies", "accuracy"),)),
    )
    held_out_key = "eval_data"
    all_numbers = False

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """See :meth:`View.changes`. An accuracy has Wilson's interval, and is compared with guessing."""
        for key, change in self.measured(stage):
            accuracy = change.after if change is not None and key == "rewards/accuracies" else None
            if change is not None and accuracy is not None and change.items and 0 <= accuracy.value <= 1:
                bounds = wilson(accuracy.value, change.items) if change.items > 1 else (None, None)
                note = f"{change.items:,} prompts; guessing gives 0.5"
                change = replace(change, after=ReportedNumber(accuracy.value, *bounds), chance=0.5, note=note)
            yield change

    def notes(self, stage: StageRecord) -> Iterator[str]:
        """The stage's warning that both answers became less likely, for results of versions that did not save it."""
        before, after = (_numbers(mapping(stage.report, when)) for when in ("eval_before", "eval_after"))
        if words := both_fell(before, after):
            yield words


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name in metrics if (value := number(metrics, name)) is not None}
