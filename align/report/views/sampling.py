"""What the report shows of stages that make prompts and preferences from a policy's samples."""

from __future__ import annotations

from collections.abc import Iterator

from align.report.estimates import Change, ReportedNumber
from align.report.views.view import Bars, Measure, View
from align.runs.record import StageRecord
from align.runs.values import count, number, rows


class SelectPromptsView(View):
    """How many prompts were kept."""

    measures = (Measure("kept", "prompts, given and kept", before="prompts", is_share=True),)
    all_numbers = False


class LabelView(View):
    """How many preferences were made, and how often the longer answer is the chosen one."""

    measures = (Measure("preferences", "prompts in, preferences out", before="prompts", comparable=False),)
    all_numbers = False

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """See :meth:`View.changes`."""
        yield from super().changes(stage)
        pairs, longer = count(stage.report, "pairs"), number(stage.report, "longer_chosen")
        if pairs and longer is not None:
            words, note = "share of pairs whose longer answer is chosen", f"{pairs:,} pairs"
            yield Change.between(stage.name, words, None, ReportedNumber(longer / pairs), note=note)


class SelfContrastView(View):
    """How many preferences were made, and how similar the rejected answers are to the data's answers."""

    measures = (Measure("kept", "prompts in, preferences out", before="prompts", comparable=False),)
    all_numbers = False

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """See :meth:`View.changes`."""
        yield from super().changes(stage)
        before, after = number(stage.report, "similarity"), ReportedNumber.of(stage.report, "similarity_of_negatives")
        samples = f"{count(stage.report, 'samples'):,} samples"
        note = f"{samples}; before: all of them, after: those taken as rejected answers"
        yield Change.between(stage.name, "similarity of samples to the target", before, after, note=note)

    def bars(self, stage: StageRecord) -> Iterator[Bars]:
        """How similar the samples are to their targets."""
        made = [
            (
                f"{number(row, 'from') or 0:.3f} to {number(row, 'to') or 0:.3f}",
                [float(count(row, "negatives")), float(max(0, count(row, "samples") - count(row, "negatives")))],
                f"{count(row, 'samples'):,}, {count(row, 'negatives'):,} taken",
            )
            for row in rows(stage.report, "histogram")
        ]
        series = [("taken as rejected answers", 1), ("other samples", 0)]
        yield Bars("Similarity of samples to the target", made, series)
