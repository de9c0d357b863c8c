"""``align verify``: checks that all files of a run are unchanged, and that each stage's inputs are those that its
result was made from.

Every file of every result is hashed. The inputs of a result, which are results of other stages or files, are compared
with those that exist now on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from align import files
from align.errors import EnvironmentFault, InputError
from align.pipeline import artifacts
from align.pipeline.artifacts import MANIFEST, Manifest
from align.recipe import reference_syntax
from align.runs.record import RunRecord

_NOT_FILES = ("hub:", "code:")


@dataclass(frozen=True)
class Checked:
    """The outcome for one result."""

    name: str
    damaged: tuple[str, ...] = ()
    """Files whose content is not what the manifest says."""
    unfit: tuple[str, ...] = ()
    """Stages whose results have changed since this result was made from them."""
    changed: tuple[str, ...] = ()
    """Sources whose content has changed. The result is intact, but making it again would give another one."""
    gone: tuple[str, ...] = ()
    """Sources that are not on this machine any more."""
    manifest: Manifest | None = None
    """None when there is no result."""

    @property
    def wrong(self) -> bool:
        """Is a file damaged, or was it made from other results than those that exist?"""
        return bool(self.damaged or self.unfit)

    def __str__(self) -> str:
        """The outcome on one line."""
        parts = [f"damaged: {'; '.join(self.damaged)}"] if self.damaged else []
        parts += [f"was made from another result of stage {name} than the one that is there" for name in self.unfit]
        if not parts:
            size = f"{len(self.manifest.files)} files, {self.manifest.bytes:,} bytes" if self.manifest else ""
            parts = [f"ok ({size})" if self.manifest else "no result"]
        parts += [f"note: {name} has changed since" for name in self.changed]
        parts += [f"note: {name} is not there any more" for name in self.gone]
        return f"{self.name}: {'; '.join(parts)}"


def verify_artefact(name: str, folder: Path) -> Checked:
    """Check the files of one result."""
    problems = artifacts.verify(folder, deep=True)
    damaged = tuple(f"{_relative(problem.file, folder)}: {problem.message}" for problem in problems)
    try:
        manifest = artifacts.read_manifest(folder)
    except InputError:
        manifest = None
    return Checked(name, damaged, manifest=manifest)


def verify_run(run: RunRecord) -> Iterator[Checked]:
    """Check all results in a run's folder; those of stages that are no longer in the recipe come last."""
    named = {stage.folder.name for stage in run.stages}
    others = [
        path for path in sorted((run.folder / "stages").glob("[!.]*")) if path.is_dir() and path.name not in named
    ]
    sources = _Sources(run)
    finished = {stage.name for stage in run.stages if stage.events and stage.events[-1].get("event") == "finished"}
    for name, folder in [
        *((stage.name, stage.folder) for stage in run.stages),
        *((path.name, path) for path in others),
    ]:
        if not folder.exists():
            yield Checked(name, damaged=("its folder is gone",) if name in finished else ())
            continue
        checked = verify_artefact(name, folder)
        if checked.manifest is None:
            yield checked
            continue
        unfit, changed, gone = sources.compare(checked.manifest)
        yield Checked(name, checked.damaged, unfit, changed, gone, checked.manifest)


class _Sources:
    """Digests of the current inputs of a run's stages; each source is hashed once."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run
        self._known: dict[str, str | None] = {}

    def compare(self, manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """(stages whose results changed, sources that changed, sources that are missing)."""
        unfit = []
        changed = []
        gone = []
        for text, digest in manifest.identity.inputs.items():
            if text.startswith(_NOT_FILES) or digest.startswith(_NOT_FILES):
                continue  # hub sources are identified by revision; code may be anywhere
            if text.startswith("stage:"):
                name = text.removeprefix("stage:").strip()
                if self._of_stage(name) not in (None, digest):
                    unfit.append(name)
            elif (now := self._of_source(text)) is None:
                gone.append(text)
            elif now != digest:
                changed.append(text)
        return tuple(unfit), tuple(changed), tuple(gone)

    def _of_stage(self, name: str) -> str | None:
        """The digest of a stage's result; None when it has none or a damaged one, which is reported for that stage."""
        try:
            return artifacts.artefact_digest(self._run.folder / "stages" / files.safe_name(name))
        except InputError:
            return None

    def _of_source(self, text: str) -> str | None:
        """The digest of a source; None when it does not exist."""
        if text not in self._known:
            self._known[text] = self._digest(text)
        return self._known[text]

    def _digest(self, text: str) -> str | None:
        here, root = (Path(str(self._run.about.get(name, "."))) for name in ("folder", "root"))
        with chdir(here if here.is_dir() else os.curdir):  # relative paths were first looked for there
            try:
                place = reference_syntax.resolve(text, root)
                return files.digest_path(place) if isinstance(place, Path) else None
            except (InputError, EnvironmentFault, OSError):
                return None


def _relative(file: str | None, folder: Path) -> str:
    path = Path(file or folder)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) and path != folder else MANIFEST
