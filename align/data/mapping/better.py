"""Which answer is better: reading the scores of answers from a row, and making comparisons from scores."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from align.data.mapping.places import find, place
from align.data.messages.forms import verdict
from align.data.rows import LeftOut
from align.data.strict_json import RowError, clip, parse_text, type_name
from align.recipe.rows.mapping import At, Better

TIE = "a tie"
BOTH_BAD = "a tie: both answers are bad"
NOT_JUDGED = "nobody judged it"
NO_SCORE = "no score"
SMALL_GAP = "a tie: the gap is smaller than min_gap"
ONE_ANSWER = "only one answer"
NO_ANSWERS = "no answers"
EQUAL = "answers are equal"

Scores = list[float | None]
"""One score for each answer, higher is better; None for an answer that was not judged."""


Ballot = dict[tuple[int, int], float]
"""One judge's votes between answers, by number: ``{(0, 1): 1}`` puts the first before the second, a tie is half a vote
for each."""


@dataclass
class Judged:
    """The judgement of a row's answers."""

    scores: Scores
    votes: bool
    """Are the scores votes, which are added up over rows? Other scores are averaged."""
    why: str | None = None
    """The reason if no answer is the best one."""
    ballots: list[Ballot] = dataclasses.field(default_factory=list)
    """The votes of each judge; empty if the row does not distinguish judges."""


def judge(row: Mapping[str, Any], better: Better, count: int) -> Judged:
    """The scores of a row's ``count`` answers. Raises :class:`RowError` for a judgement that cannot be read."""
    if not count:
        raise LeftOut(NO_ANSWERS)
    if better.winner is not None:
        return _votes(row, better, better.winner, count)
    if better.signed is not None:
        value = number(find(row, better.signed), better.signed)
        if count != 2:
            raise RowError(f"a signed number compares two answers; there are {count}", better.signed)
        if value is None:
            return Judged([None] * count, False, NOT_JUDGED)
        favoured = better.negative if value < 0 else 1 - (better.negative or 0)
        scores: Scores = [abs(value) if i == favoured else 0.0 for i in range(2)]
        return Judged(scores, False, None if value else TIE, [_ballot(scores)])
    if better.ranking is not None:
        return _ranked(said_at(row, better.ranking), better, better.ranking, count)
    if better.position:
        return Judged([-float(i) for i in range(count)], False)
    return _scored(row, better, count)


def _ballot(scores: Scores) -> Ballot:
    """One judge's scores as votes between the scored answers."""
    given = [(answer, score) for answer, score in enumerate(scores) if score is not None]
    return {
        (a, b): 1.0 if score > lower else 0.5 for a, score in given for b, lower in given if a != b and score >= lower
    }


def _scored(row: Mapping[str, Any], better: Better, count: int) -> Judged:
    where: At | list[At] = better.label if better.label is not None else better.score or []
    if isinstance(where, list):
        values, fields = [find(row, one) for one in where], list(where)
    else:
        value = said_at(row, where)
        values = value if isinstance(value, list) else [value]
        fields = [f"{where}" if count == 1 else f"{where} ({i})" for i in range(len(values))]
    if len(values) != count:
        raise RowError(f"{len(values)} scores for {count} answers", where if isinstance(where, str) else fields[0])
    scores: Scores = []
    for value, field in zip(values, fields, strict=True):
        if better.label is not None:
            label = label_of(value, better, field)
            scores.append(None if label is None else float(label))
        else:
            score = number(value, field)
            scores.append(-score if score is not None and better.order == "low" else score)
    return Judged(scores, better.label is not None, NO_SCORE if all(score is None for score in scores) else None)


