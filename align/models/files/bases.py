"""Finding the base that an adapter was trained on. It may have moved, so it is recognised by its content. Imports no
torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from align.errors import InputError, Problem
from align.models.files.folder import NOTES, ModelFolder
from align.models.files.identity import is_local, model_digest
from align.recipe.schema import Model

_KNOWN: ContextVar[tuple[Model, ...]] = ContextVar("known_models", default=())


@contextmanager
def known_models(models: Sequence[Model]) -> Iterator[None]:
    """Inside, the base of an adapter is also looked for among ``models`` when it is not where it was."""
    token = _KNOWN.set(tuple(models))
    try:
        yield
    finally:
        _KNOWN.reset(token)


def relative_to(folder: Path, path: str) -> str | None:
    """``path`` relative to ``folder``, which stays valid when both move together; None for a hub id."""
    return os.path.relpath(path, folder.resolve()) if os.path.isabs(path) else None


def adapter_base(folder: ModelFolder) -> Model:
    """The base of an adapter. Looks at the base's old path, at the same path relative to the adapter (both may have
    moved together), and at other known models, and returns the first that has the right content.

    Raises:
        InputError: none of them is.
    """
    base = folder.notes.get("base")
    if base is None:  # made by another tool, which saves no digest
        return _of_another_tool(folder)
    places = [Model(path=base["path"], revision=base.get("revision"))]
    if isinstance(beside := folder.notes.get("base_from_here"), str):
        places.append(Model(path=os.path.normpath(folder.path.resolve() / beside)))
    digests: dict[str, str] = {}
    for model in (*places, *_KNOWN.get()):
        if model.path in digests or (is_local(model.path) and not Path(model.path).expanduser().exists()):
            continue
        try:
            digests[model.path] = model_digest(model.path, model.revision)
        except InputError:  # something else is there now
            continue
        if digests[model.path] == base["digest"]:
            return Model(path=model.path, revision=model.revision)
    where, first = str(folder.path / NOTES), next(iter(digests), None)
    hint = f"it has the digest {base['digest'][:12]}; put it back there, or beside the adapter as it was"
    if first is None or first not in {place.path for place in places}:
        raise InputError(Problem(f"the adapter's base is gone: {base['path']}", file=where, hint=hint))
    problem = (
        f"{first} is not the model that the adapter was trained on (digest {digests[first][:12]}, expected"
        f" {base['digest'][:12]})"
    )
    raise InputError(Problem(problem, file=where))


def _of_another_tool(folder: ModelFolder) -> Model:
    """The base by the name in PEFT's configuration: a hub id, a path, or a path relative to the adapter's folder."""
    adapter = folder.adapter or {}
    name = str(adapter["base_model_name_or_path"])
    beside = folder.path / name
    if is_local(name) and not Path(name).expanduser().exists() and beside.exists():
        name = str(beside)
    return Model(path=name, revision=adapter.get("revision"))
