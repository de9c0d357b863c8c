"""Presets: known shapes of rows, from presets.yaml beside this file. Each is a mapping, with notes for the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True)
class PresetPart:
    """How the rows of one kind are read; nearly always all rows are of one kind."""

    mapping: dict[str, Any]
    where: dict[str, Any]
    """Places and the values there, by which such rows are recognised; None means that there is no value. Empty: all
    rows."""


@dataclass(frozen=True)
class Preset:
    """A known shape of rows; the keys are explained in presets.yaml."""

    hub: str
    kind: str
    says: str
    example: dict[str, Any]
    parts: tuple[PresetPart, ...]
    marks: tuple[str, ...] = ()
    holds: dict[str, str] = field(default_factory=dict)
    asks: str | None = None
    code: str | None = None
    test_set: bool = False


class _Presets(Mapping[str, Preset]):
    """All presets by name, loaded when the first one is looked up."""

    @staticmethod
    @cache
    def _all() -> dict[str, Preset]:
        with FILE.open(encoding="utf-8") as file:
            entries = yaml.safe_load(file)
        return {name: _preset(entry) for name, entry in entries.items()}

    def __getitem__(self, name: str) -> Preset:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def _preset(entry: dict[str, Any]) -> Preset:
    parts = entry.pop("parts", None) or [{"mapping": entry.pop("mapping")}]
    return Preset(
        **{**entry, "marks": tuple(entry.get("marks", ()))},
        parts=tuple(PresetPart(part["mapping"], part.get("where", {})) for part in parts),
    )


PRESETS: Mapping[str, Preset] = _Presets()
