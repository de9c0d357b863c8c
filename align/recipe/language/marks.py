"""Marking a field of the schema as a reference, and the types of artefacts and records that fields may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArtifactType = Literal["policy", "reward_model", "preferences", "prompts", "metrics"]
"""Types of results of stages, which a reference may ask for."""
RecordType = Literal["conversation", "preference", "unpaired", "graded", "prompt"]
"""Types of records that stages read. Stages that read ``unpaired``, labelled answers, also accept preferences."""


@dataclass(frozen=True)
class Reference:
    """Marks a string field as a reference: ``stage:NAME``, ``package:PKG/FILE``, a path, or a hub id.

    ``accepts`` are the artefact types that fit when it names a stage; ``hub`` says whether a hub id fits.
    """

    accepts: tuple[ArtifactType, ...] = ()
    hub: bool = True
