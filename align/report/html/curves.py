"""The charts of a stage: those that its view names, drawn from ``metrics.jsonl`` and ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence

from align.report.html.charts import BarChart, Line, LineChart, bar_chart, line_chart
from align.report.views.view import Panel, view_of
from align.runs.record import StageRecord
from align.runs.values import number

_OPTIMISER: tuple[Panel, ...] = (
    Panel("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
    Panel("Learning rate", "", (("learning_rate", "learning rate"),)),
    Panel("Speed", "tokens per second", (("tokens_per_second", "tokens/s"),)),
)


def curves(stage: StageRecord) -> list[LineChart]:
    """The charts that the view of the stage's kind names."""
    return _charts(stage, view_of(stage.kind).panels_of(stage))


def optimiser_curves(stage: StageRecord) -> list[LineChart]:
    """Charts of the optimiser, to look at when something is wrong."""
    return _charts(stage, _OPTIMISER)


def _charts(stage: StageRecord, panels: Sequence[Panel]) -> list[LineChart]:
    charts = [line_chart(title, _lines(stage, wanted), unit) for title, unit, wanted in panels]
    return [chart for chart in charts if chart is not None]


def _lines(stage: StageRecord, wanted: Sequence[tuple[str, str]]) -> list[Line]:
    lines = []
    for color, (metric, label) in enumerate(wanted):
        for key, prefix, marked in ((metric, "", False), (f"eval/{metric}", "held-out ", True)):
            points = [(float(row["step"]), value) for row in stage.metrics if (value := number(row, key)) is not None]
            lines.append(Line(f"{prefix}{label}", points, color, marked))
    return lines


def bars(stage: StageRecord) -> list[BarChart]:
    """Bar charts of numbers that are not measured at every step."""
    charts = [
        bar_chart(made.title, made.rows, made.series, label_width=made.label_width)
        for made in view_of(stage.kind).bars(stage)
    ]
    return [chart for chart in charts if chart is not None]
