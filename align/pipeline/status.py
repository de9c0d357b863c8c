"""Which stages of a recipe are up to date, and why the others are not. Reads and hashes files, writes nothing, needs no
torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align import files
from align.errors import InputError
from align.pipeline import artifacts
from align.pipeline.artifacts import Identity
from align.pipeline.folder import RunFolder
from align.pipeline.identity import as_of_now, explain, identify, left_as_it_was, neutral_values
from align.pipeline.selection import ALL, Selection, needed
from align.recipe import reference_syntax
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Stage

COMPARED_BY_CONTENT = 2 * 10**9
"""Artefacts up to this many bytes are verified by sha256 before a stage counts as up to date, larger ones only when a
stage reads them."""


@dataclass(frozen=True)
class StageStatus:
    """Whether a stage has to run, and why."""

    name: str
    state: Literal["up to date", "to run", "waits", "not selected"]
    """``waits``: a stage that it needs has to run first; whether this one must run depends on the result. ``not
    selected``: it was not checked."""
    reason: str
    folder: Path
    """Folder of its result, which may not exist yet."""
    identity: Identity | None
    """None in the states ``waits`` and ``not selected``."""
    replaces: bool = False
    """It has to run and would replace a finished result of other settings or inputs."""
    refused: bool = False
    """It would replace such a result, but the selection does not allow that."""
    note: str = ""
    """For a stage that is up to date: changed settings that do not affect its result."""

    @property
    def words(self) -> str:
        """The reason, and whether running it is refused."""
        return f"{self.reason}; refused without --replace" if self.refused else self.reason


def status(loaded: LoadedRecipe, runs_dir: Path = Path("runs"), selection: Selection = ALL) -> dict[str, StageStatus]:
    """What a run would do with each stage. Reads and hashes, writes nothing, needs no torch.

    Raises :class:`InputError` where the run would: a selected stage needs one that is neither selected nor up to date.
    """
    run = RunFolder.of(loaded, runs_dir)
    selected = selection.stages(loaded)
    concerned = needed(loaded, selected)
    states: dict[str, StageStatus] = {}
    for name in loaded.order:
        waiting = ", ".join(need for need in loaded.dependencies(name) if states[need].state != "up to date")
        if name not in concerned:
            states[name] = StageStatus(name, "not selected", "", run.stage(name), None)
            continue
        if waiting and name in selected:
            states[name] = StageStatus(name, "waits", f"{waiting} to run first", run.stage(name), None)
            continue
        if waiting:
            states[name] = StageStatus(
                name, "not selected", f"has to be up to date once {waiting} has run", run.stage(name), None
            )
            continue
        states[name] = assess(loaded, run, name, selection)
        if states[name].state == "to run" and name not in selected:
            raise not_selected(loaded, selected, states[name])
    return states


def assess(loaded: LoadedRecipe, run: RunFolder, name: str, selection: Selection) -> StageStatus:
    """The status of a stage whose needs are up to date."""
    identity = identify(loaded, name, lambda text: content_of(loaded, run, text))
    spec = loaded.recipe.stages[name]
    result = run.stage(name)
    reason, note, replaces = _why(result, identity, spec)
    if reason is None and name in selection.force:
        reason = "forced"
    if reason is None:
        return StageStatus(name, "up to date", "", result, identity, note=note)
    left = run.left(name, identity, checkpoints=type(spec).keeps_checkpoints)
    if left:
        reason += "; from the beginning, without what an earlier attempt left" if selection.fresh else f"; {left}"
    return StageStatus(name, "to run", reason, result, identity, replaces, refused=replaces and not selection.replace)


def not_selected(loaded: LoadedRecipe, selected: Collection[str], status: StageStatus) -> InputError:
    """The error for a stage that a selected one needs, which is neither selected nor up to date."""
    needing = ", ".join(other for other in loaded.order if other in selected and status.name in needed(loaded, {other}))
    message = f"stage {needing} needs the result of stage {status.name}, which is not up to date ({status.words})"
    return InputError(loaded.problem(f"stages.{status.name}", message, "`align run` runs all stages"))


def _why(result: Path, identity: Identity, spec: Stage) -> tuple[str | None, str, bool]:
    """Why a result is not that of ``identity`` (None if it is); a note about changed neutral keys; and whether it is a
    finished result of another identity."""
    if not result.exists():
        return "first run", "", False
    try:
        manifest = artifacts.read_manifest(result)
    except InputError:
        return f"output damaged: {artifacts.MANIFEST}", "", False
    old = as_of_now(manifest.identity, spec)
    if old.digest != identity.digest:
        return explain(old, identity), "", True
    problems = artifacts.verify(result, deep=manifest.bytes <= COMPARED_BY_CONTENT)
    if problems:
        names = [Path(problem.file or "").relative_to(result).as_posix() for problem in problems]
        return f"output damaged: {', '.join(names)}", "", False
    return None, left_as_it_was(manifest.neutral, neutral_values(spec)), False


def content_of(loaded: LoadedRecipe, run: RunFolder, text: str) -> str:
    """Content digest of what a reference names. For a hub id it is ``hub:`` and the id: its content is not read."""
    location = locate(loaded, run, text)
    if isinstance(location, str):
        return f"hub:{location}"
    if isinstance(reference_syntax.parse(text, loaded.root), reference_syntax.StageRef):
        return artifacts.artefact_digest(location)
    return files.digest_path(location)


def locate(loaded: LoadedRecipe, run: RunFolder, text: str) -> Path | str:
    """The path, or hub id, that a reference stands for. Raises what :func:`reference_syntax.resolve` does."""
    reference = reference_syntax.parse(text, loaded.root)
    if isinstance(reference, reference_syntax.StageRef):
        return run.stage(reference.name)
    return reference_syntax.resolve(text, loaded.root)
