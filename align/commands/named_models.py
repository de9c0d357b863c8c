"""Finding a model that is named on a command line, by reference or by the run that made it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from align.errors import InputError
from align.recipe.checks.messages import did_you_mean
from align.recipe.reference_syntax import existing, resolve
from align.runs.record import RunRecord, is_run, list_runs, read_run

_WORDS = {"policy": "policy", "reward_model": "reward model"}


def model_named(text: str, runs_dir: Path, kinds: Collection[str] = ("policy",)) -> str:
    """The path, or hub id, of the model that a command names.

    Raises:
        InputError: no such file, or the run has no such model.
        EnvironmentFault: the package of a ``package:`` reference is not installed.
    """
    if (found := model_of_run(text, runs_dir, kinds)) is not None:
        return str(found)
    try:
        return str(resolve(text, Path.cwd()))
    except InputError as error:
        near = did_you_mean(text, [folder.name for folder in list_runs(runs_dir)])
        raise InputError(error.problems[0].message, hint=near or error.problems[0].hint) from error


def model_of_run(text: str, runs_dir: Path, kinds: Collection[str] = ("policy",)) -> Path | None:
    """The folder of a model that a run made; None when ``text`` names no run.

    ``RUN``, a run's name or folder, means the last model of one of these ``kinds`` that its stages made, ``RUN/STAGE``
    that of a stage. Names of runs have precedence over paths and hub ids.

    Raises :class:`InputError` when the run has no such model.
    """
    name, _, stage = text.rstrip("/").partition("/")
    if is_run(runs_dir / name) and not (stage and existing(text, None)):
        return _of_run(read_run(runs_dir / name), stage, kinds)
    folder = Path(text).expanduser()
    return _of_run(read_run(folder), "", kinds) if is_run(folder) else None


def _of_run(run: RunRecord, stage: str, kinds: Collection[str]) -> Path:
    """The folder of the model of ``stage``, or of the last stage that made one."""
    left = {one.name: one for one in run.stages if one.manifest is not None and one.manifest.type in kinds}
    wanted = " or ".join(_WORDS.get(kind, kind) for kind in kinds)
    if stage and stage not in left:
        run.stage(stage)  # raises for an unknown stage, with a list of the stages
        raise InputError(
            f"stage {stage} of {run.folder} left no {wanted}",
            hint=f"stages that did: {', '.join(left)}" if left else None,
        )
    if not left:
        raise InputError(f"{run.folder} has no {wanted} yet", hint=f"`align show {run.name}` says how it went")
    return left[stage].folder if stage else list(left.values())[-1].folder
