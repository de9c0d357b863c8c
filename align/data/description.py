"""What the records of one source hold, in figures: prompts, answers, lengths, margins, labels, scripts, duplicates.

``align data describe`` counts texts. While a stage encodes its data it counts their tokens, for the page of the run. As
that takes some millionths of a second a record, all records are counted. Only scripts need texts and take longer: they
are those of the first hundred records, of every tenth of the first thousand, of every hundredth of the first ten
thousand, and so on, each of which stands for as many.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from align.data.leakage import prompt_digest
from align.data.records import Conversation, Graded, Messages, Preference, Prompt, Record, Unpaired
from align.data.tree import Tree

_LETTERS = 400
"""Number of letters of a record by which its script is recognised."""
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@dataclass
class Description:
    """The statistics of one source."""

    name: str
    kind: str
    """The type of its records."""
    records: int = 0
    answers: int = 0
    """Number of answers of all records: chosen and rejected ones, or the only one of other types of records."""
    prompts: array[int] = field(default_factory=lambda: array("q"))
    """A number for each record's prompt, of 64 bits; equal ones are the same prompt."""
    contents: array[int] = field(default_factory=lambda: array("q"))
    """The same for all that a record says."""
    lengths: defaultdict[tuple[str, str], array[int]] = field(default_factory=lambda: defaultdict(lambda: array("q")))
    """Lengths of each part, in characters or tokens."""
    differences: array[int] = field(default_factory=lambda: array("q"))
    """Length of the chosen answer minus that of the rejected one, for each pair."""
    margins: array[float] = field(default_factory=lambda: array("d"))
    labels: Counter[str] = field(default_factory=Counter)
    """Counts of the labels and grades of answers that are judged by themselves."""
    scripts: Counter[str] = field(default_factory=Counter)
    scripted: int = 0
    """Records whose script was looked at."""

    def add_record(self, record: Record, said: Mapping[str, Any]) -> dict[str, list[str]]:
        """Count a record by its text, and give its parts. ``said`` is the record as a row, without its id."""
        text = json.dumps(said, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        parts = parts_of(record)
        lengths = {name: list(map(len, texts)) for name, texts in parts.items()}
        self._add(record, int(prompt_digest(record)[:15], 16), hash(text), lengths, "characters")
        self._add_script(parts, 1)
        return parts

    def add_tree(self, tree: Tree, record: Record) -> None:
        """Count a record by the tokens that it became."""
        prompt, ids = tree.trunk.tobytes(), [branch.ids.tobytes() for branch in tree.branches]
        size, counts = len(tree.trunk), [len(branch.ids) for branch in tree.branches]
        lengths: dict[str, Sequence[int]]
        if isinstance(record, Preference):
            lengths = {"prompt": (size,), "chosen": counts[:1], "rejected": counts[1:]}
        elif isinstance(record, Conversation):
            mask = tree.branches[0].mask
            context = 0 if mask.all() else int(np.flatnonzero(~mask)[-1]) + 1  # what stands before the last answer
            prompt += ids[0][: context * tree.branches[0].ids.itemsize]
            lengths = {"prompt": (size + context,), "answer": (counts[0] - context,)}
        else:
            lengths = {"prompt": (size,), "answer": counts} if counts else {"prompt": (size,)}
        self._add(record, hash(prompt), hash((prompt, *ids)), lengths, "tokens")
        step = 10 ** max(0, len(str(self.records)) - 2)
        if self.records % step == 0:
            self._add_script(parts_of(record), step)

    def _add(self, record: Record, prompt: int, content: int, lengths: Mapping[str, Sequence[int]], unit: str) -> None:
        self.records += 1
        self.prompts.append(prompt)
        self.contents.append(content)
        self.add_lengths(lengths, unit)
        if isinstance(record, Preference):
            rejected = lengths["rejected"]
            self.answers += 1 + len(rejected)
            chosen = lengths["chosen"][0]
            self.differences.extend([chosen - length for length in rejected])
            if record.margins is not None:
                self.margins.extend(record.margins)
            return
        self.answers += len(lengths.get("answer", ()))
        if isinstance(record, Unpaired):
            self.labels[f"label: {str(record.label).lower()}"] += 1
        elif isinstance(record, Graded):
            self.labels.update(f"graded: {name}" for name in record.grades)

    def add_lengths(self, lengths: Mapping[str, Sequence[int]], unit: str) -> None:
        """Those of a record's parts."""
        for name, counts in lengths.items():
            self.lengths[name, unit].extend(counts)

    def _add_script(self, parts: Mapping[str, Sequence[str]], weight: int) -> None:
        self.scripted += 1
        self.scripts[script_of(" ".join(text for texts in reversed(list(parts.values())) for text in texts))] += weight

    def figures(self) -> dict[str, str]:
        """For people: what is counted, and how often."""
        times = np.unique(np.array(self.prompts), return_counts=True)[1]
        several = times[times > 1]
        doubles = self.records - len(np.unique(np.array(self.contents)))
        part = f" of {self.scripted:,} of them" if self.scripted < self.records else ""
        figures = {
            self.kind: f"{self.records:,}",
            "prompts": f"{len(times):,}"
            + (f"; {len(several):,} of them in several rows, up to {several.max():,}" if len(several) else ""),
            "answers a prompt": f"{self.answers / max(1, len(times)):.2f}" if self.answers else "",
            "rows equal to an earlier one": f"{doubles:,}",
            **{f"{name}, {unit}": _spread(values) for (name, unit), values in self.lengths.items()},
            **{name: f"{count:,}" for name, count in self.labels.most_common(8)},
            f"letters{part}": ", ".join(
                f"{name} {count / self.scripts.total():.0%}" for name, count in self.scripts.most_common(4)
            ),
        }
        if len(self.differences):
            figures |= self._of_pairs()
        return {name: text for name, text in figures.items() if text}

    def _of_pairs(self) -> dict[str, str]:
        differences = np.array(self.differences)
        unequal = int((differences != 0).sum())
        longer = (differences > 0).sum() / max(1, unequal)
        figures = {"longer answer chosen": f"{longer:.0%} of {unequal:,} pairs of unequal length", "margins": "none"}
        if len(self.margins):
            values = np.array(self.margins)
            low, middle, high = (f"{value:.4g}" for value in (values.min(), np.median(values), values.max()))
            ties, below = (values == 0).sum(), (values < 0).sum()
            figures["margins"] = f"{low} to {high}, median {middle}; {ties:,} ties, {below:,} below 0"
        return figures


def parts_of(record: Record) -> dict[str, list[str]]:
    """The texts of a record by part: ``prompt``, and ``chosen`` and ``rejected``, or ``answer``."""
    if isinstance(record, Conversation):
        return {"prompt": [_text(record.messages[:-1])], "answer": [_text(record.messages[-1:])]}
    prompt = {"prompt": [_text(record.prompt)]}
    if isinstance(record, Prompt):
        return prompt
    if isinstance(record, Preference):
        return {**prompt, "chosen": [_text(record.chosen)], "rejected": [_text(answer) for answer in record.rejected]}
    return {**prompt, "answer": [_text(record.completion)]}


def _text(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages)


def script_of(text: str) -> str:
    """The script (Latin, Han, ...) of most letters of a text; ``none`` for a text without letters."""
    counts = Counter(map(_script, text[:_LETTERS]))
    del counts[""]
    return counts.most_common(1)[0][0] if counts else "none"


@lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").partition(" ")[0]
    return _SCRIPTS.get(first, first.capitalize())


def _spread(values: Iterable[int]) -> str:
    numbers: Any = np.array(values)
    middle, most, longest = np.quantile(numbers, [0.5, 0.9, 1.0])
    return f"median {middle:,.0f}, 90 % up to {most:,.0f}, longest {longest:,.0f}"
