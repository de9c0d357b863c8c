"""Making forms of preferences from answers with scores, or from answers called chosen and rejected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.mapping import better as judging
from align.data.mapping.values import as_rejected, is_empty, key_of
from align.data.messages.messages import Note
from align.data.rows import LeftOut
from align.recipe.rows.mapping import RowMapping

Form = dict[str, Any]

EMPTY = "an empty answer, left out"
SAME_TWICE = "an answer equal to another, left out"
AS_GOOD = "an answer as good as the best, left out"
UNSCORED = "an answer without a score, left out"


class Ballots:
    """The votes of several judges on pairs of answers, which are identified by their keys."""

    def __init__(self) -> None:
        self.count = 0
        """Number of judges."""
        self._over: defaultdict[tuple[str, str], float] = defaultdict(float)

    def add(self, ballots: Sequence[judging.Ballot], keys: Sequence[str]) -> None:
        """Add ballots about answers with these keys."""
        self.count += len(ballots)
        for ballot in ballots:
            for (one, other), votes in ballot.items():
                self._over[keys[one], keys[other]] += votes

    def between(self, chosen: str, rejected: str) -> Form:
        """The votes for each of two answers, as in this package's row format."""
        return {"chosen": self._over[chosen, rejected], "rejected": self._over[rejected, chosen]}


def compared(
    mapping: RowMapping,
    entries: Sequence[tuple[Any, float | None]],
    question: Any,
    common: Form,
    note: Note,
    ballots: Ballots,
) -> list[Form]:
    """A form for each comparison that follows from (answer, score) entries; the score is None if nobody scored the
    answer.

    Raises :class:`LeftOut` when there is none.
    """
    kept: list[tuple[Any, float]] = []
    for value, score in entries:
        if is_empty(value):
            note(EMPTY)
        elif score is None:
            note(UNSCORED)
        else:
            kept.append((value, score))
    if len(kept) < 2:
        raise LeftOut(judging.ONE_ANSWER if len(entries) < 2 or kept else judging.NO_SCORE)
    keys = [key_of(value) for value, _ in kept]
    if len(set(keys)) == 1:
        raise LeftOut(judging.EQUAL)
    forms = []
    for one in judging.compare([score for _, score in kept], mapping.pairs, mapping.min_gap):
        losers: dict[str, tuple[Any, float]] = {}
        for i, gap in zip(one.worse, one.gaps, strict=True):
            if keys[i] != keys[one.best]:
                losers.setdefault(keys[i], (kept[i][0], gap))
        if not losers:
            raise LeftOut(judging.EQUAL)
        if len(losers) < len(one.worse):
            note(SAME_TWICE)
        rejected = as_rejected([value for value, _ in losers.values()])
        form = {**common, "prompt": question, "chosen": kept[one.best][0], "rejected": rejected}
        if mapping.margin == "gap":
            form["margin"] = [gap for _, gap in losers.values()]
        if ballots.count > 1:
            form["votes"] = [ballots.between(keys[one.best], key) for key in losers]
        forms.append(form)
    top = max(score for _, score in kept)
    if mapping.pairs in ("best", "ends"):
        for _ in range(sum(score == top for _, score in kept) - 1):
            note(AS_GOOD)
    return forms


def by_name(mapping: RowMapping, row: Mapping[str, Any], form: Form, *, scored: bool, note: Note) -> list[Form]:
    """The forms of a row with answers called chosen and rejected, which are in ``form``.

    ``scored``: may the answers' scores forbid the comparison? Raises :class:`LeftOut` when no comparison is left.
    """
    gap = judging.agrees(row, mapping.better) if mapping.better is not None and scored else None
    if mapping.margin == "gap" and gap is not None:
        form = {**form, "margin": gap}
    if mapping.pairs != "each":
        return [form]
    several, worse = (value if isinstance(value, list) else [value] for value in (form["chosen"], form["rejected"]))
    good = {key_of(value) for value in several}
    wanted = [key_of(value) not in good for value in worse]
    for keep in wanted:
        if not keep:
            note(SAME_TWICE)
    if not any(wanted) or not several:
        raise LeftOut(judging.EQUAL)
    own: Form = {key: _only(form[key], wanted) for key in ("rejected", "margin", "votes") if key in form}
    return [{**form, **own, "rejected": _only(worse, wanted), "chosen": value} for value in several]


def _only(value: Any, wanted: Sequence[bool]) -> Any:
    """If ``value`` is a list with an entry for each rejected answer, the ``wanted`` entries; any other value
    unchanged."""
    if not isinstance(value, list) or len(value) != len(wanted):
        return value
    return [item for item, keep in zip(value, wanted, strict=True) if keep]
