"""``align eval``: making a recipe of a command line. It is saved beside the run, so that it can be read, repeated and
changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align import files
from align.data.sources.readers import BadRow, read_rows
from align.errors import InputError
from align.recipe.kinds.tasks import ASKED, TASKS, AskedTask, task_class
from align.recipe.reference_syntax import names_code, parse, resolve
from align.recipe.schema import DataSource

STAGE = "eval"


def quick_recipe(
    models: Sequence[str],
    *,
    tasks: Sequence[str],
    data: Sequence[str],
    limit: int | None,
    seed: int,
    max_new_tokens: int | None,
    options: Mapping[str, Any],
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A recipe of one ``evaluate`` stage.

    Args:
        models: references; the others are compared with the first.
        data: each file is used for the task whose columns its first row has; the other files are held-out data.
        limit: number of rows of each file; all when None.
        max_new_tokens: longest answer, to held-out prompts and to tasks; their own defaults when None.
        options: further keys of the stage; those that are None or empty are left out.
        reading: further keys of the data sources; tasks, which have fixed columns, get only those about splits.

    Raises:
        InputError: an unknown task, a task without a file, a file that cannot be read.
    """
    for text in (*models, *data):
        parse(text)  # raises for a text that is not a reference
    asked = {task: _asked(task) for task in tasks}
    reading = dict(reading or {})
    of_split: dict[str, Any] = {key: reading[key] for key in ("split", "subset") if key in reading}
    of_task, held_out = _sorted(asked, data, of_split)
    longest = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    stage: dict[str, Any] = {"kind": "evaluate", "policies": list(models)}
    stage |= {key: value for key, value in options.items() if value}
    if held_out:
        stage |= {"data": [_source(path, limit) | reading for path in held_out], "embedder": None, **longest}
    if of_task:
        stage["tasks"] = [
            {"task": task, "data": _source(path, limit) | of_split, **longest} for task, path in of_task.items()
        ]
    body = {"seed": seed, "model": models[0], "stages": {STAGE: stage}}
    return {"name": f"eval-{files.digest_json(body)[:8]}", **body}


def write_recipe(recipe: Mapping[str, Any], runs_dir: Path) -> Path:
    """Write it as ``NAME.yaml`` into the folder of the runs."""
    path = files.make_folder(runs_dir) / f"{recipe['name']}.yaml"
    files.atomic_write(path, yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))
    return path


def _asked(task: str) -> type[AskedTask]:
    """The class of a task that models answer."""
    found = task_class(task) if task in TASKS or names_code(task) else None
    if found is None:
        raise InputError(
            f"no task {task}",
            hint=f"known: {', '.join(ASKED)}; those of lm-evaluation-harness go to --lm-eval-tasks",
        )
    if not issubclass(found, AskedTask):
        raise InputError(
            f"{task} measures scorers, not models that answer", hint="write a recipe: docs/evaluate.md shows one"
        )
    return found


def _sorted(
    tasks: Mapping[str, type[AskedTask]], data: Sequence[str], of_split: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """(task -> its file, in the order of ``tasks``; the files of no task)."""
    file_of: dict[str, str] = {}
    held_out = []
    for path in data:
        columns = _columns(path, of_split)
        task = next((name for name, asked in tasks.items() if asked.columns <= columns), None)
        if task is None:
            held_out.append(path)
        elif task in file_of:
            raise InputError(f"{path} and {file_of[task]} both have the columns of {task}; give one file for each task")
        else:
            file_of[task] = path
    for task, asked in tasks.items():
        if task not in file_of:
            wanted = ", ".join(sorted(asked.columns))
            raise InputError(
                f"no --data file has the columns of {task}: {wanted}", hint="name the benchmark's file with --data"
            )
    return {task: file_of[task] for task in tasks}, held_out


def _columns(path: str, of_split: Mapping[str, Any]) -> set[str]:
    """The columns of the first row that can be read."""
    bad: list[BadRow] = []
    row = next(read_rows(DataSource(path=path, **of_split), resolve(path, Path.cwd()), bad.append), None)
    if row is None:
        raise InputError(bad[:1])
    return set(row.value)


def _source(path: str, limit: int | None) -> dict[str, Any]:
    return {"path": path} | ({} if limit is None else {"limit": limit})
