"""Warnings for the reader of a report: those that the stages gave, and those that follow from the numbers of the
run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from align.data.answer_file import said
from align.functional.intervals import ENOUGH
from align.functional.intervals import correlation as interval_of
from align.report.data_account import dropped
from align.report.estimates import ReportedNumber
from align.report.measures import changes
from align.report.verdicts import BELOW, UNSHOWN, WITHIN
from align.report.views.view import view_of
from align.runs.record import StageRecord
from align.runs.samples import before_and_after
from align.runs.values import at, clipped, count, mapping, number, percent, rows, short, text

MANY_DROPPED = 0.05
"""A warning is given when at least this share of rows was left out although the recipe did not ask for it."""
UNFINISHED = 0.2
"""Share of unfinished answers from which a warning is given."""
CORRELATED = 0.3
"""Correlation of score and length from which a warning is given."""
CUT = 0.1
"""Share of texts cut by the embedder from which a warning is given."""
_OWN_LENGTH = 2_000
"""Number of characters of a stage's own warning that are shown."""
_LONG = 100
"""Only answers with at least this many characters are checked for repetition."""


@dataclass(frozen=True)
class Note:
    """One warning."""

    stage: str
    text: str


def notes(stage: StageRecord) -> list[Note]:
    """All warnings about a stage, its own first; each text once."""
    warnings = dict.fromkeys(clipped(warning, _OWN_LENGTH) for warning in stage.warnings)
    for check in _CHECKS:
        warnings |= dict.fromkeys(check(stage))
    return [Note(stage.name, words) for words in warnings]


def _state(stage: StageRecord) -> Iterator[str]:
    last = stage.events[-1] if stage.events else {}
    if stage.state in ("failed", "interrupted"):
        yield f"{stage.state}: {clipped(text(last, 'error'), 500) or 'the history does not say why'}"
    if stage.state == "running":
        yield "it is running; the numbers are those so far"
    if stage.state == "killed":
        yield "it was killed; the same command goes on where it was"
    if stage.manifest is not None and stage.state != "finished":
        yield "the result shown here is of an earlier run, not of this recipe"
    if stage.manifest is None and stage.folder.is_dir():
        yield (
            "its manifest is damaged or missing, so nothing says whether the numbers shown here are those it wrote: see"
            " `align verify`"
        )


def _of_the_kind(stage: StageRecord) -> Iterator[str]:
    """The warnings of the view of its kind."""
    yield from view_of(stage.kind).notes(stage)


def _held_out(stage: StageRecord) -> Iterator[str]:
    """Warnings when there are no held-out data, or when the held-out numbers became worse."""
    report = stage.report
    key = view_of(stage.kind).held_out_key
    if key and report and not mapping(report, "eval_after"):
        yield f"no held-out data, so nothing here says whether it got better: name some as {key}"
    # The loss of a stage that learns from rewards does not tell how good it is.
    measure = "loss" if number(report, "eval_after", "reward") is None else "reward"
    sign = -1 if measure == "reward" else 1
    before, after = (
        None if (value := number(report, when, measure)) is None else sign * value
        for when in ("eval_before", "eval_after")
    )
    best, steps = number(report, "best_step"), number(report, "steps")
    if (
        best == 0
        and steps
        and stage.manifest
        and at(stage.manifest.identity.config, "train", "load_best_model") is True
    ):
        yield "no step lowered the held-out loss, so the model that was kept is the one that the stage started from"
    elif before is not None and after is not None and after > before:
        verb = "fell" if measure == "reward" else "rose"
        yield f"the held-out {measure} {verb} from {short(sign * before)} to {short(sign * after)}"
    elif best is not None and steps and best < steps and measure == "loss":
        lowest = [number(row, "eval/loss") for row in stage.metrics if row["step"] == best]
        if lowest and lowest[-1] is not None and after is not None and after > lowest[-1]:
            yield (
                f"the held-out loss was lowest after step {short(best)} ({short(lowest[-1])}) and {short(after)} at the"
                " end: later steps learned the training data; see load_best_model"
            )


def _certainty(stage: StageRecord) -> Iterator[str]:
    """Warnings about changes that may be chance."""
    measured, compares = changes(stage), view_of(stage.kind).compares
    for change in measured:
        if compares and change.measure != measured[0].measure:
            continue  # one warning for each policy, not for each metric
        if change.verdict in (WITHIN, BELOW) and change.after is not None:
            yield f"{change.title} is {change.verdict}: {change.cells[1]}, and guessing gives {change.chance:g}"
        if change.verdict == UNSHOWN:
            yield f"{change.title}: the change of {change.cells[2]} may be chance"
    prompts = [
        count(stage.report, "held_out", "natural", "prompts"),
        count(stage.report, "held_out_change", "prompts"),
        count(stage.report, "held_out_data", "trees"),
        count(stage.report, "prompts") if compares else 0,
    ]
    known = next((n for n in prompts if n), 0)
    if 0 < known < ENOUGH:
        yield f"its held-out numbers rest on {known} prompts only"


