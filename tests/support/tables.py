"""Tables made from known truths: for each prompt, which answer is the better one, spelled in all the ways in which
files say it."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

COLUMNS = [
    "a",
    "b",
    "chosen",
    "rejected",
    "answer 1",
    "re-ply",
    "x.y",
    "B",
    "output",
    "0",
    "label",
    "score",
    "winner",
    "prompt",
    "system 2",
]
WORDS = [
    "stone",
    "river",
    "quiet",
    "lamp",
    "seven",
    "grain",
    "north",
    "paper",
    "slow",
    "bell",
    "Ä",
    "中",
    "—",
    "ok",
    "no",
    "yes",
    "7",
    "null",
]
ODD: list[Any] = [None, "", "odd", [], {}, "[", "{}", [None], {"a": 1}]


@dataclass
class Truth:
    """What a row, or a group of rows, says."""

    best: str
    others: set[str]
    tie: bool = False
    odd: bool = False
    """One of its cells was replaced: then it may be refused, and must not be turned round."""
    replaced: bool = False
    """It was the better answer itself that was replaced."""


@dataclass
class Table:
    """A file's rows, how they are read, and what they say of each prompt."""

    kind: str
    rows: list[dict[str, Any]]
    format: Any
    truths: dict[str, Truth] = field(default_factory=dict)

    def write(self, folder: Path, suffix: str) -> Path:
        """The rows as a file; JSON lines where a table cannot hold them."""
        path = folder / f"table{suffix}"
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        if suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                out = csv.writer(file)
                out.writerow(names)
                for row in self.rows:
                    out.writerow([_cell(row.get(name)) for name in names])
        elif suffix == ".parquet":
            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows), path)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
                return self.write(folder, ".jsonl")
        elif suffix == ".json":
            path.write_text(json.dumps(self.rows), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return path


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


class Maker:
    """Makes one table from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.truths: dict[str, Truth] = {}

    def text(self) -> str:
        """A few words, never the same twice in a table."""
        return " ".join(self.random.choices(WORDS, k=self.random.randint(1, 5))) + f" {self.random.randrange(10**9)}"

    def truth(self, count: int) -> tuple[str, list[str], int, bool]:
        """A prompt, its answers, which of them is the best, and whether it is a tie after all."""
        prompt, answers, best = self.text(), [self.text() for _ in range(count)], self.random.randrange(count)
        tie = self.random.random() < 0.15
        self.truths[prompt] = Truth(answers[best], {answer for i, answer in enumerate(answers) if i != best}, tie)
        return prompt, answers, best, tie

    def scores(self, count: int, best: int, tie: bool, *, low: bool) -> list[float]:
        """A number for each answer, of which the best answer has the best."""
        values = [self.random.randint(-50, 49) / 4 for _ in range(count)]
        top = (min(values) - 1) if low else (max(values) + 1)
        return [top] * count if tie else [top if i == best else value for i, value in enumerate(values)]

    def names(self, count: int) -> list[str]:
        """Columns, each once."""
        return self.random.sample(COLUMNS, count)

    def spelled(self, spell: str, answer: str) -> Any:
        """An answer as a text, as messages, or as a cell with their JSON."""
        messages = [{"role": "assistant", "content": answer}]
        return {"text": answer, "messages": messages, "cell": json.dumps(messages)}[spell]

    def shuffled(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns in another order."""
        keys = list(row)
        self.random.shuffle(keys)
        return {key: row[key] for key in keys}

    def spoilt(self, row: dict[str, Any], prompt: str, cells: list[str], best: set[str]) -> dict[str, Any]:
        """Now and then a row in which one cell holds something else; ``best`` are the columns of the better answer."""
        if self.random.random() < 0.8:
            return row
        cell = self.random.choice(cells)
        truth = self.truths[prompt]
        truth.odd, truth.replaced = True, truth.replaced or cell in best
        return {**row, cell: self.random.choice(ODD)}

    # Kinds

    def wide(self, judge: str) -> Table:
        """All answers in one row, and a column that says which is better."""
        count = 2 if judge in ("signed", "named") else self.random.randint(2, 4)
        asked, said, *columns = self.names(count + 2)
        spell = self.random.choice(["text", "messages", "cell"])
        letters = [f"N{i}" for i in range(count)]
        better, cell_of = self.judge(judge, said, count, letters)
        scores = [f"{column} score" for column in columns]
        rows = []
        for _ in range(self.random.randint(1, 5)):
            prompt, answers, best, tie = self.truth(count)
            row: dict[str, Any] = {asked: prompt}
            order = (
                [best, *(i for i in range(count) if i != best)]
                if judge in ("position", "named")
                else list(range(count))
            )
            row |= {column: self.spelled(spell, answers[i]) for column, i in zip(columns, order, strict=True)}
            cell = cell_of(best, tie)
            if judge == "columns":
                row |= dict(zip(scores, cell, strict=True))
            elif judge not in ("position", "named"):
                row[said] = cell
            else:
                self.truths[prompt].tie = False
            if judge == "named":
                row |= dict(zip(scores, self.scores(2, 0, False, low=False), strict=True))
            own = columns[order.index(best)]
            judged = [said] if said in row else [name for name in scores if name in row]
            rows.append(self.shuffled(self.spoilt(row, prompt, [*columns, *judged, asked], {own, f"{own} score"})))
        if judge == "columns":
            better = {"score": scores}
        format: dict[str, Any] = {"prompt": asked, "answers": columns, "better": better}
        if judge == "named":
            format = {"prompt": asked, "chosen": columns[0], "rejected": columns[1], "better": {"score": scores}}
        return Table(f"wide, {judge}", rows, format, self.truths)

    def judge(self, judge: str, said: str, count: int, letters: list[str]) -> tuple[Any, Callable[[int, bool], Any]]:
        """``better`` of a mapping, and what the cell says for the best answer."""
        pick = self.random.choice
        low, negative = pick([True, False]), pick([0, 1])
        order: dict[str, Any] = {"order": "low"} if low else {}

        def ranking(best: int, tie: bool) -> Any:
            rest = [i for i in range(count) if i != best]
            self.random.shuffle(rest)
            if tie:
                return "=".join(letters)
            return pick([">".join(letters[i] for i in (best, *rest)), [letters[i] for i in (best, *rest)]])

        def judges(best: int, tie: bool) -> Any:
            other = (best + 1) % count
            votes = [best, other] if tie else [best, best, other]
            self.random.shuffle(votes)
            return votes

        def labels(best: int, tie: bool) -> Any:
            good = [tie or i == best for i in range(count)]
            return good if pick([True, False]) else [int(one) for one in good]

        kinds: dict[str, tuple[Any, Callable[[int, bool], Any]]] = {
            "winner": (
                {"winner": said, "ties": ["same"]},
                lambda best, tie: "same" if tie else pick([best, float(best), str(best), f" {best} "]),
            ),
            "letters": (
                {"winner": said, "values": letters, "ties": ["same", -1]},
                lambda best, tie: pick([" SAME", -1]) if tie else pick([letters[best], letters[best].lower() + " "]),
            ),
            "judges": ({"winner": said}, judges),
            "score": ({"score": said, **order}, lambda best, tie: self.scores(count, best, tie, low=low)),
            "cells": (
                {"score": said, **order},
                lambda best, tie: [str(one) for one in self.scores(count, best, tie, low=low)],
            ),
            "columns": (None, lambda best, tie: self.scores(count, best, tie, low=False)),
            "signed": (
                {"signed": said, "negative": negative},
                lambda best, tie: 0 if tie else pick([-2, -0.5, "-3"]) if best == negative else pick([1, 2.5, "3"]),
            ),
            "ranking": ({"ranking": said, "names": letters}, ranking),
            "position": ({"position": True}, lambda best, tie: None),
            "named": (None, lambda best, tie: None),
            "label": ({"label": said}, labels),
        }
        return kinds[judge]

    def long(self, judge: str) -> Table:
        """One answer in a row; those of one prompt belong together."""
        asked, said, own = self.names(3)
        low = judge == "low"
        rows: list[dict[str, Any]] = []
        spell = self.random.choice(["text", "messages", "cell"])
        for _ in range(self.random.randint(1, 4)):
            count = self.random.randint(2, 4)
            prompt, answers, best, tie = self.truth(count)
            scores = (
                [int(tie or i == best) for i in range(count)]
                if judge == "label"
                else self.scores(count, best, tie, low=low)
            )
            for i, answer in enumerate(answers):
                score: Any = self.random.choice([bool(scores[i]), scores[i]]) if judge == "label" else scores[i]
                row = {asked: prompt, own: self.spelled(spell, answer), said: score}
                spoilt = self.spoilt(row, prompt, [own, said], {own, said} if i == best else set())
                rows.append(self.shuffled(spoilt))
        self.random.shuffle(rows)
        better = {"label": said} if judge == "label" else {"score": said, **({"order": "low"} if low else {})}
        return Table(
            f"long, {judge}", rows, {"prompt": asked, "answers": own, "group": asked, "better": better}, self.truths
        )

    def tree(self, _: str) -> Table:
        """Messages that answer each other."""
        rows: list[dict[str, Any]] = []
        low = self.random.choice([True, False])
        for _ in range(self.random.randint(1, 4)):
            count = self.random.randint(2, 4)
            prompt, answers, best, tie = self.truth(count)
            root = str(self.random.randrange(10**9))
            rows.append({"id": root, "up": None, "role": "user", "text": prompt, "rank": None})
            for answer, score in zip(answers, self.scores(count, best, tie, low=low), strict=True):
                rows.append(
                    {"id": f"{root}-{len(rows)}", "up": root, "role": "assistant", "text": answer, "rank": score}
                )
        self.random.shuffle(rows)
        tree = {"id": "id", "parent": "up", "score": "rank", **({"order": "low"} if low else {})}
        return Table("tree", rows, {"tree": tree}, self.truths)

    def public(self, name: str) -> Table:
        """A public shape, read without a word; what its columns mean is written here anew."""
        rows = []
        for _ in range(self.random.randint(1, 4)):
            prompt, answers, best, tie = self.truth(2)
            row = PUBLIC[name](prompt, answers, best, tie)
            self.truths[prompt].tie = tie and row is not None
            if row is None:
                self.truths[prompt].tie, row = False, PUBLIC[name](prompt, answers, best, False)
            rows.append(self.shuffled(row))
        return Table(f"public, {name}", rows, None, self.truths)


def _chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


Public = Callable[[str, list[str], int, bool], "dict[str, Any] | None"]
PUBLIC: dict[str, Public] = {
    "helpsteer3": lambda p, a, best, tie: {
        "context": [{"role": "user", "content": p}],
        "response1": a[0],
        "response2": a[1],
        "overall_preference": 0 if tie else (-2, 3)[best],
    },
    "helpsteer2_preference": lambda p, a, best, tie: {
        "prompt": p,
        "response_1": a[0],
        "response_2": a[1],
        "preference_strength": 0 if tie else (-1, 2)[best],
    },
    "shp": lambda p, a, best, tie: (
        None if tie else {"history": p, "human_ref_A": a[0], "human_ref_B": a[1], "labels": (1, 0)[best]}
    ),
    "arena": lambda p, a, best, tie: {
        "conversation_a": _chat(p, a[0]),
        "conversation_b": _chat(p, a[1]),
        "winner": "both_bad" if tie else ("model_a", "model_b")[best],
    },
    "arena55k": lambda p, a, best, tie: {
        "prompt": json.dumps([p]),
        "response_a": json.dumps([a[0]]),
        "response_b": json.dumps([a[1]]),
        "winner_model_a": int(not tie and best == 0),
        "winner_model_b": int(not tie and best == 1),
        "winner_tie": int(tie),
    },
    "nectar": lambda p, a, best, tie: {
        "prompt": f"\n\nHuman: {p} \n\nAssistant: ",
        "answers": [{"answer": answer, "rank": 1.0 if tie or i == best else 2.0} for i, answer in enumerate(a)],
    },
    "webgpt": lambda p, a, best, tie: {
        "question": {"full_text": p},
        "answer_0": a[0],
        "answer_1": a[1],
        "score_0": 0.0 if tie else (0.5, -0.5)[best],
        "score_1": 0.0 if tie else (-0.5, 0.5)[best],
    },
    "stack_exchange": lambda p, a, best, tie: {
        "question": p,
        "answers": [{"text": answer, "pm_score": 3 if tie or i == best else 1} for i, answer in enumerate(a)],
    },
    "judgebench": lambda p, a, best, tie: {
        "question": p,
        "response_A": a[0],
        "response_B": a[1],
        "label": "A=B" if tie else ("A>B", "B>A")[best],
    },
    "cvalues": lambda p, a, best, tie: None if tie else {"prompt": p, "pos_resp": a[best], "neg_resp": a[1 - best]},
    "swift": lambda p, a, best, tie: None if tie else {"messages": _chat(p, a[best]), "rejected_response": a[1 - best]},
    "openai_preference": lambda p, a, best, tie: (
        None
        if tie
        else {
            "input": {"messages": [{"role": "user", "content": p}]},
            "preferred_output": [{"role": "assistant", "content": a[best]}],
            "non_preferred_output": [{"role": "assistant", "content": a[1 - best]}],
        }
    ),
    "nemo_rl": lambda p, a, best, tie: {
        "context": [{"role": "user", "content": p}],
        "completions": [
            {"rank": 0 if tie or i == best else 1, "completion": [{"role": "assistant", "content": answer}]}
            for i, answer in enumerate(a)
        ],
    },
    "distilabel": lambda p, a, best, tie: {
        "instruction": p,
        "generations": a,
        "ratings": [4 if tie or i == best else 2 for i in range(2)],
    },
    "binarized": lambda p, a, best, tie: {
        "chosen": _chat(p, a[best]),
        "rejected": _chat(p, a[1 - best]),
        "score_chosen": 8.0,
        "score_rejected": 8.0 if tie else 3.5,
    },
    "preference": lambda p, a, best, tie: None if tie else {"prompt": p, "chosen": a[best], "rejected": a[1 - best]},
}
"""Public shapes: what their rows say, written down from the data sets' own cards."""

WIDE = ["winner", "letters", "judges", "score", "cells", "columns", "signed", "ranking", "position", "named", "label"]
KINDS = [
    *(("wide", one) for one in WIDE),
    *(("long", one) for one in ("score", "low", "label")),
    ("tree", ""),
    *(("public", one) for one in PUBLIC),
]
SUFFIXES = [".jsonl", ".json", ".csv", ".parquet"]


def table(seed: int) -> tuple[Table, str]:
    """The table of a seed, and the kind of file that it is to be."""
    maker = Maker(seed)
    kind, which = KINDS[seed % len(KINDS)]
    made: Table = getattr(maker, kind)(which)
    return made, maker.random.choice(SUFFIXES)
