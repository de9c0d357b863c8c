"""The measures of a stage before and after it, as the view of its kind defines them."""

from __future__ import annotations

from align.report.estimates import Change
from align.report.views.view import view_of
from align.runs.record import StageRecord
from align.runs.values import number, short
from align.terminal import byte_size


def changes(stage: StageRecord) -> list[Change]:
    """The measures of a stage that has a result, the most important one first."""
    if stage.manifest is None and not stage.report:
        return []
    return [change for change in view_of(stage.kind).changes(stage) if change is not None]


def headlines(stage: StageRecord) -> list[Change]:
    """The most important measures, for lists, comparisons and model cards: one measure of every policy for an
    evaluation, the first two for other stages."""
    return list(view_of(stage.kind).headlines(changes(stage)))


def facts(stage: StageRecord) -> list[tuple[str, str]]:
    """Time, size and other facts about a stage, as (word, value); with all plain numbers of its summary if its view
    asks for them."""
    report, view = stage.report, view_of(stage.kind)
    found: list[tuple[str, str]] = []
    for key, words in (
        ("steps", "steps"),
        ("iterations", "iterations"),
        ("tokens", "tokens"),
        ("tokens_per_second", "tokens/s"),
    ):
        if (value := number(report, key)) is not None:
            found.append((words, short(round(value, 1))))
    if (memory := number(report, "peak_memory_bytes")) is not None:
        found.append(("peak memory", byte_size(memory)))
    if (trained := number(report, "trainable_parameters")) is not None:
        whole = number(report, "parameters")
        found.append(
            (
                "trained parameters",
                f"all {short(trained)}" if trained == whole else f"{short(trained)} of {short(whole)}",
            )
        )
    if best := number(report, "best_step"):
        found.append((view.best, f"after step {short(best)}"))
    if view.all_numbers:
        known = {
            "steps",
            "iterations",
            "tokens",
            "tokens_per_second",
            "peak_memory_bytes",
            "trainable_parameters",
            "best_step",
        }
        found += [
            (key, short(value))
            for key in stage.summary
            if key not in known and (value := number(stage.summary, key)) is not None
        ]
    return found
