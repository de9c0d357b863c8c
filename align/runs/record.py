"""Reading a run's folder: the recipe, its stages with their results and metrics, and its history."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align import files
from align.errors import InputError, Problem
from align.pipeline.artifacts import MANIFEST, Manifest, read_manifest
from align.pipeline.locks import LOCK, read_owner
from align.recipe.checks.messages import did_you_mean
from align.recipe.language import yaml_tree
from align.recipe.reference_syntax import running_order
from align.runs.values import jsonl

State = Literal["finished", "running", "killed", "interrupted", "failed", "not run"]
"""``running``: it started, and its process still exists; ``killed``: it started, and its process does not exist any
more."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StageRecord:
    """A stage of the recipe of the last run, with its result if there is one."""

    name: str
    kind: str
    state: State
    """The state after its last event. A result of an earlier run may exist in any state."""
    needs: tuple[str, ...]
    """The stages whose results it reads, in the order of its references."""
    folder: Path
    """Folder of its result, which may not exist."""
    manifest: Manifest | None
    """The manifest of its result; None when there is no result, or the manifest is damaged."""
    report: Mapping[str, Any]
    """``report.json`` of its result, with the summary of its manifest; empty without a result."""
    metrics: tuple[Row, ...]
    """Rows of ``metrics.jsonl``, by step: of its result or, if it has not finished, of its latest attempt."""
    events: tuple[Row, ...]
    """Its lines of ``history.jsonl``."""
    attempt: Path | None = None
    """The work folder of its latest attempt that did not finish."""

    @property
    def place(self) -> Path:
        """Folder with its files: its result or, if it has not finished, its latest attempt."""
        return self.folder if self.state == "finished" or self.attempt is None else self.attempt

    @property
    def seconds(self) -> float | None:
        """Duration of the attempt that made the result."""
        return next((event.get("seconds") for event in reversed(self.events) if event.get("event") == "finished"), None)

    @property
    def summary(self) -> Mapping[str, Any]:
        """Headline numbers; empty without a result."""
        return self.manifest.summary if self.manifest else {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the stage."""
        return tuple(map(str, self.summary.get("warnings") or ()))


@dataclass(frozen=True)
class RunRecord:
    """``runs/NAME``."""

    folder: Path
    name: str
    recipe: str
    """The recipe's text as it was run, overrides included."""
    tree: Mapping[str, Any]
    """The same as values."""
    about: Mapping[str, Any]
    """``run.json``: command, time and versions."""
    stages: tuple[StageRecord, ...]
    """The stages in running order: each after those that it needs, otherwise as in the file."""
    history: tuple[Row, ...]

    @property
    def state(self) -> State:
        """The worst state of its stages; ``finished`` when all have finished."""
        states = {stage.state for stage in self.stages}
        order: tuple[State, ...] = ("running", "failed", "killed", "interrupted", "not run", "finished")
        return next((state for state in order if state in states), "not run")

    @property
    def seconds(self) -> float:
        """Total duration of the attempts that made the results."""
        return sum(stage.seconds or 0.0 for stage in self.stages if stage.manifest is not None)

    @property
    def last(self) -> str:
        """Time of the last event, as an ISO time; empty when there is none."""
        return str(self.history[-1].get("time", "")) if self.history else str(self.about.get("started", ""))

    def stage(self, name: str) -> StageRecord:
        """A stage by name. Raises :class:`InputError`."""
        found = next((stage for stage in self.stages if stage.name == name), None)
        if found is None:
            known = [stage.name for stage in self.stages]
            raise InputError(
                f"{self.folder} has no stage {name[:80]}",
                hint=did_you_mean(name, known) or f"it has: {', '.join(known)}",
            )
        return found


def is_run(folder: Path) -> bool:
    """Whether a run was recorded in a folder."""
    return (folder / LOCK).is_file() and (folder / "recipe.yaml").is_file()


def list_runs(runs_dir: Path) -> list[Path]:
    """The run folders in ``runs_dir``, the most recent first."""
    folders = [folder for folder in runs_dir.iterdir() if is_run(folder)] if runs_dir.is_dir() else []
    return sorted(
        folders,
        key=lambda folder: (
            -(folder / "run.json").stat().st_mtime if (folder / "run.json").exists() else 0,
            folder.name,
        ),
    )


def find_run(name: str, runs_dir: Path) -> Path:
    """The folder of a run, given by its path or by its name in ``runs_dir``. Raises :class:`InputError`."""
    for folder in (runs_dir / name, Path(name).expanduser()):
        if is_run(folder):
            return folder
    known = ", ".join(folder.name for folder in list_runs(runs_dir))
    raise InputError(
        f"no run {name}",
        hint=f"{runs_dir} has: {known}" if known else f"{runs_dir} has no run; `align run RECIPE` makes one",
    )


def read_run(folder: Path) -> RunRecord:
    """Read a run. The part of a damaged file is left empty (`align verify` lists damaged files).

    Raises :class:`InputError` when the folder is not a run, or its recipe cannot be read.
    """
    path = folder / "recipe.yaml"
    if not is_run(folder):
        raise InputError(Problem("is not a run folder", file=str(folder)))
    try:
        text, problems = path.read_text(encoding="utf-8"), list[Problem]()
    except UnicodeDecodeError as error:
        raise InputError(Problem("is damaged: not UTF-8", file=str(path))) from error
    node = yaml_tree.parse(text, str(path), problems)
    tree = node.plain() if node is not None else None
    if problems or not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise InputError(problems or Problem("is not a recipe", file=str(path)))
    history = tuple(jsonl(folder / "history.jsonl"))
    needs = {name: _needs(spec, tree["stages"]) for name, spec in tree["stages"].items()}
    owner = read_owner(folder)
    live = str(history[-1].get("stage")) if history and owner is not None and owner.lives else None
    kinds = {name: str(spec.get("kind")) if isinstance(spec, dict) else "" for name, spec in tree["stages"].items()}
    stages = tuple(
        _stage(folder, name, kinds[name], needs[name], history, live=name == live) for name in running_order(needs)
    )
    return RunRecord(folder, folder.name, text, tree, _object(folder / "run.json"), stages, history)


def _stage(
    folder: Path, name: str, kind: str, needs: tuple[str, ...], history: Sequence[Row], *, live: bool
) -> StageRecord:
    """Read a stage. ``live`` says that the run's process exists and that the last event of the run is of this stage."""
    result = folder / "stages" / files.safe_name(name)
    events = tuple(event for event in history if event.get("stage") == name)
    try:
        manifest = read_manifest(result) if (result / MANIFEST).exists() else None
    except InputError:
        manifest = None
    state = _state(events, manifest, live=live)
    attempts = sorted((folder / "work" / name).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    written = jsonl(attempts[-1] if attempts and state != "finished" else result / "metrics.jsonl")
    metrics = tuple(sorted((row for row in written if isinstance(row.get("step"), int)), key=lambda row: row["step"]))
    attempt = attempts[-1].parent if attempts else None
    report = {**(manifest.summary if manifest else {}), **_object(result / "report.json")}
    return StageRecord(name, kind, state, needs, result, manifest, report, metrics, events, attempt)


def _state(events: Sequence[Row], manifest: Manifest | None, *, live: bool) -> State:
    started: State = "running" if live else "killed"
    states: dict[str, State] = {
        "started": started,
        "finished": "finished",
        "failed": "failed",
        "interrupted": "interrupted",
    }
    state = states.get(str(events[-1].get("event")), "not run") if events else "not run"
    return "not run" if state == "finished" and manifest is None else state


def _needs(spec: Any, stages: Mapping[str, Any]) -> tuple[str, ...]:
    """Names after ``stage:`` in the texts of a stage, each once."""
    needs: dict[str, None] = {}

    def visit(value: Any) -> None:
        if (
            isinstance(value, str)
            and value.startswith("stage:")
            and (name := value.removeprefix("stage:").strip()) in stages
        ):
            needs[name] = None
        if isinstance(value, dict):
            value = list(value.values())
        for child in value if isinstance(value, list) else ():
            visit(child)

    visit(spec)
    return tuple(needs)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
