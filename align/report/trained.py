"""Was a policy trained on the very data that it is evaluated on? Told from the manifests of the run's stages, by
content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.pipeline.artifacts import Identity, read_manifest
from align.recipe.schema import starting_field
from align.runs.record import StageRecord
from align.runs.values import mapping, rows, text, texts

_KEYS = ("data", "prompts")
_ROWS = ("where", "split", "subset")
"""Of a data source: which of its rows are taken."""


def trained_on(stage: StageRecord) -> bool:
    """Whether a source of an evaluation's data is one that a stage of this run behind one of its policies was trained
    on: a file of the same content, and the same choice of rows from it. Sources that only share some of their prompts
    are not found."""
    if stage.manifest is None:
        return False
    own = set(_sources(stage.manifest.identity))
    return any(
        own & set(_sources(made))
        for policy in texts(stage.report, "policies")
        for made in _behind(policy, stage.folder.parent)
    )


def trained_on_bench(stage: StageRecord) -> bool:
    """The same of its reward benchmarks and of the scorers that they measure."""
    if stage.manifest is None:
        return False
    identity = stage.manifest.identity
    files = [mapping(task, "data") for task in rows(identity.config, "tasks") if text(task, "task") == "reward_bench"]
    own = {named for source in files for named in _named(identity, source)}
    scorers = [text(scorer, key) for scorer in rows(identity.config, "scorers") for key in ("model", "policy")]
    return any(own & set(_sources(made)) for scorer in scorers for made in _behind(scorer, stage.folder.parent))


def _behind(reference: str, stages: Path) -> Iterator[Identity]:
    """The stages that led to a policy, the last one first."""
    seen: set[str] = set()
    while reference.startswith("stage:") and reference not in seen:
        seen.add(reference)
        try:
            identity = read_manifest(stages / reference.removeprefix("stage:")).identity
        except InputError:
            return
        yield identity
        reference = text(identity.config, starting_field(identity.kind))


def _sources(identity: Identity) -> Iterator[str]:
    """A stage's data sources by content, and by what is taken of them."""
    for key in _KEYS:
        for source in rows(identity.config, key):
            yield from _named(identity, source)


def _named(identity: Identity, source: Mapping[str, Any]) -> Iterator[str]:
    digest = identity.inputs.get(text(source, "path"))
    if digest:
        yield f"{digest} {_taken(source)}"


def _taken(source: Mapping[str, Any]) -> str:
    return json.dumps({key: source[key] for key in _ROWS if source.get(key)}, sort_keys=True, default=str)
