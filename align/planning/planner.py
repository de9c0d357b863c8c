"""What a kind of stage can tell before it runs: the rows of its plan, its requirements, and checks of its data.

`Stage.plan` names a :class:`Planner`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.errors import Problem
from align.pipeline.folder import RunFolder
from align.planning.starting_model import StartingModel, origin_of
from align.recipe.load import LoadedRecipe
from align.recipe.reference_syntax import registered
from align.recipe.schema import DataSource, Stage
from align.sizing.machine import Machine


@dataclass(frozen=True)
class PlanRow:
    """One value of a plan."""

    name: str
    value: str
    source: str
    """How the value was found, such as the key that sets it."""


@dataclass(frozen=True)
class DataSize:
    """How much data a stage trains on; numbers are for one pass over the data unless stated."""

    source: str
    """How the numbers were found, or why they are unknown."""
    examples: int | None = None
    tokens: int | None = None
    """Number of tokens of the data."""
    targets: int | None = None
    """Number of trained tokens."""
    steps: int | None = None
    """Optimiser steps of the whole stage, if they were counted."""
    seen: int | None = None
    """Tokens of all those steps."""
    at_once: int | None = None
    """Tokens of the largest forward pass of all those steps."""
    longest: int | None = None
    """Tokens of the longest row: counted with the answers that share its prompt, or estimated from the longest line."""
    bound: str = ""
    """The upper bound of an amount that is unknown."""


@dataclass(frozen=True)
class ToPlan:
    """A stage to plan, with the recipe, run folder and machine."""

    loaded: LoadedRecipe
    name: str
    run: RunFolder
    machine: Machine
    processes: int
    measured_speed: float | None = None
    """Tokens per second of its last run, if there was one."""

    @property
    def spec(self) -> Any:
        """The stage's part of the recipe, which has the type of the planner's kind."""
        return self.loaded.recipe.stages[self.name]

    @cached_property
    def origin(self) -> StartingModel:
        """The model that it starts from. Raises as :func:`origin_of`."""
        return origin_of(self.loaded, self.name, self.run)


@dataclass(frozen=True)
class Derived:
    """The planned values of a stage."""

    rows: tuple[PlanRow, ...] = ()
    memory: float | None = None
    """Predicted peak bytes of one process."""
    problems: tuple[Problem, ...] = ()
    """What cannot fit."""


Check = Callable[[], object]
"""Raises :class:`~align.errors.AlignError` when something is missing."""
Faults = Callable[[Path], list[Problem]]
"""Returns what is wrong with the first rows of the source at a path."""


class Planner:
    """Tells what is known about stages of a kind before they run. This base class knows nothing; :attr:`Stage.plan`
    names a kind's subclass."""

    def plan(self, stage: ToPlan) -> Derived:
        """The values that follow from the recipe, the data, the model and the machine.

        Raises :class:`~align.planning.data_size.UnreadableData` for bad data, InputError for a model that cannot be
        read.
        """
        return Derived()

    def makes(self, loaded: LoadedRecipe, name: str, run: RunFolder) -> DataSize | None:
        """An upper bound of what a stage that has not run yet will make, for the plan of a stage that reads it; None if
        unknown."""
        return None

    def needs(self, spec: Any) -> Iterator[tuple[str, Check]]:
        """(key, check) for each requirement of the stage besides model, trackers, engine and adapters, which are
        checked for all kinds."""
        yield from ()

    def looks_at(self, spec: Any) -> Iterator[tuple[str, DataSource, Faults]]:
        """(key, source, check of its rows) for data that have their own reader and are therefore not in
        :meth:`Stage.sources`."""
        yield from ()

    def look_at_start(self, spec: Any, folder: Path) -> None:
        """Raises InputError when the stage cannot start from the model in ``folder`` for a reason that only this kind
        has."""


def planner_of(spec: Stage) -> Planner:
    """The planner of a stage's kind. Raises :class:`~align.errors.InputError` when a third party's cannot be
    imported."""
    planner: Planner = registered(type(spec).plan)()
    return planner
