"""The report about the rows of a data set: how many were kept, how many were left out and why, and remarks about those
that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from align.data.records import Origin
from align.data.tree import Tree
from align.terminal import counted

SHOWN = 10
"""Number of places that are listed for each reason."""


@dataclass
class Counted:
    """How often something happened, and the first places."""

    total: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, origin: Origin) -> None:
        """Count it once more, at ``origin``."""
        self.total += 1
        if len(self.first) < SHOWN:
            self.first.append(str(origin))

    def __str__(self) -> str:
        """``4 (a.jsonl:3, 17, b.jsonl:2, ...)``: a file is named only if it is not that of the place before."""
        places, before = [], ""
        for source, _, line in (place.rpartition(":") for place in self.first):
            places.append(line if source == before else f"{source}:{line}")
            before = source
        more = ["..."] if self.total > len(self.first) else []
        return f"{self.total:,} ({', '.join(places + more)})"


@dataclass
class DataReport:
    """The report about an encoded data set."""

    want: str
    trees: int = 0
    """Number of conversations, preferences or prompts that were kept."""
    tokens: int = 0
    """Number of tokens; a prompt counts once even if it has several answers."""
    targets: int = 0
    """Number of trained tokens."""
    longest: int = 0
    """Number of tokens of the longest path."""
    dropped: dict[str, Counted] = field(default_factory=dict)
    """Records left out, by reason."""
    noted: dict[str, Counted] = field(default_factory=dict)
    """Remarks about records that were kept."""
    source_lines: list[str] = field(default_factory=list)
    """One line for each source: rows read, kept, left out, bad."""
    sources: dict[str, Any] = field(default_factory=dict)
    """The same as numbers."""
    described: list[dict[str, Any]] = field(default_factory=list)
    """For each source, as the recipe names it, what its records hold: ``{"source": ..., "figures": {what: text}}``."""
    reused: bool = False
    """Were the data taken from the cache?"""

    def add(self, tree: Tree) -> None:
        """A record was kept."""
        self.trees += 1
        self.tokens += tree.size
        self.targets += sum(int(branch.mask.sum()) for branch in tree.branches)
        self.longest = max(self.longest, tree.longest_path)

    def drop(self, reason: str, origin: Origin) -> None:
        """A record was left out."""
        self.dropped.setdefault(reason, Counted()).add(origin)

    def note(self, what: str, origin: Origin) -> None:
        """Something happened to a record."""
        self.noted.setdefault(what, Counted()).add(origin)

    def lines(self) -> list[str]:
        """Lines for the user: the sources, the total, and the counts of ``dropped`` and ``noted``."""
        trained = f", {self.targets:,} of them trained" if self.targets else ""
        cached = " (encoded before)" if self.reused else ""
        return [
            *self.source_lines,
            (
                f"{counted(self.trees, self.want)}{cached}: {self.tokens:,} tokens{trained}, the longest has"
                f" {self.longest:,}"
            ),
            *(f"dropped, {reason}: {count}" for reason, count in self.dropped.items()),
            *(f"note, {what}: {count}" for what, count in self.noted.items()),
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, which :meth:`from_json` reads back."""
        content = asdict(self)
        del content["reused"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, reused: bool) -> DataReport:
        """The report that :meth:`as_json` wrote. Raises TypeError or KeyError for anything else."""
        counts = {
            key: {reason: Counted(**entry) for reason, entry in content[key].items()} for key in ("dropped", "noted")
        }
        return cls(**{**content, **counts, "reused": reused})
