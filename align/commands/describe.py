"""``align data describe``: statistics of data on one screen, to look at before training."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from align.commands.words_alone import TextPair, WordReport, told_apart
from align.data.chat.encoder import Encoder
from align.data.description import Description
from align.data.formats.formats import Want
from align.data.formats.own_format import form_of
from align.data.records import Preference, Record
from align.data.sources.mixture import read_records
from align.data.sources.source_report import SourceReport
from align.functional.intervals import Estimate
from align.recipe.schema import DataSource
from align.terminal import fixed

SAMPLE = 2_000
"""Number of pairs for measuring how well words alone predict preferences. They are those of the prompts with the
smallest digests, which is a random choice."""


@dataclass
class FileDescription(Description):
    """The statistics of one source, with what became of its rows, and how well words alone predict its preferences. The
    latter takes longer than all else, so that no training run measures it."""

    read: SourceReport | None = None
    told: WordReport | None = None
    _sample: list[tuple[int, int, TextPair]] = field(default_factory=list)

    def add(self, record: Record, encoder: Encoder | None) -> None:
        """Count a record; with an encoder its tokens, too."""
        said = {key: part for key, part in form_of(record).items() if key != "id"}
        parts = self.add_record(record, said)
        if encoder is not None:
            tokens = {
                name: [len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in part]
                for name, part in parts.items()
            }
            self.add_lengths(tokens, "tokens")
        if isinstance(record, Preference):
            prompt = self.prompts[-1]
            pair = TextPair(f"{prompt:x}", parts["chosen"][0], parts["rejected"][0])
            push = heapq.heappush if len(self._sample) < SAMPLE else heapq.heappushpop
            push(self._sample, (-prompt, self.records, pair))

    def finish(self, read: SourceReport) -> None:
        """Called once all records were counted."""
        self.read = read
        self.told = told_apart([pair for _, _, pair in sorted(self._sample, key=lambda entry: entry[1])])

    def figures(self) -> dict[str, str]:
        """See :meth:`Description.figures`."""
        assert self.read is not None
        figures = {
            "rows": f"{self.read.read:,}",
            **{f"left out, {reason}": f"{count:,}" for reason, count in self.read.reasons.items()},
            **({"left out by where": f"{self.read.left_out:,}"} if self.read.left_out else {}),
            "bad rows": f"{self.read.bad:,}",
            **{f"times {what}": f"{count:,}" for what, count in self.read.notes.items()},
            **super().figures(),
        }
        if self.told is not None:
            figures |= {
                "told by length alone": _share(self.told.length),
                "told by words alone": _share(self.told.words),
            }
        elif self.kind == "preference":
            figures["told by words alone"] = "too few pairs to say"
        return figures


def describe(source: DataSource, location: Path | str, want: Want, encoder: Encoder | None = None) -> FileDescription:
    """Count all records of a source. Bad rows are counted and skipped; they are in ``read``.

    Raises :class:`InputError` when there is nothing to read.
    """
    description = FileDescription(source.path, want)
    records = read_records([source.model_copy(update={"on_bad_row": "skip"})], [location], want, seed=0, rejects=None)
    for record in records:
        description.add(record, encoder)
    (read,) = records.report.sources
    description.finish(read)
    return description


# Output


def rows_of(descriptions: Sequence[FileDescription]) -> list[tuple[str, list[str]]]:
    """Rows of the table: a name, and the number for each source."""
    made = [one.figures() for one in descriptions]
    names = list(dict.fromkeys(name for figures in made for name in figures))
    return [(name, [figures.get(name, "") for figures in made]) for name in names]


def shared_lines(descriptions: Sequence[FileDescription]) -> list[str]:
    """For each two sources, how many prompts they share."""
    lines = []
    for one, other in combinations(descriptions, 2):
        both = len(np.intersect1d(np.array(one.prompts), np.array(other.prompts)))
        lines.append(f"prompts in both {one.name} and {other.name}: {both:,}")
    return lines


def _share(estimate: Estimate) -> str:
    text = fixed(estimate.mean, 3)
    bounds = (
        ""
        if estimate.low is None or estimate.high is None
        else f" [{fixed(estimate.low, 3)}, {fixed(estimate.high, 3)}]"
    )
    return f"{text}{bounds} of {estimate.count:,} pairs"
