"""What became of a stage's data: rows read, kept, and left out with the reasons; lengths; and how lengths differ
between chosen and rejected answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.runs.record import StageRecord
from align.runs.values import at, count, jsonl, mapping, number, percent, rows, short, text, texts
from align.terminal import counted

_PLACES = 5
"""Number of example places shown for each reason."""
_COLUMNS = 4
"""Sources in a table of what they hold."""
_LINES = 20_000
"""Number of lines of ``left_out.jsonl`` that are read to find such places."""

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    headers: Row
    rows: tuple[Row, ...]
    numbers: tuple[int, ...] = ()
    """Columns that hold numbers."""


@dataclass(frozen=True)
class Audit:
    """What became of the data of one stage."""

    stage: str
    lines: tuple[str, ...]
    tables: tuple[Table, ...]


def audit(stage: StageRecord) -> Audit | None:
    """The account of a stage's data; None when the stage reported none."""
    report = stage.report
    parts = [("", mapping(report, "data")), ("held out: ", mapping(report, "held_out_data"))]
    lines = [f"{prefix}{line}" for prefix, data in parts if (line := _sums(data))]
    lines += _own_lines(report)
    if (shared := number(report, "held_out_leaked")) is not None:
        held_out = count(report, "held_out_data", "trees")
        lines.append(f"held-out rows whose prompt is trained on, too: {shared:,.0f} of {held_out:,}")
    sources = tuple(row for prefix, data in parts for row in _sources(prefix, data))
    left_out = tuple(row for prefix, data in parts for row in _left_out(prefix, data)) + tuple(_left_out_prompts(stage))
    noted = tuple(row for prefix, data in parts for row in _counted(prefix, mapping(data, "noted")))
    tables = [
        Table(
            "Sources",
            ("source", "format", "rows read", "kept", "not asked for", "bad", "dropped", "in the mixture"),
            sources,
            (2, 3, 4, 5, 6, 7),
        ),
        Table("Left out", ("reason", "rows", "where"), left_out, (1,)),
        Table("Kept, but", ("what", "rows", "where"), noted, (1,)),
        *_described(parts),
        Table("Lengths, tokens", ("", "chosen", "rejected"), tuple(_lengths(report)), (1, 2)),
        Table("Samples", ("what became of them", "samples", "share"), tuple(_samples(report)), (1, 2)),
        Table(
            "Pairs by difference in length",
            ("tokens", "longer wins", "shorter wins", "equal", "used in an epoch", "left out"),
            tuple(_buckets(report)),
            (1, 2, 3, 4, 5),
        ),
    ]
    tables = [table for table in tables if table.rows]
    return Audit(stage.name, tuple(lines), tuple(tables)) if lines or tables else None


def dropped(data: Mapping[str, Any]) -> int:
    """Number of records of a data report that were left out although the recipe did not ask for it: those that
    ``where`` leaves out do not count."""
    bad = sum(count(source, "bad") + count(source, "dropped") for source in rows(data, "sources", "sources"))
    return bad + sum(count(data, "dropped", reason, "total") for reason in mapping(data, "dropped"))


def _sums(data: Mapping[str, Any]) -> str:
    trees = count(data, "trees")
    if not trees:
        return ""
    tokens, targets = count(data, "tokens"), count(data, "targets")
    trained = f", {targets:,} of them trained" if targets else ""
    longest = count(data, "longest")
    return (
        f"{counted(trees, text(data, 'want') or 'row')}, {tokens:,} tokens{trained}; mean {tokens / trees:,.0f},"
        f" longest {longest:,}"
    )


