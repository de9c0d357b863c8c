"""Which model a stage starts from, and its shape, found without loading weights and without a network."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.models.files.folder import json_object
from align.pipeline.folder import RunFolder
from align.recipe import reference_syntax
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Model
from align.sizing import shapes
from align.sizing.shapes import Shape


@dataclass(frozen=True)
class StartingModel:
    """The model that a stage starts from, and what is known of it."""

    name: str
    """The name in the recipe; for a result of a stage also the model that this stage starts from."""
    source: str
    """The key that names it."""
    local: Model | None
    """The model with a path on this machine; None when it is not here."""
    gguf: bool
    shape: Shape | None
    """None when the shape is unknown."""
    shape_source: str


def origin_of(loaded: LoadedRecipe, stage: str, run: RunFolder) -> StartingModel:
    """Find the existing model that a stage starts from, going back through the stages before it.

    Raises :class:`InputError` when a local model's configuration cannot be read.
    """
    model, key = loaded.recipe.model, "model"
    trail: list[str] = []
    name: str | None = stage
    while name is not None:
        spec = loaded.recipe.stages[name]
        reference = spec.starting_model
        if not reference:
            break
        key = f"stages.{name}.{type(spec).starts_from}" if not trail else key
        ref = reference_syntax.parse(reference, loaded.root)
        name = ref.name if isinstance(ref, reference_syntax.StageRef) else None
        if name is None:
            model = Model(path=reference)
        else:
            trail.append(reference)
    written = " <- ".join([*trail, model.path])
    return _found(loaded, model, written, key)


def _found(loaded: LoadedRecipe, model: Model, written: str, key: str) -> StartingModel:
    location = reference_syntax.resolve(model.path, loaded.root)
    path = location if isinstance(location, Path) else _downloaded(location, model.revision)
    template = None if model.chat_template is None else str(reference_syntax.resolve(model.chat_template, loaded.root))
    local = None if path is None else model.model_copy(update={"path": str(path), "chat_template": template})
    if path is not None and path.suffix == ".gguf":
        return StartingModel(written, key, local, True, _gguf_shape(path), "metadata of the GGUF file")
    if path is not None:
        config = _config(path)
        shape = shapes.from_config(config)
        kind = str(config.get("model_type"))
        words = "its config.json" if shape else f"an architecture that is not counted here ({kind})"
        return StartingModel(written, key, local, False, shape, words)
    shape = shapes.KNOWN.get(str(location))
    words = "published configuration" if shape else "not on this machine; download it once to plan it"
    return StartingModel(written, key if shape else words, None, False, shape, words)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def _config(folder: Path) -> dict[str, Any]:
    """Content of ``config.json`` in a model's folder; for an adapter, which has none, a configuration that only says
    so."""
    path = folder / "config.json"
    if not path.is_file():
        return {"model_type": "adapter"}
    return json_object(path)


def _gguf_shape(path: Path) -> Shape | None:
    from align.models.files.gguf import header

    metadata = header(path)
    # A file without an LM head of its own shares the embedding. The name is looked for as it is stored: length, then
    # text.
    name = b"output.weight"
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tied = content.find(struct.pack("<Q", len(name)) + name, 0, 64 * 2**20) < 0
    return shapes.from_gguf(metadata, tied)
