"""The recipe schema, which defines all keys of a recipe. The reference manual is made from the docstrings under the
fields.

Models refuse unknown keys, are strict about types, and are frozen: a recipe is never rewritten. Imports no torch. The
parts are defined in the modules beside this one, and should be imported from here.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import (
    FORMATS,
    ArtifactType,
    Condition,
    Data,
    DataSource,
    Model,
    PolicyRef,
    Reference,
    Stage,
    Strict,
    as_model,
    name_of_run,
    name_of_stage,
    unknown_name,
)
from align.recipe.blocks.rollout import AutoRollout, Rollout, RolloutChoice
from align.recipe.blocks.train import DpoTrain, Lora, Train
from align.recipe.kinds import KINDS
from align.recipe.kinds.evaluate import EvaluateStage
from align.recipe.kinds.judge import Judge
from align.recipe.kinds.ppo import Health, PpoStage, PpoTrain
from align.recipe.kinds.reward import RewardStage, RewardTrain
from align.recipe.kinds.sampling import LabelStage, SelectPromptsStage
from align.recipe.kinds.self_contrast import SelfContrastStage
from align.recipe.kinds.sft_dpo import DpoStage, SftStage
from align.recipe.kinds.tasks import AskedTask, FewShotTask
from align.recipe.kinds.trl import TrlStage
from align.recipe.language.effects import Needs
from align.recipe.reference_syntax import import_object, registered

__all__ = [
    "BUILTIN_STAGES",
    "FORMATS",
    "ArtifactType",
    "AskedTask",
    "AutoRollout",
    "Condition",
    "Data",
    "DataSource",
    "DpoStage",
    "DpoTrain",
    "EvaluateStage",
    "FewShotTask",
    "Hardware",
    "Health",
    "Judge",
    "LabelStage",
    "Lora",
    "Model",
    "PolicyRef",
    "PpoStage",
    "PpoTrain",
    "Recipe",
    "Reference",
    "RewardStage",
    "RewardTrain",
    "Rollout",
    "RolloutChoice",
    "SelectPromptsStage",
    "SelfContrastStage",
    "SftStage",
    "Stage",
    "Strict",
    "Train",
    "TrlStage",
    "stage_class",
]


def _shipped(place: str) -> type[Stage]:
    module, _, name = place.partition(":")
    kind: type[Stage] = getattr(import_module(f"align.recipe.kinds.{module}"), name)
    return kind


BUILTIN_STAGES = {kind: _shipped(shipped.place) for kind, shipped in KINDS.items()}
"""The schemas of the stage kinds that come with the package."""


def stage_class(kind: str) -> type[Stage]:
    """The schema of a stage kind: built in, or a third party's as `package.module:Class`, which is imported.

    Raises :class:`InputError` when there is none, or when it is not a complete stage.
    """
    if kind in BUILTIN_STAGES:
        return BUILTIN_STAGES[kind]
    if ":" not in kind:
        raise InputError(
            f"no stage kind `{kind[:80]}`; known: {', '.join(BUILTIN_STAGES)}, or your own as package.module:Class"
        )
    imported = import_object(kind)
    if not (isinstance(imported, type) and issubclass(imported, Stage)):
        raise InputError(f"`{kind}` is not a subclass of align.recipe.schema.Stage")
    if getattr(imported, "produces", None) not in get_args(ArtifactType):
        raise InputError(f"`{kind}` needs a class variable `produces`, one of {', '.join(get_args(ArtifactType))}")
    if not re.fullmatch(r"[\w.]+:\w+", getattr(imported, "implementation", "")):
        raise InputError(f"`{kind}` needs a class variable `implementation`, written module:function")
    for name in ("plan", "view"):
        if (text := getattr(imported, name)) != getattr(Stage, name):
            try:
                registered(text)
            except InputError as error:
                raise InputError(f"`{kind}` has a class variable `{name}` that leads nowhere: {error}") from error
    return imported


def type_of(kind: Any) -> type[Stage]:
    """The class of a kind's stages; the base class :class:`Stage` if the kind, as a recipe or manifest writes it, is
    unknown or cannot be imported here."""
    try:
        return stage_class(kind) if isinstance(kind, str) else Stage
    except InputError:
        return Stage


def starting_field(kind: Any) -> str:
    """The field that names the model which stages of a kind start from; see :func:`type_of`."""
    return type_of(kind).starts_from


def _stage(value: Any) -> Any:
    """Validate a mapping by the class that its `kind` names."""
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("kind"), str):
        details = InitErrorDetails(
            type="string_type" if "kind" in value else "missing", loc=("kind",), input=value.get("kind")
        )
        raise ValidationError.from_exception_data("Stage", [details])
    try:
        found = stage_class(value["kind"])
    except InputError as error:
        details = InitErrorDetails(type=unknown_name(error, BUILTIN_STAGES), loc=("kind",), input=value["kind"])
        raise ValidationError.from_exception_data("Stage", [details]) from error
    return found.model_validate(value)


class Hardware(Strict):
    """The machine that a recipe is meant for. `align plan` takes it as the budget; it has no effect on a run."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs("nodes", lambda hardware: hardware.gpus, "without gpus: one process trains"),
    )

    gpus: int = Field(default=0, ge=0)
    """GPUs of one node; 0 trains on the CPU. One process for each."""
    memory_gb: float = Field(gt=0)
    """Memory of one GPU, or of the machine when `gpus` is 0, in GB (10^9 bytes)."""
    nodes: int = Field(default=1, ge=1)
    """Machines."""
    disk_gb: float | None = Field(default=None, gt=0)
    """Free disk space for the run folder, in GB; not checked when absent."""


class Recipe(Strict):
    """A pipeline: a model and the stages that it goes through, in the order given by their references."""

    name: Annotated[str, AfterValidator(name_of_run)]
    """Name of the run, and of its folder under `runs/`."""
    seed: int = Field(default=17, ge=0)
    """All random choices (shuffling, sampling, new weights) follow from this number."""
    model: Annotated[Model, BeforeValidator(as_model)]
    """The model to start from: a reference, or a mapping with more."""
    hardware: Hardware | None = None
    """The machine that the recipe is meant for; when absent, the machine that it is run on. `align plan` uses it."""
    stages: dict[
        Annotated[str, AfterValidator(name_of_stage)], Annotated[SerializeAsAny[Stage], BeforeValidator(_stage)]
    ] = Field(min_length=1)
    """Stage name to stage. `stage:NAME` elsewhere refers to its result."""
