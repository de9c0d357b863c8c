"""What the report shows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from align.errors import InputError
from align.evaluation.metrics import METRICS
from align.evaluation.tasks.task import measures_of
from align.functional.intervals import ANY, SHARE, Direction
from align.report.estimates import Change, ReportedNumber
from align.report.trained import trained_on, trained_on_bench
from align.report.views.view import View
from align.runs.record import StageRecord
from align.runs.values import count, in_order, mapping, number, short, text, texts

_ORDER = (
    *("margin", "similarity", "loss", "target_logprob", "unfinished", "mixed_languages"),
    *("length", "distinct_1", "distinct_2"),
)
"""Order of the measures that every evaluation has. Those that the recipe asks for (benchmarks, scorers, judges) come
before them."""


def _better(name: str) -> Direction | None:
    """Whether a higher or a lower value of a metric is better. Tasks and held-out metrics say it of their own; for
    scorers, judges and reward benchmarks it is the higher one. None for win rates, which are compared with chance, and
    for the metrics of a task that cannot be imported here."""
    if name in METRICS:
        return METRICS[name].better
    task, _, key = name.partition("/")
    try:
        measures = measures_of(task)
    except InputError:
        return None
    if measures:
        return next((measure.better for measure in measures if measure.key == key), None)
    return None if "win_rate" in name else "up"


class EvaluateView(View):
    """Every measure of every policy, compared with that of the first policy: first those that the recipe asks for
    (benchmarks, scorers, judges), then those that every evaluation has."""

    compares = True
    all_numbers = False

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """See :meth:`View.changes`."""
        metrics, scorers = mapping(stage.report, "metrics"), texts(stage.report, "scorers")
        on_data, on_benches = trained_on(stage), trained_on_bench(stage)
        order, control = [*texts(stage.report, "policies"), *scorers], text(stage.report, "control")
        measured = in_order(metrics, texts(stage.report, "measures"))
        for name in sorted(measured, key=lambda name: name in _ORDER and _ORDER.index(name) + 1):
            policies = metrics[name]
            words = text(stage.report, "words", name) or name
            of_bench = name.partition("/")[0] in mapping(stage.report, "benches")
            baseline = next(iter(scorers), "") if of_bench else text(stage.report, "baseline")
            trained = on_benches if of_bench else on_data
            chance = 0.5 if "win_rate" in name else None
            before = ReportedNumber.of(policies, baseline, name="mean")
            others = in_order((policy for policy in mapping(policies) if policy not in (baseline, control)), order)
            known = number(policies, control, "mean") if of_bench else None
            beside = "" if known is None else f"{control}: {short(round(known, 3))}"
            if not others:
                yield Change.between(stage.name, words, None, before, subject=baseline, note=beside)
            for policy in others:
                after = ReportedNumber.of(policies, policy, name="mean")
                difference = ReportedNumber.of(policies, policy, "difference", name="mean")
                note = "; ".join(part for part in (f"before: {baseline}" if before else "", beside) if part)
                if after is not None:
                    items = None if number(policies, policy, "count") is None else count(policies, policy, "count")
                    within = SHARE if chance is not None else ANY
                    seen = trained or count(stage.report, "benches", name.partition("/")[0], "trained_on", policy) > 0
                    yield Change(
                        stage.name,
                        words,
                        before,
                        after,
                        difference,
                        _better(name),
                        chance,
                        policy,
                        note,
                        items,
                        seen,
                        within=within,
                    )
