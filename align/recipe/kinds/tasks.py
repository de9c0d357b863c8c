"""Evaluation tasks as a recipe names them: what each may be told, and where its code is.

A new task that policies answer is a class here, its line in :data:`TASKS`, and a module of its own with the class that
:attr:`AskedTask.implementation` names (:mod:`align.evaluation.tasks.task` says what that has). Nothing else knows one
task from another. A third party's task is such a class of theirs, named as ``package.module:Class``. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import DataSource, Strict, unknown_name
from align.recipe.reference_syntax import import_object, names_code, registered, shipped_root


def _source(value: Any) -> Any:
    """Makes a source of a path."""
    return {"path": value} if isinstance(value, str) else value


Rows = Annotated[DataSource, BeforeValidator(_source)]
"""One source of rows in a task's own format."""


class TaskSpec(Strict):
    """A benchmark, with its rows from a file of yours or from the hub."""

    task: str
    """Which benchmark this is."""
    data: Rows
    """The benchmark's rows, in its own format: a file, or a hub data set id."""

    @model_validator(mode="after")
    def _own_format(self) -> TaskSpec:
        if self.data.reading is not None or self.data.weight is not None:
            raise ValueError(f"{self.task} has a row format of its own: `format` and `weight` do not belong here")
        return self


class AskedTask(TaskSpec):
    """A benchmark whose rows every policy is asked once; a program grades the answer."""

    implementation: ClassVar[str]
    """`module:Class` of a subclass of `align.evaluation.tasks.task.Task`, imported when the task is run, looked at
    before a run, or shown in a report. It may import no torch when it is imported."""
    columns: ClassVar[frozenset[str]]
    """Columns that every row of the benchmark must have. `align eval` finds the file of a task by them."""
    row_format: ClassVar[str | None] = None
    """How a row becomes a prompt: what a data source may say as `format`, such as `module:function`. None for rows that
    are prompts already, in any of the formats that are recognised."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest answer, in tokens. A longer one is cut, and graded as it is."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 always takes the likeliest token."""

    def sources(self) -> Iterator[tuple[str, DataSource]]:
        """(key, source) of everything that it reads, as prompts."""
        yield "data", self._as_prompts(self.data)

    def _as_prompts(self, source: DataSource) -> DataSource:
        return source.model_copy(update={"format": self.row_format})


class FewShotTask(AskedTask):
    """A benchmark that can show worked examples first."""

    few_shot: int = Field(default=0, ge=0)
    """Worked examples before each problem, as earlier turns of the conversation: the first rows of `examples`."""
    examples: Rows | None = None
    """Rows for worked examples, in the same format; none of them may be in `data`."""

    @model_validator(mode="after")
    def _examples_for_few_shot(self) -> FewShotTask:
        if bool(self.few_shot) != (self.examples is not None):
            raise ValueError("few_shot and examples need each other")
        return self

    def sources(self) -> Iterator[tuple[str, DataSource]]:
        """See :meth:`AskedTask.sources`; the examples too."""
        yield from super().sources()
        if self.examples is not None:
            yield "examples", self._as_prompts(self.examples)


class IfevalTask(AskedTask):
    """IFEval (https://arxiv.org/abs/2311.07911): does the policy follow instructions that a program can check? All 25
    kinds, strict and loose. Rows have `key`, `prompt`, `instruction_id_list` and `kwargs`. Needs the extra `eval`."""

    implementation: ClassVar[str] = "align.evaluation.tasks.ifeval:Ifeval"
    columns: ClassVar[frozenset[str]] = frozenset({"prompt", "instruction_id_list", "kwargs"})
    row_format: ClassVar[str | None] = "align.evaluation.tasks.ifeval:as_prompt"

    task: Literal["ifeval"]
    """`ifeval`"""
    max_new_tokens: int = Field(default=1280, ge=1)
    """Longest answer, in tokens; 1280 is what most reports of the benchmark allow."""


class Gsm8kTask(FewShotTask):
    """GSM8K (https://arxiv.org/abs/2110.14168): word problems whose answer is one number. The policy's number has to be
    equal to it. Rows have `question`, and an `answer` that ends with `#### NUMBER`."""

    implementation: ClassVar[str] = "align.evaluation.tasks.gsm8k:Gsm8k"
    columns: ClassVar[frozenset[str]] = frozenset({"question", "answer"})
    row_format: ClassVar[str | None] = "align.evaluation.tasks.gsm8k:as_prompt"

    task: Literal["gsm8k"]
    """`gsm8k`"""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""


