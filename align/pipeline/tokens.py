"""How much data a training stage has: counted exactly where that is quick, else estimated, and always said which."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError
from align.pipeline.folder import RunFolder
from align.recipe import refs
from align.recipe.load import LoadedRecipe
from align.recipe.schema import DataSource, EvaluateStage, Model, SelfContrastStage

if TYPE_CHECKING:
    from align.data.formats import Want

EXACT_BYTES = 8_000_000
"""Data up to this size are encoded to count them."""
_BYTES_PER_TOKEN = 4
_COUNTED = ("sft", "reward", "dpo")
"""Stage kinds whose data are encoded to count them."""


@dataclass(frozen=True)
class Amount:
    """What a stage trains on, once through the data unless said otherwise."""

    source: str
    """How it is known."""
    examples: int | None = None
    tokens: int | None = None
    """Unique tokens."""
    targets: int | None = None
    """Trained tokens."""
    steps: int | None = None
    """Optimiser steps of the whole stage, where they were counted."""
    seen: int | None = None
    """Tokens of all those steps."""


def amount(loaded: LoadedRecipe, name: str, model: Model | None, run: RunFolder) -> Amount:
    """The data of stage ``name``.

    Args:
        model: with a local path, whose tokenizer may be used; None when there is none on this machine.
    """
    spec: Any = loaded.recipe.stages[name]
    sources: Sequence[DataSource] = spec.data
    try:
        locations = [locate(loaded, run, source.path) for source in sources]
    except AlignError as error:  # a stage that has not run yet: what it will make is not known
        return _of_contrast(loaded, sources, run) or Amount(f"unknown: {error.problems[0].message}")
    if any(isinstance(location, str) for location in locations):
        return Amount("unknown: a data set on the hub is not downloaded to plan")
    size = sum(_size(Path(location)) for location in locations)
    if spec.kind in _COUNTED and model is not None and size <= EXACT_BYTES:
        return _encoded(loaded, name, model, run)
    why = "larger than what is encoded to count" if size > EXACT_BYTES else "the tokenizer is not on this machine"
    filters = ", `where` and `limit` ignored" if any(source.where or source.limit for source in sources) else ""
    words = f"estimated: {size:,} bytes at {_BYTES_PER_TOKEN} a token{filters} ({why})"
    return Amount(words, examples=_lines([Path(location) for location in locations]), tokens=size // _BYTES_PER_TOKEN)


def conversations(loaded: LoadedRecipe, name: str, run: RunFolder) -> Amount:
    """The conversations (for an evaluation also prompts) that a stage samples for: how many, and about how many tokens. Counts them where
    that is quick.

    Raises :class:`InputError` for bad rows.
    """
    from align.data.mixture import read_records

    spec: Any = loaded.recipe.stages[name]
    try:
        locations = [locate(loaded, run, source.path) for source in spec.data]
    except AlignError as error:
        return Amount(f"unknown: {error.problems[0].message}")
    if any(isinstance(location, str) for location in locations):
        return Amount("unknown: a data set on the hub is not downloaded to plan")
    size = sum(_size(Path(location)) for location in locations)
    if size > EXACT_BYTES:
        return Amount("lines of the files", examples=_lines([Path(location) for location in locations]), tokens=size // _BYTES_PER_TOKEN)
    rows = characters = 0
    want: Want = "prompt" if isinstance(spec, EvaluateStage) else "conversation"
    for record in read_records(spec.data, locations, want, seed=loaded.recipe.seed, rejects=None):
        rows += 1
        characters += sum(len(message["content"].encode()) for message in getattr(record, "messages", ()))
    return Amount("counted; more may be dropped for their length", examples=rows, tokens=characters // _BYTES_PER_TOKEN)


def _of_contrast(loaded: LoadedRecipe, sources: Sequence[DataSource], run: RunFolder) -> Amount | None:
    """What a Self-Contrast stage that has not run yet will make, at most; None when the data are not all from one."""
    parsed = [refs.parse(source.path, loaded.root) for source in sources]
    names = [ref.name for ref in parsed if isinstance(ref, refs.StageRef)]
    spec = loaded.recipe.stages[names[0]] if len(names) == len(parsed) == 1 else None
    if not isinstance(spec, SelfContrastStage):
        return None
    found = conversations(loaded, names[0], run)
    if found.examples is None or found.tokens is None:
        return None
    words = (
        f"at most: a preference for each conversation of {names[0]}, {spec.negatives} rejected answers of {spec.max_new_tokens:,} tokens"
    )
    return Amount(words, examples=found.examples, tokens=found.tokens + found.examples * spec.negatives * spec.max_new_tokens)


def locate(loaded: LoadedRecipe, run: RunFolder, text: str) -> Path | str:
    """Where a reference lies, results of stages included. Raises AlignError for a stage that has not run yet."""
    ref = refs.parse(text, loaded.root)
    if not isinstance(ref, refs.StageRef):
        return refs.resolve(text, loaded.root)
    folder = run.stage(ref.name)
    if not folder.is_dir():
        raise AlignError(f"what stage {ref.name} will make")
    return folder


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def _lines(paths: Sequence[Path]) -> int | None:
    """Rows of JSON Lines files; None for other formats and for large files."""
    if any(path.suffix != ".jsonl" or path.stat().st_size > 10 * EXACT_BYTES for path in paths):
        return None
    return sum(path.read_bytes().count(b"\n") for path in paths)


def _encoded(loaded: LoadedRecipe, name: str, model: Model, run: RunFolder) -> Amount:
    """Encode as the stage will, and cut the steps as it will. Uses the runs' cache if there is one, and leaves nothing behind otherwise."""
    from align.models.load import load_encoder
    from align.stages.reading import read_data

    spec: Any = loaded.recipe.stages[name]
    seed = loaded.recipe.seed if spec.seed is None else spec.seed
    with tempfile.TemporaryDirectory(prefix="align-plan-") as scratch:
        read = read_data(
            spec,
            resolve=lambda text: locate(loaded, run, text),
            encoder=load_encoder(model, cache=run.cache if (run.cache / "gguf").is_dir() else None),
            cache=run.cache if run.cache.is_dir() else Path(scratch),
            seed=seed,
            rejects=None,
            with_held_out=False,
        )
        plan, report = read.plan(spec.train, seed), read.report
        seen = int(read.examples.sizes[plan.order[: plan.bounds[-1]]].sum())
        return Amount("encoded with the model's tokenizer", len(read.trees), report.tokens, report.targets, len(plan), seen)
