"""The plan of a stage that TRL trains: its arguments. Memory and time are not estimated, since TRL makes the
batches."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from align.planning.planner import Check, Derived, Planner, PlanRow, ToPlan
from align.planning.requirements import require_package
from align.recipe.kinds.trl_source import config_name
from align.recipe.schema import TrlStage


def rows(spec: TrlStage) -> Iterator[PlanRow]:
    """Rows about the arguments of the trainer."""
    yield PlanRow(
        "trained by",
        f"{spec.trainer} of TRL {version('trl')}",
        "its loop, loss and sampling; the data are encoded here",
    )
    yield PlanRow("learning rate", _number(spec.argument("learning_rate")), _source(spec, "learning_rate"))
    batch, accumulated = spec.argument("per_device_train_batch_size"), spec.argument("gradient_accumulation_steps")
    if isinstance(batch, int) and isinstance(accumulated, int):
        size = "per_device_train_batch_size x gradient_accumulation_steps"
        yield PlanRow("a step takes", f"{batch * accumulated} {_unit(spec)}", f"{size} ({batch} x {accumulated})")
    steps = spec.argument("max_steps")
    if isinstance(steps, int) and steps > 0:
        yield PlanRow("steps", f"{steps:,}", _source(spec, "max_steps"))
    else:
        yield PlanRow(
            "passes over the data", _number(spec.argument("num_train_epochs")), _source(spec, "num_train_epochs")
        )
    if spec.longest_answer is not None:
        yield PlanRow(
            "longest answer", f"{spec.longest_answer:,} tokens", _source(spec, str(spec.method.answer_length))
        )
    yield PlanRow(
        "memory, disk, time", "not estimated", "TRL's batches are padded, and its reference and samples are its own"
    )


def _unit(spec: TrlStage) -> str:
    if spec.method.rows != "prompts":
        return "answers, each with its label" if spec.method.rows == "answers" else "pairs"
    group = spec.argument("num_generations")
    return "prompts, two answers each" if group is None else f"sampled answers, {group} to each prompt"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _source(spec: TrlStage, name: str) -> str:
    return f"args.{name}" if name in spec.args else f"default of {config_name(spec.trainer)}"


class TrlPlanner(Planner):
    """Plans a stage that runs one of TRL's trainers."""

    def plan(self, stage: ToPlan) -> Derived:
        """See :meth:`Planner.plan`."""
        start = PlanRow("starts from", stage.origin.name, stage.origin.source)
        return Derived((start, *rows(stage.spec)))

    def needs(self, spec: TrlStage) -> Iterator[tuple[str, Check]]:
        """See :meth:`Planner.needs`."""
        yield "trainer", lambda: require_package("trl", "the trainer needs", "`align doctor` says what is missing")
