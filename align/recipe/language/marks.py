"""What marks a field of the schema as a reference to something outside the recipe, and what such a field may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArtifactType = Literal["policy", "reward_model", "preferences", "prompts", "metrics"]
"""What a stage produces, and what a reference may ask for."""
RecordType = Literal["conversation", "preference", "unpaired", "graded", "prompt"]
"""What a stage works on. ``unpaired`` is for stages that learn from labelled answers: they also take preferences."""


@dataclass(frozen=True)
class Reference:
    """Marks a string field as a reference: ``stage:NAME``, ``package:PKG/FILE``, a path, or a hub id.

    ``accepts`` are the artefact types that fit when it names a stage; ``hub`` says whether a hub id fits.
    """

    accepts: tuple[ArtifactType, ...] = ()
    hub: bool = True
