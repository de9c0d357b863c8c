"""Digests of models by content, which results of stages and saved adapters refer to. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.files import digest_json, sha256_file
from align.models.files.folder import HEAD, read_folder
from align.models.files.hub import cached_commit


def is_gguf(path: Path) -> bool:
    """Is this a GGUF file, by its name?"""
    return path.suffix == ".gguf" and not path.is_dir()


def is_local(location: Path | str) -> bool:
    """Is this a path and not a hub id?"""
    return isinstance(location, Path) or Path(location).exists() or not _like_hub_id(location)


def _like_hub_id(text: str) -> bool:
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not text.endswith(".gguf")


def model_digest(location: Path | str, revision: str | None = None) -> str:
    """Digest of a model's weights and configuration (not of its tokenizer, which the encoder's digest covers).

    A folder: sha256 over the names and sha256 sums of its safetensors and ``config.json``; of an adapter: over its
    weights, its settings and its base's digest, so that the digest stays the same when both move. A GGUF file: its
    sha256. A hub id: the id and the commit, or the branch if the model is neither downloaded nor pinned.

    Raises:
        InputError: a local model is incomplete.
    """
    if not is_local(location):
        return f"hub:{location}@{cached_commit(str(location), revision) or revision or 'main'}"
    path = Path(location).expanduser()
    if is_gguf(path) and path.is_file():
        return sha256_file(path)
    folder = read_folder(path, None)
    weights = [*folder.weights, *([path / HEAD] if folder.is_reward_model else [])]
    parts: dict[str, Any] = {file.name: sha256_file(file) for file in weights}
    if folder.adapter is None:
        return digest_json(parts | {"config.json": sha256_file(path / "config.json")})
    settings = {
        key: value for key, value in folder.adapter.items() if key not in ("base_model_name_or_path", "revision")
    }
    base = folder.notes.get("base", {})
    return digest_json(
        parts | {"settings": settings, "base": base.get("digest") or folder.adapter.get("base_model_name_or_path")}
    )
