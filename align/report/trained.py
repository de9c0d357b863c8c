"""Whether a policy was trained on the data that it is evaluated on, found by comparing digests in the manifests of the
run's stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.pipeline.artifacts import Identity, read_manifest
from align.recipe.schema import starting_field, type_of
from align.runs.record import StageRecord
from align.runs.values import mapping, rows, text, texts

_ROWS = ("where", "split", "subset")
"""Keys of a data source that select its rows."""


def trained_on(stage: StageRecord) -> bool:
    """Whether an evaluation uses a data source on which one of its policies was trained by a stage of this run: a file
    of the same content, with the same selection of rows. Sources that only share some prompts are not recognised."""
    if stage.manifest is None:
        return False
    own = set(_sources(stage.manifest.identity))
    return any(
        own & set(_sources(made))
        for policy in texts(stage.report, "policies")
        for made in _behind(policy, stage.folder.parent)
    )


def trained_on_bench(stage: StageRecord) -> bool:
    """The same for an evaluation's reward benchmarks and the scorers that they measure."""
    if stage.manifest is None:
        return False
    identity = stage.manifest.identity
    files = [mapping(task, "data") for task in rows(identity.config, "tasks") if text(task, "task") == "reward_bench"]
    own = {named for source in files for named in _named(identity, source)}
    scorers = [text(scorer, key) for scorer in rows(identity.config, "scorers") for key in ("model", "policy")]
    return any(own & set(_sources(made)) for scorer in scorers for made in _behind(scorer, stage.folder.parent))


def _behind(reference: str, stages: Path) -> Iterator[Identity]:
    """Identities of the stages that a policy was made by, the last one first."""
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
    """A stage's data sources, each as its digest with the keys that select its rows."""
    for key in type_of(identity.kind).trains_on:
        for source in rows(identity.config, key):
            yield from _named(identity, source)


def _named(identity: Identity, source: Mapping[str, Any]) -> Iterator[str]:
    digest = identity.inputs.get(text(source, "path"))
    if digest:
        yield f"{digest} {_taken(source)}"


def _taken(source: Mapping[str, Any]) -> str:
    return json.dumps({key: source[key] for key in _ROWS if source.get(key)}, sort_keys=True, default=str)
