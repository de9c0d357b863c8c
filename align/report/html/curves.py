"""Which curves a stage is shown with, by what it wrote into ``metrics.jsonl`` and ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence

from align.report.html.charts import BarChart, Line, LineChart, bar_chart, line_chart
from align.runs.record import StageRecord
from align.runs.values import count, mapping, number, percent, rows, short

Panel = tuple[str, str, tuple[tuple[str, str], ...]]
"""Title, unit, and (metric, label) of each line; what was measured on held-out data under the same name is drawn with
it."""

_OPTIMISER: tuple[Panel, ...] = (
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
    ("Learning rate", "", (("learning_rate", "learning rate"),)),
    ("Speed", "tokens per second", (("tokens_per_second", "tokens/s"),)),
)
_LOSS: Panel = ("Loss", "", (("loss", "loss"),))
_PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (_LOSS,),
    "dpo": (
        _LOSS,
        ("Log-probs of answers", "nats", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
        (
            "Implicit rewards",
            "",
            (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin")),
        ),
        ("Accuracy", "share of pairs ranked right", (("rewards/accuracies", "accuracy"),)),
    ),
    "reward": (
        _LOSS,
        ("Accuracy", "share of pairs ranked right", (("accuracy", "accuracy"),)),
        ("Scores", "", (("scores/chosen", "chosen"), ("scores/rejected", "rejected"), ("margin", "margin"))),
        ("Spread of scores", "", (("scores/mean", "mean"), ("scores/std", "standard deviation"))),
    ),
    "ppo": (
        (
            "Reward",
            "sampled answers",
            (("rollout/reward", "reward"), ("rollout/score", "score"), ("rollout/baseline", "baseline")),
        ),
        ("Reward on held-out prompts", "greedy answers", (("reward", "reward"),)),
        (
            "KL",
            "nats per token",
            (("rollout/kl", "from the reference"), ("kl_from_old", "from the policy that sampled")),
        ),
        ("Clip fraction", "share of tokens", (("clip_fraction", "policy"), ("value_clip_fraction", "value model"))),
        ("Entropy", "nats per token", (("rollout/entropy", "entropy"),)),
        (
            "Explained variance",
            "of the returns, by the value model",
            (("rollout/explained_variance", "explained variance"),),
        ),
        ("Loss on conversations", "nats per token", (("sft_loss", "SFT loss"),)),
        ("Length of answers", "tokens", (("rollout/length", "sampled"), ("length", "length"))),
        ("Answers that end", "share", (("rollout/finished", "sampled"), ("finished", "finished"))),
        ("Engine and trainer apart", "nats per token", (("rollout/mismatch", "mean"),)),
        ("Losses", "", (("loss/policy", "policy"), ("loss/value", "value model"))),
    ),
}
_NOT_DRAWN = {"step", "tokens", "step_seconds", "grad_norm", "learning_rate", "tokens_per_second"}
_MOST = 16
"""Panels of a kind that is not known here: one for each metric, up to this many."""


def curves(stage: StageRecord) -> list[LineChart]:
    """What a stage is about."""
    return _charts(stage, _PANELS.get(stage.kind, _of_unknown(stage)))


def optimiser_curves(stage: StageRecord) -> list[LineChart]:
    """What is looked at when something is wrong."""
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


def _of_unknown(stage: StageRecord) -> tuple[Panel, ...]:
    names = {
        key.removeprefix("eval/"): None
        for row in stage.metrics
        for key in row
        if key not in _NOT_DRAWN and number(row, key) is not None
    }
    return tuple((name, "", ((name, name),)) for name in names)[:_MOST]


def bars(stage: StageRecord) -> list[BarChart]:
    """Where the time of PPO went; how similar the samples of Self-Contrast are to their targets; how a reward model is
    calibrated."""
    found = []
    if phases := {
        name: value
        for name in mapping(stage.report, "phase_seconds")
        if (value := number(stage.report, "phase_seconds", name))
    }:
        total = sum(phases.values())
        made = [(name, [value], f"{value:,.1f} s, {percent(value, total)}") for name, value in phases.items()]
        found.append(bar_chart("Time by phase", made, [("seconds", 0)]))
    if stage.kind == "self_contrast" and (bins := rows(stage.report, "histogram")):
        made = [
            (
                f"{number(row, 'from') or 0:.3f} to {number(row, 'to') or 0:.3f}",
                [float(count(row, "negatives")), float(max(0, count(row, "samples") - count(row, "negatives")))],
                f"{count(row, 'samples'):,}, {count(row, 'negatives'):,} taken",
            )
            for row in bins
        ]
        series = [("taken as rejected answers", 1), ("other samples", 0)]
        found.append(bar_chart("Similarity of samples to the target", made, series))
    if calibration := rows(stage.report, "held_out", "natural", "calibration"):
        made = [
            (
                f"{number(row, 'from') or 0:.1f} to {number(row, 'to') or 0:.1f}",
                [float(number(row, "right") or 0)],
                f"{short(number(row, 'right'))}, predicted {short(number(row, 'predicted'))}",
            )
            for row in calibration
        ]
        found.append(
            bar_chart(
                "How often the preferred answer wins, by its predicted probability",
                made,
                [("share that wins", 0)],
                label_width=80,
            )
        )
    return [chart for chart in found if chart is not None]