def _own_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines about stages that sample: answers, scores, and how many texts the embedder cut."""
    if answers := mapping(report, "answers"):
        named = [(key.replace("_", " "), number(answers, key)) for key in answers if key != "answers"]
        shown = ", ".join(f"{name} {short(value)}" for name, value in named if value is not None)
        yield f"{count(answers, 'answers'):,} answers: {shown}"
    for key, words in (
        ("scores", "scores"),
        ("margins", "margins"),
        ("reward_std", "standard deviation of a prompt's scores"),
    ):
        if "median" in (spread := mapping(report, key)):
            yield f"{words}: " + ", ".join(f"{name} {short(number(spread, name))}" for name in spread)
    if (correlation := number(report, "length_correlation")) is not None:
        yield f"correlation of score and length: {short(correlation)}"
    if (longer := number(report, "longer_chosen")) is not None and (pairs := count(report, "pairs")):
        shorter = count(report, "shorter_chosen")
        yield f"the longer answer is chosen in {longer:,.0f} of {pairs:,} pairs, the shorter in {shorter:,}"
    cut = number(report, "texts_cut_by_embedder")
    if cut is not None:
        limit = number(report, "embedding", "max_tokens") or number(report, "embedder_max_tokens")
        yield f"texts cut by the embedder{f' at {short(limit)} of its tokens' if limit else ''}: {percent(cut)}"


def _sources(prefix: str, data: Mapping[str, Any]) -> Iterator[Row]:
    for source in rows(data, "sources", "sources"):
        counts = [f"{count(source, key):,}" for key in ("read", "kept", "left_out", "bad", "dropped")]
        share = percent(number(source, "share") or 0.0)
        yield (
            f"{prefix}{text(source, 'path')}",
            text(source, "format"),
            *counts,
            f"{count(source, 'given'):,} ({share})",
        )


def _described(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Table]:
    """What the records of each source hold, a column for each; some at a time, so that they can be read."""
    found = [
        (f"{prefix}{text(one, 'source')}", mapping(one, "figures"))
        for prefix, data in parts
        for one in rows(data, "described")
    ]
    for first in range(0, len(found), _COLUMNS):
        shown = found[first : first + _COLUMNS]
        names = dict.fromkeys(name for _, figures in shown for name in figures)
        cells = tuple((name, *(text(figures, name) for _, figures in shown)) for name in names)
        yield Table("What was encoded", ("", *(source for source, _ in shown)), cells)


def _left_out(prefix: str, data: Mapping[str, Any]) -> Iterator[Row]:
    for source in rows(data, "sources", "sources"):
        if bad := count(source, "bad"):
            yield f"{prefix}bad row", f"{bad:,}", "; ".join(texts(source, "first_bad")[:_PLACES])
    yield from _counted(prefix, mapping(data, "dropped"))


def _counted(prefix: str, reasons: Mapping[str, Any]) -> Iterator[Row]:
    for reason, found in reasons.items():
        total = count(found, "total")
        yield f"{prefix}{reason}", f"{total:,}", _places(texts(found, "first"), total)


def _places(first: Sequence[str], total: int) -> str:
    shown = list(first[:_PLACES])
    return ", ".join([*shown, "..."] if shown and total > len(shown) else shown)


def _left_out_prompts(stage: StageRecord) -> Iterator[Row]:
    """Rows about stages that choose prompts; the example places are in ``left_out.jsonl``."""
    reasons = mapping(stage.report, "left_out")
    places: dict[str, list[str]] = {}
    for row in jsonl(stage.folder / "left_out.jsonl", _LINES) if reasons else ():
        examples = places.setdefault(text(row, "reason"), [])
        if len(examples) < _PLACES:
            examples.append(text(row, "row"))
    for reason in reasons:
        yield reason, f"{count(reasons, reason):,}", _places(places.get(reason, []), count(reasons, reason))


def _lengths(report: Mapping[str, Any]) -> Iterator[Row]:
    chosen, rejected = number(report, "chosen_tokens"), number(report, "rejected_tokens")
    if chosen is not None:
        yield "mean", short(chosen), short(rejected)
    chosen, rejected = (number(report, "eval_before", f"length/{side}") for side in ("chosen", "rejected"))
    if chosen is not None:
        yield "held out, mean", short(round(chosen, 1)), short(None if rejected is None else round(rejected, 1))


_DROP_REASONS = {
    "empty": "empty",
    "unfinished": "unfinished",
    "target": "copies of the target",
    "duplicate": "copies of another sample",
    "filtered": "too similar to the target",
    "not drawn": "not drawn",
    "negative": "taken as rejected answers",
    "repeated": "say what an earlier one says",
}


def _samples(report: Mapping[str, Any]) -> Iterator[Row]:
    reasons = mapping(report, "samples_by_reason")
    total = count(report, "samples")
    if not reasons:
        reasons, total = mapping(report, "answers_left_out"), count(report, "answers", "answers")
    for reason in reasons:
        yield _DROP_REASONS.get(reason, reason), f"{count(reasons, reason):,}", percent(count(reasons, reason), total)


def _buckets(report: Mapping[str, Any]) -> Iterator[Row]:
    for row in rows(report, "length_balance"):
        keys = ("longer_wins", "shorter_wins", "equal", "used", "left_out")
        yield (str(at(row, "tokens")), *(f"{count(row, key):,}" for key in keys))
