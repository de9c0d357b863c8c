"""How many positions a model has, read from its configuration. Imports no torch.

A model with learned positions has a row for each and cannot go on behind the last one. Rotary positions go on, but
behind ``max_position_embeddings`` the model has seen none in its own training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError, Problem
from align.models.files.folder import ADAPTER_CONFIG, read_folder
from align.models.files.identity import is_gguf

LEARNED = frozenset({"biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "opt"})
"""Model types whose forward pass fails behind their last position: a table of embeddings, of rotations or of biases
ends there."""
_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_WITHOUT = frozenset({"bloom"})
"""Model types whose positions have no end."""


@dataclass(frozen=True)
class Positions:
    """The length that a model was made for."""

    limit: int
    """In tokens."""
    hard: bool
    """Does the model fail behind it?"""


def positions(config: Mapping[str, Any]) -> Positions | None:
    """From a model's ``config.json``; None where it does not say."""
    kind, text = config.get("model_type"), config.get("text_config") or config
    if kind in _WITHOUT or (kind == "falcon" and config.get("alibi")):
        return None
    limit = next((text[key] for key in _KEYS if isinstance(text.get(key), int)), None)
    if limit is None or limit <= 0:
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    original = scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None
    if isinstance(original, int) and isinstance(scaling.get("factor"), (int, float)):
        limit = max(limit, int(original * scaling["factor"]))
    return Positions(limit, kind in LEARNED)


def positions_at(path: Path) -> Positions | None:
    """Those of the model at ``path``: a folder, an adapter's (its base's), or a .gguf file; None where nothing says."""
    if is_gguf(path):
        from align.models.files.gguf import header

        metadata = header(path)
        kind = metadata.get("general.architecture")
        limit = metadata.get(f"{kind}.context_length")
        return Positions(limit, kind in LEARNED) if isinstance(limit, int) else None
    if (path / ADAPTER_CONFIG).is_file():
        folder = read_folder(path, None)
        noted = (folder.notes.get("base") or {}).get("path") or (folder.adapter or {}).get("base_model_name_or_path")
        return positions_at(Path(noted)) if noted and Path(noted).exists() else None
    return positions(read_folder(path, None).config)


def require_positions(found: Positions | None, tokens: int, what: str, hint: str) -> str | None:
    """A note when ``tokens`` go beyond the positions that a model was made for; None when they do not. It begins with
    ``what`` they are; with nothing, where the key of a recipe says that.

    Raises:
        InputError: the model fails behind its last position.
    """
    if found is None or tokens <= found.limit:
        return None
    said = f"{what}: {tokens:,} tokens" if what else f"{tokens:,} tokens"
    if found.hard:
        raise InputError(Problem(f"{said}, the model has {found.limit:,} positions and none behind them", hint=hint))
    return f"{said}, the model was made for {found.limit:,} positions (max_position_embeddings)"
