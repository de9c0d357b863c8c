"""The keys of benchmarks that an evaluation can run on a file; `task` says which one it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import DataSource, Strict, unknown_name


def _source(value: Any) -> Any:
    """Makes a source of a path."""
    return {"path": value} if isinstance(value, str) else value


Rows = Annotated[DataSource, BeforeValidator(_source)]
"""One source of rows in a benchmark's own format."""


class Task(Strict):
    """A benchmark, with its rows from a file of yours or from the hub."""

    task: str
    """Which benchmark this is."""
    data: Rows
    """The benchmark's rows, in its own format: a file, or a hub data set id."""

    @model_validator(mode="after")
    def _own_format(self) -> Task:
        if self.data.reading is not None or self.data.weight is not None:
            raise ValueError(f"{self.task} has a row format of its own: `format` and `weight` do not belong here")
        return self


class AskedTask(Task):
    """A benchmark whose rows every policy is asked once; a program grades the answer."""

    columns: ClassVar[frozenset[str]]
    """Columns that every row of the benchmark must have."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest answer, in tokens. A longer one is cut, and graded as it is."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 always takes the likeliest token."""


class IfevalTask(AskedTask):
    """IFEval (https://arxiv.org/abs/2311.07911): does the policy follow instructions that a program can check? All 25
    kinds, strict and loose. Rows have `key`, `prompt`, `instruction_id_list` and `kwargs`. Needs the extra `eval`."""

    columns: ClassVar[frozenset[str]] = frozenset({"prompt", "instruction_id_list", "kwargs"})

    task: Literal["ifeval"]
    """`ifeval`"""
    max_new_tokens: int = Field(default=1280, ge=1)
    """Longest answer, in tokens; 1280 is what most reports of the benchmark allow."""


class Gsm8kTask(AskedTask):
    """GSM8K (https://arxiv.org/abs/2110.14168): word problems whose answer is one number. The policy's number has to be
    equal to it. Rows have `question`, and an `answer` that ends with `#### NUMBER`."""

    columns: ClassVar[frozenset[str]] = frozenset({"question", "answer"})

    task: Literal["gsm8k"]
    """`gsm8k`"""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    few_shot: int = Field(default=0, ge=0)
    """Worked examples before each problem, as earlier turns of the conversation: the first rows of `examples`."""
    examples: Rows | None = None
    """Rows for worked examples, in the same format; none of them may be in `data`."""

    @model_validator(mode="after")
    def _examples_for_few_shot(self) -> Gsm8kTask:
        if bool(self.few_shot) != (self.examples is not None):
            raise ValueError("few_shot and examples need each other")
        return self


class RewardBenchTask(Task):
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


TASKS: dict[str, type[Task]] = {"ifeval": IfevalTask, "gsm8k": Gsm8kTask, "reward_bench": RewardBenchTask}
ASKED: dict[str, type[AskedTask]] = {name: task for name, task in TASKS.items() if issubclass(task, AskedTask)}
"""The benchmarks that policies answer."""


def _task(value: Any) -> Any:
    """A mapping is validated by the class that its `task` names."""
    if isinstance(value, Task):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("task"), str):
        raise ValueError(f"expected a mapping with `task` (one of {', '.join(TASKS)}) and `data`")
    name = value["task"]
    if name not in TASKS:
        error = InputError(f"no task `{name[:80]}`; known: {', '.join(TASKS)}")
        details = InitErrorDetails(type=unknown_name(error, TASKS), loc=("task",), input=name)
        raise ValidationError.from_exception_data("Task", [details]) from error
    return TASKS[name].model_validate(value)


Benchmark = Annotated[IfevalTask | Gsm8kTask | RewardBenchTask, BeforeValidator(_task)]
"""The type of a recipe field that holds a task."""
