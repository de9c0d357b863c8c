"""How a kind of stage is shown: its measures, curves, bar charts, and the sentence about how a model was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.errors import InputError
from align.functional.intervals import ANY, SHARE, Direction, Range
from align.pipeline.artifacts import Identity
from align.recipe.reference_syntax import registered
from align.recipe.schema import type_of
from align.report.estimates import Change, ReportedNumber
from align.runs.record import StageRecord
from align.runs.values import count, in_order, mapping, number, percent, text


@dataclass(frozen=True)
class Measure:
    """A number that tells how a stage went."""

    key: str
    """Its name among the held-out metrics that the stage reported before and after training (`eval_before`,
    `eval_after`); with `before` its name in the report."""
    words: str
    """Its name in tables."""
    better: Direction | None = None
    """Which way is better; None for what is neither good nor bad."""
    unit: str = ""
    within: Range = ANY
    """The smallest and the largest value that it can have."""
    before: str | None = None
    """None for a held-out metric. For a number of `report.json` or of the stage's summary: the name of the number that
    it is compared with (for the number of kept rows, that of all rows), or empty if it is compared with none."""
    is_share: bool = False
    """It is a part of the number that it is compared with, so the report shows it as a share."""
    comparable: bool = True
    """It has the same unit as the number that it is compared with, so that a difference makes sense."""

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.words}, {self.unit}" if self.unit else self.words


class Panel(NamedTuple):
    """A chart of curves over the steps."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    """(metric, label) of each line; the held-out metric of the same name is drawn with it."""


@dataclass(frozen=True)
class Bars:
    """A chart of bars."""

    title: str
    rows: Sequence[tuple[str, Sequence[float], str]]
    """(label, lengths of the parts, value as text) of each bar."""
    series: Sequence[tuple[str, int]]
    """(name, colour) of each part."""
    label_width: int = 120


LOSS = Panel("Loss", "", (("loss", "loss"),))
HELD_OUT_LOSS = Measure("loss", "held-out loss", "down")
HELD_OUT_REWARD = Measure("reward", "reward on held-out prompts", "up")
_OFTEN_REPORTED = (
    HELD_OUT_REWARD,
    HELD_OUT_LOSS,
    Measure("rewards/accuracies", "held-out accuracy", "up", within=SHARE),
    Measure("rewards/margins", "held-out margin of implicit rewards", "up"),
    Measure("logps/chosen", "log-prob of held-out chosen answers", "up", "nats"),
    Measure("logps/rejected", "log-prob of held-out rejected answers", None, "nats"),
    Measure("accuracy", "held-out accuracy", "up", within=SHARE),
    Measure("margin", "held-out margin of scores", "up"),
    Measure("sft_loss", "loss on held-out conversations", "down"),
    Measure("finished", "share of held-out answers that end", "up", within=SHARE),
    Measure("length", "length of held-out answers", None, "tokens"),
)
"""Names in tables of metrics that trainers of several kinds report."""
KNOWN = {measure.key: measure for measure in _OFTEN_REPORTED}
_NOT_DRAWN = {"step", "tokens", "step_seconds", "grad_norm", "learning_rate", "tokens_per_second"}
_MOST_PANELS = 16
"""Up to this many panels, one for each metric, are shown for a kind that names none."""


class View:
    """What the report shows of a kind of stage. This base class shows every number that a stage reported; a kind that
    says more about its numbers has a subclass, which :attr:`Stage.view` names."""

    measures: Sequence[Measure] = ()
    """The measures, the most important one (the headline) first. Empty: all held-out metrics."""
    panels: Sequence[Panel] = ()
    """The charts of curves. Empty: one for each metric."""
    held_out_key: str = ""
    """The recipe key for held-out data, whose absence the report warns about. Empty if the kind has no such key."""
    best: str = "lowest held-out loss"
    """What was best at the report's `best_step`."""
    compares: bool = False
    """Does a stage of this kind measure several policies by the same measures?"""
    all_numbers: bool = True
    """Does the report list all numbers of the stage's summary, or only those that most kinds have?"""

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """The measures of a stage that has a result, before and after it, the most important one first; None in place
        of a measure without a number."""
        for _, change in self.measured(stage):
            yield change

    def measured(self, stage: StageRecord) -> Iterator[tuple[str, Change | None]]:
        """:attr:`measures` by their keys."""
        before, after = mapping(stage.report, "eval_before"), mapping(stage.report, "eval_after")
        others = [KNOWN.get(key, Measure(key, f"held-out {key}")) for key in in_order(after, tuple(KNOWN))]
        for measure in self.measures or others:
            if measure.before is not None:
                yield measure.key, _of_report(stage, measure)
                continue
            yield (
                measure.key,
                Change.between(
                    stage.name,
                    measure.title,
                    number(before, measure.key),
                    ReportedNumber.of(after, measure.key),
                    better=measure.better,
                    within=measure.within,
                    **circumstances(stage),
                ),
            )

    def headlines(self, found: Sequence[Change]) -> Sequence[Change]:
        """The most important changes, for lists, comparisons and model cards."""
        return of_the_first_measure(found) if self.compares else found[:2]

    def panels_of(self, stage: StageRecord) -> Sequence[Panel]:
        """The curves of one stage."""
        if self.panels:
            return self.panels
        names = {
            key.removeprefix("eval/"): None
            for row in stage.metrics
            for key in row
            if key not in _NOT_DRAWN and number(row, key) is not None
        }
        return tuple(Panel(name, "", ((name, name),)) for name in names)[:_MOST_PANELS]

    def bars(self, stage: StageRecord) -> Iterator[Bars]:
        """Bar charts of numbers that are not measured at every step."""
        yield from ()

    def notes(self, stage: StageRecord) -> Iterator[str]:
        """Warnings of this kind of stage, besides those that all kinds can have."""
        yield from ()

    def made_by(self, identity: Identity) -> str:
        """How a model card says what made the model: the words after `made by`."""
        return type_of(identity.kind).words or identity.kind

    def card(self, stage: StageRecord) -> Iterator[tuple[str, str]]:
        """(title, Markdown) of sections of a model card that only this kind has."""
        yield from ()