def label_of(value: Any, better: Better, field: str) -> bool | None:
    """Whether an answer is good, from a row's value; None when nobody judged it. Raises :class:`RowError` for a value
    that means neither."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None  # pandas writes NaN for an empty cell
    shown = repr(clip(str(value), 40))
    if not better.good:
        label = verdict(value)
        if label is None:
            raise RowError(
                f"{shown} is neither true nor false; `good: [...]` and `bad: [...]` list other values", field
            )
        return label
    said = spelled(value)
    if said in [spelled(one) for one in better.good]:
        return True
    if said in [spelled(one) for one in better.bad]:
        return False
    good, bad = (clip(", ".join(map(str, values)), 80) for values in (better.good, better.bad))
    raise RowError(f"{shown} is neither good ({good}) nor bad ({bad})", field)


def good_values(better: Better | None) -> Any:
    """The value, or the list of values, of a label that means a good answer."""
    words = [] if better is None else list(better.good)
    return words[0] if len(words) == 1 else words or True


def keeps_good(wanted: Any, better: Better | None) -> bool:
    """Does a condition on the place of a label keep only good answers?"""
    values = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    if better is None:
        return all(verdict(value) is True for value in values)
    good = {spelled(one) for one in better.good}
    return bool(values) and all(spelled(one) in good if good else verdict(one) is True for one in values)


def said_at(row: Mapping[str, Any], where: str) -> Any:
    """The value at a place; JSON text of a list, as in a cell of a table, is parsed."""
    value = find(row, where)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(RowError):  # it only begins like a list
            found = parse_text(value, where, "")
            return found if isinstance(found, list) else value
    return value


def number(value: Any, field: str) -> float | None:
    """A finite number, also from text; None for null, an empty cell, and N/A. Raises :class:`RowError` for anything
    else."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "na", "nan", "null", "none")):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    try:
        found = math.nan if not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        shown = clip(repr(value), 40) if isinstance(value, str) else type_name(value)
        comma = isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value)
        remedy = f"; the decimal mark is a point: write {value.strip().replace(',', '.')}" if comma else ""
        raise RowError(f"expected a number, found {shown}{remedy}", field)
    return found


