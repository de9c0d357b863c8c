"""The rows that are trained on: real text, as trees of tokens, the same for all contenders.

Real rows come from the folder named by ALIGN_BENCH_DATA (sft_en.train.jsonl, prefs_helpful_en.train.jsonl), by default
``../shared/data`` beside the repository; without it the project's own quickstart rows are used, which are shorter. The
result says which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.data.tree import Branch, Tree

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "data" / "quickstart"


@dataclass(frozen=True)
class Rows:
    """Trees, and a sentence that says where they come from."""

    trees: list[Tree]
    source: str


def _file(real: str, quickstart: str) -> Path:
    named = os.environ.get("ALIGN_BENCH_DATA")
    path = Path(named) / real if named else ROOT.parent / "shared" / "data" / real
    if path.is_file():
        return path
    if named:
        raise SystemExit(f"ALIGN_BENCH_DATA: there is no {path}")
    return QUICKSTART / quickstart


def _read(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _first(path: Path, count: int, shorter_than: int, tree: Callable[[str, Any], Tree]) -> Rows:
    """The first ``count`` rows of a file that are shorter than a number of tokens."""
    trees: list[Tree] = []
    for number, row in enumerate(_read(path), 1):
        made = tree(str(number), row)
        if made.longest_path < shorter_than:
            trees.append(made)
        if len(trees) == count:
            break
    return Rows(trees, f"the first {len(trees)} rows of {path.name} that are under {shorter_than} tokens")


def conversations(encoder: Any, count: int, shorter_than: int) -> Rows:
    """Conversations as single-branch trees, every assistant message a target."""

    def tree(number: str, row: Any) -> Tree:
        encoded = encoder.encode(row["messages"])
        cut = int(np.flatnonzero(encoded.mask)[0])
        return Tree(number, encoded.ids[:cut], (Branch(encoded.ids[cut:], encoded.mask[cut:]),))

    return _first(_file("sft_en.train.jsonl", "conversations.jsonl"), count, shorter_than, tree)


def preferences(split: str) -> Path:
    """The file of ``train`` or ``test`` pairs."""
    return _file(
        f"prefs_helpful_en.{split}.jsonl", {"train": "preferences.jsonl", "test": "preferences.test.jsonl"}[split]
    )


def misleading() -> Path:
    """LLMBar's pairs, each with the part that it belongs to. The project has none of its own."""
    path = _file("eval_rm_llmbar.jsonl", "")
    if not path.is_file():
        raise SystemExit("eval_rm_llmbar.jsonl: not found; name the folder in ALIGN_BENCH_DATA")
    return path


def pairs(encoder: Any, count: int, shorter_than: int) -> Rows:
    """A prompt, the chosen and the rejected answer."""

    def tree(number: str, row: Any) -> Tree:
        return Tree(number, *encoder.encode_answers(row["prompt"], [row["chosen"], row["rejected"]]))

    return _first(preferences("train"), count, shorter_than, tree)


def many_rejected(encoder: Any, count: int, rejected: int, shorter_than: int) -> Rows:
    """Pairs whose rejected answer is joined by those of the rows after it: real text in real lengths, if not real
    preferences."""
    rows = pairs(encoder, count + rejected - 1, shorter_than)
    others = [tree.branches[1] for tree in rows.trees]
    trees = [Tree(t.id, t.trunk, (t.branches[0], *others[i : i + rejected])) for i, t in enumerate(rows.trees[:count])]
    return Rows(
        trees, f"{rows.source}; each with its own rejected answer and those of the {rejected - 1} rows after it"
    )


def random_tokens(count: int, rejected: int, part: int = 128, vocabulary: int = 49152, seed: int = 0) -> Rows:
    """Prompt, chosen answer and every rejected answer of ``part`` random tokens each."""
    rng = np.random.default_rng(seed)

    def tokens() -> Any:
        return rng.integers(3, vocabulary, part, dtype=np.int32)

    def branch() -> Branch:
        return Branch(tokens(), np.ones(part, dtype=np.bool_))

    trees = [Tree(str(i), tokens(), tuple(branch() for _ in range(1 + rejected))) for i in range(count)]
    return Rows(trees, f"{count} prompts with 1 chosen and {rejected} rejected answers, all parts {part} random tokens")
