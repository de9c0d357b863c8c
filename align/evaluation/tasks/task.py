"""The protocol of an evaluation task: what an evaluation needs to ask policies the rows of a benchmark and to grade the
answers, and what the report needs to show the result.

A task has a spec, which the recipe is read into (:class:`align.recipe.kinds.tasks.AskedTask`), and a subclass of
:class:`Task`, which the spec names. Rows become prompts by the spec's `row_format`; every policy answers them in the
task's mode; :meth:`Task.grade` gives the numbers of one answer, and :attr:`Task.measures` says what each of them is.
Imports no torch, since the report reads the measures.

Two things that an evaluation runs are no tasks in this sense. Reward benchmarks measure scorers and judges on answers
that the benchmark brings along, so no policy answers anything (:mod:`align.stages.evaluate.reward_bench`). The tasks of
lm-evaluation-harness are run by that program, which loads the model itself and gives means only
(:mod:`align.evaluation.tasks.lm_eval`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import isabstract
from typing import Any, ClassVar, Generic, TypeVar

from align.data.records import Prompt
from align.errors import InputError
from align.functional.intervals import SHARE, Direction, Range
from align.recipe.kinds.tasks import AskedTask, asked_class
from align.recipe.reference_syntax import registered

Grades = dict[str, tuple[float, float]]
"""Measure -> (points, points possible) of one answer: (1, 1) for a problem solved, (2, 3) for two of three instructions
followed. The mean over prompts is the sum of the points divided by the sum of the points possible, which may not depend
on the answer."""


@dataclass(frozen=True)
class TaskMeasure:
    """One number that a task gives."""

    key: str
    """Its name in :data:`Grades`, and in the report behind the task's: `gsm8k/exact_match`."""
    words: str
    """Name shown to the user."""
    better: Direction | None
    """Which way is better; None for what is neither good nor bad."""
    unit: str = ""
    """Unit of the number; empty for shares."""
    within: Range = SHARE
    """The least and the largest value that its mean can have."""

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.words}, {self.unit}" if self.unit else self.words


UNFINISHED = TaskMeasure("unfinished", "answers that never end", "down")
"""A measure that every task has besides its own: the share of answers that were cut at the maximum length."""


@dataclass(frozen=True)
class Generate:
    """A mode: the policy writes one answer to each prompt, and its text is graded."""

    max_new_tokens: int
    """Longest answer, in tokens; a longer one is cut, and graded as it is."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""


Spec = TypeVar("Spec", bound=AskedTask)


class Task(ABC, Generic[Spec]):
    """A task as one recipe asks for it."""

    measures: ClassVar[Sequence[TaskMeasure]]
    """What :meth:`grade` gives, in the order in which it is shown."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @property
    def name(self) -> str:
        """As the recipe names it; its metrics are called ``NAME/...``."""
        return self.spec.task

    @classmethod
    def require(cls) -> None:
        """Raises :class:`~align.errors.EnvironmentFault` where the machine lacks what the task needs, such as a Python
        package. Called before a run, and before the first row is read."""

    @property
    def mode(self) -> Generate:
        """How policies answer. There is one way so far; another one, such as choosing the likeliest of given options,
        is a class beside :class:`Generate` and a function beside its in :mod:`align.stages.evaluate.tasks`."""
        return Generate(self.spec.max_new_tokens, self.spec.temperature)

    @abstractmethod
    def grade(self, prompt: Prompt, answer: str) -> Grades:
        """The number of each of :attr:`measures` for the text of one answer. A row's other columns are in
        ``prompt.fields``."""

    def solution(self, row: Prompt) -> str:
        """What a worked example shows as the answer to a row. Only for tasks that have worked examples, whose spec is a
        :class:`~align.recipe.kinds.tasks.FewShotTask`."""
        raise NotImplementedError(f"{type(self).__name__} has no worked examples")


def open_task(spec: AskedTask) -> Task[Any]:
    """The task that a spec names. Raises :class:`~align.errors.InputError` when its module cannot be imported, or when
    what it names is no task."""
    return _implementation(type(spec))(spec)


def measures_of(name: str) -> Sequence[TaskMeasure]:
    """The measures of the task, or of the probe, whose metrics are called ``NAME/...``; none for other metrics.

    Raises :class:`~align.errors.InputError` for a third party's task as :func:`open_task`.
    """
    spec = asked_class(name)
    return () if spec is None else (*_implementation(spec).measures, UNFINISHED)


def _implementation(spec: type[AskedTask]) -> type[Task[Any]]:
    found = registered(spec.implementation)
    if not (isinstance(found, type) and issubclass(found, Task)) or isabstract(found):
        raise InputError(f"{spec.implementation} is no subclass of align.evaluation.tasks.task.Task with a `grade`")
    if not getattr(found, "measures", ()):
        raise InputError(f"{spec.implementation} needs a class variable `measures`")
    return found