def spelled(value: Any) -> str:
    """A value in the form in which it is compared: without case and outer blanks; 1.0 equals 1, as a number or as
    text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def _votes(row: Mapping[str, Any], better: Better, where: str, count: int) -> Judged:
    value = said_at(row, where)
    values = value if isinstance(value, list) else [value]
    for other, wanted in better.only.items():
        beside = said_at(row, other)
        if not isinstance(beside, list) or len(beside) != len(values):
            raise RowError(f"expected a list of {len(values)}, as {where} has", other)
        values = [one for one, said in zip(values, beside, strict=True) if spelled(said) == spelled(wanted)]
    names = [spelled(name) for name in better.values] or [str(i) for i in range(count)]
    if len(names) != count:
        raise RowError(f"`values` names {len(names)} answers; there are {count}", where)
    ties = {spelled(tie) for tie in better.ties}
    scores = [0.0] * count
    judged, bad = 0, 0
    ballots: list[Ballot] = []
    for one in values:
        said = "" if one is None or (isinstance(one, float) and math.isnan(one)) else spelled(one)
        if not said:
            continue
        judged += 1
        if said in names:
            scores[names.index(said)] += 1
            ballots.append({(names.index(said), other): 1.0 for other in range(count) if names[other] != said})
        elif said in ties:
            bad += "bad" in said
            ballots.append(_ballot([0.0] * count))
        else:
            known = ", ".join(str(name) for name in (*(better.values or names), *better.ties))
            advice = "" if better.values else f"; {_names_to_write('values', one, count)} says which answer it names"
            raise RowError(f"{clip(str(one), 40)!r} is none of {clip(known, 120)}{advice}", where)
    if not judged:
        return Judged([None] * count, True, NOT_JUDGED)
    top = max(scores)
    if top > 0 and scores.count(top) == 1:
        why = None
    elif bad and bad == judged:
        why = BOTH_BAD
    else:
        why = TIE
    return Judged(list(scores), True, why, ballots)


def _ranked(value: Any, better: Better, where: str, count: int) -> Judged:
    """Scores from the mean rank over all rankings. A ranking is a list of names or numbers, or a text such as
    ``A>B=C``."""
    if isinstance(value, str):
        rankings: list[Any] = [value] if value.strip() else []
    elif isinstance(value, list) and value and all(isinstance(one, str) and re.search("[>=]", one) for one in value):
        rankings = value
    elif value is None or isinstance(value, list) or value != value:  # pandas writes NaN for an empty cell
        rankings = [value] if isinstance(value, list) and value else []
    else:
        raise RowError(f"expected a list or a text such as A>B, found {type_name(value)}", where)
    names = [spelled(name) for name in better.names] or [str(i) for i in range(count)]
    names = names[:count] if better.names else names
    if len(names) != count:
        raise RowError(f"`names` has {len(names)} names; there are {count} answers", where)
    places: list[list[float]] = [[] for _ in names]
    ballots: list[Ballot] = []
    for ranking in rankings:
        steps = (
            [step.split("=") for step in ranking.split(">")]
            if isinstance(ranking, str)
            else [[step] for step in ranking]
        )
        at = 0
        own: Scores = [None] * count
        for step in steps:
            for one in step:
                if spelled(one) not in names:
                    raise RowError(_unranked(one, better, count, text=isinstance(ranking, str)), where)
                answer = names.index(spelled(one))
                places[answer].append(at + (len(step) - 1) / 2)
                own[answer] = -places[answer][-1]
            at += len(step)
        ballots.append(_ballot(own))
    scores: Scores = [-sum(found) / len(found) if found else None for found in places]
    return Judged(scores, False, NOT_JUDGED if all(score is None for score in scores) else None, ballots)


def _unranked(one: Any, better: Better, count: int, *, text: bool) -> str:
    """Message about a name in a ranking that is not the name of an answer, with a remedy."""
    known = better.names[:count] or [str(number) for number in range(count)]
    said = f"{clip(str(one), 40)!r} is none of {clip(', '.join(known), 120)}"
    pieces = [piece for piece in re.split(r"[,;|/<\s]+", str(one)) if piece] if text else []
    if not better.names:
        said += f"; {_names_to_write('names', pieces[0] if pieces else one, count)} says what it calls the answers"
    if len(pieces) > 1 and (not better.names or any(spelled(piece) in map(spelled, known) for piece in pieces)):
        said += "; in a text only > and = stand between the answers, as in A>B=C"
    return said


def _names_to_write(key: str, said: Any, count: int) -> str:
    """The recipe key that would define the names of the answers, completed with the series that ``said`` belongs to, if
    that is known."""
    for series in _SERIES:
        if spelled(said) in [spelled(name) for name in series[:count]]:
            return f"`{key}: [{', '.join(map(str, series[:count]))}]`"
    return f"`{key}: [...]`, a name for each answer,"


_SERIES: tuple[Sequence[str | int], ...] = (
    [chr(ord("A") + number) for number in range(26)],
    range(1, 27),
    ("left", "right"),
    ("first", "second", "third", "fourth"),
    *(tuple(f"{word}_{mark}" for mark in marks) for word in ("answer", "response", "model") for marks in ("ab", "12")),
)
"""Usual series of names of answers, in order."""


@dataclass(frozen=True)
class Comparison:
    """An answer that is better than others, by their numbers."""

    best: int
    worse: tuple[int, ...]
    gaps: tuple[float, ...]
    """By how much it is better than each of them."""


def compare(scores: Sequence[float], pairs: str, min_gap: float | None) -> list[Comparison]:
    """The comparisons that follow from scores, the best answer first. Another answer as good as the best one is neither
    chosen nor rejected.

    Raises :class:`LeftOut` when no answer is better than another.

    >>> compare([1.0, 3.0, 2.0], "best", None)
    [Comparison(best=1, worse=(0, 2), gaps=(2.0, 1.0))]
    """
    top = max(scores)
    least = min_gap or 0.0

    def below(score: float) -> tuple[int, ...]:
        return tuple(i for i, other in enumerate(scores) if score - other > 0 and score - other >= least)

    if pairs == "all":
        bests = sorted((i for i, score in enumerate(scores) if below(score)), key=lambda i: (-scores[i], i))
    elif pairs == "each":
        bests = [i for i, score in enumerate(scores) if score == top]
    else:
        bests = [list(scores).index(top)]
    found = []
    for best in bests:
        worse = below(scores[best])
        if pairs == "ends" and worse:
            worse = (min(worse, key=lambda i: scores[i]),)
        if worse:
            found.append(Comparison(best, worse, tuple(scores[best] - scores[i] for i in worse)))
    if not found:
        raise LeftOut(TIE if all(score == top for score in scores) else SMALL_GAP)
    return found


def agrees(row: Mapping[str, Any], better: Better) -> float | None:
    """For answers called chosen and rejected, the difference of their scores; None when there are no scores.

    Raises :class:`LeftOut` for equal scores, and :class:`RowError` when the rejected answer has the better score.
    """
    assert isinstance(better.score, list)
    first, second = (number(find(row, place(where)), where) for where in better.score)
    if first is None or second is None:
        return None
    gap = second - first if better.order == "low" else first - second
    if gap == 0:
        raise LeftOut(TIE)
    if gap < 0:
        raise RowError(f"says that the rejected answer is better ({first:g} and {second:g})", better.score[0])
    return gap
