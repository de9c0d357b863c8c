"""Artefacts: folders with a manifest that says what the artefact is, what it was made from, and the sha256 of every
file."""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from align import files
from align.errors import AlignError, InputError, Problem

SCHEMA_VERSION = 1
"""Version of the manifest, which is part of every identity. Raising it makes all stages run again, so do that only when
the meaning of manifests changes; when the results of one kind change, raise that kind's `version`."""

MANIFEST = "manifest.json"

ACCOUNTS = ("report.json", "metrics.jsonl", "answers.jsonl", "trackers/", "rollouts/")
"""Files and folders of an artefact that report how it was made, with times. No stage reads those of another stage."""

_PACKAGES = (
    "alignkit",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "accelerate",
    "datasets",
    "trl",
)


@dataclass(frozen=True)
class Identity:
    """Everything that a stage's result depends on. Two runs with the same digest have the same result."""

    kind: str
    config: Mapping[str, Any]
    """The stage's keys with their defaults filled in, without those that do not change the result."""
    seed: int
    model: Mapping[str, Any] | None
    """The recipe's model, if the stage starts from it."""
    inputs: Mapping[str, str]
    """Content digest of everything the stage reads, by reference as written in the recipe."""
    schema_version: int = SCHEMA_VERSION
    version: int = 1
    """Version of the stage's kind (``Stage.version``)."""

    @property
    def digest(self) -> str:
        """Hex sha256 of all fields."""
        return files.digest_json(self.as_json())

    def as_json(self) -> dict[str, Any]:
        """As written to the manifest. Version 1 of a kind is left out, so that identities from before kinds had
        versions remain equal."""
        value = asdict(self)
        if self.version == 1:
            del value["version"]
        return value


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    type: str
    """Artefact type: policy, preferences, ..."""
    stage: str
    identity: Identity
    encoder: str | None = None
    """Digest of tokenizer, template and template settings, if the stage used an encoder."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the result does not depend on, by dotted key: how it was saved, and what its report shows."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``{"sha256": hex, "bytes": size}`` by relative path."""

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def digest(self) -> str:
        """Digest of the files, without :data:`ACCOUNTS`. A stage that runs again with an equal result therefore does
        not make the stages after it run again."""
        content = {name: entry["sha256"] for name, entry in self.files.items() if not name.startswith(ACCOUNTS)}
        return files.digest_json({"type": self.type, "files": content})

    def as_json(self) -> dict[str, Any]:
        """As written, with the sha256 of the manifest itself, so that damage to it is noticed too."""
        value = asdict(self)
        del value["identity"]
        value |= self.identity.as_json() | {"identity": self.identity.digest}
        return value | {"sha256": files.digest_json(value)}


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results may depend on, and Python's."""
    from align.recipe.blocks.rollout import ENGINES

    of_engines = [engine.package.distributions for engine in ENGINES.values() if engine.package is not None]
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *(name for names in of_engines for name in names)):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # optional
    return versions


def write_manifest(
    folder: Path,
    *,
    type: str,
    stage: str,
    identity: Identity,
    encoder: str | None,
    summary: Mapping[str, Any],
    neutral: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash every file in ``folder`` and write its manifest as the last file.

    Raises :class:`AlignError` when the folder is empty, or contains a link, whose target would not be part of the
    artefact.
    """
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise AlignError(f"stage {stage} left a link in its output: {name}", hint="an artefact holds files only")
        if path.is_file() and name != MANIFEST:
            entries[name] = {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
    if not entries:
        raise AlignError(f"stage {stage} left no output")
    manifest = Manifest(
        type=type,
        stage=stage,
        identity=identity,
        encoder=encoder,
        summary=_plain(summary),
        packages=package_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        neutral=dict(neutral or {}),
        files=entries,
    )
    files.write_json(folder / MANIFEST, manifest.as_json())
    return manifest


def _plain(value: Any) -> Any:
    """``value`` as JSON: a number that is not finite becomes its name, a NumPy or torch scalar a number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, (str, int, float, bool)) and hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artefact. Raises :class:`InputError` when there is none, or it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(Problem("no manifest.json, so this is not a finished artefact", file=str(folder)))
    try:
        value = json.loads(path.read_bytes())
        expected = value.pop("sha256")
        actual = files.digest_json(value)
        if actual != expected:
            raise InputError(
                Problem(f"damaged: sha256 is {actual[:12]}, expected {str(expected)[:12]}", file=str(path))
            )
        value.pop("identity")
        version = value.pop("version", 1)
        named = {name: value.pop(name) for name in Identity.__dataclass_fields__ if name != "version"}
        identity = Identity(version=version, **named)
        return Manifest(identity=identity, **value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(Problem(f"damaged: {type(error).__name__}: {error}"[:200], file=str(path))) from error


def verify(folder: Path, *, deep: bool = True) -> list[Problem]:
    """Compare an artefact with its manifest: presence and size of every file and, when ``deep``, its sha256.

    Returns what is wrong; empty if nothing is. Files that the manifest does not name are ignored.
    """
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return list(error.problems)
    problems = []
    for name, entry in sorted(manifest.files.items()):
        if damage := _compare(folder, name, entry, deep):
            problems.append(Problem(damage, file=str(folder / name)))
    return problems


def _compare(folder: Path, name: str, entry: Mapping[str, Any], deep: bool) -> str | None:
    try:
        path = files.inside(folder, folder / name)
    except InputError as error:
        return str(error)
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"damaged: {size} bytes, expected {entry['bytes']}"
    if deep and (actual := files.sha256_file(path)) != entry["sha256"]:
        return f"damaged: sha256 is {actual[:12]}, expected {str(entry['sha256'])[:12]}"
    return None


def artefact_digest(folder: Path) -> str:
    """Content digest of an artefact, from its manifest alone. Raises :class:`InputError`."""
    return read_manifest(folder).digest
