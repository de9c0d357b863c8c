"""``align verify``: does everything in a run still have the content that it was published with, and does one stage fit
the next?

Every file of every result is hashed. What a stage was made from is compared with what is there now: the result of
another stage, or a source file, if it lies on this machine.
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
    """What was found of one result."""

    name: str
    damaged: tuple[str, ...] = ()
    """Files whose content is not what the manifest says."""
    unfit: tuple[str, ...] = ()
    """Stages whose result is another one now than that which this one was made from."""
    changed: tuple[str, ...] = ()
    """Sources that have other content now. The result is whole, but would not be made again from them."""
    gone: tuple[str, ...] = ()
    """Sources that are not on this machine any more."""
    manifest: Manifest | None = None
    """None when there is no result."""

    @property
    def wrong(self) -> bool:
        """Is something damaged, or does it not fit together?"""
        return bool(self.damaged or self.unfit)

    def __str__(self) -> str:
        """One line."""
        parts = [f"damaged: {'; '.join(self.damaged)}"] if self.damaged else []
        parts += [f"was made from another result of stage {name} than the one that is there" for name in self.unfit]
        if not parts:
            size = f"{len(self.manifest.files)} files, {self.manifest.bytes:,} bytes" if self.manifest else ""
            parts = [f"ok ({size})" if self.manifest else "no result"]
        parts += [f"note: {name} has changed since" for name in self.changed]
        parts += [f"note: {name} is not there any more" for name in self.gone]
        return f"{self.name}: {'; '.join(parts)}"


def verify_artefact(name: str, folder: Path) -> Checked:
    """One result by itself: the content of its files."""
    problems = artifacts.verify(folder, deep=True)
    damaged = tuple(f"{_relative(problem.file, folder)}: {problem.message}" for problem in problems)
    try:
        manifest = artifacts.read_manifest(folder)
    except InputError:
        manifest = None
    return Checked(name, damaged, manifest=manifest)


def verify_run(run: RunRecord) -> Iterator[Checked]:
    """All results in a run's folder, those of stages that the recipe does not name any more last."""
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
        found = verify_artefact(name, folder)
        if found.manifest is None:
            yield found
            continue
        unfit, changed, gone = sources.compare(found.manifest)
        yield Checked(name, found.damaged, unfit, changed, gone, found.manifest)


class _Sources:
    """What the stages of a run were made from, as it is now; each source is read once."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run
        self._known: dict[str, str | None] = {}

    def compare(self, manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Stages that do not fit, sources that have changed, and sources that are gone."""
        unfit = []
        changed = []
        gone = []
        for text, digest in manifest.identity.inputs.items():
            if text.startswith(_NOT_FILES) or digest.startswith(_NOT_FILES):
                continue  # what the hub has is known by its revision, and code may be anywhere
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
        """None when it has no result, or a damaged one, which is told of that stage itself."""
        try:
            return artifacts.artefact_digest(self._run.folder / "stages" / files.safe_name(name))
        except InputError:
            return None

    def _of_source(self, text: str) -> str | None:
        """None when it is not there."""
        if text not in self._known:
            self._known[text] = self._digest(text)
        return self._known[text]

    def _digest(self, text: str) -> str | None:
        here, root = (Path(str(self._run.about.get(name, "."))) for name in ("folder", "root"))
        with chdir(here if here.is_dir() else os.curdir):  # where relative paths were looked for first
            try:
                place = reference_syntax.resolve(text, root)
                return files.digest_path(place) if isinstance(place, Path) else None
            except (InputError, EnvironmentFault, OSError):
                return None


def _relative(file: str | None, folder: Path) -> str:
    path = Path(file or folder)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) and path != folder else MANIFEST
