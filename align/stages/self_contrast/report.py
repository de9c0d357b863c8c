"""What became of the samples of a Self-Contrast stage: counted while it runs, then printed and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from align.functional.selection import NegativeSelection, Reason

_WORDS: dict[Reason, str] = {
    "empty": "empty",
    "unfinished": "unfinished, left out",
    "target": "copies of the target",
    "duplicate": "copies of another sample",
    "filtered": "too similar to the target",
    "not drawn": "not drawn",
    "negative": "negatives",
}
_BINS = 10
_BAR = 40


@dataclass
class SelectionReport:
    """Counts of one stage run."""

    samples_per_prompt: int
    negatives: int
    """Number of negatives for each prompt that the recipe asks for."""
    data: Mapping[str, Any]
    """The report about the data that were read."""
    embedding: Mapping[str, Any]
    """The embedder, its limit, and how many texts were cut to it."""
    prompts: int = 0
    kept: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    """Number of samples for each reason; ``negative`` only counts samples of prompts that were kept."""
    similarities: list[float] = field(default_factory=list)
    """Similarities of all samples to their targets."""
    chosen_similarities: list[float] = field(default_factory=list)
    """Similarities of the negatives to their targets."""
    target_tokens: list[int] = field(default_factory=list)
    """Lengths in tokens of the chosen answers that were kept; the next attribute has those of the rejected ones."""
    negative_tokens: list[int] = field(default_factory=list)

    def add(
        self,
        chosen: NegativeSelection,
        scores: Sequence[float],
        tokens: Sequence[int],
        target_tokens: int,
        *,
        kept: bool,
    ) -> None:
        """Count a prompt with its samples; ``kept`` says whether it became a preference."""
        self.prompts += 1
        self.similarities += scores
        reasons: Counter[Reason] = Counter(chosen.reasons)
        if kept:
            self.kept += 1
            self.chosen_similarities += [scores[i] for i in chosen.indices]
            self.negative_tokens += [tokens[i] for i in chosen.indices]
            self.target_tokens.append(target_tokens)
        else:
            reasons["not drawn"] += reasons.pop("negative", 0)
        self.reasons += reasons

    def words(self) -> str:
        """What became of the samples, on one line."""
        total = self.prompts * self.samples_per_prompt
        return ", ".join(
            [f"{total:,} samples", *(f"{self.reasons[r]:,} {words}" for r, words in _WORDS.items() if self.reasons[r])]
        )

    def headline(self) -> dict[str, Any]:
        """Numbers for the stage's summary."""
        return {
            "prompts": self.prompts,
            "kept": self.kept,
            "dropped": self.prompts - self.kept,
            "samples": self.prompts * self.samples_per_prompt,
            "samples_by_reason": {reason: self.reasons[reason] for reason in _WORDS},
            "similarity": _mean(self.similarities),
            "similarity_of_negatives": _mean(self.chosen_similarities),
            "chosen_tokens": _mean(self.target_tokens),
            "rejected_tokens": _mean(self.negative_tokens),
            "texts_cut_by_embedder": round(self.embedding["cut"] / max(self.embedding["texts"], 1), 4),
        }

    def histogram(self) -> list[dict[str, Any]]:
        """Counts of all samples and of the negatives in ten bins of similarity, from the least to the most similar."""
        low, high = min(self.similarities), max(self.similarities)
        edges = np.linspace(low, high if high > low else low + 1e-6, _BINS + 1)
        counts, chosen = (np.histogram(values, edges)[0] for values in (self.similarities, self.chosen_similarities))
        return [
            {"from": round(float(a), 6), "to": round(float(b), 6), "samples": int(n), "negatives": int(k)}
            for a, b, n, k in zip(edges[:-1], edges[1:], counts, chosen, strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON. It contains no times, so that the same work gives the same values."""
        return {**self.headline(), "histogram": self.histogram(), "embedding": dict(self.embedding), "data": self.data}


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4) if values else 0.0


def show(console: Console, name: str, counts: SelectionReport, seconds: Mapping[str, float]) -> None:
    """Print the tables at the end of the stage."""
    table = Table(title=f"{name}: from samples to preferences", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("prompts in", f"{counts.prompts:,}")
    table.add_row("samples", f"{counts.prompts * counts.samples_per_prompt:,}")
    for reason, words in _WORDS.items():
        table.add_row(f"  {words}", f"{counts.reasons[reason]:,}")
    table.add_row(f"prompts dropped (fewer than {counts.negatives} negatives)", f"{counts.prompts - counts.kept:,}")
    table.add_row("prompts kept", f"{counts.kept:,}")
    numbers = counts.headline()
    table.add_row(
        "mean tokens of chosen and rejected", f"{numbers['chosen_tokens']:.1f}, {numbers['rejected_tokens']:.1f}"
    )
    limit = counts.embedding["max_tokens"]
    cut = f"texts cut by the embedder (at {limit} of its tokens)" if limit else "texts cut by the embedder (no limit)"
    table.add_row(cut, f"{numbers['texts_cut_by_embedder']:.1%}")
    for phase, spent in seconds.items():
        table.add_row(f"seconds, {phase}", f"{spent:,.1f}")
    console.print(table)
    console.print(f"{name}: similarity to the target (█ negatives, ░ other samples)", highlight=False, markup=False)
    rows = counts.histogram()
    scale = _BAR / max(row["samples"] for row in rows)
    for row in rows:
        dark, whole = round(row["negatives"] * scale), round(row["samples"] * scale)
        bar = "█" * dark + "░" * max(0, whole - dark)
        console.print(
            f"  {row['from']:6.3f} to {row['to']:6.3f}  {bar:<{_BAR}}  {row['samples']:,}",
            highlight=False,
            markup=False,
        )
