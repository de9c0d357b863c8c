"""Computing the identity of a stage, which is what its result depends on, and describing how two identities differ.
Imports no torch."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from align import files, secrets
from align.errors import InputError
from align.pipeline.artifacts import Identity
from align.recipe.blocks.scoring import FunctionScorer
from align.recipe.checks.fields import mark_of
from align.recipe.load import LoadedRecipe
from align.recipe.schema import DataSource, Rollout, Stage

NEUTRAL = {
    "train.report_to": "only shows the metrics elsewhere as well",
    "train.save_steps": "a run that goes on from a checkpoint is the one that never stopped",
    "train.save_total_limit": "how many checkpoints are kept in the meantime",
}
"""Keys that do not change a result and so are not part of the identity, with the reasons. A kind may have more such
keys (``Stage.neutral_keys``)."""
_SHOWN_IN = {
    "samples": "its report keeps the answers that it has",
    "train.eval_steps": "its curves keep the points that they have",
    "lora.save_merged": "`align merge` makes the merged copy",
}
"""Neutral keys whose change a user may expect to see, and the message when the stage does not run again for it."""

_SECRET = re.compile(
    r"token|(.*_)?((api|access|private|secret|auth)_?key|(api|access|auth|bearer|hf)_?token|secret|password|passwd)",
    re.IGNORECASE,
)

ContentDigest = Callable[[str], str]
"""Gives the content digest of what a reference names."""


def identify(loaded: LoadedRecipe, name: str, digest: ContentDigest) -> Identity:
    """The identity of stage ``name``.

    The recipe's model is an input unless the stage sets all keys that would default to it. Stages, converters and
    scorers of third parties are identified by the source of their module (not of the modules it imports), stages of
    this package by the version of their kind.
    """
    spec = loaded.recipe.stages[name]
    inputs = {referred.text: digest(referred.text) for referred in loaded.references(name)}
    inputs |= {f"code:{module}": _source_digest(module) for module in sorted(set(_foreign_modules(spec)))}
    model = loaded.recipe.model if needs_model(spec) else None
    if model is not None:
        location = digest(model.path)
        inputs[model.path] = f"{location}@{model.revision or 'newest'}" if location.startswith("hub:") else location
        if model.chat_template is not None:
            inputs[model.chat_template] = digest(model.chat_template)
    return Identity(
        kind=spec.kind,
        config=normalised(spec),
        seed=loaded.recipe.seed if spec.seed is None else spec.seed,
        model=None if model is None else redact(model.model_dump(mode="json")),
        inputs=inputs,
        version=type(spec).version,
    )


def normalised(spec: Stage) -> dict[str, Any]:
    """A stage's keys with defaults filled in, without those that do not change the result; secrets are hidden."""
    return _split(spec)[0]


def neutral_values(spec: Stage) -> dict[str, Any]:
    """The dotted keys that do not change the result, with their values. They are saved with the result, but are not
    part of its identity."""
    return _split(spec)[1]


