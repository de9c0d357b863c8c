"""How many positions a model has, read from its configuration. Imports no torch.

A model with learned positions has an embedding for each and fails after the last one. Rotary positions have no end, but
the model was not trained on any after ``max_position_embeddings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError, Problem
from align.model_families import family_of
from align.models.files.folder import ADAPTER_CONFIG, read_folder
from align.models.files.identity import is_gguf

_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class Positions:
    """A model's maximum length."""

    limit: int
    """In tokens."""
    hard: bool
    """Does the forward pass fail on longer inputs?"""


def positions(config: Mapping[str, Any]) -> Positions | None:
    """Maximum length from a model's ``config.json``; None when that does not say."""
    family, text = family_of(config.get("model_type")), config.get("text_config") or config
    if family.no_positions.of(config):
        return None
    limit = next((text[key] for key in _KEYS if isinstance(text.get(key), int)), None)
    if limit is None or limit <= 0:
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    original = scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None
    if isinstance(original, int) and isinstance(scaling.get("factor"), (int, float)):
        limit = max(limit, int(original * scaling["factor"]))
    return Positions(limit, family.table_of_positions)


def positions_at(path: Path) -> Positions | None:
    """Maximum length of the model at ``path``: a folder, an adapter's folder (then of its base), or a .gguf file; None
    when nothing says."""
    if is_gguf(path):
        from align.models.files.gguf import header

        metadata = header(path)
        kind = metadata.get("general.architecture")
        limit = metadata.get(f"{kind}.context_length")
        return Positions(limit, family_of(kind).table_of_positions) if isinstance(limit, int) else None
    if (path / ADAPTER_CONFIG).is_file():
        folder = read_folder(path, None)
        noted = (folder.notes.get("base") or {}).get("path") or (folder.adapter or {}).get("base_model_name_or_path")
        return positions_at(Path(noted)) if noted and Path(noted).exists() else None
    return positions(read_folder(path, None).config)


def require_positions(positions: Positions | None, tokens: int, what: str, hint: str) -> str | None:
    """A note when ``tokens`` exceed the maximum length of a model; None when they do not. The note begins with ``what``
    the tokens are; ``what`` is empty when a recipe key in front of the note says it.

    Raises:
        InputError: the model fails after its last position.
    """
    if positions is None or tokens <= positions.limit:
        return None
    said = f"{what}: {tokens:,} tokens" if what else f"{tokens:,} tokens"
    if positions.hard:
        raise InputError(
            Problem(f"{said}, the model has {positions.limit:,} positions and none behind them", hint=hint)
        )
    return f"{said}, the model was made for {positions.limit:,} positions (max_position_embeddings)"
