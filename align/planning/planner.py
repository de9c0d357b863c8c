"""What a kind of stage says before it runs: the rows of its plan, what it needs of the machine, what it looks at.

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
    """Where it comes from."""


@dataclass(frozen=True)
class Amount:
    """What a stage trains on, once through the data unless said otherwise."""

    source: str
    """How it is known, or why it is not."""
    examples: int | None = None
    tokens: int | None = None
    """Unique tokens."""
    targets: int | None = None
    """Trained tokens."""
    steps: int | None = None
    """Optimiser steps of the whole stage, where they were counted."""
    seen: int | None = None
    """Tokens of all those steps."""
    at_once: int | None = None
    """Tokens of the largest forward pass of all those steps."""
    longest: int | None = None
    """Tokens of the longest row: counted with the answers that share its prompt, or estimated from the longest line."""
    bound: str = ""
    """What limits an amount that is not known."""


@dataclass(frozen=True)
class ToPlan:
    """A stage that would run, and where."""

    loaded: LoadedRecipe
    name: str
    run: RunFolder
    machine: Machine
    processes: int
    measured_speed: float | None = None
    """Tokens per second of its last run, if there was one."""

    @property
    def spec(self) -> Any:
        """Its part of the recipe, of the kind that the planner is for."""
        return self.loaded.recipe.stages[self.name]

    @cached_property
    def origin(self) -> StartingModel:
        """The model that it starts from. Raises as :func:`origin_of`."""
        return origin_of(self.loaded, self.name, self.run)


@dataclass(frozen=True)
class Derived:
    """What a plan says of a stage besides what it reads."""

    rows: tuple[PlanRow, ...] = ()
    memory: float | None = None
    """Predicted peak bytes of one process."""
    problems: tuple[Problem, ...] = ()
    """What cannot fit."""


Check = Callable[[], object]
"""Raises :class:`~align.errors.AlignError` where something is missing."""
Faults = Callable[[Path], list[Problem]]
"""What is wrong with the first rows of a source that lies at a place."""


class Planner:
    """What is known of a kind before it runs. As it is, nothing; a kind has a subclass, which :attr:`Stage.plan`
    names."""

    def plan(self, stage: ToPlan) -> Derived:
        """The values that follow from the recipe, the data, the model and the machine.

        Raises :class:`~align.planning.data_size.UnreadableData` for bad data, InputError for a model that cannot be
        read.
        """
        return Derived()

    def makes(self, loaded: LoadedRecipe, name: str, run: RunFolder) -> Amount | None:
        """What a stage that has not run yet will make at most, for the plan of a stage that reads it; None where that
        is not known."""
        return None

    def needs(self, spec: Any) -> Iterator[tuple[str, Check]]:
        """(key, check) of what the stage needs of the machine, besides its model, trackers, engine and adapters."""
        yield from ()

    def looks_at(self, spec: Any) -> Iterator[tuple[str, DataSource, Faults]]:
        """(key, source, what is wrong with its rows) of data that :meth:`Stage.sources` leaves out, since they have a
        reader of their own."""
        yield from ()

    def look_at_start(self, spec: Any, folder: Path) -> None:
        """Raises InputError when the stage cannot start from the model in a folder, for a reason of its own."""


def planner_of(spec: Stage) -> Planner:
    """The planner of a stage's kind. Raises :class:`~align.errors.InputError` when a third party's cannot be
    imported."""
    found: Planner = registered(type(spec).plan)()
    return found