def _of_report(stage: StageRecord, measure: Measure) -> Change | None:
    before, after = number(stage.report, measure.before or ""), ReportedNumber.of(stage.report, measure.key)
    if measure.comparable and not measure.is_share:
        return Change.between(stage.name, measure.title, before, after, better=measure.better, within=measure.within)
    if before is None or after is None:
        return None
    note = f"{percent(after.value, before)} of them" if measure.is_share else ""
    return Change(stage.name, measure.title, ReportedNumber(before), after, better=measure.better, note=note)


def circumstances(stage: StageRecord) -> dict[str, Any]:
    """Arguments of :class:`Change` about a stage's held-out numbers: how many prompts, whether they were trained on,
    and the precision."""
    train = mapping(stage.manifest.identity.config, "train") if stage.manifest is not None else {}
    return {
        "items": count(stage.report, "held_out_data", "trees") or None,
        "trained": count(stage.report, "held_out_leaked") > 0,
        "dtype": "bf16" if "bf16" in (text(train, "dtype"), text(train, "autocast")) else "fp32",
    }


def of_the_first_measure(changes: Sequence[Change]) -> list[Change]:
    """The changes of the most important measure: one for each policy if a stage compares several."""
    return [change for change in changes if change.measure == changes[0].measure]


def view_of(kind: str) -> View:
    """The view of a kind. If a third party's cannot be imported, it is the base class, which shows every number."""
    try:
        view = registered(type_of(kind).view)
    except InputError:
        return View()
    return view() if isinstance(view, type) and issubclass(view, View) else View()