def _dropped(stage: StageRecord) -> Iterator[str]:
    for prefix, data in (
        ("", mapping(stage.report, "data")),
        ("held-out data: ", mapping(stage.report, "held_out_data")),
    ):
        given = sum(count(source, "read") - count(source, "left_out") for source in rows(data, "sources", "sources"))
        lost = dropped(data)
        if given and lost > MANY_DROPPED * given:
            reasons = [(count(data, "dropped", reason, "total"), reason) for reason in mapping(data, "dropped")]
            most, why = max(reasons, default=(0, ""))
            named = f", {most:,} of them: {why}" if most else ""
            yield f"{prefix}{lost:,} of {given:,} rows ({percent(lost, given)}) were left out{named}"


def _unfinished(stage: StageRecord) -> Iterator[str]:
    report = stage.report
    shares: list[tuple[str, float | None]] = [("of the sampled answers", number(report, "answers", "unfinished"))]
    if (finished := number(report, "eval_after", "finished")) is not None:
        shares.append(("of the held-out answers", 1 - finished))
    if total := count(report, "samples"):
        shares.append(("of the samples", count(report, "samples_by_reason", "unfinished") / total))
    for policy in mapping(report, "metrics", "unfinished"):
        shares.append((f"of the answers of {policy}", number(report, "metrics", "unfinished", policy, "mean")))
    for words, share in shares:
        if share is not None and share > UNFINISHED:
            yield f"{percent(share)} {words} do not end within max_new_tokens"


def _length(stage: StageRecord) -> Iterator[str]:
    """Warnings when the scores may follow length instead of quality."""
    correlation = ReportedNumber.of(stage.report, "held_out", "natural", "length_correlation") or ReportedNumber.of(
        stage.report, "length_correlation"
    )
    if correlation is not None and abs(correlation.value) > CORRELATED:
        low, high = correlation.low, correlation.high
        if low is None or high is None:  # the stage reports it without an interval
            low, high = interval_of(correlation.value, count(stage.report, "prompts")) or (-1.0, 1.0)
        sure = (low > 0) == (high > 0)
        more = "longer" if correlation.value > 0 else "shorter"
        if sure:
            yield f"the score goes with length (correlation {correlation.words(2)}): {more} answers score higher"
    accuracy = ReportedNumber.of(stage.report, "held_out", "natural", "accuracy")
    for key, words in (("accuracy_length", "length"), ("accuracy_words", "words")):
        baseline = ReportedNumber.of(stage.report, "held_out", "natural", key)
        if accuracy and baseline and accuracy.low is not None and accuracy.low <= baseline.value:
            yield f"the accuracy, {accuracy.words(3)}, is not clearly above that of {words} alone, {baseline.value:.3f}"


def _embedder(stage: StageRecord) -> Iterator[str]:
    cut = number(stage.report, "texts_cut_by_embedder")
    if cut is not None and cut > CUT:
        yield f"the embedder cut {percent(cut)} of the texts: similarities compare their beginnings only"


def _same_answers(stage: StageRecord) -> Iterator[str]:
    samples = list(before_and_after(stage))
    if samples and all(said(before) == said(after) for before, after in samples):
        yield (
            f"its greedy answers to {len(samples)} shown prompt{'s' if len(samples) != 1 else ''} are the same before"
            " and after"
        )


def _repeats(stage: StageRecord) -> Iterator[str]:
    after = [said(after) for _, after in before_and_after(stage)]
    repeating = sum(map(repeats, after))
    if repeating:
        yield (
            f"{repeating} of {len(after)} shown answers after it say{'s' if repeating == 1 else ''} the same over and"
            " over"
        )


def repeats(answer: str) -> bool:
    """Whether an answer mostly repeats itself: fewer than half of its sequences of eight characters are different.

    >>> repeats("a sight to the road, " * 10), repeats("a sight to the road")
    (True, False)
    """
    runs = [answer[i : i + 8] for i in range(len(answer) - 7)]
    return len(runs) >= _LONG and len(set(runs)) < 0.5 * len(runs)


_CHECKS: tuple[Callable[[StageRecord], Iterator[str]], ...] = (
    _state,
    _of_the_kind,
    _held_out,
    _certainty,
    _dropped,
    _unfinished,
    _length,
    _embedder,
    _same_answers,
    _repeats,
)