def _split(spec: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
    config: dict[str, Any] = redact(spec.model_dump(mode="json", exclude={"kind", "seed"}))
    return config, _take_out(config, spec)


def _take_out(config: dict[str, Any], spec: Stage) -> dict[str, Any]:
    """Remove the keys that are neutral for ``spec`` from ``config``; returns them, dotted, with their values."""
    neutral: dict[str, Any] = {}
    for key in (*NEUTRAL, *spec.neutral_keys()):
        *parents, last = key.split(".")
        part: Any = config
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if isinstance(part, dict) and last in part:
            neutral[key] = part.pop(last)
    return neutral


def as_of_now(old: Identity, spec: Stage) -> Identity:
    """The identity of an earlier result in the form of this version: keys that are neutral now are removed, and keys
    that did not exist get their defaults. Otherwise stages would run again only because the schema changed. (If a
    default changes what a stage computes, the kind needs a new version.)"""
    config = copy.deepcopy(dict(old.config))
    _fill_in(config, spec)
    _take_out(config, spec)
    return replace(old, config=config)


def _fill_in(old: Any, now: Any) -> None:
    """Add the keys that ``now`` has in addition to ``old``, with their defaults; ``old`` is a dump of an earlier
    version of ``now``."""
    if isinstance(now, BaseModel) and isinstance(old, dict):
        for name, field in type(now).model_fields.items():
            if name in old:
                _fill_in(old[name], getattr(now, name))
            elif not field.is_required() and not {"kind", "seed"} & {name}:
                default = field.get_default(call_default_factory=True, validated_data={})
                old[name] = to_jsonable_python(default)
    elif isinstance(now, (list, tuple)) and isinstance(old, list) and now:
        for i, item in enumerate(old):
            _fill_in(item, now[min(i, len(now) - 1)])


def redact(value: Any) -> Any:
    """``value`` without passwords, tokens and keys, which are recognised by the names of their entries and by their
    form.

    Each is replaced by the beginning of its digest, so that a change can still be seen.
    """
    if isinstance(value, Mapping):
        return {
            key: secrets.redacted(item) if isinstance(item, str) and _SECRET.fullmatch(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    key, _, text = value.partition("=")  # an override on the command line
    if text and _SECRET.fullmatch(key.rpartition(".")[2].lstrip("-").replace("-", "_")):
        return f"{key}={secrets.redacted(text)}"
    return secrets.hide(value)


def needs_model(spec: Stage) -> bool:
    """Does the stage start from the recipe's model?"""
    marks = {name: mark_of(field) for name, field in type(spec).model_fields.items()}
    policies = [name for name, mark in marks.items() if mark is not None and "policy" in mark.accepts]
    return not policies or any(getattr(spec, name) is None for name in policies)


def _foreign_modules(spec: Stage) -> Iterator[str]:
    """Modules outside this package whose code affects the result: those of the stage's kind and function, of converters
    of rows, of scorers, and of engines."""
    if ":" in spec.kind:
        yield spec.kind.partition(":")[0]
        yield spec.implementation.partition(":")[0]
    for part in _models(spec):
        if isinstance(part, DataSource) and part.own_format is not None:
            yield part.own_format.partition(":")[0]
        elif isinstance(part, FunctionScorer):
            yield part.function.partition(":")[0]
        elif isinstance(part, Rollout) and ":" in part.engine:
            yield from (text.partition(":")[0] for text in (part.engine, part.opens))


def _models(value: Any) -> Iterator[BaseModel]:
    """A pydantic model and all models inside it."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _models(getattr(value, name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _models(item)


def _source_digest(module: str) -> str:
    loaded = sys.modules.get(module)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {module}: {error}") from error
    if spec is None or spec.origin is None:
        raise InputError(f"cannot import {module}: no such module")
    return files.sha256_file(Path(spec.origin))


# What changed


def explain(old: Identity, new: Identity) -> str:
    """A few words about why the result of ``old`` is not that of ``new``."""
    if old.kind != new.kind:
        return f"kind changed: {old.kind} -> {new.kind}"
    if old.schema_version != new.schema_version:
        return "made by another version of align"
    if old.version != new.version:
        return f"made by version {old.version} of the kind {new.kind}, which is at version {new.version}"
    before, after = {**old.config, "seed": old.seed}, {**new.config, "seed": new.seed}
    # If only one has a model, the policy key was set or removed, which is a difference of the config
    if old.model is not None and new.model is not None:
        before, after = before | {"model": old.model}, after | {"model": new.model}
    changes = list(_changes(before, after))
    if changes:
        said = [change for change in changes if not (_says_nothing(change[1]) and _says_nothing(change[2]))] or changes
        shown = [f"{key} {_show(one)} -> {_show(other)}" for key, one, other in said[:3]]
        more = f" and {len(said) - 3} more" if len(said) > 3 else ""
        return f"config changed: {', '.join(shown)}{more}"
    texts = [text for text in new.inputs if old.inputs.get(text) != new.inputs[text]]
    return f"input {', '.join(texts)} changed"


def _changes(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) of each difference. A block that is only on one side is a single
    difference."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        pairs = [(str(name), before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in {**before, **after}]
    elif all(
        isinstance(side, (list, tuple)) and all(isinstance(item, Mapping) for item in side) for side in (before, after)
    ):
        pairs = [(str(i), *pair) for i, pair in enumerate(itertools.zip_longest(before, after, fillvalue=_ABSENT))]
    else:
        if before != after:
            yield key, before, after
        return
    for name, one, other in pairs:
        yield from _changes(one, other, f"{key}.{name}" if key else name)


def _says_nothing(value: Any) -> bool:
    """Whether a key is absent or has no value."""
    return value is _ABSENT or value is None or value in ([], (), {})


def left_as_it_was(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A note about changed neutral keys whose effect the result, which is up to date, does not show; empty if there are
    none."""
    changed = [key for key in _SHOWN_IN if key in old and key in new and old[key] != new[key]]
    return "; ".join(
        f"{key} {_show(old[key])} -> {_show(new[key])} trains nothing: {_SHOWN_IN[key]}" for key in changed
    )


_ABSENT = object()


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings by dotted key, in the form of problems and overrides. An empty mapping
    counts as a value."""
    if isinstance(value, Mapping) and (value or not key):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {key: value}
    return {k: v for name, item in items for k, v in flat(item, f"{key}.{name}" if key else name).items()}


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = re.sub(r"e([+-])0+", r"e\1", repr(value)) if isinstance(value, float) else _text(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _text(value: Any) -> str:
    """A value on one line: for a mapping its path if it has one, else its entries that have a value."""
    if isinstance(value, Mapping):
        if isinstance(value.get("path"), str):
            return str(value["path"])
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items() if not _says_nothing(item)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)
