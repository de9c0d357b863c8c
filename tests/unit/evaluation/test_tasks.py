"""The protocol of evaluation tasks: every task in the tables says all that an evaluation and the report need of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from align.data.records import Origin, Prompt
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.evaluation.tasks.task import UNFINISHED, Generate, Task, TaskMeasure, measures_of, open_task
from align.recipe.kinds import tasks
from align.recipe.kinds.tasks import ASKED, PROBES, AskedTask, FewShotTask, asked_class, probe_task, task_class
from align.recipe.schema import DataSource
from align.report.views.evaluate import EvaluateView
from align.runs.record import read_run
from tests.repo.test_imports import heavy_after
from tests.support.report_run import mean, write_run

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "#### 4", "#### 5"),
    "ifeval": (
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "None here.",
        "Here, one.",
    ),
    "probe-identity": ({"prompt": "Who are you?"}, "I am ChatGPT.", "I am an assistant."),
    "probe-json": ({"prompt": "JSON.", "required": ["a"]}, '{"a": 1}', '{"b": 1}'),
}
"""Of each task: a row, an answer that every measure counts, and one that none does."""


def spec_of(name: str, data: str = "rows.jsonl") -> AskedTask:
    if name.startswith("probe-"):
        return probe_task(name.removeprefix("probe-"), [])
    return ASKED[name].model_validate({"task": name, "data": data})


def test_every_task_is_tried_here() -> None:
    assert ROWS.keys() == {*ASKED, *(f"probe-{name}" for name in PROBES)}


@pytest.mark.parametrize("name", ROWS)
def test_a_task_says_all_of_itself(name: str) -> None:
    spec = spec_of(name)
    task = open_task(spec)
    assert task.name == name and asked_class(name) is type(spec)
    assert isinstance(task.mode, Generate) and task.mode.max_new_tokens == spec.max_new_tokens > 0
    assert spec.columns and spec.columns <= ROWS[name][0].keys() | {"required"}
    keys = [measure.key for measure in task.measures]
    assert keys and len({*keys, UNFINISHED.key}) == len(keys) + 1
    assert all(measure.words and measure.better in ("up", "down") for measure in task.measures)
    assert isinstance(spec, FewShotTask) == (type(task).solution is not Task.solution)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_prompt_whose_answers_are_graded(name: str, tmp_path: Path) -> None:
    if name == "ifeval":
        pytest.importorskip("if_verifiable")
    row, counted, passed_over = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    spec = spec_of(name, str(path))
    source = dict(spec.sources())["data"].model_copy(update={"path": str(path)})
    (prompt,) = read_records([source], [path], "prompt", seed=0, rejects=None)
    assert isinstance(prompt, Prompt)
    task = open_task(spec)
    for answer, count in ((counted, 1.0), (passed_over, 0.0)):
        assert task.grade(prompt, answer) == {measure.key: (count, 1.0) for measure in task.measures}


@pytest.mark.parametrize("name", ROWS)
def test_the_report_knows_which_way_each_measure_is_better(name: str, tmp_path: Path) -> None:
    """Of two policies, the second is clearly below the first."""
    below = {"a": mean(0.9, 0.01), "b": {**mean(0.4, 0.01), "difference": mean(-0.5, 0.01)}}
    metrics = {f"{name}/{measure.key}": below for measure in measures_of(name)}
    report = {"baseline": "a", "policies": ["a", "b"], "words": {}, "metrics": metrics, "measures": list(metrics)}
    stage = read_run(write_run(tmp_path / "r", ["compare"], compare=report)).stage("compare")
    said = {change.measure: change.verdict for change in EvaluateView().changes(stage) if change is not None}
    verdict = {"up": "worse", "down": "better"}
    assert said == {f"{name}/{m.key}": verdict[str(m.better)] for m in measures_of(name)}


def test_other_metrics_are_of_no_task() -> None:
    for name in ("score", "win_rate", "judge", "rewardbench1", "reward_bench", "lm-eval", "loss", "probe-other", ""):
        assert measures_of(name) == ()


def test_a_tasks_measures_are_read_without_torch() -> None:
    code = f"from align.evaluation.tasks.task import measures_of\nassert all(map(measures_of, {list(ROWS)}))"
    assert not heavy_after(code) & {"torch", "transformers", "vllm", "datasets"}


def test_the_unit_stands_behind_the_words() -> None:
    assert TaskMeasure("logprob", "log-prob of the number", "up", "nats").title == "log-prob of the number, nats"
    assert UNFINISHED.title == "answers that never end"


def test_worked_examples_are_read_as_the_rows_are() -> None:
    told = {"task": "gsm8k", "data": "rows.jsonl", "few_shot": 1, "examples": "shown.jsonl"}
    sources = dict(ASKED["gsm8k"].model_validate(told).sources())
    assert {key: (source.path, source.format) for key, source in sources.items()} == {
        "data": ("rows.jsonl", "align.evaluation.tasks.gsm8k:as_prompt"),
        "examples": ("shown.jsonl", "align.evaluation.tasks.gsm8k:as_prompt"),
    }
    task = open_task(spec_of("ifeval"))
    with pytest.raises(NotImplementedError, match="Ifeval has no worked examples"):
        task.solution(Prompt(({"role": "user", "content": "?"},), "p", Origin("f", 1)))


# A third party's


class Whole(AskedTask):
    """A complete one."""

    implementation: ClassVar[str] = f"{__name__}:WholeGrades"
    columns: ClassVar[frozenset[str]] = frozenset({"prompt"})


class WholeGrades(Task[Whole]):
    """The same answer to everything."""

    measures = (TaskMeasure("one", "ones", "up"),)

    def grade(self, prompt: Prompt, answer: str) -> dict[str, tuple[float, float]]:
        """Always right."""
        return {"one": (1.0, 1.0)}


class NoColumns(AskedTask):
    """Says nothing of its rows."""

    implementation = Whole.implementation


class NoCode(AskedTask):
    """Names no code."""

    columns = Whole.columns


class Nowhere(Whole):
    """Names code that is not there."""

    implementation = f"{__name__}:Nothing"


class NoTask(Whole):
    """Names code that is no task."""

    implementation = f"{__name__}:Whole"


class NoGrade(Whole):
    """Names a task that cannot grade."""

    implementation = "align.evaluation.tasks.task:Task"


class NoMeasures(Whole):
    """Names a task that says nothing of its numbers."""

    implementation = f"{__name__}:Unmeasured"


class Unmeasured(WholeGrades):
    """Without measures."""

    measures = ()


def test_a_third_partys_task_is_found_by_its_name() -> None:
    name = f"{__name__}:Whole"
    assert task_class(name) is Whole and [m.key for m in measures_of(name)] == ["one", "unfinished"]
    assert open_task(Whole(task=name, data=DataSource(path="a.jsonl"))).name == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("DataSource", "is not a subclass of align.recipe.schema.AskedTask"),
        ("NoColumns", "needs a class variable `columns`"),
        ("NoCode", "needs a class variable `implementation`, written module:Class"),
        ("Nowhere", "has a class variable `implementation` that leads nowhere"),
        ("Absent", "has no `Absent`"),
    ],
)
def test_a_class_that_is_no_complete_task_is_refused(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        task_class(f"{__name__}:{name}")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (NoTask, "is no subclass of align.evaluation.tasks.task.Task"),
        (NoGrade, "with a `grade`"),
        (NoMeasures, "`measures`"),
    ],
)
def test_code_that_is_no_task_is_refused(spec: type[AskedTask], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        open_task(spec(task="t", data=DataSource(path="a.jsonl")))


def test_the_table_is_where_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "whole", Whole)
    monkeypatch.setitem(tasks.ASKED, "whole", Whole)
    assert task_class("whole") is asked_class("whole") is Whole and measures_of("whole")[0].key == "one"