class RewardBenchTask(TaskSpec):
    """A benchmark of the stage's `scorers` and `judge`, not of policies: RewardBench 1 or 2, RM-Bench or JudgeBench,
    recognised by the columns of your copy of its official file. [What is measured](evaluate.md#reward-benchmarks)."""

    task: Literal["reward_bench"]
    """`reward_bench`"""

    @model_validator(mode="after")
    def _whole_rows(self) -> RewardBenchTask:
        idle = [key for key in ("unique", "explode", "ignore") if getattr(self.data, key)]
        if self.data.on_bad_row == "skip":
            idle.append("on_bad_row: skip")
        if idle:
            raise ValueError(
                f"a reward benchmark is taken as it is: remove `{idle[0]}`; `where` and `limit` choose rows"
            )
        return self


class ProbeTask(AskedTask):
    """A probe: a task with rows that come with the package, named in the stage's `probes`."""

    max_new_tokens: int = 256
    own_names: tuple[str, ...] = ()
    """The stage's `own_names`."""


class IdentityTask(ProbeTask):
    """Does the policy claim to be another company's assistant?"""

    implementation: ClassVar[str] = "align.evaluation.tasks.probes:IdentityProbe"
    columns: ClassVar[frozenset[str]] = frozenset({"prompt"})


class JsonTask(ProbeTask):
    """Does the policy write JSON, and nothing else, when asked to?"""

    implementation: ClassVar[str] = "align.evaluation.tasks.probes:JsonProbe"
    columns: ClassVar[frozenset[str]] = frozenset({"prompt", "required"})


TASKS: dict[str, type[TaskSpec]] = {"ifeval": IfevalTask, "gsm8k": Gsm8kTask, "reward_bench": RewardBenchTask}
"""By what `task` says in a recipe."""
ASKED: dict[str, type[AskedTask]] = {name: task for name, task in TASKS.items() if issubclass(task, AskedTask)}
"""The benchmarks that policies answer."""
PROBES: dict[str, type[ProbeTask]] = {"identity": IdentityTask, "json": JsonTask}
"""By what `probes` says in a recipe."""
_PROBE = "probe-"


def probe_task(name: str, own_names: list[str]) -> ProbeTask:
    """The probe of :data:`PROBES` with a name, as the task ``probe-NAME``."""
    rows = DataSource(path=str(shipped_root() / "data" / "probes" / f"{name}.jsonl"))
    return PROBES[name](task=_PROBE + name, data=rows, own_names=tuple(own_names))


def task_class(name: str) -> type[TaskSpec]:
    """The class of a task: built in, or a third party's as `package.module:Class`, which is imported.

    Raises :class:`InputError` when there is none, or when it is not a complete task that policies answer.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise InputError(f"no task `{name[:80]}`; known: {', '.join(TASKS)}, or your own as package.module:Class")
    return _imported(name)


def asked_class(name: str) -> type[AskedTask] | None:
    """The class of the task that policies answer, or of the probe, whose :attr:`TaskSpec.task` is ``name``; None where
    there is no such task.

    Raises as :func:`task_class` for a third party's.
    """
    if name.startswith(_PROBE):
        return PROBES.get(name.removeprefix(_PROBE))
    return _imported(name) if names_code(name) else ASKED.get(name)


def _imported(name: str) -> type[AskedTask]:
    """A third party's task."""
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, AskedTask)):
        raise InputError(f"`{name}` is not a subclass of align.recipe.schema.AskedTask")
    if not getattr(found, "columns", None):
        raise InputError(f"`{name}` needs a class variable `columns`: the columns that every row has")
    if not re.fullmatch(r"[\w.]+:\w+", getattr(found, "implementation", "")):
        raise InputError(f"`{name}` needs a class variable `implementation`, written module:Class")
    try:
        registered(found.implementation)
    except InputError as error:
        raise InputError(f"`{name}` has a class variable `implementation` that leads nowhere: {error}") from error
    return found


def _task(value: Any) -> Any:
    """A mapping is validated by the class that its `task` names."""
    if isinstance(value, TaskSpec):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("task"), str):
        raise ValueError(f"expected a mapping with `task` (one of {', '.join(TASKS)}) and `data`")
    name = value["task"]
    try:
        found = task_class(name)
    except InputError as error:
        details = InitErrorDetails(type=unknown_name(error, TASKS), loc=("task",), input=name)
        raise ValidationError.from_exception_data("Task", [details]) from error
    return found.model_validate(value)


if TYPE_CHECKING:
    TaskChoice = TaskSpec
else:
    TaskChoice = Annotated[SerializeAsAny[Union[(*TASKS.values(), AskedTask)]], BeforeValidator(_task)]
"""The type of a recipe field that holds a task; :class:`AskedTask` stands for those of third parties."""
